"""Findings about scans.

A finding is an error where a command would refuse the scan, or the split of the data set; everything else is a warning.
"""

import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from dwc.base import ranks
from dwc.base.errors import InputError, printable
from dwc.data.scan import Scan

__all__ = ["CheckedScan", "Finding", "odd", "tell"]

_MOST_WARNINGS = 20  # that are printed when something else is to be done

Topic = Literal[
    "geometry", "units", "intensity", "cut off", "labels", "left and right", "overlap", "duplicate", "subject", "file"
]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (an error) or odd (a warning) about a scan, as a line that names the file."""

    severity: Literal["error", "warning"]
    topic: Topic
    message: str


@dataclass(frozen=True, eq=False)
class CheckedScan:
    """A scan and what was found.

    Attributes
    ----------
    scan : Scan
        The scan.
    findings : tuple of Finding
        What is wrong or odd.
    facts : dict
        For tables: shape, voxel_mm, axes, intensity (least and greatest value), grey_levels, unlisted_ids and
        labels_on_signal (shares); those that could be determined.
    voxels_of_class : ndarray or None
        Voxels of each class on the grid, [n_classes].
    content : str or None
        SHA-256, hex, of the image on the grid: equal for the same scan in another file format, type or storage order.
    """

    scan: Scan
    findings: tuple[Finding, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    voxels_of_class: np.ndarray | None = None
    content: str | None = None

    def to_json(self) -> list[Any]:
        """Everything but the scan as JSON; `from_json` is its inverse."""
        voxels = None if self.voxels_of_class is None else self.voxels_of_class.tolist()
        return [[vars(finding) for finding in self.findings], self.facts, voxels, self.content]

    @classmethod
    def from_json(cls, scan: Scan, values: list[Any]) -> "CheckedScan":
        findings, facts, voxels, content = values
        facts = {name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()}
        found = tuple(Finding(**finding) for finding in findings)
        return cls(scan, found, facts, None if voxels is None else np.array(voxels), content)

    @property
    def is_refused(self) -> bool:
        """Whether there is an error among the findings."""
        return any(finding.severity == "error" for finding in self.findings)


def tell(checked: Sequence[CheckedScan]) -> None:
    """Raise the first error of checked scans; without any, the first rank prints the first warnings to stderr."""
    _refuse(checked)
    if not ranks.is_main():
        return
    warnings = _warnings_of(checked)
    for line in warnings[:_MOST_WARNINGS]:
        print(f"warning: {printable(line)}", file=sys.stderr)
    if len(warnings) > _MOST_WARNINGS:
        print(f"warning: {len(warnings) - _MOST_WARNINGS} more; dwc data check lists them", file=sys.stderr)


def _refuse(checked: Iterable[CheckedScan]) -> None:
    """Raise the first error of checked scans, and say how many more there are."""
    errors = [finding.message for one in checked for finding in one.findings if finding.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more; `dwc data check` lists them)" if len(errors) > 1 else ""
        raise InputError(f"{errors[0]}{more}")


def _warnings_of(checked: Iterable[CheckedScan]) -> list[str]:
    """The warnings of checked scans, a line each, none twice."""
    return list(dict.fromkeys(f.message for one in checked for f in one.findings if f.severity == "warning"))


def odd(topic: Topic, path: object, what: str) -> Finding:
    """A warning about a file."""
    return Finding("warning", topic, f"{path}: {what}")
