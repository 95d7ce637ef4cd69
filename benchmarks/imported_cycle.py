"""The cycle with a network that others trained as the origin's MAP network: 50 classes at 1 mm.

    python -m benchmarks.imported_cycle --network imported.safetensors --anatomies label_maps --out imported_cycle \\
        [--real T1.nii.gz aparc+aseg.nii.gz]

`dwc import` writes the network. H trains a variational network from it (vi); N, B and W train from that one (vcl); the
sites' networks are consolidated and fine-tuned on H. Scans are simulated at the sites' scanners, whose people share no
anatomy; nobody trains on A's. Few scans and steps: it shows whether the cycle adapts or harms a good network. Called
again, it continues.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import dwc
from benchmarks.cycle import Cycle
from dwc.data.grid import Grid
from dwc.posterior import Posterior
from dwc.study.combining import average

__all__ = ["main"]

ORIGIN, SITES, UNSEEN = "H", ("N", "B", "W"), "A"
GRID = Grid(256, 1.0)
GROUPS = (("white", (1, 15)), ("cortex", range(16, 50)))  # white matter with the callosum; the cortex in one
N_TRAIN, N_TEST = 2, 1
STEPS = {"vi": 10, "vcl": 14, "finetune": 8}
TRAINING: dict[str, Any] = {
    "schedule": "one_cycle", "epochs": 1, "batch_size": 1, "margin": 12, "air_share": 0.0, "brain_share": 1.0,
    "validation_sub_volumes": 0, "rho_lr": 2e-2,
}  # fmt: skip
PREDICTION = dwc.PredictionSettings(n_samples=1, memory_limit=1)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", type=Path, required=True, help="from dwc import")
    parser.add_argument("--anatomies", type=Path, help="folder of label volumes; by default procedural heads")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--real", type=Path, nargs=2, help="a T1 scan and its FreeSurfer labels")
    values = parser.parse_args(arguments)
    torch.set_num_threads(1)
    cycle = Cycle(
        out=values.out, sites=(ORIGIN, *SITES, UNSEEN), n_train=N_TRAIN, n_test=N_TEST, grid=GRID, label_map="fifty",
        groups=GROUPS, training=TRAINING, prediction=PREDICTION, seed=values.seed, anatomies=values.anatomies,
        real=values.real,
    )  # fmt: skip

    def train(mode: str, name: str, site: str, **settings: Any) -> Path:
        return cycle.train(mode, name, cycle.manifest(site), steps_per_epoch=STEPS[mode], **settings)

    prior = train("vi", "H", ORIGIN, init=values.network, lr=2e-5)
    sites = [train("vcl", f"H-{site}", site, prior=prior, stream=n, lr=3e-5) for n, site in enumerate(SITES, start=1)]
    posteriors = [Posterior.load(path) for path in (prior, *sites)]
    averaged = cycle.made("average", lambda: average(posteriors[0], iter(posteriors[1:])))
    consolidated = cycle.consolidated(prior, sites)
    tuned = train("finetune", "DWC", ORIGIN, prior=consolidated, lr=2e-5)

    networks = {
        "imported": [values.network],
        "DWC": [tuned],
        "DWC without fine-tuning": [consolidated],
        "H": [prior],
        "average of the sites": [averaged],
        **{f"H-{site}": [network] for site, network in zip(SITES, sites, strict=True)},
        "ensemble of the sites": sites,
    }
    cycle.score(networks)
    for site in (*cycle.sites, *(["real"] if values.real else [])):
        cycle.picture(site, ["imported", "DWC"])


if __name__ == "__main__":
    main()
