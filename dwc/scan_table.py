"""The table of all segmented scans, one row each: quality, and volumes and mean entropy of each structure."""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dwc.base.tsv import as_tsv
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.prediction import Prediction

__all__ = ["FAILURES", "TABLE", "Row", "failures_table", "scan_table", "structures"]

TABLE, FAILURES = "volumes.tsv", "failures.tsv"
_MISSING = "n/a"
_UNITS = {"volume_mm3": "mm3", "sd_mm3": "sd_mm3", "entropy": "entropy"}  # ends of the names of columns


@dataclass(frozen=True)
class Row:
    """A scan of the table.

    Attributes
    ----------
    name : str
        Where its results lie below the output folder, without suffix.
    flag : str
        pass, check or failed.
    structures : list of dict
        Of `structures`; none for a failed scan.
    content : str or None
        SHA-256 of the image on the networks' grid, by which one scan under two names is found.
    """

    name: str
    flag: str
    reasons: tuple[str, ...]
    structures: list[dict[str, Any]]
    content: str | None = None


def structures(prediction: Prediction, mm3: np.ndarray, label_map: LabelMap, grid: Grid) -> list[dict[str, Any]]:
    """Name, volume, its standard deviation over draws and mean entropy (nats) of all classes together, then of each.

    Class 0 is left out. Volumes are `mm3`, counted on the written grid, the rest is counted on the conformed one. A
    value that does not exist is None: the deviation of a single draw, the entropy of a class without voxels.
    """
    counts = np.bincount(prediction.labels.ravel(), minlength=label_map.n_classes)[1:]
    entropy = np.bincount(prediction.labels.ravel(), prediction.entropy.ravel(), label_map.n_classes)[1:]
    drawn = np.column_stack([prediction.draws[:, 1:].sum(axis=1), prediction.draws[:, 1:]])
    deviations = drawn.std(axis=0, ddof=1) * grid.voxel_size**3 if len(drawn) > 1 else [None] * drawn.shape[1]
    rows = zip(
        ("total", *label_map.titles[1:]), (mm3[1:].sum(), *mm3[1:]), deviations, (entropy.sum(), *entropy),
        (counts.sum(), *counts), strict=True,
    )  # fmt: skip
    return [
        {
            "name": name,
            "volume_mm3": round(float(volume), 3),
            "sd_mm3": None if deviation is None else round(float(deviation), 3),
            "entropy": round(float(total / count), 4) if count else None,
        }
        for name, volume, deviation, total, count in rows
    ]


def scan_table(rows: Iterable[Row], label_map: LabelMap) -> bytes:
    """All scans, in the order of their names: quality, its reasons, and each structure's columns."""
    rows = sorted(_with_twins(rows), key=lambda row: row.name)
    names = ("total", *label_map.titles[1:])
    header = ["scan", "quality", "reason", *(f"{name}_{unit}" for name in names for unit in _UNITS.values())]
    body = []
    for row in rows:
        values = [part[key] for part in row.structures for key in _UNITS] or [None] * (len(names) * len(_UNITS))
        cells = [_MISSING if value is None else value for value in values]
        body.append([row.name, row.flag, "; ".join(row.reasons) or _MISSING, *cells])
    return as_tsv(header, body)


def failures_table(rows: Iterable[Row]) -> bytes:
    """The scans that could not be segmented, and why."""
    lines = [(row.name, "; ".join(row.reasons)) for row in rows]
    return as_tsv(("scan", "reason"), sorted(lines))


def _with_twins(rows: Iterable[Row]) -> list[Row]:
    """The rows, with those that hold the same image flagged."""
    rows = list(rows)
    names: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row.content:
            names[row.content].append(row.name)
    return [_with_twin(row, sorted(set(names.get(row.content or "", ())) - {row.name})) for row in rows]


def _with_twin(row: Row, twins: Sequence[str]) -> Row:
    if not twins:
        return row
    reason = f"holds the same image as {', '.join(twins)}; leave one out"
    return replace(row, flag="check", reasons=(*row.reasons, reason))
