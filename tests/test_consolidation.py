import itertools
import math
import re
import weakref
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dwc.base.errors import InputError
from dwc.consolidation import Consolidation, consolidate
from dwc.posterior import Posterior
from tests.made_posteriors import HEADER, TENSORS, a_prior, a_site


def equation_17(prior: Posterior, sites: list[Posterior], name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Eq. 17 as in the paper, with sums over S and S-1, in fp64."""
    mu_0, var_0 = prior.mu[name].double(), prior.sigma[name].double() ** 2
    less_one = len(sites) - 1
    precision = sum(1 / site.sigma[name].double() ** 2 for site in sites) - less_one / var_0
    shift = sum(site.mu[name].double() / site.sigma[name].double() ** 2 for site in sites) - less_one * mu_0 / var_0
    return shift / precision, (1 / precision).sqrt()


def same(left: Posterior, right: Posterior) -> bool:
    pairs = ((left.mu, right.mu), (left.sigma, right.sigma))
    return all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)


seeds = st.integers(0, 2**20)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, n_sites=st.integers(1, 8), scale=st.sampled_from([1e-4, 1e-3, 1.0]))
def test_it_is_equation_17_to_fp32(seed, n_sites, scale):
    prior = a_prior(seed, scale)
    sites = [a_site(prior, seed + s) for s in range(n_sites)]
    result = consolidate(prior, sites)
    for name in TENSORS:
        mu, sigma = equation_17(prior, sites, name)
        torch.testing.assert_close(result.mu[name], mu.float(), rtol=3e-7, atol=1e-7 * scale)
        torch.testing.assert_close(result.sigma[name], sigma.float(), rtol=3e-7, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, scale=st.sampled_from([1e-6, 1e-3, 1.0, 100.0]))
def test_one_site_gives_that_site_back(seed, scale):
    prior = a_prior(seed, scale)
    site = a_site(prior, seed)
    result = consolidate(prior, [site])
    for name in TENSORS:
        torch.testing.assert_close(result.mu[name], site.mu[name], rtol=1.2e-7, atol=0)
        torch.testing.assert_close(result.sigma[name], site.sigma[name], rtol=1.2e-7, atol=0)


@settings(max_examples=25, deadline=None)
@given(seed=seeds, order=st.permutations(range(5)))
def test_any_order_of_sites_gives_the_same_bits_and_the_same_digest(seed, order):
    prior = a_prior(seed, 1e-3)
    sites = [a_site(prior, seed + s, n_volumes=s + 1) for s in range(5)]
    assert consolidate(prior, [sites[s] for s in order]).sha256 == consolidate(prior, sites).sha256


@settings(max_examples=25, deadline=None)
@given(seed=seeds, shrink=st.sampled_from([0.0, 0.5, 0.999]))
def test_adding_then_removing_a_site_returns_the_start(seed, shrink):
    prior = a_prior(seed)
    kept, gone = a_site(prior, seed), a_site(prior, seed + 1, shrink=shrink)
    consolidation = Consolidation(prior)
    consolidation.add(kept)
    before = consolidation.posterior()
    consolidation.add(gone)
    consolidation.remove(gone)
    assert consolidation.posterior().sha256 == before.sha256
    assert {row.site for row in consolidation.report()} == {kept.name}


def test_a_consolidated_posterior_takes_a_site_later_and_gives_one_back():
    prior = a_prior()
    sites = [a_site(prior, s, n_volumes=s + 1) for s in range(4)]
    later = consolidate(prior, [consolidate(prior, sites[:3]), sites[3]])
    assert later.metadata == consolidate(prior, sites).metadata
    consolidation = Consolidation(prior)
    consolidation.add(later)
    consolidation.remove(sites[1])
    without, expected = consolidation.posterior(), consolidate(prior, [sites[0], *sites[2:]])
    assert without.metadata == expected.metadata
    for name, sigma in expected.sigma.items():
        torch.testing.assert_close(without.sigma[name], sigma, rtol=1e-5, atol=0)
        assert ((without.mu[name] - expected.mu[name]).abs() < 1e-5 * (expected.mu[name].abs() + sigma)).all()


@settings(max_examples=20, deadline=None)
@given(seed=seeds, n_sites=st.integers(1, 4))
def test_in_linear_regression_with_diagonal_design_it_is_the_pooled_posterior(seed, n_sites):
    """With X^T X diagonal, the sites' and the pooled posterior are exact fully factorized Gaussians (FFG)."""
    generator = torch.Generator().manual_seed(seed)
    n_weights, noise = 6, 0.7
    mu_0 = torch.randn(n_weights, generator=generator, dtype=torch.float64)
    sigma_0 = 0.5 + torch.rand(n_weights, generator=generator, dtype=torch.float64)
    prior = Posterior({"w": mu_0}, {"w": sigma_0}, HEADER, name="prior")
    designs = [torch.diag(torch.randn(n_weights, generator=generator, dtype=torch.float64)) for _ in range(n_sites)]
    targets = [torch.randn(n_weights, generator=generator, dtype=torch.float64) for _ in range(n_sites)]

    def exact(design: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        start, width = prior.mu["w"].double(), prior.sigma["w"].double()
        covariance = torch.linalg.inv(design.T @ design / noise**2 + torch.diag(width**-2))
        return covariance @ (design.T @ target / noise**2 + start / width**2), covariance.diagonal().sqrt()

    sites = []
    for design, target in zip(designs, targets, strict=True):
        mu, sigma = exact(design, target)
        # fp32 rounding may raise an unchanged sigma one ulp above the prior's
        sigma = torch.minimum(sigma.float(), prior.sigma["w"])
        metadata = {**HEADER, "prior_sha256": prior.sha256}
        sites.append(Posterior({"w": mu}, {"w": sigma}, metadata, name=f"site {len(sites)}"))
    result = consolidate(prior, sites)
    mu, sigma = exact(torch.cat(designs), torch.cat(targets))
    torch.testing.assert_close(result.mu["w"].double(), mu, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(result.sigma["w"].double(), sigma, rtol=1e-5, atol=0)


def test_two_sites_on_disjoint_halves_equal_one_site_on_both_in_a_conjugate_model():
    """The mean of a Gaussian with known variance: the posteriors of both halves and of all data are exact."""
    data, variance = torch.randn(40, dtype=torch.float64) + 2, 1.5
    prior = Posterior({"w": torch.tensor([0.5])}, {"w": torch.tensor([2.0])}, HEADER)

    def posterior(samples: torch.Tensor) -> Posterior:
        precision = 1 / 4 + len(samples) / variance
        mean = (0.5 / 4 + samples.sum() / variance) / precision
        metadata = {**HEADER, "prior_sha256": prior.sha256, "n_volumes": len(samples)}
        return Posterior({"w": mean[None]}, {"w": torch.tensor([precision**-0.5])}, metadata)

    result, whole = consolidate(prior, [posterior(data[:15]), posterior(data[15:])]), posterior(data)
    torch.testing.assert_close(result.mu, whole.mu, rtol=1e-6, atol=0)
    torch.testing.assert_close(result.sigma, whole.sigma, rtol=1e-6, atol=0)
    assert result.metadata["n_volumes"] == 40


def test_where_sigma_stays_at_the_priors_shifts_add_up_and_the_report_says_so():
    prior = a_prior()
    sites = [a_site(prior, s, shrink=0.0) for s in range(3)]
    consolidation = Consolidation(prior)
    for site in sites:
        consolidation.add(site)
    result = consolidation.posterior()
    for name, mu_0 in prior.mu.items():
        assert torch.equal(result.sigma[name], prior.sigma[name])
        torch.testing.assert_close(result.mu[name], mu_0 + sum(site.mu[name] - mu_0 for site in sites))
    rows = consolidation.report()
    assert len(rows) == len(sites) * len(TENSORS)
    for row in rows:
        assert row.weight == pytest.approx(1)
        assert row.sigma_ratio == pytest.approx(1)
        assert math.isnan(row.added_share)
        assert 0.1 < row.shift < 3


def test_where_sites_are_sure_they_are_averaged_and_their_shares_say_how():
    prior = a_prior()
    sure = {name: sigma / 1000 for name, sigma in prior.sigma.items()}
    surer = {name: sigma / 2000 for name, sigma in prior.sigma.items()}
    one, two = a_site(prior, 1), a_site(prior, 2)
    one, two = Posterior(one.mu, sure, one.metadata, "one"), Posterior(two.mu, surer, two.metadata, "two")
    consolidation = Consolidation(prior)
    consolidation.add(one)
    consolidation.add(two)
    weights = {row.site: row for row in consolidation.report() if row.layer == "layers.0.weight"}
    assert weights["one"].weight == pytest.approx(0.2, rel=1e-4)
    assert weights["two"].weight == pytest.approx(0.8, rel=1e-4)
    assert weights["two"].added_share == pytest.approx(0.8, rel=1e-4)
    assert weights["two"].sigma_ratio == pytest.approx(1 / 2000)
    expected = 0.2 * one.mu["layers.0.weight"] + 0.8 * two.mu["layers.0.weight"]
    torch.testing.assert_close(consolidation.posterior().mu["layers.0.weight"], expected, rtol=1e-4, atol=1e-4)


def test_inputs_stay_as_they_are_and_a_generator_is_read_one_site_at_a_time():
    prior = a_prior()
    sites = [a_site(prior, s) for s in range(3)]
    digests = [posterior.sha256 for posterior in (prior, *sites)]
    consolidation_of_list = consolidate(prior, sites)
    consolidation_of_iterator = consolidate(prior, iter(sites))
    assert consolidation_of_list.sha256 == consolidation_of_iterator.sha256
    assert [posterior.sha256 for posterior in (prior, *sites)] == digests

    def endless() -> Iterator[Posterior]:
        yield sites[0]
        yield a_site(a_prior(9), 1)
        raise AssertionError("read on after a refused site")

    with pytest.raises(InputError, match="was trained from prior"):
        consolidate(prior, endless())


def test_memory_does_not_grow_with_the_sites_for_none_is_held_once_it_is_added():
    prior, gone = a_prior(), []

    def sites() -> Iterator[Posterior]:
        for s in range(20):
            assert all(site() is None for site in gone[:-1])  # all but the one that the loop variable refers to
            site = a_site(prior, s)
            gone.append(weakref.ref(site))
            yield site
            del site

    consolidation = Consolidation(prior)
    for site in sites():
        consolidation.add(site)
    held = sum(part.numel() for sums in consolidation._sums.values() for pair in sums for part in pair)
    assert held == 4 * sum(mu.numel() for mu in prior.mu.values())


def test_the_result_names_prior_sites_and_volumes_and_is_never_wider_than_the_prior():
    prior = a_prior()
    sites = [a_site(prior, s, n_volumes=10 * s) for s in range(1, 4)]
    result = consolidate(prior, sites)
    assert result.metadata["n_volumes"] == 60
    assert result.metadata["prior_sha256"] == prior.sha256
    assert {member["sha256"] for member in result.metadata["sites"]} == {site.sha256 for site in sites}
    assert {key: result.metadata[key] for key in HEADER} == HEADER
    assert all((result.sigma[name] <= prior.sigma[name]).all() for name in TENSORS)


def _altered(change) -> Posterior:
    site = a_site(a_prior(), 1)
    change(site)
    return site


@pytest.mark.parametrize(
    ("site", "words"),
    [
        (a_site(a_prior(5), 1), "was trained from prior"),
        (a_site(a_prior(), 1, prior_sha256=None), "was trained from prior None"),
        (a_site(a_prior(), 1, architecture={"width": 8}), "architecture width 8 differs"),
        (a_site(a_prior(), 1, label_map={"sha256": "cd"}), "label map .* differs"),
        (a_site(a_prior(), 1, preprocessing=None), "preprocessing missing differs"),
        (
            a_site(a_prior(), 1, architecture={"width": 4, "activation": "elu"}),
            "architecture activation elu differs from the prior's activation relu",
        ),
        (
            a_site(a_prior(), 1, preprocessing={"grid_size": 32, "intensity": "min-max per volume"}),
            "preprocessing intensity min-max per volume differs from the prior's intensity z-score per volume",
        ),
        (_altered(lambda s: s.mu["layers.0.bias"].fill_(torch.nan)), r"layers\.0\.bias\.mu holds non-finite"),
        (_altered(lambda s: s.sigma["layers.0.bias"].fill_(torch.inf)), r"layers\.0\.bias\.sigma holds non-finite"),
        (_altered(lambda s: s.sigma["layers.0.bias"].zero_()), r"layers\.0\.bias\.sigma has 4 non-positive"),
        (_altered(lambda s: s.sigma["layers.0.bias"].mul_(9)), r"layers\.0\.bias\.sigma exceeds the prior's in 4 of 4"),
        (_altered(lambda s: (s.mu.pop("layers.0.bias"), s.sigma.pop("layers.0.bias"))), "is not in both"),
        (_altered(lambda s: s.sigma.clear()), "a MAP network has no standard deviations"),
    ],
)
def test_what_does_not_belong_is_refused_by_name(site, words):
    with pytest.raises(InputError, match=rf"^site 1: .*{words}"):
        consolidate(a_prior(), [site])


def test_a_label_map_of_another_name_is_the_same_by_its_content():
    prior = a_prior()
    site = a_site(prior, 1, label_map={"sha256": "ab", "name": "ours"})
    assert consolidate(prior, [site]).metadata["label_map"] == prior.metadata["label_map"]


def test_a_site_whose_header_names_what_earlier_versions_left_out_goes_with_their_prior():
    prior = a_prior()
    site = a_site(
        prior, 1, architecture={"width": 4, "activation": "relu"},
        preprocessing={"grid_size": 32, "intensity": "z-score per volume"},
    )  # fmt: skip
    assert consolidate(prior, [site]).metadata["architecture"] == prior.metadata["architecture"]


def test_sigma_above_the_priors_by_one_ulp_is_refused_and_at_it_is_not():
    prior = a_prior()
    site = a_site(prior, 1, shrink=0.0)
    consolidate(prior, [site])
    sigma = site.sigma["layers.0.bias"]
    sigma[2] = torch.nextafter(sigma[2], torch.tensor(torch.inf))
    with pytest.raises(InputError, match=r"layers\.0\.bias\.sigma exceeds the prior's in 1 of 4"):
        consolidate(prior, [site])


def test_a_site_counts_once_alone_or_inside_a_consolidated_one():
    prior = a_prior()
    one, two = a_site(prior, 1), a_site(prior, 2)
    with pytest.raises(InputError, match="this site has been added already"):
        consolidate(prior, [one, two, one])
    with pytest.raises(InputError, match="this site has been added already"):
        consolidate(prior, [consolidate(prior, [one, two]), two])


def test_no_site_and_a_map_prior_are_refused():
    prior = a_prior()
    with pytest.raises(InputError, match="no posterior to consolidate"):
        consolidate(prior, [])
    with pytest.raises(InputError, match="a MAP network has no standard deviations"):
        consolidate(Posterior(prior.mu, {}, HEADER), [])


def test_a_removal_that_leaves_no_precision_names_tensor_site_and_count_and_changes_nothing():
    prior = a_prior()
    site = a_site(prior, 1)
    wider = consolidate(prior, [site, a_site(prior, 2, shrink=0.0)])
    wider.sigma["layers.0.bias"][:3] = prior.sigma["layers.0.bias"][:3]  # as in a file that was tampered with
    site.sigma["layers.0.bias"][:3] /= 100
    members = [{"sha256": site.sha256, "n_volumes": 1}]
    forged = Posterior(wider.mu, wider.sigma, {**wider.metadata, "n_volumes": 1, "sites": members})
    consolidation = Consolidation(prior)
    consolidation.add(forged)
    before = consolidation.posterior()
    with pytest.raises(InputError, match=r"^site 1: layers\.0\.bias is left with precision <= 0 in 3 of 4 weights"):
        consolidation.remove(site)
    assert consolidation.posterior().sha256 == before.sha256
    with pytest.raises(InputError, match="is not in the consolidation"):
        consolidation.remove(a_site(prior, 7))


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_removal_in_any_order_returns_the_one_left(order):
    prior = a_prior(3, 1e-3)
    sites = [a_site(prior, s) for s in range(3)]
    consolidation = Consolidation(prior)
    for site in sites:
        consolidation.add(site)
    for s in order[:2]:
        consolidation.remove(sites[s])
    assert same(consolidation.posterior(), consolidate(prior, [sites[order[2]]]))


@pytest.mark.parametrize("sites", [3, ["ab"], [{"sha256": "ab"}], [{"sha256": "ab", "n_volumes": "many"}], {"a": 1}])
def test_a_header_whose_list_of_sites_cannot_be_read_is_refused_by_name(sites):
    with pytest.raises(InputError, match=r"^site 1: its header's list of sites cannot be read"):
        consolidate(a_prior(), [a_site(a_prior(), 1, sites=sites)])


def test_a_header_with_a_power_that_cannot_be_is_refused_by_name():
    site = a_site(a_prior(), 1, sites=[{"sha256": "ab", "n_volumes": 1, "temper": -1}])
    with pytest.raises(InputError, match=r"^site 1: its header gives a site power -1"):
        consolidate(a_prior(), [site])


def test_a_file_of_which_a_site_was_removed_is_weighed_no_more():
    prior = a_prior()
    one, two, three = (a_site(prior, s) for s in range(1, 4))
    merged = consolidate(prior, [one, two])
    consolidation = Consolidation(prior)
    consolidation.add(merged)
    consolidation.add(three)
    assert {row.site for row in consolidation.report()} == {merged.name, three.name}
    consolidation.remove(one)
    assert {row.site for row in consolidation.report()} == {three.name}


@settings(max_examples=25, deadline=None)
@given(seed=seeds, sure=st.sampled_from([0.5, 1e-1, 1e-4, 1e-6]))
def test_taking_a_site_out_of_a_file_is_exact_to_the_stated_bound_or_refused(seed, sure):
    """Files are fp32: the more precise the removed site, the more of the others' means was lost to rounding."""
    prior = a_prior(seed)
    kept, gone = a_site(prior, seed), a_site(prior, seed + 1)
    gone = Posterior(gone.mu, {name: sure * sigma for name, sigma in prior.sigma.items()}, gone.metadata, "gone")
    consolidation = Consolidation(prior)
    consolidation.add(consolidate(prior, [kept, gone]))
    if sure < 1e-3:
        with pytest.raises(InputError, match=r"gone: cannot be taken out of a consolidated file.*by up to .*"):
            consolidation.remove(gone)
        return
    consolidation.remove(gone)
    without = consolidation.posterior()
    for name, sigma in kept.sigma.items():
        assert ((without.mu[name] - kept.mu[name]).abs() <= 0.01 * sigma).all()
        assert ((without.sigma[name] / sigma - 1).abs() <= 0.01).all()


def test_a_confident_site_cannot_be_taken_out_of_a_file_but_out_of_the_files_it_came_from():
    prior = a_prior()
    kept, gone = a_site(prior, 1), a_site(prior, 2)
    gone = Posterior(gone.mu, {name: 1e-4 * sigma for name, sigma in prior.sigma.items()}, gone.metadata, "gone")
    from_file = Consolidation(prior)
    from_file.add(consolidate(prior, [kept, gone]))
    before = from_file.posterior()
    with pytest.raises(InputError, match=r"layers\.0\.\w+ would be off by up to .* sigma, more than 0\.01"):
        from_file.remove(gone)
    assert from_file.posterior().sha256 == before.sha256
    from_sites = Consolidation(prior)
    for site in (kept, gone):
        from_sites.add(site)
    from_sites.remove(gone)
    assert from_sites.posterior().sha256 == consolidate(prior, [kept]).sha256


@settings(max_examples=20, deadline=None)
@given(seed=seeds, first=st.floats(1e-6, 1.0), second=st.floats(1e-6, 1.0))
def test_sites_with_powers_of_their_own_enter_with_them_and_leave_no_trace(seed, first, second):
    prior = a_prior(seed)
    one, two = a_site(prior, seed), a_site(prior, seed + 1)
    consolidation = Consolidation(prior)
    consolidation.add(one, power=first)
    alone = consolidation.posterior()
    consolidation.add(two, power=second)
    both = consolidation.posterior()
    for name in TENSORS:
        ours, theirs = prior.sigma[name].double().pow(-2), [s.sigma[name].double().pow(-2) for s in (one, two)]
        precision = ours + first * (theirs[0] - ours) + second * (theirs[1] - ours)
        torch.testing.assert_close(both.sigma[name], precision.rsqrt().float(), rtol=1e-6, atol=0)
    assert [member["temper"] for member in alone.metadata["sites"]] == [first]
    consolidation.remove(two)
    assert consolidation.posterior().sha256 == alone.sha256


def test_volumes_that_no_site_has_are_refused_before_their_sum_breaks_the_file():
    with pytest.raises(InputError, match="n_volumes '9007199254740991' is not a count"):
        consolidate(a_prior(), [a_site(a_prior(), 1, n_volumes=2**53 - 1), a_site(a_prior(), 2)])
    most = consolidate(a_prior(), [a_site(a_prior(), seed, n_volumes=10**9) for seed in range(3)])
    assert most.validate().metadata["n_volumes"] == 3 * 10**9


def sure_of(prior: Posterior, seed: int, ratio: float) -> Posterior:
    site = a_site(prior, seed)
    return Posterior(
        site.mu, {name: ratio * sigma for name, sigma in prior.sigma.items()}, site.metadata, f"sure {seed}"
    )


def test_removing_a_consolidated_file_counts_the_rounding_of_that_file_too():
    prior = a_prior()
    kept, gone = a_site(prior, 1), [sure_of(prior, seed, 1e-3) for seed in (2, 3)]
    merged = consolidate(prior, gone)
    consolidation = Consolidation(prior)
    for site in (kept, *gone):
        consolidation.add(site)
    before = consolidation.posterior()
    with pytest.raises(InputError, match=r"would be off by up to .* sigma, more than 0\.01"):
        consolidation.remove(merged)
    assert consolidation.posterior().sha256 == before.sha256
    for site in gone:
        consolidation.remove(site)
    assert consolidation.posterior().sha256 == consolidate(prior, [kept]).sha256


@settings(max_examples=25, deadline=None)
@given(seed=seeds, sure=st.sampled_from([0.5, 1e-1, 1e-2, 1e-3, 1e-4]), temper=st.sampled_from([0.25, 1.0, 2.0]))
def test_what_is_left_after_removing_a_consolidated_file_is_exact_to_the_stated_bound_or_refused(seed, sure, temper):
    prior = a_prior(seed)
    kept, gone = a_site(prior, seed), [sure_of(prior, seed + n, sure) for n in (1, 2)]
    consolidation = Consolidation(prior).tempered(temper)
    for site in (kept, *gone):
        consolidation.add(site)
    try:
        consolidation.remove(consolidate(prior, gone))
    except InputError as error:
        assert re.search(r"more than 0\.01|precision <= 0", str(error))  # noqa: PT017
        return
    less, expected = consolidation.posterior(), consolidate(prior, [kept], temper=temper)
    for name, sigma in expected.sigma.items():
        assert ((less.mu[name] - expected.mu[name]).abs() <= 0.01 * sigma).all()
        assert ((less.sigma[name] / sigma - 1).abs() <= 0.01).all()


def test_the_very_file_that_was_added_is_removed_without_a_trace():
    prior = a_prior()
    kept, merged = a_site(prior, 1), consolidate(prior, [sure_of(prior, seed, 1e-4) for seed in (2, 3)])
    consolidation = Consolidation(prior)
    consolidation.add(kept)
    consolidation.add(merged)
    consolidation.remove(merged)
    assert consolidation.posterior().sha256 == consolidate(prior, [kept]).sha256


def test_a_lambda_chosen_after_a_removal_is_held_to_the_same_bound():
    prior = a_prior()
    kept, gone = a_site(prior, 1), a_site(prior, 2)
    for ratio in (2e-3, 4e-3, 8e-3, 2e-2, 4e-2):  # the surest site that can be removed with lambda = 1
        gone = sure_of(prior, 2, ratio)
        consolidation = Consolidation(prior)
        consolidation.add(consolidate(prior, [kept, gone]))
        try:
            consolidation.remove(gone)
        except InputError:
            continue
        with pytest.raises(InputError, match="what was removed cannot be taken out"):
            consolidation.tempered(1e4).posterior()
        consolidation.posterior()
        return
    raise AssertionError("no removal was within the bound")
