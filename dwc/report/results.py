"""The tables in a study's folder (one seed or several pooled), for its charts and report; missing ones are None."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dwc.base.errors import InputError
from dwc.base.tables import read_settings, read_table
from dwc.training.log import read_log

__all__ = ["AVERAGE", "INTEREST", "Results", "column_groups", "read_results"]

AVERAGE = "Avg."  # over all training sites
INTEREST = ("pooled", "ensemble", "dwc")  # kinds of rows with charts of classes and calibration
_TABLES = {  # and their required columns
    "rows": ("row", "kind", "networks", "steps", "total_steps"),
    "volumes": ("row", "site", "subject", "image", "dice"),
    "classes": ("row", "site", "class", "name", "dice", "truth_mm3"),
    "calibration": ("row", "site", "kind", "bin", "n", "correct", "sum"),
    "table": ("row", AVERAGE),
    "table_sd": ("row", AVERAGE),
    "tests": (
        "comparison", "columns", "unit", "n", "n_tests", "mean_difference", "ci_low", "ci_high", "t", "p",
        "effect_size",
    ),
    "by_seed": ("comparison", "columns", "seed", "n", "mean_difference"),
    "speed": ("site", "steps", "map_dice", "vcl_dice", "map_plateau_step", "vcl_plateau_step"),
}  # fmt: skip


@dataclass(frozen=True)
class Results:
    """The tables in the folder ``out``, as in the CSV or None, and the settings in config.yaml.

    ``table`` and ``table_sd`` hold mean Dice, 0..1, by row and column, and its standard deviation over pooled seeds.
    """

    out: Path
    rows: pd.DataFrame | None
    volumes: pd.DataFrame | None
    classes: pd.DataFrame | None
    calibration: pd.DataFrame | None
    table: pd.DataFrame | None
    table_sd: pd.DataFrame | None
    tests: pd.DataFrame | None
    by_seed: pd.DataFrame | None
    speed: pd.DataFrame | None
    config: dict[str, Any]

    @property
    def seeds(self) -> list[Any]:
        """The pooled seeds; empty for a study of one seed."""
        return list(self.volumes["seed"].unique()) if self.volumes is not None and "seed" in self.volumes else []

    @property
    def groups(self) -> dict[str, list[str]]:
        """Sites by the column of the table that averages them, see `column_groups`; empty without a table."""
        return {} if self.table is None else column_groups(list(self.table))

    @property
    def unseen(self) -> list[str]:
        """The sites that took no part in training."""
        return list(self.groups)[1:]

    def of_kind(self, *kinds: str) -> list[str]:
        """The names of the scored rows of these kinds, in the order given."""
        if self.rows is None or self.table is None:
            return []
        names = [row for kind in kinds for row in self.rows.loc[self.rows["kind"] == kind, "row"]]
        return [name for name in names if name in self.table.index]

    def log(self, row: str) -> pd.DataFrame | None:
        """The training log of a row's (first) network, one line per epoch; None for computed networks."""
        if self.rows is None:
            return None
        files = self.rows.loc[self.rows["row"] == row, "networks"]
        lines = read_log(self.out / Path(str(files.iloc[0])).parent / "log.jsonl") if len(files) else []
        return pd.DataFrame(lines) if lines else None


def column_groups(columns: Sequence[str]) -> dict[str, list[str]]:
    """Sites by the column that averages them: Avg. of all columns before it, then each unseen site."""
    place = list(columns).index(AVERAGE)
    return {AVERAGE: list(columns[:place])} | {site: [site] for site in columns[place + 1 :]}


def read_results(out: str | Path) -> Results:
    """Read the tables that a study has left in its folder."""
    out = Path(out)
    if not out.is_dir():
        raise InputError(f"{out}: no such folder; give the folder of a study")
    config = out / "config.yaml"
    tables = {name: _read(out / f"{name}.csv", name) for name in _TABLES}
    return Results(out, **tables, config=read_settings(config) if config.is_file() else {})


def _read(path: Path, name: str) -> pd.DataFrame | None:
    table = read_table(path, _TABLES[name]) if path.is_file() else None
    if table is None or table.empty:
        return None
    return table.set_index("row") if name in ("table", "table_sd") else table
