"""Which of the paper's findings (McClure et al. 2018, section 3.2) hold in a study's tables, in words.

Verdicts follow from intervals across subjects, corrected for the number of comparisons;
templates/study.html explains the rules.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import pandas as pd

from dwc.report.results import AVERAGE, Results
from dwc.report.words import number, p_value, points, printed

__all__ = [
    "DOES_NOT_HOLD", "FLOOR", "HOLDS", "MARGIN", "NOT_SHOWN", "NOT_TESTED", "SMALLEST", "UNIT", "Finding",
    "findings_of",
]  # fmt: skip

MARGIN = 0.01  # Dice; "not below" tolerates a smaller loss
SMALLEST = 0.005  # Dice; smaller differences do not matter
FLOOR = 0.1  # Dice above the untrained network; networks below it have learnt too little to be compared
UNIT = "subject"  # volumes of one subject are not independent
HOLDS, DOES_NOT_HOLD, NOT_SHOWN, NOT_TESTED = "holds", "does not hold", "not shown", "not tested"


@dataclass(frozen=True)
class Finding:
    """A finding of the paper, whether it holds here, and the sentences with the numbers behind the verdict."""

    claim: str
    verdict: str
    evidence: str


def findings_of(results: Results) -> list[Finding]:
    """The paper's five findings, judged by a study's tables."""
    near = f"{100 * MARGIN:g} point of Dice"
    return [
        _against_the_ensemble(results, "DWC is above the ensemble on the training sites.", [AVERAGE], line=0),
        _against_the_ensemble(
            results,
            f"DWC is not below the ensemble by {near} or more on {_unseen(results)}.",
            results.unseen,
            line=-MARGIN,
        ),
        _chains_depend_on_order(results),
        _between_the_chains(results),
        _vcl_is_faster(results),
    ]


def _against_the_ensemble(results: Results, claim: str, columns: list[str], *, line: float) -> Finding:
    """Holds if it holds in every column, does not hold if it fails in one."""
    if missing := _missing(results, dwc=1, ensemble=1):
        return Finding(claim, NOT_TESTED, missing)
    if not columns:
        return Finding(claim, NOT_TESTED, "The study has no unseen site.")
    dwc, ensemble = results.of_kind("dwc", "ensemble")
    compared = [_compared(results, dwc, ensemble, column) for column in columns]
    if unlearnt := _unlearnt(results, [dwc, ensemble], columns):
        return Finding(claim, NOT_TESTED, " ".join([*(sentence for _, sentence in compared), unlearnt]))
    verdicts = {_by_interval(test, line) for test, _ in compared}
    verdict = next(each for each in (DOES_NOT_HOLD, NOT_TESTED, NOT_SHOWN, HOLDS) if each in verdicts)
    return Finding(claim, verdict, " ".join(sentence for _, sentence in compared))


def _unseen(results: Results) -> str:
    return "the unseen site" if len(results.unseen) < 2 else f"every unseen site ({', '.join(results.unseen)})"


def _by_interval(test: pd.Series | None, line: float) -> str:
    if test is None or not _has_interval(test):
        return NOT_TESTED
    if line == 0 and _is_small(test):
        return NOT_SHOWN
    if test["ci_low"] > line:
        return HOLDS
    return DOES_NOT_HOLD if test["ci_high"] < line else NOT_SHOWN


def _chains_depend_on_order(results: Results) -> Finding:
    claim = "Training on one site after another depends on their order."
    if missing := _missing(results, chain=2):
        return Finding(claim, NOT_TESTED, missing)
    first, second = results.of_kind("chain")
    tests, sentences = zip(*(_compared(results, second, first, column) for column in results.groups), strict=True)
    if unlearnt := _unlearnt(results, [first, second], results.groups):
        return Finding(claim, NOT_TESTED, " ".join([*sentences, unlearnt]))
    tested = [test for test in tests if _has_interval(test)]
    verdict = NOT_SHOWN if tested else NOT_TESTED
    if any(_side(test) for test in tested):
        verdict = HOLDS
    return Finding(claim, verdict, " ".join(sentences))


def _between_the_chains(results: Results) -> Finding:
    claim = "In the means, DWC lies between the two chains, on the training sites' volumes"
    claim += f" and on {_unseen(results)}." if results.unseen or results.table is None else "."
    if (missing := _missing(results, dwc=1, chain=2)) or results.table is None:
        return Finding(claim, NOT_TESTED, missing)
    dwc, *chains = results.of_kind("dwc", "chain")
    sentences, places, outside = [], [], False
    for column in results.groups:
        ours, theirs = results.table.loc[dwc, column], results.table.loc[chains, column]
        place = "between them"
        if ours > theirs.max() or ours < theirs.min():
            place = "above both" if ours > theirs.max() else "below both"
        named = ", ".join(f"{printed(row)} {100 * dice:.2f}" for row, dice in theirs.items())
        sentences.append(f"On {_sites(results, column)} DWC's mean is {place}: DWC {100 * ours:.2f}, {named}.")
        places.append(place)
        tests, compared = zip(*(_compared(results, dwc, chain, column) for chain in chains), strict=True)
        sentences += compared
        outside |= {_side(test) for test in tests} in ({1}, {-1})
    if unlearnt := _unlearnt(results, [dwc, *chains], results.groups):
        return Finding(claim, NOT_TESTED, " ".join([*sentences, unlearnt]))
    verdict = HOLDS if set(places) == {"between them"} else NOT_SHOWN
    return Finding(claim, DOES_NOT_HOLD if outside else verdict, " ".join(sentences))


def _vcl_is_faster(results: Results) -> Finding:
    claim, table = "VCL is ahead of MAP {} (paper: plateaus after about 3, 2 and 4 times fewer steps).", results.speed
    if table is None:
        evidence = "No site's MAP, VCL and control networks have all been trained."
        return Finding(claim.format("by steps"), NOT_TESTED, evidence)
    by_plateau = bool(table[["map_plateau_step", "vcl_plateau_step"]].notna().any(axis=None))
    claim = claim.format("to the plateau, on every site" if by_plateau else "at equal steps, on every site")
    theirs, ours = (table[f"{kind}_{'plateau_step' if by_plateau else 'dice'}"] for kind in ("map", "vcl"))
    sentences = [_to_the_plateau(table) if by_plateau else _at_equal_steps(table)]
    sentences.append("The steps of the prior network, from which VCL starts, are not counted.")
    known = theirs.notna() & ours.notna()
    small = pd.Series(False, table.index)
    if not by_plateau:
        known &= table[["map_dice", "vcl_dice"]].max(axis=1) >= FLOOR
        small = known & ((ours - theirs).abs() < SMALLEST)
    if missing := _places(table[~known]):
        sentences.append(f"Not comparable on {missing}.")
    if level := _places(table[small]):
        sentences.append(f"Less than {points(SMALLEST).lstrip('+')} points apart on {level}.")
    verdict = NOT_SHOWN if missing or level else HOLDS
    if not known.any():
        verdict = NOT_TESTED
    if behind := _places(table[known & ~small & ~(ours < theirs if by_plateau else ours > theirs)]):
        sentences.append(f"VCL is not {'sooner' if by_plateau else 'above'} on {behind}.")
        verdict = DOES_NOT_HOLD
    return Finding(claim, verdict, " ".join(sentences))


def _to_the_plateau(table: pd.DataFrame) -> str:
    ratio = table["map_plateau_step"] / table["vcl_plateau_step"]
    times = _by_site(table.assign(ratio=ratio), "{ratio:.1f} times")
    return f"Steps to the plateau, MAP over VCL, with constant learning rates and the same window: {times}."


def _at_equal_steps(table: pd.DataFrame) -> str:
    shown = _by_site(
        table.assign(map=100 * table["map_dice"], vcl=100 * table["vcl_dice"], start=100 * table["vcl_start_dice"]),
        "VCL {vcl:.1f} (at step 0 {start:.1f}) and MAP {map:.1f} after {steps:.0f}",
    )
    return f"Dice on held-out sub-volumes at equal steps, MAP from scratch with its own learning rates: {shown}."


def _by_site(table: pd.DataFrame, words: str) -> str:
    """A sentence part per site, formatted with its means over seeds."""
    means = table.groupby("site", sort=False).mean(numeric_only=True)
    return ", ".join(f"{site} {words.format(**row)}" for site, row in means.iterrows())


def _places(table: pd.DataFrame) -> str:
    """The sites of some lines, with their seeds if several are pooled."""
    seeds = [f" (seed {seed})" for seed in table["seed"]] if "seed" in table else [""] * len(table)
    return ", ".join(f"{site}{seed}" for site, seed in zip(table["site"], seeds, strict=True))


def _missing(results: Results, **wanted: int) -> str:
    """A sentence that names the missing kinds of rows; empty if none is missing."""
    names = {"dwc": "DWC", "ensemble": "the ensemble", "chain": "both chains"}
    lacking = [names[kind] for kind, n in wanted.items() if len(results.of_kind(kind)) != n]
    return f"It needs the scores of {' and '.join(lacking)}." if lacking else ""


def _compared(results: Results, a: str, b: str, column: str) -> tuple[pd.Series | None, str]:
    """The paired test of rows a and b across subjects in a column, and a sentence about it."""
    name = f"{printed(a)} against {printed(b)} on {_sites(results, column)}"
    tests = _of(results.tests, results, a, b, column)
    tests = tests[tests["unit"] == UNIT] if len(tests) else tests
    if tests.empty:
        return None, f"{name} has not been tested."
    test = tests.iloc[0]
    sentence = f"{name}: {points(test['mean_difference'])} points"
    if not _has_interval(test):
        return test, f"{sentence}; too few subjects to test ({test['n']:.0f})."
    sentence += (
        f" (95 % interval {points(test['ci_low'])} to {points(test['ci_high'])}; p = {p_value(test['p'])}, "
        f"d_z = {number(test['effect_size'])}, {test['n']:.0f} subjects)"
    )
    each = _of(results.by_seed, results, a, b, column)
    if len(each):
        sentence += f", above in {int((each['mean_difference'] > 0).sum())} of {len(each)} seeds"
    return test, f"{sentence}."


def _of(table: pd.DataFrame | None, results: Results, a: str, b: str, column: str) -> pd.DataFrame:
    """The lines of a comparison; empty without a table."""
    if table is None:
        return pd.DataFrame()
    return table[(table["comparison"] == f"{a} - {b}") & (table["columns"] == _sites(results, column))]


def _sites(results: Results, column: str) -> str:
    return ", ".join(results.groups[column])


def _unlearnt(results: Results, rows: list[str], columns: Iterable[str]) -> str:
    """A sentence that names the rows not clearly above the untrained network; empty if there are none."""
    if results.table is None:
        return ""
    start = results.table.loc["untrained"] if "untrained" in results.table.index else 0 * results.table.iloc[0]
    low = [
        f"{printed(row)} {100 * results.table.loc[row, column]:.1f} % on {_sites(results, column)}"
        for column in columns
        for row in rows
        if results.table.loc[row, column] - start[column] < FLOOR
    ]
    return f"Too little learnt to compare: {', '.join(low)}." if low else ""


def _is_small(test: pd.Series) -> bool:
    """Whether the difference, the middle of its interval, is too small to matter."""
    return abs(test["ci_low"] + test["ci_high"]) / 2 < SMALLEST


def _side(test: pd.Series | None) -> int:
    """1 or -1 if the interval of a relevant difference is above or below 0, else 0."""
    if test is None or not _has_interval(test) or _is_small(test):
        return 0
    return int(test["ci_low"] > 0) - int(test["ci_high"] < 0)


def _has_interval(test: pd.Series | None) -> bool:
    return test is not None and not pd.isna(test["p"])
