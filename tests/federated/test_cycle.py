import json
import os
from datetime import timedelta
from pathlib import Path

import pytest

from dwc import cli
from dwc.base.errors import InputError
from dwc.federated import cycle as module
from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from dwc.federated.server_state import describe
from dwc.posterior import Posterior
from tests.made_cycles import NOW, file_of, trained
from tests.made_posteriors import a_prior, a_site


def by_hand(cycle: Cycle, number: int, sites: list[str], *flags: str) -> Posterior:
    """The result of `dwc consolidate` on the server's files."""
    out = cycle.folder / "by_hand.safetensors"
    words = [*(str(cycle.folder / site) for site in sites), "--prior", str(cycle.folder / f"q{number - 1}.safetensors")]
    assert cli.main(["consolidate", *words, *flags, "--out", str(out)]) == 0
    return Posterior.load(out)


def test_a_round_closes_when_all_sites_have_answered_with_what_consolidate_gives_by_hand(cycle):
    for seed, site in enumerate(("north", "east", "west")):
        assert not cycle.advance(NOW)
        cycle.receive(site, trained(cycle, seed))
    assert cycle.advance(NOW)
    assert cycle.round == 2
    files = [f"round-1/{site}.safetensors" for site in ("west", "north", "east")]
    assert Posterior.load(cycle.result).sha256 == by_hand(cycle, 1, files).sha256
    assert cycle.question("north")["prior_sha256"] == Posterior.load(cycle.folder / "q1.safetensors").sha256


def test_with_its_quorum_a_round_waits_for_the_grace_and_goes_on_without_the_rest(cycle):
    cycle.receive("north", trained(cycle, 0))
    assert not cycle.advance(NOW + timedelta(days=30))  # no quorum, no haste
    cycle.receive("west", trained(cycle, 1))
    assert not cycle.advance(NOW)
    assert not cycle.advance(NOW + timedelta(hours=23))
    assert cycle.advance(NOW + timedelta(hours=24))
    posterior = Posterior.load(cycle.result)
    assert len(posterior.metadata["sites"]) == 2
    assert posterior.sha256 == by_hand(cycle, 1, ["round-1/north.safetensors", "round-1/west.safetensors"]).sha256


def test_a_late_posterior_enters_the_round_that_closes_next_once(cycle):
    late = trained(cycle, 2)
    for seed, site in enumerate(("north", "west")):
        cycle.receive(site, trained(cycle, seed))
    cycle.advance(NOW)
    assert cycle.advance(NOW + timedelta(days=2))
    for _ in range(2):  # sent again, as when the receipt was lost
        cycle.receive("east", late)
    for seed, site in enumerate(("north", "west")):
        cycle.receive(site, trained(cycle, 3 + seed, number=2))
    cycle.advance(NOW)
    assert cycle.advance(NOW + timedelta(days=2))
    files = ["round-1/east.safetensors", "round-2/north.safetensors", "round-2/west.safetensors"]
    result = Posterior.load(cycle.result)
    assert result.sha256 == by_hand(cycle, 2, files, "--earlier", str(cycle.folder / "q0.safetensors")).sha256
    prior, site, q_0 = Posterior.load(cycle.folder / "q1.safetensors"), late_posterior(cycle), a_prior()
    added = [Posterior.load(cycle.folder / f"round-2/{site}.safetensors") for site in ("north", "west")]
    for name in prior.mu:  # the natural parameters, by the formula
        precision = site.sigma[name].double().pow(-2) - q_0.sigma[name].double().pow(-2)
        precision += sum(other.sigma[name].double().pow(-2) for other in added) - prior.sigma[name].double().pow(-2)
        assert result.sigma[name].double().pow(-2).allclose(precision, rtol=1e-6)


def late_posterior(cycle: Cycle) -> Posterior:
    return Posterior.load(cycle.folder / "round-1/east.safetensors")


def test_a_late_posterior_is_added_to_the_result_when_all_rounds_are_closed(cycle):
    for number in (1, 2):
        for seed, site in enumerate(("north", "west")):
            cycle.receive(site, trained(cycle, 10 * number + seed, number=number))
        cycle.advance(NOW)
        assert cycle.advance(NOW + timedelta(days=2))
    assert cycle.round is None
    assert not cycle.advance(NOW)
    cycle.receive("east", trained(cycle, 5, number=2))
    assert cycle.advance(NOW)
    assert not cycle.advance(NOW)
    files = [f"round-2/{site}.safetensors" for site in ("north", "west", "east")]
    assert Posterior.load(cycle.result).sha256 == by_hand(cycle, 2, files).sha256
    assert cycle.state["priors"][-1] == Posterior.load(cycle.result).sha256


def test_a_late_posterior_is_refused_once_its_scans_are_in_through_a_later_round(cycle):
    late = trained(cycle, 7)
    for seed, site in enumerate(("north", "west")):
        cycle.receive(site, trained(cycle, seed))
    cycle.advance(NOW)
    cycle.advance(NOW + timedelta(days=2))
    cycle.receive("east", trained(cycle, 4, number=2))
    cycle.receive("east", late)
    assert [row["round"] for row in cycle.state["posteriors"] if row["site"] == "east"] == [2]
    assert "of round 1, but one of round 2 is in" in cycle.state["refused"][-1]["reason"]


def grown(prior: Posterior) -> Posterior:
    site = a_site(prior, 1)
    return Posterior(site.mu, {name: 2 * sigma for name, sigma in prior.sigma.items()}, site.metadata)


def moved(prior: Posterior, shift: float, shrink: float = 0.9) -> Posterior:
    """A site's posterior with one mean this far from the prior's, and one sigma shrunk to this part."""
    site = a_site(prior, 1)
    site.mu["layers.0.bias"][0] = shift
    site.sigma["layers.0.bias"][1] = shrink * prior.sigma["layers.0.bias"][1]
    return site


def other_tensors(prior: Posterior) -> Posterior:
    site = a_site(prior, 1)
    mu, sigma = ({**tensors, "layers.1.bias": tensors["layers.0.bias"].clone()} for tensors in (site.mu, site.sigma))
    return Posterior(mu, sigma, site.metadata)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda prior: a_site(prior, 1, prior_sha256="00"), "was trained from prior 00, which no round had"),
        (lambda prior: a_site(prior, 1, architecture={"width": 9}), "architecture width 9 differs"),
        (lambda prior: a_site(prior, 1, label_map={"sha256": "cd"}), "label map sha256 cd differs"),
        (lambda prior: Posterior(a_site(prior, 1).mu, {}, a_site(prior, 1).metadata), "a MAP network"),
        (grown, "sigma exceeds the prior's"),
        (lambda prior: a_site(prior, 1, sites=[{"sha256": "00", "n_volumes": 1}]), "its header has 'sites'"),
        (lambda prior: a_site(prior, 1, subjects=["patient 17"]), "its header has 'subjects'"),
        (lambda prior: a_site(prior, 1, n_volumes="many"), "n_volumes 'many' is not a count"),
        (lambda prior: a_site(prior, 1, n_volumes=-1), "n_volumes '-1' is not a count"),
        (lambda prior: a_site(prior, 1, n_volumes=2**53), "n_volumes '9007199254740992' is not a count"),
        (lambda prior: a_site(prior, 1, n_volumes=10**4299), "n_volumes '10000000000000000000' is not a count"),
        (lambda prior: moved(prior, 3e38), "layers.0.bias is more than 1e+09 sigmas from the prior"),
        (lambda prior: moved(prior, 0, shrink=1e-30), "layers.0.bias is more than 1e+09 sigmas from the prior"),
        (other_tensors, "layers.1.bias is not in both this file and q0.safetensors"),
    ],
)
def test_what_does_not_belong_is_refused_and_the_site_is_told_why(cycle, make, reason):
    content = file_of(make(Posterior.load(cycle.folder / "q0.safetensors")), cycle.folder)
    for _ in range(2):
        cycle.receive("north", {"state": "trained", "round": 1, "prior_sha256": "", "posterior": content})
    assert cycle.state["posteriors"] == []
    assert len(cycle.state["refused"]) == 1
    (told,) = cycle.question("north")["settled"].values()
    assert told.startswith("north's posterior: ")
    assert reason in told
    assert str(cycle.folder) not in told
    assert cycle.question("east")["settled"] == {}  # a site hears of its own files alone
    assert not list(cycle.folder.glob("*incoming*"))


def test_what_a_site_writes_reaches_terminal_and_books_printable_and_short(cycle):
    name = "x\x1b[2J\nnorth  trained" + "y" * 5000
    site = a_site(Posterior.load(cycle.folder / "q0.safetensors"), 1)
    for tensors in (site.mu, site.sigma):
        tensors[name] = tensors["layers.0.bias"].clone()
    cycle.receive("north", {"state": "idle", "round": 1, "prior_sha256": "", "posterior": file_of(site, cycle.folder)})
    reason = cycle.state["refused"][0]["reason"]
    assert "x?[2J?north" in reason
    with pytest.raises(InputError) as told:
        cycle.receive("north", {"state": "idle", "round": 1, "prior_sha256": "", name: b""})
    for line in (reason, str(told.value)):
        assert line.isprintable()
        assert len(line) <= 400


def test_a_site_that_sends_junk_does_not_fill_the_books(cycle, monkeypatch):
    monkeypatch.setattr(module, "_MAX_REFUSALS", 3)
    junk = {"state": "trained", "round": 1, "prior_sha256": ""}
    cycle.receive("east", junk | {"posterior": b"east's"})
    for number in range(5):
        cycle.receive("north", junk | {"posterior": b"%d" % number})
    assert len(cycle.question("north")["settled"]) == 3
    assert len(cycle.question("east")["settled"]) == 1


@pytest.mark.parametrize("spoil", [lambda _: b"", lambda _: b"x" * 100, lambda content: content[:-9]])
def test_what_is_no_posterior_or_half_of_one_is_refused(cycle, spoil):
    answer = trained(cycle, 0)
    cycle.receive("north", answer | {"posterior": spoil(answer["posterior"])})
    assert "truncated or not a safetensors file" in cycle.state["refused"][0]["reason"]


@pytest.mark.parametrize(("number", "spoilt"), [(123, b"NaN"), (12345, b"9e999")])
def test_a_header_that_is_no_json_is_refused(cycle, number, spoilt):
    answer = trained(cycle, 0, n_volumes=number)
    content = answer["posterior"].replace(b":%d" % number, b":" + spoilt)
    assert content != answer["posterior"]
    cycle.receive("north", answer | {"posterior": content})
    assert "no dwc header that is JSON" in cycle.state["refused"][0]["reason"]


def test_a_fault_of_the_server_refuses_nobodys_posterior(cycle, monkeypatch):
    answer, prior = trained(cycle, 0), cycle.folder / "q0.safetensors"
    whole = prior.read_bytes()
    prior.write_bytes(whole[:-9])
    with pytest.raises(InputError, match=r"q0\.safetensors: truncated"):
        cycle.receive("north", answer)
    with pytest.raises(InputError, match=r"q0\.safetensors: truncated"):
        cycle.question("north", with_prior=True)
    prior.write_bytes(whole)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.safe_open", unreadable)
        with pytest.raises(InputError, match="Input/output error"):
            cycle.receive("north", answer)
    assert cycle.question("north")["settled"] == {}
    cycle.receive("north", answer)
    assert [row["site"] for row in cycle.state["posteriors"]] == ["north"]
    assert cycle.state["refused"] == []


def unreadable(*arguments, **options):
    raise OSError(5, "Input/output error")


def test_sites_that_send_the_same_bytes_are_each_told(cycle):
    answer = trained(cycle, 0)
    for site in ("north", "east", "west"):
        cycle.receive(site, answer)
    (file,) = cycle.question("north")["settled"]
    assert cycle.question("north")["settled"] == {file: ""}
    for site in ("east", "west"):
        assert "is the posterior of north" in cycle.question(site)["settled"][file]


def test_the_same_posterior_in_other_bytes_is_settled_too(cycle):
    answer = trained(cycle, 0)
    size = int.from_bytes(answer["posterior"][:8], "little")
    again = (size + 8).to_bytes(8, "little") + answer["posterior"][8 : 8 + size] + b" " * 8
    again += answer["posterior"][8 + size :]
    for content in (answer["posterior"], again, again):
        cycle.receive("north", answer | {"posterior": content})
    assert len(cycle.state["posteriors"]) == len(cycle.state["refused"]) == 1
    assert len(cycle.question("north")["settled"]) == 2


def test_the_grace_counts_from_the_posterior_that_made_the_quorum(cycle, project, clock):
    cycle.amend(Project(**{**project.to_json(), "quorum": 1}))
    cycle.receive("north", trained(cycle, 0))
    assert "quorum since 2026-01-01" in describe(cycle.state)
    cycle.amend(project)  # of two
    assert "quorum since" not in describe(cycle.state)
    clock[0] = NOW + timedelta(days=10)
    cycle.receive("east", trained(cycle, 1))
    assert not cycle.advance(clock[0])
    assert not cycle.advance(clock[0] + timedelta(hours=23))
    assert cycle.advance(clock[0] + timedelta(hours=24))


def test_what_went_wrong_in_a_pass_is_told_until_one_goes_well(cycle):
    cycle.note(["q0.safetensors: truncated"])
    assert "in the last pass: q0.safetensors: truncated" in describe(Cycle(cycle.folder).state)
    cycle.note([])
    assert "in the last pass" not in describe(Cycle(cycle.folder).state)


def test_a_site_counts_once_and_not_with_anothers_posterior(cycle):
    answer = trained(cycle, 0)
    cycle.receive("north", answer)
    cycle.receive("north", trained(cycle, 1))
    cycle.receive("east", answer)
    assert [row["site"] for row in cycle.state["posteriors"]] == ["north"]
    reasons = [row["reason"] for row in cycle.state["refused"]]
    assert "another one of round 1 is in" in reasons[0]
    assert "is the posterior of north" in reasons[1]


@pytest.mark.parametrize(
    ("site", "change", "message"),
    [
        ("south", {}, "is not a site of brains"),
        ("north", {"scans": b"..."}, "unexpected entry 'scans'"),
        ("north", {"posterior": "a path"}, "unexpected entry 'posterior' of type str"),
        ("north", {"state": "patient 17"}, "unknown state"),
        ("north", {"round": 10**5000}, "round is out of range"),
    ],
)
def test_what_is_not_in_the_agreement_is_not_even_read(cycle, site, change, message):
    before = (cycle.folder / "state.json").read_bytes()
    with pytest.raises(InputError, match=message):
        cycle.receive(site, {"state": "idle", "round": 0, "prior_sha256": "", **change})
    assert (cycle.folder / "state.json").read_bytes() == before


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")  # Python 3.12 and up, where threads run
@pytest.mark.parametrize("method", ["dwc", "pvi"])
def test_after_a_kill_in_the_middle_of_any_write_the_same_bits_come_out(project, tmp_path, method):
    project = Project(**{**project.to_json(), "method": method})
    whole = Cycle.create(tmp_path / "whole", project)
    run(whole)
    at, ended = 0, 9
    while ended:
        folder, at = tmp_path / f"cut-{at}", at + 1
        Cycle.create(folder, project)
        if (child := os.fork()) == 0:
            die_in_write(at)
            run(Cycle(folder))
            os._exit(0)
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = [*folder.rglob(".*.part"), *folder.glob("next.safetensors")]
        assert bool(left) == bool(ended)  # what nobody could clear away
        run(Cycle(folder))
        again = Cycle(folder)
        assert not list(folder.rglob(".*.part"))
        assert again.state["priors"] == whole.state["priors"]
        assert [row["site"] for row in again.state["posteriors"]] == ["north", "east", "west"]
        assert {path.name for path in folder.iterdir()} == {path.name for path in whole.folder.iterdir()}
    assert at > 10  # a file as it comes in and at its place, and the state, three times; then a prior, and the state


def run(cycle: Cycle) -> None:
    for seed, site in enumerate(("north", "east", "west")):
        cycle.receive(site, trained(cycle, seed))
    cycle.advance(NOW)


def die_in_write(at: int) -> None:
    """This process ends, as by a kill -9, when file number `at` is written but has not got its name."""
    replace, seen = os.replace, [0]

    def counted(source, target):
        if "made" not in Path(target).name:
            seen[0] += 1
            if seen[0] == at:
                os._exit(9)
        replace(source, target)

    os.replace = counted


def test_the_state_is_json_that_a_person_can_read(cycle):
    cycle.receive("north", {"state": "training", "round": 1, "prior_sha256": cycle.state["priors"][0]})
    state = json.loads((cycle.folder / "state.json").read_text())
    assert state["sites"]["north"]["state"] == "training"
    assert state["project"]["quorum"] == 2
