import csv
import io

import numpy as np
import pytest

from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.prediction import Prediction
from dwc.scan_table import Row, failures_table, scan_table, structures

COARSE = LabelMap.load("coarse")


def prediction(n_draws: int = 2) -> Prediction:
    labels = np.zeros((4, 4, 4), np.uint8)
    labels[0], labels[1] = 1, 2
    entropy = np.where(labels == 1, 0.5, 0.1).astype(np.float32)
    draws = np.zeros((n_draws, COARSE.n_classes), np.int64)
    draws[:, 1], draws[:, 2] = np.arange(n_draws) * 2 + 15, 17 - np.arange(n_draws)
    return Prediction(labels, entropy, entropy, draws)


def rows_of(content: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content.decode()), delimiter="\t"))


def parts(n_draws: int = 2) -> list[dict]:
    mm3 = np.array([256.0, 128, 128, *[0] * 6])
    return structures(prediction(n_draws), mm3, COARSE, Grid(4, 2.0))


def test_each_structure_has_its_volume_spread_and_mean_entropy_and_so_have_all_together():
    total, white, cortex, csf, *_ = parts()
    assert white == {"name": "White-Matter", "volume_mm3": 128.0, "sd_mm3": round(8 * 2**0.5, 3), "entropy": 0.5}
    assert cortex["entropy"] == pytest.approx(0.1)
    assert csf["entropy"] is None
    assert total["volume_mm3"] == 256
    assert total["entropy"] == pytest.approx(0.3)
    assert total["sd_mm3"] == pytest.approx(8 * np.std([32, 33], ddof=1), abs=1e-3)  # draws move voxels from 2 to 1


def test_a_single_draw_has_no_spread():
    assert {part["sd_mm3"] for part in parts(1)} == {None}


def test_the_table_is_the_same_in_any_order_and_has_failed_scans_too():
    rows = [
        Row("b", "pass", (), parts()), Row("a/c", "check", ("odd", "cut off"), parts()),
        Row("z", "failed", ("bad",), []),
    ]  # fmt: skip
    content = scan_table(rows, COARSE)
    assert content == scan_table(rows[::-1], COARSE)
    table = rows_of(content)
    assert [row["scan"] for row in table] == ["a/c", "b", "z"]
    assert [row["quality"] for row in table] == ["check", "pass", "failed"]
    assert [row["reason"] for row in table] == ["odd; cut off", "n/a", "bad"]
    assert float(table[0]["White-Matter_mm3"]) == 128
    assert {table[2][f"total_{unit}"] for unit in ("mm3", "sd_mm3", "entropy")} == {"n/a"}
    assert rows_of(failures_table(rows[2:])) == [{"scan": "z", "reason": "bad"}]


def test_one_image_under_two_names_is_flagged_at_both():
    rows = [Row("a", "pass", (), parts(), "x"), Row("b", "pass", (), parts(), "x"), Row("c", "pass", (), parts(), "y")]
    table = rows_of(scan_table(rows, COARSE))
    assert [row["quality"] for row in table] == ["check", "check", "pass"]
    assert table[0]["reason"] == "holds the same image as b; leave one out"


def test_no_name_of_a_scan_runs_in_a_spreadsheet():
    assert rows_of(scan_table([Row("=cmd|x", "pass", (), parts())], COARSE))[0]["scan"] == "'=cmd|x"
