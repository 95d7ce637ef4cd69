"""The artifact that crosses sites: a network's fully factorized Gaussian posterior, and where it comes from.

A `Posterior` holds the mean and the standard deviation of every weight as plain tensors, with a JSON header that names
the architecture, the label map, the preprocessing, the number of training volumes and the prior. It reads and writes
the safetensors file and moves between networks; a MAP network is the same without standard deviations. It does not
train (`training`), combine (`consolidation`) or build networks (`meshnet`).
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dwc import __version__
from dwc.base.errors import InputError
from dwc.base.files import canonical_json, load_tensors, save_tensors
from dwc_kernels import FFGConv3d, inverse_softplus

__all__ = ["FORMAT_VERSION", "Posterior"]

FORMAT_VERSION = 1
_MANY = 2**53  # volumes; what every JSON reader takes for a whole number


@dataclass(frozen=True, eq=False)
class Posterior:
    """Means and standard deviations of a network's weights, N(mu, sigma^2) each, and their provenance.

    Parameters
    ----------
    mu : dict of str to Tensor
        Mean per parameter (``layers.0.weight`` [F, C, kD, kH, kW], ``layers.0.bias`` [F], ...), fp32 on the CPU.
    sigma : dict of str to Tensor
        Standard deviation per parameter, same names and shapes, > 0; empty for a MAP network.
    metadata : dict
        The JSON header: ``architecture``, ``label_map``, ``preprocessing``, ``n_volumes``, ``prior_sha256``,
        ``training``; ``format_version`` and ``package_version`` are filled in.
    name : str
        What messages call it; the path of a loaded file. Not part of the content.
    """

    mu: dict[str, Tensor]
    sigma: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    name: str = "posterior"

    def __post_init__(self) -> None:
        header = {"format_version": FORMAT_VERSION, "package_version": __version__, **self.metadata}
        # Through JSON once, so that what is in memory equals what a save and a load give back (tuples become lists).
        object.__setattr__(self, "metadata", json.loads(canonical_json(header)))
        object.__setattr__(self, "mu", {name: _fp32(tensor) for name, tensor in self.mu.items()})
        object.__setattr__(self, "sigma", {name: _fp32(tensor) for name, tensor in self.sigma.items()})

    @property
    def is_bayesian(self) -> bool:
        """Whether it has standard deviations; a MAP network has none."""
        return bool(self.sigma)

    def shared(self, key: str) -> Any:
        """A header entry that networks which go together share; a label map's content alone, not its file's name."""
        entry = self.metadata.get(key)
        return {"sha256": entry.get("sha256")} if key == "label_map" and isinstance(entry, dict) else entry

    @property
    def sha256(self) -> str:
        """Digest of the content, the same in memory, after a save and on any machine.

        SHA-256 of the canonical JSON header (`dwc.files.canonical_json`), a newline, and per tensor in the order of its
        file name (``layers.0.bias.mu``, ...): the canonical JSON of [name, shape], a newline, its little-endian fp32
        bytes. It is not the digest of the file's bytes, whose layout belongs to safetensors.
        """
        digest = hashlib.sha256(canonical_json(self.metadata).encode() + b"\n")
        for name, tensor in sorted(self._tensors()):
            digest.update(canonical_json([name, list(tensor.shape)]).encode() + b"\n")
            digest.update(tensor.numpy().astype("<f4", copy=False).tobytes())
        return digest.hexdigest()

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for kind, tensors in (("mu", self.mu), ("sigma", self.sigma)):
            for name, tensor in tensors.items():
                yield f"{name}.{kind}", tensor

    def validate(self) -> "Posterior":
        """Return itself if it is a proper distribution.

        Raises
        ------
        InputError
            If it is empty, a standard deviation is missing, extra or of another shape, a value is not finite, or a
            standard deviation is not positive; names the tensor.
        """
        if not self.mu:
            raise InputError(f"{self.name}: holds no tensors; write it again with dwc train")
        if self.sigma and self.sigma.keys() != self.mu.keys():
            odd = min(self.sigma.keys() ^ self.mu.keys())
            raise InputError(f"{self.name}: {odd} has only one of mu and sigma; write the file again with dwc train")
        for name, tensor in self._tensors():
            if not torch.isfinite(tensor).all():
                raise InputError(f"{self.name}: {name} holds non-finite values; train again at a lower learning rate")
        for name, sigma in self.sigma.items():
            if sigma.shape != self.mu[name].shape:
                raise InputError(
                    f"{self.name}: {name}.sigma has shape {list(sigma.shape)}, its mean {list(self.mu[name].shape)}; "
                    "write the file again with dwc train"
                )
            if not (sigma > 0).all():
                raise InputError(
                    f"{self.name}: {name}.sigma has {int((sigma <= 0).sum())} non-positive values; "
                    "a standard deviation is > 0, train again"
                )
        return self

    def save(self, path: str | Path) -> None:
        """Write the safetensors file, whole or not at all.

        Raises
        ------
        InputError
            If `validate` refuses it or the file cannot be written.
        """
        self.validate()
        save_tensors(path, dict(self._tensors()), self.metadata)

    @classmethod
    def load(cls, path: str | Path) -> "Posterior":
        """Read and check a file written by `save`.

        Raises
        ------
        InputError
            If it is missing, truncated, not safetensors, of another format version, not fp32, or `validate` refuses
            it; the line names file, tensor and remedy.
        """
        tensors, header = load_tensors(path)
        if "checkpoint_version" in header:
            raise InputError(f"{path}: is a checkpoint, to resume from; give its run's posterior.safetensors")
        version = header.get("format_version")
        if version != FORMAT_VERSION:
            raise InputError(
                f"{path}: format version {version!r}, this dwc {__version__} reads {FORMAT_VERSION}; "
                "install the dwc that wrote it or write the file again"
            )
        for key in ("architecture", "label_map", "preprocessing", "training"):
            if not isinstance(header.get(key) or {}, dict):
                raise InputError(f"{path}: its header's {key} is no JSON object; write the file again with dwc train")
        n_volumes = header.get("n_volumes")
        if n_volumes is not None and (type(n_volumes) is not int or not 0 <= n_volumes < _MANY):
            raise InputError(
                f"{path}: its header's n_volumes {str(n_volumes)[:20]!r} is no count; write it again with dwc train"
            )
        parts: dict[str, dict[str, Tensor]] = {"mu": {}, "sigma": {}}
        for full_name, tensor in tensors.items():
            name, _, kind = full_name.rpartition(".")
            if kind not in parts or not name:
                raise InputError(f"{path}: unexpected tensor {full_name}; give a posterior written by dwc")
            if tensor.dtype != torch.float32:
                raise InputError(f"{path}: {full_name} is {tensor.dtype}, not float32; write the file again with dwc")
            parts[kind][name] = tensor
        return cls(parts["mu"], parts["sigma"], header, name=str(path)).validate()

    @classmethod
    def from_model(cls, model: nn.Module, **metadata: Any) -> "Posterior":
        """Copy a network's weights: its `FFGConv3d` layers, or its `nn.Conv3d` layers as a MAP network.

        Means are the effective ones: a weight normalization is resolved. ``architecture`` is taken from the model if
        it has one and none is given.

        Raises
        ------
        ValueError
            If the model mixes both kinds of layer or holds parameters of another kind, which the file would lose.
        """
        mu: dict[str, Tensor] = {}
        sigma: dict[str, Tensor] = {}
        covered: set[int] = set()
        for layer, parameter, module in _parameters(model):
            mu[layer] = _copy(getattr(module, f"{parameter}_mu" if isinstance(module, FFGConv3d) else parameter))
            if isinstance(module, FFGConv3d):
                sigma[layer] = _copy(getattr(module, f"{parameter}_sigma"))
            covered.update(id(tensor) for tensor in module.parameters())
        if lost := [name for name, tensor in model.named_parameters() if id(tensor) not in covered]:
            raise ValueError(f"a posterior holds 3D convolutions only; {lost[0]} would be lost")
        if sigma and sigma.keys() != mu.keys():
            raise ValueError(f"{min(mu.keys() - sigma.keys())} is no FFGConv3d while others are; convert the model")
        if "architecture" not in metadata and hasattr(model, "architecture"):
            metadata["architecture"] = model.architecture
        return cls(mu, sigma, metadata)

    def to_model(self, model: nn.Module) -> None:
        """Set a network's weights in place.

        A Bayesian network takes means and standard deviations; from a MAP network it takes the means and keeps its
        standard deviations. A plain network takes the means.

        Raises
        ------
        InputError
            If names or shapes differ from the model's, or a weight-normalized filter would be all zero.
        """
        layers = self._matched(model)
        for name, parameter, module in layers:
            if not isinstance(module, FFGConv3d):
                self._assign(module, parameter, self.mu[name], name)
                continue
            self._assign(module, f"{parameter}_mu", self.mu[name], name)
            if self.sigma:
                self._assign(module, f"{parameter}_rho", inverse_softplus(self.sigma[name].double()), name)

    def set_prior_of(self, model: nn.Module) -> None:
        """Make this posterior the prior of a Bayesian network, in place (Eq. 8: yesterday's posterior).

        Raises
        ------
        InputError
            If it has no standard deviations, or names or shapes differ from the model's.
        """
        if not self.is_bayesian:
            raise InputError(
                f"{self.name}: a MAP network is no prior; give one trained with --mode vi, vcl or finetune"
            )
        for name, parameter, module in self._matched(model):
            if not isinstance(module, FFGConv3d):
                raise InputError(f"{self.name}: {name} of the network is not Bayesian and takes no prior")
            module.set_prior(**{f"{parameter}_mu": self.mu[name], f"{parameter}_sigma": self.sigma[name]})

    def _matched(self, model: nn.Module) -> list[tuple[str, str, nn.Module]]:
        layers = list(_parameters(model))
        names = {name for name, _, _ in layers}
        if names != self.mu.keys():
            odd = min(names ^ self.mu.keys())
            where = "the network" if odd in names else "the file"
            raise InputError(f"{self.name}: {odd} exists only in {where}; give networks of one architecture")
        for name, parameter, module in layers:
            tensor = getattr(module, f"{parameter}_mu" if isinstance(module, FFGConv3d) else parameter)
            if tensor.shape != self.mu[name].shape:
                raise InputError(
                    f"{self.name}: {name} has shape {list(self.mu[name].shape)}, the network's {list(tensor.shape)}; "
                    "give networks of one architecture"
                )
        return layers

    def _assign(self, module: nn.Module, attribute: str, value: Tensor, name: str) -> None:
        with torch.no_grad():
            target = getattr(module, attribute)
            if not parametrize.is_parametrized(module, attribute):
                target.copy_(value)
                return
            # A clone, because the parametrization keeps the tensor that it is given and training would change it.
            setattr(module, attribute, value.clone().to(target.device, target.dtype))
            if not torch.isfinite(getattr(module, attribute)).all():
                raise InputError(f"{self.name}: {name} has an all-zero filter, which weight normalization cannot hold")


def _parameters(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    """(name in the posterior, 'weight' or 'bias', module) for each 3D convolution's parameters."""
    for prefix, module in model.named_modules():
        if isinstance(module, (FFGConv3d, nn.Conv3d)):
            for parameter in ("weight", "bias"):
                attribute = f"{parameter}_mu" if isinstance(module, FFGConv3d) else parameter
                if getattr(module, attribute, None) is not None:
                    yield f"{prefix}.{parameter}".lstrip("."), parameter, module


def _fp32(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", torch.float32).contiguous()


def _copy(tensor: Tensor) -> Tensor:
    return _fp32(tensor).clone(memory_format=torch.contiguous_format)
