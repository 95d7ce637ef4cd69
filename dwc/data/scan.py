"""A scan of a study: its files, whose it is, and its part of the split."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from dwc.data.paths import check_printable

__all__ = ["SPLITS", "Scan", "is_missing"]

SPLITS = ("train", "test")

_MISSING = ("n/a", "na", "nan", "none", "null", "unknown", "-")


@dataclass(frozen=True)
class Scan:
    """One T1 image, its label volume (None where there is none), whose it is, and its part of the split.

    `fault` says why a scan cannot be used, where the reader of the manifest was to go on; `remark` what is odd about
    its files.
    """

    image: Path
    label: Path | None
    subject: str
    site: str
    split: Literal["train", "test"]
    fault: str = field(default="", compare=False)
    remark: str = field(default="", compare=False)

    def __post_init__(self) -> None:
        for text in (str(self.image), str(self.label), self.subject, self.site):
            check_printable(text)


def is_missing(cell: str | None) -> bool:
    """Whether a table's cell says nothing: it is empty, or a word for that: n/a as BIDS writes it, NA, nan, unknown."""
    return not cell or cell.casefold() in _MISSING
