"""Scores of a study's rows on groups of held-out volumes, in folders named by a hash of what they depend on."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from dwc.base.files import open_folder
from dwc.base.tables import read_table, write_table
from dwc.base.work_sharing import claimed
from dwc.data.dataset import SubVolumes
from dwc.evaluation import calibration, per_class, per_volume, score_volumes
from dwc.meshnet import MeshNet
from dwc.prediction import predict_volume
from dwc.study.graph import Network
from dwc.study.keys import digest_of
from dwc.study.networks import Networks

__all__ = ["Kind", "Row", "Scores"]

Kind = Literal["map", "vi", "vcl", "chain", "consolidated", "average", "ensemble", "dwc", "pooled"]
_FORMAT = 2  # increase when the same networks and volumes give other scores
_TABLES = ("classes", "calibration", "volumes")  # in the order of writing; the last one marks completion


@dataclass(frozen=True)
class Row:
    """A row of a study's table; several networks predict by the mean of their probabilities."""

    name: str
    kind: Kind
    networks: tuple[Network, ...]


class Scores:
    """The scores of rows on held-out scans, by site or by another name (by default those of all sites)."""

    def __init__(self, networks: Networks, held_out: Mapping[str, SubVolumes] | None = None) -> None:
        self.networks, self.study = networks, networks.study
        if held_out is None:
            held_out = {site: self.study.held_out(site) for site in self.study.settings.all_sites}
        self.held_out, self.sites = held_out, tuple(held_out)

    def score(self, rows: Iterable[Row]) -> None:
        """Score rows wherever they are not scored yet, except those that another process is scoring."""
        for row in claimed(rows, lambda row: not self.missing(row), self._lock):
            self._score(row)

    def missing(self, row: Row) -> list[str]:
        """The sites where the row is not scored yet."""
        return [site for site in self.sites if not (self._folder(row, site) / f"{_TABLES[-1]}.csv").exists()]

    def table(self, name: Literal["volumes", "classes", "calibration"], rows: Iterable[Row]) -> pd.DataFrame:
        """A table of all rows and sites: the columns of `dwc.evaluation` after a column row."""
        parts = [
            read_table(self._folder(row, site) / f"{name}.csv").assign(row=row.name)
            for row in rows
            for site in self.sites
        ]
        table = pd.concat(parts, ignore_index=True)
        return table[["row", *table.columns.drop("row")]]

    def predict(self, row: Row, image: np.ndarray) -> np.ndarray:
        """The classes that a row predicts in a conformed volume."""
        intensity = self.study.intensity
        return predict_volume(self._models(row), image, intensity=intensity, **self.study.prediction).labels

    def _score(self, row: Row) -> None:
        missing, models = self.missing(row), self._models(row)
        print(f"scoring {row.name} on {', '.join(missing)}", flush=True)
        for site in missing:
            data = self.held_out[site]
            scores = score_volumes(models, data, progress=False, **self.study.prediction)
            tables = {
                "volumes": per_volume(scores),
                "classes": per_class(scores, data.label_map, data.grid),
                "calibration": calibration(scores),
            }
            folder = self._folder(row, site)
            open_folder(folder)
            for name in _TABLES:
                write_table(folder / f"{name}.csv", tables[name])

    def _models(self, row: Row) -> list[MeshNet]:
        return [MeshNet.from_posterior(self.networks.get(network)) for network in row.networks]

    def _lock(self, row: Row) -> Path:
        return self.study.lock(self._folder(row, self.sites[0]).name)

    def _folder(self, row: Row, site: str) -> Path:
        data, settings = self.held_out[site], self.study.settings
        content = {
            "format": _FORMAT,
            "networks": [self.networks.key(network) for network in row.networks],
            "volumes": data.digest,
            "names": [[scan.subject, scan.image.name] for scan in data.scans],
            "n_samples": settings.n_samples,
            "seed": settings.seed,
            "precision": settings.precision,
        }
        readable = re.sub(r"\W+", "_", f"{row.name.replace('+', '')} on {site}").replace("__", "_")
        return self.study.out / "scores" / f"{readable}-{digest_of(content)[:12]}"
