"""Write tab-separated tables."""

import csv
import io
from collections.abc import Iterable, Sequence

from dwc.base.cells import as_text

__all__ = ["as_tsv"]


def as_tsv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    """A tab-separated table in UTF-8; no cell can run as a formula in a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(header)
    writer.writerows([as_text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue().encode()
