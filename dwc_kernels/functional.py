"""`ffg_conv3d`, the function: arguments checked as `torch.nn.functional.conv3d` reads them, backend chosen.

It always samples; a deterministic convolution with the means is `torch.nn.functional.conv3d` itself.
"""

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.utils import _triple

from dwc_kernels import op
from dwc_kernels.backends import choose_backend
from dwc_kernels.geometry import Triple, output_size, same_padding, transposed_output_size

__all__ = ["ffg_conv3d", "ffg_conv_transpose3d", "ffg_linear"]

_CAST = (torch.float16, torch.bfloat16, torch.float32)  # what autocast casts
_DTYPES = (*_CAST, torch.float64)


def ffg_conv3d(
    input: Tensor,
    weight_mu: Tensor,
    weight_sigma: Tensor,
    bias_mu: Tensor | None = None,
    bias_sigma: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] | str = 0,
    dilation: int | tuple[int, ...] = 1,
    groups: int = 1,
    *,
    seed: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sample a 3D convolution whose weights are independent Gaussians, by local reparameterization.

    Per output element, y = mean + sqrt(var) * eps with mean = conv3d(x, weight_mu, bias_mu),
    var = conv3d(x^2, weight_sigma^2) + bias_sigma^2 and eps ~ N(0, 1) (McClure et al. 2018, Eqs. 12-15). No floor is
    added to var: sigma = 0 gives the mean itself, and the derivative of sqrt(var) is defined as 0 where var = 0.

    Parameters
    ----------
    input : Tensor
        [N, C, D, H, W] or [C, D, H, W]; fp16, bf16, fp32 or fp64. The output keeps its layout; channels_last_3d is the
        native one, which ``.to(memory_format=torch.channels_last_3d)`` gives also to a single channel.
    weight_mu, weight_sigma : Tensor
        [F, C / groups, kD, kH, kW], in the dtype of the input (any, under autocast). Sigmas are standard deviations.
    bias_mu, bias_sigma : Tensor, optional
        [F]; both or neither.
    stride, dilation : int or triple of int
    padding : int, triple of int, "same" or "valid"
        Zeros on each side, as in `torch.nn.functional.conv3d`.
    groups : int
    seed : int64 scalar Tensor or int, optional
        eps of output element i, its index in logical NCDHW order, is a pure function of (seed, i). None draws a seed
        from PyTorch's default generator of the input's device, so `torch.manual_seed` governs.
    backend : {"auto", "reference", "triton"}
        "auto" takes the Triton kernels for CUDA tensors they can take (see `backends.why_not_triton`), else the
        reference.

    Returns
    -------
    Tensor
        [N, F, D', H', W'] (or unbatched) in the input's dtype. Differentiable in every floating-point argument, once
        and in reverse mode.

    Raises
    ------
    ValueError
        Shapes, dtypes, devices or options that do not fit together, or a backend that cannot run.
    RuntimeError
        For a second derivative, and for forward-mode tangents.
    """
    input, weight_mu, weight_sigma, bias_mu, bias_sigma = _autocast(input, weight_mu, weight_sigma, bias_mu, bias_sigma)
    stride, dilation = _integers("stride", stride), _integers("dilation", dilation)
    if not isinstance(padding, str):
        padding = _integers("padding", padding)
    _check(input, weight_mu, weight_sigma, bias_mu, bias_sigma, stride, padding, dilation, groups)
    batched, padding = _resolve_padding(_batched(input), weight_mu.shape[2:], padding, dilation)
    size = output_size(batched.shape[2:], weight_mu.shape[2:], stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"the padded volume {tuple(batched.shape[2:])} (padding {padding}) is smaller than the kernel "
            f"{tuple(weight_mu.shape[2:])} at dilation {dilation}; add padding"
        )
    arguments = (batched, weight_mu, weight_sigma, bias_mu, bias_sigma)
    y = op.sample(
        *arguments, stride, padding, dilation, groups, _seed_tensor(seed, input.device),
        choose_backend(backend, batched, weight_mu, size, stride, groups), _keeps_r(*arguments), None,
    )  # fmt: skip
    return y if input.dim() == 5 else y.squeeze(0)


def ffg_conv_transpose3d(
    input: Tensor,
    weight_mu: Tensor,
    weight_sigma: Tensor,
    bias_mu: Tensor | None = None,
    bias_sigma: Tensor | None = None,
    stride: int | tuple[int, ...] = 1,
    padding: int | tuple[int, ...] = 0,
    output_padding: int | tuple[int, ...] = 0,
    groups: int = 1,
    dilation: int | tuple[int, ...] = 1,
    *,
    seed: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sample a transposed 3D convolution: `ffg_conv3d` with the arguments of `torch.nn.functional.conv_transpose3d`.

    Weights are [C, F / groups, kD, kH, kW]. At stride 1 it runs as the convolution with the mirrored weights, and so on
    the kernels where there are some; at other strides on the reference.
    """
    input, weight_mu, weight_sigma, bias_mu, bias_sigma = _autocast(input, weight_mu, weight_sigma, bias_mu, bias_sigma)
    stride, padding, dilation = (
        _integers(*named) for named in (("stride", stride), ("padding", padding), ("dilation", dilation))
    )
    output_padding = _integers("output_padding", output_padding)
    _check_tensors(input, weight_mu, weight_sigma, bias_mu, bias_sigma)
    n_filters = weight_mu.shape[1] * groups
    if groups < 1 or input.shape[-4] != weight_mu.shape[0] or weight_mu.shape[0] % groups:
        raise ValueError(
            f"{input.shape[-4]} channels do not fit weights [C, F / groups, ...] of shape {tuple(weight_mu.shape)} and "
            f"groups={groups}"
        )
    _check_biases(n_filters, bias_mu, bias_sigma)
    _check_geometry(stride, padding, dilation)
    if any(not 0 <= o < max(s, d) for o, s, d in zip(output_padding, stride, dilation, strict=True)):
        raise ValueError(f"output_padding must be smaller than stride or dilation, got {output_padding}")
    batched, kernel = _batched(input), weight_mu.shape[2:]
    size = transposed_output_size(batched.shape[2:], kernel, stride, padding, dilation, output_padding)
    if min(size) < 1:
        raise ValueError(f"padding {padding} leaves nothing of the output, {size} voxels")
    if stride == (1, 1, 1):
        padded, reach = _mirrored_padding(batched, kernel, padding, dilation, output_padding)
        mu, sigma = (_mirrored(w, groups) for w in (weight_mu, weight_sigma))
        y = ffg_conv3d(padded, mu, sigma, bias_mu, bias_sigma, 1, reach, dilation, groups, seed=seed, backend=backend)
    else:
        if any(o >= s for o, s in zip(output_padding, stride, strict=True)):
            raise ValueError(f"output_padding must be smaller than the strides {stride}, got {output_padding}")
        if backend == "triton":
            raise ValueError("backend='triton' cannot run a transposed convolution with strides; use 'auto'")
        choose_backend(backend, batched, weight_mu, size, stride, groups)
        arguments = (batched, weight_mu, weight_sigma, bias_mu, bias_sigma)
        y = op.sample(
            *arguments, stride, padding, dilation, groups, _seed_tensor(seed, input.device),
            "reference", _keeps_r(*arguments), size,
        )  # fmt: skip
    return y if input.dim() == 5 else y.squeeze(0)


def _mirrored(weight: Tensor, groups: int) -> Tensor:
    """[C, F / groups, ...] -> [F, C / groups, ...]: a transposed convolution at stride 1 is a convolution with it."""
    return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3, 4)


def _mirrored_padding(
    x: Tensor, kernel: Triple, padding: Triple, dilation: Triple, output_padding: Triple
) -> tuple[Tensor, Triple]:
    """The input and padding of the mirrored convolution; what is lopsided is added to the input, or cut off it."""
    reach = tuple(d * (k - 1) - p for d, k, p in zip(dilation, kernel, padding, strict=True))
    if min(reach) >= 0 and not any(output_padding):
        return x, reach
    sides = [(r, r + o) for r, o in zip(reach, output_padding, strict=True)]
    return F.pad(x, [side for front, behind in reversed(sides) for side in (front, behind)]), (0, 0, 0)


def ffg_linear(
    input: Tensor,
    weight_mu: Tensor,
    weight_sigma: Tensor,
    bias_mu: Tensor | None = None,
    bias_sigma: Tensor | None = None,
    *,
    seed: Tensor | int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Sample a linear layer: input [..., C], weights [F, C], output [..., F].

    It is `ffg_conv3d` of a volume [1, C, 1, 1, M] whose M voxels are the rows of the input.
    """
    if weight_mu.dim() != 2 or input.dim() < 1 or input.shape[-1] != weight_mu.shape[1]:
        raise ValueError(
            f"expected input [..., C] and weights [F, C], got shapes {tuple(input.shape)} and {tuple(weight_mu.shape)}"
        )
    if input.numel() == 0:  # the right shape, and a gradient of zero for all
        bias = None if bias_mu is None or bias_sigma is None else bias_mu + bias_sigma
        return F.linear(input, weight_mu + weight_sigma, bias)
    rows = input.reshape(-1, input.shape[-1])
    volume = rows.t()[None, :, None, None, :]  # a view: channels_last_3d
    mu, sigma = (w[:, :, None, None, None] for w in (weight_mu, weight_sigma))
    y = ffg_conv3d(volume, mu, sigma, bias_mu, bias_sigma, seed=seed, backend=backend)
    # No view for autograd, so that an activation in place leaves the hooks of FSDP2 on the output where they are.
    return torch.ops.aten._unsafe_view(y[0, :, 0, 0].t(), (*input.shape[:-1], weight_mu.shape[0]))


def _autocast(input: Tensor, *rest: Tensor | None) -> list[Any]:
    """The arguments in autocast's dtype where it is on."""
    device = input.device.type
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return [input, *rest]
    dtype = torch.get_autocast_dtype(device)
    return [t if t is None or t.dtype not in _CAST else t.to(dtype) for t in (input, *rest)]


def _batched(input: Tensor) -> Tensor:
    return input if input.dim() == 5 else input.unsqueeze(0)


def _seed_tensor(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed as an int64 scalar on the input's device, so that no backend has to wait for the host to draw it."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        try:
            # An int as it is: torch.compile makes it dynamic after the second value, which operator.index would undo.
            value = seed if isinstance(seed, int) else operator.index(seed)
            return torch.full((), value, dtype=torch.int64, device=device)
        except (TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"seed must be a 64-bit integer, got {seed!r}") from error
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed must be an int64 scalar, got {seed.dtype} of shape {tuple(seed.shape)}")
    return seed.reshape(()).to(device)


def _keeps_r(x: Tensor, mu: Tensor, sigma: Tensor, bias_mu: Tensor | None, bias_sigma: Tensor | None) -> bool:
    """Whether a backward may ask for r: not for the means' gradients. Forward mode, which has none, is refused."""
    given = [t for t in (x, mu, sigma, bias_mu, bias_sigma) if t is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise RuntimeError("ffg_conv3d has no forward-mode derivative; use reverse mode (torch.autograd.grad)")
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, sigma, bias_sigma))


def _integers(name: str, value: Any) -> Triple:
    """An int, or three of them, as a triple."""
    triple = _triple(value)
    if len(triple) != 3 or not all(isinstance(v, int | torch.SymInt) for v in triple):
        raise ValueError(f"{name} must be an int or three of them, got {value!r}")
    return tuple(triple)


def _resolve_padding(x: Tensor, kernel: Triple, padding: Triple | str, dilation: Triple) -> tuple[Tensor, Triple]:
    """The padding as a triple; where 'same' is lopsided (even kernels), the odd zero is added behind the volume."""
    if not isinstance(padding, str):
        return x, padding
    if padding == "valid":
        return x, (0, 0, 0)
    sides = same_padding(kernel, dilation)
    if any(front != behind for front, behind in sides):
        x = F.pad(x, [side for front, behind in reversed(sides) for side in (0, behind - front)])
    return x, tuple(front for front, _ in sides)


def _check(
    x: Tensor,
    weight_mu: Tensor,
    weight_sigma: Tensor,
    bias_mu: Tensor | None,
    bias_sigma: Tensor | None,
    stride: Triple,
    padding: Triple | str,
    dilation: Triple,
    groups: int,
) -> None:
    """Refuse what does not fit together, naming shapes and values."""
    _check_tensors(x, weight_mu, weight_sigma, bias_mu, bias_sigma)
    n_filters, channels = weight_mu.shape[0], x.shape[-4]
    _check_biases(n_filters, bias_mu, bias_sigma)
    if groups < 1 or channels != weight_mu.shape[1] * groups or n_filters % groups:
        raise ValueError(
            f"{channels} channels into {n_filters} filters of {weight_mu.shape[1]} channels do not fit groups={groups}"
        )
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be an int, a triple, 'same' or 'valid', got {padding!r}")
        if padding == "same" and stride != (1, 1, 1):
            raise ValueError(f"padding='same' needs stride 1, got {stride}")
    _check_geometry(stride, (0, 0, 0) if isinstance(padding, str) else padding, dilation)


def _check_tensors(
    x: Tensor, weight_mu: Tensor, weight_sigma: Tensor, bias_mu: Tensor | None, bias_sigma: Tensor | None
) -> None:
    """Dimensions, dtypes and devices."""
    if x.dim() not in (4, 5) or weight_mu.dim() != 5:
        raise ValueError(
            f"expected input [N, C, D, H, W] or [C, D, H, W] and weights of 5 dimensions, got shapes "
            f"{tuple(x.shape)} and {tuple(weight_mu.shape)}"
        )
    if weight_sigma.shape != weight_mu.shape:
        raise ValueError(f"weight_sigma {tuple(weight_sigma.shape)} differs from weight_mu {tuple(weight_mu.shape)}")
    if (bias_mu is None) != (bias_sigma is None):
        raise ValueError("give both bias_mu and bias_sigma, or neither")
    if x.dtype not in _DTYPES:
        raise ValueError(f"input must be floating point (fp16, bf16, fp32, fp64), got {x.dtype}")
    named = {"weight_mu": weight_mu, "weight_sigma": weight_sigma, "bias_mu": bias_mu, "bias_sigma": bias_sigma}
    for name, t in named.items():
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{name} is {t.dtype} on {t.device}, the input {x.dtype} on {x.device}")


def _check_biases(n_filters: int, bias_mu: Tensor | None, bias_sigma: Tensor | None) -> None:
    for name, bias in (("bias_mu", bias_mu), ("bias_sigma", bias_sigma)):
        if bias is not None and bias.shape != (n_filters,):
            raise ValueError(f"{name} must have shape ({n_filters},), got {tuple(bias.shape)}")


def _check_geometry(stride: Triple, padding: Triple, dilation: Triple) -> None:
    if min(stride) < 1 or min(dilation) < 1:
        raise ValueError(f"stride and dilation must be positive, got {stride} and {dilation}")
    if min(padding) < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
