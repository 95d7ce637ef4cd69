"""Where a training run stands, on disk: the network, Adam's moments and a JSON state in one safetensors file.

Written whole or not at all, so that a run killed at any moment finds its last checkpoint. The room also writes the
run's log, one JSON line per epoch, and cuts it back to a checkpoint. What the state means is `training`'s business.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

from dwc.base.errors import InputError
from dwc.base.files import load_tensors, save_tensors

__all__ = [
    "load_checkpoint",
    "restore",
    "save_checkpoint",
]

_FORMAT = 1


def save_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Write network, optimizer and JSON state.

    Raises
    ------
    InputError
        If the file cannot be written; the previous one is untouched.
    """
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": tensor for slot, tensor in slots.items()}
    save_tensors(path, tensors, {"checkpoint_version": _FORMAT, "state": state})


def load_checkpoint(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and JSON state of a checkpoint; `restore` puts the tensors in place.

    Raises
    ------
    InputError
        If the file is damaged or no checkpoint of this version.
    """
    tensors, header = load_tensors(path)
    if header.get("checkpoint_version") != _FORMAT:
        raise InputError(f"{path}: is no checkpoint of this version of dwc; start anew in another --out")
    return tensors, header["state"]


def restore(tensors: dict[str, torch.Tensor], network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into the network and the optimizer that it was made from."""
    weights = {name.removeprefix("network."): tensor for name, tensor in tensors.items() if name.startswith("network.")}
    network.load_state_dict(weights)
    moments: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in tensors.items():
        if name.startswith("optimizer."):
            _, index, slot = name.split(".")
            moments.setdefault(int(index), {})[slot] = tensor
    optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})
