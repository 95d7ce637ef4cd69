"""The rule for when a training loss has begun to "oscillate around a stable value"; it can be checked and resumed.

Fit a line to the means of `BLOCKS` blocks over the latest `window` steps. The loss is on a plateau once that line falls
over the window by less than the scatter of the means around it, or by less than `TOLERANCE` of the loss itself. The
plateau began at the first step of the first such window.
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
    """The rule's state, updated with one loss per step; its fields are JSON values.

    `window` is the number of steps considered, a multiple of `BLOCKS`. `began_at` is the number of steps taken when the
    plateau began, None while the loss still falls.
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
        """Add the next step's loss."""
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
        return self.began_at is not None


def _is_flat(means: Sequence[float]) -> bool:
    """Whether a line through the means falls by less than their scatter or the tolerance."""
    values = np.asarray(means, dtype=np.float64)
    place = np.linspace(-0.5, 0.5, len(values))
    slope, level = np.polyfit(place, values, 1)
    scatter = np.std(values - (level + slope * place), ddof=2)
    return bool(-slope <= max(scatter, TOLERANCE * abs(level)))
