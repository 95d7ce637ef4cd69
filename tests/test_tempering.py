"""Tempering a consolidation, taking sites out of it one by one, and choosing the power on the origin's data."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwc.consolidation import Consolidation, consolidate
from dwc.errors import InputError
from dwc.posterior import Posterior
from tests.made_posteriors import HEADER, TENSORS, a_prior, a_site

seeds = st.integers(0, 2**20)
powers = st.floats(0.01, 4.0)


def tempered_equation(prior: Posterior, sites: list[Posterior], powers: list[float], name: str):
    """q0^(1 - sum lambda_s) prod q_s^lambda_s as it stands, in fp64."""
    mu_0, var_0 = prior.mu[name].double(), prior.sigma[name].double() ** 2
    etas = [(1 - sum(powers), mu_0, var_0)]
    etas += [(p, site.mu[name], site.sigma[name].double() ** 2) for p, site in zip(powers, sites, strict=True)]
    precision = sum(power / var for power, _, var in etas)
    return sum(power * mu / var for power, mu, var in etas) / precision, precision.rsqrt()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n_sites=st.integers(1, 8), temper=powers, scale=st.sampled_from([1e-4, 1e-3, 1.0]))
def test_a_power_tempers_sites_against_the_prior(seed, n_sites, temper, scale):
    prior = a_prior(seed, scale)
    sites = [a_site(prior, seed + s) for s in range(n_sites)]
    result = consolidate(prior, sites, temper=temper)
    for name in TENSORS:
        mu, sigma = tempered_equation(prior, sites, [temper] * n_sites, name)
        torch.testing.assert_close(result.mu[name], mu.float(), rtol=3e-7, atol=3e-7 * scale)
        torch.testing.assert_close(result.sigma[name], sigma.float(), rtol=3e-7, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n_sites=st.integers(1, 8))
def test_power_1_is_equation_17_to_the_last_bit_and_in_its_digest(seed, n_sites):
    prior = a_prior(seed, 1e-3)
    sites = [a_site(prior, seed + s) for s in range(n_sites)]
    assert consolidate(prior, sites, temper=1).sha256 == consolidate(prior, sites).sha256


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n_sites=st.integers(1, 8))
def test_power_1_over_s_is_the_geometric_mean_of_the_sites_without_the_prior(seed, n_sites):
    prior = a_prior(seed)
    sites = [a_site(prior, seed + s) for s in range(n_sites)]
    result = consolidate(prior, sites, temper=1 / n_sites)
    for name in TENSORS:
        precisions = [1 / site.sigma[name].double() ** 2 for site in sites]
        mean = sum(precisions) / n_sites
        mu = sum(p * site.mu[name] for p, site in zip(precisions, sites, strict=True)) / n_sites / mean
        torch.testing.assert_close(result.mu[name], mu.float(), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.sigma[name], mean.rsqrt().float(), rtol=3e-7, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, order=st.permutations(range(5)), temper=powers)
def test_tempered_or_not_any_order_of_sites_gives_the_same_digest(seed, order, temper):
    prior = a_prior(seed, 1e-3)
    sites = [a_site(prior, seed + s, n_volumes=s + 1) for s in range(5)]
    shuffled = consolidate(prior, [sites[s] for s in order], temper=temper)
    assert shuffled.sha256 == consolidate(prior, sites, temper=temper).sha256


@settings(max_examples=25, deadline=None)
@given(seed=seeds, temper=powers, shrink=st.sampled_from([0.0, 0.5, 0.999]))
def test_tempered_too_a_site_that_is_removed_leaves_no_trace(seed, temper, shrink):
    prior = a_prior(seed)
    kept, gone = a_site(prior, seed), a_site(prior, seed + 1, shrink=shrink)
    consolidation = Consolidation(prior).tempered(temper)
    consolidation.add(kept)
    before = consolidation.posterior()
    consolidation.add(gone)
    consolidation.remove(gone)
    assert consolidation.posterior().sha256 == before.sha256


@settings(max_examples=25, deadline=None)
@given(seed=seeds, low=powers, high=powers)
def test_sites_can_have_powers_of_their_own_and_keep_them_for_removal(seed, low, high):
    prior = a_prior(seed)
    sites = [a_site(prior, seed + s) for s in range(2)]
    parts = [consolidate(prior, [site], temper=power) for site, power in zip(sites, (low, high), strict=True)]
    both = consolidate(prior, parts)
    for name in TENSORS:
        mu, sigma = tempered_equation(prior, sites, [low, high], name)
        torch.testing.assert_close(both.mu[name], mu.float(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(both.sigma[name], sigma.float(), rtol=1e-6, atol=0)
    recorded = {member["sha256"]: member["temper"] for member in both.metadata["sites"]}
    assert recorded == {sites[0].sha256: low, sites[1].sha256: high}
    consolidation = Consolidation(prior)
    consolidation.add(both)
    consolidation.remove(sites[1])
    alone = consolidation.posterior()
    assert alone.metadata == parts[0].metadata
    for name, sigma in parts[0].sigma.items():
        torch.testing.assert_close(alone.sigma[name], sigma, rtol=1e-4, atol=0)
        assert ((alone.mu[name] - parts[0].mu[name]).abs() < 1e-4 * (parts[0].mu[name].abs() + sigma)).all()


@settings(max_examples=25, deadline=None)
@given(seed=seeds, first=powers, second=powers)
def test_powers_multiply_and_the_original_stays_as_it_was(seed, first, second):
    prior = a_prior(seed)
    consolidation = Consolidation(prior)
    consolidation.add(a_site(prior, seed))
    before = consolidation.posterior()
    twice, once = consolidation.tempered(first).tempered(second), consolidation.tempered(first * second)
    assert twice.posterior().sha256 == once.posterior().sha256
    twice.add(a_site(prior, seed + 1))
    assert (twice.n_sites, consolidation.n_sites) == (2, 1)
    assert consolidation.posterior().sha256 == before.sha256


def test_a_small_power_stays_near_the_prior_and_a_large_one_is_surer_than_equation_17():
    prior = a_prior()
    sites = [a_site(prior, s) for s in range(3)]
    near, plain, sure = (consolidate(prior, sites, temper=temper) for temper in (1e-6, 1, 2))
    for name, sigma in prior.sigma.items():
        torch.testing.assert_close(near.mu[name], prior.mu[name], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(near.sigma[name], sigma, rtol=1e-4, atol=0)
        assert (sure.sigma[name] < plain.sigma[name]).all()
    consolidation = Consolidation(prior).tempered(0.5)
    for site in sites:
        consolidation.add(site)
    for row in consolidation.report():
        expected = consolidation.posterior().sigma[row.layer].double().pow(-2).sum()
        site = next(site for site in sites if site.name == row.site)
        weight = 0.5 * site.sigma[row.layer].double().pow(-2).sum() / expected
        assert row.weight == pytest.approx(weight.item(), rel=1e-5)
    for layer in TENSORS:
        assert sum(row.added_share for row in consolidation.report() if row.layer == layer) == pytest.approx(1)


@pytest.mark.parametrize("temper", [0, -0.5, math.inf, math.nan])
def test_a_power_that_is_not_positive_is_refused(temper):
    with pytest.raises(InputError, match=r"^lambda .*: give a positive number"):
        consolidate(a_prior(), [a_site(a_prior(), 1)], temper=temper)


def test_a_power_that_leaves_no_precision_names_tensor_power_and_count():
    prior = a_prior()
    site = a_site(prior, 1, shrink=0.0)
    site.sigma["layers.0.bias"][:3] = prior.sigma["layers.0.bias"][:3] / 1.1
    # As if a file had been tampered with: it says that the site is in it, but is no surer than the prior.
    metadata = {**HEADER, "prior_sha256": prior.sha256}
    members = [{"sha256": site.sha256, "n_volumes": 1}, {"sha256": "cd", "n_volumes": 1}]
    forged = Posterior(prior.mu, prior.sigma, {**metadata, "sites": members}, name="forged")
    consolidation = Consolidation(prior)
    consolidation.add(forged)
    consolidation.remove(site)
    consolidation.posterior()
    words = (
        r"^consolidated: layers\.0\.bias is left with precision <= 0 in 3 of 4 weights, with lambda 8; give a smaller"
    )
    with pytest.raises(InputError, match=words):
        consolidation.tempered(8).posterior()


@settings(max_examples=15, deadline=None)
@given(seed=seeds, n_sites=st.integers(2, 6), temper=powers)
def test_leaving_one_out_is_consolidating_the_others_and_changes_nothing(seed, n_sites, temper):
    prior = a_prior(seed, 1e-3)
    sites = [a_site(prior, seed + s, n_volumes=s + 1) for s in range(n_sites)]
    consolidation = Consolidation(prior).tempered(temper)
    for site in sites:
        consolidation.add(site)
    before = consolidation.posterior()
    for gone, (site, rest) in enumerate(consolidation.leave_one_out(iter(sites))):
        others = sites[:gone] + sites[gone + 1 :]
        assert site is sites[gone]
        assert rest.name == f"without {site.name}"
        assert rest.sha256 == consolidate(prior, others, temper=temper).sha256
    assert consolidation.posterior().sha256 == before.sha256
    assert len(consolidation.report()) == n_sites * len(TENSORS)


def test_a_file_whose_sites_have_other_powers_is_not_removed_as_a_whole():
    prior = a_prior()
    one, two = a_site(prior, 1), a_site(prior, 2)
    consolidation = Consolidation(prior)
    consolidation.add(consolidate(prior, [one], temper=0.5))
    consolidation.add(two)
    with pytest.raises(InputError, match="other powers here than in it"):
        consolidation.remove(consolidate(prior, [one, two]))
    assert consolidation.n_sites == 2
