"""The documentation's pages, their code blocks, and the commands in them."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), ROOT / "dwc_kernels" / "README.md")
)
_FENCE = re.compile(r"^(?P<note><!-- not run: .+ -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)
_PROGRAM = re.compile(
    r"(\$ )?(\w+=\S+ )*(dwc|python|torchrun|make|pytest|pip|git|cp|mv|rm|mkdir|touch|cd|source|awk|openssl|nvflare) "
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, or "", its text, whether it is to be run, and the text block after it."""

    language: str
    text: str
    is_run: bool
    printed: str | None

    def commands(self) -> Iterator[str]:
        """Its shell commands; lines that begin with none of the known programs are what a command has printed."""
        lines = iter(self.text.splitlines())
        for line in lines:
            if not _PROGRAM.match(line):
                continue
            while line.endswith("\\") or not _is_whole(line):
                line = line.removesuffix("\\") + "\n" * (not line.endswith("\\")) + next(lines)
            yield line.removeprefix("$ ")


def blocks(page: str) -> list[Block]:
    """The blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = list(_FENCE.finditer(text))
    return [
        Block(match["language"], match["text"], match["note"] is None, _printed(text[match.end() :])) for match in found
    ]


def _printed(after: str) -> str | None:
    """What the block below says that this one prints."""
    match = re.match(r"\s*prints\s+```text\n(.*?)^```$", after, re.M | re.S)
    return match[1] if match else None


def _is_whole(line: str) -> bool:
    try:
        shlex.split(line, comments=True)
    except ValueError:  # an open quotation mark
        return False
    return True
