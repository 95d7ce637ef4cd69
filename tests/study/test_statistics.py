"""The table and the tests computed from made-up scores."""

import pandas as pd
import pytest

from dwc.study.statistics import dice_table, differences_by_seed, paired_tests

GROUPS = (("H", "N", "B", "W"), ("A",))


def volumes(**dice: dict[str, list[float]]) -> pd.DataFrame:
    """A line per row, site and Dice given."""
    lines = [
        {"row": row, "site": site, "subject": f"{site}{k}", "image": f"{site}{k}.nii.gz", "dice": value}
        for row, sites in dice.items()
        for site, values in sites.items()
        for k, value in enumerate(values)
    ]
    return pd.DataFrame(lines)


def test_the_average_weighs_a_site_by_its_volumes_and_leaves_the_unseen_site_out():
    table = dice_table(volumes(b={"H": [0.8, 0.6, 0.7], "N": [0.1], "B": [0.5], "W": [0.3], "A": [0.9]}), GROUPS)
    assert list(table.columns) == ["H", "N", "B", "W", "Avg.", "A"]
    assert table.loc["b"].tolist() == pytest.approx([0.7, 0.1, 0.5, 0.3, (0.8 + 0.6 + 0.7 + 0.1 + 0.5 + 0.3) / 6, 0.9])


def test_rows_stay_in_the_order_in_which_they_were_scored():
    sites = {site: [0.5] for site in "HNBWA"}
    assert list(dice_table(volumes(z=sites, a=sites), GROUPS).index) == ["z", "a"]


@pytest.mark.parametrize("unit", ["volume", "subject"])
def test_pairs_are_the_same_volumes_whatever_the_order_of_lines(unit):
    a = {"H": [0.5, 0.7, 0.6], "A": [0.4, 0.5]}
    b = {"H": [0.4, 0.5, 0.3], "A": [0.4, 0.6]}
    shuffled = volumes(a=a, b=b, c=a).sample(frac=1, random_state=0)
    tests = paired_tests(shuffled, [("a", "b"), ("a", "not scored")], GROUPS)
    tests = tests[tests["unit"] == unit].set_index("columns")
    assert list(tests["comparison"]) == ["a - b"] * 2
    assert tests.loc["H, N, B, W", "n"] == 3
    assert tests.loc["H, N, B, W", "mean_difference"] == pytest.approx(0.2)
    assert tests.loc["A", "mean_difference"] == pytest.approx(-0.05)
    assert tests.loc["H, N, B, W", "ci_low"] < 0.2 < tests.loc["H, N, B, W", "ci_high"]


def test_a_subject_counts_once_with_the_mean_over_its_volumes_and_a_namesake_at_another_site_is_another():
    part = volumes(a={"H": [0.5, 0.7, 0.4], "N": [0.4]}, b={"H": [0.4, 0.5, 0.1], "N": [0.5]})
    part["subject"] = part["image"].map({"H0.nii.gz": "x", "H1.nii.gz": "x", "H2.nii.gz": "y", "N0.nii.gz": "x"})
    tests = paired_tests(part, [("a", "b")], GROUPS).set_index(["columns", "unit"])
    by_subject, by_volume = (tests.loc[("H, N, B, W", unit)] for unit in ("subject", "volume"))
    assert (by_volume["n"], by_subject["n"]) == (4, 3)
    assert by_volume["mean_difference"] == pytest.approx((0.1 + 0.2 + 0.3 - 0.1) / 4)
    assert by_subject["mean_difference"] == pytest.approx((0.15 + 0.3 - 0.1) / 3)


def test_seeds_add_volumes_and_no_subjects():
    part = volumes(a={"H": [0.5, 0.7]}, b={"H": [0.4, 0.5]})
    both = pd.concat([part.assign(seed=0), part.assign(seed=1, dice=part["dice"] * (1 + (part["row"] == "a")))])
    tests = paired_tests(both, [("a", "b")], GROUPS).set_index(["columns", "unit"])
    assert tests["n"].tolist() == [4, 2, 0, 0]
    assert tests.loc[("H, N, B, W", "subject"), "mean_difference"] == pytest.approx((0.35 + 0.55) / 2)


def test_each_seed_has_its_own_mean_difference():
    part = volumes(a={"H": [0.5, 0.7], "A": [0.2]}, b={"H": [0.4, 0.5], "A": [0.5]})
    both = pd.concat([part.assign(seed=3), part.assign(seed=5, dice=part["dice"] * (1 + (part["row"] == "a")))])
    table = differences_by_seed(both, [("a", "b"), ("a", "not scored")], GROUPS).set_index(["columns", "seed"])
    assert list(table["comparison"].unique()) == ["a - b"]
    assert table["n"].tolist() == [2, 2, 1, 1]
    assert table["mean_difference"].tolist() == pytest.approx([0.15, 0.75, -0.3, -0.1])
