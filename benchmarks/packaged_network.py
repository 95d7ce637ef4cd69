"""Train a small network for the package by the project's own cycle, and score it.

    python -m benchmarks.packaged_network --anatomies label_maps --out packaged [--real T1.nii.gz aparc+aseg.nii.gz]

Four simulated sites share the anatomies; each scan has a random T1 contrast, resolution, noise and bias field, so that
the network does not depend on a scanner. H trains a MAP and a variational network; N, B and W train from it (VCL), the
networks are consolidated and fine-tuned on H. Everything is 1 mm and the eight coarse tissues. Scores are Dice of the
sites' held-out scans (one anatomy each) and of a real scan on its own grid. Called again, it continues.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import torch

import dwc
from dwc.base.files import write_whole
from dwc.consolidation import consolidate
from dwc.data.augmentation_settings import Augmentation
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.metrics.confusion import confusion_matrix, dice
from dwc.posterior import Posterior
from dwc.simulation.scans import load_sites, write_site
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings

__all__ = ["main"]

ORIGIN, SITES = "H", ("N", "B", "W")
GRID = Grid(256, 1.0)
N_TRAIN, N_TEST = 15, 1  # scans of a site, of three anatomies and of one
AUGMENTATION = Augmentation(mirror=0.5, rotation=8, scale=0.08, elastic=1, bias=0.2, gamma=0.15, blur=0.6, noise=0.03)
NETWORK: dict[str, Any] = {"label_map": "coarse", "grid_size": GRID.size, "voxel_size": GRID.voxel_size}
STEPS = {"map": 6000, "vi": 1500, "vcl": 1000, "finetune": 400}
EPOCHS = 10
PREDICTION = dwc.PredictionSettings(n_samples=3, memory_limit=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anatomies", type=Path, help="folder of label volumes; by default procedural heads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--dilations", type=int, nargs="+", default=[1, 2, 4, 8, 4, 2, 1])
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--share", type=float, default=1.0, help="of the steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=Path, nargs=2, help="a T1 scan and its FreeSurfer labels")
    values = parser.parse_args(arguments)
    torch.set_num_threads(1)
    manifests = {site: _scans(values, site) for site in (ORIGIN, *SITES)}

    first = _train(values, manifests[ORIGIN], "map", "H_MAP", lr=3e-2, width=values.width, dilations=values.dilations)
    _score(values, manifests, "H MAP", first)
    prior = _train(values, manifests[ORIGIN], "vi", "H", init=first, lr=3e-3, rho_lr=3e-2)
    _score(values, manifests, "H", prior)
    sites = [
        _train(values, manifests[site], "vcl", f"H-{site}", prior=prior, stream=number, lr=3e-3, rho_lr=3e-2)
        for number, site in enumerate(SITES, start=1)
    ]
    consolidated = values.out / "consolidated.safetensors"
    consolidate(Posterior.load(prior), [Posterior.load(site) for site in sites]).save(consolidated)
    _score(values, manifests, "DWC without fine-tuning", consolidated)
    final = _train(values, manifests[ORIGIN], "finetune", "DWC", prior=consolidated, lr=3e-3, rho_lr=3e-2)
    _score(values, manifests, "DWC", final)


def _scans(values: argparse.Namespace, site: str) -> Path:
    """The manifest of a site's simulated scans."""
    folder = values.out / "scans" / site
    if not (folder / "manifest.csv").exists():
        print(f"simulating site {site}", flush=True)
        write_site(
            folder, load_sites()[site], N_TRAIN, N_TEST, grid=GRID, seed=values.seed, anatomies=values.anatomies,
            shared_by=(ORIGIN, *SITES), random_scanners=True,
        )  # fmt: skip
    return folder / "manifest.csv"


def _train(values: argparse.Namespace, manifest: Path, mode: Any, name: str, **settings: Any) -> Path:
    """Train a network, or go on with it; returns its posterior file."""
    out = values.out / "runs" / name
    posterior = out / "posterior.safetensors"
    if not posterior.exists():
        print(f"training {name}", flush=True)
        steps = max(1, round(STEPS[mode] * values.share / EPOCHS))
        train_network(
            TrainSettings(
                mode=mode, data=manifest, out=out, cache_dir=values.out / "cache", schedule="one_cycle", epochs=EPOCHS,
                steps_per_epoch=steps, batch_size=values.batch_size, validation_sub_volumes=64, seed=values.seed,
                augmentation=AUGMENTATION, device="cpu", **NETWORK, **settings,
            ),
            resume=out.exists(),
        )  # fmt: skip
    return posterior


def _score(values: argparse.Namespace, manifests: dict[str, Path], name: str, network: Path) -> None:
    """Print and keep the Dice of each tissue, on each site's held-out scans and on the real scan."""
    path = values.out / "scores.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    if name not in scores:
        found = {}
        for site, manifest in manifests.items():
            table = dwc.evaluate(network, manifest, PREDICTION, cache_dir=values.out / "cache").per_class
            found[site] = table[table["class"] > 0].groupby("name", sort=False)["dice"].mean().round(4).to_dict()
        if values.real:
            found["real"] = _real_dice(network, *values.real)
        scores[name] = found
        write_whole(path, json.dumps(scores, indent=1).encode())
    for site, dice_of in scores[name].items():
        print(f"{name}, {site}: " + ", ".join(f"{tissue} {d}" for tissue, d in dice_of.items()), flush=True)


def _real_dice(network: Path, image: Path, labels: Path) -> dict[str, float]:
    """Dice of each tissue on the scan's own grid."""
    label_map = LabelMap.load(NETWORK["label_map"])
    truth = label_map.apply(np.asanyarray(nibabel.load(labels).dataobj))
    predicted = label_map.apply(np.asanyarray(dwc.predict(network, image, PREDICTION).labels().dataobj))
    values = dice(confusion_matrix(truth, predicted, label_map.n_classes))
    return {name: round(float(d), 4) for name, d in zip(label_map.names, values, strict=True) if name != "Background"}


if __name__ == "__main__":
    main()
