"""Distributed weight consolidation: sites' posteriors, each trained from one prior, become one posterior (Eq. 17).

In natural parameters, eta = (mu / sigma^2, 1 / sigma^2), Eq. 17 is a sum, q = prior + sum_s (q_s - prior): sites stream
through one at a time in constant memory, in any order, and one can be added later or taken out again. A power lambda
tempers the sum, q = prior + lambda sum_s (q_s - prior), which is q_0^(1 - S lambda) prod_s q_s^lambda: 1 is Eq. 17, 1/S
the geometric mean of the sites. The room refuses what does not belong together and reports each site's weight per
layer. It trains nothing, reads no files and does not choose lambda; `tempering` does.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dwc.base.errors import InputError, brief
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
        lambda times the site's precision over the consolidated precision, each summed over the tensor: the factor with
        which the site's means enter. Weights of 1/S average the sites' means; weights of 1, as when sigma stays at its
        prior's value, add up their shifts from the prior.
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


@dataclass(frozen=True)
class _Member:
    """A site that is in: its number of volumes, and the power it brought along if it came in a tempered posterior."""

    n_volumes: int
    temper: float


class Consolidation:
    """The running sum of Eq. 17: `add` and `remove` sites, `tempered` if need be, then take the `posterior`.

    Sums are kept in fp64 together with their rounding errors, so that the fp32 result does not depend on the order of
    the sites, and a site that is removed leaves no trace. A consolidated posterior of the same prior may itself be
    added, as the sites it is made of with the powers they have in it; any of them can then be removed.

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
        self.temper = 1.0
        self._prior_sha256 = prior.sha256
        self._members: dict[str, _Member] = {}  # by digest: who is in
        # By the digests that came in together: the file's name, and per tensor precision, sigma ratio and shift.
        self._rows: dict[frozenset[str], tuple[str, dict[str, tuple[float, float, float]]]] = {}
        # sum_s (q_s - prior) in both natural parameters, each as (sum, its rounding error). Not tempered, so that what
        # is removed cancels exactly; never changed in place, so that copies can share it.
        self._sums = {name: tuple((torch.zeros_like(p),) * 2 for p in _natural(prior, name)) for name in prior.mu}

    @property
    def n_sites(self) -> int:
        """S, the sites that are in; those inside consolidated posteriors count each."""
        return len(self._members)

    def add(self, site: Posterior, *, prior: Posterior | None = None) -> None:
        """Multiply a site's posterior in and divide by the prior (Eq. 11).

        Parameters
        ----------
        site : Posterior
            What the site's data have made of the prior.
        prior : Posterior, optional
            The one that the site trained from, if that is an earlier one: a site that answers after its round has been
            consolidated brings the same factor q_s / q_0, whatever it is multiplied to.

        Raises
        ------
        InputError
            If the site's prior, architecture, label map, preprocessing or tensors are not this prior's, a value is not
            finite, a sigma is not in (0, sigma_0], or the site is in already.
        """
        prior = self.prior if prior is None else prior
        self._check(site, prior)
        members = _members(site)
        if members.keys() & self._members.keys():
            raise InputError(f"{site.name}: this site is in already; give each site's posterior once")
        self._accumulate(site, prior, factor=1.0)
        self._members.update(members)
        tensors = {
            name: (
                site.sigma[name].double().pow(-2).sum().item(),
                (site.sigma[name].double() / prior.sigma[name]).median().item(),
                ((site.mu[name].double() - prior.mu[name]).abs() / prior.sigma[name]).median().item(),
            )
            for name in prior.mu
        }
        self._rows[frozenset(members)] = (site.name, tensors)

    def remove(self, site: Posterior, *, prior: Posterior | None = None) -> None:
        """Divide a site's posterior out again, with the power it has here, and multiply by the prior; as `add`.

        Raises
        ------
        InputError
            If the site is not in, or its removal leaves a precision <= 0.
        """
        prior = self.prior if prior is None else prior
        self._check(site, prior)
        members = _members(site)
        if not members.keys() <= self._members.keys():
            raise InputError(f"{site.name}: this site is not in and cannot be removed; give one of the sites added")
        powers = [self._members[digest].temper / member.temper for digest, member in members.items()]
        if not all(math.isclose(power, powers[0], rel_tol=1e-12) for power in powers):
            raise InputError(f"{site.name}: its sites have other powers here than in it; remove them one by one")
        self._accumulate(site, prior, factor=-powers[0])
        for digest in members:
            del self._members[digest]
        self._rows = {came: row for came, row in self._rows.items() if not came & members.keys()}

    def tempered(self, temper: float) -> "Consolidation":
        """A consolidation of the same sites in which each has `temper` times the power lambda_s it has here.

        Parameters
        ----------
        temper : float
            lambda > 0: 1 leaves everything as it is, 1/S takes the geometric mean of S sites, above 1 trusts the sites
            more than Eq. 17 does. The copy can be added to and removed from without changing this one.

        Raises
        ------
        InputError
            If lambda is not a positive number.
        """
        if not 0 < temper < math.inf:
            raise InputError(f"lambda {temper}: give a positive number; 1 is Eq. 17, 1/S the sites' geometric mean")
        twin = copy.copy(self)
        twin.temper, twin._members, twin._rows = self.temper * temper, dict(self._members), dict(self._rows)
        return twin

    def leave_one_out(self, sites: Iterable[Posterior]) -> Iterator[tuple[Posterior, Posterior]]:
        """Each of the sites with what is consolidated without it; nothing here changes and nothing is trained.

        Parameters
        ----------
        sites : iterable of Posterior
            Of those that are in, read one at a time.

        Raises
        ------
        InputError
            As `remove` and `posterior`.
        """
        for site in sites:
            rest = self.tempered(1.0)
            rest.remove(site)
            yield site, rest.posterior(f"without {site.name}")

    def posterior(self, name: str = "consolidated") -> Posterior:
        """The consolidated posterior; its metadata names the prior, the sites' digests, powers and all their volumes.

        Raises
        ------
        InputError
            If no site is in, or lambda leaves a precision <= 0.
        """
        if not self._members:
            raise InputError("no posterior to consolidate; give at least one site's posterior")
        mu, sigma = {}, {}
        for tensor in self.prior.mu:
            eta_1, eta_2 = self._eta(tensor, self._sums[tensor], self.temper)
            self._refuse_improper(name, tensor, eta_2, f"with lambda {self.temper:g}", "give a smaller lambda")
            mu[tensor], sigma[tensor] = eta_1 / eta_2, eta_2.rsqrt()
        inherited = {key: self.prior.metadata.get(key) for key in _SHARED}
        sites = [
            {"sha256": digest, "n_volumes": member.n_volumes, "temper": self.temper * member.temper}
            for digest, member in sorted(self._members.items())
        ]
        metadata = {
            **inherited,
            "n_volumes": sum(member.n_volumes for member in self._members.values()),
            "prior_sha256": self._prior_sha256,
            "sites": sites,
        }
        return Posterior(mu, sigma, metadata, name=name).validate()

    def report(self) -> list[LayerWeight]:
        """Each site's weight in each tensor, in the order of `add`; files of which a part was removed have none."""
        totals = {tensor: self._eta(tensor, sums, self.temper)[1].sum().item() for tensor, sums in self._sums.items()}
        rows = []
        for site, tensors in self._rows.values():
            for layer, (precision, sigma_ratio, shift) in tensors.items():
                total = totals[layer]
                prior = self.prior.sigma[layer].double().pow(-2).sum().item()
                added = math.nan
                if total > prior * (1 + 1e-12):
                    added = self.temper * (precision - prior) / (total - prior)
                rows.append(LayerWeight(site, layer, self.temper * precision / total, added, sigma_ratio, shift))
        return rows

    def _eta(self, name: str, sums: tuple, temper: float) -> tuple[Tensor, Tensor]:
        """Natural parameters prior + lambda sum_s (q_s - prior) of a tensor, fp64."""
        parts = []
        for (high, low), ours in zip(sums, _natural(self.prior, name), strict=True):
            total, error = _two_sum((high, 0.0), low)  # the same split whatever the order of the sites was
            parts.append(sum(_two_sum((temper * total, temper * error), ours)))
        return tuple(parts)

    def _check(self, site: Posterior, prior: Posterior) -> None:
        if not site.validate().is_bayesian:
            raise InputError(f"{site.name}: a MAP network has no standard deviations; train with --mode vcl")
        trained_from = site.metadata.get("prior_sha256")
        prior_sha256 = self._prior_sha256 if prior is self.prior else prior.sha256
        if trained_from != prior_sha256:
            raise InputError(
                f"{site.name}: was trained from prior {str(trained_from)[:12]}, not from {prior.name} "
                f"({prior_sha256[:12]}); give the prior that the sites started from"
            )
        for key in _SHARED:
            if site.shared(key) != self.prior.shared(key):
                theirs, ours = site.metadata.get(key), self.prior.metadata.get(key)
                raise InputError(
                    f"{site.name}: {key.replace('_', ' ')} {brief(theirs)} differs from the prior's {brief(ours)}; "
                    "give sites trained alike"
                )
        if odd := site.mu.keys() ^ prior.mu.keys():
            raise InputError(f"{site.name}: {min(odd)} is not in both this file and {prior.name}")
        for name, sigma_0 in prior.sigma.items():
            if site.mu[name].shape != sigma_0.shape:
                raise InputError(
                    f"{site.name}: {name} has shape {list(site.mu[name].shape)}, not {list(sigma_0.shape)}"
                )
            if above := int((site.sigma[name] > sigma_0).sum()):
                raise InputError(
                    f"{site.name}: {name}.sigma exceeds the prior's in {above} of {sigma_0.numel()} weights, "
                    "where Eq. 17 may not be defined; train with --mode vcl, which keeps sigma <= sigma_0"
                )

    def _accumulate(self, site: Posterior, prior: Posterior, *, factor: float) -> None:
        """Add factor * (site - prior); nothing changes if any precision of Eq. 17 would not stay positive."""
        updated = {}
        for name, sums in self._sums.items():
            parts = zip(sums, _natural(site, name), _natural(prior, name), strict=True)
            new = tuple(_two_sum(_two_sum(total, factor * theirs), -factor * ours) for total, theirs, ours in parts)
            precision = self._eta(name, new, 1.0)[1]
            self._refuse_improper(site.name, name, precision, "where Eq. 17 is not defined", "leave this site out")
            updated[name] = new
        self._sums = updated

    def _refuse_improper(self, who: str, name: str, precision: Tensor, why: str, remedy: str) -> None:
        if count := int((precision <= 0).sum()):
            raise InputError(
                f"{who}: {name} is left with precision <= 0 in {count} of {precision.numel()} weights, {why}; {remedy}"
            )


def consolidate(prior: Posterior, posteriors: Iterable[Posterior], *, temper: float = 1.0) -> Posterior:
    """Consolidate sites' posteriors into one (Eq. 17), or into prior^(1 - S lambda) prod_s q_s^lambda.

    Parameters
    ----------
    prior : Posterior
        The posterior from which every site trained.
    posteriors : iterable of Posterior
        One per site, taken one at a time; a generator keeps memory constant. None is changed.
    temper : float
        lambda > 0, see `Consolidation.tempered`.

    Returns
    -------
    Posterior
        In fp32, computed in fp64; trains on as a prior at once. One site gives that site back.

    Raises
    ------
    InputError
        If there is no site, one is refused by `Consolidation.add`, or lambda is no positive number or too large.
    """
    consolidation = Consolidation(prior).tempered(temper)
    for site in posteriors:
        consolidation.add(site)
    return consolidation.posterior()


def _natural(posterior: Posterior, name: str) -> tuple[Tensor, Tensor]:
    """(mu / sigma^2, 1 / sigma^2) in fp64."""
    precision = posterior.sigma[name].double().pow(-2)
    return posterior.mu[name].double() * precision, precision


def _two_sum(total: tuple[Tensor, Tensor | float], term: Tensor) -> tuple[Tensor, Tensor]:
    """Add a term to (sum, rounding error) without losing what the sum rounds away (Knuth's TwoSum)."""
    high, low = total
    new = high + term
    virtual = new - high
    return new, low + ((high - (new - virtual)) + (term - virtual))


def _members(site: Posterior) -> Mapping[str, _Member]:
    """By digest: the site itself, or the sites a consolidated posterior is made of."""
    sites: list[dict[str, Any]] = site.metadata.get("sites") or []
    if not sites:
        return {site.sha256: _Member(site.metadata.get("n_volumes") or 0, 1.0)}
    members = {}
    try:
        for member in sites:
            members[member["sha256"]] = _Member(int(member["n_volumes"]), float(member.get("temper", 1.0)))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{site.name}: its header's list of sites cannot be read; write it again with dwc consolidate"
        ) from error
    if odd := [member.temper for member in members.values() if not 0 < member.temper < math.inf]:
        raise InputError(f"{site.name}: its header gives a site power {odd[0]}; write it again with dwc consolidate")
    return members
