"""Pool several seeds of one study from the tables in their folders; nothing is trained or scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.base.tables import read_settings, read_table, write_table
from dwc.report import studies as pictures
from dwc.report.html import write_report
from dwc.report.results import AVERAGE, column_groups
from dwc.study.paper import comparisons, tests_as_text
from dwc.study.rows import compare_rows, in_words, write_study
from dwc.study.statistics import dice_table, differences_by_seed, paired_tests

__all__ = ["pool", "pool_beyond"]

_TABLES = {  # and their required columns; a table that requires none may be missing
    "rows": ("row", "kind", "networks"),
    "volumes": ("row", "site", "subject", "image", "dice"),
    "classes": ("row",),
    "calibration": (),
    "speed": (),
}


def pool(folders: Sequence[Path], out: Path) -> None:
    """Pool the folders of a study run with several seeds, write tables with the same names and print the main one.

    volumes, classes, calibration and speed gain a column seed; table and table_sd are mean and standard deviation over
    seeds; tests pairs volumes and subjects of all seeds; by_seed has each seed's mean differences; rows has means.
    """
    folders = _given(folders, out)
    config, seeds = _settings(folders)
    tables = {name: _read(folders, seeds, name) for name in _TABLES}
    volumes = tables["volumes"]
    if config.get("manifests") is None:
        if config.get("anatomies") is None:  # each seed simulates different heads under the same names
            volumes["subject"] += " (seed " + volumes["seed"].astype(str) + ")"
        else:
            volumes["anatomy"] = _anatomies(volumes)
    columns = read_table(folders[0] / "table.csv", ("row", AVERAGE)).columns.drop("row")
    groups = list(column_groups(list(columns)).values())
    averages = [dice_table(part, groups) for _, part in volumes.groupby("seed", sort=False)]
    for folder, table in zip(folders, averages, strict=True):
        if list(table.index) != list(averages[0].index):
            raise InputError(f"{folder}: has other rows than {folders[0]}; finish both studies")
    stacked = pd.concat(averages, keys=seeds).groupby(level=1, sort=False)
    mean, sd = stacked.mean(), stacked.std()
    trained = _rows(tables["rows"])
    pairs = comparisons(zip(trained["row"], trained["kind"], strict=True))
    tests, by_seed = paired_tests(volumes, pairs, groups), differences_by_seed(volumes, pairs, groups)
    open_folder(out)
    for name, table in (tables | {"rows": trained, "tests": tests, "by_seed": by_seed}).items():
        if len(table):
            write_table(out / f"{name}.csv", table)
    write_table(out / "table.csv", mean, index=True)
    write_table(out / "table_sd.csv", sd, index=True)
    write_whole(out / "config.yaml", yaml.safe_dump(config, sort_keys=False).encode())
    text = _as_text(mean, sd, tests, by_seed, len(seeds))
    write_whole(out / "table.txt", f"{text}\n".encode())
    print(f"{text}\n\n{write_report(out)}")


def pool_beyond(study: str, folders: Sequence[Path], out: Path) -> pd.DataFrame:
    """Pool a study beyond the paper, run with several seeds, into OUT/<study>/ and print the main table.

    table and table_sd are mean and standard deviation over seeds; volumes has a column seed. tests pairs volumes: where
    the heads are simulated, each seed has its own; given scans and anatomies are the same in several seeds and count
    once, with their mean. Its columns seeds_agree and n_seeds say how many seeds alone have a difference of this sign.
    """
    folders = _given(folders, out)
    config, seeds = _settings(folders, study)
    tables = [read_table(folder / study / "table.csv") for folder in folders]
    tables = [table.astype(dict.fromkeys(table.select_dtypes("bool"), float)) for table in tables]  # a share of seeds
    names = tables[0].columns.drop(tables[0].select_dtypes("float"))  # of a row
    for folder, table in zip(folders, tables, strict=True):
        if list(table) != list(tables[0]) or not table[names].equals(tables[0][names]):
            raise InputError(f"{folder / study}: has other rows than {folders[0] / study}; finish both studies")
    stacked = pd.concat(tables, keys=seeds).drop(columns=names).groupby(level=1, sort=False)
    mean, sd = (tables[0][names].join(figures) for figures in (stacked.mean(), stacked.std()))
    parts = [read_table(folder / study / "volumes.csv", _TABLES["volumes"]) for folder in folders]
    volumes = pd.concat([part.assign(seed=seed) for part, seed in zip(parts, seeds, strict=True)], ignore_index=True)
    asked = read_table(folders[0] / study / "tests.csv", ("row", "against", "column", "value"))
    pairs = list(asked[["row", "against"]].drop_duplicates().itertuples(index=False, name=None))

    def compared(part: pd.DataFrame) -> pd.DataFrame:
        training = [config["origin"], *config["sites"]]
        return pd.concat(compare_rows(training, part, pairs, value) for value in asked["value"].unique())

    tests = compared(_units(volumes, config))
    each = [compared(part)["mean_difference"] for _, part in volumes.groupby("seed")]
    tests["seeds_agree"] = sum((difference * tests["mean_difference"] > 0).astype(int) for difference in each)
    tests["n_seeds"] = len(seeds)
    open_folder(out / study)
    write_study(out / study, config, {"table": mean, "table_sd": sd, "volumes": volumes, "tests": tests})
    _draw(study, config, mean, tests, out / study / f"{study}.png")
    print(f"Means over {len(seeds)} seeds\n{mean.to_string(index=False, float_format='%.4g', na_rep='-')}")
    print(f"\n{in_words(tests)}")
    return mean


def _draw(study: str, config: Mapping[str, Any], table: pd.DataFrame, tests: pd.DataFrame, path: Path) -> None:
    """The picture of a study beyond the paper, from means over seeds."""
    match study:
        case "rounds":
            pictures.rounds(table, config["unseen"], path)
        case "many-sites":
            pictures.many_sites(table, config["origin"], config["unseen"], path)
        case "tempering":
            pictures.tempering(table, config["origin"], len(config["sites"]), path)
        case "leave-one-out":
            pictures.leave_one_out(tests, list(table.columns.drop(["row", "seconds"])), path)


def _units(volumes: pd.DataFrame, config: Mapping[str, Any]) -> pd.DataFrame:
    """The volumes without the seed or with the anatomy, where that tells which of them are independent."""
    if config.get("manifests") is not None:
        return volumes.drop(columns="seed")
    return volumes if config.get("anatomies") is None else volumes.assign(anatomy=_anatomies(volumes))


def _anatomies(volumes: pd.DataFrame) -> list[str]:
    """The anatomy of each volume, which may belong to different sites under different seeds."""
    names = zip(volumes["subject"], volumes["site"], strict=True)
    return [subject.removeprefix(f"{site}-") for subject, site in names]


def _given(folders: Sequence[Path], out: Path) -> list[Path]:
    """Absolute paths of the folders to pool."""
    folders = [Path(folder).expanduser().absolute() for folder in folders]
    if len(folders) < 2:
        raise InputError("`pool`: one folder; give those of two seeds or more")
    if out in folders:
        raise InputError(f"`out` {out}: is one of the folders to pool; give another")
    return folders


def _settings(folders: Sequence[Path], study: str = "") -> tuple[dict[str, Any], list[int]]:
    """The settings without the seed, which must otherwise agree, and the seed of each folder."""
    first: dict[str, Any] = {}
    seeds: list[int] = []
    for folder in folders:
        if not (folder / study / "table.csv").is_file():
            raise InputError(f"{folder / study}: holds no finished study (no table.csv); run the study there first")
        values = read_settings(folder / study / "config.yaml")
        seed = values.pop("seed", 0)
        first = first or values
        if differing := [name for name in first | values if values.get(name) != first.get(name)]:
            raise InputError(
                f"{folder / study}: differs from {folders[0] / study} in {', '.join(differing)}; pool studies that "
                "differ in the seed"
            )
        if seed in seeds:
            raise InputError(f"{folder}: has the same seed {seed} as {folders[seeds.index(seed)]}; give each seed once")
        seeds.append(seed)
    return first, seeds


def _read(folders: Sequence[Path], seeds: Sequence[int], name: str) -> pd.DataFrame:
    """A table of all folders, with a column seed."""
    parts = [pd.DataFrame()]
    for folder, seed in zip(folders, seeds, strict=True):
        if (path := folder / f"{name}.csv").exists() or _TABLES[name]:
            part = read_table(path, _TABLES[name])
            part.insert(0, "seed", seed)
            if name == "rows":
                part["networks"] = part["networks"].map(lambda files, at=folder.name: _under(at, files))
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def _under(folder: str, files: str) -> str:
    return ";".join(f"{folder}/{file}" for file in files.split(";"))


def _rows(rows: pd.DataFrame) -> pd.DataFrame:
    """One line per row: the files of all seeds, mean steps and seconds."""
    by_row = rows.groupby(["row", "kind"], sort=False)
    numbers = by_row[["steps", "total_steps", "plateau_step", "seconds"]].mean()
    return by_row["networks"].agg(";".join).to_frame().join(numbers).reset_index()


def _as_text(mean: pd.DataFrame, sd: pd.DataFrame, tests: pd.DataFrame, by_seed: pd.DataFrame, n_seeds: int) -> str:
    cells = mean.apply(
        lambda column: [f"{100 * m:.2f} ({100 * s:.2f})" for m, s in zip(column, sd[column.name], strict=True)]
    )
    heading = f"Dice in %, mean (standard deviation) over {n_seeds} seeds"
    points = by_seed.assign(mean_difference=100 * by_seed["mean_difference"])
    each = points.to_string(index=False, float_format="%.3g")
    return "\n".join((heading, cells.to_string(), "", tests_as_text(tests), "", "Mean differences by seed", each))
