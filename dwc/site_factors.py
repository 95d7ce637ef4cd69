"""Rounds on the same scans: each site's factor, replaced in every round (partitioned variational inference).

q = q_0 prod_s t_s, where t_s is all that site s has contributed. In a round the site trains with the cavity q / t_s as
its prior, so that no scan is counted twice, and its new factor q_s / (q / t_s) replaces the old one, damped:
eta_s <- (1 - rho) eta_s + rho eta_new, in natural parameters eta = (mu / sigma^2, 1 / sigma^2). With empty factors and
rho = 1, one round is Eq. 17. Bui et al. 2018, Ashman et al. 2022.

Because sigma_s <= the cavity's sigma, every factor adds precision: cavities are proper, whatever is missing or late.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwc.base.errors import InputError
from dwc.base.files import DIGEST, content_sha256, load_entries, save_tensors
from dwc.natural import SHARED, Sum, check_alike, check_answer, natural, two_sum
from dwc.posterior import Posterior

__all__ = ["Factors", "check_share"]

STATE_VERSION = 1
_MAX_NAME = 200  # bytes; with the ending of a temporary file, it still is a file's name


@dataclass(frozen=True)
class _Factor:
    """A site's part in the network: per tensor eta_1 and eta_2, each an fp64 value and its rounding error."""

    eta: dict[str, tuple[Sum, Sum]]
    sha256: str  # of the posterior it came with last
    n_volumes: int


class Factors:
    """The prior q_0 and the sites' factors.

    Sites are known by name, and keep their factor while they do not answer. Factors are kept in fp64 with their
    rounding errors, so that taking a site out leaves exactly what the others contributed.

    Parameters
    ----------
    prior : Posterior
        q_0, the network that the rounds began with.
    """

    def __init__(self, prior: Posterior) -> None:
        if not prior.validate().is_bayesian:
            raise InputError(f"{prior.name}: a MAP network has no standard deviations; give the sites' Bayesian prior")
        self.prior = prior
        self._factors: dict[str, _Factor] = {}

    @property
    def sites(self) -> list[str]:
        """The sites that have a factor, by name."""
        return sorted(self._factors)

    def posterior(self, name: str = "network") -> Posterior:
        """q = q_0 prod_s t_s, in fp32; its header lists the sites' last posteriors. q_0 itself without any."""
        return self._product(self._factors, name)

    def cavity(self, site: str) -> Posterior:
        """q / t_s, the prior of a site's next training; q for a site without a factor."""
        return self._cavity(site, self._sums(self._factors)) if site in self._factors else self.posterior()

    def cavities(self) -> Iterator[tuple[str, Posterior]]:
        """Each site that has a factor, with its cavity."""
        total = self._sums(self._factors)
        for site in self.sites:
            yield site, self._cavity(site, total)

    def start(self, site: str, cavity: Posterior) -> Posterior:
        """q as a site computes it: its cavity, which is rounded to fp32, times its factor."""
        own = Factors(cavity)
        own._factors[site] = self._factors[site]
        return own.posterior(f"start of {site}")

    def check(self, site: str, posterior: Posterior, cavity: Posterior) -> None:
        """Refuse what is not this one site's answer to this cavity."""
        _check_name(site)
        if cavity is not self.prior:
            check_alike(cavity, self.prior)
        check_answer(posterior, cavity, cavity.sha256)
        if posterior.metadata.get("sites"):
            raise InputError(
                f"{posterior.name}: is a consolidated file; a factor is one site's, give its own posterior"
            )
        sha256 = posterior.sha256
        if same := [other for other, factor in self._factors.items() if factor.sha256 == sha256 and other != site]:
            raise InputError(f"{posterior.name}: is the posterior that {same[0]} has sent; each counts once")

    def replace(
        self,
        site: str,
        posterior: Posterior,
        *,
        cavity: Posterior | None = None,
        damping: float = 1.0,
        power: float = 1.0,
    ) -> None:
        """Replace a site's factor by that of its new posterior; nothing changes if it is refused.

        The same answer may come twice: it replaces its own factor, so no scan is counted twice.

        Parameters
        ----------
        site : str
            Its name, by which it is known in every round; it must do as a file's name.
        posterior : Posterior
            Trained from the site's cavity, with sigma <= the cavity's.
        cavity : Posterior, optional
            The cavity it was trained from, if that is an earlier one: the factor of a late answer is
            still the site's.
        damping : float
            rho in (0, 1], the share of the new factor; 1/S for S sites that train at the same time is safe.
        power : float
            Power in (0, 1] of the new factor, to limit the site's influence.
        """
        for name, share in (("damping", damping), ("power", power)):
            check_share(name, share)
        cavity = self.cavity(site) if cavity is None else cavity
        self.check(site, posterior, cavity)
        known, eta = self._factors.get(site), {}
        for tensor in self.prior.mu:
            parts = []
            for k, (theirs, ours) in enumerate(zip(natural(posterior, tensor), natural(cavity, tensor), strict=True)):
                new = two_sum((theirs, 0.0), -ours)
                new = (power * new[0], power * new[1])
                if damping < 1:
                    old = (torch.zeros_like(theirs),) * 2 if known is None else known.eta[tensor][k]
                    new = two_sum(((1 - damping) * old[0], (1 - damping) * old[1]), damping * new[0])
                parts.append(new)
            eta[tensor] = (parts[0], parts[1])
        self._factors[site] = _Factor(eta, posterior.sha256, posterior.metadata.get("n_volumes") or 0)

    def copy(self) -> "Factors":
        """A twin; changing it leaves this one unchanged."""
        twin = Factors(self.prior)
        twin._factors = dict(self._factors)
        return twin

    def remove(self, site: str) -> None:
        """Take a site out, exactly: the network is what the others' factors make."""
        if site not in self._factors:
            raise InputError(f"{site}: has no factor here; give one of {', '.join(self.sites) or 'none yet'}")
        del self._factors[site]

    def shares(self) -> dict[str, float]:
        """Each site's share of the precision that all factors add to the prior's; NaN if they add none."""
        added = {site: sum(eta[1][0].sum().item() for eta in f.eta.values()) for site, f in self._factors.items()}
        total = sum(added.values())
        return {site: added[site] / total if total > 0 else math.nan for site in self.sites}

    @property
    def sha256(self) -> str:
        """Digest of the file that `save` writes."""
        return content_sha256(*self._content())

    def save(self, path: str | Path) -> None:
        """Write the factors, without the prior, as one safetensors file."""
        save_tensors(path, *self._content())

    def _content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and header of the file."""
        tensors = {
            f"{site}/{tensor}/{k}{part}": values
            for site, factor in self._factors.items()
            for tensor, eta in factor.eta.items()
            for k, pair in enumerate(eta)
            for part, values in zip(("", "_error"), pair, strict=True)
        }
        header: dict[str, Any] = {
            "factors_version": STATE_VERSION,
            "prior_sha256": self.prior.sha256,
            "sites": {s: {"sha256": f.sha256, "n_volumes": f.n_volumes} for s, f in self._factors.items()},
        }
        return tensors, header

    @classmethod
    def load(cls, path: str | Path, prior: Posterior) -> "Factors":
        """Read a file written by `save` for this prior."""
        tensors, header, entries = load_entries(path)
        sites = header.get("sites")
        if header.get("factors_version") != STATE_VERSION or not isinstance(sites, dict):
            raise InputError(f"{path}: holds no factors of sites; give the file that `state` wrote")
        if DIGEST not in entries:
            raise InputError(f"{path}: was altered (the digest of its content is gone); restore it from a backup")
        factors = cls(prior)
        if header.get("prior_sha256") != prior.sha256:
            raise InputError(
                f"{path}: its factors belong to prior {str(header.get('prior_sha256'))[:12]}, not to {prior.name} "
                f"({prior.sha256[:12]}); give the network that the rounds began with"
            )
        for site, about in sites.items():
            _check_name(site, f"{path}: ")
            factors._factors[site] = _read(str(path), site, about, tensors, prior)
        if len(tensors) > 4 * len(prior.mu) * len(sites):
            raise InputError(f"{path}: holds other tensors than its sites' factors; restore it from a backup")
        try:
            factors.posterior()
        except InputError as error:
            raise InputError(f"{path}: its factors make no network ({error}); restore it from a backup") from error
        return factors

    def _product(self, factors: Mapping[str, _Factor], name: str) -> Posterior:
        return self._network(self._sums(factors), factors, name)

    def _sums(self, factors: Mapping[str, _Factor]) -> dict[str, tuple[Sum, Sum]]:
        """Per tensor, both natural parameters of the product of these factors."""
        sums = {}
        for tensor, values in self.prior.mu.items():
            zero = torch.zeros_like(values, dtype=torch.float64)
            totals: list[Sum] = [(zero, zero), (zero, zero)]
            for factor in factors.values():
                totals = [_plus(total, part) for total, part in zip(totals, factor.eta[tensor], strict=True)]
            sums[tensor] = (totals[0], totals[1])
        return sums

    def _cavity(self, site: str, total: Mapping[str, tuple[Sum, Sum]]) -> Posterior:
        """The product of all factors but one, of which the sums are known, in constant time."""
        own, others = self._factors[site], {other: f for other, f in self._factors.items() if other != site}
        sums = {}
        for tensor, both in total.items():
            less = [_plus(part, (-high, -low)) for part, (high, low) in zip(both, own.eta[tensor], strict=True)]
            sums[tensor] = (less[0], less[1])
        return self._network(sums, others, f"cavity of {site}")

    def _network(self, sums: Mapping[str, tuple[Sum, Sum]], factors: Mapping[str, _Factor], name: str) -> Posterior:
        """q_0 times the product of factors whose sums are given."""
        if not factors:
            return self.prior
        mu, sigma = {}, {}
        for tensor, totals in sums.items():
            eta = []
            for total, ours in zip(totals, natural(self.prior, tensor), strict=True):
                high, low = two_sum(two_sum((total[0], 0.0), total[1]), ours)
                eta.append(high + low)
            mu[tensor], sigma[tensor] = eta[0] / eta[1], eta[1].rsqrt()
        sites = [{"sha256": f.sha256, "n_volumes": f.n_volumes} for f in factors.values()]
        metadata = {
            **{key: self.prior.metadata.get(key) for key in SHARED},
            "n_volumes": sum(factor.n_volumes for factor in factors.values()),
            "prior_sha256": self.prior.sha256,
            "sites": sorted(sites, key=lambda row: str(row["sha256"])),
        }
        return Posterior(mu, sigma, metadata, name=name).validate()


def check_share(name: str, share: float) -> None:
    """Refuse what is no share of a factor."""
    if not 0 < share <= 1:
        raise InputError(f"`{name}` {share}: give a number above 0 and at most 1")


def _plus(total: Sum, part: Sum) -> Sum:
    return two_sum(two_sum(total, part[0]), part[1])


def _check_name(site: str, where: str = "") -> None:
    """Refuse a name that is no file's: each site's cavity is written under it."""
    if not site.isprintable() or not 0 < len(site.encode()) <= _MAX_NAME or "/" in site or site.startswith("."):
        raise InputError(
            f"{where}{site[:40]!r}: is no name of a site; give printable characters without a slash, at most "
            f"{_MAX_NAME} bytes, the first no point"
        )


def _read(path: str, site: str, about: Any, tensors: Mapping[str, Tensor], prior: Posterior) -> _Factor:
    """A site's factor from a file's tensors, checked against the prior's shapes."""

    def values(tensor: str, part: str) -> Tensor:
        found = tensors.get(f"{site}/{tensor}/{part}")
        if found is None or found.dtype != torch.float64 or found.shape != prior.mu[tensor].shape:
            raise InputError(
                f"{path}: the factor of {site} does not fit {prior.name}; give the file that `state` wrote"
            )
        if not found.isfinite().all():
            raise InputError(f"{path}: the factor of {site} holds non-finite values; restore it from a backup")
        return found

    eta = {
        tensor: (
            (values(tensor, "0"), values(tensor, "0_error")),
            (values(tensor, "1"), values(tensor, "1_error")),
        )
        for tensor in prior.mu
    }
    for tensor, (_, (precision, error)) in eta.items():
        if count := int(((precision < 0) | (precision + error < 0)).sum()):
            raise InputError(
                f"{path}: the factor of {site} takes precision away in {count} weights of {tensor}, which no training "
                "does; restore it from a backup"
            )
    if (
        not isinstance(about, dict)
        or not isinstance(about.get("sha256"), str)
        or type(about.get("n_volumes")) is not int
    ):
        raise InputError(f"{path}: its header names no posterior for {site}; give the file that `state` wrote")
    return _Factor(eta, about["sha256"], about["n_volumes"])
