import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from nvflare.fuel.flare_api import flare_api

from dwc import cli
from dwc.base.errors import Interrupted
from dwc.base.locks import held
from dwc.base.processes import end, start_once
from dwc.federated import service
from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from dwc.federated.spool import Spool
from tests.made_posteriors import a_prior

ENGINE = """echo $$ >> engines
exec sleep {seconds}
"""
PASS = """#!/bin/sh
echo pass >> {folder}/passes
[ $(wc -l < {folder}/passes) -ge 2 ] && kill -TERM $PPID
exec sleep 600
"""


def kit_in(folder: Path, seconds: float) -> Path:
    """A kit whose FLARE is a process that does nothing for so many seconds."""
    for part in ("startup", "local", "cycle"):
        (folder / part).mkdir(parents=True)
    (folder / "startup" / "fed_client.json").touch()
    (folder / "startup" / "sub_start.sh").write_text(ENGINE.format(seconds=seconds))
    (folder / "local" / "resources.json.default").write_text(json.dumps({"components": []}))
    return folder


def engines(kit: Path) -> list[int]:
    path = kit / "engines"
    return [int(line) for line in path.read_text().splitlines()] if path.exists() else []


def running(kit: Path) -> bool:
    with held(kit / "cycle" / "engine.lock") as free:
        return not free


def wait_until(true) -> None:
    until = time.monotonic() + 120
    while not true():
        assert time.monotonic() < until
        time.sleep(0.05)


def join(kit: Path) -> subprocess.Popen:
    words = [sys.executable, "-m", "dwc.cli", "federated", "join", str(kit)]
    return subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def test_flare_is_started_again_found_again_and_ended_with_its_service(tmp_path):
    kit = kit_in(tmp_path / "north", 600)
    Spool.create(kit / "cycle", [])
    first = join(kit)
    wait_until(lambda: engines(kit))
    os.kill(engines(kit)[0], signal.SIGKILL)
    wait_until(lambda: len(engines(kit)) == 2)
    first.kill()
    first.communicate()
    assert running(kit)  # the service is dead, FLARE is not
    second = join(kit)
    time.sleep(3)
    assert len(engines(kit)) == 2  # it is found, not started a second time
    third = subprocess.run(second.args, capture_output=True, text=True, timeout=60)
    assert (third.returncode, third.stdout) == (0, "north: runs already and uses the new settings from now on\n")
    assert running(kit)
    second.send_signal(signal.SIGTERM)
    _, error = second.communicate(timeout=60)
    assert second.returncode == 143
    assert error.splitlines()[-1] == "dwc: stopped by SIGTERM; start it again at any time"
    assert not running(kit)


def test_what_ignores_that_it_is_to_end_is_killed_and_the_id_of_a_lock_that_is_free_is_nobodys(tmp_path):
    lock, log = tmp_path / "lock", tmp_path / "log"
    deaf = start_once(["bash", "-c", "trap '' TERM; echo up; sleep 600 & wait; sleep 600"], lock, log)
    wait_until(lambda: log.read_text())
    end(lock, 0.5)
    assert deaf.wait(60) == -signal.SIGKILL
    other = subprocess.Popen(["sleep", "600"], start_new_session=True)
    try:
        lock.write_text(str(other.pid))
        end(lock, 0.5)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_kit_is_not_served_twice(tmp_path, capsys):
    kit = server_in(tmp_path)
    with held(kit / "cycle" / "service.lock"):
        assert cli.main(["federated", "serve", str(kit)]) == 2
    assert "is served already" in capsys.readouterr().err
    assert not engines(kit)


def server_in(folder: Path) -> Path:
    """A server's kit with its books, beside the organizer's."""
    kit = kit_in(folder / "server", 2)
    a_prior().save(folder / "q.safetensors")
    (kit / "cycle").rmdir()
    Cycle.create(kit / "cycle", Project("brains", "localhost", ["north"], folder / "q.safetensors"))
    (folder / "organizer@dwc.org" / "startup").mkdir(parents=True)
    (folder / "organizer@dwc.org" / "startup" / "fed_admin.json").touch()
    return kit


class Session:
    """FLARE's, with a job that ends as it is told to."""

    def __init__(self, end) -> None:
        self.end, self.jobs = end, []

    def submit_job(self, path: str) -> str:
        assert list(Path(path).rglob("config_fed_server.json"))
        self.jobs.append(Path(path))
        return "1"

    def wait_for_job(self, job_id: str, **options) -> dict:
        return {"status": self.end()}

    def close(self) -> None:
        pass


def not_connected() -> str:
    raise flare_api.NoConnection("cannot connect\nto server")


def our_fault() -> str:
    raise KeyError("status")


@pytest.mark.parametrize(
    ("end", "code", "message"),
    [
        (lambda: "FINISHED:COMPLETED", 0, ""),
        (lambda: "FINISHED:EXECUTION_EXCEPTION", 2, "FLARE reports the pass as FINISHED:EXECUTION_EXCEPTION; see "),
        (not_connected, 2, "no pass was made (NoConnection: cannot connect to server); try again"),
    ],
)
def test_a_pass_that_fails_is_told_to_whoever_asked_for_it(tmp_path, monkeypatch, capsys, end, code, message):
    kit, session = server_in(tmp_path), Session(end)
    monkeypatch.setattr(flare_api, "new_secure_session", lambda *arguments, **options: session)
    assert cli.main(["federated", "round", str(kit)]) == code
    assert message in capsys.readouterr().err
    assert not session.jobs[0].exists()  # nothing is left that another pass could write to as well


def test_a_fault_of_ours_is_not_taken_for_flares(tmp_path, monkeypatch):
    kit = server_in(tmp_path)
    monkeypatch.setattr(flare_api, "new_secure_session", lambda *arguments, **options: Session(our_fault))
    with pytest.raises(KeyError):
        service.make_pass(kit, tmp_path / "organizer@dwc.org")


def test_a_pass_that_hangs_after_its_server_was_restarted_is_ended_and_the_next_one_begins(tmp_path, monkeypatch):
    kit = server_in(tmp_path)
    past = [kit / "store" / "jobs" / f"{number:08x}-0000-4000-8000-000000000000" for number in range(30)]
    for job in past:
        job.mkdir(parents=True)
    python = tmp_path / "python"
    python.write_text(PASS.format(folder=tmp_path))
    python.chmod(0o755)
    monkeypatch.setattr(service.sys, "executable", str(python))
    began = time.monotonic()
    with pytest.raises(Interrupted, match="stopped by SIGTERM"):
        service.serve(kit, tmp_path / "admin", 0.1)
    assert time.monotonic() - began < 120  # not the 600 s of the pass that hung
    assert len((tmp_path / "passes").read_text().splitlines()) == 2
    assert sum(job.exists() for job in past) == 20
    assert not running(kit)
