"""Flags that the text names, outside of blocks of code, exist."""

import contextlib
import io
import re

import pytest

from dwc import cli
from tests.documentation.pages import PAGES, ROOT

OTHERS = {  # torchrun's, mri_convert's, nvflare's and systemd's
    "--conform", "--nnodes", "--nproc-per-node", "--rdzv-endpoint", "--shutdown-timeout", "--standalone",
    "--user",
}  # fmt: skip


@pytest.fixture(scope="module")
def flags() -> dict[str, set[str]]:
    """Flags by command, `train` or `federated join`, with the switched-off form of each switch."""
    found = {}
    for name in cli.COMMANDS:
        text = _help(name)
        found[name] = _flags(text)
        for step in re.findall(r"^    (\w+)", text.partition("Available subcommands:")[2], re.M):
            found[f"{name} {step}"] = _flags(_help(name, step))
    return found


@pytest.mark.parametrize("page", [page for page in PAGES if page != "CHANGELOG.md"])  # which speaks of the past
def test_flags_in_the_text_of_a_page_exist(page, flags):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.S | re.M)
    benchmarks = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "benchmarks").glob("*.py"))
    known = set.union(*flags.values(), OTHERS, re.findall(r'"(--[\w-]+)"', benchmarks))
    for span in re.findall(r"`((?:--|dwc |python -m dwc)[^`]+)`", text):
        used = {flag.replace("_", "-") for flag in re.findall(r"(?<![\w-])--[a-z][\w.-]*", span)}
        words = span.removeprefix("python -m ").split()
        if len(words) > 1 and words[0] == "dwc" and words[1] in cli.COMMANDS:
            command = next(name for name in (" ".join(words[1:3]), words[1]) if name in flags)
            assert used <= flags[command], span
        assert used <= known, span


def _help(*words: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        cli.main([*words, "--help"])
    return out.getvalue()


def _flags(text: str) -> set[str]:
    return set(re.findall(r"(?<![\w-])--[a-z][\w.-]*", text))
