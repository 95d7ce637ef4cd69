"""How names and numbers are printed in charts, sentences and tables."""

import pandas as pd

__all__ = ["DASH", "count", "millilitres", "number", "p_value", "points", "printed"]

DASH, _MINUS = "\N{EN DASH}", "\N{MINUS SIGN}"  # a dash: no number


def printed(row: str) -> str:
    """A row's name, or a difference of two, with typographic arrows and minus."""
    return row.replace("->", " → ").replace(" - ", f" {_MINUS} ")


def number(value: float) -> str:
    """A number with two decimals."""
    return DASH if pd.isna(value) else f"{value:.2f}".replace("-", _MINUS)


def points(difference: float) -> str:
    """A difference in Dice, 0..1, in signed percentage points."""
    return DASH if pd.isna(difference) else f"{100 * difference:+.2f}".replace("-", _MINUS)


def p_value(p: float) -> str:
    """p with three decimals, or in scientific notation if smaller."""
    if pd.isna(p):
        return DASH
    return f"{p:.3f}" if p >= 0.001 else f"{p:.1e}".replace("-", _MINUS)


def count(value: float | None) -> str:
    """A whole number with separated thousands."""
    return DASH if pd.isna(value) else f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")


def millilitres(mm3: float) -> str:
    """A volume in ml without its unit: one decimal from 10 ml on, otherwise two."""
    if pd.isna(mm3):
        return DASH
    return f"{mm3 / 1000:.1f}" if mm3 >= 9995 else f"{mm3 / 1000:.2f}"
