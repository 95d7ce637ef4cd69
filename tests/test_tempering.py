"""Tempering a consolidation, leaving sites out one by one, and choosing the power on the organization's data."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st

from dwc.base.errors import InputError
from dwc.base.seeds import seed_of
from dwc.consolidation import Consolidation, consolidate
from dwc.data.cache import prepare
from dwc.data.dataset import SubVolumes
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import read_manifest
from dwc.meshnet import MeshNet
from dwc.metrics.confusion import confusion_matrix, mean_dice
from dwc.posterior import Posterior
from dwc.tempering import (
    LeftOut,
    TemperScore,
    choose_temper,
    format_scores,
    score_left_out,
    score_network,
    temper_grid,
)  # fmt: skip
from tests.made_posteriors import HEADER, TENSORS, a_prior, a_site

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

seeds = st.integers(0, 2**20)
powers = st.floats(0.01, 4.0)


def tempered_equation(prior: Posterior, sites: list[Posterior], powers: list[float], name: str):
    """q0^(1 - sum lambda_s) prod q_s^lambda_s, computed directly in fp64."""
    mu_0, var_0 = prior.mu[name].double(), prior.sigma[name].double() ** 2
    etas = [(1 - sum(powers), mu_0, var_0)]
    etas += [(p, s.mu[name].double(), s.sigma[name].double() ** 2) for p, s in zip(powers, sites, strict=True)]
    precision = sum(power / var for power, _, var in etas)
    return sum(power * mu / var for power, mu, var in etas) / precision, precision.rsqrt()


@examples(max_examples=25, deadline=None)
@given(seed=seeds, n_sites=st.integers(1, 8), temper=powers, scale=st.sampled_from([1e-4, 1e-3, 1.0]))
def test_a_power_tempers_sites_against_the_prior(seed, n_sites, temper, scale):
    prior = a_prior(seed, scale)
    sites = [a_site(prior, seed + s) for s in range(n_sites)]
    result = consolidate(prior, sites, temper=temper)
    for name in TENSORS:
        mu, sigma = tempered_equation(prior, sites, [temper] * n_sites, name)
        torch.testing.assert_close(result.mu[name], mu.float(), rtol=3e-7, atol=3e-7 * scale)
        torch.testing.assert_close(result.sigma[name], sigma.float(), rtol=3e-7, atol=0)


@examples(max_examples=25, deadline=None)
@given(seed=seeds, n_sites=st.integers(1, 8))
def test_power_1_is_equation_17_to_the_last_bit_and_in_its_digest(seed, n_sites):
    prior = a_prior(seed, 1e-3)
    sites = [a_site(prior, seed + s) for s in range(n_sites)]
    assert consolidate(prior, sites, temper=1).sha256 == consolidate(prior, sites).sha256


@examples(max_examples=25, deadline=None)
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


@examples(max_examples=25, deadline=None)
@given(seed=seeds, order=st.permutations(range(5)), temper=powers)
def test_tempered_or_not_any_order_of_sites_gives_the_same_digest(seed, order, temper):
    prior = a_prior(seed, 1e-3)
    sites = [a_site(prior, seed + s, n_volumes=s + 1) for s in range(5)]
    shuffled = consolidate(prior, [sites[s] for s in order], temper=temper)
    assert shuffled.sha256 == consolidate(prior, sites, temper=temper).sha256


@examples(max_examples=25, deadline=None)
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


@examples(max_examples=25, deadline=None)
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


@examples(max_examples=25, deadline=None)
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
    with pytest.raises(InputError, match=r"^`temper` .*: give a positive number"):
        consolidate(a_prior(), [a_site(a_prior(), 1)], temper=temper)


def test_a_power_that_leaves_no_precision_names_tensor_power_and_count():
    prior = a_prior()
    site = a_site(prior, 1, shrink=0.0)
    site.sigma["layers.0.bias"][:3] = prior.sigma["layers.0.bias"][:3] / 1.1
    # As in a file that was tampered with: it claims to include the site, but is no more precise than the prior.
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


@examples(max_examples=15, deadline=None)
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


@pytest.mark.parametrize("n_sites", [1, 2, 3, 5, 64, 1000])
def test_the_grid_reaches_from_the_geometric_mean_to_above_equation_17_and_holds_both(n_sites):
    grid = temper_grid(n_sites)
    assert list(grid) == sorted(set(grid))
    assert {1.0, 1 / n_sites, 2.0} <= set(grid)
    assert 1 / (4 * n_sites * 2**0.5) < grid[0] <= 1 / (4 * n_sites)
    assert max(b / a for a, b in itertools.pairwise(grid)) <= 2**0.5 * (1 + 1e-12)


def held_out(settings) -> SubVolumes:
    scans = [scan for scan in read_manifest(settings.data) if scan.split == "test"]
    return prepare(scans, LabelMap.load("coarse"), Grid(32, 1.0), settings.cache_dir, progress=False)


def test_log_likelihood_is_that_of_the_mean_softmax_over_the_samples(settings, networks):
    data, network = held_out(settings), MeshNet.from_posterior(networks["vi"])
    state = torch.get_rng_state()
    log_likelihood, dice = score_network(network, data, n_samples=3, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    image, truth = data[0]  # the whole volume
    probability = torch.zeros(9, 32, 32, 32)
    for k in range(3):
        (weight, bias), (last, last_bias) = network.convolutions(seed_of(5, 0, k))
        hidden = torch.relu(torch.nn.functional.conv3d(image[None], weight, bias, padding=1))
        probability += torch.nn.functional.conv3d(hidden, last, last_bias)[0].detach().softmax(dim=0) / 3
    expected = -torch.nn.functional.nll_loss(probability.log()[None], truth[None]).item()
    assert log_likelihood == pytest.approx(expected, rel=1e-5)
    assert dice == mean_dice(confusion_matrix(truth, probability.argmax(dim=0), 9), with_background=False)


def test_an_impossible_voxel_costs_much_but_not_infinitely_much(settings, networks):
    network = MeshNet.from_posterior(networks["vi"])
    with torch.no_grad():
        network.layers[-1].bias_mu[0] += 1000.0  # certain of background everywhere
    log_likelihood, _ = score_network(network, held_out(settings), n_samples=2)
    assert -1000 < log_likelihood < -100


class FirstCubes:
    """Several volumes of one sub-volume from one: the held-out volume, shifted."""

    sub_volumes_per_volume = 1

    def __init__(self, data: SubVolumes, n: int) -> None:
        self.grid, self.scaling, self.of, self.n = data.grid, lambda _: data.scaling(0), data.volume(0), n

    def __len__(self) -> int:
        return self.n

    def volume(self, v: int) -> tuple[np.ndarray, np.ndarray]:
        image, classes = self.of
        return np.roll(image, 3 * v, -1), np.roll(classes, 3 * v, -1)


def test_leaving_a_site_out_is_judged_against_its_standard_error_over_the_sub_volumes(settings, networks):
    prior = networks["vi"]
    metadata = {**prior.metadata, "prior_sha256": prior.sha256, "n_volumes": 1}
    harmless = Posterior(prior.mu, {n: 0.99 * sigma for n, sigma in prior.sigma.items()}, metadata, name="harmless")
    certain = {name: mu.clone() for name, mu in prior.mu.items()}
    certain[list(certain)[-1]][0] += 30.0  # of background, everywhere
    ruined = Posterior(certain, prior.sigma, metadata, name="ruined")
    consolidation = Consolidation(prior)
    for site in (harmless, ruined):
        consolidation.add(site)
    data = FirstCubes(held_out(settings), 4)
    without_harmless, without_ruined = score_left_out(consolidation, [harmless, ruined], data, n_samples=2)
    network = MeshNet.from_posterior(consolidation.posterior())
    with_all = [score_network(network, FirstCubes(held_out(settings), n), n_samples=2)[0] for n in (1, 2, 3, 4)]
    rest = MeshNet.from_posterior(consolidate(prior, [harmless]))
    without = [score_network(rest, FirstCubes(held_out(settings), n), n_samples=2)[0] for n in (1, 2, 3, 4)]
    sums = [n * (a - b) for n, a, b in zip((1, 2, 3, 4), without, with_all, strict=True)]
    each = torch.tensor(sums).diff(prepend=torch.zeros(1))
    assert without_ruined.gain == pytest.approx(each.mean().item(), rel=1e-3)
    assert without_ruined.standard_error == pytest.approx(each.std().item() / 2, rel=1e-2)
    assert without_ruined.log_likelihood == pytest.approx(without[-1], rel=1e-6)
    assert "without ruined: better without it (+" in str(without_ruined)
    assert abs(without_harmless.gain) < without_ruined.gain / 10
    (alone,) = score_left_out(consolidation, [ruined], FirstCubes(held_out(settings), 1), n_samples=2)
    assert math.isnan(alone.standard_error)
    assert "no clear difference without it (+" in str(alone)
    assert "standard error unknown with one sub-volume)" in str(alone)


def test_a_gain_within_two_standard_errors_is_no_clear_difference():
    assert "no clear difference without it (-0.01000, standard error 0.00600)" in str(LeftOut("a", -1, -0.01, 0.006))
    assert "worse without it (-0.01000, standard error 0.00400)" in str(LeftOut("a", -1, -0.01, 0.004))
    assert "better without it (+0.01000, " in str(LeftOut("a", -1, 0.01, 0.004))


def trained(networks) -> Consolidation:
    consolidation = Consolidation(networks["vi"])
    consolidation.add(networks["a"])
    consolidation.add(networks["b"])
    return consolidation


def test_the_choice_is_the_most_likely_of_the_grid_and_the_same_every_time(settings, networks):
    consolidation, data = trained(networks), held_out(settings)
    chosen, scores = choose_temper(consolidation, data, n_samples=2, progress=False)
    assert tuple(score.temper for score in scores) == (0.0, *temper_grid(2))
    best = max(scores[1:], key=lambda score: score.log_likelihood)
    assert chosen == best.temper
    assert choose_temper(consolidation, data, n_samples=2, progress=False) == (chosen, scores)
    assert consolidation.temper == 1.0
    lines = format_scores(scores, chosen).splitlines()
    assert sum(line.endswith("chosen") for line in lines) == 1
    assert lines[1].endswith("the prior")


def test_a_choice_at_the_end_of_the_grid_is_said_to_be_one():
    scores = [TemperScore(temper, -1 + temper / 10, None) for temper in (0.0, 0.5, 1.0, 2.0)]
    assert "chosen at the end of the grid" in format_scores(scores, 2.0)
    assert "chosen at the end of the grid" not in format_scores(scores, 1.0)


def test_sites_that_learned_what_the_origin_forgot_are_trusted_and_sites_that_unlearned_it_are_not(settings, networks):
    """The prior's means are moved away from the organization's own; one site moves them back, the other moves on."""
    data, prior = held_out(settings), networks["vi"]
    away = {name: sigma * torch.sign(prior.mu[name]) for name, sigma in prior.sigma.items()}
    header = {key: prior.metadata[key] for key in ("architecture", "label_map", "preprocessing")}
    start = Posterior({name: mu - 30 * away[name] for name, mu in prior.mu.items()}, prior.sigma, header, name="start")

    def choice(step: float) -> tuple[float, list[TemperScore]]:
        mu = {name: start.mu[name] + step * away[name] for name in away}
        consolidation = Consolidation(start)
        consolidation.add(Posterior(mu, prior.sigma, {**header, "prior_sha256": start.sha256}, name="site"))
        return choose_temper(consolidation, data, n_samples=2, progress=False)

    chosen, scores = choice(20)
    assert chosen > 1
    assert scores[-1].log_likelihood > scores[0].log_likelihood
    chosen, scores = choice(-20)
    assert chosen == scores[1].temper
    assert "no lambda makes these scans more likely than the prior does" in format_scores(scores, chosen)


@pytest.mark.parametrize("finite", [True, False])
def test_a_likelihood_that_is_no_number_is_never_chosen(settings, networks, monkeypatch, finite):
    scores = iter([(-1.0, 0.5), (math.nan, 0.5), *[(-2.0 if finite else math.nan, 0.5)] * 20])
    monkeypatch.setattr("dwc.tempering.score_network", lambda *_, **__: next(scores))
    arguments = trained(networks), held_out(settings)
    if finite:
        assert choose_temper(*arguments, progress=False)[0] == temper_grid(2)[1]
    else:
        with pytest.raises(InputError, match="no lambda gives a network whose log-likelihood is finite"):
            choose_temper(*arguments, progress=False)
