"""Which of the paper's findings (McClure et al. 2018, section 3.2) hold in a study's numbers, in words.

Each finding is a claim, a verdict and the numbers that decide it, all from the study's tables; a finding whose numbers
are not there says which rows would give them. `ALPHA` is the line between a difference and chance.
"""

from dataclasses import dataclass

import pandas as pd

from dwc.report.results import AVERAGE, Results
from dwc.report.words import DASH, number, p_value, points, printed

__all__ = ["ALPHA", "DOES_NOT_HOLD", "HOLDS", "NOT_SHOWN", "NOT_TESTED", "Finding", "findings"]

ALPHA = 0.05
HOLDS, DOES_NOT_HOLD, NOT_SHOWN, NOT_TESTED = "holds", "does not hold", "not shown", "not tested"


@dataclass(frozen=True)
class Finding:
    """What the paper found, whether it holds here, and the sentences with the numbers that say so."""

    claim: str
    verdict: str
    evidence: str


def findings(results: Results) -> list[Finding]:
    """The paper's five findings, judged by a study's tables."""
    return [
        _above_the_ensemble(results),
        _not_below_it_on_the_unseen_site(results),
        _chains_depend_on_order(results),
        _between_the_chains(results),
        _vcl_is_faster(results),
    ]


def _above_the_ensemble(results: Results) -> Finding:
    claim = "DWC is above the ensemble on the volume-weighted average of the training sites."
    if missing := _missing(results, dwc=1, ensemble=1):
        return Finding(claim, NOT_TESTED, missing)
    test, evidence = _compared(results, *results.of_kind("dwc", "ensemble"), AVERAGE)
    if test is not None and test["mean_difference"] <= 0:
        return Finding(claim, DOES_NOT_HOLD, evidence)
    return Finding(claim, HOLDS if _is_significant(test) else _undecided(test), evidence)


def _not_below_it_on_the_unseen_site(results: Results) -> Finding:
    claim = "DWC is not below the ensemble on the unseen site."
    if missing := _missing(results, dwc=1, ensemble=1):
        return Finding(claim, NOT_TESTED, missing)
    test, evidence = _compared(results, *results.of_kind("dwc", "ensemble"), results.unseen)
    if _undecided(test) == NOT_TESTED:
        return Finding(claim, NOT_TESTED, evidence)
    if _is_significant(test):
        return Finding(claim, HOLDS if test["mean_difference"] > 0 else DOES_NOT_HOLD, evidence)
    room = f"by the interval DWC might be {100 * -test['ci_low']:.2f} points below."
    return Finding(claim, HOLDS, f"{evidence} No difference shown, as in the paper, is no proof of none: {room}")


def _chains_depend_on_order(results: Results) -> Finding:
    claim = "Training on one site after another depends on their order."
    if missing := _missing(results, chain=2):
        return Finding(claim, NOT_TESTED, missing)
    first, second = results.of_kind("chain")
    test, evidence = _compared(results, second, first, AVERAGE)
    _, unseen = _compared(results, second, first, results.unseen)
    return Finding(claim, HOLDS if _is_significant(test) else _undecided(test), f"{evidence} {unseen}")


def _between_the_chains(results: Results) -> Finding:
    claim = "DWC lies between the two chains, on the weighted average and on the unseen site."
    if missing := _missing(results, dwc=1, chain=2):
        return Finding(claim, NOT_TESTED, missing)
    (dwc, *chains), sentences, places = results.of_kind("dwc", "chain"), [], []
    for column in results.groups:
        ours, theirs = results.table.loc[dwc, column], results.table.loc[chains, column]
        places.append("above both" if ours > theirs.max() else "below both" if ours < theirs.min() else "between them")
        named = ", ".join(f"{printed(row)} {100 * dice:.2f}" for row, dice in theirs.items())
        sentences.append(f"On {_sites(results, column)} DWC is {places[-1]}: DWC {100 * ours:.2f}, {named}.")
    return Finding(claim, HOLDS if set(places) == {"between them"} else DOES_NOT_HOLD, " ".join(sentences))


def _vcl_is_faster(results: Results) -> Finding:
    claim = "VCL reaches its plateau in fewer steps than MAP on the same site (the paper: about 3, 2 and 4 times)."
    if results.plateaus is None:
        return Finding(claim, NOT_TESTED, "No pair of a site's MAP and VCL networks has been trained.")
    table = results.plateaus
    by_site = table.groupby("site", sort=False)
    speedups = by_site["plateau_speedup"].mean()
    missing = table[table["plateau_speedup"].isna()].groupby("site", sort=False).size()
    over = f", means over {len(results.seeds)} seeds" if len(results.seeds) > 1 else ""
    sentences = [f"Own steps of MAP over own steps of VCL, those behind H not counted{over}: {_times(speedups)}."]
    if "target_speedup" in table and table["target_speedup"].notna().any():
        to_target = _times(by_site["target_speedup"].mean())
        sentences.append(f"To a Dice a little under the MAP network's last one: {to_target}.")
    if {"map_steps", "vcl_steps"} <= set(table) and (table["map_steps"] != table["vcl_steps"]).any():
        ours, theirs = ("/".join(f"{n:.0f}" for n in table[name].unique()) for name in ("map_steps", "vcl_steps"))
        sentences.append(
            f"MAP took {ours} steps and VCL {theirs} in all; where the learning rate falls to the end of a training, "
            "part of the ratio is theirs."
        )
    if len(missing):
        counts = ", ".join(f"{site} ({n} of {len(by_site.get_group(site))})" for site, n in missing.items())
        sentences.append(f"Pairs of which one shows no plateau: {counts}.")
    known = speedups.dropna()
    if known.empty:
        return Finding(claim, NOT_TESTED, " ".join(sentences))
    if slower := list(known.index[known <= 1]):
        return Finding(claim, DOES_NOT_HOLD, " ".join([*sentences, f"VCL is not faster on {', '.join(slower)}."]))
    return Finding(claim, NOT_SHOWN if len(missing) else HOLDS, " ".join(sentences))


def _times(speedups: pd.Series) -> str:
    return ", ".join(f"{site} {DASH if pd.isna(value) else f'{value:.1f} times'}" for site, value in speedups.items())


def _missing(results: Results, **wanted: int) -> str:
    """A sentence on the kinds of rows that are not there in these numbers; empty where all are."""
    names = {"dwc": "DWC", "ensemble": "the ensemble", "chain": "both chains"}
    lacking = [names[kind] for kind, n in wanted.items() if len(results.of_kind(kind)) != n]
    return f"It needs the scores of {' and '.join(lacking)}." if lacking else ""


def _compared(results: Results, a: str, b: str, column: str) -> tuple[pd.Series | None, str]:
    """The study's paired test of row a against row b in a column, and a sentence on it."""
    name, tests = f"{printed(a)} against {printed(b)} on {_sites(results, column)}", results.tests
    if tests is not None:
        is_it = (tests["comparison"] == f"{a} - {b}") & (tests["columns"] == _sites(results, column))
        tests = tests[is_it]
    if tests is None or tests.empty:
        return None, f"{name} has not been tested."
    test = tests.iloc[0]
    sentence = f"{name}: {points(test['mean_difference'])} points"
    if pd.isna(test["p"]):
        return test, f"{sentence}; too few volumes to test ({test['n']:.0f})."
    sentence += (
        f" (95 % interval {points(test['ci_low'])} to {points(test['ci_high'])}; p = {p_value(test['p'])}, "
        f"d_z = {number(test['effect_size'])}, {test['n']:.0f} volumes)"
    )
    if len(results.seeds) > 1:
        by_seed = results.by_seed(column)
        sentence += f", above in {int((by_seed[a] > by_seed[b]).sum())} of {len(by_seed)} seeds"
    return test, f"{sentence}."


def _sites(results: Results, column: str) -> str:
    return ", ".join(results.groups[column])


def _is_significant(test: pd.Series | None) -> bool:
    return test is not None and bool(test["p"] < ALPHA)


def _undecided(test: pd.Series | None) -> str:
    """The verdict where a test leaves it open: there was none, or it tells no difference from chance."""
    return NOT_TESTED if test is None or pd.isna(test["p"]) else NOT_SHOWN
