"""A cycle with method pvi: each round replaces the factors of the sites that answered; the others keep theirs."""

from datetime import timedelta
from pathlib import Path

import pytest

from dwc import cli
from dwc.base.errors import InputError
from dwc.federated import corrections
from dwc.federated.cycle import Cycle
from dwc.federated.networks import factors_after, trained_from
from dwc.federated.project import Project
from dwc.federated.server_state import describe
from dwc.posterior import Posterior
from tests.made_cycles import NOW, trained

SITES = ("north", "east", "west")


@pytest.fixture
def project(project) -> Project:
    return Project(**{**project.to_json(), "method": "pvi", "rounds": 4, "max_influence": None})


def answer(cycle: Cycle, site: str, seed: int, **changes: float) -> None:
    """A site trains from its cavity of the open round and sends its posterior."""
    cycle.receive(site, trained(cycle, seed, number=cycle.round, site=site, **changes))


def one_round(cycle: Cycle, seed: int, sites: tuple[str, ...] = SITES) -> None:
    for n, site in enumerate(sites):
        answer(cycle, site, seed + n)
    assert cycle.advance(NOW + timedelta(days=2))


class ByHand:
    """`dwc consolidate --state` on copies of the server's files, round after round."""

    def __init__(self, cycle: Cycle, folder: Path) -> None:
        self.cycle, self.folder, self.number = cycle, folder, 0
        self.earlier = [str(cycle.folder / "q0.safetensors")]
        folder.mkdir()

    def round(self, *words: str) -> Posterior:
        self.number += 1
        out = self.folder / f"q{self.number}.safetensors"
        files = []
        for row in self.cycle.state["posteriors"]:
            if row["counted_in"] == self.number:
                (self.folder / str(self.number)).mkdir(exist_ok=True)
                files.append(self.folder / str(self.number) / f"{row['site']}.safetensors")
                files[-1].write_bytes((self.cycle.folder / row["file"]).read_bytes())
        cavities = self.folder / f"next-{self.number}"
        line = [
            "consolidate", *map(str, files), "--prior", str(self.cycle.folder / "q0.safetensors"),
            "--state", str(self.folder / "state.safetensors"), "--cavities", str(cavities), "--out", str(out),
            "--damping", str(self.cycle.state["networks"][self.number]["damping"]),
            "--earlier", *self.earlier, *words,
        ]  # fmt: skip
        assert cli.main(line) == 0
        self.earlier += [str(path) for path in cavities.glob("*.safetensors")]
        for path in cavities.glob("*.safetensors"):
            theirs = self.cycle.state["networks"][self.number]["cavities"][path.name.removesuffix(".safetensors")]
            assert Posterior.load(path).sha256 == theirs
        return Posterior.load(out)


def test_every_round_is_to_the_bit_what_consolidate_with_a_state_gives_by_hand(cycle, tmp_path):
    for number in range(4):
        one_round(cycle, 10 * number)
    by_hand = ByHand(cycle, tmp_path / "hand")
    for number in range(1, 5):
        assert by_hand.round().sha256 == cycle.state["priors"][number]
    assert cycle.round is None
    assert cycle.state["networks"][1]["damping"] == 1 / 3


def test_missing_sites_keep_their_factor_and_late_ones_bring_theirs_with_the_round_that_closes_next(cycle, tmp_path):
    one_round(cycle, 0)
    late = trained(cycle, 50, number=2, site="east")
    one_round(cycle, 10, ("north", "west"))
    cycle.receive("east", late)
    one_round(cycle, 20, ("north", "west"))
    by_hand = ByHand(cycle, tmp_path / "hand")
    for number in (1, 2, 3):
        assert by_hand.round().sha256 == cycle.state["priors"][number]
    assert [row["round"] for row in cycle.state["posteriors"] if row["counted_in"] == 3] == [2, 3, 3]


def test_sites_that_never_answer_train_from_the_whole_network(cycle):
    one_round(cycle, 0, ("north", "west"))
    question = cycle.question("east", with_prior=True)
    assert question["prior_sha256"] == cycle.state["priors"][1]
    assert question["start_sha256"] == ""
    assert cycle.question("north")["prior_sha256"] != question["prior_sha256"]


def test_a_banned_sites_factor_leaves_with_the_round_that_closes_next_exactly(cycle, tmp_path):
    one_round(cycle, 0)
    corrections.ban(cycle, "east")
    one_round(cycle, 10, ("north", "west"))
    assert factors_after(cycle.folder, cycle.state, 2).sites == ["north", "west"]
    assert cycle.state["networks"][2]["damping"] == 1 / 2  # of the sites that are left
    by_hand = ByHand(cycle, tmp_path / "hand")
    by_hand.round()
    assert by_hand.round("--without", "east").sha256 == cycle.state["priors"][2]
    corrections.allow(cycle, "east")
    one_round(cycle, 20)
    assert factors_after(cycle.folder, cycle.state, 3).sites == ["east", "north", "west"]
    (again,) = cycle.question("east", with_prior=True)["entered"]
    assert again["round"] == 3  # what was taken out is no part of the factor


def test_a_dropped_posterior_leaves_the_factor_that_the_site_had_before(cycle):
    one_round(cycle, 0)
    before = factors_after(cycle.folder, cycle.state, 1)
    one_round(cycle, 10)
    corrections.drop(cycle, "east", 2)
    corrections.recompute(cycle, 2)
    after = factors_after(cycle.folder, cycle.state, 2)
    for tensor in before.prior.mu:
        for k in (0, 1):
            assert before._factors["east"].eta[tensor][k][0].equal(after._factors["east"].eta[tensor][k][0])
    assert (
        not before._factors["north"]
        .eta["layers.0.bias"][0][0]
        .equal(after._factors["north"].eta["layers.0.bias"][0][0])
    )


def test_a_reopened_round_that_ends_the_same_way_keeps_what_was_trained_from_it(cycle):
    one_round(cycle, 0)
    one_round(cycle, 10)
    for n, site in enumerate(SITES):
        answer(cycle, site, 20 + n)
    priors = list(cycle.state["priors"])
    corrections.reopen(cycle, 1)
    assert all("void" in entry for entry in cycle.state["refused"])
    for _ in range(2):
        assert cycle.advance(NOW + timedelta(days=2))
    assert cycle.state["priors"] == priors
    assert cycle.round == 3
    assert sorted(row["site"] for row in cycle.state["posteriors"] if row["counted_in"] is None) == sorted(SITES)
    assert cycle.state["refused"] == []


def test_a_site_alone_has_the_same_cavity_in_every_round_and_each_answer_is_that_of_its_round(cycle, project):
    cycle.amend(Project(**{**project.to_json(), "quorum": 1}))
    for number in (1, 2, 3):
        one_round(cycle, number, ("north",))
        assert cycle.state["posteriors"][-1]["round"] == number
    first = cycle.state["priors"][0]
    assert [row["prior_sha256"] for row in cycle.state["posteriors"]] == [first] * 3


def test_an_answer_to_another_sites_cavity_is_refused(cycle):
    one_round(cycle, 0)
    cycle.receive("east", trained(cycle, 7, number=2, site="north"))
    assert "which no round had" in cycle.state["refused"][-1]["reason"]


def test_influence_is_measured_against_the_sites_own_cavity(cycle, project):
    cycle.amend(Project(**{**project.to_json(), "max_influence": 3.0}))
    one_round(cycle, 0)
    for n, site in enumerate(SITES):
        answer(cycle, site, 10 + n, shrink=0.999 if site == "west" else 0.5)
    assert cycle.advance(NOW)
    powers = {row["site"]: row["power"] for row in cycle.state["posteriors"] if row["counted_in"] == 2}
    assert powers["west"] < 1
    assert powers["north"] == powers["east"] == 1
    assert "limited: west in round 2" in describe(cycle.state)


def test_rounds_end_when_the_network_changes_less_than_agreed(cycle, project):
    one_round(cycle, 0)
    change = cycle.state["networks"][1]["change"]
    assert f"round 1: the network changed by {change:.3g} sigma, damping 0.333" in describe(cycle.state)
    cycle.amend(Project(**{**project.to_json(), "until": 2 * change}))
    assert cycle.round is None
    assert "result is q1.safetensors" in describe(cycle.state)
    assert cycle.question("north")["round"] == 0
    cycle.amend(Project(**{**project.to_json(), "until": change / 1e6}))
    assert cycle.round == 2


def test_the_change_is_the_mean_shift_in_sigmas_of_the_network_before(cycle):
    one_round(cycle, 0)
    before, after = (Posterior.load(cycle.folder / f"q{number}.safetensors") for number in (0, 1))
    shifts = [((after.mu[name] - mu).abs() / before.sigma[name]).flatten() for name, mu in before.mu.items()]
    assert cycle.state["networks"][1]["change"] == pytest.approx(sum(s.sum().item() for s in shifts) / 28)


@pytest.mark.parametrize("file", ["factors.safetensors", "cavities/north.safetensors"])
def test_factors_and_cavities_that_were_damaged_or_swapped_are_named_and_change_nothing(cycle, file):
    one_round(cycle, 0)
    for n, site in enumerate(SITES):
        answer(cycle, site, 10 + n)
    (after,) = cycle.folder.glob("after-1-*")
    before = (cycle.folder / "state.json").read_bytes()
    swapped = after / ("cavities/east.safetensors" if "north" in file else "factors.safetensors")
    whole = (after / file).read_bytes()
    for content in (b"damaged", swapped.read_bytes() if "north" in file else whole[:-9]):
        (after / file).write_bytes(content)
        with pytest.raises(InputError, match=file):
            cycle.advance(NOW)
        assert (cycle.folder / "state.json").read_bytes() == before
    (after / file).write_bytes(whole)
    assert cycle.advance(NOW)


def test_pruned_are_the_factors_and_cavities_that_nothing_can_need(cycle):
    for number in range(3):
        one_round(cycle, 10 * number)
    late = trained(cycle, 99, number=4, site="east")
    corrections.prune(cycle)
    left = sorted(path.parent.name[:7] for path in cycle.folder.glob("after-*/factors.safetensors"))
    assert left == ["after-2", "after-3"]
    corrections.reopen(cycle, 3)
    assert cycle.advance(NOW)
    cycle.receive("east", late)
    one_round(cycle, 40, ("north", "west"))
    assert trained_from(cycle.folder, cycle.state, "east", 4).sha256 == late["prior_sha256"]


def test_each_answer_is_taken_when_it_comes_with_a_quorum_of_one_and_no_grace(cycle, project, tmp_path):
    cycle.amend(Project(**{**project.to_json(), "quorum": 1, "grace_hours": 0.0, "rounds": 9}))
    trained_at_once = {site: trained(cycle, n, number=1, site=site) for n, site in enumerate(SITES)}
    for number, site in enumerate(SITES, start=1):
        cycle.receive(site, trained_at_once[site])
        assert cycle.advance(NOW)
        assert cycle.round == number + 1
    assert {network["damping"] for network in cycle.state["networks"][1:]} == {1 / 3}  # sites that train, not answers
    by_hand = ByHand(cycle, tmp_path / "hand")
    for number in (1, 2, 3):
        assert by_hand.round().sha256 == cycle.state["priors"][number]


@pytest.mark.parametrize("act", [corrections.reopen, corrections.recompute])
def test_a_round_that_was_answered_is_finished_also_if_until_is_raised_meanwhile(cycle, project, act):
    for number in (1, 2):
        one_round(cycle, 10 * number)
    answer(cycle, "north", 30)
    first = cycle.state["priors"][1]
    more = Project(**{**project.to_json(), "until": 1e6})
    cycle.amend(more)
    assert cycle.round == 3
    assert cycle.advance(NOW + timedelta(days=2)) is False  # without a quorum; the answer is not put into round 2
    for seed, site in enumerate(("east", "west")):
        answer(cycle, site, 40 + seed)
    assert cycle.advance(NOW)
    assert cycle.round is None
    for number in (3, 2):
        act(cycle, number)
        while cycle.advance(NOW):
            pass
        assert cycle.state["priors"][1] == first
        assert all(row["counted_in"] == row["round"] for row in cycle.state["posteriors"])
        assert "ended after round 3, whose change is below until (1e+06)" in describe(Cycle(cycle.folder).state)


def test_a_round_in_which_all_answers_were_left_out_does_not_end_the_cycle(cycle, project):
    each = {"quorum": 1, "grace_hours": 0.0, "max_influence": 3.0, "until": 1e-6}
    cycle.amend(Project(**{**project.to_json(), **each}))
    shrink = {"north": 0.5, "east": 0.5, "west": 0.99999}
    at_once = {site: trained(cycle, n, site=site, shrink=shrink[site]) for n, site in enumerate(SITES)}
    for site in SITES:
        cycle.receive(site, at_once[site])
        assert cycle.advance(NOW)
    assert cycle.state["posteriors"][-1]["power"] == 0
    assert cycle.round == 4
    assert "round 3: no answer entered" in describe(Cycle(cycle.folder).state)
