"""Whole rounds on one machine: FLARE's simulator, simulated sites and real trainers, and a plan for more sites.

The classes that ask and answer are the real ones; certificates and distances are missing.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from dwc.base.errors import InputError
from dwc.base.files import open_folder, write_whole
from dwc.base.tables import as_csv
from dwc.data.cache import prepare
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.evaluation import score_volumes, summary
from dwc.federated.capacity import capacity_table
from dwc.federated.cycle import Cycle
from dwc.federated.exchange import ALLOWED, FOLDER, SERVER, Exchange
from dwc.federated.project import Project
from dwc.federated.provisioning import TRAINING
from dwc.federated.server_state import read_state
from dwc.federated.service import write_job
from dwc.federated.settings import SimulationSettings
from dwc.federated.spool import Spool
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.simulation.scans import load_sites, write_site
from dwc.training.loop import train_network
from dwc.training.settings import TrainSettings

__all__ = ["simulate"]

_PASSES = 100_000
_LOOK_S = 0.2


def simulate(settings: SimulationSettings) -> None:
    """Run the rounds and print time, traffic and Dice of each, then the plan.

    Writes `rounds.csv`, `plan.csv` and, with the bytes of each site and round, `traffic.csv`.
    """
    if settings.out.exists() and any(settings.out.iterdir()):
        raise InputError(f"`out` {settings.out}: is not empty; give another folder")
    LabelMap.load(settings.label_map)
    names = [f"site-{number}" for number in range(1, settings.sites + 1)]
    project = Project(
        "simulation", "localhost", names, settings.out / "origin" / "vi" / "posterior.safetensors",
        rounds=settings.rounds, method=settings.method, damping=settings.damping, temper=settings.temper,
        max_influence=settings.max_influence, training=settings.training(),
    )  # fmt: skip
    open_folder(settings.out)
    n_times = settings.rounds if settings.method == "dwc" else 1  # how often the sites get new scans
    manifests = [
        {name: _scans(settings, name, site, number) for site, name in enumerate(names)}
        for number in range(1, n_times + 1)
    ]
    _train_first(settings, project.prior.parent)
    books = settings.out / "books"
    cycle = Cycle.create(books / SERVER, project)
    _run_flare(settings, names, books, manifests)
    if (cycle := Cycle(cycle.folder)).round is not None:
        raise InputError(f"{settings.out / 'flare.log'}: the simulator ended in round {cycle.round}; see this log")
    rounds = _rounds(settings, cycle.folder, manifests[0])
    write_whole(settings.out / "rounds.csv", as_csv(rounds, index=True, float_format="%.4f").encode())
    print(rounds.to_string(float_format="%.3f", na_rep="-"))
    if settings.plan_sites:
        table = capacity_table(settings.plan_sites, n_classes=50, width=96, link_mbit_s=settings.link_mbit_s)
        write_whole(settings.out / "plan.csv", as_csv(table, index=True, float_format="%.3f").encode())
        print(
            f"\none round of the full network (50 classes, 96 filters), server's link {settings.link_mbit_s:g} Mbit/s"
        )
        print(table.to_string(float_format="%.2f"))
    print(f"\n{settings.out}")


def _scans(settings: SimulationSettings, name: str, site: int, number: int) -> Path:
    """Write a site's scans of a round, with new subjects, and return its manifest; sites take turns at the scanners."""
    kinds = list(load_sites())
    turn, kind = divmod(site, len(kinds))
    grid = Grid(settings.grid_size, settings.voxel_size)
    folder, seed = settings.out / "scans" / name / f"round-{number}", settings.seed + turn + 1000 * (number - 1)
    n_test = settings.n_test if number == 1 else 0  # the same test scans for all rounds
    return write_site(folder, kinds[kind], settings.n_train, n_test, grid=grid, seed=seed)


def _train_first(settings: SimulationSettings, out: Path) -> None:
    """Train the organization's network, MAP and then variational, on scans that no site has."""
    grid = Grid(settings.grid_size, settings.voxel_size)
    kind = next(iter(load_sites()))
    data = write_site(settings.out / "scans" / "origin", kind, settings.n_train, 0, grid=grid, seed=settings.seed + 999)
    first = TrainSettings(
        mode="map", data=data, out=out.with_name("map"), device="cpu", **settings.network(),
        **settings.training(),
    )  # fmt: skip
    train_network(replace(first, rho_lr=None))
    train_network(replace(first, mode="vi", init=first.out / "posterior.safetensors", out=out))


def _give_scans(settings: SimulationSettings, books: Path, manifests: dict[str, Path]) -> None:
    """Give each site its scans of a round, as `dwc federated join` does."""
    shared = settings.out / TRAINING
    write_whole(shared, yaml.safe_dump(settings.training(), sort_keys=False).encode())
    words = ["--config", str(shared), "--mode", "vcl", "--device", "cpu"]
    for name, manifest in manifests.items():
        Spool.create(books / name, words, scans=read_manifest(manifest), method=settings.method)


def _run_flare(settings: SimulationSettings, names: list[str], books: Path, manifests: list[dict[str, Path]]) -> None:
    """Run all rounds as one job in the simulator, with a process for each site."""
    workspace, log = settings.out / "flare", settings.out / "flare.log"
    (workspace / "local").mkdir(parents=True)
    policy = {"format_version": 2, "class_allow_list": list(ALLOWED)}
    write_whole(workspace / "local" / "resources.json", json.dumps(policy).encode())
    exchange = Exchange(_PASSES, settings.pause_s)
    job = write_job(exchange, settings.out / "job", Cycle(books / SERVER).project["answer_timeout_s"])
    n = str(len(names))
    words = [sys.executable, "-m", "nvflare.cli", "simulator", str(job), "-w", str(workspace)]
    words += ["-c", ",".join(names), "-t", n, "-m", n]
    # All sites train at once: with a thread per core each, they would mostly wait for one another's threads.
    threads = max(1, (os.cpu_count() or 1) // len(names))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, FOLDER: str(books)}
    until, given = time.monotonic() + settings.limit_s, 0
    with log.open("wb") as output:
        flare = subprocess.Popen(words, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            while flare.poll() is None:
                if given < min(len(read_state(books / SERVER)["priors"]), len(manifests)):
                    _give_scans(settings, books, manifests[given])
                    given += 1
                if time.monotonic() > until:
                    raise InputError(
                        f"{log}: the rounds took more than {settings.limit_s:g} s; give a longer `limit_s`"
                    )
                time.sleep(_LOOK_S)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(flare.pid, signal.SIGKILL)
            flare.wait()


def _rounds(settings: SimulationSettings, folder: Path, manifests: dict[str, Path]) -> pd.DataFrame:
    """One row per network q0, q1, ...: Dice; seconds and posteriors of its round, bytes of the site with the most."""
    state = read_state(folder)
    traffic = _traffic(state)
    write_whole(settings.out / "traffic.csv", as_csv(traffic, index=True, float_format=None).encode())
    grid, label_map = Grid(settings.grid_size, settings.voxel_size), LabelMap.load(settings.label_map)
    scans = [scan for manifest in manifests.values() for scan in read_manifest(manifest) if scan.split == "test"]
    intensity = settings.intensity or "z_score"
    held_out = prepare(scans, label_map, grid, settings.out / "cache", intensity=intensity, progress=False)
    published = [datetime.fromisoformat(time) for time in state["published"]]
    rows = []
    for number in range(settings.rounds + 1):
        network = MeshNet.from_posterior(Posterior.load(folder / f"q{number}.safetensors"))
        scores = score_volumes([network], held_out, n_samples=3, progress=False)
        row: dict[str, Any] = {"network": f"q{number}", "dice": summary(scores)["volume_weighted"]["dice"]}
        if number:
            entered = [entry for entry in state["posteriors"] if entry["counted_in"] == number]
            row |= {
                "seconds": (published[number] - published[number - 1]).total_seconds(),
                "posteriors": len(entered),
                **traffic.xs(number, level="round").max().to_dict(),
            }
        rows.append(row)
    return pd.DataFrame(rows).set_index("network")


def _traffic(state: dict[str, Any]) -> pd.DataFrame:
    """One row per site and round: bytes of the messages to the site and from it, as FLARE serializes them."""
    rows = [
        {"site": site, "round": int(number), "bytes_to_a_site": to_site, "bytes_from_a_site": from_site}
        for site, rounds in state["traffic"].items()
        for number, (to_site, from_site) in rounds.items()
    ]
    return pd.DataFrame(rows).set_index(["site", "round"]).sort_index()
