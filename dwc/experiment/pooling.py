"""Several seeds of one study as one: means and standard deviations over seeds, tests across all their volumes.

Reads the tables that `paper.run` left in each seed's folder and writes tables of the same names; it trains and scores
nothing.
"""

from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import yaml

from dwc.errors import InputError
from dwc.experiment.paper import COMPARISONS, tests_as_text
from dwc.experiment.scoring import write_table
from dwc.experiment.statistics import dice_table, paired_tests
from dwc.files import open_folder, write_whole
from dwc.report.html import write_report

__all__ = ["pool"]

_CONCATENATED = ("volumes", "classes", "calibration", "plateaus")  # with a column seed


def pool(folders: Sequence[Path], out: Path) -> None:
    """Pool the folders of a study that was run with several seeds, and print the table.

    volumes.csv, classes.csv, calibration.csv and plateaus.csv gain a column seed; table.csv is the mean over seeds and
    table_sd.csv the standard deviation; tests.csv pairs the volumes of all seeds; rows.csv has means over seeds.

    Raises
    ------
    InputError
        If a folder holds no finished study, two hold the same seed, studies differ in another setting or in their
        rows, or `out` is one of them or cannot be written.
    """
    folders = [Path(folder).expanduser().absolute() for folder in folders]
    if len(folders) < 2:
        raise InputError("--pool: one folder; give those of two seeds or more")
    if out in folders:
        raise InputError(f"--out {out}: is one of the folders to pool; give another")
    seeds = _seeds(folders)
    tables = {name: _read(folders, seeds, name) for name in (*_CONCATENATED, "rows")}
    volumes = tables["volumes"]
    by_seed = [dice_table(part) for _, part in volumes.groupby("seed", sort=False)]
    for folder, table in zip(folders, by_seed, strict=True):
        if list(table.index) != list(by_seed[0].index):
            raise InputError(f"{folder}: has other rows than {folders[0]}; finish the study there")
    stacked = pd.concat(by_seed, keys=seeds).groupby(level=1, sort=False)
    mean, sd = stacked.mean(), stacked.std()
    tests = paired_tests(volumes, COMPARISONS)
    open_folder(out)
    for name in _CONCATENATED:
        if len(tables[name]):
            write_table(out / f"{name}.csv", tables[name])
    write_table(out / "rows.csv", _rows(tables["rows"]))
    write_table(out / "table.csv", mean, index=True)
    write_table(out / "table_sd.csv", sd, index=True)
    write_table(out / "tests.csv", tests)
    text = _as_text(mean, sd, tests, len(seeds))
    write_whole(out / "table.txt", f"{text}\n".encode())
    print(f"{text}\n\n{write_report(out)}")


def _seeds(folders: Sequence[Path]) -> list[int]:
    """The seed of each folder, after a check that nothing else differs."""
    first, seeds = None, []
    for folder in folders:
        if not (folder / "table.csv").is_file():
            raise InputError(f"{folder}: holds no finished study (no table.csv); run dwc experiment --out {folder}")
        values = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        seed = values.pop("seed")
        first = first or values
        if differing := [name for name in values if values[name] != first.get(name)]:
            raise InputError(
                f"{folder}: differs from {folders[0]} in {', '.join(differing)}; pool studies that differ in the seed"
            )
        if seed in seeds:
            raise InputError(f"{folder}: has seed {seed} as {folders[seeds.index(seed)]} has; give each seed once")
        seeds.append(seed)
    return seeds


def _read(folders: Sequence[Path], seeds: Sequence[int], name: str) -> pd.DataFrame:
    """A table of all folders; calibration is not there where none of its rows was scored."""
    parts = [pd.DataFrame()]
    for folder, seed in zip(folders, seeds, strict=True):
        if (path := folder / f"{name}.csv").exists():
            part = pd.read_csv(path, dtype={"subject": str, "site": str})
            part.insert(0, "seed", seed)
            if name == "rows":
                part["networks"] = part["networks"].map(lambda files, at=folder.name: _under(at, files))
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _under(folder: str, files: str) -> str:
    return ";".join(f"{folder}/{file}" for file in files.split(";"))


def _rows(rows: pd.DataFrame) -> pd.DataFrame:
    """A line per row: the files of all seeds, the means of steps and seconds."""
    by_row = rows.groupby(["row", "kind"], sort=False)
    numbers = by_row[["steps", "total_steps", "plateau_step", "seconds"]].mean()
    return by_row["networks"].agg(";".join).to_frame().join(numbers).reset_index()


def _as_text(mean: pd.DataFrame, sd: pd.DataFrame, tests: pd.DataFrame, n_seeds: int) -> str:
    cells = mean.apply(
        lambda column: [f"{100 * m:.2f} ({100 * s:.2f})" for m, s in zip(column, sd[column.name], strict=True)]
    )
    heading = f"Dice in %, mean (standard deviation) over {n_seeds} seeds"
    return "\n".join((heading, cells.to_string(), "", tests_as_text(tests)))
