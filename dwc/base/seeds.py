"""Derive seeds from a run's seed and other numbers."""

import numpy as np

__all__ = ["seed_of"]


def seed_of(*entropy: int) -> int:
    """A 63-bit seed for PyTorch from numbers >= 0 (a seed, a step, ...), unrelated for neighbouring numbers.

    Trailing zeros do not count: seed_of(3, 5) is seed_of(3, 5, 0).
    """
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
