"""Made-up priors and sites' posteriors with a few weights, for tests of consolidation."""

import torch

from dwc.posterior import Posterior

TENSORS = {"layers.0.weight": (4, 2, 3), "layers.0.bias": (4,)}
HEADER = {"architecture": {"width": 4}, "label_map": {"sha256": "ab"}, "preprocessing": {"grid_size": 32}}


def a_prior(seed: int = 0, scale: float = 0.1) -> Posterior:
    generator = torch.Generator().manual_seed(seed)
    mu = {name: torch.randn(shape, generator=generator) for name, shape in TENSORS.items()}
    sigma = {name: scale * (0.5 + torch.rand(shape, generator=generator)) for name, shape in TENSORS.items()}
    return Posterior(mu, sigma, {**HEADER, "n_volumes": 3}, name="prior")


def a_site(prior: Posterior, seed: int, n_volumes: int = 1, shrink: float = 0.5, **changes) -> Posterior:
    """A posterior trained from `prior`: shifted by about a prior sigma, its sigmas shrunk by up to `shrink`."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mu, sigma = {}, {}
    for name, sigma_0 in prior.sigma.items():
        mu[name] = prior.mu[name] + sigma_0 * torch.randn(sigma_0.shape, generator=generator)
        sigma[name] = sigma_0 * (1 - shrink * torch.rand(sigma_0.shape, generator=generator))
    metadata = {**HEADER, "prior_sha256": prior.sha256, "n_volumes": n_volumes, **changes}
    return Posterior(mu, sigma, metadata, name=f"site {seed}")
