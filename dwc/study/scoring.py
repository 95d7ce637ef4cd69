"""Scores of a study: every row of its table on every site's held-out volumes, kept, so that none is computed twice.

A row is one network, or several that predict together. Its scores at a site lie in a folder named by a hash of all that
they depend on, so that an interrupted study scores on where it stopped. Averages and tests are `statistics`' business.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd

from dwc.base.devices import choose_device
from dwc.base.files import canonical_json, open_folder
from dwc.base.tables import read_table, write_table
from dwc.base.work_sharing import claimed
from dwc.data.dataset import SubVolumes
from dwc.evaluation import calibration, per_class, per_volume, score_volumes
from dwc.meshnet import MeshNet
from dwc.prediction import predict_volume
from dwc.study.networks import Network, Networks

__all__ = ["Kind", "Row", "Scores"]

Kind = Literal["map", "vi", "vcl", "chain", "consolidated", "average", "ensemble", "dwc", "pooled"]
_FORMAT = 1  # raise it when the same networks and volumes give other scores
_TABLES = ("classes", "calibration", "volumes")  # in the order of writing: the last one says that all are there


@dataclass(frozen=True)
class Row:
    """A row of a study's table.

    Attributes
    ----------
    name : str
        As it is printed.
    kind : str
        What it is in the paper's argument.
    networks : tuple of Network
        What predicts, several by the mean of their probabilities.
    """

    name: str
    kind: Kind
    networks: tuple[Network, ...]


class Scores:
    """The scores of rows on held-out volumes.

    Parameters
    ----------
    networks : Networks
        The study's networks; those of a row must be there when it is scored.
    held_out : mapping of str to SubVolumes
        Held-out volumes by the name of the site.
    """

    def __init__(self, networks: Networks, held_out: Mapping[str, SubVolumes]) -> None:
        self.networks, self.held_out, self.settings = networks, dict(held_out), networks.settings

    def score(self, rows: Iterable[Row]) -> None:
        """Score rows at every site where that is not done yet, and no other process does it."""
        open_folder(self.settings.locks)
        for row in claimed(rows, lambda row: not self.missing(row), self._lock):
            self._score(row)

    def _lock(self, row: Row) -> Path:
        return self.settings.locks / self._folder(row, next(iter(self.held_out))).name

    def _score(self, row: Row) -> None:
        missing, models = self.missing(row), self._models(row)
        print(f"scoring {row.name} on {', '.join(missing)}", flush=True)
        for site in missing:
            data = self.held_out[site]
            scores = score_volumes(models, data, progress=False, **self._prediction())
            tables = {
                "volumes": per_volume(scores),
                "classes": per_class(scores, data.label_map, data.grid),
                "calibration": calibration(scores),
            }
            folder = self._folder(row, site)
            open_folder(folder)
            for name in _TABLES:
                write_table(folder / f"{name}.csv", tables[name])

    def missing(self, row: Row) -> list[str]:
        """The sites where the row is not scored yet."""
        return [site for site in self.held_out if not self._is_done(row, site)]

    def table(self, name: Literal["volumes", "classes", "calibration"], rows: Iterable[Row]) -> pd.DataFrame:
        """A table over rows and sites: the column row, and those that `evaluation` gives."""
        parts = [
            read_table(self._folder(row, site) / f"{name}.csv").assign(row=row.name)
            for row in rows
            for site in self.held_out
        ]
        table = pd.concat(parts, ignore_index=True)
        return table[["row", *table.columns.drop("row")]]

    def predict(self, row: Row, image: np.ndarray) -> np.ndarray:
        """The classes that a row sees in a conformed volume."""
        return predict_volume(self._models(row), image, **self._prediction()).labels

    def _models(self, row: Row) -> list[MeshNet]:
        return [MeshNet.from_posterior(self.networks.get(network)) for network in row.networks]

    def _prediction(self) -> dict:
        settings = self.settings
        device = choose_device(settings.device)
        return dict(n_samples=settings.n_samples, seed=settings.seed, device=device, precision=settings.precision)

    def _folder(self, row: Row, site: str) -> Path:
        content = {
            "format": _FORMAT,
            "networks": [self.networks.key(network) for network in row.networks],
            "volumes": self.held_out[site].digest,
            "names": [[scan.subject, scan.image.name] for scan in self.held_out[site].scans],
            "n_samples": self.settings.n_samples,
            "seed": self.settings.seed,
            "precision": self.settings.precision,
        }
        key = hashlib.sha256(canonical_json(content).encode()).hexdigest()
        readable = re.sub(r"\W+", "_", f"{row.name.replace('+', '')} on {site}").replace("__", "_")
        return self.settings.out / "scores" / f"{readable}-{key[:12]}"

    def _is_done(self, row: Row, site: str) -> bool:
        return (self._folder(row, site) / f"{_TABLES[-1]}.csv").exists()
