import pytest
import torch

from benchmarks.robust_consolidation import KINDS, RULES, _combined, _mixed, _mixes
from dwc.consolidation import Consolidation, consolidate
from dwc.influence import limit_powers, measure
from tests.made_posteriors import a_prior, a_site

PRIOR = a_prior()
SITES = [a_site(PRIOR, seed) for seed in range(5)]


def test_without_a_rule_the_benchmark_combines_as_the_command_does():
    ours, expected = _combined(PRIOR, SITES, RULES["Eq. 17"]), consolidate(PRIOR, SITES, temper=1 / 5)
    for name in PRIOR.mu:
        torch.testing.assert_close(ours.mu[name], expected.mu[name])
        torch.testing.assert_close(ours.sigma[name], expected.sigma[name])


def test_with_a_limit_the_benchmark_combines_as_a_server_does():
    sites = _mixed(PRIOR, SITES, 1, "far: shifts x 1e6")
    consolidation = Consolidation(PRIOR).tempered(1 / 5)
    for site, power in zip(sites, limit_powers([measure(site, PRIOR) for site in sites], 3.0), strict=True):
        if power > 0:
            consolidation.add(site, power=power)
    ours, expected = _combined(PRIOR, sites, RULES["limit 3"]), consolidation.posterior()
    assert consolidation.n_sites == 4
    for name in PRIOR.mu:
        torch.testing.assert_close(ours.mu[name], expected.mu[name])


@pytest.mark.parametrize(("n_bad", "kind"), _mixes())
def test_bad_sites_replace_the_first_ones_and_could_be_consolidated(n_bad, kind):
    sites = _mixed(PRIOR, SITES, n_bad, kind)
    assert sites[n_bad:] == SITES[n_bad:]
    assert all(site is not own for site, own in zip(sites[:n_bad], SITES, strict=False))
    consolidation = Consolidation(PRIOR)
    for site in sites if kind != "copies" else sites[:1]:
        consolidation.add(site)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "+" in kind])
def test_noisy_copies_share_no_tensor(kind):
    one, other, *_, original = (measure(site, PRIOR) for site in _mixed(PRIOR, SITES, 2, kind))
    assert not any(a.copies(b) for a, b in ((one, other), (one, original), (other, original)))
