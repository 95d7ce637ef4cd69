"""The organizer's way back: what was entered can be taken out, rounds computed again, sites banned."""

import json
import os
import shutil
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from dwc.base.errors import InputError
from dwc.cli import main
from dwc.consolidation import consolidate
from dwc.federated import corrections
from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from dwc.federated.server_state import describe
from dwc.posterior import Posterior
from tests.made_cycles import NOW, file_of, trained
from tests.made_posteriors import a_prior, a_site

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
        (["--drop", "west/" + 5000 * "9"], "give a site and a round, as north/1"),
        (["--reopen", "7"], "--reopen 7: "),
        (["--ban", "south"], "--ban south: is not a site"),
    ):
        assert main(["federated", "amend", str(kit), *words]) == 2
        assert message in capsys.readouterr().err


def answer_all(cycle: Cycle, number: int, first_seed: int, sites=SITES) -> None:
    for seed, site in enumerate(sites):
        cycle.receive(site, trained(cycle, first_seed + seed, number=number))


def test_answers_to_the_next_round_count_again_if_a_round_ends_with_the_same_network(closed):
    before = closed.question("north")["settled"]
    corrections.reopen(closed, 1)
    assert [row["round"] for row in closed.state["posteriors"]] == [1, 1, 1]
    assert any("is void" in reason for reason in closed.question("north")["settled"].values())
    assert closed.advance(NOW)
    assert [(row["site"], row["round"]) for row in closed.state["posteriors"][3:]] == [("north", 2)]
    assert closed.question("north")["settled"] == before  # the site need not do anything
    answer_all(closed, 2, 20, ("east", "west"))
    assert closed.advance(NOW)
    assert len(Posterior.load(closed.result).metadata["sites"]) == 3


def test_answers_to_the_next_round_are_void_if_a_round_ends_otherwise_and_count_again_when_it_is_put_back(closed):
    first = closed.state["priors"][1]
    corrections.ban(closed, "west")
    corrections.recompute(closed, 1)
    assert closed.state["priors"][1] != first
    assert {row["round"] for row in closed.state["posteriors"]} == {1}
    closed.receive("north", trained(closed, 30, number=2))  # from the other network
    second = [row["file"] for row in closed.state["posteriors"] if row["round"] == 2]
    corrections.allow(closed, "west")
    corrections.recompute(closed, 1)
    assert closed.state["priors"][1] == first
    (row,) = [row for row in closed.state["posteriors"] if row["round"] == 2]
    assert row["prior_sha256"] == first
    assert row["file"] not in second
    assert Posterior.load(closed.folder / row["file"]).sha256 == row["sha256"]
    assert not any("is void" in reason for reason in [closed.question("north")["settled"][row["file_sha256"]]])


def test_an_answer_whose_file_is_gone_is_asked_for_again_when_its_prior_comes_back(closed):
    content = (closed.folder / "round-2/north.safetensors").read_bytes()
    corrections.reopen(closed, 1)
    corrections.prune(closed)
    assert not (closed.folder / "round-2/north.safetensors").exists()
    closed.advance(NOW)
    assert len(closed.question("north")["settled"]) == 1  # round 1's alone
    closed.receive("north", {"state": "trained", "round": 2, "prior_sha256": "", "posterior": content})
    assert [row["site"] for row in closed.state["posteriors"] if row["round"] == 2] == ["north"]


def test_a_server_restored_from_before_a_round_closed_asks_again_for_the_answers_to_the_next(closed):
    content = (closed.folder / "round-2/north.safetensors").read_bytes()
    early = {"state": "trained", "round": 2, "prior_sha256": "", "posterior": content}
    corrections.drop(closed, "north", 2)
    closed.state["dropped"].clear()
    corrections.reopen(closed, 1)
    closed.state["refused"].clear()  # as in the backup
    closed.receive("north", early)
    assert "which no round had" in closed.state["refused"][0]["reason"]
    assert closed.advance(NOW)
    assert closed.state["refused"] == []
    closed.receive("north", early)
    assert [row["site"] for row in closed.state["posteriors"] if row["round"] == 2] == ["north"]


def test_a_banned_site_counts_neither_in_the_sum_nor_towards_the_quorum_of_a_round_that_is_reopened(closed):
    corrections.ban(closed, "west")
    corrections.reopen(closed, 1)
    corrections.ban(closed, "east")
    assert "quorum since 2026" in describe(closed.state)  # of one: north
    corrections.allow(closed, "east")
    assert closed.advance(NOW)
    expected = consolidate(a_prior(), [file_of_site(closed, site) for site in ("north", "east")])
    assert closed.state["priors"][1] == expected.sha256
    (row,) = [row for row in closed.state["posteriors"] if row["site"] == "west"]
    assert row["counted_in"] is None


def test_a_quorum_is_not_made_by_a_banned_site(cycle):
    for seed, site in enumerate(("north", "west")):
        cycle.receive(site, trained(cycle, seed))
    assert "quorum since" in describe(cycle.state)
    corrections.ban(cycle, "west")
    assert "quorum since" not in describe(cycle.state)
    assert not cycle.advance(NOW + timedelta(days=9))
    corrections.allow(cycle, "west")  # it need not send its posterior again
    assert cycle.advance(NOW + timedelta(days=9))
    assert len(Posterior.load(cycle.result).metadata["sites"]) == 2


def test_a_late_posterior_after_the_last_round_does_not_bring_a_banned_site_back(cycle):
    for number in (1, 2):
        answer_all(cycle, number, 10 * number, ("north", "west"))
        assert cycle.advance(NOW + timedelta(days=9))
    corrections.ban(cycle, "west")
    cycle.receive("east", trained(cycle, 40, number=2))
    assert cycle.advance(NOW)
    prior = Posterior.load(cycle.folder / "q1.safetensors")
    expected = consolidate(prior, [file_of_site(cycle, site, 2) for site in ("north", "east")])
    assert cycle.state["priors"][2] == expected.sha256


def test_a_round_with_a_dropped_posterior_is_closed_without_it_when_the_organizer_says_so(cycle, project):
    cycle.amend(Project(**{**project.to_json(), "quorum": 3}))
    answer_all(cycle, 1, 0)
    corrections.drop(cycle, "west", 1)
    assert not cycle.advance(NOW + timedelta(days=9))
    corrections.recompute(cycle, 1)
    assert cycle.round == 2
    with pytest.raises(InputError, match="`recompute` 2: no posterior counts in it"):
        corrections.recompute(cycle, 2)


def test_a_recomputation_that_fails_leaves_the_round_as_it_was(closed):
    before = [*closed.state["priors"]]
    damage(closed, "east")
    with pytest.raises(InputError, match="east is asked to send it again"):
        corrections.recompute(closed, 1)
    assert Cycle(closed.folder).state["priors"] == before
    assert Cycle(closed.folder).state["acts"] == []


@pytest.mark.parametrize("header", [{"n_volumes": 9}, {"training": {"lr": 0.5}}])
def test_a_dropped_posterior_is_known_under_another_header_and_from_another_site(cycle, header):
    cycle.receive("north", trained(cycle, 0))
    corrections.drop(cycle, "north", 1)
    for site in ("north", "east"):
        cycle.receive(site, trained(cycle, 0, **header))
        assert "was dropped by the organizer before" in cycle.state["refused"][-1]["reason"]
    assert cycle.state["posteriors"] == []


def test_a_dropped_posterior_is_known_when_refusals_are_forgotten_and_when_a_tensor_is_changed(cycle, monkeypatch):
    monkeypatch.setattr("dwc.federated.cycle._MAX_REFUSALS", 2)
    bad = trained(cycle, 0)
    cycle.receive("north", bad)
    corrections.drop(cycle, "north", 1)
    for number in range(3):
        cycle.receive("north", {**bad, "posterior": b"%d" % number})
    assert not any("dropped" in reason for reason in cycle.question("north")["settled"].values())
    changed = a_site(Posterior.load(cycle.folder / "q0.safetensors"), 0)
    changed.mu["layers.0.bias"][0] += 1e-3
    for answer in (bad, {**bad, "posterior": file_of(changed, cycle.folder)}):
        cycle.receive("north", answer)
        assert "was dropped by the organizer before" in cycle.state["refused"][-1]["reason"]
    assert cycle.state["posteriors"] == []


def test_a_cycle_is_not_amended_to_a_folder_of_keys_that_is_not_there(cycle, project, tmp_path):
    before = (cycle.folder / "state.json").read_bytes()
    with pytest.raises(InputError, match="none: no such folder; give a folder of public keys"):
        cycle.amend(Project(**{**project.to_json(), "trusted": tmp_path / "none"}))
    assert (cycle.folder / "state.json").read_bytes() == before


def loud(cycle: Cycle, seed: int, number: int = 1) -> dict:
    """An answer whose means are twelve times as far from the prior's as others'."""
    prior = Posterior.load(cycle.folder / f"q{number - 1}.safetensors")
    site = a_site(prior, seed)
    mu = {name: prior.mu[name] + 12 * (mean - prior.mu[name]) for name, mean in site.mu.items()}
    content = file_of(Posterior(mu, site.sigma, site.metadata), cycle.folder)
    return {"state": "trained", "round": number, "prior_sha256": prior.sha256, "posterior": content}


def test_rows_of_an_earlier_dwc_are_measured_from_their_files_so_that_the_limit_holds(cycle):
    answer_all(cycle, 1, 0, ("north", "east"))
    path = cycle.folder / "state.json"
    state = json.loads(path.read_text())
    del state["posteriors"][0]["influence"], state["dropped"]
    del state["posteriors"][1]["influence"]["tensors"]  # as the version that did not look at single tensors wrote it
    path.write_text(json.dumps(state))
    again = Cycle(cycle.folder)
    again.receive("west", loud(again, 2))
    assert again.advance(NOW)
    powers = {row["site"]: row["power"] for row in again.state["posteriors"]}
    assert powers["north"] == powers["east"] == 1
    assert powers["west"] < 1


@pytest.mark.parametrize("reason", ["the site is banned", "round 1 was reopened, so its prior is void; train again"])
def test_what_an_earlier_dwc_refused_for_a_ban_or_a_void_prior_is_sent_again(cycle, reason):
    answer = trained(cycle, 0)
    cycle.receive("north", answer)
    path = cycle.folder / "state.json"
    state = json.loads(path.read_text())
    (row,) = state["posteriors"]
    kept = {name: row[name] for name in ("site", "file_sha256", "received", "bytes")}
    path.write_text(json.dumps({**state, "posteriors": [], "refused": [{**kept, "reason": f"north's: {reason}"}]}))
    again = Cycle(cycle.folder)
    assert again.question("north")["settled"] == {}
    again.receive("north", answer)
    assert [row["site"] for row in again.state["posteriors"]] == ["north"]


def test_a_late_answer_is_judged_with_the_round_that_it_was_trained_in_and_its_warnings_are_kept(cycle, project):
    sites = [*SITES, "south"]
    cycle.amend(Project(**{**project.to_json(), "sites": sites, "quorum": 3}))
    late = loud(cycle, 3)
    answer_all(cycle, 1, 0)
    assert cycle.advance(NOW + timedelta(days=9))
    cycle.receive("south", late)
    answer_all(cycle, 2, 20)
    said = describe(cycle.state)
    assert "round 2: north moved" in said
    assert "warning: south in round 1: it pulls the means" in said
    assert cycle.advance(NOW + timedelta(days=9))
    (row,) = [row for row in cycle.state["posteriors"] if row["site"] == "south"]
    assert row["counted_in"] == 2
    assert row["power"] < 1
    assert "times the influence of the median site" in row["limited_because"]
    answer_all(cycle, 2, 30, ("south",))
    assert "warning: south in round 1: it pulls the means" in describe(Cycle(cycle.folder).state)


def test_a_quorum_with_which_nobody_is_limited_is_warned_of(cycle, project, capsys):
    assert "warning: a round closes with 2 of 3 sites; with fewer than 3 posteriors there is no median site" in (
        describe(cycle.state)
    )
    cycle.amend(Project(**{**project.to_json(), "quorum": 3}))
    assert "no median site" not in describe(cycle.state)
    corrections.ban(cycle, "west")
    assert "a round closes with 2 of 2 sites" in describe(cycle.state)
    cycle.amend(Project(**{**project.to_json(), "max_influence": None}))
    assert "no median site" not in describe(cycle.state)


ACTS = {
    "recompute": lambda cycle: corrections.recompute(cycle, 1),
    "drop": lambda cycle: corrections.drop(cycle, "west", 1),
    "reopen": lambda cycle: corrections.reopen(cycle, 1),
    "drop of the open round": lambda cycle: corrections.drop(cycle, "north", 2),
    "prune": corrections.prune,
}


@pytest.mark.parametrize("act", ACTS)
def test_after_a_kill_in_the_middle_of_a_correction_it_has_been_made_or_not_and_the_cycle_goes_on(
    closed, tmp_path, act
):
    """Killed at every file that it writes, moves or deletes; a recomputation here changes the network."""
    corrections.ban(closed, "west")
    if act == "prune":
        corrections.allow(closed, "west")
        answer_all(closed, 2, 20, ("east", "west"))
        assert closed.advance(NOW)
    whole = tmp_path / "whole"
    shutil.copytree(closed.folder, whole)
    ACTS[act](Cycle(whole))
    before, after = essence(closed.folder), essence(whole)
    at, ended = 0, 9
    seen = set()
    while ended:
        folder, at = tmp_path / f"cut-{at}", at + 1
        shutil.copytree(closed.folder, folder)
        if (child := os.fork()) == 0:
            die_at(at)
            ACTS[act](Cycle(folder))
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        again = Cycle(folder)
        seen.add(now := essence(folder))
        assert now in (before, after) or act == "prune"
        again.question("north", with_prior=again.round is not None)  # the open round's prior is what the state says
        for number, sha256 in enumerate(again.state["priors"]):
            assert Posterior.load(folder / f"q{number}.safetensors").sha256 == sha256
        for row in again.state["posteriors"]:
            assert row.get("pruned") or Posterior.load(folder / row["file"]).sha256 == row["sha256"]
        if now != after:
            ACTS[act](again)
            assert essence(folder) == after
    assert {before, after} <= seen
    assert at > 2


def essence(folder: Path) -> str:
    """What a state says, without times and without the bytes that were freed."""
    state = json.loads((folder / "state.json").read_text())
    rows = [{name: row.get(name) for name in ("file", "sha256", "counted_in", "pruned")} for row in state["posteriors"]]
    refused = [(entry["site"], entry["reason"]) for entry in state["refused"]]
    acts = [(act["act"], act.get("site"), act.get("round")) for act in state["acts"]]
    return json.dumps([state["priors"], rows, refused, acts, state["banned"]], sort_keys=True)


def die_at(at: int) -> None:
    """This process ends, as by a kill -9, just before file number `at` gets its name or is deleted."""
    seen = [0]

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            seen[0] += 1
            if seen[0] == at:
                os._exit(9)
            return function(*arguments, **options)

        return call

    os.replace, os.unlink = counted(os.replace), counted(os.unlink)
    Path.unlink = counted(Path.unlink)
