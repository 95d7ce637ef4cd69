"""Whole rounds on one machine: FLARE's simulator, simulated sites, real trainers, and a plan for more sites.

For planning before a consortium begins: what a round takes, what each site sends and receives, and what it brings. The
classes that answer are those of the real thing; only certificates and distances are missing.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pandas as pd

from dwc.data.conform import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.data.simulation import load_sites, write_site
from dwc.data.subvolumes import prepare
from dwc.errors import InputError
from dwc.evaluation import score_volumes, summary
from dwc.federated.cycle import Cycle, read_state
from dwc.federated.exchange import ALLOWED, FOLDER, SERVER, Exchange
from dwc.federated.planning import plan
from dwc.federated.project import Project
from dwc.federated.service import write_job
from dwc.federated.settings import SimulationSettings
from dwc.federated.spool import Spool
from dwc.files import open_folder, write_whole
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.settings import TrainSettings
from dwc.training import train

__all__ = ["simulate"]

_PASSES = 100_000


def simulate(settings: SimulationSettings) -> None:
    """Run the rounds, print what each took and brought, and the plan; `rounds.csv` and `plan.csv` keep them.

    Raises
    ------
    InputError
        If a setting is wrong, the folder cannot be written, or the simulator ends before the rounds do.
    """
    settings = replace(settings, out=settings.out.absolute())
    settings.check()
    open_folder(settings.out)
    names = [f"site-{number}" for number in range(1, settings.sites + 1)]
    manifests = {name: _scans(settings, name, number) for number, name in enumerate(names)}
    project = Project(
        "simulation", "localhost", names, _first_prior(settings), rounds=settings.rounds, training=settings.training()
    ).check()
    books = settings.out / "books"
    cycle = Cycle.create(books / SERVER, project)
    for name in names:
        words = ["--mode", "vcl", "--data", str(manifests[name]), "--device", "cpu"]
        words += [word for key, value in project.training.items() for word in (f"--{key}", json.dumps(value))]
        Spool.create(books / name, words)
    _run_flare(settings, names, books)
    if (cycle := Cycle(cycle.folder)).round is not None:
        raise InputError(f"{settings.out / 'flare.log'}: the simulator ended in round {cycle.round}; it tells why")
    rounds = _rounds(settings, cycle.folder, manifests)
    write_whole(settings.out / "rounds.csv", rounds.to_csv(float_format="%.4f").encode())
    print(rounds.to_string(float_format="%.3f", na_rep="-"))
    if settings.plan_sites:
        table = plan(settings.plan_sites, n_classes=50, width=96, link_mbit_s=settings.link_mbit_s)
        write_whole(settings.out / "plan.csv", table.to_csv(float_format="%.3f").encode())
        print(
            f"\none round of the full network (50 classes, 96 filters), server's link {settings.link_mbit_s:g} Mbit/s"
        )
        print(table.to_string(float_format="%.2f"))
    print(f"\n{settings.out}")


def _scans(settings: SimulationSettings, name: str, number: int) -> Path:
    """A site's manifest; the scanners of `load_sites` take turns, each time with other subjects."""
    kinds = list(load_sites())
    turn, kind = divmod(number, len(kinds))
    grid = Grid(settings.grid_size, settings.voxel_size)
    folder = settings.out / "scans" / name
    return write_site(folder, kinds[kind], settings.n_train, settings.n_test, grid=grid, seed=settings.seed + turn)


def _first_prior(settings: SimulationSettings) -> Path:
    """The organization's network, MAP and then variational, on scans that no site has."""
    grid = Grid(settings.grid_size, settings.voxel_size)
    kind = next(iter(load_sites()))
    data = write_site(settings.out / "scans" / "origin", kind, settings.n_train, 0, grid=grid, seed=settings.seed + 999)
    first = TrainSettings(
        mode="map", data=data, out=settings.out / "origin" / "map", label_map=settings.label_map,
        grid_size=settings.grid_size, voxel_size=settings.voxel_size, width=settings.width,
        dilations=settings.dilations, device="cpu", **settings.training(),
    )  # fmt: skip
    train(replace(first, rho_lr=None))
    train(replace(first, mode="vi", init=first.out / "posterior.safetensors", out=settings.out / "origin" / "vi"))
    return settings.out / "origin" / "vi" / "posterior.safetensors"


def _run_flare(settings: SimulationSettings, names: list[str], books: Path) -> None:
    """All rounds as one job in the simulator, with a process for each site."""
    workspace, log = settings.out / "flare", settings.out / "flare.log"
    (workspace / "local").mkdir(parents=True)
    policy = {"format_version": 2, "class_allow_list": list(ALLOWED)}
    write_whole(workspace / "local" / "resources.json", json.dumps(policy).encode())
    exchange = Exchange(_PASSES, settings.pause_s)
    job = write_job(exchange, settings.out / "job", Cycle(books / SERVER).project["answer_timeout_s"])
    n = str(len(names))
    words = [sys.executable, "-m", "nvflare.cli", "simulator", str(job), "-w", str(workspace)]
    words += ["-c", ",".join(names), "-t", n, "-m", n]
    environment = {**os.environ, FOLDER: str(books)}
    with log.open("wb") as output:
        flare = subprocess.Popen(words, stdout=output, stderr=output, env=environment, start_new_session=True)
        try:
            flare.wait(settings.limit_s)
        except subprocess.TimeoutExpired:
            raise InputError(f"{log}: the rounds took more than {settings.limit_s:g} s; give more --limit_s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(flare.pid, signal.SIGKILL)
            flare.wait()


def _rounds(settings: SimulationSettings, folder: Path, manifests: dict[str, Path]) -> pd.DataFrame:
    """A row per network q0, q1, ...: seconds of its round, posteriors in it, bytes per site, Dice."""
    state = read_state(folder)
    grid, label_map = Grid(settings.grid_size, settings.voxel_size), LabelMap.load(settings.label_map)
    scans = [scan for manifest in manifests.values() for scan in read_manifest(manifest) if scan.split == "test"]
    held_out = prepare(scans, label_map, grid, settings.out / "cache", progress=False)
    published = [datetime.fromisoformat(time) for time in state["published"]]
    rows = []
    for number in range(settings.rounds + 1):
        network = MeshNet.from_posterior(Posterior.load(folder / f"q{number}.safetensors"))
        scores = score_volumes([network], held_out, n_samples=3, progress=False)
        row = {"network": f"q{number}", "dice": summary(scores)["volume_weighted"]["dice"]}
        if number:
            entered = [entry for entry in state["posteriors"] if entry["counted_in"] == number]
            row |= {
                "seconds": (published[number] - published[number - 1]).total_seconds(),
                "posteriors": len(entered),
                "bytes_to_a_site": (folder / f"q{number - 1}.safetensors").stat().st_size,
                "bytes_from_a_site": max(entry["bytes"] for entry in entered),
            }
        rows.append(row)
    return pd.DataFrame(rows).set_index("network")
