"""A cycle of three sites, and a guard for everything that a test starts: no address but loopback."""

import os
from importlib.util import find_spec

import pytest

from dwc.federated import cycle as room
from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from tests.made_cycles import NOW
from tests.made_posteriors import a_prior

needs_flare = [
    "test_exchange.py", "test_federated_command.py", "test_loopback.py", "test_service.py",
    "test_federated_simulation.py", "test_hostile_sites.py", "test_spool.py",
]  # fmt: skip
collect_ignore = [] if find_spec("nvflare") else needs_flare  # pip install '.[federated]'

GUARD = """
import os, socket

LOCAL = ("127.", "::1", "localhost", "0.0.0.0")

def refuse_others(connect):
    def guarded(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(LOCAL):
            if self.type & socket.SOCK_STREAM:  # connect of a datagram socket sends nothing
                with open(os.environ["DWC_TEST_CALLS"], "a") as file:
                    file.write(f"{address}\\n")
            raise ConnectionRefusedError(f"{address}: this test stays at home")
        return connect(self, address)
    return guarded

socket.socket.connect = refuse_others(socket.socket.connect)
socket.socket.connect_ex = refuse_others(socket.socket.connect_ex)
"""


@pytest.fixture
def offline(tmp_path, monkeypatch):
    """Processes started from here reach loopback only; afterwards, nothing else may have been tried."""
    (tmp_path / "guard").mkdir()
    (tmp_path / "guard" / "sitecustomize.py").write_text(GUARD)
    calls = tmp_path / "calls"
    monkeypatch.setenv("DWC_TEST_CALLS", str(calls))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "guard"), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    yield
    assert not calls.exists(), calls.read_text()


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [NOW]
    monkeypatch.setattr(room, "_now", lambda state: now[0])
    return now


@pytest.fixture
def project(tmp_path, clock) -> Project:
    prior = tmp_path / "prior.safetensors"
    a_prior().save(prior)
    return Project("brains", "localhost", ["north", "east", "west"], prior, rounds=2, quorum=2, grace_hours=24)


@pytest.fixture
def cycle(project, tmp_path) -> Cycle:
    return Cycle.create(tmp_path / "server", project)
