"""Natural parameters of posteriors, sums of them that keep their rounding error, and which posteriors may be added."""

from typing import TypeAlias

from torch import Tensor

from dwc.base.errors import InputError, difference
from dwc.posterior import Posterior

__all__ = ["SHARED", "Sum", "check_alike", "check_answer", "natural", "two_sum"]

SHARED = ("architecture", "label_map", "preprocessing")  # header entries that networks must share to be multiplied
Sum: TypeAlias = tuple[Tensor, Tensor]  # fp64 sum and its rounding error


def natural(posterior: Posterior, name: str) -> tuple[Tensor, Tensor]:
    """(mu / sigma^2, 1 / sigma^2) of a tensor in fp64."""
    precision = posterior.sigma[name].double().pow(-2)
    return posterior.mu[name].double() * precision, precision


def two_sum(total: tuple[Tensor, Tensor | float], term: Tensor) -> Sum:
    """Add a term to (sum, rounding error) and keep what the sum rounds away (Knuth's TwoSum)."""
    high, low = total
    new = high + term
    virtual = new - high
    return new, low + ((high - (new - virtual)) + (term - virtual))


def check_alike(posterior: Posterior, prior: Posterior) -> None:
    """Refuse a posterior of another architecture, label map or preprocessing than the prior's."""
    for key in SHARED:
        if posterior.shared(key) != prior.shared(key):
            theirs, ours = difference(posterior.entry(key), prior.entry(key))
            raise InputError(
                f"{posterior.name}: {key.replace('_', ' ')} {theirs} differs from the prior's {ours}; "
                "give sites trained alike"
            )
    if odd := posterior.mu.keys() ^ prior.mu.keys():
        raise InputError(f"{posterior.name}: {min(odd)} is not in both this file and {prior.name}")
    for name, like in prior.mu.items():
        if (shape := list(posterior.mu[name].shape)) != list(like.shape):
            raise InputError(f"{posterior.name}: {name} has shape {shape}, not {list(like.shape)}")


def check_answer(site: Posterior, prior: Posterior, prior_sha256: str) -> None:
    """Refuse a site's posterior that was not trained from this prior, or with sigma above the prior's."""
    if not prior.is_bayesian:
        raise InputError(f"{prior.name}: a MAP network has no standard deviations; give the sites' Bayesian prior")
    if not site.validate().is_bayesian:
        raise InputError(f"{site.name}: a MAP network has no standard deviations; train with `mode` vcl")
    trained_from = site.metadata.get("prior_sha256")
    if trained_from != prior_sha256:
        raise InputError(
            f"{site.name}: was trained from prior {str(trained_from)[:12]}, not from {prior.name} "
            f"({prior_sha256[:12]}); give the prior that the sites started from"
        )
    check_alike(site, prior)
    for name, sigma_0 in prior.sigma.items():
        if above := int((site.sigma[name] > sigma_0).sum()):
            raise InputError(
                f"{site.name}: {name}.sigma exceeds the prior's in {above} of {sigma_0.numel()} weights, "
                "where Eq. 17 may not be defined; train with `mode` vcl, which keeps sigma <= sigma_0"
            )
