"""The real thing on one machine: provisioned server and sites as processes, mTLS on loopback, kills and a freeze.

`pytest -m loopback`; to take every other network away too:
`unshare --net sh -c 'ip link set lo up && pytest -m loopback'` (as root).
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dwc import cli
from dwc.consolidation import consolidate
from dwc.lock import held
from dwc.posterior import Posterior
from dwc.training import train

pytest_plugins = ["tests.tiny_runs"]
pytestmark = [pytest.mark.loopback, pytest.mark.usefixtures("one_thread", "offline")]

SITES = {"north": 1, "east": 2, "west": 3}  # name: seed
TRAINING = {"lr": 1e-2, "rho_lr": 3e-2, "batch_size": 1, "epochs": 40, "steps_per_epoch": 2}
LIMIT_S = 1200


class Federation:
    """Kits, and the processes started with them."""

    def __init__(self, folder: Path, prior: Path, data: Path, name: str = "brains") -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        self.folder, self.data = folder, data
        folder.mkdir()
        agreement = {
            "name": name, "server": "localhost", "sites": list(SITES), "prior": str(prior), "rounds": 2, "port": port,
            "answer_timeout_s": 30, "training": TRAINING,
        }  # fmt: skip
        (folder / "project.yml").write_text(yaml.safe_dump(agreement))
        assert cli.main(["federated", "init", str(folder / "project.yml"), "--out", str(folder / "kits")]) == 0
        self.kits = folder / "kits" / name / "prod_00"
        self.server = self.kits / "localhost"

    def start(self, *words: str) -> None:
        with (self.folder / f"{Path(words[1]).name}.log").open("ab") as log:
            command = [sys.executable, "-m", "dwc.cli", "federated", *words]
            subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)

    def serve(self) -> None:
        self.start("serve", str(self.server), "--every_s", "2")

    def join(self, site: str) -> None:
        own = self.folder / f"{site}.yml"
        own.write_text(yaml.safe_dump({"seed": SITES[site], "device": "cpu"}))
        self.start("join", str(self.kits / site), "--data", str(self.data), "--settings", str(own))

    def state(self) -> dict:
        return json.loads((self.server / "cycle" / "state.json").read_text())

    def processes(self, participant: str) -> list[int]:
        """Everything that runs with a participant's kit: service, FLARE, its jobs, the trainer."""
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().decode().split("\0")
            except (OSError, UnicodeDecodeError):
                continue
            if (
                any(word.startswith(str(self.kits / participant)) for word in words)
                and int(path.parent.name) != os.getpid()
            ):
                found.append(int(path.parent.name))
        return found

    def signal(self, participant: str, number: int) -> None:
        for pid in self.processes(participant):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def tasks(self, site: str, number: int) -> list[Path]:
        return list((self.kits / site / "cycle").glob(f"round-{number}-*"))


@pytest.fixture
def federation(networks, settings, tmp_path) -> Iterator[Federation]:
    federation = Federation(tmp_path / "federation", Path(networks["vi"].name), settings.data)
    yield federation
    for participant in ("localhost", *SITES):
        federation.signal(participant, signal.SIGKILL)


def wait_until(true, what: str, limit_s: float = LIMIT_S) -> None:
    until = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < until, what
        time.sleep(0.2)


def is_free(lock: Path) -> bool:
    with held(lock) as free:
        return free


def undisturbed(settings, prior: Posterior, folder: Path) -> Posterior:
    """The same two rounds by hand: dwc train at each site, dwc consolidate."""
    for number in (1, 2):
        path = folder / f"prior-{number}.safetensors"
        prior.save(path)
        sites = []
        for site, seed in SITES.items():
            vcl = replace(settings, mode="vcl", prior=path, seed=seed, out=folder / f"{site}-{number}", **TRAINING)
            sites.append(train(replace(vcl, label_map=None, grid_size=None, width=None, dilations=None)))
        prior = consolidate(prior, sites)
    return prior


def test_two_rounds_through_kills_and_a_freeze_end_at_the_undisturbed_bits(federation, networks, settings, tmp_path):
    federation.serve()
    for site in SITES:
        federation.join(site)
    rng = random.Random(0)
    moments = {name: rng.uniform(0, 10) for name in ("server", "north")}

    wait_until(lambda: list(federation.kits.glob("west/cycle/round-1-*/run/config.yaml")), "west has begun")
    west = [
        pid for pid in federation.processes("west") if b"dwc.train" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    for pid in west:  # its connection is gone, its trainer goes on
        os.kill(pid, signal.SIGSTOP)
    frozen = time.monotonic()

    wait_until(lambda: list(federation.kits.glob("north/cycle/round-1-*/run/checkpoint.safetensors")), "north trains")
    time.sleep(moments["north"])
    federation.signal("north", signal.SIGKILL)  # service, FLARE and trainer, as when the power fails
    (task,) = federation.tasks("north", 1)
    wait_until(lambda: is_free(task / "trainer.lock"), "the trainer's lock is free", 30)
    assert not (task / "run" / "posterior.safetensors").exists()  # it was at work
    time.sleep(moments["server"])
    federation.signal("localhost", signal.SIGKILL)
    federation.serve()
    federation.join("north")

    time.sleep(max(0.0, frozen + 80 - time.monotonic()))
    for pid in west:
        try:
            os.kill(pid, signal.SIGCONT)
        except ProcessLookupError:
            continue

    wait_until(lambda: len(federation.state()["priors"]) == 3, "two rounds are closed")
    state = federation.state()
    entered = sorted((row["site"], row["round"]) for row in state["posteriors"])
    assert entered == sorted((site, number) for site in SITES for number in (1, 2))
    assert state["refused"] == []
    result = Posterior.load(federation.server / "cycle" / "q2.safetensors")
    (tmp_path / "by_hand").mkdir()
    assert result.sha256 == undisturbed(settings, networks["vi"], tmp_path / "by_hand").sha256


def with_code(job: Path, mark: Path) -> Path:
    """A FLARE job that brings a class along, which leaves a mark if it is ever imported."""
    config = job / "app" / "config"
    config.mkdir(parents=True)
    (job / "app" / "custom").mkdir()
    (job / "app" / "custom" / "brought.py").write_text(f"open({str(mark)!r}, 'w')\nclass Along: pass\n")
    (job / "meta.json").write_text(json.dumps({"name": "code", "min_clients": 1, "deploy_map": {"app": ["@ALL"]}}))
    along = {"path": "brought.Along", "args": {}}
    workflows = {"format_version": 2, "workflows": [{"id": "controller", **along}]}
    (config / "config_fed_server.json").write_text(json.dumps(workflows))
    executors = {"format_version": 2, "executors": [{"tasks": ["*"], "executor": along}]}
    (config / "config_fed_client.json").write_text(json.dumps(executors))
    return job


def test_a_stranger_is_not_let_in_and_brings_no_code(federation, networks, settings, tmp_path):
    from nvflare.fuel.flare_api.flare_api import new_secure_session

    other = Federation(tmp_path / "other", Path(networks["vi"].name), settings.data, name="other")
    stranger = other.kits / "north"  # the same name, of another authority
    path = stranger / "startup" / "fed_client.json"
    ours = json.loads((federation.kits / "north" / "startup" / "fed_client.json").read_text())
    path.write_text(json.dumps({**json.loads(path.read_text()), "servers": ours["servers"]}))
    federation.serve()
    federation.join("east")
    other.join("north")
    admin = federation.kits / "organizer@dwc.org"

    def answered() -> bool:
        return federation.state()["sites"]["east"]["heard"] is not None

    wait_until(answered, "east is heard", 240)
    session = new_secure_session("organizer@dwc.org", str(admin), timeout=30)
    try:
        assert [client.name for client in session.get_connected_client_list()] == ["east"]
        job = with_code(federation.folder / "code", tmp_path / "ran")
        status = session.wait_for_job(session.submit_job(str(job)), timeout=240)["status"]
    finally:
        session.close()
    assert not status.endswith("COMPLETED")
    assert "BYOC not permitted" in (federation.server / "engine.log").read_text()
    assert not (tmp_path / "ran").exists()
    assert federation.state()["sites"]["north"]["heard"] is None
    other.signal("north", signal.SIGKILL)
