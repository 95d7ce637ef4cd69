import json
from datetime import timedelta

import pytest

from dwc.base.errors import InputError
from dwc.consolidation import consolidate
from dwc.federated import server_state
from dwc.federated.cycle import Cycle
from dwc.federated.server_state import describe, read_state, steady_time
from dwc.posterior import Posterior
from tests.made_cycles import NOW, trained
from tests.made_posteriors import a_prior

SITES = ("north", "east", "west")


def spoilt(change):
    def spoil(state: dict) -> str:
        change(state)
        return json.dumps(state)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda state: "[1]", "is not a JSON object"),
        (lambda state: "{", "is not JSON"),
        (lambda state: "", "is not JSON"),
        (lambda state: "{}", "version None"),
        (lambda state: '{"version": 4}', "project is missing"),
        (lambda state: '{"version": 3}', "project is missing"),
        (lambda state: '{"version": 5}', "project is missing"),
        (lambda state: '{"version": 9}', "version 9, this dwc reads 3 to 5"),
        (lambda state: "[" * 10**5, "is not JSON"),
        (spoilt(lambda state: state.pop("sites")), "sites is missing"),
        (spoilt(lambda state: state["project"].pop("quorum")), r"project\.quorum is missing"),
        (spoilt(lambda state: state.update(priors=[])), "priors is missing or of another type"),
        (spoilt(lambda state: state["posteriors"][0].pop("file")), "posteriors is missing"),
        (spoilt(lambda state: state["posteriors"].append(7)), "posteriors is missing"),
        (spoilt(lambda state: state["sites"].update(north={})), "sites is missing"),
        (spoilt(lambda state: state.update(refused=[{}])), "refused is missing"),
    ],
)
def test_a_broken_state_is_one_line_that_names_what_is_wrong(cycle, spoil, message):
    cycle.receive("north", trained(cycle, 1))
    path = cycle.folder / "state.json"
    path.write_text(spoil(json.loads(path.read_text())))
    with pytest.raises(InputError, match=rf"state\.json: .*{message}") as caught:
        read_state(cycle.folder)
    assert "\n" not in str(caught.value)
    assert "backup" in str(caught.value)


def as_version_3(cycle: Cycle) -> None:
    """The books as the version before wrote them."""
    state = json.loads((cycle.folder / "state.json").read_text())
    for name in ("clock", "banned", "acts", "networks"):
        del state[name]
    for name in ("max_influence", "trusted", "method", "damping", "until"):
        del state["project"][name]
    for row in state["posteriors"]:
        del row["influence"]
    (cycle.folder / "state.json").write_text(json.dumps({**state, "version": 3}))


def test_a_cycle_begun_by_the_version_before_goes_on_to_the_same_result(cycle):
    for seed, site in enumerate(SITES[:2]):
        cycle.receive(site, trained(cycle, seed))
    as_version_3(cycle)
    again = Cycle(cycle.folder)
    assert again.project["max_influence"] is None
    again.receive("west", trained(again, 2))
    assert again.advance(NOW)
    files = [Posterior.load(again.folder / f"round-1/{site}.safetensors") for site in SITES]
    assert again.state["priors"][1] == consolidate(a_prior(), files).sha256
    assert json.loads((again.folder / "state.json").read_text())["version"] == 5


def test_a_cycle_begun_before_there_were_two_methods_goes_on_with_the_papers(cycle):
    for seed, site in enumerate(SITES):
        cycle.receive(site, trained(cycle, seed))
    assert cycle.advance(NOW)
    state = json.loads((cycle.folder / "state.json").read_text())
    for name in ("method", "damping", "until"):
        del state["project"][name]
    del state["networks"]
    (cycle.folder / "state.json").write_text(json.dumps({**state, "version": 4}))
    again = Cycle(cycle.folder)
    assert again.project["method"] == "dwc"
    for seed, site in enumerate(SITES):
        again.receive(site, trained(again, 3 + seed, number=2))
    assert again.advance(NOW)
    files = [Posterior.load(again.folder / f"round-2/{site}.safetensors") for site in SITES]
    first = Posterior.load(again.folder / "q1.safetensors")
    assert again.state["priors"][2] == consolidate(first, files).sha256


def test_a_jump_of_the_clock_neither_ends_nor_prolongs_a_grace(monkeypatch):
    uptime, wall = [100.0], [NOW]

    class Clock:
        @staticmethod
        def now(zone):
            return wall[0]

        fromisoformat = staticmethod(type(NOW).fromisoformat)

    monkeypatch.setattr(server_state.time, "monotonic", lambda: uptime[0])
    monkeypatch.setattr(server_state, "datetime", Clock)
    monkeypatch.setattr(server_state, "_boot", lambda: "this one")
    clock: dict = {}
    began = steady_time(clock)
    for jump in (timedelta(days=3650), timedelta(days=-3650)):
        wall[0] = NOW + jump
        uptime[0] += 3600
        assert steady_time(clock) - began == timedelta(seconds=uptime[0] - 100)
    monkeypatch.setattr(server_state, "_boot", lambda: "the next")
    wall[0], uptime[0] = NOW + timedelta(hours=5), 3.0
    assert steady_time(clock) - began == timedelta(hours=5)


def test_control_characters_never_reach_a_terminal(cycle):
    cycle.note(["east: \x1b[2J\x07 message\nnorth  trained"])
    assert all(line.isprintable() for line in describe(cycle.state).splitlines())
    assert "east: ?[2J? message?north  trained" in describe(cycle.state)
