import pytest

from dwc.base.errors import InputError
from dwc.federated.cycle import Cycle
from dwc.federated.project import Project
from tests.made_cycles import NOW, trained
from tests.made_posteriors import a_prior


def test_a_changed_agreement_lets_sites_and_rounds_in_and_loses_nothing(cycle, project):
    cycle.receive("north", trained(cycle, 0))
    more = {**project.to_json(), "sites": ["north", "east", "west", "south"], "rounds": 5, "quorum": 3}
    cycle.amend(Project(**more))
    again = Cycle(cycle.folder)
    again.receive("south", trained(again, 1))
    assert [row["site"] for row in again.state["posteriors"]] == ["north", "south"]
    assert not again.advance(NOW)  # the new quorum
    with pytest.raises(InputError, match="north has sent a posterior already"):
        again.amend(Project(**{**more, "sites": ["east", "west", "south"]}))
    again.amend(Project(**{**more, "rounds": 1}))
    assert again.round == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "hearts"}, "`name` hearts: cannot change from brains"),
        ({"training": {"lr": 0.5}}, "training"),
        ({"organizer": "joe@dwc.org"}, "organizer"),
        ({"temper": 0.5}, "temper"),
        ({"server": "elsewhere"}, "server"),
        ({"port": 8003}, "port"),
        ({"certificate_years": 1.0}, "certificate_years"),
    ],
)
def test_what_kits_and_closed_rounds_would_not_know_of_cannot_be_changed(cycle, project, change, message):
    before = (cycle.folder / "state.json").read_bytes()
    with pytest.raises(InputError, match=message):
        cycle.amend(Project(**{**project.to_json(), **change}))
    a_prior(seed=9).save(project.prior)
    with pytest.raises(InputError, match="is not the one that the cycle began with"):
        cycle.amend(project)
    assert (cycle.folder / "state.json").read_bytes() == before


def test_a_round_that_has_begun_is_not_taken_back(cycle, project):
    for seed, site in enumerate(("north", "east", "west")):
        cycle.receive(site, trained(cycle, seed))
    assert cycle.advance(NOW)
    with pytest.raises(InputError, match="`rounds` 1: round 2 has begun already; give 2 or more"):
        cycle.amend(Project(**{**project.to_json(), "rounds": 1}))
    for seed, site in enumerate(("north", "east", "west")):
        cycle.receive(site, trained(cycle, 3 + seed, number=2))
    assert cycle.advance(NOW)
    cycle.amend(Project(**{**project.to_json(), "rounds": 3}))
    assert cycle.round == 3


def test_a_cycle_is_not_begun_twice_in_one_folder(cycle, project):
    with pytest.raises(InputError, match="a cycle has begun here"):
        Cycle.create(cycle.folder, project)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"quorum": 4}, "`quorum` 4: give 1 to 3"),
        ({"sites": ["north", "North", "west"]}, "'north' is taken"),
        ({"sites": ["../etc", "b", "c"]}, "'../etc': give letters"),
        ({"rounds": 0}, "`rounds` 0: give a positive number"),
        ({"training": {"data": "x"}}, "'data' is not a setting that sites share"),
        ({"grace_hours": -1.0}, "`grace_hours` -1.0: give 0 or more"),
        ({"grace_hours": float("nan")}, "`grace_hours` nan"),
        ({"answer_timeout_s": 1e12}, "`answer_timeout_s` 1000000000000.0: give a million or less"),
        ({"rounds": "3"}, "`rounds` '3': give a whole number"),
        ({"training": {"lr": "3"}}, "`training`: lr '3': give a number"),
        ({"training": {"schedule": "bogus"}}, "`training`: schedule 'bogus'"),
        ({"sites": []}, "`sites`"),
        ({"organizer": "me"}, "e-mail"),
    ],
)
def test_an_agreement_that_cannot_be_meant_is_refused(project, change, message):
    with pytest.raises(InputError, match=message):
        Project(**{**project.to_json(), **change})
