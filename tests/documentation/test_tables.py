"""The tables of results in the documentation are what their CSVs say."""

import importlib.util
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("tables", ROOT / "docs" / "tools" / "tables.py")
tables = importlib.util.module_from_spec(spec)
spec.loader.exec_module(tables)
MARKED = [page for page in sorted((ROOT / "docs").glob("**/*.md")) if "<!-- table: " in page.read_text()]


@pytest.mark.parametrize("page", MARKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_marked_table_is_what_its_file_says(page):
    text = page.read_text(encoding="utf-8")
    assert tables.with_tables(text, page.parent) == text, "run `python docs/tools/tables.py`"


def test_a_changed_number_changes_the_page(tmp_path):
    columns = {"nll sites": 0.2, "dice sites": 0.5, "nll unseen": 0.3, "dice unseen": 0.4}
    rows = [{"method": method, "trainings": n, "time": n, **columns} for method, n in (("start", 0), ("one", 4))]
    page = "<!-- table: asynchronous some.csv -->\n\n| old |\n\nAfter.\n"
    pd.DataFrame(rows).to_csv(tmp_path / "some.csv")
    expected = (
        "<!-- table: asynchronous some.csv -->\n\n| trainings | one |\n| --- | --- |\n"
        "| 0 | 0; 0.2000, 50.0; 0.3000, 40.0 |\n| 4 | 4; 0.2000, 50.0; 0.3000, 40.0 |\n\nAfter.\n"
    )
    assert tables.with_tables(page, tmp_path) == expected
