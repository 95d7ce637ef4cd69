"""A study's report: one page of HTML with its pictures inside, for readers who have only a browser.

Each section reads the study's tables, draws its picture into figures/, and names what is missing. The page loads
nothing from elsewhere: no script, no address, no font.
"""

import base64
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import yaml
from jinja2 import Environment, StrictUndefined, Template

from dwc.base.files import open_folder, write_whole
from dwc.metrics.calibration import error_detection_auc, expected_calibration_error
from dwc.report import plots
from dwc.report.findings import RULES, findings_of
from dwc.report.results import AVERAGE, INTEREST, Results, read_results
from dwc.report.words import DASH, count, number, p_value, points, printed

__all__ = ["SITES_PICTURE", "write_report"]

SITES_PICTURE = "sites.png"  # in figures/; the study draws it, which has the volumes
_SPEED = {
    "seed": "seed", "site": "site", "steps": "equal steps", "map_dice": "MAP at these", "vcl_dice": "VCL at these",
    "vcl_start_dice": "VCL at step 0", "map_steps": "MAP: steps in full", "map_last_dice": "MAP: Dice in full",
    "target_dice": "Dice aimed at", "map_target_step": "MAP: steps to it", "vcl_target_step": "VCL: steps to it",
    "map_plateau_step": "MAP: steps to the plateau", "vcl_plateau_step": "VCL: steps to the plateau",
}  # fmt: skip
_TITLE = "Distributed weight consolidation: the paper's study"


@dataclass(frozen=True)
class _Table:
    """Cells as printed; marked rows are shaded, best cells (row, column) bold, columns of words left-aligned."""

    header: Sequence[str]
    body: Sequence[Sequence[str]]
    marked: Collection[int] = ()
    best: Collection[tuple[int, int]] = ()
    words: Collection[int] = ()


@dataclass(frozen=True)
class _Section:
    """A part of the page: sentences, a table and a picture (a data address), each optional."""

    title: str
    notes: Sequence[str] = field(default_factory=list)
    table: _Table | None = None
    picture: str | None = None


def write_report(out: str | Path) -> Path:
    """Write figures/*.png and report.html into the folder of a study, of one seed or pooled; returns the report."""
    results = read_results(out)
    open_folder(results.out / "figures")
    page = _template().render(
        title=_TITLE,
        about=_about(results),
        findings=findings_of(results),
        verdicts=RULES,
        sections=[part(results) for part in (_dice, _tests, _seeds, _speed, _slices, _classes, _calibration)]
        + list(_beyond(results)),
        config=yaml.safe_dump(results.config, sort_keys=False, allow_unicode=True) if results.config else "",
    )
    path = results.out / "report.html"
    write_whole(path, page.encode())
    return path


def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(files("dwc.report").joinpath("page.html").read_text(encoding="utf-8"))


def _about(results: Results) -> str:
    """One line on what was run."""
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


def _dice(results: Results) -> _Section:
    title = "Dice of every network (the paper's Table 2)"
    if results.table is None:
        return _Section(title, ["No row has been scored yet."])
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
    spread = f" Mean (standard deviation) over {len(results.seeds)} seeds." if sd is not None else ""
    notes = [
        f"Dice in %, mean over the classes of a volume's truth without background, then over held-out volumes.{spread} "
        f"{AVERAGE}: each volume of {', '.join(results.groups.get(AVERAGE, []))} counts the same. Bold: the best of a "
        "column. Steps in all: with those of the networks it starts from. The plain average has no standard deviations "
        "and predicts at its means, as MAP networks do; variational networks average samples.",
    ]
    picture = None
    if rows is not None and results.volumes is not None:
        shown = results.table, rows["kind"].to_dict(), results.volumes, results.groups
        picture = _drawn(results, "table", plots.table_plot, *shown, table_sd=sd)
    return _Section(title, notes, _Table(header, body, marked, best), picture)


def _tests(results: Results) -> _Section:
    title = "Paired tests"
    if results.tests is None:
        return _Section(title, ["The rows that would be compared have not all been scored."])
    body = [
        [
            printed(test.comparison), test.columns, test.unit, count(test.n), points(test.mean_difference),
            f"{points(test.ci_low)} to {points(test.ci_high)}", number(test.t), p_value(test.p),
            number(test.effect_size),
        ]
        for test in results.tests.itertuples()
    ]  # fmt: skip
    header = ["difference", "sites", "unit", "n", "points", "95 % interval", "t", "p", "d_z"]
    recurring = " and over seeds; across volumes each counts under each seed" if results.seeds else ""
    notes = [
        f"{len(body)} two-tailed paired t-tests, not corrected for their number: where there is no difference, one in "
        "twenty has p < 0.05. Differences in points of Dice in %; d_z is one in its own standard deviations. "
        f"Across subjects each counts once, with the mean over its volumes{recurring}."
    ]
    return _Section(title, notes, _Table(header, body, words=(1, 2)))


def _seeds(results: Results) -> _Section:
    title = "Differences seed by seed"
    if results.by_seed is None:
        return _Section(title, ["This is one seed; `dwc experiment --pool` compares several."])
    names = ["comparison", "columns"]
    table = results.by_seed.pivot_table(index=names, columns="seed", values="mean_difference", sort=False)
    body = [
        [printed(comparison), columns, *map(points, line)]
        for (comparison, columns), line in zip(table.index, table.to_numpy(), strict=True)
    ]
    notes = ["Mean over volumes, in points. All volumes of a seed share its networks, and their luck in training."]
    return _Section(title, notes, _Table(["difference", "sites", *(f"seed {n}" for n in table)], body, words=(1,)))


def _speed(results: Results) -> _Section:
    title = "VCL and MAP by steps"
    if results.speed is None:
        return _Section(title, ["No site's MAP, VCL and control networks have all been trained."])
    table = results.speed
    named = {name: title for name, title in _SPEED.items() if name in table and table[name].notna().any()}
    body = [[_speed_cell(name, value) for name, value in row.items()] for row in table[list(named)].to_dict("records")]
    notes = [
        "Optimizer steps of a site's own training, and Dice in % on the held-out sub-volumes that it logs. Equal "
        "steps: a MAP network from scratch that takes as many as VCL, under MAP's learning rates. The Dice aimed at "
        "is a little under the last one of the MAP network trained in full; step 0 is the prior network. Steps to a "
        "plateau are given where both learning rates are constant and one window judges them; under a falling one they "
        "would measure the schedule. The steps of the networks that VCL starts from are not counted."
    ]
    pairs, picture = {site: _logs(results, site) for site in table["site"].unique()}, None
    logs = {site: pair for site, pair in pairs.items() if pair is not None}
    if results.seeds:
        notes.append("The training curves are in the reports of the seeds.")
    elif logs:
        origin = next(iter(results.groups[AVERAGE]))
        picture = _drawn(results, "training", plots.training_plot, logs, table, origin=origin)
    return _Section(title, notes, _Table(list(named.values()), body), picture)


def _speed_cell(name: str, value: Any) -> str:
    if name == "site":
        return value
    return number(100 * value) if name.endswith("dice") else count(value)


def _logs(results: Results, site: str) -> tuple[pd.DataFrame, pd.DataFrame] | None:
    """The training logs of a site's MAP and of its VCL network."""
    names = [row for row in results.of_kind("map") if row.split()[0] == site]
    names += [row for row in results.of_kind("vcl") if row.split("->")[-1] == site]
    logs = [log for name in names if (log := results.log(name)) is not None]
    return (logs[0], logs[1]) if len(logs) == 2 else None


def _slices(results: Results) -> _Section:
    title = "One volume of each site (the paper's Figures 1 to 4)"
    path = results.out / "figures" / SITES_PICTURE
    if not path.is_file():
        where = "are in the reports of the seeds" if results.seeds else "need DWC and the pooled MAP network"
        return _Section(title, [f"They {where}."])
    note = "The held-out volume whose Dice under DWC is nearest its site's mean; errors of any class in red."
    return _Section(title, [note], picture=_inlined(path))


def _classes(results: Results) -> _Section:
    title = "Dice of each class"
    kinds = _interest(results)
    if results.classes is None or not kinds:
        return _Section(title, ["None of pooled MAP, ensemble and DWC has been scored."])
    notes = ["Classes from the largest to the smallest; bars: standard deviation over volumes.", *_absent(results)]
    picture = _drawn(results, "classes", plots.class_plot, results.classes, kinds, _titled(results))
    return _Section(title, notes, picture=picture)


def _calibration(results: Results) -> _Section:
    title = "Calibration, and whether uncertainty finds the errors"
    kinds = _interest(results)
    if results.calibration is None or not kinds:
        return _Section(title, ["None of pooled MAP, ensemble and DWC has been scored."])
    counts, body = results.calibration, []
    by_seed = counts.groupby("seed") if results.seeds else [(None, counts)]
    for group, sites in _titled(results).items():
        for row in kinds:
            parts = [part[(part["row"] == row) & part["site"].isin(sites)] for _, part in by_seed]
            errors = pd.Series([100 * expected_calibration_error(part) for part in parts])
            finds = pd.Series([100 * error_detection_auc(part) for part in parts])
            body.append([group, printed(row), _spread(errors), _spread(finds)])
    header = ["sites", "network", "calibration error, %", "errors found (AUC), %"]
    over = f" Mean (standard deviation) over {len(results.seeds)} seeds; the curves add up their voxels."
    notes = [
        "Expected calibration error: mean distance of confidence from accuracy over all voxels, the background's too. "
        "Errors found: how often a wrong voxel has more entropy than a right one (50: no better than chance)."
        f"{over if results.seeds else ''} Bins of fewer than {plots.FEWEST} voxels are not drawn.",
        *_absent(results),
    ]
    picture = _drawn(results, "calibration", plots.calibration_plot, counts, kinds, _titled(results))
    return _Section(title, notes, _Table(header, body, words=(1,)), picture)


def _beyond(results: Results) -> Iterable[_Section]:
    """The further studies in the folder, each with its table and its picture."""
    for path in sorted(results.out.glob("*/table.csv")):
        picture = path.with_name(f"{path.parent.name}.png")
        if picture.is_file():
            table = pd.read_csv(path)
            body = [[_cell(value) for value in row] for row in table.itertuples(index=False)]
            name = path.parent.name.replace("-", " ")
            yield _Section(f"Beyond the paper: {name}", table=_Table(list(table), body), picture=_inlined(picture))


def _interest(results: Results) -> dict[str, str]:
    """The rows compared closely, and their kinds."""
    return {row: kind for kind in INTEREST for row in results.of_kind(kind)}


def _absent(results: Results) -> list[str]:
    words = {"pooled": "pooled MAP", "ensemble": "the ensemble", "dwc": "DWC"}
    missing = [words[kind] for kind in INTEREST if not results.of_kind(kind)]
    return [f"Not scored yet: {', '.join(missing)}."] if missing else []


def _titled(results: Results) -> dict[str, list[str]]:
    """Groups of sites by what is printed above them."""
    return {
        ", ".join(sites) if column == AVERAGE else f"{column} (unseen)": sites
        for column, sites in results.groups.items()
    }


def _drawn(results: Results, name: str, chart: Callable[..., Path], *shown: Any, **options: Any) -> str:
    """A chart's data address, drawn into figures/."""
    path = results.out / "figures" / f"{name}.png"
    chart(*shown, path, **options)
    return _inlined(path)


def _inlined(path: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else printed(str(value))


def _spread(values: pd.Series) -> str:
    """Mean, and in brackets the standard deviation where there are several values."""
    return number(values.mean()) + (f" ({values.std():.2f})" if len(values) > 1 else "")
