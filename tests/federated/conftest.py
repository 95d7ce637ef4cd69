"""A cycle of three sites."""

from importlib.util import find_spec

import pytest

from dwc.federated import cycle as module
from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from tests.made_cycles import NOW
from tests.made_posteriors import a_prior

needs_flare = [
    "test_exchange.py", "test_federated_command.py", "test_loopback.py", "test_service.py",
    "test_federated_simulation.py", "test_hostile_sites.py", "test_spool.py",
]  # fmt: skip
collect_ignore = [] if find_spec("nvflare") else needs_flare  # pip install '.[federated]'


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until it is set."""
    now = [NOW]
    monkeypatch.setattr(module, "_now", lambda state: now[0])
    return now


@pytest.fixture
def project(tmp_path, clock) -> Project:
    prior = tmp_path / "prior.safetensors"
    a_prior().save(prior)
    return Project(
        "brains", "localhost", ["north", "east", "west"], prior, rounds=2, quorum=2, grace_hours=24, method="dwc"
    )


@pytest.fixture
def cycle(project, tmp_path) -> Cycle:
    return Cycle.create(tmp_path / "server", project)
