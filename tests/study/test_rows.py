"""Tests of rows beyond the paper from made-up scores: what is paired, what counts once, and how it is put in words."""

import pandas as pd
import pytest
import yaml

from dwc.base.tables import read_table, write_table
from dwc.study.pooling import pool_beyond
from dwc.study.rows import compare_rows, in_words

GAINS = {0: (0.01, 0.03), 1: (0.02, 0.04), 2: (-0.01, -0.02)}  # of row a over b, on two volumes of each seed


def volumes(gains: tuple[float, ...]) -> pd.DataFrame:
    lines = [
        {"row": row, "column": "sites", "site": "N", "subject": f"N-head{k}", "image": f"N-{k}.nii.gz",
         "dice": 0.5 + k / 10 + gain * (row == "a"), "nll": 0.2 - gain * (row == "a")}
        for k, gain in enumerate(gains)
        for row in ("a", "b")
    ]  # fmt: skip
    return pd.DataFrame(lines)


def seeds(folder, **settings):
    """A finished study of three seeds, whose tests ask for a against b."""
    for seed, gains in GAINS.items():
        where = folder / str(seed) / "rounds"
        where.mkdir(parents=True)
        config = {"origin": "H", "sites": ["N"], "unseen": [], "manifests": None, "anatomies": None, "seed": seed}
        (where / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))
        table = {"S": [0, 1], "method": ["start", "dwc"], "round": [0, 1], "sites": [0.5, 0.6], "nll sites": [0.2, 0.1]}
        write_table(where / "table.csv", pd.DataFrame(table))
        write_table(where / "volumes.csv", volumes(gains))
        parts = [compare_rows(["H", "N"], volumes(gains), [("a", "b")], value) for value in ("dice", "nll")]
        write_table(where / "tests.csv", pd.concat(parts))
    return [folder / str(seed) for seed in GAINS]


def test_simulated_heads_of_each_seed_count_alone(tmp_path):
    pool_beyond("rounds", seeds(tmp_path), tmp_path / "pooled")
    tests = read_table(tmp_path / "pooled" / "rounds" / "tests.csv").set_index("value")
    assert list(tests["n"]) == [6, 6]
    assert tests.loc["dice", "mean_difference"] == pytest.approx(0.07 / 6, rel=1e-4)
    assert list(tests["seeds_agree"]) == [2, 2]
    assert list(tests["n_seeds"]) == [3, 3]


@pytest.mark.parametrize("settings", [{"manifests": {"N": "n.csv"}}, {"anatomies": "heads"}])
def test_scans_and_anatomies_that_seeds_share_count_once(settings, tmp_path):
    pool_beyond("rounds", seeds(tmp_path, **settings), tmp_path / "pooled")
    tests = read_table(tmp_path / "pooled" / "rounds" / "tests.csv").set_index("value")
    assert list(tests["n"]) == [2, 2]
    assert tests.loc["dice", "mean_difference"] == pytest.approx(0.07 / 6, rel=1e-4)
    assert list(tests["n_seeds"]) == [3, 3]


def test_a_higher_dice_and_a_lower_nll_are_better():
    steady = [
        compare_rows(["H"], volumes((0.02, 0.0201, 0.0199)), [("a", "b"), ("b", "a")], v) for v in ("dice", "nll")
    ]
    text = in_words(pd.concat(steady)).splitlines()
    assert text[1] == "a against b"
    assert text[2].startswith("  dice: sites 2.00 [1.98, 2.02] better")
    assert text[3].startswith("  nll: sites -0.0200 [-0.0202, -0.0198] better")
    assert text[5].endswith("worse")
    assert text[6].endswith("worse")
    mixed = compare_rows(["H"], volumes((0.02, -0.03, 0.01)), [("a", "b")])
    assert in_words(mixed).endswith("not shown")
