"""The damping of a round on the same scans, chosen by the held-out scans of the organization that made the prior.

Sites that train at the same time repeat each other's correction, so that a share of 1/S is safe. The share is doubled
as long as that clearly raises the held-out log-likelihood. A round after which these scans are clearly less likely than
before is told.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dwc.base.errors import InputError
from dwc.data.dataset import SubVolumes
from dwc.posterior import Posterior
from dwc.site_factors import Factors
from dwc.tempering import gain, score_sub_volumes

__all__ = ["Chosen", "Trial", "choose_damping", "doubled", "format_trials", "worse"]

_CLEAR = 2.0  # standard errors


@dataclass(frozen=True)
class Trial:
    """What the held-out scans say about the network that one damping makes.

    Attributes
    ----------
    damping : float
        rho.
    log_likelihood : float
        Per voxel, in nats.
    gain : float
        The same less that of the network before the round.
    standard_error : float
        Of the gain, over the sub-volumes; 0 with one sub-volume.
    """

    damping: float
    log_likelihood: float
    gain: float
    standard_error: float

    @property
    def is_worse(self) -> bool:
        """Whether the scans are less likely than before the round, by more than two standard errors."""
        return self.gain < -_CLEAR * self.standard_error

    def __str__(self) -> str:
        """In words."""
        return f"log-likelihood {self.log_likelihood:.5f} ({self.gain:+.5f}, standard error {self.standard_error:.5f})"


@dataclass(frozen=True)
class Chosen:
    """The factors after the round, the trial that chose them, and all trials."""

    factors: Factors
    trial: Trial
    trials: list[Trial]


def doubled(n_sites: int) -> list[float]:
    """The dampings to try for S sites that train at the same time: 1/S, 2/S, 4/S, ... and 1."""
    return [min(1.0, 2**k / n_sites) for k in range(math.ceil(math.log2(n_sites)) + 1)]


def choose_damping(
    before: Posterior,
    make: Callable[[float], Factors],
    dampings: Sequence[float],
    data: SubVolumes,
    *,
    at_most: int = 256,
    device: torch.device | str = "cpu",
) -> Chosen:
    """Try dampings in this order as long as each is clearly better than the one before, by its standard error.

    It is an `InputError` if the log-likelihood under the network before, or under that of the first damping, is not
    finite.

    Parameters
    ----------
    before : Posterior
        The network before the round.
    make : callable
        From a damping to the factors after the round.
    dampings : sequence of float
        Ascending, at least one; see `doubled`.
    data : SubVolumes
        Held-out scans of the organization that trained the prior.
    at_most, device
        See `dwc.tempering.score_network`.
    """

    def scores(posterior: Posterior) -> tuple[Tensor, float]:
        return score_sub_volumes(posterior, data, at_most=at_most, device=device)

    first, n_voxels = scores(before)
    best = chosen = None
    trials: list[Trial] = []
    for damping in dampings:
        factors = make(damping)
        found, _ = scores(factors.posterior())
        trials.append(Trial(damping, found.mean().item() / n_voxels, *_gain(found, first, n_voxels)))
        if best is not None:
            rise, error = _gain(found, best, n_voxels)
            if not rise > error:  # also if it is NaN
                break
        best, chosen = found, Chosen(factors, trials[-1], trials)
    assert chosen is not None
    if not math.isfinite(chosen.trial.gain):
        raise InputError(
            f"damping {chosen.trial.damping:.3g}: the log-likelihood of the held-out scans is not finite, after the "
            "round or before it; leave out the site whose means moved furthest"
        )
    return chosen


def format_trials(chosen: Chosen) -> str:
    """The trials as a text table, one line for each damping."""
    lines = [f"{'damping':>8}{'log-likelihood':>16}{'gain':>10}{'standard error':>16}"]
    for trial in chosen.trials:
        note = "  chosen" if trial is chosen.trial else ""
        numbers = f"{trial.log_likelihood:>16.5f}{trial.gain:>+10.5f}{trial.standard_error:>16.5f}"
        lines.append(f"{trial.damping:>8.3g}{numbers}{note}")
    return "\n".join(lines)


def worse(trial: Trial) -> str:
    """The warning about a round after which the held-out scans are less likely."""
    return (
        f"the organization's held-out scans are less likely after this round: {trial}; train longer, give a smaller "
        "damping, or leave sites out"
    )


def _gain(after: Tensor, before: Tensor, n_voxels: float) -> tuple[float, float]:
    value, error = gain(after, before, n_voxels)
    return value, 0.0 if math.isnan(error) else error
