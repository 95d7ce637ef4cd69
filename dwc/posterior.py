"""The file that sites exchange: a network's fully factorized Gaussian (FFG) posterior and its provenance."""

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
from dwc.base.files import DIGEST, canonical_json, content_sha256, load_entries, save_tensors
from dwc.data.intensity import IN_HEADERS
from dwc.header import check_header
from dwc_kernels import FFGConv3d, inverse_softplus

__all__ = ["FORMAT_VERSION", "Posterior"]

FORMAT_VERSION = 2  # 1 is read too; it may lack the digest of the content
_SIGNATURE = "dwc_signature"  # entry of the file's metadata
_LEFT_OUT = {  # entries that files of earlier versions may lack, with what they mean then
    "architecture": {"activation": "relu"},
    "preprocessing": {"intensity": IN_HEADERS["z_score"]},
}
_COARSE = 0.1  # of sigma: rounding of a mean to fp32 beyond which `coarse` counts it


@dataclass(frozen=True, eq=False)
class Posterior:
    """Mean and standard deviation of every weight of a network, and where they come from.

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
        Used in messages; the path of a loaded file. Not part of the content.
    signature : str
        Signature of the content, as `dwc.signing` makes it; "" if unsigned. Not part of the content.
    """

    mu: dict[str, Tensor]
    sigma: dict[str, Tensor]
    metadata: dict[str, Any] = field(default_factory=dict)
    name: str = "posterior"
    signature: str = ""

    def __post_init__(self) -> None:
        header = {"format_version": FORMAT_VERSION, "package_version": __version__, **self.metadata}
        # One JSON round trip, so that the header equals the one read back from a file (tuples become lists).
        object.__setattr__(self, "metadata", json.loads(canonical_json(header)))
        object.__setattr__(self, "mu", {name: _fp32(tensor) for name, tensor in self.mu.items()})
        object.__setattr__(self, "sigma", {name: _fp32(tensor) for name, tensor in self.sigma.items()})

    @property
    def is_bayesian(self) -> bool:
        """Whether it has standard deviations."""
        return bool(self.sigma)

    def entry(self, key: str) -> Any:
        """The header's entry `key`, with what files of earlier versions leave out filled in."""
        entry = self.metadata.get(key)
        if not isinstance(entry, dict):
            return entry
        return {**entry, **{name: value for name, value in _LEFT_OUT.get(key, {}).items() if name not in entry}}

    def shared(self, key: str) -> Any:
        """The part of entry `key` that must be equal for networks to go together; label maps compare by content."""
        entry = self.entry(key)
        if key == "label_map" and isinstance(entry, dict):
            return {"sha256": entry.get("sha256")}
        return entry

    @property
    def sha256(self) -> str:
        """Digest of header and tensors, `dwc.base.files.content_sha256`; it does not depend on the file's layout."""
        return content_sha256(dict(self._tensors()), self.metadata)

    @property
    def payload_sha256(self) -> str:
        """Digest of the tensors alone: the same under another header."""
        return content_sha256(dict(self._tensors()), {})

    def _tensors(self) -> Iterator[tuple[str, Tensor]]:
        for kind, tensors in (("mu", self.mu), ("sigma", self.sigma)):
            for name, tensor in tensors.items():
                yield f"{name}.{kind}", tensor

    def validate(self) -> "Posterior":
        """Return itself if all values are finite and every mean has a positive standard deviation, or none has one."""
        check_header(self.name, self.metadata)
        if not self.mu:
            raise InputError(f"{self.name}: holds no tensors; write it again with dwc train")
        if self.sigma and self.sigma.keys() != self.mu.keys():
            odd = min(self.sigma.keys() ^ self.mu.keys())
            raise InputError(f"{self.name}: {odd} has only one of mu and sigma; write the file again with dwc train")
        for name, tensor in self._tensors():
            if not tensor.numel():
                raise InputError(f"{self.name}: {name} is empty; write the file again with dwc train")
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
        """Validate and write the safetensors file `path` atomically."""
        self.validate()
        entries = {_SIGNATURE: self.signature} if self.signature else {}
        save_tensors(path, dict(self._tensors()), self.metadata, **entries)

    def coarse(self) -> dict[str, int]:
        """Weights per tensor whose mean fp32 stores with a rounding of more than a tenth of their sigma."""
        counts = {}
        for name, sigma in self.sigma.items():
            mu = self.mu[name].abs()
            rounding = (torch.nextafter(mu, torch.full_like(mu, torch.inf)) - mu) / 2
            counts[name] = int((rounding > _COARSE * sigma).sum())
        return {name: count for name, count in counts.items() if count}

    def distance(self, other: "Posterior") -> float:
        """Mean over the weights of |mu - mu_other| / sigma_other.

        `other` is Bayesian too and has the same architecture.
        """
        total = sum(
            ((self.mu[name] - mu).abs() / other.sigma[name]).sum(dtype=torch.float64).item()
            for name, mu in other.mu.items()
        )
        return total / sum(mu.numel() for mu in other.mu.values())

    @classmethod
    def load(cls, path: str | Path) -> "Posterior":
        """Read the file `path`, written by `save`, and validate it."""
        tensors, header, entries = load_entries(path)
        if "checkpoint_version" in header:
            raise InputError(f"{path}: is a checkpoint, not a posterior; give its run's posterior.safetensors")
        version = header.get("format_version")
        if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
            raise InputError(
                f"{path}: format version {str(version)[:20]}, this dwc {__version__} reads 1 to {FORMAT_VERSION}; "
                "install the dwc that wrote it or write the file again"
            )
        if version > 1 and DIGEST not in entries:
            raise InputError(f"{path}: was altered (the digest of its content is gone); copy or write it again")
        parts: dict[str, dict[str, Tensor]] = {"mu": {}, "sigma": {}}
        for full_name, tensor in tensors.items():
            name, _, kind = full_name.rpartition(".")
            if kind not in parts or not name:
                raise InputError(f"{path}: unexpected tensor {full_name}; give a posterior written by dwc")
            if tensor.dtype != torch.float32:
                raise InputError(f"{path}: {full_name} is {tensor.dtype}, not float32; write the file again with dwc")
            parts[kind][name] = tensor
        check_header(str(path), header)
        signature = entries.get(_SIGNATURE, "")
        return cls(parts["mu"], parts["sigma"], header, name=str(path), signature=signature).validate()

    @classmethod
    def from_model(cls, model: nn.Module, **metadata: Any) -> "Posterior":
        """Copy the weights of a network of `FFGConv3d` layers, or of `nn.Conv3d` layers (a MAP network).

        Weight normalization is resolved: the means are the effective ones. `metadata` are entries of the header, of
        which ``architecture`` defaults to the model's.

        Raises
        ------
        ValueError
            If the model mixes both kinds of layer, or has parameters that the file cannot hold.
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
            raise ValueError(f"a posterior holds only 3D convolutions; {lost[0]} would be lost")
        if sigma and sigma.keys() != mu.keys():
            raise ValueError(f"{min(mu.keys() - sigma.keys())} is not an FFGConv3d while others are; convert the model")
        if "architecture" not in metadata and hasattr(model, "architecture"):
            metadata["architecture"] = model.architecture
        return cls(mu, sigma, metadata)

    def to_model(self, model: nn.Module) -> None:
        """Set the weights of the network `model` in place.

        A Bayesian network keeps its standard deviations where this is a MAP network. A plain network takes the means.
        A weight-normalized filter cannot be all zero.
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
        """Make this posterior the prior of the Bayesian network `model`, in place (Eq. 8)."""
        if not self.is_bayesian:
            raise InputError(
                f"{self.name}: a MAP network cannot be a prior; give one trained with `mode` vi, vcl or finetune"
            )
        for name, parameter, module in self._matched(model):
            if not isinstance(module, FFGConv3d):
                raise InputError(f"{self.name}: {name} of the network is not Bayesian and cannot take a prior")
            tensors: dict[str, Any] = {f"{parameter}_mu": self.mu[name], f"{parameter}_sigma": self.sigma[name]}
            module.set_prior(**tensors)

    def _matched(self, model: nn.Module) -> list[tuple[str, str, nn.Module]]:
        """The model's `_parameters`, after checking that names and shapes are this posterior's."""
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
            # The parametrization keeps the tensor it is given, and training would change it in place: give it a clone.
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
