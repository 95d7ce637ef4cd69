"""The organizer's way back: what was entered can be taken out, rounds computed again, sites banned."""

import json
from datetime import timedelta

import pytest

from dwc.base.errors import InputError
from dwc.cli import main
from dwc.consolidation import consolidate
from dwc.federated import corrections
from dwc.federated.cycle import Cycle
from dwc.federated.server_state import describe
from dwc.posterior import Posterior
from tests.made_cycles import NOW, trained
from tests.made_posteriors import a_prior

SITES = ("north", "east", "west")


@pytest.fixture
def closed(cycle) -> Cycle:
    """Round 1 is closed with three posteriors, one of round 2 is in."""
    for seed, site in enumerate(SITES):
        cycle.receive(site, trained(cycle, seed))
    assert cycle.advance(NOW)
    cycle.receive("north", trained(cycle, 10, number=2))
    return cycle


def file_of_site(cycle: Cycle, site: str, number: int = 1) -> Posterior:
    return Posterior.load(cycle.folder / f"round-{number}/{site}.safetensors")


def test_a_posterior_that_waits_is_dropped_and_its_site_told_and_may_send_another(cycle):
    bad = trained(cycle, 0)
    cycle.receive("north", bad)
    corrections.drop(cycle, "north", 1)
    again = Cycle(cycle.folder)
    assert again.state["posteriors"] == []
    (told,) = again.question("north")["settled"].values()
    assert told == "north's posterior of round 1: was dropped by the organizer"
    again.receive("north", bad)
    assert again.state["posteriors"] == []
    again.receive("north", trained(cycle, 5))
    assert [row["site"] for row in again.state["posteriors"]] == ["north"]
    assert "the organizer: drop site north, round 1" in describe(again.state)


def test_dropping_a_posterior_of_a_closed_round_reopens_it_and_all_that_came_after(closed):
    first = closed.state["priors"][1]
    corrections.drop(closed, "west", 1)
    assert closed.round == 1
    assert [(row["site"], row["round"]) for row in closed.state["posteriors"]] == [("north", 1), ("east", 1)]
    assert "round 1 was reopened" in closed.state["refused"][0]["reason"]
    assert closed.advance(NOW + timedelta(days=2))
    expected = consolidate(a_prior(), [file_of_site(closed, site) for site in ("north", "east")])
    assert closed.state["priors"][1] == expected.sha256 != first


def test_a_round_computed_again_from_the_same_files_has_the_same_bits(closed):
    before = closed.state["priors"][1]
    corrections.recompute(closed, 1)
    assert closed.state["priors"][1] == before
    assert closed.round == 2
    assert [act["act"] for act in closed.state["acts"]] == ["recompute"]


def test_a_cycle_whose_last_prior_is_lost_is_made_whole_from_the_files(closed):
    path = closed.folder / "q1.safetensors"
    whole = path.read_bytes()
    path.write_bytes(b"lost")
    corrections.recompute(closed, 1)
    assert path.read_bytes() == whole


def test_a_banned_site_is_not_heard_and_no_round_waits_for_it(cycle):
    cycle.receive("west", trained(cycle, 2))
    corrections.ban(cycle, "west")
    with pytest.raises(InputError, match="west: is banned"):
        cycle.receive("west", trained(cycle, 3))
    for seed, site in enumerate(("north", "east")):
        cycle.receive(site, trained(cycle, seed))
    assert "west   banned" in describe(cycle.state)
    assert cycle.advance(NOW)  # at once: all who are left have answered
    assert len(Posterior.load(cycle.result).metadata["sites"]) == 2
    corrections.allow(cycle, "west")
    cycle.receive("west", trained(cycle, 3))
    assert [act["act"] for act in cycle.state["acts"]] == ["ban", "allow"]


def test_pruning_keeps_what_a_late_posterior_needs(closed):
    for seed, site in enumerate(("east", "west")):
        closed.receive(site, trained(closed, 20 + seed, number=2))
    assert closed.advance(NOW)
    assert corrections.prune(closed) > 0
    assert not list((closed.folder / "round-1").iterdir())
    assert len(list((closed.folder / "round-2").iterdir())) == 3
    assert Cycle(closed.folder).state["priors"] == closed.state["priors"]
    with pytest.raises(InputError, match="was pruned; restore it from a backup"):
        corrections.reopen(closed, 1)
    corrections.recompute(closed, 2)


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda cycle: corrections.drop(cycle, "north", 3), "`drop` north/3: no such posterior is in"),
        (lambda cycle: corrections.reopen(cycle, 2), "`reopen` 2: 1 rounds are closed"),
        (lambda cycle: corrections.reopen(cycle, 0), "`reopen` 0"),
        (lambda cycle: corrections.ban(cycle, "south"), "`ban` south: is not a site"),
        (lambda cycle: corrections.allow(cycle, "north"), "`allow` north: is not banned"),
    ],
)
def test_an_act_that_cannot_be_meant_changes_nothing(closed, act, message):
    before = (closed.folder / "state.json").read_bytes()
    with pytest.raises(InputError, match=message):
        act(closed)
    assert (closed.folder / "state.json").read_bytes() == before


def damage(cycle: Cycle, site: str) -> None:
    """Flip one bit of a file at rest."""
    path = cycle.folder / f"round-1/{site}.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


def test_a_posterior_damaged_at_rest_closes_no_round_and_is_sent_again(cycle):
    answers = {site: trained(cycle, seed) for seed, site in enumerate(SITES)}
    for site, answer in answers.items():
        cycle.receive(site, answer)
    damage(cycle, "east")
    with pytest.raises(InputError, match=r"east\.safetensors: was altered .* east is asked to send it again"):
        cycle.advance(NOW)
    again = Cycle(cycle.folder)
    assert again.round == 1
    assert "damaged: round-1/east.safetensors" in describe(again.state)
    assert again.question("east")["settled"] == {}  # so that the site sends it again
    assert len(again.question("north")["settled"]) == 1
    again.receive("east", answers["east"])
    assert again.advance(NOW)
    assert again.state["priors"][1] == consolidate(a_prior(), [file_of_site(again, site) for site in SITES]).sha256


def test_the_acts_are_in_the_state_for_programs(closed):
    corrections.drop(closed, "north", 2)
    (act,) = json.loads((closed.folder / "state.json").read_text())["acts"]
    assert (act["act"], act["site"], act["round"]) == ("drop", "north", 2)


def test_amend_and_prune_do_it_from_the_command_line(tmp_path, closed, capsys, monkeypatch):
    kit = tmp_path / "kit"
    kit.mkdir()
    closed.folder.rename(kit / "cycle")
    assert main(["federated", "amend", str(kit), "--drop", "west/1", "--ban", "west"]) == 0
    said = capsys.readouterr().out
    assert "round 1 of 2 is open" in said
    assert "the organizer: drop site west, round 1" in said
    assert "west   banned" in said
    assert main(["federated", "amend", str(kit), "--allow", "west"]) == 0
    assert main(["federated", "prune", str(kit)]) == 0
    assert "MB freed" in capsys.readouterr().out
    for words, message in (
        ([], "nothing to do: give project.yml, --drop, --reopen"),
        (["--drop", "west"], "--drop west: give a site and a round, as north/1"),
        (["--reopen", "7"], "--reopen 7: "),
        (["--ban", "south"], "--ban south: is not a site"),
    ):
        assert main(["federated", "amend", str(kit), *words]) == 2
        assert message in capsys.readouterr().err
