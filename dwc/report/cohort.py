"""The scans of a folder that `dwc predict` wrote, and which volumes stand out from those of the other scans."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from dwc.base.cells import from_text
from dwc.base.errors import InputError, one_line
from dwc.scan_table import TABLE

__all__ = ["FEWEST_SCANS", "FROM_MAD", "Cohort", "outlier_limit", "read_cohort", "read_sidecar", "robust_z"]

FEWEST_SCANS = 10  # with fewer, the median absolute deviation says little, and nothing is called an outlier
_LEAST_LIMIT = 3.5  # of |z|; Iglewicz and Hoaglin (1993), for one quantity of many subjects
_FALSE_MARKS = 0.05  # share of the scans that may have a mark by chance
_SIMULATED = 2_000_000  # normal numbers at most
_COHORTS = 2000  # simulated ones at most
FROM_MAD = 1.4826  # times the median absolute deviation is the standard deviation of a normal distribution
_FIRST_COLUMNS = ["scan", "quality", "reason"]
_UNITS = ("mm3", "sd_mm3", "entropy")
_MISSING = "n/a"


@dataclass(frozen=True)
class Cohort:
    """All scans of a folder.

    Attributes
    ----------
    scans : DataFrame
        Columns quality (pass, check, failed) and reason ("" for none); the index is the scans' names.
    mm3, sd_mm3, entropy : DataFrame
        A row per scan and a column per structure, the total of all first; NaN where there is no value.
    z : DataFrame
        Robust z-scores of `mm3`.
    limit : float
        Of |z|: beyond it a volume is an outlier.
    """

    folder: Path
    scans: pd.DataFrame
    mm3: pd.DataFrame
    sd_mm3: pd.DataFrame
    entropy: pd.DataFrame
    z: pd.DataFrame
    limit: float

    @property
    def n_measured(self) -> int:
        """Scans with volumes."""
        return int(self.mm3.notna().any(axis=1).sum())

    def outliers(self, scan: str) -> dict[str, float]:
        """z of each structure whose volume stands out, the most extreme first."""
        z = self.z.loc[scan]
        z = z[z.abs() > self.limit]
        return {str(name): float(z[name]) for name in z.abs().sort_values(ascending=False).index}


def robust_z(values: pd.DataFrame) -> pd.DataFrame:
    """(value - median) / (1.4826 MAD) of each column; NaN with fewer than 10 values, or if half of them are equal."""
    median = values.median()
    mad = (values - median).abs().median()
    known = (mad > 0) & (values.notna().sum() >= FEWEST_SCANS)
    return (values - median) / (FROM_MAD * mad.where(known))


@cache
def outlier_limit(n_scans: int, n_structures: int) -> float:
    """The |z| that one scan in 20 exceeds in any structure if all volumes are normal and independent; at least 3.5.

    It is simulated, always with the same numbers. Few scans make medians uncertain, and many structures give chance
    many tries: at 3.5, more than half of the scans would be marked with 10 scans and 50 structures.
    """
    rng, most = np.random.default_rng(0), []
    for _ in range(min(_COHORTS, 1 + _SIMULATED // (n_scans * n_structures))):
        normal = rng.standard_normal((n_scans, n_structures))
        distance = np.abs(normal - np.median(normal, axis=0))
        most.append((distance / (FROM_MAD * np.median(distance, axis=0))).max(axis=1))
    return max(_LEAST_LIMIT, round(float(np.quantile(most, 1 - _FALSE_MARKS)), 1))


def read_cohort(folder: Path) -> Cohort:
    """Read a folder's table of scans."""
    path = folder / TABLE
    if not path.is_file():
        raise InputError(f"{folder}: has no {TABLE}; give a folder that dwc predict wrote, or a server's kit")
    try:
        table = pd.read_csv(path, sep="\t", dtype=str, keep_default_na=False)
    except (OSError, ValueError) as error:  # ValueError includes all errors of pandas' reader
        raise InputError(f"{path}: cannot be read ({one_line(str(error))}); run dwc predict again") from error
    columns = [str(column) for column in table]
    names = [column.removesuffix("_mm3") for column in columns[3::3]]
    if columns != [*_FIRST_COLUMNS, *(f"{name}_{unit}" for name in names for unit in _UNITS)] or not names:
        raise InputError(f"{path}: is no table of scans (columns {', '.join(columns[:4])} ...); run dwc predict again")
    table["scan"] = table["scan"].map(from_text)
    if (twice := table["scan"].duplicated()).any():
        raise InputError(f"{path}: {table['scan'][twice].iloc[0]} stands there twice; run dwc predict again")
    table = table.set_index("scan")
    scans = table[["quality", "reason"]].map(from_text).replace({"reason": {_MISSING: ""}})
    mm3, sd_mm3, entropy = (_numbers(path, table, names, unit) for unit in _UNITS)
    z = robust_z(mm3)
    n_judged = int(z.notna().any().sum())
    limit = outlier_limit(int(mm3.notna().any(axis=1).sum()), n_judged) if n_judged else _LEAST_LIMIT
    return Cohort(folder, scans, mm3, sd_mm3, entropy, z, limit)


def _numbers(path: Path, table: pd.DataFrame, names: list[str], unit: str) -> pd.DataFrame:
    cells = table[[f"{name}_{unit}" for name in names]].replace({_MISSING: "nan"})
    cells.columns = pd.Index(names)
    try:
        numbers = cells.astype(np.float64)
    except ValueError as error:
        raise InputError(f"{path}: {one_line(str(error))}; run dwc predict again") from error
    if np.isinf(numbers.to_numpy()).any():
        raise InputError(f"{path}: holds an infinite value; run dwc predict again")
    return numbers


def read_sidecar(folder: Path, scan: str) -> dict[str, Any]:
    """What the results of a scan were made from."""
    path = folder / f"{scan}_dseg.json"
    if not path.resolve().is_relative_to(folder.resolve()):
        raise InputError(f"{path}: lies outside of the folder; run dwc predict again")
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read ({one_line(str(error))}); run dwc predict again") from error
    kinds = {"Sources": list, "Maps": list, "SHA256": dict, "Quality": dict, "Conformed": bool}
    odd = [
        key for key, kind in kinds.items() if not isinstance(content, dict) or not isinstance(content.get(key), kind)
    ]
    if odd or not all(isinstance(entry, str) for entry in [*content["Sources"], *content["Maps"]]):
        what = odd[0] if odd else "Sources or Maps"
        raise InputError(f"{path}: {what} is missing or of another type; run dwc predict again")
    return content
