"""Checkpoints of a training run: network, Adam's moments and the run's state in one file, written atomically."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dwc.base.errors import InputError
from dwc.base.files import canonical_json, load_tensors, save_tensors
from dwc.training.plateau import Plateau

__all__ = ["Checkpoint", "State", "fingerprint_of", "load_checkpoint", "save_checkpoint"]

_FORMAT = 1


@dataclass
class State:
    """The state of a run between two steps, as JSON values.

    `epoch` counts the epochs that are validated, logged and saved; the sums run over the steps since then; `identity`
    is that of `RunSpecification`.
    """

    plateau: Plateau
    step: int = 0
    epoch: int = 0
    loss_sum: float = 0.0
    nll_sum: float = 0.0
    identity: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]

    @property
    def identity(self) -> dict[str, Any]:
        """The identity of the run that wrote it."""
        return self.values["identity"]

    @property
    def fingerprint(self) -> str:
        """The fingerprint of the run that wrote it."""
        return fingerprint_of(self.identity)

    def state(self) -> State:
        return State(**{**self.values, "plateau": Plateau(**self.values["plateau"])})

    def restore(self, network: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Load the tensors into the network and the optimizer."""
        network.load_state_dict(
            {
                name.removeprefix("network."): tensor
                for name, tensor in self.tensors.items()
                if name.startswith("network.")
            }
        )
        moments: dict[int, dict[str, Tensor]] = {}
        for name, tensor in self.tensors.items():
            if name.startswith("optimizer."):
                _, index, slot = name.split(".")
                moments.setdefault(int(index), {})[slot] = tensor
        optimizer.load_state_dict({"state": moments, "param_groups": optimizer.state_dict()["param_groups"]})


def fingerprint_of(identity: Mapping[str, Any]) -> str:
    """SHA-256, hex, of a run's identity."""
    return hashlib.sha256(canonical_json(identity).encode()).hexdigest()


def save_checkpoint(path: Path, network: nn.Module, optimizer: torch.optim.Optimizer, state: State) -> None:
    """Write network, optimizer and state; if that fails, the previous file is unchanged."""
    tensors = {f"network.{name}": tensor for name, tensor in network.state_dict().items()}
    for index, slots in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{index}.{slot}": tensor for slot, tensor in slots.items()}
    save_tensors(path, tensors, {"checkpoint_version": _FORMAT, "state": asdict(state)})


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint of this version or the one before."""
    tensors, header = load_tensors(path)
    if header.get("checkpoint_version") != _FORMAT:
        raise InputError(f"{path}: is not a checkpoint of this version of dwc; start a new run in another `out`")
    values = dict(header["state"])
    if "binding" in values:  # its name in version 0.1
        values["identity"] = values.pop("binding")
    return Checkpoint(tensors, values)
