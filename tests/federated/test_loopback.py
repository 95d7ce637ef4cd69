"""The real thing on one machine: provisioned server and sites as processes, mTLS on loopback, kills and a freeze.

`pytest -m loopback`; to take every other network away too:
`unshare --net sh -c 'ip link set lo up && pytest -m loopback'` (as root). The moments of the kills are
other ones in each run; a run that fails prints the DWC_TEST_SEED that repeats them.
"""

import json
import os
import random
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from dwc import cli
from dwc.base.locks import held
from dwc.consolidation import consolidate
from dwc.federated.spool import Spool, stream_of
from dwc.posterior import Posterior
from dwc.site_factors import Factors
from dwc.training.loop import train_network
from tests.federated.test_hostile_sites import HOSTILE
from tests.made_cycles import file_of
from tests.made_posteriors import a_prior, a_site

pytest_plugins = ["tests.tiny_runs"]
pytestmark = [pytest.mark.loopback, pytest.mark.usefixtures("one_thread", "offline")]

SITES = ("north", "east", "west")
TRAINING = {"lr": 1e-2, "rho_lr": 3e-2, "batch_size": 1, "epochs": 40, "steps_per_epoch": 2}
LIMIT_S = 1200


class Federation:
    """Kits, and the processes started with them."""

    def __init__(self, folder: Path, prior: Path, data: Path, name: str = "brains", **changes: object) -> None:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            self.port = free.getsockname()[1]
        self.folder, self.data = folder, data
        folder.mkdir()
        agreement = {
            "name": name, "server": "localhost", "sites": list(SITES), "prior": str(prior), "rounds": 2,
            "port": self.port, "answer_timeout_s": 30, "training": TRAINING, **changes,
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
        own.write_text(yaml.safe_dump({"device": "cpu"}))
        self.start("join", str(self.kits / site), "--data", str(self.data), "--settings", str(own), "--again")

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
def method() -> str:
    """How the federation's rounds go on; a test that runs both names them."""
    return "dwc"


@pytest.fixture
def federation(networks, settings, tmp_path, method) -> Iterator[Federation]:
    federation = Federation(tmp_path / "federation", Path(networks["vi"].name), settings.data, method=method)
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


def undisturbed(method: str, settings, q0: Posterior, folder: Path) -> Posterior:
    """The same two rounds by hand: dwc train at each site, then Eq. 17 or the sites' factors."""
    factors, joint = Factors(q0), q0

    def saved(posterior: Posterior, name: str) -> Path:
        posterior.save(folder / f"{name}.safetensors")
        return folder / f"{name}.safetensors"

    for number in (1, 2):
        answers = []
        for site in SITES:
            prior, init = joint, None
            if method == "pvi" and number > 1:
                prior = factors.cavity(site)
                init = saved(factors.start(site, prior), f"start-{site}")
            vcl = replace(settings, mode="vcl", prior=saved(prior, f"prior-{site}-{number}"), init=init, **TRAINING)
            vcl = replace(vcl, stream=stream_of(site), label_map=None, grid_size=None, width=None, dilations=None)
            answers.append(train_network(replace(vcl, out=folder / f"{site}-{number}")))
        if method == "dwc":
            joint = consolidate(joint, answers)
        else:
            cavities = [factors.cavity(site) for site in SITES]
            for site, answer, cavity in zip(SITES, answers, cavities, strict=True):
                factors.replace(site, answer, cavity=cavity, damping=1 / len(SITES))
            joint = factors.posterior()
    return joint


def kill_a_site_and_its_trainer(federation: Federation) -> None:
    """As when the power fails: service, FLARE and trainer; then the power is back."""
    federation.signal("north", signal.SIGKILL)
    (task,) = federation.tasks("north", 1)
    wait_until(lambda: is_free(task / "trainer.lock"), "the trainer's lock is free", 30)
    assert not (task / "run" / "posterior.safetensors").exists()  # it was at work
    federation.join("north")


def kill_the_server_and_restore_its_books(federation: Federation, backup: bytes) -> None:
    """From a backup of before any posterior had arrived: receipts that were given are lost."""
    federation.signal("localhost", signal.SIGKILL)
    wait_until(lambda: not federation.processes("localhost"), "the server is dead", 30)
    assert federation.state()["posteriors"]
    (federation.server / "cycle" / "state.json").write_bytes(backup)
    federation.serve()


def epochs_of(federation: Federation, site: str) -> int:
    paths = [task / "run" / "log.jsonl" for task in federation.tasks(site, 1)]
    return sum(path.read_bytes().count(b"\n") for path in paths if path.exists())


@pytest.mark.parametrize("method", ["dwc", "pvi"])
def test_two_rounds_through_kills_and_a_freeze_end_at_the_undisturbed_bits(
    federation, method, networks, settings, tmp_path
):
    seed = int(os.environ.get("DWC_TEST_SEED", random.SystemRandom().randrange(10**6)))
    rng = random.Random(seed)
    epoch, delay = rng.randint(1, TRAINING["epochs"] // 2), rng.uniform(0, 20)
    print(f"DWC_TEST_SEED={seed}: north dies in epoch {epoch}, the server {delay:.1f} s after a posterior has arrived")
    backup = (federation.server / "cycle" / "state.json").read_bytes()
    federation.serve()
    for site in SITES:
        federation.join(site)

    wait_until(lambda: list(federation.kits.glob("west/cycle/round-1-*/run/config.yaml")), "west has begun")
    west = [
        pid for pid in federation.processes("west") if b"dwc.train" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    ]
    for pid in west:  # its connection is gone, its trainer goes on
        os.kill(pid, signal.SIGSTOP)
    frozen = time.monotonic()

    killed, arrived = set(), None
    until = time.monotonic() + LIMIT_S
    while killed != {"north", "server"}:  # in the order that comes
        assert time.monotonic() < until
        time.sleep(0.05)
        if "north" not in killed and epochs_of(federation, "north") >= epoch:
            kill_a_site_and_its_trainer(federation)
            killed.add("north")
        if arrived is None and federation.state()["posteriors"]:
            arrived = time.monotonic()
        if "server" not in killed and arrived is not None and time.monotonic() > arrived + delay:
            kill_the_server_and_restore_its_books(federation, backup)
            killed.add("server")

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
    assert result.sha256 == undisturbed(method, settings, networks["vi"], tmp_path / "by_hand").sha256


def is_let_in(port: int, kit: Path | None) -> bool:
    """Whether the server talks to whoever holds a kit, or nothing."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE  # it is the server that is to be choosy
    if kit is not None:
        context.load_cert_chain(kit / "startup" / "client.crt", kit / "startup" / "client.key")
    try:
        with (
            socket.create_connection(("localhost", port), timeout=30) as plain,
            context.wrap_socket(plain, server_hostname="localhost") as tls,
        ):
            tls.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            return bool(tls.recv(1))
    except (ssl.SSLError, ConnectionError):
        return False


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
    assert is_let_in(federation.port, federation.kits / "west")
    assert not is_let_in(federation.port, stranger)
    assert not is_let_in(federation.port, None)
    log = stranger / "engine.log"
    wait_until(lambda: "CERTIFICATE_VERIFY_FAILED" in log.read_text(), "the stranger has tried", 60)
    session = new_secure_session("organizer@dwc.org", str(admin), timeout=30)
    try:
        assert [client.name for client in session.get_connected_client_list()] == ["east"]
        job = with_code(federation.folder / "code", tmp_path / "ran")
        status = session.wait_for_job(session.submit_job(str(job)), timeout=240)["status"]
        shut_out = [sys.executable, "-m", "nvflare.cli", "system", "disable-client", "east", "--force"]
        subprocess.run([*shut_out, "--startup-kit", str(admin)], check=True)
        assert session.get_connected_client_list() == []
    finally:
        session.close()
    assert not status.endswith("COMPLETED")
    assert "BYOC not permitted" in (federation.server / "engine.log").read_text()
    assert not (tmp_path / "ran").exists()
    assert federation.state()["sites"]["north"]["heard"] is None
    other.signal("north", signal.SIGKILL)


HONEST, HOSTILE_SITES = ("north", "east", "west"), tuple(f"bad-{number}" for number in range(10))


def put_in(federation: Federation, site: str, content: bytes) -> None:
    """A finished round in a site's spool, with any bytes as its posterior."""
    folder = federation.kits / site / "cycle"
    prior = Posterior.load(federation.server / "cycle" / "q0.safetensors").sha256
    Spool.create(folder, [], ["true"])
    task = folder / f"round-1-{prior[:12]}"
    (task / "run").mkdir(parents=True)
    (task / "scans.json").write_text(json.dumps({"data": None, "scans": []}))
    (task / "run" / "posterior.safetensors").write_bytes(content)
    (task / "task.json").write_text(json.dumps({"round": 1, "prior_sha256": prior}))


def test_a_pass_over_live_sites_enters_exactly_the_honest_ones_and_names_the_others(tmp_path):
    """Three honest sites, and ten with valid kits whose posteriors are made to break the server or to steer it."""
    a_prior().save(tmp_path / "q.safetensors")
    agreement = {"sites": [*HONEST, *HOSTILE_SITES], "quorum": 3, "rounds": 1, "grace_hours": 1, "training": {}}
    federation = Federation(tmp_path / "federation", tmp_path / "q.safetensors", tmp_path, **agreement)
    kinds = list(HOSTILE.values())
    try:
        for n, site in enumerate(HONEST):
            put_in(federation, site, file_of(a_site(a_prior(), 1 + n), tmp_path))
        for n, site in enumerate(HOSTILE_SITES):
            put_in(federation, site, kinds[n](a_site(a_prior(), 100 + n), tmp_path))
        federation.serve()
        for site in (*HONEST, *HOSTILE_SITES):
            federation.start("join", str(federation.kits / site))
        wait_until(
            lambda: len(federation.state()["posteriors"]) + len(federation.state()["refused"]) >= 13, "all are heard"
        )
    finally:
        for participant in ("localhost", *HONEST, *HOSTILE_SITES):
            federation.signal(participant, signal.SIGKILL)
    state = federation.state()
    assert sorted(row["site"] for row in state["posteriors"]) == sorted(HONEST)
    assert {row["site"] for row in state["refused"]} == {*HOSTILE_SITES}
