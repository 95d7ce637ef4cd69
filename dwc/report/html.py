"""A study's report: one self-contained HTML page. Tables and pictures are made here, all other text in
templates/study.html.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml

from dwc.base.files import open_folder, write_whole
from dwc.metrics.calibration import error_detection_auc, expected_calibration_error
from dwc.report import plots
from dwc.report.findings import FLOOR, MARGIN, SMALLEST, findings_of
from dwc.report.pages import data_address, render
from dwc.report.results import AVERAGE, INTEREST, Results, read_results
from dwc.report.words import DASH, count, number, p_value, points, printed

__all__ = ["SITES_PICTURE", "write_report"]

SITES_PICTURE = "sites.png"  # in figures/; drawn by the study, which has the volumes
_SPEED = {
    "seed": "seed", "site": "site", "steps": "equal steps", "map_dice": "MAP there", "vcl_dice": "VCL there",
    "vcl_start_dice": "VCL at step 0", "map_steps": "MAP: all steps", "map_last_dice": "MAP: Dice after all",
    "target_dice": "target Dice", "map_target_step": "MAP: steps to target", "vcl_target_step": "VCL: steps to target",
    "map_plateau_step": "MAP: steps to the plateau", "vcl_plateau_step": "VCL: steps to the plateau",
}  # fmt: skip


@dataclass(frozen=True)
class _Table:
    """Printed cells; `marked` rows are shaded, `best` cells (row, column) bold, columns of `words` left-aligned."""

    header: Sequence[str]
    body: Sequence[Sequence[str]]
    marked: Collection[int] = ()
    best: Collection[tuple[int, int]] = ()
    words: Collection[int] = ()


@dataclass(frozen=True)
class _Section:
    """A table and a picture (a data address), each optional."""

    table: _Table | None = None
    picture: str | None = None


def write_report(out: str | Path) -> Path:
    """Write figures/*.png and report.html into a study's folder (one seed or pooled); returns the report's path."""
    results = read_results(out)
    open_folder(results.out / "figures")
    sections = {
        "dice": _dice, "tests": _tests, "seeds": _seeds, "speed": _speed, "slices": _slices, "classes": _classes,
        "calibration": _calibration,
    }  # fmt: skip
    page = render(
        "study.html",
        about=_about(results),
        findings=findings_of(results),
        rules={"margin": points(-MARGIN), "smallest": 100 * SMALLEST, "floor": 100 * FLOOR, "fewest": plots.FEWEST},
        sections={name: section(results) for name, section in sections.items()},
        beyond=_beyond(results),
        training_sites=results.groups.get(AVERAGE, []),
        seeds=results.seeds,
        unscored=[kind for kind in INTEREST if not results.of_kind(kind)],
        config=yaml.safe_dump(results.config, sort_keys=False, allow_unicode=True) if results.config else "",
    )
    path = results.out / "report.html"
    write_whole(path, page)
    return path


def _about(results: Results) -> str:
    """A line that sums up what was run."""
    parts, config = [], results.config
    if results.seeds:
        parts.append(f"{len(results.seeds)} seeds ({', '.join(map(str, results.seeds))})")
    if results.volumes is not None:
        scans = results.volumes.drop_duplicates([*(["seed"] if results.seeds else []), "site", "subject", "image"])
        counts = scans.groupby("site", sort=False).size()
        parts.append("held-out volumes: " + ", ".join(f"{site} {n}" for site, n in counts.items()))
    if "grid_size" in config and "voxel_size" in config:
        parts.append(f"{config['grid_size']}\N{SUPERSCRIPT THREE} voxels of {config['voxel_size']:g} mm")
    parts += [f"{name.replace('_', ' ')} {config[name]}" for name in ("label_map", "width", "seed") if name in config]
    return "; ".join(parts)


def _dice(results: Results) -> _Section | None:
    if results.table is None:
        return None
    table, sd = 100 * results.table, results.table_sd
    rows = None if results.rows is None else results.rows.set_index("row")
    cells = table.map(number)
    if sd is not None:
        cells = cells + (100 * sd).map(lambda value: "" if pd.isna(value) else f" ({value:.2f})")
    header = ["network", *table.columns]
    if rows is not None:
        header += ["own steps", "steps in all"]
        cells = cells.join(rows[["steps", "total_steps"]].map(count))
    body = [[printed(row), *line] for row, line in zip(cells.index, cells.fillna(DASH).to_numpy(), strict=True)]
    best = {(place, 1 + k) for place, k in zip(*np.nonzero((table == table.max()).to_numpy()), strict=True)}
    marked = [place for place, row in enumerate(table.index) if row in results.of_kind("dwc")]
    picture = None
    if rows is not None and results.volumes is not None:
        shown = results.table, rows["kind"].to_dict(), results.volumes, results.groups
        picture = _drawn(results, "table", plots.table_plot, *shown, table_sd=sd)
    return _Section(_Table(header, body, marked, best), picture)


def _tests(results: Results) -> _Section | None:
    if results.tests is None:
        return None
    body = [
        [
            printed(test.comparison), test.columns, test.unit, count(test.n), points(test.mean_difference),
            f"{points(test.ci_low)} to {points(test.ci_high)}", number(test.t), p_value(test.p),
            number(test.effect_size),
        ]
        for test in results.tests.itertuples()
    ]  # fmt: skip
    header = ["difference", "sites", "unit", "n", "points", "95 % interval", "t", "p", "d_z"]
    return _Section(_Table(header, body, words=(1, 2)))


def _seeds(results: Results) -> _Section | None:
    if results.by_seed is None:
        return None
    names = ["comparison", "columns"]
    table = results.by_seed.pivot_table(index=names, columns="seed", values="mean_difference", sort=False)
    body = [
        [printed(comparison), columns, *map(points, line)]
        for (comparison, columns), line in zip(table.index, table.to_numpy(), strict=True)
    ]
    return _Section(_Table(["difference", "sites", *(f"seed {n}" for n in table)], body, words=(1,)))


def _speed(results: Results) -> _Section | None:
    if results.speed is None:
        return None
    table = results.speed
    named = {name: title for name, title in _SPEED.items() if name in table and table[name].notna().any()}
    body = [[_speed_cell(name, value) for name, value in row.items()] for row in table[list(named)].to_dict("records")]
    pairs, picture = {site: _logs(results, site) for site in table["site"].unique()}, None
    logs = {site: pair for site, pair in pairs.items() if pair is not None}
    if logs and not results.seeds:
        origin = next(iter(results.groups[AVERAGE]))
        picture = _drawn(results, "training", plots.training_plot, logs, table, origin=origin)
    return _Section(_Table(list(named.values()), body), picture)


def _speed_cell(name: str, value: Any) -> str:
    if name == "site":
        return value
    return number(100 * value) if name.endswith("dice") else count(value)


def _logs(results: Results, site: str) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """The training logs of a site's MAP and VCL networks."""
    names = [row for row in results.of_kind("map") if row.split()[0] == site]
    names += [row for row in results.of_kind("vcl") if row.split("->")[-1] == site]
    logs = [log for name in names if (log := results.log(name)) is not None]
    return (logs[0], logs[1]) if len(logs) == 2 else None


def _slices(results: Results) -> _Section | None:
    path = results.out / "figures" / SITES_PICTURE
    return _Section(picture=_inlined(path)) if path.is_file() else None


def _classes(results: Results) -> _Section | None:
    kinds = _interest(results)
    if results.classes is None or not kinds:
        return None
    return _Section(picture=_drawn(results, "classes", plots.class_plot, results.classes, kinds, _titled(results)))


def _calibration(results: Results) -> _Section | None:
    kinds = _interest(results)
    if results.calibration is None or not kinds:
        return None
    counts, body = results.calibration, []
    by_seed = counts.groupby("seed") if results.seeds else [(None, counts)]
    for group, sites in _titled(results).items():
        for row in kinds:
            parts = [part[(part["row"] == row) & part["site"].isin(sites)] for _, part in by_seed]
            errors = pd.Series([100 * expected_calibration_error(part) for part in parts])
            finds = pd.Series([100 * error_detection_auc(part) for part in parts])
            body.append([group, printed(row), _spread(errors), _spread(finds)])
    header = ["sites", "network", "calibration error, %", "errors found (AUC), %"]
    picture = _drawn(results, "calibration", plots.calibration_plot, counts, kinds, _titled(results))
    return _Section(_Table(header, body, words=(1,)), picture)


def _beyond(results: Results) -> dict[str, _Section]:
    """The other studies in the folder, by name."""
    found = {}
    for path in sorted(results.out.glob("*/table.csv")):
        picture = path.with_name(f"{path.parent.name}.png")
        if picture.is_file():
            table = pd.read_csv(path)
            body = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
            found[path.parent.name] = _Section(_Table(list(table), body), _inlined(picture))
    return found


def _interest(results: Results) -> dict[str, str]:
    """The rows with charts of classes and calibration, and their kinds."""
    return {row: kind for kind in INTEREST for row in results.of_kind(kind)}


def _titled(results: Results) -> dict[str, list[str]]:
    """Groups of sites by the title of their panel."""
    return {
        ", ".join(sites) if column == AVERAGE else f"{column} (unseen)": sites
        for column, sites in results.groups.items()
    }


def _drawn(results: Results, name: str, chart: Callable[..., Path], *shown: Any, **options: Any) -> str:
    """Draw a chart into figures/; returns its data address."""
    path = results.out / "figures" / f"{name}.png"
    chart(*shown, path, **options)
    return _inlined(path)


def _inlined(path: Path) -> str:
    return data_address(path.read_bytes(), "png")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printed(str(value))


def _spread(values: pd.Series) -> str:
    """The mean, with the standard deviation in brackets if there are several values."""
    return number(values.mean()) + (f" ({values.std():.2f})" if len(values) > 1 else "")
