import math

import pandas as pd
import pytest

from dwc.report.findings import DOES_NOT_HOLD, HOLDS, NOT_SHOWN, NOT_TESTED, findings
from dwc.report.results import read_results
from tests.report.studies import CHAINS, DWC, ENSEMBLE, write_pooled, write_study

ABOVE, UNSEEN, ORDER, BETWEEN, FASTER = range(5)
TRAINED = "H, N, B, W"


def judged(out):
    return findings(read_results(out))


def edit(path, where, **values):
    """Write other values into the rows of a CSV where a function of the frame says so."""
    table = pd.read_csv(path)
    for name, value in values.items():
        table.loc[where(table), name] = value
    table.to_csv(path, index=False)


def compared(a, b, columns):
    return lambda tests: (tests["comparison"] == f"{a} - {b}") & (tests["columns"] == columns)


def test_numbers_in_the_papers_order_show_all_five_findings(tmp_path):
    found = judged(write_study(tmp_path))
    assert [finding.verdict for finding in found] == [HOLDS] * 5
    assert "15 volumes" in found[ABOVE].evidence
    assert "On A DWC is between them" in found[BETWEEN].evidence
    assert "N 3.0 times, B 2.5 times, W 5.0 times" in found[FASTER].evidence
    assert "MAP took 400 steps and VCL 150 in all" in found[FASTER].evidence


def test_the_evidence_is_the_studys_own_test(tmp_path):
    out = write_study(tmp_path)
    values = dict(mean_difference=0.0123, ci_low=0.004, ci_high=0.021, p=0.0041, effect_size=0.87, n=13)
    edit(out / "tests.csv", compared(DWC, ENSEMBLE, TRAINED), **values)
    evidence = judged(out)[ABOVE].evidence
    assert evidence == (
        "H → N+B+W → H (DWC) against Ensemble on H, N, B, W: +1.23 points "
        "(95 % interval +0.40 to +2.10; p = 0.004, d_z = 0.87, 13 volumes)."
    )


@pytest.mark.parametrize(
    ("difference", "p", "above", "unseen"),
    [
        (0.02, 0.01, HOLDS, HOLDS),
        (0.02, 0.4, NOT_SHOWN, HOLDS),
        (-0.02, 0.4, DOES_NOT_HOLD, HOLDS),
        (-0.02, 0.01, DOES_NOT_HOLD, DOES_NOT_HOLD),
        (0.02, math.nan, NOT_TESTED, NOT_TESTED),
    ],
)
def test_sign_and_p_decide_whether_dwc_is_above_the_ensemble_or_not_below_it(tmp_path, difference, p, above, unseen):
    out = write_study(tmp_path)
    values = dict(mean_difference=difference, p=p, ci_low=difference - 0.03, ci_high=difference + 0.03)
    for columns in (TRAINED, "A"):
        edit(out / "tests.csv", compared(DWC, ENSEMBLE, columns), **values)
    found = judged(out)
    assert (found[ABOVE].verdict, found[UNSEEN].verdict) == (above, unseen)
    if unseen == HOLDS and p == 0.4:
        assert f"might be {100 * (0.03 - difference):.2f} points below" in found[UNSEEN].evidence
    if math.isnan(p):
        assert "too few volumes to test" in found[UNSEEN].evidence


def test_chains_that_end_alike_do_not_show_that_order_matters(tmp_path):
    out = write_study(tmp_path)
    edit(out / "tests.csv", compared(*CHAINS[::-1], TRAINED), p=0.3, mean_difference=0.001)
    assert judged(out)[ORDER].verdict == NOT_SHOWN
    tests = pd.read_csv(out / "tests.csv")
    tests[~compared(*CHAINS[::-1], TRAINED)(tests)].to_csv(out / "tests.csv", index=False)
    finding = judged(out)[ORDER]
    assert finding.verdict == NOT_TESTED
    assert "on H, N, B, W has not been tested" in finding.evidence


@pytest.mark.parametrize(("skill", "where"), [((0.85, 0.7), "above both"), ((0.5, 0.4), "below both")])
def test_dwc_outside_the_chains_range_is_told_with_its_side(tmp_path, skill, where):
    finding = judged(write_study(tmp_path, skill={DWC: skill}))[BETWEEN]
    assert finding.verdict == DOES_NOT_HOLD
    assert f"On A DWC is {where}" in finding.evidence


@pytest.mark.parametrize(
    ("speedups", "verdict", "sentence"),
    [
        ([3.0, 2.0, 1.0], DOES_NOT_HOLD, "VCL is not faster on W."),
        ([3.0, 2.0, math.nan], NOT_SHOWN, "Pairs of which one shows no plateau: W (1 of 1)."),
        ([math.nan] * 3, NOT_TESTED, "Pairs of which one shows no plateau: N (1 of 1), B (1 of 1), W (1 of 1)."),
    ],
)
def test_vcl_is_faster_only_where_the_steps_say_so(tmp_path, speedups, verdict, sentence):
    out = write_study(tmp_path)
    edit(out / "plateaus.csv", lambda table: table["site"].notna(), plateau_speedup=speedups)
    finding = judged(out)[FASTER]
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
    (out / "plateaus.csv").unlink()
    found = judged(out)
    assert {finding.verdict for finding in found} == {NOT_TESTED}
    assert found[BETWEEN].evidence == "It needs the scores of DWC and both chains."


def test_pooled_seeds_are_tested_together_and_counted_one_by_one(tmp_path):
    out = write_pooled(tmp_path, seeds=3)
    volumes = pd.read_csv(out / "volumes.csv")
    worse = (volumes["row"] == DWC) & (volumes["seed"] == 1) & (volumes["site"] != "A")
    volumes.loc[worse, "dice"] -= 0.3
    volumes.to_csv(out / "volumes.csv", index=False)
    found = judged(out)
    assert "45 volumes), above in 2 of 3 seeds." in found[ABOVE].evidence
    assert "means over 3 seeds" in found[FASTER].evidence
