"""Keep spreadsheets from running table cells as formulas."""

import re

__all__ = ["as_text", "from_text"]

_FORMULA = re.compile(r"'*[=+\-@\t\r]")


def as_text(cell: str) -> str:
    """The cell, with an apostrophe in front if a spreadsheet would take it for a formula."""
    return f"'{cell}" if _FORMULA.match(cell) else cell


def from_text(cell: str) -> str:
    """The inverse of `as_text`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell
