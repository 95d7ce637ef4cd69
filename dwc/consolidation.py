"""Distributed weight consolidation: sites' posteriors, each trained from one prior, become one posterior (Eq. 17).

In natural parameters, eta = (mu / sigma^2, 1 / sigma^2), Eq. 17 is a sum, q = prior + sum_s (q_s - prior): sites stream
through one at a time in constant memory, in any order, and one can be added later or taken out again. The room refuses
what does not belong together and reports each site's weight per layer. It trains nothing and reads no files.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dwc.errors import InputError, brief
from dwc.posterior import Posterior

__all__ = ["Consolidation", "LayerWeight", "consolidate"]

_SHARED = ("architecture", "label_map", "preprocessing")


@dataclass(frozen=True)
class LayerWeight:
    """What one site brings to one tensor of the consolidated posterior.

    Attributes
    ----------
    site, layer : str
        The posterior's name and the tensor's.
    weight : float
        The site's precision over the consolidated precision, each summed over the tensor: the factor with which the
        site's means enter. Weights of 1/S average the sites' means; weights of 1, as when sigma stays at its prior's
        value, add up their shifts from the prior.
    added_share : float
        The site's share of the precision that all sites together add to the prior's; NaN if they add none.
    sigma_ratio : float
        Median of sigma_s / sigma_0.
    shift : float
        Median of |mu_s - mu_0| / sigma_0.
    """

    site: str
    layer: str
    weight: float
    added_share: float
    sigma_ratio: float
    shift: float


class Consolidation:
    """The running sum of Eq. 17: `add` and `remove` sites, then take the `posterior`.

    Sums are kept in fp64 together with their rounding errors, so that the fp32 result does not depend on the order of
    the sites, and a site that is removed leaves no trace. A consolidated posterior of the same prior may itself be
    added, as the sites it is made of; any of them can then be removed.

    Parameters
    ----------
    prior : Posterior
        The posterior from which every site trained, q^{T-1} in Eq. 11.

    Raises
    ------
    InputError
        If the prior is a MAP network or no proper distribution.
    """

    def __init__(self, prior: Posterior) -> None:
        if not prior.validate().is_bayesian:
            raise InputError(f"{prior.name}: a MAP network has no standard deviations; give the sites' Bayesian prior")
        self.prior = prior
        self._prior_sha256 = prior.sha256
        self._n_volumes: dict[str, int] = {}  # per site's digest: who is in
        self._rows: dict[str, tuple[str, dict[str, tuple[float, float, float]]]] = {}  # digest: name, report by tensor
        self._eta = {name: tuple((part, torch.zeros_like(part)) for part in _natural(prior, name)) for name in prior.mu}

    def add(self, site: Posterior) -> None:
        """Multiply a site's posterior in and divide by the prior (Eq. 11).

        Raises
        ------
        InputError
            If the site's prior, architecture, label map, preprocessing or tensors are not this prior's, a value is not
            finite, a sigma is not in (0, sigma_0], or the site is in already.
        """
        self._check(site)
        members = _members(site)
        if members.keys() & self._n_volumes.keys():
            raise InputError(f"{site.name}: this site is in already; give each site's posterior once")
        self._accumulate(site, sign=1)
        self._n_volumes.update(members)
        prior = self.prior
        tensors = {
            name: (
                site.sigma[name].double().pow(-2).sum().item(),
                (site.sigma[name].double() / prior.sigma[name]).median().item(),
                ((site.mu[name].double() - prior.mu[name]).abs() / prior.sigma[name]).median().item(),
            )
            for name in prior.mu
        }
        self._rows[site.sha256] = (site.name, tensors)

    def remove(self, site: Posterior) -> None:
        """Divide a site's posterior out again and multiply by the prior.

        Raises
        ------
        InputError
            If the site is not in, or its removal leaves a precision <= 0.
        """
        self._check(site)
        members = _members(site)
        if not members.keys() <= self._n_volumes.keys():
            raise InputError(f"{site.name}: this site is not in and cannot be removed; give one of the sites added")
        self._accumulate(site, sign=-1)
        for digest in members:
            del self._n_volumes[digest]
        self._rows.pop(site.sha256, None)

    def posterior(self, name: str = "consolidated") -> Posterior:
        """The consolidated posterior; its metadata names the prior, the sites' digests and all their volumes.

        Raises
        ------
        InputError
            If no site is in.
        """
        if not self._n_volumes:
            raise InputError("no posterior to consolidate; give at least one site's posterior")
        mu, sigma = {}, {}
        for tensor, (shift, precision) in self._eta.items():
            eta_1, eta_2 = sum(shift), sum(precision)
            mu[tensor], sigma[tensor] = eta_1 / eta_2, eta_2.rsqrt()
        inherited = {key: self.prior.metadata.get(key) for key in _SHARED}
        sites = [{"sha256": digest, "n_volumes": n} for digest, n in sorted(self._n_volumes.items())]
        metadata = {
            **inherited,
            "n_volumes": sum(self._n_volumes.values()),
            "prior_sha256": self._prior_sha256,
            "sites": sites,
        }
        return Posterior(mu, sigma, metadata, name=name).validate()

    def report(self) -> list[LayerWeight]:
        """Each site's weight in each tensor, in the order of `add`."""
        rows = []
        for site, tensors in self._rows.values():
            for layer, (precision, sigma_ratio, shift) in tensors.items():
                total = sum(self._eta[layer][1]).sum().item()
                prior = self.prior.sigma[layer].double().pow(-2).sum().item()
                added = (precision - prior) / (total - prior) if total > prior * (1 + 1e-12) else math.nan
                rows.append(LayerWeight(site, layer, precision / total, added, sigma_ratio, shift))
        return rows

    def _check(self, site: Posterior) -> None:
        if not site.validate().is_bayesian:
            raise InputError(f"{site.name}: a MAP network has no standard deviations; train with --mode vcl")
        trained_from = site.metadata.get("prior_sha256")
        if trained_from != self._prior_sha256:
            raise InputError(
                f"{site.name}: was trained from prior {str(trained_from)[:12]}, not from {self.prior.name} "
                f"({self._prior_sha256[:12]}); give the prior that the sites started from"
            )
        for key in _SHARED:
            if site.shared(key) != self.prior.shared(key):
                theirs, ours = site.metadata.get(key), self.prior.metadata.get(key)
                raise InputError(
                    f"{site.name}: {key.replace('_', ' ')} {brief(theirs)} differs from the prior's {brief(ours)}; "
                    "give sites trained alike"
                )
        if odd := site.mu.keys() ^ self.prior.mu.keys():
            raise InputError(f"{site.name}: {min(odd)} is not in both this file and {self.prior.name}")
        for name, sigma_0 in self.prior.sigma.items():
            if site.mu[name].shape != sigma_0.shape:
                raise InputError(
                    f"{site.name}: {name} has shape {list(site.mu[name].shape)}, not {list(sigma_0.shape)}"
                )
            if above := int((site.sigma[name] > sigma_0).sum()):
                raise InputError(
                    f"{site.name}: {name}.sigma exceeds the prior's in {above} of {sigma_0.numel()} weights, "
                    "where Eq. 17 may not be defined; train with --mode vcl, which keeps sigma <= sigma_0"
                )

    def _accumulate(self, site: Posterior, *, sign: int) -> None:
        """Add sign * (site - prior); nothing changes if any precision would not stay positive."""
        updated = {}
        for name, sums in self._eta.items():
            parts = zip(sums, _natural(site, name), _natural(self.prior, name), strict=True)
            new = tuple(_two_sum(_two_sum(total, sign * theirs), -sign * ours) for total, theirs, ours in parts)
            if count := int((sum(new[1]) <= 0).sum()):
                raise InputError(
                    f"{site.name}: {name} is left with precision <= 0 in {count} of {new[1][0].numel()} weights, "
                    "where Eq. 17 is not defined; leave this site out"
                )
            updated[name] = new
        self._eta = updated


def consolidate(prior: Posterior, posteriors: Iterable[Posterior]) -> Posterior:
    """Consolidate sites' posteriors into one (Eq. 17).

    Parameters
    ----------
    prior : Posterior
        The posterior from which every site trained.
    posteriors : iterable of Posterior
        One per site, taken one at a time; a generator keeps memory constant. None is changed.

    Returns
    -------
    Posterior
        In fp32, computed in fp64; trains on as a prior at once. One site gives that site back.

    Raises
    ------
    InputError
        If there is no site, or one is refused by `Consolidation.add`.
    """
    consolidation = Consolidation(prior)
    for site in posteriors:
        consolidation.add(site)
    return consolidation.posterior()


def _natural(posterior: Posterior, name: str) -> tuple[Tensor, Tensor]:
    """(mu / sigma^2, 1 / sigma^2) in fp64."""
    precision = posterior.sigma[name].double().pow(-2)
    return posterior.mu[name].double() * precision, precision


def _two_sum(total: tuple[Tensor, Tensor], term: Tensor) -> tuple[Tensor, Tensor]:
    """Add a term to (sum, rounding error) without losing what the sum rounds away (Knuth's TwoSum)."""
    high, low = total
    new = high + term
    virtual = new - high
    return new, low + ((high - (new - virtual)) + (term - virtual))


def _members(site: Posterior) -> Mapping[str, int]:
    """Digest to number of volumes: the site itself, or the sites a consolidated posterior is made of."""
    sites: list[dict[str, Any]] = site.metadata.get("sites") or []
    if sites:
        return {member["sha256"]: member["n_volumes"] for member in sites}
    return {site.sha256: site.metadata.get("n_volumes") or 0}
