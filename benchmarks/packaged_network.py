"""Train a small network for the package by the project's own cycle, and score it.

    python -m benchmarks.packaged_network --anatomies label_maps --out packaged [--real T1.nii.gz aparc+aseg.nii.gz]

H trains a MAP network, from coarse to fine voxels: a cube of coarse ones holds much of a head, so that the network
learns within minutes where the brain is. From it come a variational network on H, networks of N, B and W (VCL), the
consolidated one, and the one fine-tuned on H. The anatomies are divided among the sites. Scores are Dice of the sites'
held-out scans (one anatomy each) and of a real scan on its own grid. Called again, it continues.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

import dwc
from benchmarks.cycle import Cycle
from dwc.data.augmentation_settings import Augmentation
from dwc.data.grid import Grid
from dwc.posterior import Posterior

__all__ = ["main"]

ORIGIN, SITES = "H", ("N", "B", "W")
COARSE, FINE, WHOLE = Grid(64, 3.0), Grid(128, 1.5), Grid(160, 1.5)  # trained on 192 mm; 240 mm hold any head
MAP_STAGES = ((COARSE, 1600, 2e-2, 8), (FINE, 1600, 1e-2, 12), (FINE, 1200, 4e-3, 12))  # grid, steps, rate, margin
NETWORK: dict[str, Any] = {"width": 16, "dilations": [1, 2, 4, 8, 16], "intensity": "quantile"}
SHARES = (*3 * ORIGIN, *SITES)  # H gets half of the anatomies
N_TRAIN, N_TEST = 12, 1  # scans: 36 of H, 12 of each site; a test scan is of an anatomy that nobody trains on
AUGMENTATION = Augmentation(mirror=0.5, bias=0.15, gamma=0.1, blur=0.6, noise=0.02)  # the simulation deforms heads
STEPS = {"vi": 120, "vcl": 80, "finetune": 60}
EPOCHS = 4
TRAINING: dict[str, Any] = {
    "schedule": "one_cycle", "epochs": EPOCHS, "batch_size": 2, "brain_share": 0.5, "validation_sub_volumes": 48,
    "augmentation": AUGMENTATION,
}  # fmt: skip
BAYESIAN = {"lr": 5e-4, "rho_lr": 3e-2, "margin": 12}
PREDICTION = dwc.PredictionSettings(n_samples=3, memory_limit=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--anatomies", type=Path, help="folder of label volumes; by default procedural heads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=Path, nargs=2, help="a T1 scan and its FreeSurfer labels")
    values = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cycle = Cycle(
        out=values.out, sites=SHARES, n_train=N_TRAIN, n_test=N_TEST, grid=FINE, label_map="coarse",
        training=TRAINING, prediction=PREDICTION, seed=values.seed, anatomies=values.anatomies, random_contrasts=True,
        real=values.real,
    )  # fmt: skip
    first = _first(cycle)

    def train(mode: str, name: str, site: str, **settings: Any) -> Path:
        return cycle.train(
            mode, name, cycle.manifest(site), steps_per_epoch=STEPS[mode] // EPOCHS, **BAYESIAN, **settings
        )

    prior = train("vi", "H", ORIGIN, init=first)
    sites = [train("vcl", f"H-{site}", site, prior=prior, stream=n) for n, site in enumerate(SITES, start=1)]
    consolidated = cycle.consolidated(prior, sites)
    final = train("finetune", "DWC", ORIGIN, prior=consolidated)
    trained = {"H MAP": first, "H": prior, "DWC without fine-tuning": consolidated, "DWC": final}
    cycle.score({name: [cycle.made(f"{name}_whole", partial(_on_grid, path, WHOLE))] for name, path in trained.items()})


def _first(cycle: Cycle) -> Path:
    """H's MAP network on the fine grid."""
    network = None
    for number, (grid, n_steps, rate, margin) in enumerate(MAP_STAGES, start=1):
        name = f"H_MAP_{number}"
        start = NETWORK
        if network:
            start = {"init": cycle.made(f"{name}_start", partial(_on_grid, network, grid))}
        network = cycle.train(
            "map", name, cycle.manifest(ORIGIN), lr=rate, steps_per_epoch=n_steps // EPOCHS, grid_size=grid.size,
            voxel_size=grid.voxel_size, margin=margin, **start,
        )  # fmt: skip
    assert network
    return network


def _on_grid(path: Path, grid: Grid) -> Posterior:
    """A network for another field of view or other voxels."""
    network = Posterior.load(path)
    preprocessing = {**network.metadata["preprocessing"], "grid_size": grid.size, "voxel_size": grid.voxel_size}
    return Posterior(network.mu, network.sigma, {**network.metadata, "preprocessing": preprocessing})


if __name__ == "__main__":
    main()
