import math
from dataclasses import replace

import pytest
import torch

from dwc.base.errors import InputError
from dwc.influence import Influence, limit_powers, measure, verdicts, warnings_about
from dwc.posterior import Posterior
from tests.made_posteriors import a_prior, a_site

PRIOR = a_prior()


def sites(n: int) -> dict[str, Influence]:
    return {str(seed): measure(a_site(PRIOR, seed), PRIOR) for seed in range(n)}


def changed(seed: int, mu: float = 1.0, sigma: float = 1.0) -> Posterior:
    site = a_site(PRIOR, seed)
    means = {name: PRIOR.mu[name] + mu * (mean - PRIOR.mu[name]) for name, mean in site.mu.items()}
    return Posterior(means, {name: sigma * width for name, width in site.sigma.items()}, site.metadata)


def test_kl_is_that_of_torch_distributions_and_the_measures_are_those_of_their_formulas():
    site = a_site(PRIOR, 1, n_volumes=7)
    found = measure(site, PRIOR)
    q = {n: torch.distributions.Normal(site.mu[n].double(), site.sigma[n].double()) for n in PRIOR.mu}
    p = {n: torch.distributions.Normal(PRIOR.mu[n].double(), PRIOR.sigma[n].double()) for n in PRIOR.mu}
    kl = sum(torch.distributions.kl_divergence(q[n], p[n]).sum() for n in q)
    assert found.kl == pytest.approx(kl.item())
    ratio = torch.cat([(site.sigma[n].double() / PRIOR.sigma[n]).flatten() for n in PRIOR.mu])
    shift = torch.cat([((site.mu[n].double() - PRIOR.mu[n]) / PRIOR.sigma[n]).flatten() for n in PRIOR.mu])
    assert found.precision == pytest.approx((ratio**-2 - 1).mean().item())
    assert found.shift == pytest.approx((shift / ratio**2).square().mean().sqrt().item())
    assert (found.furthest, found.surest) == pytest.approx((shift.abs().max().item(), ratio.min().item()))
    assert found.n_volumes == 7
    assert Influence.from_json(found.to_json()) == found


def test_a_site_that_did_not_move_has_no_influence_and_no_fingerprint():
    same = Posterior(PRIOR.mu, PRIOR.sigma, {})
    found = measure(same, PRIOR)
    assert (found.kl, found.precision, found.shift, found.fingerprints) == (0, 0, 0, ())


def test_honest_sites_keep_full_power_and_nothing_is_said_of_them():
    influences = sites(6)
    assert limit_powers(list(influences.values()), 3.0) == [1.0] * 6
    assert warnings_about(influences) == {}


@pytest.mark.parametrize(("mu", "sigma"), [(1.0, 1e-9), (1e6, 1.0), (1.0, 1e-30), (1e30, 1.0)])
def test_a_site_far_above_the_others_is_left_out(mu, sigma):
    influences = [*sites(4).values(), measure(changed(9, mu, sigma), PRIOR)]
    assert limit_powers(influences, 3.0) == [1.0] * 4 + [0.0]


def test_a_site_above_the_limit_is_weakened_to_it():
    honest = list(sites(4).values())
    loud = measure(changed(9, mu=20.0), PRIOR)
    power = limit_powers([*honest, loud], 3.0)[-1]
    median = sorted([*(one.shift for one in honest), loud.shift])[2]
    assert power * loud.shift == pytest.approx(3.0 * max(median, 1.0))


def test_silent_sites_do_not_shut_out_one_that_has_learned_within_the_priors_uncertainty():
    silent = measure(Posterior(PRIOR.mu, PRIOR.sigma, {}), PRIOR)
    assert limit_powers([silent, silent, measure(changed(1, mu=0.5), PRIOR)], 3.0) == [1.0] * 3


def test_two_sites_are_no_majority_and_none_means_no_limit():
    loud = measure(changed(9, mu=1e6), PRIOR)
    honest = next(iter(sites(1).values()))
    assert limit_powers([honest, loud], 3.0) == [1.0, 1.0]
    assert limit_powers([honest, honest, loud], None) == [1.0] * 3
    for odd in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(InputError, match=r"`max_influence` .*give a positive number"):
            limit_powers([honest], odd)


def test_a_thousand_copies_of_one_file_are_a_line_each():
    copy = a_site(PRIOR, 0)
    influences = sites(3)
    for number in range(1000):
        copy.mu["layers.0.bias"][0] = number
        influences[f"copy {number}"] = measure(copy, PRIOR)
    found = warnings_about(influences)
    assert "it has tensors in common with 0 and 999 more" in found["copy 7"]
    assert "1" not in found


def test_a_site_that_moves_against_the_others_is_named():
    """Sites that learned nearly the same, and one that unlearned it."""
    base = a_site(PRIOR, 1)
    influences = {}
    for seed in range(5):
        noise = a_site(PRIOR, 10 + seed)
        sign = -1 if seed == 4 else 1
        mu = {n: PRIOR.mu[n] + sign * (base.mu[n] - PRIOR.mu[n]) + 0.3 * (noise.mu[n] - PRIOR.mu[n]) for n in PRIOR.mu}
        influences[str(seed)] = measure(Posterior(mu, noise.sigma, base.metadata), PRIOR)
    assert warnings_about(influences)["4"] == ["its means move against those of the other sites"]
    assert {*warnings_about(influences)} == {"4"}


def test_a_verdict_says_how_far_each_site_moved_and_what_it_brings_for_its_volumes():
    found = {seed: measure(a_site(PRIOR, seed, n_volumes=1 + seed), PRIOR) for seed in range(3)}
    lines = verdicts({str(seed): one for seed, one in found.items()})
    share = found[1].precision / sum(one.precision for one in found.values())
    assert f"moved {found[1].kl / 2:.3g} nats per volume, brings {share:.0%} of the added precision" in lines["1"]
    assert "for 33% of the volumes, agreement " in lines["1"]


def test_one_small_tensor_in_common_does_not_make_a_copy():
    one, other = measure(a_site(PRIOR, 0), PRIOR), measure(a_site(PRIOR, 1), PRIOR)
    many = replace(one, fingerprints=("a", "b", "c", "d"))
    assert not many.copies(replace(other, fingerprints=("a", "e", "f", "g")))
    assert many.copies(replace(other, fingerprints=("a", "b", "f", "g")))
    assert not replace(one, fingerprints=()).copies(replace(other, fingerprints=()))
