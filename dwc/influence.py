"""How far each site would move a consolidated posterior, judged before anything is summed.

A site with a tiny sigma or huge means can replace everybody else's result, and Eq. 17 does not notice. Here each site's
factor q_s / q_0 is measured, compared with the other sites', and, if asked for, limited to a multiple of the median.
"""

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dwc.base.errors import InputError
from dwc.posterior import Posterior

__all__ = ["Influence", "limit_powers", "measure", "verdicts", "warnings_about"]

_TELLING = 8  # values of a tensor that two sites do not share by chance
_SKETCH = 256  # weights, evenly spaced, whose shifts are kept to compare sites
_MIN_SITES = 3  # with fewer there is no majority, and no median to compare with
_EXCLUDED_BELOW = 0.01  # power: a site that would have to be weakened more than this is left out
_HARMLESS = 1.0  # the prior's own precision, or shifts of one sigma_0: no limit is below these
_LOUD = 3.0  # times the median, to be warned about
_FAR = 100.0  # sigma_0, to be warned about
_SURE = 1e-3  # of sigma_0, likewise
_OPPOSED = -0.2  # correlation with the other sites' mean shift, likewise


@dataclass(frozen=True)
class Influence:
    """What one site's factor q_s / q_0 would do.

    Attributes
    ----------
    kl : float
        KL[q_s || q_0] in nats: how far the site moved.
    precision : float
        Mean over the weights of sigma_0^2 / sigma_s^2 - 1: the precision it adds, in units of the prior's.
    shift : float
        Root mean square over the weights of |mu_s - mu_0| sigma_0 / sigma_s^2: its pull on the means.
    furthest : float
        Maximum of |mu_s - mu_0| / sigma_0.
    surest : float
        Minimum of sigma_s / sigma_0.
    n_volumes : int
        Training volumes that the site claims.
    sketch : tuple of float
        (mu_s - mu_0) / sigma_0 of some weights, to compare sites.
    fingerprints : tuple of str
        Digests of the tensors that differ from the prior's. Two trainings never end at the same values: sites that
        share a tensor share a file.
    """

    kl: float
    precision: float
    shift: float
    furthest: float
    surest: float
    n_volumes: int
    sketch: tuple[float, ...]
    fingerprints: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        sketch = " ".join(f"{value:.4g}" for value in self.sketch)
        return {**asdict(self), "sketch": sketch, "fingerprints": " ".join(self.fingerprints)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Influence":
        """From `to_json`."""
        sketch = tuple(map(float, values["sketch"].split()))
        return cls(**{**values, "sketch": sketch, "fingerprints": tuple(values["fingerprints"].split())})

    def copies(self, other: "Influence") -> bool:
        """Whether half of the tensors are the same; after one or two steps a small one may be so by chance."""
        shared = len(set(self.fingerprints).intersection(other.fingerprints))
        return shared > 0 and 2 * shared >= min(len(self.fingerprints), len(other.fingerprints))


@torch.no_grad()
def measure(site: Posterior, prior: Posterior) -> Influence:
    """Measure a site's factor; the site has passed `Consolidation.add`'s checks against the prior."""
    kl = precision = squared_shift = furthest = 0.0
    surest, n_weights = 1.0, 0
    shifts, fingerprints = [], []
    for name, sigma_0 in prior.sigma.items():
        ratio = site.sigma[name].double() / sigma_0
        shift = (site.mu[name].double() - prior.mu[name]) / sigma_0
        kl += (0.5 * (ratio**2 + shift**2 - 1) - ratio.log()).sum().item()
        precision += (ratio**-2 - 1).sum().item()
        squared_shift += (shift / ratio**2).square().sum().item()
        furthest, surest = max(furthest, shift.abs().max().item()), min(surest, ratio.min().item())
        n_weights += shift.numel()
        shifts.append(shift.flatten())
        for ours, start in ((site.mu[name], prior.mu[name]), (site.sigma[name], sigma_0)):
            if ours.numel() >= _TELLING and not torch.equal(ours, start):
                fingerprints.append(hashlib.sha256(ours.numpy().tobytes()).hexdigest()[:16])
    return Influence(
        kl=_finite(kl),
        precision=_finite(precision / n_weights),
        shift=_finite(math.sqrt(squared_shift / n_weights)),
        furthest=_finite(furthest),
        surest=surest,
        n_volumes=site.metadata.get("n_volumes") or 0,
        sketch=_sketch(torch.cat(shifts)),
        fingerprints=tuple(fingerprints),
    )


def limit_powers(influences: Sequence[Influence], max_influence: float | None) -> list[float]:
    """The power of each site's factor that limits its precision and its pull to a multiple of the median site's.

    Parameters
    ----------
    influences : sequence of Influence
        Of all sites that enter one consolidation.
    max_influence : float or None
        Allowed multiple of the median, or of the prior's own precision and sigma where the median is below these; None
        limits nobody.

    Returns
    -------
    list of float
        1 for sites within the limit, so that their consolidation is unchanged; 0 for a site that would have to be
        weakened a hundredfold, which is left out. With fewer than three sites, all are 1.
    """
    if max_influence is not None and not 0 < max_influence < math.inf:
        raise InputError(f"`max_influence` {max_influence}: give a positive number, a multiple of the median site's")
    if max_influence is None or len(influences) < _MIN_SITES:
        return [1.0] * len(influences)
    powers = [1.0] * len(influences)
    for values in ([x.precision for x in influences], [x.shift for x in influences]):
        cap = max_influence * max(statistics.median(values), _HARMLESS)
        powers = [min(power, _power(value, cap)) for power, value in zip(powers, values, strict=True)]
    return [power if power >= _EXCLUDED_BELOW else 0.0 for power in powers]


def verdicts(influences: Mapping[str, Influence]) -> dict[str, str]:
    """One line per site: how far it moved, what it brings for its claimed volumes, and whether others agree."""
    precision = sum(one.precision for one in influences.values())
    volumes = sum(one.n_volumes for one in influences.values())
    total = [sum(values) for values in zip(*(one.sketch for one in influences.values()), strict=True)]
    lines = {}
    for name, own in influences.items():
        rest = [whole - part for whole, part in zip(total, own.sketch, strict=True)]
        agreement = _correlation(own.sketch, rest)
        lines[name] = (
            f"moved {_per_volume(own):.3g} nats per volume, brings {_share(own.precision, precision)} of the added "
            f"precision for {_share(own.n_volumes, volumes)} of the volumes, agreement {agreement:.2f}"
        )
    return lines


def warnings_about(influences: Mapping[str, Influence]) -> dict[str, list[str]]:
    """What is suspicious about each site, in plain words; sites without a warning are left out."""
    found: dict[str, list[str]] = {}
    everyone = list(influences.values())
    total = [sum(values) for values in zip(*(one.sketch for one in everyone), strict=True)]
    for name, own in influences.items():
        lines = [*_alone(own), *_against_median(own, everyone)]
        copies = [other for other in influences if other != name and own.copies(influences[other])]
        if copies:
            more = f" and {len(copies) - 1} more" if len(copies) > 1 else ""
            lines.append(f"it has tensors in common with {copies[0]}{more}")
        rest = [whole - part for whole, part in zip(total, own.sketch, strict=True)]
        if len(influences) >= _MIN_SITES and _correlation(own.sketch, rest) < _OPPOSED:
            lines.append("its means move against those of the other sites")
        if lines:
            found[name] = lines
    return found


def _alone(own: Influence) -> list[str]:
    """Warnings that need no other site."""
    lines = []
    if own.furthest > _FAR:
        lines.append(f"a mean is {own.furthest:.3g} sigma_0 from the prior's")
    if own.surest < _SURE:
        lines.append(f"a sigma is {own.surest:.3g} of the prior's")
    if own.n_volumes == 0:
        lines.append("it claims no training volumes")
    return lines


def _against_median(own: Influence, everyone: Sequence[Influence]) -> list[str]:
    """Warnings about a site that does much more, or for its claimed volumes much less or more, than the median site."""
    if len(everyone) < _MIN_SITES:
        return []
    lines = []
    measures = {
        "it adds {:.3g} times the precision of the median site": [x.precision for x in everyone],
        "it pulls the means {:.3g} times as hard as the median site": [x.shift for x in everyone],
        "it moved {:.3g} times as far per volume (KL) as the median site": [_per_volume(x) for x in everyone],
        "it claims {:.3g} times as many volumes as the median site": [float(x.n_volumes) for x in everyone],
    }
    for text, values in measures.items():
        value, median = values[everyone.index(own)], statistics.median(values)
        if value > _LOUD * median and value > _HARMLESS:
            lines.append(text.format(value / median if median else math.inf))
    return lines


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.0%}" if whole > 0 else "-"


def _per_volume(own: Influence) -> float:
    return own.kl / max(1, own.n_volumes)


def _power(value: float, cap: float) -> float:
    return 1.0 if value <= cap else cap / value


def _sketch(shifts: Tensor) -> tuple[float, ...]:
    chosen = shifts[torch.linspace(0, len(shifts) - 1, min(_SKETCH, len(shifts))).round().long()]
    return tuple(float(f"{_finite(value):.4g}") for value in chosen.tolist())


def _correlation(one: Sequence[float], other: Sequence[float]) -> float:
    """Cosine of two sketches; 0 where one does not move."""
    norms = math.hypot(*one) * math.hypot(*other)
    return sum(a * b / norms for a, b in zip(one, other, strict=True)) if 0 < norms < math.inf else 0.0


def _finite(value: float) -> float:
    """Within what JSON can hold."""
    return min(max(value, -1e300), 1e300) if not math.isnan(value) else 1e300
