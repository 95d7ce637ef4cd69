"""Tables and paired tests computed from a study's scores, data frame to data frame."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict

import pandas as pd

from dwc.metrics.significance import PairedTest, paired_test
from dwc.report.results import AVERAGE

__all__ = ["dice_table", "differences_by_seed", "paired_tests"]

_SUBJECT = ["site", "subject"]
_TEST = list(PairedTest.__dataclass_fields__)
_Groups = Sequence[Sequence[str]]  # the training sites, then each unseen site alone


def dice_table(volumes: pd.DataFrame, groups: _Groups) -> pd.DataFrame:
    """Mean Dice without background, 0..1, by row (in order of first appearance) and site.

    `volumes` has a line per row and volume: row, site, dice. Avg. is the mean over all volumes of the training sites.
    """
    training, *unseen = groups
    by_site = volumes.pivot_table(index="row", columns="site", values="dice", aggfunc="mean")
    by_site[AVERAGE] = volumes[volumes["site"].isin(training)].groupby("row")["dice"].mean()
    columns = [*training, AVERAGE, *(site for group in unseen for site in group)]
    return by_site.reindex(index=volumes["row"].unique(), columns=columns).rename_axis(columns=None)


def paired_tests(volumes: pd.DataFrame, pairs: Iterable[tuple[str, str]], groups: _Groups) -> pd.DataFrame:
    """Two-tailed paired t-tests of rows a against b on each group of sites, across volumes and across subjects.

    Across volumes, as in the paper, each volume counts once per seed; but volumes of one subject (sessions, deformed
    copies of one head, several seeds) are not independent. Across subjects, each counts once with its mean over
    volumes. A column anatomy identifies subjects if there is one, otherwise site and subject. Pairs with a missing row
    are skipped.

    Columns: comparison ("a - b"), columns (the group, such as "H, N, B, W"), unit, the fields of `PairedTest`, and
    n_tests, the number of comparisons in the family.
    """
    units = {"volume": _volume(volumes), "subject": ["anatomy"] if "anatomy" in volumes else _SUBJECT}
    compared = list(_comparisons(volumes, pairs, groups))
    tests = []
    for names, part in compared:
        for unit, keys in units.items():
            dice = _paired(part, keys)
            test = paired_test(dice["a"], dice["b"], n_tests=len(compared))
            tests.append({**names, "unit": unit, **asdict(test), "n_tests": len(compared)})
    return pd.DataFrame(tests, columns=["comparison", "columns", "unit", *_TEST, "n_tests"])


def differences_by_seed(volumes: pd.DataFrame, pairs: Iterable[tuple[str, str]], groups: _Groups) -> pd.DataFrame:
    """Mean difference of rows a and b by seed: comparison, columns, seed, n (volumes), mean_difference."""
    rows = []
    for names, part in _comparisons(volumes, pairs, groups):
        dice = _paired(part, _volume(volumes))
        by_seed = (dice["a"] - dice["b"]).groupby(level="seed", sort=False).agg(n="count", mean_difference="mean")
        rows += [{**names, **row} for row in by_seed.reset_index().to_dict("records")]
    return pd.DataFrame(rows, columns=["comparison", "columns", "seed", "n", "mean_difference"])


def _volume(volumes: pd.DataFrame) -> list[str]:
    """The columns that identify a volume."""
    return [*(["seed"] if "seed" in volumes else []), *_SUBJECT, "image"]


def _comparisons(
    volumes: pd.DataFrame, pairs: Iterable[tuple[str, str]], groups: _Groups
) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """The name of each comparison on each group, and its volumes with the rows renamed to a and b."""
    there = set(volumes["row"])
    for a, b in pairs:
        if {a, b} <= there:
            for sites in groups:
                part = volumes[volumes["site"].isin(sites) & volumes["row"].isin((a, b))]
                names = {"comparison": f"{a} - {b}", "columns": ", ".join(sites)}
                yield names, part.assign(row=part["row"].map({a: "a", b: "b"}))


def _paired(part: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean Dice of a and b by `keys`."""
    return part.pivot_table(index=keys, columns="row", values="dice", sort=False).reindex(columns=["a", "b"])
