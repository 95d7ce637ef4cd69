import math

import numpy as np
import pandas as pd
import pytest

from dwc.report.findings import DOES_NOT_HOLD, HOLDS, NOT_SHOWN, NOT_TESTED, findings_of
from dwc.report.results import read_results
from dwc.study.statistics import paired_tests
from tests.report.studies import CHAINS, DWC, ENSEMBLE, write_pooled, write_study

ABOVE, UNSEEN, ORDER, BETWEEN, FASTER = range(5)
TRAINED = "H, N, B, W"


def judged(out):
    return findings_of(read_results(out))


def edit(path, where, **values):
    """Overwrite values in the rows of a CSV that `where` selects."""
    table = pd.read_csv(path)
    for name, value in values.items():
        table.loc[where(table), name] = value
    table.to_csv(path, index=False)


def compared(a, b, columns, unit="subject"):
    return lambda tests: (tests["comparison"] == f"{a} - {b}") & (tests["columns"] == columns) & (tests["unit"] == unit)


def test_numbers_in_the_papers_order_show_all_five_findings(tmp_path):
    found = judged(write_study(tmp_path))
    assert [finding.verdict for finding in found] == [HOLDS] * 5
    assert "15 subjects" in found[ABOVE].evidence
    assert "On A DWC's mean is between them" in found[BETWEEN].evidence
    assert found[FASTER].claim.startswith("VCL is ahead of MAP at equal steps")
    assert "N VCL 60.0 (at step 0 40.0) and MAP 45.0 after 150, B VCL 55.0" in found[FASTER].evidence
    assert "The steps of the prior network, from which VCL starts, are not counted." in found[FASTER].evidence


def test_the_evidence_is_the_studys_own_test_across_subjects(tmp_path):
    out = write_study(tmp_path)
    values = dict(mean_difference=0.0123, ci_low=0.004, ci_high=0.021, p=0.0041, effect_size=0.87, n=13)
    edit(out / "tests.csv", compared(DWC, ENSEMBLE, TRAINED), **values)
    edit(out / "tests.csv", compared(DWC, ENSEMBLE, TRAINED, "volume"), ci_low=-0.5, ci_high=-0.4)
    finding = judged(out)[ABOVE]
    assert finding.verdict == HOLDS
    assert finding.evidence == (
        "H → N+B+W → H (DWC) against Ensemble on H, N, B, W: +1.23 points "
        "(95 % interval +0.40 to +2.10; p = 0.004, d_z = 0.87, 13 subjects)."
    )


@pytest.mark.parametrize(
    ("low", "high", "above", "unseen"),
    [
        (0.001, 0.03, HOLDS, HOLDS),
        (-0.001, 0.03, NOT_SHOWN, HOLDS),
        (-0.009, 0.0, NOT_SHOWN, HOLDS),
        (-0.02, 0.06, NOT_SHOWN, NOT_SHOWN),  # wide, as with few subjects
        (-0.03, -0.001, DOES_NOT_HOLD, NOT_SHOWN),
        (-0.03, -0.011, DOES_NOT_HOLD, DOES_NOT_HOLD),
        (math.nan, math.nan, NOT_TESTED, NOT_TESTED),
    ],
)
def test_the_place_of_the_interval_decides_above_and_not_below(tmp_path, low, high, above, unseen):
    out = write_study(tmp_path)
    values = dict(mean_difference=0.0, p=math.nan if math.isnan(low) else 0.5, ci_low=low, ci_high=high)
    for columns in (TRAINED, "A"):
        edit(out / "tests.csv", compared(DWC, ENSEMBLE, columns), **values)
    found = judged(out)
    assert (found[ABOVE].verdict, found[UNSEEN].verdict) == (above, unseen)
    if math.isnan(low):
        assert "too few subjects to test" in found[UNSEEN].evidence


@pytest.mark.parametrize(
    ("trained", "unseen", "verdict"),
    [
        ((-0.01, 0.01), (-0.01, 0.01), NOT_SHOWN),
        ((-0.01, 0.01), (-0.03, -0.01), HOLDS),
        ((0.01, 0.02), (-0.01, 0.01), HOLDS),
        ((-0.01, 0.01), (math.nan, math.nan), NOT_SHOWN),
        ((math.nan, math.nan), (math.nan, math.nan), NOT_TESTED),
    ],
)
def test_order_matters_if_an_interval_on_either_does_not_reach_over_0(tmp_path, trained, unseen, verdict):
    out = write_study(tmp_path)
    for columns, (low, high) in ((TRAINED, trained), ("A", unseen)):
        p = math.nan if math.isnan(low) else 0.5
        edit(out / "tests.csv", compared(*CHAINS[::-1], columns), ci_low=low, ci_high=high, p=p)
    assert judged(out)[ORDER].verdict == verdict


def test_chains_that_were_not_compared_leave_order_untested(tmp_path):
    out = write_study(tmp_path)
    tests = pd.read_csv(out / "tests.csv")
    tests[tests["comparison"] != " - ".join(CHAINS[::-1])].to_csv(out / "tests.csv", index=False)
    finding = judged(out)[ORDER]
    assert finding.verdict == NOT_TESTED
    assert "on H, N, B, W has not been tested" in finding.evidence


@pytest.mark.parametrize(("skill", "where"), [((0.85, 0.7), "above both"), ((0.5, 0.4), "below both")])
def test_dwc_outside_the_chains_range_is_reported_as_above_or_below(tmp_path, skill, where):
    out = write_study(tmp_path, skill={DWC: skill})
    finding = judged(out)[BETWEEN]
    assert finding.verdict == DOES_NOT_HOLD
    assert finding.claim.startswith("In the means")
    assert f"On A DWC's mean is {where}" in finding.evidence
    assert finding.evidence.count("95 % interval") == 4  # two chains, two groups of sites
    for columns in (TRAINED, "A"):  # outside in the mean alone: an interval against one chain reaches over 0
        edit(out / "tests.csv", compared(DWC, CHAINS[0], columns), ci_low=-0.01, ci_high=0.01)
    assert judged(out)[BETWEEN].verdict == NOT_SHOWN


@pytest.mark.parametrize(
    ("ours", "verdict", "sentence"),
    [
        ([0.5, 0.46, 0.44], DOES_NOT_HOLD, "VCL is not above on W."),
        ([0.5, 0.46, math.nan], NOT_SHOWN, "Not comparable on W."),
        ([math.nan] * 3, NOT_TESTED, "Not comparable on N, B, W."),
    ],
)
def test_vcl_is_ahead_only_where_its_dice_at_equal_steps_says_so(tmp_path, ours, verdict, sentence):
    out = write_study(tmp_path)
    edit(out / "speed.csv", lambda table: table["site"].notna(), vcl_dice=ours)
    finding = judged(out)[FASTER]
    assert finding.verdict == verdict
    assert sentence in finding.evidence


@pytest.mark.parametrize(
    ("ours", "verdict", "sentence"),
    [
        ([100, 120, 60], HOLDS, "N 3.0 times, B 2.5 times, W 5.0 times"),
        ([100, 120, 300], DOES_NOT_HOLD, "VCL is not sooner on W."),
        ([100, 120, math.nan], NOT_SHOWN, "Not comparable on W."),
    ],
)
def test_plateaus_decide_if_a_study_reports_them(tmp_path, ours, verdict, sentence):
    out = write_study(tmp_path)
    everywhere = dict(map_plateau_step=300, vcl_plateau_step=ours, vcl_dice=0.1)
    edit(out / "speed.csv", lambda table: table["site"].notna(), **everywhere)
    finding = judged(out)[FASTER]
    assert "to the plateau" in finding.claim
    assert finding.verdict == verdict
    assert sentence in finding.evidence


def test_rows_that_were_not_scored_leave_their_findings_untested_and_are_named(tmp_path):
    out = write_study(tmp_path)
    table = pd.read_csv(out / "table.csv")
    table[table["row"] != ENSEMBLE].to_csv(out / "table.csv", index=False)
    found = judged(out)
    assert [finding.verdict for finding in found] == [NOT_TESTED, NOT_TESTED, HOLDS, HOLDS, HOLDS]
    assert found[ABOVE].evidence == "It needs the scores of the ensemble."
    (out / "table.csv").unlink()
    (out / "speed.csv").unlink()
    found = judged(out)
    assert {finding.verdict for finding in found} == {NOT_TESTED}
    assert found[BETWEEN].evidence == "It needs the scores of DWC and both chains."


def test_seeds_are_counted_individually_and_one_that_is_behind_is_named(tmp_path):
    out = write_pooled(tmp_path, seeds=3)
    edit(out / "by_seed.csv", lambda table: table["seed"] == 1, mean_difference=-0.3)
    edit(out / "speed.csv", lambda table: (table["seed"] == 2) & (table["site"] == "B"), vcl_dice=0.1)
    found = judged(out)
    assert "15 subjects), above in 2 of 3 seeds." in found[ABOVE].evidence
    assert found[FASTER].verdict == DOES_NOT_HOLD
    assert "VCL is not above on B (seed 2)." in found[FASTER].evidence
    assert "B VCL 40.0" in found[FASTER].evidence  # the mean over seeds


def test_networks_that_have_not_left_the_untrained_one_behind_get_no_verdict(tmp_path):
    out = write_study(tmp_path)
    table = pd.read_csv(out / "table.csv").set_index("row")
    table.loc[ENSEMBLE] = 0.04
    table.to_csv(out / "table.csv")
    found = judged(out)
    assert [finding.verdict for finding in found] == [NOT_TESTED, NOT_TESTED, HOLDS, HOLDS, HOLDS]
    assert "Too little learnt to compare: Ensemble 4.0 % on H, N, B, W." in found[ABOVE].evidence
    table.loc["untrained"] = 0.63  # well above 0, but nearly all rows are within 10 points of it
    table.to_csv(out / "table.csv")
    assert {finding.verdict for finding in judged(out)[:FASTER]} == {NOT_TESTED}


@pytest.mark.parametrize("sign", [1, -1])
def test_a_difference_too_small_to_matter_shows_nothing_however_significant(tmp_path, sign):
    out = write_study(tmp_path)
    low, high = sorted((sign * 0.0003, sign * 0.0005))
    for pair in ((DWC, ENSEMBLE), CHAINS[::-1], (DWC, CHAINS[0]), (DWC, CHAINS[1])):
        for columns in (TRAINED, "A"):
            edit(out / "tests.csv", compared(*pair, columns), mean_difference=sign * 0.0004, ci_low=low, ci_high=high)
    found = judged(out)
    assert [found[ABOVE].verdict, found[ORDER].verdict] == [NOT_SHOWN] * 2
    assert found[UNSEEN].verdict == HOLDS
    edit(out / "speed.csv", lambda table: table["site"] == "N", map_dice=0.598)
    faster = judged(out)[FASTER]
    assert faster.verdict == NOT_SHOWN
    assert "Less than 0.50 points apart on N." in faster.evidence


def test_vcl_and_map_that_have_both_learnt_nothing_are_not_compared(tmp_path):
    out = write_study(tmp_path)
    edit(out / "speed.csv", lambda table: table["site"].notna(), vcl_dice=0.05, map_dice=0.01)
    assert judged(out)[FASTER].verdict == NOT_TESTED


def test_the_number_of_comparisons_widens_the_intervals_that_decide(tmp_path):
    alone, many = (paired_tests(*_pairs_of(n), (("H",),)) for n in (1, 20))
    first, same = (tests[tests["unit"] == "subject"].iloc[0] for tests in (alone, many))
    assert (first["n_tests"], same["n_tests"]) == (1, 20)
    assert same["mean_difference"] == first["mean_difference"]
    assert first["ci_low"] > 0 > same["ci_low"]


def _pairs_of(n: int):
    """Scores of n rows against one, and the pairs; the first difference is barely significant."""
    rng = np.random.default_rng(0)
    rows = {f"row {k}": 0.5 + 0.02 * rng.standard_normal(8) for k in range(n)}
    rows["row 0"] = 0.516 + 0.014 * np.array([1, -1, 1, -1, 1, -1, 1, -1])
    volumes = [
        {"row": row, "site": "H", "subject": f"{v}", "image": f"{v}", "dice": dice}
        for row, values in {"base": [0.5] * 8, **rows}.items()
        for v, dice in enumerate(values)
    ]
    return pd.DataFrame(volumes), [(row, "base") for row in rows]
