from itertools import islice

import pytest

from benchmarks.asynchronous_rounds import asynchronous, synchronous
from dwc.posterior import Posterior
from dwc.site_factors import Factors
from tests.made_posteriors import a_prior, a_site

PRIOR = a_prior(0, 0.01)
DURATIONS = [1, 1, 2, 4]


def train(site: int, cavity: Posterior, start: Posterior) -> Posterior:
    return a_site(cavity, site)


def test_synchronous_rounds_replace_every_factor_from_the_network_of_the_round_before():
    factors, networks = Factors(PRIOR), []
    for _ in range(2):
        cavities = [factors.cavity(str(site)) for site in range(4)]
        for site, cavity in enumerate(cavities):
            factors.replace(str(site), a_site(cavity, site), cavity=cavity, damping=1 / 4)
        networks.append(factors.posterior().sha256)
    times, trainings, ours = zip(*islice(synchronous(PRIOR, train, DURATIONS), 2), strict=True)
    assert times == (4, 8)  # as long as the slowest site takes
    assert trainings == (4, 8)
    assert [network.sha256 for network in ours] == networks


def test_asynchronous_answers_count_from_the_cavity_that_each_site_was_sent():
    begun = []

    def noted(site: int, cavity: Posterior, start: Posterior) -> Posterior:
        begun.append((site, cavity.sha256, start.sha256))
        return train(site, cavity, start)

    times, trainings, networks = zip(*islice(asynchronous(PRIOR, noted, DURATIONS), 2), strict=True)
    assert trainings == (4, 8)
    assert times == (2, 4)
    assert [site for site, *_ in begun] == [0, 1, 0, 1, 2, 0, 1, 0]  # in the order of their ends, the slowest last
    of_first = {site: (cavity, start) for site, cavity, start in reversed(begun)}
    assert all(sent == (PRIOR.sha256, PRIOR.sha256) for sent in of_first.values())  # however late the answer came
    factors, sent = Factors(PRIOR), dict.fromkeys(range(3), (PRIOR, PRIOR))
    for site, cavity, start in begun:
        assert (sent[site][0].sha256, sent[site][1].sha256) == (cavity, start)
        answer = train(site, *sent[site])
        factors.replace(str(site), answer, cavity=sent[site][0], damping=1 / 4)
        sent[site] = factors.cavity(str(site)), factors.posterior()
    assert factors.posterior().sha256 == networks[-1].sha256


@pytest.mark.parametrize("rule", [synchronous, asynchronous])
def test_with_one_site_both_are_one_training_after_another(rule):
    factors = Factors(PRIOR)
    for _ in range(2):
        cavity = factors.cavity("0")
        factors.replace("0", a_site(cavity, 0), cavity=cavity, damping=1.0)
    *_, (time, trainings, network) = islice(rule(PRIOR, train, [3]), 2)
    assert (time, trainings, network.sha256) == (6, 2, factors.posterior().sha256)
