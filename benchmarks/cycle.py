"""The cycle of origin, sites, consolidation and fine-tuning on simulated scans, in steps that a second call skips.

For studies that `dwc experiment` does not cover, because their first network or their scans are special.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel
import numpy as np

import dwc
from dwc.base.files import write_whole
from dwc.consolidation import consolidate
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.metrics.confusion import confusion_matrix, dice
from dwc.posterior import Posterior
from dwc.prediction import load_networks
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
        Sites that share the anatomies; the first is the origin.
    n_train, n_test : int
        Scans of a site.
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
    random_scanners: bool = False
    real: tuple[Path, Path] | None = None

    def manifest(self, site: str) -> Path:
        """The manifest of a site's simulated scans."""
        folder = self.out / "scans" / site
        if not (folder / "manifest.csv").exists():
            print(f"simulating site {site}", flush=True)
            write_site(
                folder, load_sites()[site], self.n_train, self.n_test, grid=self.grid, seed=self.seed,
                anatomies=self.anatomies, shared_by=self.sites, random_scanners=self.random_scanners,
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
                    label_map=self.label_map, grid_size=self.grid.size, voxel_size=self.grid.voxel_size,
                    **{**self.training, **settings},
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

    def score(self, name: str, *networks: Path, sites: Sequence[str] | None = None) -> None:
        """Print and keep the Dice of a network, or of an ensemble, on held-out scans of sites and on the real scan."""
        scans = [(site, image, label) for site in sites or self.sites for image, label in self._held_out(site)]
        if self.real:
            scans.append(("real", *self.real))
        path = self.out / "scores.json"
        scores = json.loads(path.read_text()) if path.exists() else {}
        ensemble = None
        for site, image, label in scans:
            found = scores.setdefault(name, {}).setdefault(site, {})
            if image.name not in found:
                ensemble = ensemble or load_networks(networks)
                found[image.name] = self._dice(dwc.predict(ensemble, image, self.prediction).labels(), label)
                write_whole(path, json.dumps(scores, indent=1).encode())
            print(f"{name}, {site}: " + ", ".join(f"{n} {d}" for n, d in found[image.name].items()), flush=True)

    def _held_out(self, site: str) -> list[tuple[Path, Path]]:
        scans = read_manifest(self.manifest(site), seed=0, test_fraction=0)
        return [(Path(scan.image), Path(str(scan.label))) for scan in scans if scan.split == "test"]

    def _dice(self, labels: nibabel.Nifti1Image, truth: Path) -> dict[str, float]:
        """Dice of each group, and the mean over classes, on the scan's own grid."""
        label_map = LabelMap.load(self.label_map)
        predicted, true = (label_map.apply(np.asanyarray(image.dataobj)) for image in (labels, nibabel.load(truth)))
        confusion = confusion_matrix(true, predicted, label_map.n_classes)
        values = dice(confusion)[1:]
        found = {"mean": values[~values.isnan()].mean().item()}
        each = [(name, (k,)) for k, name in enumerate(label_map.names) if k]
        for name, classes in self.groups or each:
            of_truth, of_prediction = np.isin(true, classes), np.isin(predicted, classes)
            found[name] = dice(confusion_matrix(of_truth, of_prediction, 2))[1].item()
        return {name: round(value, 4) for name, value in found.items()}
