"""Train a small network for the package by the project's own cycle, and score it.

    python -m benchmarks.packaged_network --anatomies label_maps --out packaged [--real T1.nii.gz aparc+aseg.nii.gz]

Four simulated sites share the anatomies; each scan has a random T1 contrast, resolution, noise, bias field and field of
view, so that the network does not depend on a scanner. H trains a MAP and a variational network; N, B and W train from
it (VCL), the networks are consolidated and fine-tuned on H. Scores are Dice of the sites' held-out scans (one anatomy
each) and of a real scan on its own grid. Called again, it continues.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import dwc
from benchmarks.cycle import Cycle
from dwc.data.augmentation_settings import Augmentation
from dwc.data.constants import SIDE
from dwc.data.grid import Grid
from dwc.data.intensity import IN_HEADERS, Scheme
from dwc.data.labels import LabelMap
from dwc.meshnet import Activation, MeshNet
from dwc.posterior import Posterior

__all__ = ["main"]

ORIGIN, SITES = "H", ("N", "B", "W")
GRID = Grid(192, 4 / 3)  # the real scan's labels, there and back: Dice 0.94 of white matter, 0.89 of cortex
LABEL_MAP = "coarse"
INTENSITY: Scheme = "quantile"
ACTIVATION: Activation = "elu"
NOISE = 0.1  # of the weights at the start, in units of those of He et al. (2015)
N_TRAIN, N_TEST = 12, 1  # scans of a site, of three anatomies and of one
AUGMENTATION = Augmentation(mirror=0.5, bias=0.15, gamma=0.1, blur=0.6, noise=0.02)  # the simulation deforms heads
STEPS = {"map": 3000, "vi": 120, "vcl": 80, "finetune": 60}
EPOCHS = 4
TRAINING: dict[str, Any] = {
    "schedule": "one_cycle", "epochs": EPOCHS, "air_share": 0.03, "brain_share": 0.8, "validation_sub_volumes": 48,
    "augmentation": AUGMENTATION,
}  # fmt: skip
BAYESIAN = {"lr": 5e-4, "rho_lr": 3e-2, "margin": 8}
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
    cycle = Cycle(
        out=values.out, sites=(ORIGIN, *SITES), n_train=N_TRAIN, n_test=N_TEST, grid=GRID, label_map=LABEL_MAP,
        training={**TRAINING, "batch_size": values.batch_size}, prediction=PREDICTION, seed=values.seed,
        anatomies=values.anatomies, random_scanners=True, real=values.real,
    )  # fmt: skip
    origin = cycle.manifest(ORIGIN)

    def train(mode: str, name: str, data: Path, **settings: Any) -> Path:
        steps = max(1, round(STEPS[mode] * values.share / EPOCHS))
        return cycle.train(mode, name, data, steps_per_epoch=steps, **settings)

    start = cycle.made("start", lambda: _start(values.width, values.dilations, values.seed))
    first = train("map", "H_MAP", origin, init=start, lr=2e-3, margin=4)
    prior = train("vi", "H", origin, init=first, **BAYESIAN)
    sites = [
        train("vcl", f"H-{site}", cycle.manifest(site), prior=prior, stream=number, **BAYESIAN)
        for number, site in enumerate(SITES, start=1)
    ]
    consolidated = cycle.consolidated(prior, sites)
    final = train("finetune", "DWC", origin, prior=consolidated, **BAYESIAN)
    cycle.score({"H MAP": [first], "H": [prior], "DWC without fine-tuning": [consolidated], "DWC": [final]})


def _start(width: int, dilations: Sequence[int], seed: int) -> Posterior:
    """An untrained network that hands the scan's intensity on to the last layer.

    Yu and Koltun (2016) start networks of dilated convolutions at the identity, since random weights learn slowly. Here
    the first layer compares intensities to thresholds, the others are the identity and a little noise.
    """
    label_map = LabelMap.load(LABEL_MAP)
    torch.manual_seed(seed)
    network = MeshNet(label_map.n_classes, width, dilations, activation=ACTIVATION, bayesian=False, weight_norm=False)
    layers = [layer for layer in network.layers if isinstance(layer, nn.Conv3d)]
    biases = [layer.bias for layer in layers if layer.bias is not None]
    with torch.no_grad():
        for layer, bias in zip(layers, biases, strict=True):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            layer.weight *= NOISE
            nn.init.zeros_(bias)
        slope = 2 - 4 * (torch.arange(width) % 2)
        layers[0].weight[:, 0, 1, 1, 1] += slope
        biases[0] -= slope * torch.linspace(0, 1, width)
        for layer in layers[1:-1]:
            layer.weight[..., 1, 1, 1] += torch.eye(width)
    preprocessing = {
        "grid_size": GRID.size, "voxel_size": GRID.voxel_size, "sub_volume": SIDE, "intensity": IN_HEADERS[INTENSITY],
    }  # fmt: skip
    return Posterior.from_model(
        network, architecture=network.architecture, preprocessing=preprocessing,
        label_map={"name": label_map.name, "sha256": label_map.sha256}, n_volumes=0,
    )  # fmt: skip


if __name__ == "__main__":
    main()
