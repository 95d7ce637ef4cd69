"""Count code, docstring, comment, blank and import lines: `python -m benchmarks.code_size [FOLDER ...]`."""

import ast
import io
import sys
import tokenize
from collections import Counter
from pathlib import Path

KINDS = ("code", "docstring", "comment", "blank", "import")


def kinds_of_lines(source: str) -> Counter[str]:
    """Count the lines of a module by kind; a line of code with a comment is code."""
    lines = source.splitlines()
    kind = {number: "code" if line.strip() else "blank" for number, line in enumerate(lines, 1)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT and lines[token.start[0] - 1].strip().startswith("#"):
            kind[token.start[0]] = "comment"
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            kind |= dict.fromkeys(range(node.lineno, (node.end_lineno or node.lineno) + 1), "import")
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            first = node.body[0]
            kind |= dict.fromkeys(range(first.lineno, (first.end_lineno or first.lineno) + 1), "docstring")
    return Counter(kind.values())


def main(folders: list[str]) -> None:
    total: Counter[str] = Counter()
    print(f"{'':<24}" + "".join(f"{kind:>11}" for kind in KINDS))
    for folder in folders:
        counts: Counter[str] = Counter()
        for path in Path(folder).rglob("*.py"):
            counts += kinds_of_lines(path.read_text(encoding="utf-8"))
        print(f"{folder:<24}" + "".join(f"{counts[kind]:>11}" for kind in KINDS))
        total += counts
    print(f"{'sum':<24}" + "".join(f"{total[kind]:>11}" for kind in KINDS))


if __name__ == "__main__":
    main(sys.argv[1:] or ["dwc", "dwc_kernels"])
