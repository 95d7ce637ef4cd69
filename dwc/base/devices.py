"""Choose the device to compute on."""

import torch

from dwc.base import launcher
from dwc.base.errors import InputError

__all__ = ["choose_device"]


def choose_device(name: str) -> torch.device:
    """The device for `auto` (a GPU if there is one), `cpu` or `cuda`; each process here needs its own GPU."""
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cuda" and not n_gpus:
        raise InputError("`device` cuda: PyTorch finds no GPU here; give cpu")
    if name == "cpu" or not n_gpus:
        return torch.device("cpu")
    if launcher.local_rank() >= n_gpus:
        raise InputError(f"`device` {name}: more processes than GPUs here; give --nproc-per-node={n_gpus}")
    return torch.device("cuda")
