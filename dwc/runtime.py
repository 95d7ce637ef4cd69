"""Where a workflow computes, and what its random numbers follow from; not what it computes."""

import numpy as np
import torch

from dwc import launcher
from dwc.errors import InputError

__all__ = ["choose_device", "seed_of"]


def choose_device(name: str) -> torch.device:
    """The device of `auto` (a GPU where there is one), `cpu` or `cuda`.

    Raises
    ------
    InputError
        If a GPU is asked for and there is none, or fewer than processes on this machine.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not n_gpus:
        raise InputError("--device cuda: PyTorch finds no GPU here; give --device cpu")
    if name == "cpu" or not n_gpus:
        return torch.device("cpu")
    if launcher.local_rank() >= n_gpus:
        raise InputError(f"--device {name}: more processes than GPUs here; give --nproc-per-node={n_gpus}")
    return torch.device("cuda")


def seed_of(*entropy: int) -> int:
    """A 63-bit seed for PyTorch from numbers >= 0 (a seed, a step, ...), without pattern between neighbours.

    Zeros at the end do not count: seed_of(3, 5) is seed_of(3, 5, 0).
    """
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> 1)
