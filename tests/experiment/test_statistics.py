"""The table, the tests and the plateaus say what the scores and the logs say."""

import pandas as pd
import pytest

from dwc.experiment.statistics import dice_table, paired_tests, plateau_step, plateau_table, target_step


def volumes(**dice: dict[str, list[float]]) -> pd.DataFrame:
    """A line per row, site and Dice given."""
    lines = [
        {"row": row, "site": site, "subject": f"{site}{k}", "image": f"{site}{k}.nii.gz", "dice": value}
        for row, sites in dice.items()
        for site, values in sites.items()
        for k, value in enumerate(values)
    ]
    return pd.DataFrame(lines)


def log(*dice: float | None, plateau: int | None = None) -> list[dict]:
    return [{"step": 10 * (k + 1), "dice": value, "plateau_step": plateau} for k, value in enumerate(dice)]


def test_the_average_weighs_a_site_by_its_volumes_and_leaves_the_unseen_site_out():
    table = dice_table(volumes(b={"H": [0.8, 0.6, 0.7], "N": [0.1], "B": [0.5], "W": [0.3], "A": [0.9]}))
    assert list(table.columns) == ["H", "N", "B", "W", "Avg.", "A"]
    assert table.loc["b"].tolist() == pytest.approx([0.7, 0.1, 0.5, 0.3, (0.8 + 0.6 + 0.7 + 0.1 + 0.5 + 0.3) / 6, 0.9])


def test_rows_stay_in_the_order_in_which_they_were_scored():
    sites = {site: [0.5] for site in "HNBWA"}
    assert list(dice_table(volumes(z=sites, a=sites)).index) == ["z", "a"]


def test_pairs_are_the_same_volumes_whatever_the_order_of_lines():
    a = {"H": [0.5, 0.7, 0.6], "A": [0.4, 0.5]}
    b = {"H": [0.4, 0.5, 0.3], "A": [0.4, 0.6]}
    shuffled = volumes(a=a, b=b).sample(frac=1, random_state=0)
    tests = paired_tests(shuffled, [("a", "b"), ("a", "not scored")]).set_index("columns")
    assert list(tests["comparison"]) == ["a - b"] * 2
    assert tests.loc["H, N, B, W", "n"] == 3
    assert tests.loc["H, N, B, W", "mean_difference"] == pytest.approx(0.2)
    assert tests.loc["A", "mean_difference"] == pytest.approx(-0.05)
    assert tests.loc["H, N, B, W", "ci_low"] < 0.2 < tests.loc["H, N, B, W", "ci_high"]


def test_volumes_of_other_seeds_are_other_pairs():
    part = volumes(a={"H": [0.5, 0.7]}, b={"H": [0.4, 0.5]})
    both = pd.concat([part.assign(seed=seed) for seed in (0, 1)])
    assert paired_tests(both, [("a", "b")])["n"].tolist() == [4, 0]


@pytest.mark.parametrize(
    ("lines", "step"),
    [
        (log(0.1, 0.3, 0.40, 0.41, 0.40), 30),
        (log(0.1, 0.40, 0.3, 0.39, 0.40), 40),  # it has to stay there
        (log(0.1, 0.2, 0.3, 0.4), None),  # still rising at the end
        (log(0.4), None),
        ([], None),
    ],
)
def test_under_one_cycle_the_plateau_is_where_the_dice_stays_within_the_margin_of_its_end(lines, step):
    assert plateau_step(lines, "one_cycle") == step


def test_under_a_constant_learning_rate_the_plateau_is_the_trainers():
    assert plateau_step(log(0.1, 0.9, 0.9, plateau=7), "constant") == 7
    assert plateau_step(log(0.1, 0.9, 0.9), "constant") is None


def test_the_target_is_reached_at_the_first_step_as_good():
    assert target_step(log(None, 0.3, 0.5, 0.4), 0.4) == 30
    assert target_step(log(0.1, 0.2), 0.4) is None


def test_speedups_are_the_map_networks_steps_over_the_vcl_networks():
    slow, fast = log(0.1, 0.2, 0.3, 0.4, 0.4, 0.4), log(0.2, 0.5, 0.5)
    row = plateau_table([("N", slow, fast)], "one_cycle", "one_cycle").iloc[0]
    assert (row["map_steps"], row["vcl_steps"]) == (60, 30)
    assert (row["map_plateau_step"], row["vcl_plateau_step"], row["plateau_speedup"]) == (40, 20, 2)
    assert row["target_dice"] == pytest.approx(0.38)
    assert (row["map_target_step"], row["vcl_target_step"], row["target_speedup"]) == (40, 20, 2)


def test_a_target_that_is_never_reached_has_no_speedup():
    row = plateau_table([("N", log(0.1, 0.4), log(0.2, 0.3))], "one_cycle", "one_cycle").iloc[0]
    assert pd.isna(row["vcl_target_step"])
    assert pd.isna(row["target_speedup"])
