"""What a study's folder holds, for pictures and pages: its tables, read once and asked for by what they mean.

A study of one seed and one that pools several have files of the same names; the pooled ones have a column ``seed`` and
their table one of standard deviations beside it. What a study has not written, as one that ran only some rows, is None
here, and whoever draws it says so.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from dwc.base.errors import InputError
from dwc.base.tables import read_settings, read_table

__all__ = ["AVERAGE", "INTEREST", "Results", "read_results"]

AVERAGE = "Avg."
INTEREST = ("pooled", "ensemble", "dwc")  # kinds of rows that are drawn and compared closely
_TABLES = {  # and the columns without which they say nothing
    "rows": ("row", "kind", "networks", "steps", "total_steps"),
    "volumes": ("row", "site", "subject", "image", "dice"),
    "classes": ("row", "site", "class", "name", "dice", "truth_mm3"),
    "calibration": ("row", "site", "kind", "bin", "n", "correct", "sum"),
    "table": ("row", AVERAGE),
    "table_sd": ("row", AVERAGE),
    "tests": ("comparison", "columns", "unit", "n", "mean_difference", "ci_low", "ci_high", "t", "p", "effect_size"),
    "by_seed": ("comparison", "columns", "seed", "n", "mean_difference"),
    "speed": ("site", "steps", "map_dice", "vcl_dice", "map_plateau_step", "vcl_plateau_step"),
}


@dataclass(frozen=True)
class Results:
    """The tables of a study's folder, each as its CSV has it or None, and the settings.

    Attributes
    ----------
    out : Path
        The folder.
    rows, volumes, classes, calibration, tests, by_seed, speed : DataFrame or None
        Of the files of these names.
    table, table_sd : DataFrame or None
        Mean Dice, 0..1, row by column, and its standard deviation over the seeds of a pooled study.
    config : dict
        Of config.yaml; empty without.
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
        """The seeds that were pooled; empty for a study of one seed."""
        return list(self.volumes["seed"].unique()) if self.volumes is not None and "seed" in self.volumes else []

    @property
    def groups(self) -> dict[str, list[str]]:
        """Sites by the column that averages them: those trained on, and each one that was not."""
        if self.table is None or AVERAGE not in self.table:
            return {}
        columns = list(self.table)
        place = columns.index(AVERAGE)
        return {AVERAGE: columns[:place]} | {site: [site] for site in columns[place + 1 :]}

    @property
    def unseen(self) -> str:
        """The column of the site that took no part in training; the last one of the table."""
        return list(self.groups)[-1]

    def of_kind(self, *kinds: str) -> list[str]:
        """The names of the rows of these kinds that have been scored, in the order of the kinds."""
        if self.rows is None or self.table is None:
            return []
        names = [row for kind in kinds for row in self.rows.loc[self.rows["kind"] == kind, "row"]]
        return [name for name in names if name in self.table.index]

    def log(self, row: str) -> pd.DataFrame | None:
        """The training log of a row's network, a line per epoch; None where there is none, as for an ensemble."""
        files = self.rows.loc[self.rows["row"] == row, "networks"]
        path = self.out / Path(str(files.iloc[0])).parent / "log.jsonl" if len(files) else None
        if path is None or not path.is_file():
            return None
        lines = path.read_text(encoding="utf-8").splitlines()
        return pd.DataFrame([json.loads(line) for line in lines])


def read_results(out: str | Path) -> Results:
    """Read a study's folder.

    Raises
    ------
    InputError
        If it is no folder, or a file in it cannot be read.
    """
    out = Path(out)
    if not out.is_dir():
        raise InputError(f"{out}: no such folder; give the folder of a study")
    config = out / "config.yaml"
    settings = read_settings(config) if config.is_file() else {}
    paths = {name: out / f"{name}.csv" for name in _TABLES}
    tables = {name: read_table(path, _TABLES[name]) if path.is_file() else None for name, path in paths.items()}
    tables = {name: None if table is None or table.empty else table for name, table in tables.items()}
    for name in ("table", "table_sd"):
        tables[name] = None if tables[name] is None else tables[name].set_index("row")
    return Results(out, **tables, config=settings)
