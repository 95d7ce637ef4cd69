"""The cycle of origin, sites, consolidation and fine-tuning on simulated scans, in steps that a second call skips.

For studies that `dwc experiment` does not cover, because their first network or their scans are special.
"""

import gzip
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pandas as pd

import dwc
from dwc.base.files import write_whole
from dwc.base.tables import write_table
from dwc.consolidation import consolidate
from dwc.data.conform import conform_image, conform_labels
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.metrics.confusion import confusion_matrix, dice
from dwc.posterior import Posterior
from dwc.report.figures import overlay
from dwc.simulation.scans import load_sites, write_site
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings

__all__ = ["Cycle", "Group"]

Group = tuple[str, Sequence[int]]  # name of a structure, and the classes that form it


@dataclass(frozen=True, kw_only=True)
class Cycle:
    """Scans of simulated sites, networks and scores in one folder.

    Parameters
    ----------
    sites : sequence of str
        Sites that share the anatomies, the origin first; one that is named twice gets two shares.
    n_train, n_test : int
        Training scans of a site for each of its shares, and its test scans.
    training : mapping
        Settings of all trainings.
    groups : sequence of Group, optional
        Structures to score; by default each class. `mean` is over the classes in the truth but background.
    real : tuple of path, optional
        A T1 scan and its FreeSurfer labels, scored too.
    """

    out: Path
    sites: Sequence[str]
    n_train: int
    n_test: int
    grid: Grid
    label_map: str
    training: Mapping[str, Any]
    prediction: dwc.PredictionSettings
    groups: Sequence[Group] | None = None
    seed: int = 0
    anatomies: Path | None = None
    random_contrasts: bool = False
    real: tuple[Path, Path] | None = None

    def manifest(self, site: str) -> Path:
        """The manifest of a site's simulated scans."""
        folder = self.out / "scans" / site
        if not (folder / "manifest.csv").exists():
            print(f"simulating site {site}", flush=True)
            write_site(
                folder, load_sites()[site], self.n_train * self.sites.count(site), self.n_test, grid=self.grid,
                seed=self.seed, anatomies=self.anatomies, shared_by=self.sites, random_contrasts=self.random_contrasts,
            )  # fmt: skip
        return folder / "manifest.csv"

    def train(self, mode: Any, name: str, data: Path, **settings: Any) -> Path:
        """Train a network, or go on with it; returns its posterior file."""
        out = self.out / "runs" / name
        posterior = out / "posterior.safetensors"
        if not posterior.exists():
            print(f"training {name}", flush=True)
            train_network(
                TrainSettings(
                    mode=mode, data=data, out=out, cache_dir=self.out / "cache", seed=self.seed, device="cpu",
                    label_map=self.label_map,
                    **{"grid_size": self.grid.size, "voxel_size": self.grid.voxel_size, **self.training, **settings},
                ),
                resume=out.exists(),
            )  # fmt: skip
        return posterior

    def made(self, name: str, make: Callable[[], Posterior]) -> Path:
        """The file of a network that is computed rather than trained."""
        path = self.out / f"{name}.safetensors"
        if not path.exists():
            make().save(path)
        return path

    def consolidated(self, prior: Path, sites: Sequence[Path]) -> Path:
        """The consolidated network of the sites' ones."""
        return self.made(
            "consolidated", lambda: consolidate(Posterior.load(prior), [Posterior.load(site) for site in sites])
        )

    def score(self, networks: Mapping[str, Sequence[Path]]) -> pd.DataFrame:
        """Dice of networks, or of ensembles, on the sites' held-out scans and the real scan; kept in table.csv."""
        rows: list[dict[str, Any]] = []
        for name, files in networks.items():
            for site, image, label in self._scans():
                rows.append({"network": name, "site": site, **self._dice(self._segmented(name, files, image), label)})
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
                write_table(self.out / "table.csv", pd.DataFrame(rows))
        return pd.DataFrame(rows)

    def picture(self, site: str, names: Sequence[str]) -> Path:
        """A picture of a site's scan, or of the real one, with the truth and what networks made of it."""
        image, label = next((image, label) for of, image, label in self._scans() if of == site)
        truth, *predicted = (
            conform_labels(path, self.grid, LabelMap.load(self.label_map), image)
            for path in (label, *(self._file(name, image) for name in names))
        )
        scan = conform_image(image, self.grid)
        return overlay(scan, truth, dict(zip(names, predicted, strict=True)), self.out / f"{site}.png")

    def _scans(self) -> list[tuple[str, Path, Path]]:
        """Site, image and labels of each scan to score."""
        scans = [(site, image, label) for site in dict.fromkeys(self.sites) for image, label in self._held_out(site)]
        return [*scans, ("real", *self.real)] if self.real else scans

    def _file(self, name: str, image: Path) -> Path:
        return self.out / "predicted" / name / image.name

    def _segmented(self, name: str, networks: Sequence[Path], image: Path) -> Path:
        """The file of a scan's predicted label ids."""
        path = self._file(name, image)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            labels = dwc.predict(networks, image, self.prediction).labels()
            write_whole(path, gzip.compress(labels.to_bytes(), compresslevel=4, mtime=0))
        return path

    def _held_out(self, site: str) -> list[tuple[Path, Path]]:
        scans = read_manifest(self.manifest(site), seed=0, test_fraction=0)
        return [(Path(scan.image), Path(str(scan.label))) for scan in scans if scan.split == "test"]

    def _dice(self, predicted: Path, truth: Path) -> dict[str, float]:
        """Dice of each group, and the mean over classes, on the scan's own grid."""
        label_map = LabelMap.load(self.label_map)
        found, true = (label_map.apply(np.asanyarray(nibabel.load(path).dataobj)) for path in (predicted, truth))
        confusion = confusion_matrix(true, found, label_map.n_classes)
        values = dice(confusion)[1:]
        means = {"mean": values[~values.isnan()].mean().item()}
        each = [(name, (k,)) for k, name in enumerate(label_map.names) if k]
        for name, classes in self.groups or each:
            of_truth, of_prediction = np.isin(true, classes), np.isin(found, classes)
            means[name] = dice(confusion_matrix(of_truth, of_prediction, 2))[1].item()
        return {name: round(value, 4) for name, value in means.items()}
