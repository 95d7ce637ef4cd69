"""A state file in which anything was changed to something else is one line, whatever is then done with the cycle."""

import contextlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from dwc.base.errors import InputError
from dwc.federated import corrections
from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from dwc.federated.server_state import describe, read_state
from tests.made_cycles import NOW, trained
from tests.made_json import places, with_entry

WRONG: list[Any] = [None, True, -1, 0.5, 10**400, "", "x", "\x1b[2J", [], {}, ["x"], {"a": []}, [[1]], 2**70]


@pytest.fixture(params=["dwc", "pvi"])
def busy(project: Project, tmp_path: Path, request: pytest.FixtureRequest) -> Cycle:
    """A cycle in which everything that the state can hold has happened."""
    cycle = Cycle.create(tmp_path / request.param, Project(**{**project.to_json(), "method": request.param}))
    cycle.question("north", with_prior=True)
    cycle.count("north", 1, 10, 20)
    cycle.receive("north", trained(cycle, 9))
    corrections.drop(cycle, "north", 1)
    for seed, site in enumerate(("north", "east", "west")):
        cycle.receive(site, trained(cycle, seed))
    cycle.receive("east", trained(cycle, 7))
    assert cycle.advance(NOW)
    cycle.receive("north", trained(cycle, 10, number=2, site="north"))
    corrections.reopen(cycle, 1)
    corrections.recompute(cycle, 1)
    cycle.receive("west", trained(cycle, 12, number=2, site="west"))
    corrections.reopen(cycle, 1)
    corrections.ban(cycle, "west")
    if request.param == "pvi":  # with factors and cavities of a round that is closed
        corrections.recompute(cycle, 1)
    cycle.note(["trouble"])
    cycle.state["clock"] = {"boot": "this", "uptime": 1.5, "time": NOW.isoformat()}
    cycle.write()
    return cycle


def use(folder: Path) -> None:
    """What an organizer and a pass may do; each may be refused."""
    cycle = Cycle(folder)
    acts = (
        lambda: cycle.receive("east", {"state": "idle", "round": 0, "prior_sha256": ""}),
        lambda: cycle.receive("east", trained(cycle, 30)),
        lambda: cycle.advance(NOW),
        lambda: corrections.allow(cycle, "west"),
        cycle.close,
        lambda: corrections.drop(cycle, "east", 1),
        lambda: corrections.prune(cycle),
    )
    for act in acts:
        with contextlib.suppress(InputError):
            act()


def outcome(folder: Path) -> str:
    """The error about the state; "" if it is accepted, and then it can be used."""
    try:
        describe(read_state(folder))
        for site in ("north", "east", "west"):
            Cycle(folder).question(site)
    except InputError as error:
        return str(error)
    return ""


def test_every_entry_of_the_state_replaced_by_something_else_is_one_line_that_names_the_file(busy, tmp_path):
    path = busy.folder / "state.json"
    state = json.loads(path.read_text())
    assert any("void" in entry for entry in state["refused"])
    refused = accepted = 0
    for place in places(state):
        for value in WRONG:
            path.write_text(json.dumps(with_entry(state, place, value)))
            try:
                if error := outcome(busy.folder):
                    assert error.startswith(f"{path}: ")
                    assert "\n" not in error
                    refused += 1
                    continue
                copied = shutil.copytree(busy.folder, tmp_path / f"accepted-{accepted}")
                use(copied)
                shutil.rmtree(copied)
                accepted += 1
            except Exception as error:
                raise AssertionError(f"{place} = {str(value)[:20]}: {type(error).__name__}: {error}") from error
    print(refused, accepted)
    assert refused > 5 * accepted


@pytest.mark.parametrize("key", ["factors", "cavities", "starts", "removed", "damping", "gain", "standard_error"])
def test_a_network_of_factors_that_lacks_an_entry_is_one_line(busy, key):
    if busy.project["method"] == "dwc":
        pytest.skip("has no factors")
    busy.state["networks"][1] |= {"log_likelihood": -0.1, "gain": 0.1, "standard_error": 0.1}
    busy.write()
    describe(read_state(busy.folder))
    del busy.state["networks"][1][key]
    busy.write()
    with pytest.raises(InputError, match=rf"state.json: networks is wrong: 1.{key} is missing; restore"):
        read_state(busy.folder)


def test_an_answer_that_counts_without_a_power_is_one_line(busy):
    if busy.project["method"] == "dwc":
        pytest.skip("is read as a power of 1")
    (row, *_) = [row for row in busy.state["posteriors"] if row["counted_in"]]
    del row["power"]
    busy.write()
    with pytest.raises(InputError, match=r"counts without a power; restore"):
        read_state(busy.folder)
