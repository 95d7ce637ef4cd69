"""What a study's scores say: the table, paired tests, and how soon networks reach their plateau.

From data frames and training logs to data frames; no network, volume or file is opened here.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import pandas as pd

from dwc.experiment.study import TRAINING_SITES, UNSEEN
from dwc.metrics import paired_test

__all__ = ["COLUMNS", "MARGIN", "dice_table", "paired_tests", "plateau_step", "plateau_table", "target_step"]

COLUMNS = (*TRAINING_SITES, "Avg.", UNSEEN)
MARGIN = 0.05  # of a log's last Dice: nearer than that is on the plateau
_VOLUME = ["site", "subject", "image"]


def dice_table(volumes: pd.DataFrame) -> pd.DataFrame:
    """Mean Dice without background, 0..1, of each row (in the order of their first volumes) in each of `COLUMNS`.

    Avg. is over the volumes of all training sites, so that a site weighs as many as it has volumes.

    Parameters
    ----------
    volumes : DataFrame
        A line per row and volume: row, site, dice and more.
    """
    by_site = volumes.pivot_table(index="row", columns="site", values="dice", aggfunc="mean")
    trained_on = volumes[volumes["site"].isin(TRAINING_SITES)]
    by_site["Avg."] = trained_on.groupby("row")["dice"].mean()
    return by_site.reindex(index=volumes["row"].unique(), columns=list(COLUMNS)).rename_axis(columns=None)


def paired_tests(volumes: pd.DataFrame, pairs: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """Two-tailed paired t-tests of rows a against b across the same volumes.

    Parameters
    ----------
    volumes : DataFrame
        As for `dice_table`; with a column seed, volumes of different seeds are different volumes.
    pairs : iterable of (str, str)
        Names of rows a and b; a pair whose rows are not both there is left out.

    Returns
    -------
    DataFrame
        comparison ("a - b"), columns ("H, N, B, W", where each volume counts the same, or "A"), and the fields of
        `dwc.metrics.PairedTest`, differences in Dice.
    """
    keys = [*(["seed"] if "seed" in volumes else []), *_VOLUME]
    dice = volumes.pivot(index=keys, columns="row", values="dice")
    tests = []
    for a, b in pairs:
        if {a, b} <= set(dice.columns):
            for name, sites in ((", ".join(TRAINING_SITES), TRAINING_SITES), (UNSEEN, (UNSEEN,))):
                part = dice[dice.index.get_level_values("site").isin(sites)]
                test = paired_test(part[a].to_numpy(), part[b].to_numpy())
                tests.append({"comparison": f"{a} - {b}", "columns": name, **asdict(test)})
    columns = ["comparison", "columns", "n", "mean_difference", "ci_low", "ci_high", "t", "p", "effect_size"]
    return pd.DataFrame(tests, columns=columns)


def plateau_step(log: Sequence[Mapping[str, Any]], schedule: str) -> int | None:
    """The step from which on a network stayed where it ended.

    Under a constant learning rate it is the trainer's plateau of the training loss (`dwc.plateau`). Under one_cycle,
    whose falling learning rate lowers the loss to the end, it is the first logged step from which on the held-out Dice
    of every epoch lies within `MARGIN` of the last epoch's, relative to it. MAP and variational networks alike.

    Parameters
    ----------
    log : sequence of mapping
        The lines of log.jsonl.
    schedule : str
        The learning rate's.

    Returns
    -------
    int or None
        Optimizer steps; None where the log does not show it: the constant schedule's loss still fell, or only the last
        epoch is within the margin.
    """
    if not log or schedule == "constant":
        return log[-1]["plateau_step"] if log else None
    last = log[-1]["dice"] or 0
    reached = None
    for line in reversed(log):
        if abs((line["dice"] or 0) - last) > MARGIN * last:
            break
        reached = line["step"]
    return None if reached == log[-1]["step"] else reached


def target_step(log: Sequence[Mapping[str, Any]], target: float) -> int | None:
    """The first logged step whose held-out Dice is at least `target`; None if none is."""
    return next((line["step"] for line in log if line["dice"] is not None and line["dice"] >= target), None)


def plateau_table(
    logs: Iterable[tuple[str, Sequence[Mapping[str, Any]], Sequence[Mapping[str, Any]]]],
    map_schedule: str,
    vcl_schedule: str,
) -> pd.DataFrame:
    """Steps that a site's VCL network takes against its MAP counterpart, by two measures that treat both alike.

    Parameters
    ----------
    logs : iterable of (site, log of the MAP network, log of the VCL network)
        Both trained on the same scans and validated on the same sub-volumes.
    map_schedule, vcl_schedule : str
        Their learning rates'.

    Returns
    -------
    DataFrame
        site; ``map_steps``, ``vcl_steps`` taken; ``map_plateau_step``, ``vcl_plateau_step``, ``plateau_speedup``, the
        steps to each network's own plateau (`plateau_step`) and MAP's over VCL's; ``target_dice``, the MAP network's
        last held-out Dice less `MARGIN` of it, ``map_target_step``, ``vcl_target_step``, ``target_speedup``, the steps
        to it. Empty where not reached.
    """
    rows = []
    for site, *both in logs:
        map_steps, vcl_steps = (log[-1]["step"] for log in both)
        target = (1 - MARGIN) * (both[0][-1]["dice"] or 0)
        row = {"site": site, "map_steps": map_steps, "vcl_steps": vcl_steps}
        schedules = (map_schedule, vcl_schedule)
        row |= _speedup("plateau", *(plateau_step(log, name) for log, name in zip(both, schedules, strict=True)))
        row |= {"target_dice": target, **_speedup("target", *(target_step(log, target) for log in both))}
        rows.append(row)
    table = pd.DataFrame(rows)
    return table.astype({column: "Int64" for column in table if column.endswith(("_step", "_steps"))})


def _speedup(name: str, map_step: int | None, vcl_step: int | None) -> dict[str, float | None]:
    speedup = map_step / vcl_step if map_step and vcl_step else None
    return {f"map_{name}_step": map_step, f"vcl_{name}_step": vcl_step, f"{name}_speedup": speedup}
