"""Rows of the studies beyond the paper: score a network on all held-out scans, join scores into tables, test them."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Any, TypeAlias

import numpy as np
import pandas as pd

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

__all__ = ["Result", "compare_rows", "held_out_of", "join_rows", "mixed_names", "score_row", "simulate_mixed"]

Result: TypeAlias = tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]  # table, volumes, tests


def held_out_of(study: Study) -> dict[str, SubVolumes]:
    """The held-out scans of every site of the study."""
    return {site: study.held_out(site) for site in study.settings.all_sites}


def mixed_names(settings: StudySettings) -> list[str]:
    """Names of the simulated sites with mixed scanners."""
    many = settings.many_sites or ManySites()
    return [f"S{number:02d}" for number in range(1, max(many.counts) + 1)]


def simulate_mixed(study: Study, names: list[str], n_train: int) -> None:
    """Simulate sites with randomly mixed scanners and people; add their manifests to the study."""
    for number, name in enumerate(names, 1):
        site = mixed_site(name, np.random.default_rng([study.settings.seed, number]))
        study.manifests[name] = study.site_folder(f"{name}-{n_train}") / "manifest.csv"
        with study.scans_held():
            simulate(study, site, study.manifests[name], n_train, 1)


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

    A column seed, if there is one, tells volumes of the same name apart.
    """
    names = [name for name in ("column", "seed", "site", "subject", "image") if name in volumes]
    dice = volumes.pivot(index=names, columns="row", values=value)
    of_column = dice.index.get_level_values("column")
    groups = {column: of_column == column for column in volumes["column"].unique()}
    if groups.keys() >= set(training):
        groups[AVERAGE] = of_column.isin(list(training))
    return pd.DataFrame(
        {"row": a, "against": b, "column": column, **asdict(paired_test(dice[a][group], dice[b][group]))}
        for a, b in pairs
        for column, group in groups.items()
    )
