import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dwc.base.cells import as_text, from_text
from dwc.base.tables import as_csv, read_table, write_table


@given(st.one_of(st.text(), st.text(alphabet="'=+-@a\t")))
def test_a_cell_never_runs_and_is_read_back(cell):
    written = as_text(cell)
    assert not written.startswith(("=", "+", "-", "@", "\t", "\r"))
    assert from_text(written) == cell


@pytest.mark.parametrize("site", ["=1+1", "+44", "-x", "@SUM(A1)", "'=quoted", "plain", "NA"])
def test_names_in_a_table_are_read_back_and_numbers_stay_numbers(tmp_path, site):
    table = pd.DataFrame({"site": [site], "dice": [-0.5]})
    write_table(tmp_path / "t.csv", table)
    line = (tmp_path / "t.csv").read_text().splitlines()[1]
    assert not line.startswith(("=", "+", "-", "@"))
    assert line.endswith(",-0.5")
    pd.testing.assert_frame_equal(read_table(tmp_path / "t.csv"), table)


def test_no_index_and_no_name_of_a_column_runs():
    table = pd.DataFrame({"=a": [1.5], "b": ["@x"]}, index=pd.MultiIndex.from_tuples([("-s", 2)], names=["+i", "n"]))
    assert as_csv(table, index=True) == "'+i,n,'=a,b\n'-s,2,1.5,'@x\n"
