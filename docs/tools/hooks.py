"""What the documentation site adds to MkDocs: pages from outside docs/, the commands' help, and formulas as MathML.

Nothing is fetched when the site is built or read: browsers draw MathML themselves.
"""

import contextlib
import html
import io
import os
import posixpath
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]

OUTSIDE = {  # file of the repository: its page
    "README.md": "index.md",
    "SECURITY.md": "security.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "dwc_kernels/README.md": "kernels.md",
    "CITATION.cff": "CITATION.cff",
}
COMMANDS = "reference/commands.md"
_LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s:]+)((?:#[^)\s]*)?\))")
_FORMULA = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are not in docs/."""
    for source, page in OUTSIDE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / source)))
    files.append(File.generated(config, COMMANDS, content=commands_page()))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Point links at pages of the site, whose source may lie elsewhere in the repository."""
    sources = {page: source for source, page in OUTSIDE.items()}
    here = page.file.src_uri
    folder = posixpath.dirname(sources.get(here, f"docs/{here}"))

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(folder, match[2]))
        target = OUTSIDE.get(target, target.removeprefix("docs/"))
        return match[1] + posixpath.relpath(target, posixpath.dirname(here) or ".") + match[3]

    return _LINK.sub(link, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Turn LaTeX into MathML."""

    def formula(match: re.Match[str]) -> str:
        display = "block" if match[1] == "div" else "inline"
        return convert(html.unescape(match[2]).strip(), display=display)

    return _FORMULA.sub(formula, content)


def commands_page() -> str:
    """The help of every command and step, as the parsers print it."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    from dwc import cli

    parts = ["# Commands", "Printed by `dwc COMMAND --help`. Each flag is also a key of the YAML file of `--config`."]
    for name, what in cli.COMMANDS.items():
        text = _help(cli.main, name)
        parts += [f"## dwc {name}", f"{what[0].upper()}{what[1:].rstrip('.')}.", text]
        for step in _steps(text):
            parts += [f"### dwc {name} {step}", _help(cli.main, name, step)]
    return "\n\n".join(parts) + "\n"


def _help(main: Callable[[list[str]], int], *words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit), patch.dict(os.environ, COLUMNS="100"):
        main([*words, "--help"])
    text = out.getvalue().strip().replace(" \b", "")  # a backspace, for terminals
    return f"```text\n{text}\n```".replace(f"{ROOT}/", "")


def _steps(text: str) -> list[str]:
    """The names under `Available subcommands` in a help text."""
    return re.findall(r"^    (\w+)", text.partition("Available subcommands:")[2], re.M)
