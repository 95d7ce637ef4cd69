"""What one site's factor q_s / q_0 does, measured against the prior: over all weights and in each tensor."""

import hashlib
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dwc.base.errors import InputError
from dwc.posterior import Posterior

__all__ = ["Influence", "Movement", "measure"]

_TELLING = 8  # values of a tensor that two sites do not share by chance
_SKETCH = 512  # random sums over the weights that are kept to compare sites: correlations are right within 0.04
_CLIP = 5.0  # sigma_0: single weights further away do not decide how alike two sites are
_MIN_RATIO = 1e-3  # of sigma_0: surer weights do not count more when sites' pulls are compared
_TUPLES: dict[str, Callable[[str], Any]] = {"shift_sketch": float, "pull_sketch": float, "fingerprints": str}


class Movement(NamedTuple):
    """What a site does in one tensor, relative to the prior, as `Influence` measures it over all weights.

    Single weights stand beside the mean, because one of them, of many, may decide what the network sees.
    """

    precision: float  # mean of sigma_0^2 / sigma_s^2 - 1
    shift: float  # root mean square of |mu_s - mu_0| sigma_0 / sigma_s^2
    surest: float  # maximum of sigma_0^2 / sigma_s^2 - 1
    strongest: float  # maximum of |mu_s - mu_0| sigma_0 / sigma_s^2
    furthest: float  # maximum of |mu_s - mu_0| / sigma_0


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
    tensors : dict of str to Movement
        The same of each tensor alone.
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
    tensors: dict[str, Movement]

    def to_json(self) -> dict[str, Any]:
        """Plain values; tuples are text, which a state file shows on one line."""
        texts = {name: _text(getattr(self, name)) for name in _TUPLES}
        return {**asdict(self), **texts, "tensors": {name: _text(moved) for name, moved in self.tensors.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Influence":
        """From `to_json`."""
        try:
            tuples = {name: tuple(map(kind, values[name].split())) for name, kind in _TUPLES.items()}
            tensors = {name: Movement(*map(float, text.split())) for name, text in values["tensors"].items()}
            found = cls(**{**values, **tuples, "tensors": tensors})
            numbers = [found.kl, found.precision, found.shift, found.furthest, found.surest, found.n_volumes]
            if not all(map(_is_number, [*numbers, *found.shift_sketch, *found.pull_sketch, *chain(*tensors.values())])):
                raise ValueError("holds something else than finite numbers")
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
            raise InputError(f"influence of a site in the state file: {error}; restore it from a backup") from error
        return found

    def copies(self, other: "Influence") -> bool:
        """Whether half of the tensors are the same; after one or two steps a small one may be so by chance."""
        shared = len(set(self.fingerprints).intersection(other.fingerprints))
        return shared > 0 and 2 * shared >= min(len(self.fingerprints), len(other.fingerprints))


@torch.no_grad()
def measure(site: Posterior, prior: Posterior) -> Influence:
    """Measure a site's factor; the site has passed `Consolidation.add`'s checks against the prior."""
    kl = 0.0
    tensors: dict[str, Movement] = {}
    surest, n_weights = 1.0, {name: sigma_0.numel() for name, sigma_0 in prior.sigma.items()}
    shifts, pulls, fingerprints = [], [], []
    for name, sigma_0 in prior.sigma.items():
        ratio = site.sigma[name].double() / sigma_0
        shift = (site.mu[name].double() - prior.mu[name]) / sigma_0
        kl += (0.5 * (ratio**2 + shift**2 - 1) - ratio.log()).sum().item()
        added, pull = ratio**-2 - 1, (shift / ratio**2).abs()
        root = pull.square().mean().sqrt()
        moved = (added.mean(), root, added.max(), pull.max(), shift.abs().max())
        tensors[name] = Movement(*(_finite(value.item()) for value in moved))
        surest = min(surest, ratio.min().item())
        shifts.append(shift.clamp(-_CLIP, _CLIP).flatten())
        pulls.append(shifts[-1] / ratio.clamp(min=_MIN_RATIO).square().flatten())
        for ours, start in ((site.mu[name], prior.mu[name]), (site.sigma[name], sigma_0)):
            if ours.numel() >= _TELLING and not torch.equal(ours, start):
                fingerprints.append(hashlib.sha256(ours.numpy().tobytes()).hexdigest()[:16])
    total = sum(n_weights.values())
    return Influence(
        kl=_finite(kl),
        precision=_finite(sum(n_weights[name] * moved.precision for name, moved in tensors.items()) / total),
        shift=_finite(math.hypot(*(math.sqrt(n_weights[name] / total) * m.shift for name, m in tensors.items()))),
        furthest=max(moved.furthest for moved in tensors.values()),
        surest=surest,
        n_volumes=site.metadata.get("n_volumes") or 0,
        shift_sketch=_sketch(torch.cat(shifts)),
        pull_sketch=_sketch(torch.cat(pulls)),
        fingerprints=tuple(fingerprints),
        tensors=tensors,
    )


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


def _text(values: Iterable[Any]) -> str:
    return " ".join(map(str, values))


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)
