"""Where a workflow computes, and what its random numbers follow from; not what it computes."""

import torch

from dwc.base import launcher
from dwc.base.errors import InputError

__all__ = [
    "choose_device",
]


def choose_device(name: str) -> torch.device:
    """The device of `auto` (a GPU where there is one), `cpu` or `cuda`.

    Raises
    ------
    InputError
        If a GPU is asked for and there is none, or fewer than processes on this machine.
    """
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not n_gpus:
        raise InputError("`device` cuda: PyTorch finds no GPU here; give cpu")
    if name == "cpu" or not n_gpus:
        return torch.device("cpu")
    if launcher.local_rank() >= n_gpus:
        raise InputError(f"`device` {name}: more processes than GPUs here; give --nproc-per-node={n_gpus}")
    return torch.device("cuda")
