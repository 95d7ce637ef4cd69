"""How far each site would move a consolidated posterior, judged before anything is summed.

A site with a tiny sigma or huge means can replace everybody else's result, and Eq. 17 does not notice. Here each site's
factor q_s / q_0 is measured, compared with the other sites' and with the volumes it claims, and, if asked for, limited
to a multiple of the median.
"""

import hashlib
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from dwc.base.errors import InputError
from dwc.posterior import Posterior

__all__ = ["MIN_SITES", "Influence", "limit_powers", "limited_because", "measure", "verdicts", "warnings_about"]

_TELLING = 8  # values of a tensor that two sites do not share by chance
_SKETCH = 512  # random sums over the weights that are kept to compare sites: correlations are right within 0.04
_CLIP = 5.0  # sigma_0: single weights further away do not decide how alike two sites are
MIN_SITES = 3  # with fewer there is no majority, and no median to compare with
_EXCLUDED_BELOW = 0.01  # power: a site that would have to be weakened more than this is left out
_HARMLESS = 1.0  # the prior's own precision, or shifts of one sigma_0: no limit is below these
_LOUD = 3.0  # times the median, to be warned about
_FAR = 100.0  # sigma_0, to be warned about
_SURE = 1e-3  # of sigma_0, likewise
_OPPOSED = 0.2  # correlation of a site's shift with minus the other sites' pull, likewise
_ALIKE = 0.9  # correlation of two sites' shifts, to be warned about if they are also much closer than the median pair,
_CLOSER = 1 / 3  # which is this multiple of its distance, 1 - |correlation|
_TUPLES: dict[str, Callable[[str], Any]] = {"shift_sketch": float, "pull_sketch": float, "fingerprints": str}


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
    shift_sketch, pull_sketch : tuple of float
        Random sums over the weights of (mu_s - mu_0) / sigma_0 and of the same times sigma_0^2 / sigma_s^2: their
        correlations between sites are those of the whole vectors.
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
    shift_sketch: tuple[float, ...]
    pull_sketch: tuple[float, ...]
    fingerprints: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values; tuples are text, which a state file shows on one line."""
        texts = {name: " ".join(map(str, getattr(self, name))) for name in _TUPLES}
        return {**asdict(self), **texts}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Influence":
        """From `to_json`."""
        try:
            tuples = {name: tuple(map(kind, values[name].split())) for name, kind in _TUPLES.items()}
            return cls(**{**values, **tuples})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise InputError(f"influence of a site in the state file: {error}; restore it from a backup") from error

    def copies(self, other: "Influence") -> bool:
        """Whether half of the tensors are the same; after one or two steps a small one may be so by chance."""
        shared = len(set(self.fingerprints).intersection(other.fingerprints))
        return shared > 0 and 2 * shared >= min(len(self.fingerprints), len(other.fingerprints))


@torch.no_grad()
def measure(site: Posterior, prior: Posterior) -> Influence:
    """Measure a site's factor; the site has passed `Consolidation.add`'s checks against the prior."""
    kl = precision = squared_shift = furthest = 0.0
    surest, n_weights = 1.0, 0
    shifts, pulls, fingerprints = [], [], []
    for name, sigma_0 in prior.sigma.items():
        ratio = site.sigma[name].double() / sigma_0
        shift = (site.mu[name].double() - prior.mu[name]) / sigma_0
        kl += (0.5 * (ratio**2 + shift**2 - 1) - ratio.log()).sum().item()
        precision += (ratio**-2 - 1).sum().item()
        squared_shift += (shift / ratio**2).square().sum().item()
        furthest, surest = max(furthest, shift.abs().max().item()), min(surest, ratio.min().item())
        n_weights += shift.numel()
        shifts.append(shift.clamp(-_CLIP, _CLIP).flatten())
        pulls.append(shifts[-1] / ratio.clamp(min=_SURE).square().flatten())
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
        shift_sketch=_sketch(torch.cat(shifts)),
        pull_sketch=_sketch(torch.cat(pulls)),
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
    if max_influence is None or len(influences) < MIN_SITES:
        return [1.0] * len(influences)
    powers = [1.0] * len(influences)
    for values in ([x.precision for x in influences], [x.shift for x in influences]):
        cap = max_influence * _usual(values)
        powers = [min(power, _power(value, cap)) for power, value in zip(powers, values, strict=True)]
    return [power if power >= _EXCLUDED_BELOW else 0.0 for power in powers]


def limited_because(influences: Sequence[Influence], powers: Sequence[float]) -> list[str]:
    """Why `limit_powers` weakened a site, and whether its claimed volumes explain its influence; "" where it did not.

    A site with many more volumes than the others is right to have more influence, but volumes are only claimed.
    """
    usual = _usual([x.precision for x in influences]), _usual([x.shift for x in influences])
    volumes = max(statistics.median(x.n_volumes for x in influences), 1)
    reasons = []
    for own, power in zip(influences, powers, strict=True):
        most, claimed = max(own.precision / usual[0], own.shift / usual[1]), own.n_volumes / volumes
        verdict = "more than its volumes explain"
        if most <= claimed:
            verdict = "as its volumes would explain; raise the limit if they are right"
        reason = f"{most:.3g} times the influence of the median site for {claimed:.3g} times its volumes, {verdict}"
        reasons.append(reason if power < 1 else "")
    return reasons


def verdicts(influences: Mapping[str, Influence]) -> dict[str, str]:
    """One line per site: how far it moved, what it brings for its claimed volumes, and whether others agree."""
    precision = sum(one.precision for one in influences.values())
    volumes = sum(one.n_volumes for one in influences.values())
    agreement, _ = _agreement(list(influences.values()))
    return {
        name: f"moved {_per_volume(own):.3g} nats per volume, brings {_share(own.precision, precision)} of the added "
        f"precision for {_share(own.n_volumes, volumes)} of the volumes, agreement {agrees:.2f}"
        for (name, own), agrees in zip(influences.items(), agreement, strict=True)
    }


def warnings_about(influences: Mapping[str, Influence]) -> dict[str, list[str]]:
    """What is suspicious about each site, in plain words; sites without a warning are left out."""
    found: dict[str, list[str]] = {}
    names, everyone = list(influences), list(influences.values())
    _, opposed = _agreement(everyone)
    correlation, alike = _alike(everyone)
    for index, (name, own) in enumerate(influences.items()):
        lines = [*_alone(own), *_against_volumes(own, everyone), *_against_median(own, everyone)]
        copies = [other for other in names if other != name and own.copies(influences[other])]
        if copies:
            lines.append(f"it has tensors in common with {_and_more(copies)}")
        close = [k for k in alike[index].nonzero().flatten().tolist() if names[k] not in copies]
        if close:
            closest = max(correlation[index, k].abs().item() for k in close)
            lines.append(
                f"its means move like those of {_and_more([names[k] for k in close])} (correlation {closest:.2f}), "
                "as a copy with noise would"
            )
        if opposed[index]:
            lines.append("its means move against those of the other sites")
        if lines:
            found[name] = lines
    return found


def _agreement(everyone: Sequence[Influence]) -> tuple[list[float], list[bool]]:
    """Correlation of each site's shift with the other sites' pull on the means, and which sites are opposed to them.

    The most opposed site is set aside before the others are judged again, and no site's pull counts for more than the
    median site's: two sites of five with flipped signs do not make the honest ones look opposed.
    """
    if not everyone:
        return [], []
    shifts = torch.tensor([one.shift_sketch for one in everyone], dtype=torch.float64)
    pulls = torch.tensor([one.pull_sketch for one in everyone], dtype=torch.float64)
    norms = pulls.norm(dim=1)
    pulls = pulls * (norms.median() / norms.clamp(min=1e-30)).clamp(max=1)[:, None]
    limit = -max(_OPPOSED, 3 / math.sqrt(shifts.shape[1]))  # few weights correlate by chance
    kept = torch.ones(len(everyone), dtype=torch.bool)
    while True:
        rest = pulls[kept].sum(dim=0) - pulls * kept[:, None]
        agreement = torch.nn.functional.cosine_similarity(shifts, rest)
        worst = agreement.where(kept, math.inf).argmin()
        if kept.sum() < MIN_SITES or agreement[worst] >= limit:
            return agreement.tolist(), (~kept).tolist()
        kept[worst] = False


def _alike(everyone: Sequence[Influence]) -> tuple[Tensor, Tensor]:
    """Correlations [S, S] between all sites' shifts, and which pairs are much closer than the median pair.

    Sites that learned the same are close to each other too, but then all of them are.
    """
    n_sites = len(everyone)
    if n_sites < MIN_SITES:
        return torch.eye(n_sites), torch.zeros(n_sites, n_sites, dtype=torch.bool)
    shifts = torch.tensor([one.shift_sketch for one in everyone])
    shifts = torch.nn.functional.normalize(shifts)
    correlation = shifts @ shifts.T
    distance = 1 - correlation.abs()
    one, other = torch.triu_indices(n_sites, n_sites, 1)
    usual = distance[one, other].median()
    alike = (distance < _CLOSER * usual) & (distance < 1 - _ALIKE)
    return correlation, alike.fill_diagonal_(False)


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


def _against_volumes(own: Influence, everyone: Sequence[Influence]) -> list[str]:
    """A warning if a site brings much more precision than its share of the claimed volumes."""
    precision, volumes = sum(x.precision for x in everyone), sum(x.n_volumes for x in everyone)
    above_median = own.precision > max(statistics.median(x.precision for x in everyone), _HARMLESS)
    if not above_median or own.precision * volumes <= _LOUD * own.n_volumes * precision:
        return []
    return [
        f"it brings {_share(own.precision, precision)} of the added precision for {_share(own.n_volumes, volumes)} "
        "of the claimed volumes"
    ]


def _against_median(own: Influence, everyone: Sequence[Influence]) -> list[str]:
    """Warnings about a site that does much more, or for its claimed volumes much less or more, than the median site."""
    if len(everyone) < MIN_SITES:
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


def _usual(values: Sequence[float]) -> float:
    """What the median site has, or the prior itself, whichever is more."""
    return max(statistics.median(values), _HARMLESS)


def _and_more(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _sketch(values: Tensor) -> tuple[float, ...]:
    """Sums of the values with random signs in `_SKETCH` random groups; the values themselves if they are fewer."""
    if len(values) > _SKETCH:
        generator = torch.Generator().manual_seed(0)
        group = torch.randint(_SKETCH, values.shape, generator=generator)
        sign = 2 * torch.randint(2, values.shape, generator=generator) - 1
        values = torch.zeros(_SKETCH, dtype=torch.float64).index_add_(0, group, sign * values)
    return tuple(float(f"{value:.3g}") for value in values.tolist())


def _finite(value: float) -> float:
    """Within what JSON can hold."""
    return min(max(value, -1e300), 1e300) if not math.isnan(value) else 1e300
