"""`FFGConv3d`, the module: a Conv3d whose weights are independent Gaussians, with its prior and its KL divergence.

It reads like `torch.nn.Conv3d`. `convert` turns a trained network of Conv3d into one of FFGConv3d. How samples are
drawn is the work of `functional`.
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from dwc_kernels.functional import ffg_conv3d, gaussian_kl
from dwc_kernels.geometry import same_padding

__all__ = ["FFGConv3d", "convert", "inverse_softplus"]


def inverse_softplus(sigma: Tensor) -> Tensor:
    """rho with softplus(rho) = sigma, for sigma > 0, without overflow: rho = sigma + ln(1 - exp(-sigma))."""
    return sigma + torch.log(-torch.expm1(-sigma))


class FFGConv3d(nn.Module):
    """3D convolution with fully factorized Gaussian weights, sampled by local reparameterization.

    Each weight is N(weight_mu, weight_sigma^2) with weight_sigma = softplus(weight_rho), likewise each bias. Training
    mode samples the output (`dwc_kernels.ffg_conv3d`), eval mode returns its mean, and ``sample=`` overrides either.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        As in `torch.nn.Conv3d`.
    prior_mu, prior_sigma : float
        Gaussian prior of every weight and bias, kept as persistent buffers of full shape: see `set_prior`.
    sigma_init : float
        Initial standard deviation of every weight and bias.
    backend : str
        As in `dwc_kernels.ffg_conv3d`.

    Attributes
    ----------
    weight_mu, weight_rho : Parameter
        [F, C / groups, kD, kH, kW].
    bias_mu, bias_rho : Parameter or None
        [F].
    prior_weight_mu, prior_weight_sigma, prior_bias_mu, prior_bias_sigma : Tensor or None
        Buffers of the parameters' shapes.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int, int],
        stride: int | tuple[int, int, int] = 1,
        padding: int | tuple[int, int, int] | Literal["same", "valid"] = 0,
        dilation: int | tuple[int, int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        prior_mu: float = 0.0,
        prior_sigma: float = 1.0,
        sigma_init: float = 1e-3,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        if not sigma_init > 0:
            raise ValueError(f"sigma_init must be positive, got {sigma_init}")
        device = torch.get_default_device() if device is None else device
        # A Conv3d without storage knows the argument checks of torch.nn and reads ints as triples.
        conv = nn.Conv3d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta", dtype
        )
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, groups
        self.padding_mode, self.backend, self.sigma_init = padding_mode, backend, sigma_init
        for name, like in (("weight", conv.weight), ("bias", conv.bias)):
            for parameter in ("mu", "rho"):
                value = None if like is None else nn.Parameter(torch.empty_like(like, device=device))
                self.register_parameter(f"{name}_{parameter}", value)
            for moment in ("mu", "sigma"):
                value = None if like is None else torch.empty_like(like, device=device, requires_grad=False)
                self.register_buffer(f"prior_{name}_{moment}", value)
        self.reset_parameters()
        self.set_prior(weight_mu=prior_mu, weight_sigma=prior_sigma, bias_mu=prior_mu, bias_sigma=prior_sigma)

    def reset_parameters(self) -> None:
        """Draw the means as `torch.nn.Conv3d` draws its weights, and set every sigma to sigma_init."""
        bound = 1.0 / math.sqrt(math.prod(self.weight_rho.shape[1:]))
        for name in self._names:
            rho = getattr(self, f"{name}_rho")
            _assign(self, f"{name}_mu", torch.empty_like(rho).uniform_(-bound, bound))
            _assign(self, f"{name}_rho", inverse_softplus(torch.full_like(rho, self.sigma_init)))

    @property
    def _names(self) -> tuple[str, ...]:
        return ("weight",) if self.bias_mu is None else ("weight", "bias")

    @property
    def weight_sigma(self) -> Tensor:
        """Standard deviations of the weights, softplus(weight_rho), [F, C / groups, kD, kH, kW]."""
        return F.softplus(self.weight_rho)

    @property
    def bias_sigma(self) -> Tensor | None:
        """Standard deviations of the biases, softplus(bias_rho), [F], or None."""
        return None if self.bias_rho is None else F.softplus(self.bias_rho)

    def forward(self, input: Tensor, *, sample: bool | None = None, seed: Tensor | int | None = None) -> Tensor:
        """Convolve.

        Parameters
        ----------
        input : Tensor
            [N, C, D, H, W] or [C, D, H, W].
        sample : bool, optional
            True draws the output, False returns its mean; None samples in training mode only.
        seed : int64 scalar Tensor or int, optional
            Seed of the noise; None draws one from PyTorch's default generator.

        Returns
        -------
        Tensor
            [N, F, D', H', W'] or unbatched.
        """
        padding = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._sides(), mode=self.padding_mode), 0
        geometry = (self.stride, padding, self.dilation, self.groups)
        if not (self.training if sample is None else sample):
            return F.conv3d(input, self.weight_mu, self.bias_mu, *geometry)
        return ffg_conv3d(
            input, self.weight_mu, self.weight_sigma, self.bias_mu, self.bias_sigma, *geometry,
            seed=seed, backend=self.backend,
        )  # fmt: skip

    def _sides(self) -> list[int]:
        """Padding in front of and behind each axis, last axis first, as `torch.nn.functional.pad` reads it."""
        if self.padding == "valid":
            return [0] * 6
        if self.padding == "same":
            return [side for sides in reversed(same_padding(self.kernel_size, self.dilation)) for side in sides]
        return [p for p in reversed(self.padding) for _ in range(2)]

    def kl_loss(self) -> Tensor:
        """KL[q || prior] of all weights and biases, a scalar in nats: closed form, no forward needed."""
        return sum(
            gaussian_kl(
                getattr(self, f"{name}_mu"), getattr(self, f"{name}_sigma"),
                getattr(self, f"prior_{name}_mu"), getattr(self, f"prior_{name}_sigma"),
            )
            for name in self._names
        )  # fmt: skip

    def set_prior(
        self,
        posterior: "FFGConv3d | None" = None,
        *,
        weight_mu: Tensor | float | None = None,
        weight_sigma: Tensor | float | None = None,
        bias_mu: Tensor | float | None = None,
        bias_sigma: Tensor | float | None = None,
    ) -> None:
        """Replace the prior, or the parts of it that are given.

        Parameters
        ----------
        posterior : FFGConv3d, optional
            A layer of the same shape whose means and sigmas become the prior (variational continual learning).
        weight_mu, weight_sigma, bias_mu, bias_sigma : Tensor or float, optional
            Values broadcast to the parameters' shapes; what is left out stays as it is.

        Raises
        ------
        ValueError
            A shape that does not broadcast, a value that is not finite, or a sigma that is not positive.
        """
        given = {"weight_mu": weight_mu, "weight_sigma": weight_sigma, "bias_mu": bias_mu, "bias_sigma": bias_sigma}
        if posterior is not None:
            if any(value is not None for value in given.values()):
                raise ValueError("give a layer or its parts, not both")
            given = {name: getattr(posterior, name) for name in given}
            if posterior._names != self._names:
                raise ValueError("one of the two layers has a bias and the other has none")
        checked = {
            name: self._checked_prior(name, value, exact=posterior is not None)
            for name, value in given.items()
            if value is not None and getattr(self, f"prior_{name}") is not None
        }
        for name, value in checked.items():  # all of them or none
            getattr(self, f"prior_{name}").copy_(value)

    def _checked_prior(self, name: str, value: Tensor | float, *, exact: bool) -> Tensor:
        """A prior's value in the shape and dtype of its buffer."""
        prior = getattr(self, f"prior_{name}")
        value = torch.as_tensor(value).detach()
        fits = (
            value.shape == prior.shape
            if exact
            else value.dim() <= prior.dim()
            and all(
                theirs in (1, ours) for theirs, ours in zip(reversed(value.shape), reversed(prior.shape), strict=False)
            )
        )
        if not fits:
            raise ValueError(f"{name} has shape {tuple(value.shape)}, the prior {tuple(prior.shape)}")
        value = value.to(prior.dtype)
        if not value.is_meta and not (value.isfinite().all() and (name.endswith("mu") or (value > 0).all())):
            raise ValueError(f"the prior's {name} must be finite{' and positive' * name.endswith('sigma')}")
        return value.expand_as(prior)

    @classmethod
    def from_conv3d(cls, conv: nn.Conv3d, **kwargs) -> "FFGConv3d":
        """Make a layer with the means of a trained `torch.nn.Conv3d`.

        Parameters
        ----------
        conv : nn.Conv3d
            Its effective weights become the means; a `torch.nn.utils.parametrizations.weight_norm` on them goes over
            to ``weight_mu``, and what is frozen stays frozen.
        **kwargs
            prior_mu, prior_sigma, sigma_init, backend.

        Returns
        -------
        FFGConv3d
            On the device, in the dtype and in the mode (training or eval) of ``conv``.

        Raises
        ------
        ValueError
            If the weight or the bias has another parametrization, which the means could not keep, or ``conv`` does
            more than convolve: it has hooks (as pruning and the older `torch.nn.utils.weight_norm` are) or a forward
            of its own.
        """
        if conv._forward_pre_hooks or conv._forward_hooks:
            raise ValueError(f"{conv} has forward hooks, which may change its weight; remove them first")
        if any(getattr(type(conv), name) is not getattr(nn.Conv3d, name) for name in ("forward", "_conv_forward")):
            raise ValueError(f"{type(conv).__name__} has a forward of its own; convert takes torch.nn.Conv3d")
        norm = _weight_norm(conv)
        layer = cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, conv.weight.device, conv.weight.dtype, **kwargs,
        )  # fmt: skip
        _assign(layer, "weight_mu", conv.weight)
        if conv.bias is not None:
            _assign(layer, "bias_mu", conv.bias)
            layer.bias_mu.requires_grad_(conv.bias.requires_grad)
        if norm is None:
            layer.weight_mu.requires_grad_(conv.weight.requires_grad)
        else:
            parametrizations.weight_norm(layer, "weight_mu", dim=norm.dim if norm.dim >= 0 else None)
            pairs = (parametrized.parametrizations for parametrized in (conv, layer))
            theirs, ours = (next(iter(pair.values())).parameters() for pair in pairs)
            for source, target in zip(theirs, ours, strict=True):
                target.requires_grad_(source.requires_grad)
        return layer.train(conv.training)

    def extra_repr(self) -> str:
        """The arguments, as `torch.nn.Conv3d` prints them."""
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={self.stride}"
        defaults = {
            "padding": (0, 0, 0),
            "dilation": (1, 1, 1),
            "groups": 1,
            "padding_mode": "zeros",
            "backend": "auto",
        }
        for name, default in defaults.items():
            value = getattr(self, name)
            text += f", {name}={value!r}" if value != default else ""
        return text + (", bias=False" if self.bias_mu is None else "")


def _assign(module: nn.Module, name: str, value: Tensor) -> None:
    """Set a parameter's value, through its parametrization where it has one."""
    with torch.no_grad():
        if parametrize.is_parametrized(module, name):
            setattr(module, name, value.detach())
        else:
            getattr(module, name).copy_(value)


def _weight_norm(conv: nn.Conv3d) -> nn.Module | None:
    """The weight normalization of a convolution, if it has one."""
    if not parametrize.is_parametrized(conv):
        return None
    found = [(name, list(chain)) for name, chain in conv.parametrizations.items()]
    if [name for name, _ in found] != ["weight"] or [type(p).__name__ for p in found[0][1]] != ["_WeightNorm"]:
        raise ValueError(f"{conv} has parametrizations other than weight_norm on its weight; remove them first")
    return found[0][1][0]


def convert(model: nn.Module, **kwargs) -> nn.Module:
    """Replace every `torch.nn.Conv3d` of a network by an `FFGConv3d` with its trained means, in place.

    Parameters
    ----------
    model : nn.Module
        A network, or a single Conv3d.
    **kwargs
        prior_mu, prior_sigma, sigma_init, backend, passed to `FFGConv3d.from_conv3d`.

    Returns
    -------
    nn.Module
        ``model`` itself, or the new layer where ``model`` is a Conv3d.
    """
    layers: dict[int, nn.Module] = {}  # a Conv3d that stands in several places stays one layer

    def converted(module: nn.Module) -> nn.Module:
        if id(module) not in layers:
            is_conv = isinstance(module, nn.Conv3d)
            layers[id(module)] = FFGConv3d.from_conv3d(module, **kwargs) if is_conv else module
            for name, child in () if is_conv else tuple(module._modules.items()):
                if child is not None:
                    module._modules[name] = converted(child)
        return layers[id(module)]

    return converted(model)
