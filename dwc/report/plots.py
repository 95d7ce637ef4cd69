"""Charts of a study; each kind of row has the same colour-blind-safe colour and marker in every chart."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, PercentFormatter

from dwc.metrics.calibration import expected_calibration_error
from dwc.report.figures import save
from dwc.report.words import printed

__all__ = ["calibration_plot", "class_plot", "table_plot", "training_plot"]

# Colour (palette of Okabe and Ito) and marker of each kind of row.
STYLE = {
    "map": ("#8c8c8c", "s"),
    "vi": ("#8c8c8c", "o"),
    "vcl": ("#56b4e9", "o"),
    "chain": ("#009e73", "D"),
    "average": ("#cc79a7", "v"),
    "consolidated": ("#56b4e9", "P"),
    "ensemble": ("#e69f00", "^"),
    "dwc": ("#0072b2", "o"),
    "pooled": ("#000000", "s"),
}
FEWEST = 100  # voxels in a bin, or it is not drawn


def table_plot(
    table: pd.DataFrame,
    kinds: Mapping[str, str],
    volumes: pd.DataFrame,
    groups: Mapping[str, Sequence[str]],
    path: str | Path,
    *,
    table_sd: pd.DataFrame | None = None,
) -> Path:
    """Write a PNG with a panel per column of the table: each row's mean Dice, and a faint tick for each volume.

    `table` holds mean Dice, 0..1, `table_sd` its standard deviation over seeds, drawn as bars. `kinds` has the kind of
    each row, `volumes` row, site and dice of each held-out volume, `groups` the sites of each column that averages
    several.
    """
    n_rows, n_columns = table.shape
    figure, axes = _figure(1, n_columns, (3.0 + 1.65 * n_columns, 1.3 + 0.31 * n_rows), sharex=True, sharey=True)
    for axis, column in zip(axes[0], table, strict=True):
        dice = volumes[volumes["site"].isin(groups.get(column, [column]))]
        for y, (row, mean) in enumerate(table[column].items()):
            colour, marker = STYLE[kinds[row]]
            if kinds[row] == "dwc":
                axis.axhspan(y - 0.5, y + 0.5, color=colour, alpha=0.1, linewidth=0)
                axis.axvline(100 * mean, color=colour, linestyle=":", linewidth=1.2, zorder=1)
            values = 100 * dice.loc[dice["row"] == row, "dice"]
            axis.plot(values, np.full(len(values), y), "|", color=colour, alpha=0.4, markersize=9)
            bar = None if table_sd is None else 100 * table_sd.loc[row, column]
            axis.errorbar(
                100 * mean, y, xerr=bar, fmt=marker, color=colour, markersize=8, capsize=4, elinewidth=1.5,
                markeredgecolor="white", markeredgewidth=0.6, ecolor=colour,
            )  # fmt: skip
        axis.set_title(column, fontsize=13, fontweight="bold")
        axis.grid(axis="y", visible=False)
        axis.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes[0, 0].set_yticks(range(n_rows), [printed(row) for row in table.index])
    axes[0, 0].set_ylim(n_rows - 0.5, -0.5)
    bars = "" if table_sd is None else "; bars: standard deviation over seeds"
    dotted = "; dotted: DWC" if "dwc" in map(kinds.get, table.index) else ""
    figure.supxlabel(f"Dice in % (symbols: means; ticks: held-out volumes{bars}{dotted})", fontsize=12)
    return save(figure, path)


def class_plot(
    classes: pd.DataFrame,
    kinds: Mapping[str, str],
    groups: Mapping[str, Sequence[str]],
    path: str | Path,
) -> Path:
    """Write a PNG with a panel per group of sites: Dice of each class under each row, mean and sd over volumes.

    `classes` has row, site, class, name, dice and truth_mm3 per volume and class; class 0 is not drawn. `kinds` maps
    the rows to draw, in order, to their kinds, and `groups` the panels' titles to sites.
    """
    classes = classes[(classes["class"] > 0) & classes["row"].isin(kinds)]
    sizes = classes.groupby("name")["truth_mm3"].mean().sort_values(ascending=False)
    names = [name for name in sizes.index if classes.loc[classes["name"] == name, "dice"].notna().any()]
    step = 0.42 if len(names) <= 12 else 0.3
    figure, axes = _figure(1, len(groups), (2.6 + 3.6 * len(groups), 1.6 + step * len(names)), sharex=True, sharey=True)
    for axis, (title, sites) in zip(axes[0], groups.items(), strict=True):
        part = classes[classes["site"].isin(sites)].groupby(["row", "name"])["dice"]
        mean, sd = 100 * part.mean(), 100 * part.std()
        for k, (row, kind) in enumerate(kinds.items()):
            colour, marker = STYLE[kind]
            y = np.arange(len(names)) + 0.24 * (k - (len(kinds) - 1) / 2)
            if row in mean.index:
                axis.errorbar(
                    mean[row].reindex(names), y, xerr=sd[row].reindex(names), fmt=marker, color=colour, markersize=5.5,
                    elinewidth=1.3, capsize=0, label=printed(row),
                )  # fmt: skip
        axis.set_title(title, fontsize=13, fontweight="bold")
        axis.set_xlabel("Dice in %, mean and sd over volumes", fontsize=12)
        axis.grid(axis="y", visible=False)
        for place in range(0, len(names), 2):
            axis.axhspan(place - 0.5, place + 0.5, color="0.96", linewidth=0, zorder=0)
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].set_ylim(len(names) - 0.5, -0.5)
    _legend(figure, axes)
    return save(figure, path)


def calibration_plot(
    calibration: pd.DataFrame,
    kinds: Mapping[str, str],
    groups: Mapping[str, Sequence[str]],
    path: str | Path,
) -> Path:
    """Write a PNG with a row of panels per group of sites: accuracy against confidence, error rate against entropy.

    `calibration` has row, site and the columns of `CalibrationCounts.frame`; otherwise as `class_plot`.
    """
    figure, axes = _figure(len(groups), 2, (11, 0.6 + 4.4 * len(groups)))
    for (reliability, errors), (title, sites) in zip(axes, groups.items(), strict=True):
        reliability.plot([0, 1], [0, 1], color="0.6", linestyle="--", linewidth=1, zorder=1)
        for row, kind in kinds.items():
            colour, marker = STYLE[kind]
            part = calibration[(calibration["row"] == row) & calibration["site"].isin(sites)]
            error = expected_calibration_error(part)
            bins = part.groupby(["kind", "bin"])[["n", "correct", "sum"]].sum()
            bins = bins[bins["n"] >= FEWEST]
            line = dict(color=colour, marker=marker, markersize=6, linewidth=1.5)
            for axis, what in ((reliability, "confidence"), (errors, "entropy")):
                if what in bins.index:
                    n, right, total = (bins.loc[what, name] for name in ("n", "correct", "sum"))
                    rate = right / n if axis is reliability else 1 - right / n
                    axis.plot(total / n, rate, **line, label=f"{printed(row)}: ECE {100 * error:.2f} %")
        for axis, (across, up) in {
            reliability: ("confidence (probability of the chosen class)", "accuracy"),
            errors: ("entropy of the prediction, nats", "error rate"),
        }.items():
            axis.set_xlabel(across, fontsize=12)
            axis.set_ylabel(up, fontsize=12)
            axis.set_title(title, fontsize=13, fontweight="bold", loc="left")
            axis.set_ylim(-0.03, 1.03)
            axis.yaxis.set_major_formatter(PercentFormatter(1))
        reliability.xaxis.set_major_formatter(PercentFormatter(1))
        reliability.legend(fontsize=10, loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
    return save(figure, path)


def training_plot(
    pairs: Mapping[str, tuple[pd.DataFrame, pd.DataFrame]], speed: pd.DataFrame, path: str | Path, *, origin: str
) -> Path:
    """Write a PNG with a column per site: training loss and validation Dice of its MAP and VCL networks.

    `pairs` are the logs of these networks (step, nll, dice) by site; VCL starts from the network of `origin`.
    """
    figure, axes = _figure(2, len(pairs), (1 + 3.6 * len(pairs), 6), sharex="col", sharey="row")
    began = speed.set_index("site")
    for (loss, dice), (site, logs) in zip(axes.T, pairs.items(), strict=True):
        for kind, name, log in zip(("map", "vcl"), ("MAP", f"VCL from {origin}"), logs, strict=True):
            colour, marker = STYLE[kind]
            line = dict(color=colour, label=name, linewidth=2, marker=marker, markersize=3)
            loss.plot(log["step"], log["nll"], **line)
            dice.plot(log["step"], 100 * log["dice"].astype(float), **line)
            if pd.notna(step := began[f"{kind}_plateau_step"].get(site)):
                for axis in (loss, dice):
                    axis.axvline(step, color=colour, linestyle=":", linewidth=2, label=f"{name}: plateau from here")
        loss.set_title(site, fontsize=13, fontweight="bold")
        dice.set_xlabel("optimizer steps", fontsize=12)
        dice.set_xlim(left=0)
    first = axes[0, 0]
    first.set_yscale("log")
    first.yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    first.yaxis.set_major_formatter("{x:g}")
    first.yaxis.set_minor_formatter(NullFormatter())
    first.set_ylabel("training loss, nats per voxel", fontsize=12)
    axes[1, 0].set_ylabel("validation Dice, %", fontsize=12)
    _legend(figure, axes)
    return save(figure, path)


def _figure(rows: int, columns: int, size: tuple[float, float], **shared: Any) -> tuple[Figure, np.ndarray]:
    """A plain figure without a display, and its panels [rows, columns]."""
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False, **shared)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9", linewidth=0.8)
        axis.set_axisbelow(True)
        axis.tick_params(labelsize=11)
        axis.tick_params(axis="y", which="both", length=0)
    return figure, axes


def _legend(figure: Figure, axes: np.ndarray) -> None:
    """One legend for all panels, below them."""
    entries: dict[str, Artist] = {}
    for axis in axes.flat:
        handles, labels = axis.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    handles, labels = list(entries.values()), list(entries)
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), fontsize=12, frameon=False)
