"""Read and write a study's CSV tables and YAML settings.

Names are read as text, so that a subject called NA stays one; only an empty cell is missing.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dwc.base.cells import as_text, from_text
from dwc.base.errors import InputError
from dwc.base.files import write_whole

__all__ = ["as_csv", "read_settings", "read_table", "write_table"]

_WORDS = dict.fromkeys(("row", "against", "subject", "site", "image"), str)


def write_table(path: Path, table: pd.DataFrame, *, index: bool = False) -> None:
    """Write a CSV, whole; numbers with six digits."""
    write_whole(path, as_csv(table, index=index).encode())


def as_csv(table: pd.DataFrame, *, index: bool = False, float_format: str | None = "%.6g") -> str:
    """CSV text; no cell, index or name of a column can run as a formula in a spreadsheet."""
    words = table.select_dtypes(["object", "string"]).columns
    inert = table.assign(**{name: table[name].map(_inert) for name in words}).rename(index=_inert, columns=_inert)
    inert = inert.rename_axis(index=_inert, columns=_inert)
    return inert.to_csv(index=index, float_format=float_format)


def _inert(cell: Any) -> Any:
    return as_text(cell) if isinstance(cell, str) else cell


def read_table(path: Path, columns: Sequence[str] = ()) -> pd.DataFrame:
    """Read a CSV that must have the given columns."""
    try:
        table = pd.read_csv(path, dtype=_WORDS, keep_default_na=False, na_values=[""])
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); run the study again") from error
    except ValueError as error:  # from pandas, or a wrong encoding
        raise InputError(f"{path}: is not a table ({str(error).splitlines()[0]}); run the study again") from error
    for name in _WORDS.keys() & set(table.columns):
        table[name] = table[name].map(from_text, na_action="ignore")
    if missing := [name for name in columns if name not in table]:
        raise InputError(f"{path}: has no column {', '.join(missing)}; run the study again")
    return table


def read_settings(path: Path) -> dict[str, Any]:
    """Read a config.yaml."""
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error}); run the study again") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: is not YAML; remove it and run the study again") from error
    if not isinstance(settings, dict):
        raise InputError(f"{path}: holds no settings; remove it and run the study again")
    return settings
