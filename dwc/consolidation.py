"""Distributed weight consolidation: combine posteriors that were trained from one prior (Eq. 17).

In natural parameters, eta = (mu / sigma^2, 1 / sigma^2), Eq. 17 is a sum: q = prior + sum_s (q_s - prior). Sites are
therefore added one at a time in constant memory, in any order, and can be removed again. A power lambda tempers the
sum, q = prior + lambda sum_s (q_s - prior): 1 is Eq. 17, 1/S the geometric mean of S sites.
"""

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from dwc.base.errors import InputError
from dwc.natural import SHARED, Sum, check_alike, check_answer, natural, two_sum
from dwc.posterior import Posterior

__all__ = ["Consolidation", "LayerWeight", "consolidate"]

_HALF_STEP = 2.0**-24  # of fp32, relative
_MAX_ERROR = 0.01  # of sigma, that rounding may leave in a mean when a site is taken out of a file
_Sums: TypeAlias = tuple[Sum, Sum]  # of both natural parameters


@dataclass(frozen=True)
class LayerWeight:
    """One site's part in one tensor of the consolidated posterior.

    Attributes
    ----------
    site, layer : str
        The posterior's name and the tensor's.
    weight : float
        Weight of the site's means: lambda times its precision over the consolidated precision, each summed over the
        tensor. Weights of 1/S average the sites' means; weights of 1, as when sigma stays at the prior's value, add up
        their shifts from the prior.
    added_share : float
        The site's share of the precision that all sites add to the prior's; NaN if they add none.
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
    """A site that has been added; `temper` is the power it has in the posterior it came in."""

    n_volumes: int
    temper: float


class Consolidation:
    """The running sum of Eq. 17: `add` and `remove` sites, then take the `posterior`.

    Sums are kept in fp64 together with their rounding errors: the fp32 result does not depend on the order of the
    sites, and removing a site undoes adding it exactly. A consolidated posterior of the same prior may be added too; it
    counts as the sites it consists of, each of which can be removed.

    Parameters
    ----------
    prior : Posterior
        The posterior from which every site trained, q^{T-1} in Eq. 11.
    """

    def __init__(self, prior: Posterior) -> None:
        if not prior.validate().is_bayesian:
            raise InputError(f"{prior.name}: a MAP network has no standard deviations; give the sites' Bayesian prior")
        self.prior = prior
        self.temper = 1.0
        self._prior_sha256 = prior.sha256
        self._members: dict[str, _Member] = {}  # by digest
        # By the digests of one file: its name, its power, and per tensor precision, sigma ratio and shift.
        self._rows: dict[frozenset[str], tuple[str, float, dict[str, tuple[float, float, float]]]] = {}
        # Bounds on the errors of both natural parameters, from consolidated files that were rounded to fp32, and the
        # digests of those that were added.
        self._rounded: dict[str, tuple[Tensor, Tensor]] = {}
        self._files: frozenset[str] = frozenset()
        self._removed = False
        # sum_s (q_s - prior), not tempered, so that removal cancels exactly. Copies share it: never change it in place.
        self._sums = {name: _zero(prior, name) for name in prior.mu}

    @property
    def n_sites(self) -> int:
        """S, the number of sites added, counting each site of a consolidated posterior."""
        return len(self._members)

    def add(self, site: Posterior, *, prior: Posterior | None = None, power: float = 1.0) -> None:
        """Multiply by a site's posterior and divide by the prior (Eq. 11); nothing changes if the site is refused.

        Parameters
        ----------
        site : Posterior
            Trained from the prior, with the prior's architecture, label map, preprocessing and sigma <= sigma_0.
        prior : Posterior, optional
            The prior that the site trained from, if it is an earlier one: the factor q_s / q_0 of a site that answers
            late does not depend on what it is multiplied by.
        power : float
            lambda_s > 0 of this site alone, to limit its influence.
        """
        _check_power("power", power)
        prior = self.prior if prior is None else prior
        self._check(site, prior)
        members = _members(site)
        if members.keys() & self._members.keys():
            raise InputError(
                f"{site.name}: this site has been added already, alone or in a consolidated file; give each once"
            )
        sums = self._accumulated(site, prior, factor=power)
        if site.metadata.get("sites"):
            self._rounded, self._files = self._rounding(site, power), self._files | {site.sha256}
        self._sums = sums
        self._members.update(
            {digest: replace(member, temper=power * member.temper) for digest, member in members.items()}
        )
        tensors = {
            name: (
                site.sigma[name].double().pow(-2).sum().item(),
                (site.sigma[name].double() / prior.sigma[name]).median().item(),
                ((site.mu[name].double() - prior.mu[name]).abs() / prior.sigma[name]).median().item(),
            )
            for name in prior.mu
        }
        self._rows[frozenset(members)] = (site.name, power, tensors)

    def remove(self, site: Posterior, *, prior: Posterior | None = None) -> None:
        """Undo `add` with the same `site` and `prior`, with the power that the site has here.

        Where consolidated files were added or are removed, this is refused if their rounding to fp32 would leave a mean
        off by more than 0.01 sigma, or a sigma by more than 1 %: what is removed was too confident.
        """
        prior = self.prior if prior is None else prior
        self._check(site, prior)
        members = _members(site)
        if not members.keys() <= self._members.keys():
            raise InputError(f"{site.name}: this site is not in the consolidation; give one of the sites added")
        powers = [self._members[digest].temper / member.temper for digest, member in members.items()]
        if not all(math.isclose(power, powers[0], rel_tol=1e-12) for power in powers):
            raise InputError(f"{site.name}: its sites have other powers here than in it; remove them one by one")
        sums = self._accumulated(site, prior, factor=-powers[0])
        rounded, files = self._rounded, self._files
        if site.metadata.get("sites"):  # the very file that was added takes its own rounding with it
            sign = -1.0 if site.sha256 in files else 1.0
            rounded, files = self._rounding(site, sign * powers[0]), files - {site.sha256}
        self._refuse_rounded(f"{site.name}:", sums, rounded)
        self._sums, self._rounded, self._files, self._removed = sums, rounded, files, True
        for digest in members:
            del self._members[digest]
        self._rows = {came: row for came, row in self._rows.items() if not came & members.keys()}

    def tempered(self, temper: float) -> "Consolidation":
        """A copy in which each site's power is multiplied by `temper`, lambda > 0; the two change independently."""
        _check_power("temper", temper)
        twin = copy.copy(self)
        twin.temper, twin._members, twin._rows = self.temper * temper, dict(self._members), dict(self._rows)
        return twin

    def leave_one_out(self, sites: Iterable[Posterior]) -> Iterator[tuple[Posterior, Posterior]]:
        """Each of these sites with the consolidation of all others; sites are read one at a time."""
        for site in sites:
            rest = self.tempered(1.0)
            rest.remove(site)
            yield site, rest.posterior(f"without {site.name}")

    def posterior(self, name: str = "consolidated") -> Posterior:
        """The consolidated posterior, in fp32; its header lists the sites with digest, volumes and power.

        Messages call it `name`.
        """
        if not self._members:
            raise InputError("no posterior to consolidate; give at least one site's posterior")
        mu, sigma = {}, {}
        for tensor in self.prior.mu:
            eta_1, eta_2 = self._eta(tensor, self._sums[tensor], self.temper)
            self._refuse_improper(name, tensor, eta_2, f"with lambda {self.temper:g}", "give a smaller lambda")
            mu[tensor], sigma[tensor] = eta_1 / eta_2, eta_2.rsqrt()
        if self._removed:
            self._refuse_rounded(f"{name}: what was removed", self._sums, self._rounded)  # with the lambda of now
        inherited = {key: self.prior.metadata.get(key) for key in SHARED}
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
        """Each site's weight in each tensor, in the order of `add`; without files of which a part was removed."""
        totals = {tensor: self._eta(tensor, sums, self.temper)[1].sum().item() for tensor, sums in self._sums.items()}
        rows = []
        for site, power, tensors in self._rows.values():
            for layer, (precision, sigma_ratio, shift) in tensors.items():
                total = totals[layer]
                prior = self.prior.sigma[layer].double().pow(-2).sum().item()
                added = math.nan
                if total > prior * (1 + 1e-12):
                    added = self.temper * power * (precision - prior) / (total - prior)
                weight = self.temper * power * precision / total
                rows.append(LayerWeight(site, layer, weight, added, sigma_ratio, shift))
        return rows

    def _eta(self, name: str, sums: _Sums, temper: float) -> tuple[Tensor, Tensor]:
        """Natural parameters prior + lambda sum_s (q_s - prior) of a tensor, fp64."""

        def tempered(part: Sum, ours: Tensor) -> Tensor:
            total, error = two_sum((part[0], 0.0), part[1])  # the same split in whatever order the sites came
            high, low = two_sum((temper * total, temper * error), ours)
            return high + low

        shift, precision = natural(self.prior, name)
        return tempered(sums[0], shift), tempered(sums[1], precision)

    def _check(self, site: Posterior, prior: Posterior) -> None:
        if prior is self.prior:
            check_answer(site, prior, self._prior_sha256)
        else:
            check_alike(prior, self.prior)
            check_answer(site, prior, prior.sha256)

    def _accumulated(self, site: Posterior, prior: Posterior, *, factor: float) -> dict[str, _Sums]:
        """The sums with factor * (site - prior) added; refused if a precision of Eq. 17 would not stay positive."""
        updated = {}
        for name, (shifts, precisions) in self._sums.items():
            theirs, ours = natural(site, name), natural(prior, name)
            sums = (
                two_sum(two_sum(shifts, factor * theirs[0]), -factor * ours[0]),
                two_sum(two_sum(precisions, factor * theirs[1]), -factor * ours[1]),
            )
            precision = self._eta(name, sums, 1.0)[1]
            self._refuse_improper(site.name, name, precision, "where Eq. 17 is not defined", "leave this site out")
            updated[name] = sums
        return updated

    def _rounding(self, site: Posterior, power: float) -> dict[str, tuple[Tensor, Tensor]]:
        """The error bounds with those of a consolidated file added: half an fp32 step of each mean and sigma.

        A negative power takes them out again.
        """
        bounds = {}
        for name in self._sums:
            shift, precision = natural(site, name)
            before = self._rounded.get(name, (torch.zeros_like(shift), torch.zeros_like(precision)))
            bounds[name] = (
                (before[0] + power * 3 * _HALF_STEP * shift.abs()).clamp(min=0),
                (before[1] + power * 2 * _HALF_STEP * precision).clamp(min=0),
            )
        return bounds

    def _refuse_rounded(self, who: str, sums: dict[str, _Sums], rounded: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        for name, (shift_error, precision_error) in rounded.items():
            shift, precision = self._eta(name, sums[name], self.temper)
            of_mean = (shift_error + (shift / precision).abs() * precision_error) * precision.rsqrt()
            worst = self.temper * max(of_mean.max().item(), (precision_error / (2 * precision)).max().item())
            if worst > _MAX_ERROR:
                raise InputError(
                    f"{who} cannot be taken out of a consolidated file, which is rounded to fp32: {name} would be off "
                    f"by up to {worst:.2g} sigma, more than {_MAX_ERROR:g}; consolidate the other sites' files instead"
                )

    def _refuse_improper(self, who: str, name: str, precision: Tensor, why: str, remedy: str) -> None:
        if count := int((precision <= 0).sum()):
            raise InputError(
                f"{who}: {name} is left with precision <= 0 in {count} of {precision.numel()} weights, {why}; {remedy}"
            )


def consolidate(
    prior: Posterior | str | Path, posteriors: Iterable[Posterior | str | Path], *, temper: float = 1.0
) -> Posterior:
    """Consolidate sites' posteriors into prior^(1 - S lambda) prod_s q_s^lambda; lambda = 1 is Eq. 17.

    Parameters
    ----------
    prior : Posterior or path
        The posterior from which every site trained.
    posteriors : iterable of Posterior or path
        One per site; files are read one at a time, so that memory does not grow with the number of sites.
    temper : float
        lambda > 0: 1/S takes the geometric mean of S sites, above 1 trusts the sites more than Eq. 17 does.

    Returns
    -------
    Posterior
        In fp32, computed in fp64. With one site and lambda = 1 it is that site's.
    """
    consolidation = Consolidation(_read(prior, "prior")).tempered(temper)
    if isinstance(posteriors, Posterior | str | Path):
        raise InputError("`posteriors`: give a list of posteriors or of their files, one per site")
    for site in posteriors:
        consolidation.add(_read(site, "posteriors"))
    return consolidation.posterior()


def _read(given: Posterior | str | Path, name: str) -> Posterior:
    if isinstance(given, str | Path):
        return Posterior.load(given)
    if not isinstance(given, Posterior):
        raise InputError(f"`{name}` {given!r}: give a posterior or its file")
    return given


def _check_power(name: str, power: float) -> None:
    if not 0 < power < math.inf:
        raise InputError(f"`{name}` {power}: give a positive number; 1 is Eq. 17, 1/S the sites' geometric mean")


def _zero(prior: Posterior, name: str) -> _Sums:
    zero = torch.zeros_like(prior.mu[name], dtype=torch.float64)
    return (zero, zero), (zero, zero)


def _members(site: Posterior) -> Mapping[str, _Member]:
    """By digest: the site itself, or the sites that a consolidated posterior consists of."""
    sites: list[dict[str, Any]] = site.metadata.get("sites") or []
    if not sites:
        return {site.sha256: _Member(site.metadata.get("n_volumes") or 0, 1.0)}
    return {member["sha256"]: _Member(member["n_volumes"], member.get("temper", 1.0)) for member in sites}
