"""What a study's scores say: the table, paired tests of its rows, and how far seeds agree.

From data frames to data frames; no network, volume or file is opened here.
"""

from collections.abc import Iterable, Iterator
from dataclasses import asdict

import pandas as pd

from dwc.metrics.significance import PairedTest, paired_test
from dwc.study.settings import TRAINING_SITES, UNSEEN

__all__ = ["COLUMNS", "dice_table", "differences_by_seed", "paired_tests"]

COLUMNS = (*TRAINING_SITES, "Avg.", UNSEEN)
_SUBJECT = ["site", "subject"]
_TEST = list(PairedTest.__dataclass_fields__)


def dice_table(volumes: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice without background, 0..1, of each row (in the order of their first volumes) in each of `COLUMNS`.

    Avg. is over the volumes of all training sites, so that a site weighs as many as it has volumes.

    Parameters
    ----------
    volumes : DataFrame
        A line per row and volume: row, site, dice and more.
    """
    by_site = volumes.pivot_table(index="row", columns="site", values="dice", aggfunc="mean")
    trained_on = volumes[volumes["site"].isin(TRAINING_SITES)]
    by_site["Avg."] = trained_on.groupby("row")["dice"].mean()
    return by_site.reindex(index=volumes["row"].unique(), columns=list(COLUMNS)).rename_axis(columns=None)


def paired_tests(volumes: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Two-tailed paired t-tests of rows a against b, across volumes and across subjects.

    Volumes of one subject are not independent: sessions, deformed copies of one head, or one held-out scan that several
    seeds' networks segmented. Across subjects, each counts once with the mean over its volumes. A column anatomy, where
    there is one, tells subjects apart, else site and subject do. Across volumes, as in the paper, each volume under
    each seed counts.

    Parameters
    ----------
    volumes : DataFrame
        As for `dice_table`; where seeds are pooled with a column seed.
    pairs : iterable of (str, str)
        Names of rows a and b; a pair whose rows are not both there is left out.

    Returns
    -------
    DataFrame
        comparison ("a - b"), columns ("H, N, B, W" or "A"), unit ("volume" or "subject"; each counts the same, n of
        them), and the fields of `dwc.metrics.PairedTest`, differences in Dice.
    """
    units = {"volume": _volume(volumes), "subject": ["anatomy"] if "anatomy" in volumes else _SUBJECT}
    tests = []
    for names, part in _comparisons(volumes, pairs):
        for unit, keys in units.items():
            dice = _paired(part, keys)
            tests.append({**names, "unit": unit, **asdict(paired_test(dice["a"], dice["b"]))})
    return pd.DataFrame(tests, columns=["comparison", "columns", "unit", *_TEST])


def differences_by_seed(volumes: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Mean difference of rows a and b under each seed: all volumes of a seed share its networks' luck.

    Parameters
    ----------
    volumes, pairs
        As for `paired_tests`, with a column seed.

    Returns
    -------
    DataFrame
        comparison, columns, seed, n (volumes) and mean_difference over them.
    """
    rows = []
    for names, part in _comparisons(volumes, pairs):
        dice = _paired(part, _volume(volumes))
        by_seed = (dice["a"] - dice["b"]).groupby(level="seed", sort=False).agg(n="count", mean_difference="mean")
        rows += [{**names, **row} for row in by_seed.reset_index().to_dict("records")]
    return pd.DataFrame(rows, columns=["comparison", "columns", "seed", "n", "mean_difference"])


def _volume(volumes: pd.DataFrame) -> list[str]:
    """The columns that tell a volume from the others."""
    return [*(["seed"] if "seed" in volumes else []), *_SUBJECT, "image"]


def _comparisons(
    volumes: pd.DataFrame, pairs: Iterable[tuple[str, str]]
) -> Iterator[tuple[dict[str, str], pd.DataFrame]]:
    """What each comparison is called, and its volumes at the sites that it is made on, their rows called a and b."""
    there = set(volumes["row"])
    for a, b in pairs:
        if {a, b} <= there:
            for sites in (TRAINING_SITES, (UNSEEN,)):
                part = volumes[volumes["site"].isin(sites) & volumes["row"].isin((a, b))]
                names = {"comparison": f"{a} - {b}", "columns": ", ".join(sites)}
                yield names, part.assign(row=part["row"].map({a: "a", b: "b"}))


def _paired(part: pd.DataFrame, keys: list[str]) -> pd.DataFrame:
    """Mean Dice of a and of b under the same keys."""
    return part.pivot_table(index=keys, columns="row", values="dice", sort=False).reindex(columns=["a", "b"])
