"""Networks of a study that are computed rather than trained: consolidated, averaged, or freshly initialised."""

from collections.abc import Iterator
from dataclasses import asdict

import pandas as pd
import torch

from dwc.consolidation import Consolidation
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior

__all__ = ["average", "average_means", "consolidate_sites", "fresh_network"]


def consolidate_sites(
    posteriors: Iterator[Posterior], name: str, temper: float = 1.0
) -> tuple[Posterior, pd.DataFrame]:
    """Consolidate a prior (first) and the sites' posteriors; also return each site's weights."""
    consolidation = Consolidation(next(posteriors)).tempered(temper)
    for posterior in posteriors:
        consolidation.add(posterior)
    return consolidation.posterior(name), pd.DataFrame(asdict(row) for row in consolidation.report())


def average_means(posteriors: Iterator[Posterior]) -> Posterior:
    """Average the means of networks with the same architecture, in fp64."""
    first = next(posteriors)
    total, n, n_volumes = {name: mu.double() for name, mu in first.mu.items()}, 1, first.metadata["n_volumes"]
    for posterior in posteriors:
        total = {name: mu + posterior.mu[name] for name, mu in total.items()}
        n, n_volumes = n + 1, n_volumes + posterior.metadata["n_volumes"]
    inherited = {key: first.metadata[key] for key in ("architecture", "label_map", "preprocessing")}
    return Posterior({name: mu / n for name, mu in total.items()}, {}, {**inherited, "n_volumes": n_volumes})


def average(prior: Posterior, posteriors: Iterator[Posterior]) -> Posterior:
    """Federated averaging of Bayesian networks: the mean of their means and of their standard deviations, in fp64."""
    mu, sigma = ({name: torch.zeros_like(t, dtype=torch.float64) for name, t in prior.mu.items()} for _ in range(2))
    n = n_volumes = 0
    for posterior in posteriors:
        for name in mu:
            mu[name] += posterior.mu[name]
            sigma[name] += posterior.sigma[name]
        n, n_volumes = n + 1, n_volumes + posterior.metadata["n_volumes"]
    inherited = {key: prior.metadata[key] for key in ("architecture", "label_map", "preprocessing")}
    means = [{name: total / n for name, total in sums.items()} for sums in (mu, sigma)]
    return Posterior(means[0], means[1], {**inherited, "n_volumes": n_volumes})


def fresh_network(like: Posterior, seed: int) -> Posterior:
    """An untrained deterministic network of the same architecture."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Posterior.from_model(MeshNet.from_architecture(like.metadata["architecture"], bayesian=False))
