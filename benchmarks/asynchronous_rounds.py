"""Synchronous against asynchronous rounds, with as many site trainings: `python -m benchmarks.asynchronous_rounds`.

Simulated sites train at different speeds on a clock that only counts, so that the numbers do not depend on the machine.
Synchronous rounds wait for the slowest site. Asynchronous ones take each answer when it comes, relative to the cavity
that the site had, with the same damping 1/S, and the site goes on from the network of that moment.
"""

import argparse
import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd

from dwc.base.tables import as_csv
from dwc.data.cache import prepare
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.simulation.scans import load_sites, write_site
from dwc.site_factors import Factors
from dwc.tempering import score_network
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings

SHAPE: dict[str, Any] = {"label_map": "coarse", "grid_size": 32, "voxel_size": 6.0, "width": 6, "dilations": (1, 2)}
OPTIMIZER: dict[str, Any] = {"lr": 1e-2, "rho_lr": 3e-2, "batch_size": 2, "epochs": 1, "device": "cpu"}
GRID, LABELS = Grid(32, 6.0), LabelMap.load("coarse")
Train = Callable[[int, Posterior, Posterior], Posterior]  # site, cavity, start


def synchronous(q0: Posterior, train: Train, durations: Sequence[int]) -> Iterator[tuple[int, int, Posterior]]:
    """Time, number of trainings and network after each round; a round takes as long as the slowest site."""
    factors, time, trainings = Factors(q0), 0, 0
    while True:
        network = factors.posterior()
        cavities = [factors.cavity(str(site)) for site in range(len(durations))]
        for site, cavity in enumerate(cavities):
            answer = train(site, cavity, network)
            factors.replace(str(site), answer, cavity=cavity, damping=1 / len(durations))
        time, trainings = time + max(durations), trainings + len(durations)
        yield time, trainings, factors.posterior()


def asynchronous(q0: Posterior, train: Train, durations: Sequence[int]) -> Iterator[tuple[int, int, Posterior]]:
    """Time, number of trainings and network whenever as many have ended as there are sites."""
    factors, trainings = Factors(q0), 0
    at_work = [(duration, site, q0, q0) for site, duration in enumerate(durations)]
    while True:
        time, site, cavity, start = heapq.heappop(at_work)
        factors.replace(str(site), train(site, cavity, start), cavity=cavity, damping=1 / len(durations))
        trainings += 1
        heapq.heappush(at_work, (time + durations[site], site, factors.cavity(str(site)), factors.posterior()))
        if trainings % len(durations) == 0:
            yield time, trainings, factors.posterior()


def trainer(folder: Path, manifests: Sequence[Path], steps: int) -> Train:
    """Trains a site; the same training is not done twice."""

    def train(site: int, cavity: Posterior, start: Posterior) -> Posterior:
        out = folder / f"{site}-{cavity.sha256[:8]}-{start.sha256[:8]}"
        if (made := out / "run" / "posterior.safetensors").exists():
            return Posterior.load(made)
        out.mkdir(parents=True, exist_ok=True)
        cavity.save(out / "prior.safetensors")
        start.save(out / "start.safetensors")
        begin = None if start.sha256 == cavity.sha256 else out / "start.safetensors"
        settings = TrainSettings(
            mode="vcl", data=manifests[site], prior=out / "prior.safetensors", init=begin, out=out / "run", stream=site,
            steps_per_epoch=steps, cache_dir=folder / "cache", **OPTIMIZER,
        )  # fmt: skip
        return train_network(settings)

    return train


def first_network(folder: Path, data: Path, steps: int) -> Posterior:
    """The organization's network: MAP, then variational."""
    settings = TrainSettings(
        mode="map", data=data, out=folder / "map", steps_per_epoch=steps, cache_dir=folder / "cache",
        **{**OPTIMIZER, "rho_lr": None}, **SHAPE,
    )  # fmt: skip
    network = folder / "vi" / "posterior.safetensors"
    if not network.exists():
        train_network(settings)
        vi = replace(settings, mode="vi", init=folder / "map" / "posterior.safetensors", out=folder / "vi", rho_lr=3e-2)
        train_network(vi)
    return Posterior.load(network)


def held_out(manifests: Sequence[Path], folder: Path) -> SubVolumes:
    scans = [scan for manifest in manifests for scan in read_manifest(manifest) if scan.split == "test"]
    return prepare(scans, LABELS, GRID, folder / "cache", progress=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/asynchronous"))
    parser.add_argument("--rounds", type=int, default=5, help="times S trainings")
    parser.add_argument("--steps", type=int, default=30, help="of each training")
    parser.add_argument("--first-steps", type=int, default=200)
    parser.add_argument("--durations", type=int, nargs="+", default=[1, 1, 2, 4], help="of each site's training")
    values = parser.parse_args()
    values.out.mkdir(parents=True, exist_ok=True)
    kinds = list(load_sites())
    site = partial(write_site, grid=GRID, seed=0)
    origin = site(values.out / "scans" / "origin", kinds[0], 4, 2)
    manifests = [
        site(values.out / "scans" / str(n), kinds[1 + n % (len(kinds) - 2)], 2, 2) for n in range(len(values.durations))
    ]
    unseen = site(values.out / "scans" / "unseen", kinds[-1], 1, 2)
    q0 = first_network(values.out, origin, values.first_steps)
    train = trainer(values.out, manifests, values.steps)
    scans = {name: held_out(of, values.out) for name, of in (("sites", manifests), ("unseen", [unseen]))}
    equal = [1] * len(values.durations)
    methods = {
        "synchronous": synchronous(q0, train, values.durations),
        "asynchronous": asynchronous(q0, train, values.durations),
        "asynchronous, equal speeds": asynchronous(q0, train, equal),
    }
    rows = []

    def score(method: str, time: int, trainings: int, network: Posterior) -> None:
        row: dict[str, object] = {"method": method, "trainings": trainings, "time": time}
        for name, data in scans.items():
            likelihood, dice = score_network(MeshNet.from_posterior(network), data)
            row |= {f"nll {name}": -likelihood, f"dice {name}": dice}
        rows.append(row)
        print(row, flush=True)
        (values.out / "rounds.csv").write_text(as_csv(pd.DataFrame(rows), float_format="%.4f"))

    score("start", 0, 0, q0)
    for _ in range(values.rounds):
        for method, rounds in methods.items():
            score(method, *next(rounds))


if __name__ == "__main__":
    main()
