import math
import re
from dataclasses import replace

import pytest
import torch

from dwc.base.errors import InputError
from dwc.influence import Influence, limit_powers, limited_because, measure, verdicts, warnings_about
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


WIDE = Posterior({"w": torch.zeros(3000)}, {"w": torch.full((3000,), 0.1)}, {})


def learned(
    number: int, noise: float = 1.0, sign: float = 1.0, of: int | None = None, shared: float = 1.0
) -> Influence:
    """A site that learned what all learn (`WIDE`'s weights moved alike) and something of its own."""
    common = torch.randn(3000, generator=torch.Generator().manual_seed(99))
    own = torch.randn(3000, generator=torch.Generator().manual_seed(number if of is None else of))
    added = noise * torch.randn(3000, generator=torch.Generator().manual_seed(500 + number))
    shift = sign * (shared * common + own) + (added if of is not None else 0)
    sigma = torch.full((3000,), 0.07) * (1 - 0.01 * torch.rand(3000, generator=torch.Generator().manual_seed(number)))
    return measure(Posterior({"w": 0.1 * shift}, {"w": sigma}, {"n_volumes": 2}), WIDE)


def test_honest_sites_that_learned_much_the_same_are_not_warned_of():
    assert warnings_about({str(number): learned(number) for number in range(5)}) == {}


@pytest.mark.parametrize("n_bad", [1, 2])
def test_flipped_signs_of_ordinary_size_are_found_and_honest_sites_are_not_accused(n_bad):
    found = {str(number): learned(number, sign=-1 if number < n_bad else 1) for number in range(5)}
    expected = {str(number): ["its means move against those of the other sites"] for number in range(n_bad)}
    assert warnings_about(found) == expected
    assert limit_powers(list(found.values()), 3.0) == [1.0] * 5  # their size is ordinary
    assert "agreement -0." in verdicts(found)["0"]


def test_a_loud_site_does_not_make_the_others_look_opposed_to_it():
    honest = {str(number): learned(number) for number in range(4)}
    opposite = -torch.randn(3000, generator=torch.Generator().manual_seed(99))
    loud = measure(Posterior({"w": 3 * opposite}, {"w": torch.full((3000,), 1e-4)}, {"n_volumes": 2}), WIDE)
    assert warnings_about({**honest, "loud": loud}).keys() == {"loud"}


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("n_copies", [1, 2])
def test_copies_of_another_sites_posterior_are_found_under_added_noise(noise, n_copies):
    found = {str(number): learned(number) for number in range(4)}
    for number in range(10, 10 + n_copies):
        found[f"copy {number}"] = learned(number, noise, of=3)
    warned = warnings_about(found)
    assert warned.keys() == {"3", *(f"copy {number}" for number in range(10, 10 + n_copies))}
    assert all("as a copy with noise would" in lines[0] for lines in warned.values())
    assert "its means move like those of 3" in warned["copy 10"][0]


def test_a_copy_with_noise_and_one_weight_far_away_is_found_as_well():
    site = learned(3)
    moved = torch.zeros(3000)
    moved[17] = 1000.0
    common = torch.randn(3000, generator=torch.Generator().manual_seed(99))
    own = torch.randn(3000, generator=torch.Generator().manual_seed(3))
    copy = measure(Posterior({"w": 0.1 * (common + own + moved)}, {"w": torch.full((3000,), 0.0701)}, {}), WIDE)
    found = {**{str(number): learned(number) for number in range(3)}, "3": site, "copy": copy}
    assert any("its means move like those of 3 (" in line for line in warnings_about(found)["copy"])


def test_precision_that_the_claimed_volumes_do_not_explain_is_a_warning_and_much_data_is_not():
    honest = {str(seed): replace(one, precision=2.0, n_volumes=10) for seed, one in enumerate(sites(4).values())}
    greedy = replace(honest["0"], precision=5.0, n_volumes=3, fingerprints=())
    said = warnings_about({**honest, "greedy": greedy})["greedy"]
    assert "it brings 38% of the added precision for 7% of the claimed volumes" in said
    large = replace(greedy, n_volumes=25, precision=5.0)
    assert not any("of the claimed volumes" in line for line in warnings_about({**honest, "l": large}).get("l", ()))


def test_a_larger_site_that_is_limited_is_said_to_be_with_the_amount_and_what_its_volumes_explain():
    honest = [replace(one, precision=2.0, shift=1.0, n_volumes=10) for one in sites(4).values()]
    large, greedy = (replace(honest[0], precision=10.0, n_volumes=n_volumes) for n_volumes in (60, 10))
    for own, verdict in (
        (
            large,
            "5 times the influence of the median site for 6 times its volumes, as its volumes would explain;",
        ),
        (greedy, "5 times the influence of the median site for 1 times its volumes, more than its volumes explain"),
    ):
        powers = limit_powers([*honest, own], 3.0)
        assert powers == [1.0] * 4 + [pytest.approx(0.6)]
        reasons = limited_because([*honest, own], powers)
        assert reasons[:4] == [""] * 4
        assert reasons[4].startswith(verdict)


def test_a_state_file_with_an_odd_influence_is_an_error_of_one_line():
    values = measure(a_site(PRIOR, 1), PRIOR).to_json()
    for odd in ({**values, "shift_sketch": 3}, {**values, "more": 1}, {**values, "pull_sketch": "a b"}, {"kl": 1.0}):
        with pytest.raises(InputError, match=r"influence of a site in the state file: .*; restore it from a backup"):
            Influence.from_json(odd)


def test_honest_sites_among_sites_of_noise_are_not_taken_for_copies_of_each_other():
    found = {str(number): learned(number, shared=1.7) for number in range(3)}
    for number in (10, 11):
        noise = 3 * torch.randn(3000, generator=torch.Generator().manual_seed(number))
        found[f"noise {number}"] = measure(
            Posterior({"w": 0.1 * noise}, {"w": torch.full((3000,), 0.07)}, {"n_volumes": 2}), WIDE
        )
    assert not any("as a copy" in line for lines in warnings_about(found).values() for line in lines)


def with_one_weight(seed: int, tensor: str, shift: float, ratio: float) -> Posterior:
    """A site that learned as others did, but for one weight, whose shift and sigma are given in sigma_0."""
    site = a_site(PRIOR, seed)
    site.mu[tensor].view(-1)[0] = PRIOR.mu[tensor].view(-1)[0] + shift * PRIOR.sigma[tensor].view(-1)[0]
    site.sigma[tensor].view(-1)[0] = ratio * PRIOR.sigma[tensor].view(-1)[0]
    return site


STEERING = [(90.0, 1.0), (90.0, 0.1), (-90.0, 0.1), (5.0, 0.01), (0.0, 0.01), (30.0, 1.0)]


@pytest.mark.parametrize("tensor", ["layers.0.bias", "layers.0.weight"])
@pytest.mark.parametrize(
    ("shift", "ratio"), [(90.0, 1.0), (90.0, 0.1), (-90.0, 0.1), (5.0, 0.01), (0.0, 1e-2), (30, 1)]
)
def test_a_site_that_changes_one_weight_alone_is_limited_and_warned_of_by_its_tensor(tensor, shift, ratio):
    influences = {**sites(4), "steers": measure(with_one_weight(9, tensor, shift, ratio), PRIOR)}
    powers = limit_powers(list(influences.values()), 3.0)
    assert powers[:4] == [1.0] * 4
    assert powers[4] < 1
    assert re.search(
        rf"times the influence of the median site( in {tensor})? for 1 times its volumes, more than",
        limited_because(list(influences.values()), powers)[4],
    )
    found = warnings_about(influences)
    assert found.keys() == {"steers"}
    assert any(tensor in line or "a mean is" in line or "times" in line for line in found["steers"])


def test_one_weight_of_a_large_network_is_not_lost_in_its_mean():
    """In a network of 1.5 million weights, one bias of 50 moved by 90 sigma_0."""
    prior = Posterior(
        {"w": torch.zeros(500_000), "b": torch.zeros(50)}, {"w": torch.ones(500_000), "b": torch.ones(50)}, {}
    )

    def site(seed: int, steers: bool = False) -> Influence:
        generator = torch.Generator().manual_seed(seed)
        mu = {name: torch.randn(sigma.shape, generator=generator) for name, sigma in prior.sigma.items()}
        sigma = {name: 0.5 + 0.4 * torch.rand(s.shape, generator=generator) for name, s in prior.sigma.items()}
        if steers:
            mu["b"][7], sigma["b"][7] = 90.0, 0.1
        return measure(Posterior(mu, sigma, {"n_volumes": 3}), prior)

    found = {**{str(seed): site(seed) for seed in range(4)}, "steers": site(4, steers=True)}
    assert found["steers"].shift < 10 * found["0"].shift
    assert limit_powers(list(found.values()), 3.0)[:4] == [1.0] * 4
    assert limit_powers(list(found.values()), 3.0)[4] == 0  # would have to be weakened more than a hundredfold
    warned = warnings_about(found)
    assert warned.keys() == {"steers"}
    assert any(line.startswith("in b, one ") for line in warned["steers"])


def test_what_a_limited_site_does_with_one_weight_is_at_most_nine_times_the_usual():
    influences = [*sites(4).values(), measure(with_one_weight(9, "layers.0.bias", 90.0, 1.0), PRIOR)]
    power = limit_powers(influences, 3.0)[-1]
    usual = sorted(one.tensors["layers.0.bias"].strongest for one in influences)[2]
    assert 0 < power < 1
    assert power * influences[-1].tensors["layers.0.bias"].strongest <= 9 * usual * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-1, 1e-2, 1e-4])
def test_after_short_trainings_a_site_is_limited_to_the_same_multiple_of_the_median(scale):
    def barely(seed: int, more: float = 1.0) -> Influence:
        site = a_site(PRIOR, seed)
        mu = {n: PRIOR.mu[n] + more * scale * (site.mu[n] - PRIOR.mu[n]) for n in PRIOR.mu}
        sigma = {n: PRIOR.sigma[n] * (site.sigma[n] / PRIOR.sigma[n]) ** scale for n in PRIOR.mu}
        return measure(Posterior(mu, sigma, site.metadata), PRIOR)

    influences = [*(barely(seed) for seed in range(4)), barely(9, more=20.0)]
    powers = limit_powers(influences, 3.0)
    median = sorted(one.shift for one in influences)[2]
    assert powers[:4] == [1.0] * 4
    assert powers[4] * influences[4].shift <= 3.0 * median * (1 + 1e-9)
    assert "it pulls the means" in " ".join(warnings_about({str(n): one for n, one in enumerate(influences)})["4"])


def test_honest_sites_of_unequal_size_are_neither_limited_nor_warned_of_in_one_tensor():
    """Of 500 sites in 100 rounds, with 1 to 3 volumes and as much more precision."""
    limited, warned = 0, 0
    for number in range(100):
        prior = a_prior(number)
        found = {}
        for size in (1, 2, 2, 2, 3):
            site = a_site(prior, 10 * number + len(found), n_volumes=size, shrink=0.2 + 0.1 * size)
            found[str(len(found))] = measure(site, prior)
        limited += sum(power < 1 for power in limit_powers(list(found.values()), 3.0))
        warned += sum(line.startswith("in layers.") for lines in warnings_about(found).values() for line in lines)
    assert limited <= 5
    assert warned <= 5
