"""Rows of the studies beyond the paper: score a network on all held-out scans, join scores into tables, test them."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
import yaml

from dwc.base.files import write_whole
from dwc.base.tables import write_table
from dwc.data.dataset import SubVolumes
from dwc.evaluation import per_volume, score_volumes
from dwc.meshnet import MeshNet
from dwc.metrics.significance import paired_test
from dwc.posterior import Posterior
from dwc.report.results import AVERAGE
from dwc.simulation.scans import mixed_site
from dwc.study.context import Study
from dwc.study.settings import ManySites, StudySettings
from dwc.study.sites import simulate
from dwc.study.statistics import dice_table

__all__ = [
    "Result", "compare_rows", "held_out_of", "in_words", "join_rows", "mixed_names", "score_row", "simulate_mixed",
    "write_study",
]  # fmt: skip

Result: TypeAlias = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]  # table, volumes, tests


def held_out_of(study: Study) -> dict[str, SubVolumes]:
    """The held-out scans of every site of the study."""
    return {site: study.held_out(site) for site in study.settings.all_sites}


def mixed_names(settings: StudySettings) -> list[str]:
    """Names of the simulated sites with mixed scanners."""
    many = settings.many_sites or ManySites()
    return [f"S{number:02d}" for number in range(1, max(many.counts) + 1)]


def simulate_mixed(study: Study, names: list[str]) -> None:
    """Simulate sites with randomly mixed scanners and people; add their manifests to the study."""
    many, label_map = study.settings.many_sites or ManySites(), study.label_map
    for number, name in enumerate(names, 1):
        site = mixed_site(name, np.random.default_rng([study.settings.seed, number]))
        folder, unlabelled = f"{name}-{many.n_train}", []
        if number == 1 and many.missing is not None:
            folder += f"-without-{label_map.names.index(many.missing)}"
            of_id = zip(label_map.ids, label_map.classes, strict=True)
            unlabelled = [i for i, k in of_id if label_map.names[k] == many.missing]
        study.manifests[name] = study.site_folder(folder) / "manifest.csv"
        with study.scans_held():
            simulate(study, site, study.manifests[name], many.n_train, 1, unlabelled)


def score_row(study: Study, posterior: Posterior, held_out: Mapping[str, SubVolumes], row: str) -> pd.DataFrame:
    """One line per held-out volume: row, column (of the table), site, subject, image and Dice."""
    print(f"scoring {row}", flush=True)
    networks = [MeshNet.from_posterior(posterior)]
    parts = []
    for column, data in held_out.items():
        part = per_volume(score_volumes(networks, data, progress=False, **study.prediction))
        part.insert(0, "row", row)
        part.insert(1, "column", column)
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def join_rows(
    study: Study, rows: list[dict[str, Any]], volumes: list[pd.DataFrame]
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows with the mean Dice of each column, and all volumes."""
    joined = pd.concat(volumes, ignore_index=True)
    dice = dice_table(joined.assign(site=joined["column"]), study.settings.groups)
    return pd.DataFrame(rows).join(dice, on="row"), joined


def compare_rows(
    training: Collection[str], volumes: pd.DataFrame, pairs: Iterable[tuple[str, str]], value: str = "dice"
) -> pd.DataFrame:
    """Paired t-tests of a value of row a against row b, for each column and for all training sites (Avg.).

    A column seed, if there is one, tells volumes of the same name apart; with a column anatomy, each anatomy counts
    once, with its mean over volumes.
    """
    groups = {column: [column] for column in volumes["column"].unique()}
    if groups.keys() >= set(training):
        groups[AVERAGE] = list(training)
    names = ["anatomy"] if "anatomy" in volumes else ["column", "seed", "site", "subject", "image"]
    by_unit = [*volumes.columns.intersection(names, sort=False), "row"]
    paired = {
        group: volumes[volumes["column"].isin(columns)].groupby(by_unit)[value].mean().unstack("row")
        for group, columns in groups.items()
    }
    return pd.DataFrame(
        {"row": a, "against": b, "column": column, "value": value, **asdict(paired_test(table[a], table[b]))}
        for a, b in pairs
        for column, table in paired.items()
    )


def write_study(folder: Path, config: Mapping[str, Any], tables: Mapping[str, pd.DataFrame]) -> None:
    """Write the settings and tables of a study beyond the paper; table.csv last."""
    write_whole(folder / "config.yaml", yaml.safe_dump(dict(config), sort_keys=False).encode())
    write_whole(folder / "tests.txt", f"{in_words(tables['tests'])}\n".encode())
    for name in sorted(tables, key=lambda name: name == "table"):
        write_table(folder / f"{name}.csv", tables[name])


def in_words(tests: pd.DataFrame) -> str:
    """The tests of `compare_rows` for printing: a line per pair of rows and value, with what each column shows."""
    lines = ["Mean differences with 95 % intervals (paired t-tests, not corrected for their number); Dice in points"]
    for (a, b), pair in tests.groupby(["row", "against"], sort=False):
        lines.append(f"{a} against {b}")
        for value, part in pair.groupby("value", sort=False):
            lines.append(f"  {value}: {'; '.join(map(_in_words, part.itertuples()))}")
    return "\n".join(lines)


def _in_words(test: Any) -> str:
    lower_is_better = test.value == "nll"
    scale, decimals = (1, 4) if lower_is_better else (100, 2)
    mean, low, high = (f"{scale * x:.{decimals}f}" for x in (test.mean_difference, test.ci_low, test.ci_high))
    verdict = "not shown"
    if test.ci_low > 0 or test.ci_high < 0:
        verdict = "worse" if (test.ci_low > 0) == lower_is_better else "better"
    seeds = f" ({test.seeds_agree} of {test.n_seeds} seeds)" if hasattr(test, "n_seeds") else ""
    return f"{test.column} {mean} [{low}, {high}] {verdict}{seeds}"
