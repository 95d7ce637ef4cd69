"""The variational layers: `FFGConv3d`, `FFGConvTranspose3d` and `FFGLinear`, which read like their torch.nn namesakes.

    layer = FFGConv3d(1, 96, 3, padding=1)
    y = layer(torch.randn(1, 1, 32, 32, 32))            # training mode samples, eval mode returns the mean
    loss = y.square().mean() + layer.kl_loss() / 1e6

Parameters, prior and checkpoints are the work of `factorized`, samples that of `functional`, whole networks that of
`conversion` and `network`.
"""

from copy import deepcopy
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from dwc_kernels.factorized import FFGModule
from dwc_kernels.functional import ffg_conv3d, ffg_conv_transpose3d, ffg_linear
from dwc_kernels.geometry import Triple, same_padding
from dwc_kernels.plain import take_over, why_not_taken_over

__all__ = ["FFGConv3d", "FFGConvTranspose3d", "FFGLinear"]

Device = torch.device | str | None
Size = int | tuple[int, int, int]


class FFGConv3d(FFGModule):
    """3D convolution with fully factorized Gaussian weights, sampled by local reparameterization.

    Each weight is N(weight_mu, weight_sigma^2) with weight_sigma = softplus(weight_rho), likewise each bias. Training
    mode samples the output (`dwc_kernels.ffg_conv3d`), eval mode returns its mean, and ``sample=`` overrides either.

    Every voxel is drawn independently. That is right for a loss over voxels, but a sum over many of them, such as the
    volume of a structure, then spreads far too little: for it, draw the weights once with `dwc_kernels.draw_weights`.

    Parameters
    ----------
    in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, device, dtype
        As in `torch.nn.Conv3d`.
    prior_mu, prior_sigma : float
        Gaussian prior of every weight and bias: see `set_prior`.
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
        Buffers that broadcast to the parameters' shapes; a prior given as a number is a scalar.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size | Literal["same", "valid"] = 0,
        dilation: Size = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        prior_mu: float = 0.0,
        prior_sigma: float = 1.0,
        sigma_init: float = 1e-3,
        backend: str = "auto",
    ) -> None:
        conv = nn.Conv3d(
            in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias, padding_mode, "meta", dtype
        )
        super().__init__(conv, device, prior_mu, prior_sigma, sigma_init, backend)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, conv.kernel_size
        self.stride, self.padding, self.dilation, self.groups = conv.stride, conv.padding, conv.dilation, groups
        self.padding_mode = padding_mode

    def forward(self, input: Tensor, *, sample: bool | None = None, seed: Tensor | int | None = None) -> Tensor:
        """Convolve.

        Parameters
        ----------
        input : Tensor
            [N, C, D, H, W] or [C, D, H, W].
        sample : bool, optional
            True draws the output, False returns its mean; None samples in training mode only.
        seed : int64 scalar Tensor or int, optional
            Seed of the noise; None draws one from PyTorch's default generator. Two layers of one output shape draw the
            same noise from the same seed: to seed a whole network use `dwc_kernels.seed_noise`.

        Returns
        -------
        Tensor
            [N, F, D', H', W'] or unbatched.
        """
        if isinstance(input, Proxy):
            return self._traced(input, sample=sample, seed=seed)
        padding: Triple | str | int = self.padding
        if self.padding_mode != "zeros":
            input, padding = F.pad(input, self._sides(), mode=self.padding_mode), 0
        geometry: tuple[Any, ...] = (self.stride, padding, self.dilation, self.groups)
        if fixed := self._fixed_weights(sample, input):
            return F.conv3d(input, *fixed, *geometry)
        return ffg_conv3d(
            input, self.weight_mu, self.weight_sigma, self.bias_mu, self.bias_sigma, *geometry,
            seed=self._seed(seed, input.device), backend=self.backend,
        )  # fmt: skip

    def _sides(self) -> list[int]:
        """Padding in front of and behind each axis, last axis first, as `torch.nn.functional.pad` reads it."""
        if not isinstance(self.padding, str):
            return [p for p in reversed(self.padding) for _ in range(2)]
        if self.padding == "valid":
            return [0] * 6
        return [side for sides in reversed(same_padding(self.kernel_size, self.dilation)) for side in sides]

    @classmethod
    def from_conv3d(cls, conv: nn.Conv3d, **kwargs: Any) -> "FFGConv3d":
        """Make a layer with a copy of the weights of a trained `torch.nn.Conv3d` as means.

        Parameters
        ----------
        conv : nn.Conv3d
            A `torch.nn.utils.parametrizations.weight_norm` on its weight goes over to ``weight_mu``, and what is frozen
            stays frozen.
        **kwargs
            prior_mu, prior_sigma, sigma_init, backend.

        Raises
        ------
        ValueError
            If the weight or the bias has another parametrization, which the means could not keep, or ``conv`` does
            more than convolve: its weight is made by hooks, as in pruning, or it has a forward of its own.
        """
        _refuse(conv, nn.Conv3d)
        layer = cls._like(conv, **kwargs)
        take_over(layer, deepcopy(conv))
        return layer

    @classmethod
    def _like(cls, conv: Any, **kwargs: Any) -> "FFGConv3d":
        return cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.dilation,
            conv.groups, conv.bias is not None, conv.padding_mode, conv.weight.device, conv.weight.dtype, **kwargs,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments, as `torch.nn.Conv3d` prints them."""
        return _convolution_repr(self, padding_mode="zeros")


class FFGConvTranspose3d(FFGModule):
    """3D transposed convolution with fully factorized Gaussian weights, sampled by local reparameterization.

    As `FFGConv3d`, with the arguments of `torch.nn.ConvTranspose3d`; weights are [C, F / groups, kD, kH, kW]. Every
    voxel is drawn independently, here too.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Size,
        stride: Size = 1,
        padding: Size = 0,
        output_padding: Size = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Size = 1,
        padding_mode: Literal["zeros"] = "zeros",
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        prior_mu: float = 0.0,
        prior_sigma: float = 1.0,
        sigma_init: float = 1e-3,
        backend: str = "auto",
    ) -> None:
        conv = nn.ConvTranspose3d(
            in_channels, out_channels, kernel_size, stride, padding, output_padding, groups, bias, dilation,
            padding_mode, "meta", dtype,
        )  # fmt: skip
        super().__init__(conv, device, prior_mu, prior_sigma, sigma_init, backend)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, conv.kernel_size
        self.stride, self.padding, self.output_padding = conv.stride, conv.padding, conv.output_padding
        self.dilation, self.groups, self.padding_mode = conv.dilation, groups, padding_mode

    def forward(
        self,
        input: Tensor,
        output_size: list[int] | None = None,
        *,
        sample: bool | None = None,
        seed: Tensor | int | None = None,
    ) -> Tensor:
        """Convolve: as `FFGConv3d.forward`, with the output_size of `torch.nn.ConvTranspose3d`."""
        if isinstance(input, Proxy):
            return self._traced(input, output_size, sample=sample, seed=seed)
        output_padding: Any = self.output_padding
        if output_size is not None:
            sizes: tuple[Any, ...] = (self.stride, self.padding, self.kernel_size, 3, self.dilation)
            layer: Any = self
            output_padding = nn.ConvTranspose3d._output_padding(layer, input, output_size, *sizes)
        geometry: tuple[Any, ...] = (self.stride, self.padding, output_padding, self.groups, self.dilation)
        if fixed := self._fixed_weights(sample, input):
            return F.conv_transpose3d(input, *fixed, *geometry)
        return ffg_conv_transpose3d(
            input, self.weight_mu, self.weight_sigma, self.bias_mu, self.bias_sigma, *geometry,
            seed=self._seed(seed, input.device), backend=self.backend,
        )  # fmt: skip

    @classmethod
    def from_conv_transpose3d(cls, conv: nn.ConvTranspose3d, **kwargs: Any) -> "FFGConvTranspose3d":
        """Make a layer with a copy of the weights of a trained layer as means: as `FFGConv3d.from_conv3d`."""
        _refuse(conv, nn.ConvTranspose3d)
        layer = cls._like(conv, **kwargs)
        take_over(layer, deepcopy(conv))
        return layer

    @classmethod
    def _like(cls, conv: Any, **kwargs: Any) -> "FFGConvTranspose3d":
        return cls(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding, conv.output_padding,
            conv.groups, conv.bias is not None, conv.dilation, conv.padding_mode, conv.weight.device,
            conv.weight.dtype, **kwargs,
        )  # fmt: skip

    def extra_repr(self) -> str:
        """The arguments, as `torch.nn.ConvTranspose3d` prints them."""
        return _convolution_repr(self, output_padding=(0, 0, 0))


class FFGLinear(FFGModule):
    """Linear layer with fully factorized Gaussian weights, sampled by local reparameterization.

    As `FFGConv3d`, with the arguments of `torch.nn.Linear`; weights are [out_features, in_features]. It is the 1x1x1
    convolution of a volume whose voxels are the input's rows, each of which is drawn independently.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Device = None,
        dtype: torch.dtype | None = None,
        *,
        prior_mu: float = 0.0,
        prior_sigma: float = 1.0,
        sigma_init: float = 1e-3,
        backend: str = "auto",
    ) -> None:
        linear = nn.Linear(in_features, out_features, bias, "meta", dtype)
        super().__init__(linear, device, prior_mu, prior_sigma, sigma_init, backend)
        self.in_features, self.out_features = in_features, out_features

    def forward(self, input: Tensor, *, sample: bool | None = None, seed: Tensor | int | None = None) -> Tensor:
        """Multiply `input` [..., in_features] into [..., out_features]: sample and seed as in `FFGConv3d.forward`."""
        if isinstance(input, Proxy):
            return self._traced(input, sample=sample, seed=seed)
        if fixed := self._fixed_weights(sample, input):
            return F.linear(input, *fixed)
        return ffg_linear(
            input, self.weight_mu, self.weight_sigma, self.bias_mu, self.bias_sigma,
            seed=self._seed(seed, input.device), backend=self.backend,
        )  # fmt: skip

    @classmethod
    def from_linear(cls, linear: nn.Linear, **kwargs: Any) -> "FFGLinear":
        """Make a layer with a copy of the weights of a trained layer as means: as `FFGConv3d.from_conv3d`."""
        _refuse(linear, nn.Linear)
        layer = cls._like(linear, **kwargs)
        take_over(layer, deepcopy(linear))
        return layer

    @classmethod
    def _like(cls, linear: Any, **kwargs: Any) -> "FFGLinear":
        device, dtype = linear.weight.device, linear.weight.dtype
        return cls(linear.in_features, linear.out_features, linear.bias is not None, device, dtype, **kwargs)

    def extra_repr(self) -> str:
        """The arguments, as `torch.nn.Linear` prints them."""
        text = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias_mu is not None}"
        return self._repr(text, {})


def _convolution_repr(layer: FFGModule, **defaults: Any) -> str:
    text = f"{layer.in_channels}, {layer.out_channels}, kernel_size={layer.kernel_size}, stride={layer.stride}"
    text = layer._repr(text, {"padding": (0, 0, 0), "dilation": (1, 1, 1), "groups": 1, **defaults})
    return text + (", bias=False" if layer.bias_mu is None else "")


def _refuse(plain: nn.Module, kind: type[nn.Module]) -> None:
    if reason := why_not_taken_over(plain, kind):
        raise ValueError(reason)
