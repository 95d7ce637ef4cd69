"""When a training loss has begun to "oscillate around a stable value", as a rule that can be checked and resumed.

The rule looks at the latest `window` steps in `BLOCKS` block means and fits a line to them. The loss is on a plateau
once that line falls over the window by less than the block means scatter about it, or by less than `TOLERANCE` of the
loss itself. The plateau began at the first step of the first such window. Stopping is the trainer's business.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

__all__ = ["BLOCKS", "TOLERANCE", "Plateau"]

BLOCKS = 20
TOLERANCE = 0.005


@dataclass
class Plateau:
    """The rule's state: feed it one loss per step. Its fields are plain values, so that it goes through JSON.

    Parameters
    ----------
    window : int
        Steps looked at, a multiple of `BLOCKS`; block means tame the noise of single batches.

    Attributes
    ----------
    began_at : int or None
        Number of steps taken when the plateau began; None while the loss still falls.
    """

    window: int = 400
    steps: int = 0
    block: list[float] = field(default_factory=list)
    means: list[float] = field(default_factory=list)
    began_at: int | None = None

    def __post_init__(self) -> None:
        if self.window < BLOCKS or self.window % BLOCKS:
            raise ValueError(f"a plateau's window is a multiple of {BLOCKS} steps, not {self.window}")

    def update(self, loss: float) -> None:
        """Take the next step's loss."""
        self.steps += 1
        self.block.append(loss)
        if len(self.block) < self.window // BLOCKS:
            return
        self.means = [*self.means, math.fsum(self.block) / len(self.block)][-BLOCKS:]
        self.block = []
        if self.began_at is None and len(self.means) == BLOCKS and _is_flat(self.means):
            self.began_at = self.steps - self.window

    @property
    def reached(self) -> bool:
        """Whether the loss has reached its plateau."""
        return self.began_at is not None


def _is_flat(means: Sequence[float]) -> bool:
    """Whether a line through the block means falls by less than they scatter about it, or by next to nothing."""
    values = np.asarray(means, dtype=np.float64)
    place = np.linspace(-0.5, 0.5, len(values))
    slope, level = np.polyfit(place, values, 1)
    scatter = np.std(values - (level + slope * place), ddof=2)
    return bool(-slope <= max(scatter, TOLERANCE * abs(level)))
