"""Damping that chooses itself: raised while the held-out scans clearly get more likely; a round that falls is told."""

import math
from itertools import pairwise

import pytest
import torch

from dwc import damping as module
from dwc.base.errors import InputError
from dwc.damping import choose_damping, doubled, format_trials, worse
from dwc.posterior import Posterior
from dwc.site_factors import Factors
from tests.made_posteriors import a_prior, a_site


@pytest.fixture
def after():
    """What makes the factors after a round, of one site."""
    prior = a_prior()

    def make(damping: float) -> Factors:
        factors = Factors(prior)
        factors.replace("N", a_site(prior, 1), damping=damping)
        return factors

    return make


def scored(monkeypatch, after, likelihood, spread: float = 0.0) -> None:
    """Let the likelihood of held-out scans be this function of the damping, 0 for the network before."""
    dampings = {Factors(a_prior()).posterior().sha256: 0.0}
    dampings |= {after(value).posterior().sha256: value for value in (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)}

    def score(posterior: Posterior, data, **options) -> tuple[torch.Tensor, float]:
        value = likelihood(dampings[posterior.sha256])
        noise = spread * torch.tensor([1.0, -1.0, 2.0, -2.0], dtype=torch.float64) * dampings[posterior.sha256]
        return 8 * (value + noise), 8.0

    monkeypatch.setattr(module, "score_sub_volumes", score)


@pytest.mark.parametrize(("peak", "chosen"), [(1 / 16, 1 / 16), (0.26, 1 / 4), (0.5, 1 / 2), (3.0, 1.0)])
def test_damping_is_doubled_from_one_over_s_while_the_likelihood_rises(monkeypatch, after, peak, chosen):
    scored(monkeypatch, after, lambda damping: torch.full((4,), -((damping - peak) ** 2), dtype=torch.float64))
    found = choose_damping(a_prior(), after, doubled(16), None)
    assert found.trial.damping == chosen
    assert found.factors.posterior().sha256 == after(chosen).posterior().sha256
    assert found.trial.gain == pytest.approx(peak**2 - (chosen - peak) ** 2)
    assert f"{chosen:>8.3g}" in next(line for line in format_trials(found).splitlines() if "chosen" in line)
    tried = [trial.damping for trial in found.trials]
    assert tried == doubled(16)[: len(tried)]
    assert len(tried) <= doubled(16).index(chosen) + 2  # it stops at the first that is not better


def test_a_rise_within_the_noise_does_not_raise_the_damping(monkeypatch, after):
    scored(monkeypatch, after, lambda damping: torch.full((4,), 0.01 * damping, dtype=torch.float64), spread=1.0)
    assert choose_damping(a_prior(), after, doubled(16), None).trial.damping == 1 / 16


@pytest.mark.parametrize(("slope", "spread", "is_worse"), [(-1.0, 0.1, True), (-0.1, 1.0, False), (1.0, 0.1, False)])
def test_a_round_is_called_worse_only_beyond_its_noise(monkeypatch, after, slope, spread, is_worse):
    scored(monkeypatch, after, lambda damping: torch.full((4,), slope * damping, dtype=torch.float64), spread=spread)
    (trial,) = choose_damping(a_prior(), after, [0.25], None).trials
    assert trial.is_worse is is_worse
    assert f"{trial.gain:+.5f}" in worse(trial)


@pytest.mark.parametrize("n_sites", [1, 2, 3, 16, 64])
def test_the_dampings_begin_at_one_over_s_and_end_at_one(n_sites):
    dampings = doubled(n_sites)
    assert dampings[0] == 1 / n_sites
    assert dampings[-1] == 1
    assert all(after <= 2 * before for before, after in pairwise(dampings))


def test_with_a_single_sub_volume_the_error_is_a_number_that_json_can_hold(monkeypatch, after):
    monkeypatch.setattr(module, "score_sub_volumes", lambda posterior, data, **options: (torch.ones(1).double(), 8.0))
    (trial,) = choose_damping(a_prior(), after, [1.0], None).trials
    assert math.isfinite(trial.standard_error)


def test_a_damping_that_breaks_the_network_is_not_chosen(monkeypatch, after):
    scored(monkeypatch, after, lambda damping: torch.full((4,), math.nan if damping > 1 / 4 else damping).double())
    assert choose_damping(a_prior(), after, doubled(16), None).trial.damping == 1 / 4


@pytest.mark.parametrize("broken", [0.0, 0.25])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_likelihood_that_is_not_finite_is_an_error_and_no_verdict(monkeypatch, after, broken, value):
    scored(monkeypatch, after, lambda damping: torch.full((4,), value if damping == broken else 0.1).double())
    with pytest.raises(InputError, match="held-out scans is not finite"):
        choose_damping(a_prior(), after, [0.25], None)
