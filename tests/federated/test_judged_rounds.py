"""Rounds that the organization's held-out scans judge before they are published."""

import json
import time
from pathlib import Path

import pytest

from dwc import cli
from dwc.base.errors import InputError
from dwc.federated import corrections, judging
from dwc.federated.cycle import Cycle
from dwc.federated.networks import trained_from
from dwc.federated.project import Project
from dwc.federated.server_state import describe
from dwc.natural import SHARED
from dwc.posterior import Posterior
from tests.made_cycles import NOW, file_of
from tests.made_posteriors import a_site

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")
SITES = ("north", "east", "west")
GOOD = {"damping": 0.5, "log_likelihood": -0.3, "gain": 0.01, "standard_error": 0.001}


@pytest.fixture
def cycle(networks, settings, tmp_path, clock) -> Cycle:
    prior = Path(networks["vi"].name)
    project = Project("brains", "localhost", list(SITES), prior, rounds=3, damping="auto", data=settings.data)
    return Cycle.create(tmp_path / "server", project)


def answers(cycle: Cycle, seed: int) -> None:
    for n, site in enumerate(SITES):
        prior = trained_from(cycle.folder, cycle.state, site, cycle.round)
        made = a_site(prior, seed + n, **{key: prior.metadata[key] for key in SHARED})
        key = {"state": "trained", "round": cycle.round, "prior_sha256": prior.sha256}
        cycle.receive(site, {**key, "posterior": file_of(made, cycle.folder)})


@pytest.fixture
def started(monkeypatch) -> list:
    """The starts of the process that scores, which is not started."""
    calls: list = []
    monkeypatch.setattr(judging, "start_once", lambda *words: calls.append(words))
    return calls


def test_a_round_is_published_when_the_verdict_is_there_and_the_passes_before_only_ask(cycle, started, monkeypatch):
    monkeypatch.setattr(judging, "_scores", lambda folder, asked: GOOD)
    answers(cycle, 0)
    for _ in range(2):
        assert not cycle.advance(NOW)
    assert len(started) == 2  # the second finds the process at work
    judging.judge(cycle.folder)
    assert cycle.advance(NOW)
    assert cycle.state["networks"][1]["damping"] == 0.5
    assert "held-out scans: log-likelihood -0.30000 (+0.01000, standard error 0.00100)" in describe(cycle.state)
    assert "warning: round" not in describe(Cycle(cycle.folder).state)
    answers(cycle, 10)
    assert not cycle.advance(NOW)  # the verdict was on another round


def test_a_round_that_makes_the_scans_less_likely_is_published_with_a_warning_that_stays(cycle, started, monkeypatch):
    monkeypatch.setattr(judging, "_scores", lambda folder, asked: {**GOOD, "gain": -0.01})
    answers(cycle, 0)
    assert not cycle.advance(NOW)
    judging.judge(cycle.folder)
    assert cycle.advance(NOW)
    assert "warning: round 1: the organization's held-out scans are less likely" in describe(Cycle(cycle.folder).state)


def test_an_answer_that_comes_while_the_scans_are_scored_is_judged_too(cycle, started, monkeypatch):
    monkeypatch.setattr(judging, "_scores", lambda folder, asked: GOOD)
    answers(cycle, 0)
    assert not cycle.advance(NOW)
    corrections.ban(cycle, "east")
    judging.judge(cycle.folder)
    assert not cycle.advance(NOW)  # the verdict counted east
    judging.judge(cycle.folder)
    assert cycle.advance(NOW)


def test_scans_that_cannot_be_scored_are_told_and_the_next_pass_tries_again(cycle, started, monkeypatch):
    def fail(folder, asked):
        raise OSError("disk is gone")

    monkeypatch.setattr(judging, "_scores", fail)
    answers(cycle, 0)
    assert not cycle.advance(NOW)
    judging.judge(cycle.folder)
    with pytest.raises(InputError, match="OSError: disk is gone"):
        cycle.advance(NOW)
    assert not cycle.advance(NOW)
    assert len(started) == 2
    assert cycle.round == 1


def test_recompute_judges_here_and_now(cycle, started, monkeypatch):
    monkeypatch.setattr(judging, "_scores", lambda folder, asked: GOOD)
    answers(cycle, 0)
    corrections.recompute(cycle, 1)
    assert cycle.state["networks"][1]["gain"] == 0.01
    assert started == []


@pytest.mark.parametrize("content", ["", "{}", '{"question": 1}', '{"question": "x", "damping": 7}', "[]"])
def test_a_damaged_verdict_is_asked_for_again(cycle, started, content):
    answers(cycle, 0)
    (cycle.folder / "verdict.json").write_text(content)
    assert not cycle.advance(NOW)
    assert len(started) == 1


def test_the_process_that_scores_finds_what_consolidate_finds_by_hand(cycle, networks, settings, tmp_path):
    answers(cycle, 0)
    until = time.monotonic() + 300
    while not cycle.advance(NOW):
        assert time.monotonic() < until, (cycle.folder / "judging.log").read_text()
        time.sleep(0.5)
    words = ["consolidate", *(str(cycle.folder / "round-1" / f"{site}.safetensors") for site in SITES)]
    words += ["--prior", networks["vi"].name, "--data", str(settings.data), "--damping", "auto"]
    words += ["--validation-sub-volumes", "64", "--cache-dir", str(tmp_path / "cache"), "--max-influence", "3"]
    words += ["--state", str(tmp_path / "state.safetensors"), "--out", str(tmp_path / "q1.safetensors")]
    assert cli.main(words) == 0
    assert Posterior.load(tmp_path / "q1.safetensors").sha256 == cycle.state["priors"][1]
    assert json.loads((cycle.folder / "state.json").read_text())["networks"][1]["log_likelihood"] < 0


def test_scans_that_could_not_judge_are_refused_before_the_cycle_begins(networks, settings, tmp_path):
    prior = Path(networks["vi"].name)
    basic = {"name": "b", "server": "localhost", "sites": ["a"], "prior": prior}
    with pytest.raises(InputError, match=r"none\.csv"):
        Cycle.create(tmp_path / "server", Project(**basic, data=tmp_path / "none.csv"))
    assert not (tmp_path / "server").exists()
    with pytest.raises(InputError, match="`damping` auto: needs scans to choose on; give `data`"):
        Project(**basic, damping="auto")
    with pytest.raises(InputError, match=r"`data` .*: is for `method` pvi"):
        Project(**basic, method="dwc", data=settings.data)


def test_a_site_that_joins_while_the_scans_are_scored_changes_the_first_damping(cycle, started, monkeypatch):
    monkeypatch.setattr(judging, "_scores", lambda folder, asked: {**GOOD, "damping": 1 / asked["n_sites"]})
    answers(cycle, 0)
    assert not cycle.advance(NOW)
    judging.judge(cycle.folder)
    agreed = {**cycle.project, "prior": cycle.folder / "q0.safetensors"}
    cycle.amend(Project(**{**agreed, "sites": [*SITES, "south"]}))
    assert not cycle.advance(NOW)
    judging.judge(cycle.folder)
    assert cycle.advance(NOW)
    assert cycle.state["networks"][1]["damping"] == 1 / 4
