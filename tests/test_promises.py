"""SECURITY.md and docs/reliability.md name a test or a command for each promise."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("SECURITY.md", "docs/reliability.md")


@pytest.mark.parametrize("page", PAGES)
def test_every_test_that_a_page_of_promises_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    defined = {
        name
        for path in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"^def (test_\w+)", path.read_text(), re.M)
    }
    named = set(re.findall(r"`(test_\w+)`", text))
    assert named
    assert named <= defined
    for path in re.findall(r"\btests/[\w/]+\.py", text):
        assert (ROOT / path).is_file()
    for module in re.findall(r"python -m (benchmarks\.\w+)", text):
        assert (ROOT / (module.replace(".", "/") + ".py")).is_file()


@pytest.mark.parametrize("page", PAGES)
def test_every_row_of_a_table_of_promises_names_a_test(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    (table,) = re.findall(r"^\| promise \| tests \|\n\| --- \| --- \|\n((?:\|.*\n)+)", text, re.M)
    for row in table.splitlines():
        assert re.search(r"\| [^|]*`(test_|tests/)[\w/.]+`[^|]* \|$", row), row
