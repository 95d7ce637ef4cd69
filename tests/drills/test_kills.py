"""Drill: kill -9 at random moments. `pytest -m drill tests/drills/test_kills.py`

DWC_DRILL_KILLS kills (200 by default), half of trainings, half of a server at work on its state; the seed of each trial
is its number. After every kill the same program starts again; the end must have the bits of an undisturbed run.
"""

import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from dwc.posterior import Posterior
from dwc.training.loop import train_network
from tests.made_cycles import NOW, trained
from tests.made_posteriors import a_prior

pytest_plugins = ["tests.tiny_runs"]
pytestmark = [
    pytest.mark.drill,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
SITES = ("north", "east", "west")


def kills() -> int:
    return int(os.environ.get("DWC_DRILL_KILLS", 200)) // 2


def in_a_process(work: Callable[[], object], limit_s: float) -> bool:
    """Run in a forked process that is killed after so many seconds; whether it ended by itself."""
    if (child := os.fork()) == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    until = time.monotonic() + limit_s
    while time.monotonic() < until:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, "it failed by itself"
            return True
        time.sleep(0.002)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def killed_until(count: int, begin: Callable[[int], Callable[[], object]], check: Callable[[int], None]) -> int:
    """Trials, each killed again and again until it ends, until there were `count` kills; the number of trials."""
    seen = trial = 0
    while seen < count:
        rng, work = random.Random(trial), begin(trial)
        began = time.monotonic()
        assert in_a_process(work, 600)  # how long an undisturbed one takes on this machine now
        whole = time.monotonic() - began
        work = begin(trial)
        while not in_a_process(work, rng.uniform(0, whole)):
            seen += 1
        check(trial)
        trial += 1
    print(f"{seen} kills in {trial} trials")
    return trial


def test_killed_trainings_end_at_the_same_bits(settings, networks, tmp_path):
    run = replace(settings, mode="vcl", prior=Path(networks["vi"].name), epochs=8, steps_per_epoch=2)
    whole = train_network(replace(run, out=tmp_path / "whole"))
    begun = [0]

    def begin(trial: int) -> Callable[[], object]:
        begun[0] += 1
        out = tmp_path / str(begun[0])
        out.mkdir()
        return lambda: train_network(replace(run, out=out), resume=True)

    def check(trial: int) -> None:
        out = tmp_path / str(begun[0])
        assert Posterior.load(out / "posterior.safetensors").sha256 == whole.sha256
        assert not list(out.glob(".*.part"))

    killed_until(kills(), begin, check)


@pytest.mark.parametrize("method", ["dwc", "pvi"])
def test_a_killed_server_ends_at_the_same_bits(tmp_path, method):
    a_prior().save(tmp_path / "prior.safetensors")
    project = Project("brains", "localhost", list(SITES), tmp_path / "prior.safetensors", rounds=3, method=method)
    begun = [0]

    def rounds(folder: Path) -> list[str]:
        cycle = Cycle(folder)
        for number in (1, 2, 3):
            for seed, site in enumerate(SITES):
                if (folder / f"q{number - 1}.safetensors").exists() and len(cycle.state["priors"]) >= number:
                    cycle.receive(site, trained(cycle, 10 * number + seed, number=number, site=site))
            cycle.advance(NOW)
        return cycle.state["priors"]

    expected = rounds(Cycle.create(tmp_path / "whole", project).folder)
    assert len(expected) == 4

    def begin(trial: int) -> Callable[[], object]:
        begun[0] += 1
        folder = Cycle.create(tmp_path / str(begun[0]), project).folder
        return lambda: rounds(folder)

    def check(trial: int) -> None:
        cycle = Cycle(tmp_path / str(begun[0]))
        assert cycle.state["priors"] == expected
        assert sorted((row["site"], row["round"]) for row in cycle.state["posteriors"]) == sorted(
            (site, number) for site in SITES for number in (1, 2, 3)
        )

    killed_until(kills(), begin, check)
