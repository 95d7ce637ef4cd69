"""`FFGModule`, what all layers with Gaussian weights share: parameters, prior, KL divergence and checkpoints.

The convolutions and the linear layer themselves are in `module`.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from dwc_kernels.backends import BACKENDS
from dwc_kernels.kl import gaussian_kl_of_rho

__all__ = ["FFGModule", "Override", "inverse_softplus", "leaves", "sharded_like", "weight_key", "whole"]

Drawn = tuple[Tensor, Tensor | None]  # a weight and a bias, drawn once
MOMENTS = ("mu", "sigma")


@dataclass(frozen=True, eq=False)
class Override:
    """What a context of `drawing` makes of a layer: a sampling one, its mean, or drawn weights."""

    choice: bool | Drawn | None


def inverse_softplus(sigma: Tensor) -> Tensor:
    """rho with softplus(rho) = sigma, for sigma > 0, without overflow: rho = sigma + ln(1 - exp(-sigma))."""
    return sigma + torch.log(-torch.expm1(-sigma))


class FFGModule(nn.Module):
    """A layer whose weights are independent Gaussians N(mu, softplus(rho)^2), with a Gaussian prior.

    Attributes
    ----------
    weight_mu, weight_rho, bias_mu, bias_rho : Parameter or None
        Of the plain layer's shapes.
    prior_weight_mu, prior_weight_sigma, prior_bias_mu, prior_bias_sigma : Tensor or None
        Persistent buffers that broadcast to the parameters: scalars as long as the prior is given as numbers.
    """

    weight_mu: Tensor
    weight_rho: Tensor
    bias_mu: Tensor | None
    bias_rho: Tensor | None

    def __init__(
        self,
        plain: Any,  # of the torch.nn class, without storage: checks and reads the arguments
        device: torch.device | str | None,
        prior_mu: float,
        prior_sigma: float,
        sigma_init: float,
        backend: str,
    ) -> None:
        super().__init__()
        if backend not in BACKENDS:
            raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
        if not plain.weight.is_floating_point():
            raise ValueError(f"dtype must be a real floating-point type, got {plain.weight.dtype}")
        rho = inverse_softplus(_number("sigma_init", sigma_init, plain.weight.dtype))
        if not rho.isfinite():
            raise ValueError(f"sigma_init must be positive and finite in {plain.weight.dtype}, got {sigma_init}")
        device = torch.get_default_device() if device is None else device
        self.sigma_init, self.backend = sigma_init, backend
        self._prior_numbers: dict[str, float] = {}  # the parts of the prior that reset_parameters can restore
        self._lost_priors: set[str] = set()  # those that to_empty has lost
        self._override: bool | Drawn | None = None  # of the last context of drawing that is open; set there
        self._overrides: list[Override] = []  # of all that are open
        self._rank_key = 0  # set by network.seed_noise
        for name, like in (("weight", plain.weight), ("bias", plain.bias)):
            for parameter in ("mu", "rho"):
                value = None if like is None else nn.Parameter(torch.empty(like.shape, dtype=like.dtype, device=device))
                self.register_parameter(f"{name}_{parameter}", value)
            for moment in ("mu", "sigma"):
                scalar = None if like is None else torch.empty((), dtype=like.dtype, device=device)
                self.register_buffer(f"prior_{name}_{moment}", scalar)
        self.reset_parameters()
        prior = {"mu": prior_mu, "sigma": prior_sigma}
        given = {f"{name}_{moment}": prior[moment] for name in self._names for moment in MOMENTS}
        self._write_prior(self._checked_prior(given))

    def reset_parameters(self) -> None:
        """Draw the means as the torch.nn layer draws its weights, set every sigma to sigma_init, and write the numbers
        of the prior again, which `to_empty` has lost. A prior that was given as tensors has to be set again."""
        bound = 1.0 / math.sqrt(math.prod(self.weight_rho.shape[1:]))
        for name in self._names:
            rho = getattr(self, f"{name}_rho")
            assign(self, f"{name}_mu", torch.empty_like(rho).uniform_(-bound, bound))
        self._reset_sigmas_and_prior()

    def _reset_sigmas_and_prior(self) -> None:
        for name in self._names:
            rho = getattr(self, f"{name}_rho")
            assign(self, f"{name}_rho", inverse_softplus(torch.full_like(rho, self.sigma_init)))
        for name, number in self._prior_numbers.items():
            getattr(self, f"prior_{name}").fill_(number)

    def _initial(self, name: str) -> Tensor | None:
        """What `reset_parameters` would write, on the CPU, for a tensor on meta; None where nothing is known."""
        like = getattr(self, name)
        if name.endswith("rho"):
            return inverse_softplus(torch.full_like(like, self.sigma_init, device="cpu"))
        number = self._prior_numbers.get(name.removeprefix("prior_"))
        return None if number is None else torch.full_like(like, number, device="cpu")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FFGModule":
        """After `to_empty`, which gives random memory, write the sigmas and numbers that a checkpoint may not bring."""
        was_meta = self.weight_rho.is_meta
        super()._apply(fn, recurse)
        emptied = was_meta or getattr(fn, "__qualname__", "").startswith("Module.to_empty.")
        if emptied and not self.weight_rho.is_meta:
            self._lost_priors = {f"{name}_{moment}" for name in self._names for moment in MOMENTS} - set(
                self._prior_numbers
            )
            self._reset_sigmas_and_prior()
        return self

    def __getstate__(self) -> dict[str, Any]:
        """What a copy or a file has: made within `draw_weights` or `sampling`, it is outside it."""
        return {**vars(self), "_override": None, "_overrides": []}

    def __deepcopy__(self, memo: dict[int, Any]) -> "FFGModule":
        replica = memo[id(self)] = self.__new__(type(self))
        vars(replica).update(deepcopy(FFGModule.__getstate__(self), memo))  # a parametrized class has one that raises
        return replica

    def __getattr__(self, name: str) -> Any:
        if name in ("weight", "bias"):
            raise AttributeError(
                f"{type(self).__name__} has no {name} but a distribution of it: read {name}_mu for its mean, or leave "
                "the layer plain with convert(..., skip=...)"
            )
        return super().__getattr__(name)

    @property
    def _names(self) -> tuple[str, ...]:
        return ("weight",) if self.bias_mu is None else ("weight", "bias")

    @property
    def weight_sigma(self) -> Tensor:
        """Standard deviations of the weights, softplus(weight_rho)."""
        return F.softplus(self.weight_rho)

    @property
    def bias_sigma(self) -> Tensor | None:
        """Standard deviations of the biases, softplus(bias_rho), or None."""
        return None if self.bias_rho is None else F.softplus(self.bias_rho)

    def _traced(self, input: Any, *arguments: Any, **options: Any) -> Any:
        """Under torch.fx's symbolic tracing: a call of the layer as a whole, as of those of torch.nn."""
        path = input.tracer.path_of_module(self)
        return input.tracer.create_proxy("call_module", path, (input, *arguments), options)

    def _fixed_weights(self, sample: bool | None, input: Tensor | None = None) -> Drawn | None:
        """Weight and bias of the plain layer that stands in for this one; None where the output is to be sampled."""
        if input is not None and input.is_complex():
            raise ValueError(f"input must be floating point (fp16, bf16, fp32, fp64), got {input.dtype}")
        choice = self._override if sample is None else sample
        if isinstance(choice, tuple):
            weight, bias = choice
            dtype = self.weight_rho.dtype  # that of the forward, in which FSDP2's mixed precision gathers it
            return weight.to(dtype), None if bias is None else bias.to(dtype)
        if not (self.training if choice is None else choice):
            return self.weight_mu, self.bias_mu
        _refuse_recorders()
        return None

    def _seed(self, seed: Tensor | int | None, device: torch.device) -> Tensor | int | None:
        """The given seed, or one from PyTorch's generator, made the rank's own if `network.seed_noise` was called."""
        if seed is not None or not self._rank_key:
            return seed
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device) ^ self._rank_key

    def kl_loss(self) -> Tensor:
        """KL[q || prior] of all weights and biases, a scalar in nats: closed form, no forward needed."""
        return torch.stack([self.kl_of(name) for name in self._names]).sum()

    def kl_of(self, name: str) -> Tensor:
        """KL[q || prior] of "weight" or "bias"."""
        if lost := sorted(part for part in self._lost_priors if part.startswith(name)):
            raise RuntimeError(f"to_empty has lost the prior's {lost[0]}: call set_prior or load a checkpoint")
        mu = getattr(self, f"{name}_mu")
        prior = (_replicated(getattr(self, f"prior_{name}_{moment}"), mu) for moment in MOMENTS)
        return whole(gaussian_kl_of_rho(mu, getattr(self, f"{name}_rho"), *prior))

    def set_prior(
        self,
        posterior: "FFGModule | None" = None,
        *,
        weight_mu: Tensor | float | None = None,
        weight_sigma: Tensor | float | None = None,
        bias_mu: Tensor | float | None = None,
        bias_sigma: Tensor | float | None = None,
    ) -> None:
        """Replace the prior, or the parts of it that are given; all of them or, with an error, none.

        Parameters
        ----------
        posterior : FFGModule, optional
            A layer of the same shape whose means and sigmas become the prior (variational continual learning).
        weight_mu, weight_sigma, bias_mu, bias_sigma : Tensor or float, optional
            Values that broadcast to the parameters' shapes; what is left out stays as it is.
        """
        given = {"weight_mu": weight_mu, "weight_sigma": weight_sigma, "bias_mu": bias_mu, "bias_sigma": bias_sigma}
        if posterior is not None and any(value is not None for value in given.values()):
            raise ValueError("give a layer or its parts, not both")
        if not isinstance(posterior, FFGModule | None):
            raise ValueError(f"posterior must be a variational layer, got a {type(posterior).__name__}")
        self._write_prior(self._checked_prior(given) if posterior is None else self._checked_posterior(posterior))

    def _checked_posterior(self, posterior: "FFGModule") -> dict[str, Tensor]:
        if posterior._names != self._names:
            raise ValueError("one of the two layers has a bias and the other has none")
        given = {
            f"{name}_{moment}": getattr(posterior, f"{name}_{moment}") for name in self._names for moment in MOMENTS
        }
        return self._checked_prior(given, exact=True)

    def _checked_prior(self, given: Mapping[str, Tensor | float | None], exact: bool = False) -> dict[str, Tensor]:
        """The parts of a prior that the layer has, in its dtype."""
        checked = {}
        for name, value in given.items():
            rho = getattr(self, f"{name.split('_')[0]}_rho")
            if value is None:
                continue
            if rho is None:
                raise ValueError(f"{name} was given, but the layer has no bias")
            value = value.detach() if isinstance(value, Tensor) else _number(name, value, rho.dtype)
            if not hasattr(rho, "device_mesh"):
                value = whole(value)
            if value.shape != rho.shape if exact else not _broadcasts(value.shape, rho.shape):
                raise ValueError(f"{name} has shape {tuple(value.shape)}, the parameter {tuple(rho.shape)}")
            value = value.to(rho.dtype)
            if wrong := _why_no_prior(name, value):
                raise ValueError(wrong)
            checked[name] = value
        return checked

    def _write_prior(self, checked: Mapping[str, Tensor]) -> None:
        for name, value in checked.items():
            self._buffers[f"prior_{name}"] = value.to(self.weight_rho.device, copy=True)
            self._note_number(name, value)

    def _share(self, owner: "FFGModule", name: str) -> None:
        """Take the sigma and the prior of a weight that is tied to the one of another layer."""
        setattr(self, f"{name}_rho", getattr(owner, f"{name}_rho"))
        for part in (f"{name}_{moment}" for moment in MOMENTS):
            self._buffers[f"prior_{part}"] = getattr(owner, f"prior_{part}").clone()
            self._prior_numbers.pop(part, None)
            if part in owner._prior_numbers:
                self._prior_numbers[part] = owner._prior_numbers[part]

    def _note_number(self, name: str, value: Tensor) -> None:
        """Remember a prior that is one number, for reset_parameters."""
        self._lost_priors.discard(name)
        self._prior_numbers.pop(name, None)
        if value.dim() == 0 and not value.is_meta:
            self._prior_numbers[name] = value.item()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Also takes the state of a plain layer, whose weight and bias become the means, and priors of any shape."""
        plain = [key for name in ("weight", "bias") for key in _plain_keys(name) if prefix + key in state_dict]
        means = {key: key.replace("weight", "weight_mu").replace("bias", "bias_mu") for key in plain}
        # `set_model_state_dict` adds the means as they are to a whole plain checkpoint, which one rank alone may have.
        if plain and (
            hasattr(self.weight_rho, "device_mesh") or any(prefix + key in state_dict for key in means.values())
        ):
            args[-1].append(  # error_msgs
                f"Unexpected key {prefix}{plain[0]} of a plain layer in a sharded network or beside the means; "
                "rename the keys by mean_names(net)"
            )
            return
        for key, mean in means.items():
            state_dict[prefix + mean] = state_dict.pop(prefix + key)
        parts = [f"{name}_{moment}" for name in self._names for moment in MOMENTS]
        for name in parts:
            if wrong := self._fit_prior(name, state_dict, f"{prefix}prior_{name}"):
                args[-1].append(wrong)  # error_msgs
        if plain:  # what a plain layer does not have stays as it is
            for name, tensor in (*self._parameters.items(), *self._buffers.items()):
                if name.endswith("rho") or name.startswith("prior_"):
                    kept = self._initial(name) if tensor is not None and tensor.is_meta else tensor
                    if kept is not None:
                        state_dict.setdefault(prefix + name, kept)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _fit_prior(self, name: str, state_dict: dict[str, Any], key: str) -> str | None:
        """Give a prior's buffer the shape of what is about to be loaded, one number if that is all it is."""
        value, buffer = state_dict.get(key), self._buffers[f"prior_{name}"]
        if (
            value is None
            or buffer is None
            or not _broadcasts(value.shape, getattr(self, f"{name.split('_')[0]}_rho").shape)
        ):
            return None
        if wrong := _why_no_prior(name, value):
            return f"{key}: {wrong}"
        if not value.is_meta and value.numel() and (value == value.flatten()[0]).all():
            value = state_dict[key] = value.flatten()[0].clone()
        if value.shape != buffer.shape or hasattr(value, "device_mesh") != hasattr(buffer, "device_mesh"):
            self._buffers[f"prior_{name}"] = torch.empty_like(value, dtype=buffer.dtype, device=buffer.device)
        self._note_number(name, value)
        return None

    def _repr(self, arguments: str, defaults: Mapping[str, Any]) -> str:
        """``arguments``, and those of the others that differ from their defaults, as torch.nn prints them."""
        values = {name: (getattr(self, name), default) for name, default in {**defaults, "backend": "auto"}.items()}
        named = [f"{name}={value!r}" for name, (value, default) in values.items() if value != default]
        return ", ".join([arguments, *named])


def _refuse_recorders() -> None:
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError("ONNX has no operator that samples; call eval() to export the mean, or draw_weights")
    if torch._C._is_tracing():
        raise RuntimeError("torch.jit.trace cannot record a sample; call eval() to trace the mean, or draw_weights")


# Called while tracing, not traced: the exporter's second attempt traces with a compiler that takes the answer to be no.
_refuse_recorders._dynamo_marked_constant = True  # type: ignore[attr-defined]


def assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter's value, through its parametrization where it has one."""
    with torch.no_grad():
        if parametrize.is_parametrized(module, name):
            setattr(module, name, value.detach())
        else:
            getattr(module, name).copy_(value)


def leaves(module: nn.Module, name: str) -> Iterable[Tensor]:
    """The Parameters that make up a parameter: itself, or the originals of its parametrization."""
    if parametrize.is_parametrized(module, name):
        parametrizations: Any = module.parametrizations
        return [t for key, t in parametrizations[name].named_parameters(recurse=False) if key.startswith("original")]
    return [getattr(module, name)]


def weight_key(module: nn.Module, *names: str) -> tuple[Any, ...]:
    """What is equal for weights that layers share: the identities of their leaves, and how the weights are made."""
    key: list[Any] = []
    for name in names:
        key += map(id, leaves(module, name))
        if parametrize.is_parametrized(module, name):
            parametrizations: Any = module.parametrizations
            key += [(type(p), getattr(p, "dim", None)) for p in parametrizations[name]]
    return tuple(key)


def whole(t: Tensor) -> Tensor:
    """All of a tensor that FSDP2 has sharded."""
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def _number(name: str, value: Any, dtype: torch.dtype) -> Tensor:
    try:
        return torch.tensor(value, dtype=dtype, device="cpu")
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{name} must be a number or a tensor, got {value!r}") from None


def _why_no_prior(name: str, value: Tensor) -> str | None:
    positive = name.endswith("sigma")
    if value.is_meta or (value.isfinite().all() and (not positive or (value > 0).all())):
        return None
    return f"the prior's {name} must be finite{' and positive' if positive else ''}"


def _broadcasts(shape: torch.Size, target: torch.Size) -> bool:
    pairs = zip(reversed(shape), reversed(target), strict=False)
    return len(shape) <= len(target) and all(ours in (1, theirs) for ours, theirs in pairs)


def _plain_keys(name: str) -> tuple[str, ...]:
    """The names of a plain layer's weight or bias, weight-normalized or not, in a state dict."""
    normalized = (f"parametrizations.{name}.original0", f"parametrizations.{name}.original1")
    return (name, *normalized, f"{name}_g", f"{name}_v")


def _replicated(prior: Tensor, like: Any) -> Tensor:
    """A whole prior next to a parameter that FSDP2 has sharded."""
    if not hasattr(like, "device_mesh") or hasattr(prior, "device_mesh"):
        return prior
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh
    return DTensor.from_local(prior, mesh, [Replicate()] * mesh.ndim, run_check=False)


def sharded_like(t: Tensor, like: Any) -> Tensor:
    """A whole tensor that broadcasts to a parameter, sharded as FSDP2 has sharded that."""
    if not hasattr(like, "device_mesh"):
        return t
    replicated: Any = _replicated(t.expand(like.shape).contiguous(), like)
    return replicated.redistribute(like.device_mesh, like.placements)
