"""Pictures of the studies beyond the paper, drawn from their tables."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from dwc.report.figures import save
from dwc.report.results import AVERAGE

__all__ = ["leave_one_out", "many_sites", "rounds", "tempering"]

_DICE = "mean Dice, %"
_RULES = {"1": ("C3", "Eq. 17 (λ = 1)"), "1/S": ("C0", "geometric mean (λ = 1/S)"), "chosen": ("C2", "λ chosen by {}")}
_METHODS: dict[str, dict[str, Any]] = {
    "dwc": {"color": "C3", "linestyle": "-", "label": "Eq. 17 again and again"},
    "tempered": {"color": "C1", "linestyle": "-", "label": "Eq. 17, λ = 1/S"},
    "average": {"color": "C2", "linestyle": "-", "label": "federated averaging"},
    "factors": {"color": "C0", "linestyle": "-", "label": "cavities, damping 1/S"},
    "chain": {"color": "C4", "linestyle": "", "marker": "D", "label": "one site after another"},
    "ensemble": {"color": "C5", "linestyle": "", "marker": "^", "label": "ensemble of the sites"},
    "finetuned": {"color": "C6", "linestyle": "", "marker": "o", "label": "Eq. 17 and fine-tuning"},
    "pooled": {"color": "black", "linestyle": ":", "marker": "s", "label": "pooled scans, as many steps"},
}
_NO_DICE = ("row", "lambda", "log_likelihood", "validation_dice", "chosen")


def many_sites(table: pd.DataFrame, origin: str, unseen: Sequence[str], path: Path) -> Path:
    """Dice against the number of sites, a panel per column and a line per rule for lambda; the last panel is time."""
    columns = {origin: f"{origin}, the origin", "sites": "sites of the same kind"}
    columns |= {site: f"{site}, never in" for site in unseen}
    figure, panels = _figure(len(columns) + 1)
    prior, grown = table[table["S"] == 0].iloc[0], table[table["S"] > 0]
    for panel, (column, title) in zip(panels, columns.items(), strict=False):
        panel.axhline(100 * prior[column], color="grey", linestyle="--", label="the prior, no site")
        for rule, (colour, label) in _RULES.items():
            part = grown[grown["rule"] == rule]
            panel.plot(
                part["S"], 100 * part[column], color=colour, marker="o", markersize=4, label=label.format(origin)
            )
        _titled(panel, title, _DICE)
    time = grown.groupby("S")["seconds"].first()
    panels[-1].plot(time.index, time, color="black", marker="o", markersize=4)
    panels[-1].set_yscale("log")
    _titled(panels[-1], "time to consolidate", "seconds of CPU")
    for panel in panels:
        panel.set_xscale("log", base=2)
        panel.set_xticks(sorted(grown["S"].unique()), [str(n) for n in sorted(grown["S"].unique())])
        panel.minorticks_off()
        panel.set_xlabel("sites S")
    panels[0].legend(fontsize=7)
    return save(figure, path)


def rounds(table: pd.DataFrame, unseen: Sequence[str], path: Path) -> Path:
    """Dice and negative log-likelihood against the round: a line per method, markers for other rows.

    A column of panels for each number of sites and for the sites' held-out scans and each unseen site. Where Eq. 17
    collapses, its line leaves the panels, which show the range of all other rows.
    """
    columns = ("sites", *unseen)
    counts = sorted(table.loc[table["S"] > 0, "S"].unique())
    figure = Figure(figsize=(3.8 * len(counts) * len(columns), 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(2, len(counts) * len(columns), squeeze=False, sharex=True)
    start = table[table["S"] == 0]
    for place, panels in enumerate(grid.T):
        n_sites, column = counts[place // len(columns)], columns[place % len(columns)]
        ours = pd.concat([start, table[table["S"] == n_sites]])
        for panel, value, scale in zip(panels, (column, f"nll {column}"), (100, 1), strict=True):
            for method, style in _METHODS.items():
                part = ours[ours["method"].isin([method, "start"] if style["linestyle"] == "-" else [method])]
                panel.plot(part["round"], scale * part[value], **style)
            shown = scale * ours.loc[(ours["method"] != "dwc") | (ours["round"] == 1), value]
            margin = 0.08 * (shown.max() - shown.min()) or 0.01
            panel.set_ylim(shown.min() - margin, shown.max() + margin)
        where = "held-out scans of the sites" if column == "sites" else f"{column}, never in"
        _titled(panels[0], f"{n_sites} sites: {where}", _DICE)
        _titled(panels[1], "", "-log likelihood, nats per voxel")
        panels[1].set_xlabel("round (0: before the first)")
    figure.legend(*grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=7)
    return save(figure, path)


def leave_one_out(tests: pd.DataFrame, columns: Sequence[str], path: Path) -> Path:
    """Each site's contribution: Dice with all sites minus Dice without it, in points, with 95 % intervals."""
    figure, (panel,) = _figure(1, width=7)
    tests = tests[tests["against"].str.startswith("without ")]
    sites = tests["against"].unique()
    width = 0.8 / len(sites)
    for k, site in enumerate(sites):
        brought = 100 * tests[tests["against"] == site].set_index("column").loc[list(columns)]
        places = [place + (k - (len(sites) - 1) / 2) * width for place in range(len(columns))]
        mean = brought["mean_difference"]
        reach = [mean - brought["ci_low"], brought["ci_high"] - mean]
        label, colour = site.replace("without ", "site "), f"C{k + 1}"
        panel.bar(places, mean, width, label=label, color=colour, yerr=reach, error_kw={"linewidth": 0.8, "capsize": 2})
    panel.axhline(0, color="black", linewidth=0.8)
    panel.set_xticks(range(len(columns)), columns)
    panel.set_xlabel("held-out scans of")
    _titled(panel, "contribution of each site: Dice with it minus Dice without it", "points of Dice, 95 % interval")
    panel.legend(fontsize=8)
    return save(figure, path)


def tempering(table: pd.DataFrame, origin: str, n_sites: int, path: Path) -> Path:
    """Log-likelihood on the scans that choose lambda and Dice on the others; marks the lambdas chosen by any seed."""
    figure, (left, right) = _figure(2, width=5)
    prior, grid = table[table["lambda"] == 0].iloc[0], table[table["lambda"] > 0]
    left.plot(grid["lambda"], grid["log_likelihood"], color="black", marker="o", markersize=4)
    left.axhline(prior["log_likelihood"], color="grey", linestyle="--", label="the prior")
    _titled(left, f"{origin}'s scans that choose λ", "log-likelihood, nats per voxel")
    _columns(right, grid, "lambda")
    for column, colour in _colours(grid).items():
        right.axhline(100 * prior[column], color=colour, linestyle="--", linewidth=0.8)
    _titled(right, "held-out scans (dashed: the prior)", _DICE)
    for panel in (left, right):
        panel.set_xscale("log", base=2)
        for k, chosen in enumerate(grid.loc[grid["chosen"] > 0, "lambda"]):
            panel.axvline(chosen, color="grey", linewidth=5, alpha=0.25, label="" if k else "chosen")
        panel.set_xticks([1 / (4 * n_sites), 1 / n_sites, 0.5, 1, 2], ["1/4S", "1/S", "1/2", "1", "2"])
        panel.minorticks_off()
        panel.set_xlabel("λ")
    left.legend(fontsize=8)
    right.legend(fontsize=7, ncols=2)
    return save(figure, path)


def _columns(panel: Axes, table: pd.DataFrame, x: str) -> None:
    for column, colour in _colours(table).items():
        width = 2.2 if column == AVERAGE else 1.2
        panel.plot(table[x], 100 * table[column], color=colour, linewidth=width, marker="o", markersize=3, label=column)


def _colours(table: pd.DataFrame) -> dict[str, str]:
    """The colour of each column of Dice."""
    sites = [column for column in table if column not in (*_NO_DICE, AVERAGE)]
    return {column: "black" if column == AVERAGE else f"C{sites.index(column) % 10}"
            for column in table if column not in _NO_DICE}  # fmt: skip


def _figure(n_panels: int, *, width: float = 3.6) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width * n_panels, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, n_panels, squeeze=False)[0]


def _titled(panel: Axes, title: str, y: str) -> None:
    panel.set_title(title, fontsize=10)
    panel.set_ylabel(y)
    panel.grid(alpha=0.3)
