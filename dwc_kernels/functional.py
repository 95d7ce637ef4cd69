"""`ffg_conv3d`, the function: arguments checked as `torch.nn.functional.conv3d` reads them, backend chosen.

It always samples; a deterministic convolution with the means is `torch.nn.functional.conv3d` itself.
"""

import operator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.modules.utils import _triple

from dwc_kernels import op
from dwc_kernels.backends import choose_backend
from dwc_kernels.geometry import Triple, output_size, same_padding

__all__ = ["ffg_conv3d", "gaussian_kl"]

_CAST = (torch.float16, torch.bfloat16, torch.float32)  # what autocast casts
_DTYPES = (*_CAST, torch.float64)


def ffg_conv3d(
    input: Tensor,
    weight_mu: Tensor,
    weight_sigma: Tensor,
    bias_mu: Tensor | None = None,
    bias_sigma: Tensor | None = None,
    stride: int | tuple[int, int, int] = 1,
    padding: int | tuple[int, int, int] | str = 0,
    dilation: int | tuple[int, int, int] = 1,
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
        native one.
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
    device = input.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        input, weight_mu, weight_sigma, bias_mu, bias_sigma = (
            t if t is None or t.dtype not in _CAST else t.to(dtype)
            for t in (input, weight_mu, weight_sigma, bias_mu, bias_sigma)
        )
    stride, dilation = _integers("stride", stride), _integers("dilation", dilation)
    if not isinstance(padding, str):
        padding = _integers("padding", padding)
    _check(input, weight_mu, weight_sigma, bias_mu, bias_sigma, stride, padding, dilation, groups)
    batched = input if input.dim() == 5 else input.unsqueeze(0)
    batched, padding = _resolve_padding(batched, weight_mu.shape[2:], padding, dilation)
    size = output_size(batched.shape[2:], weight_mu.shape[2:], stride, padding, dilation)
    if min(size) < 1:
        raise ValueError(
            f"the padded volume {tuple(batched.shape[2:])} (padding {padding}) is smaller than the kernel "
            f"{tuple(weight_mu.shape[2:])} at dilation {dilation}; add padding"
        )
    arguments = (batched, weight_mu, weight_sigma, bias_mu, bias_sigma)
    y, _ = op.ffg_conv3d(
        *arguments, stride, padding, dilation, groups, _seed_tensor(seed, input.device),
        choose_backend(backend, batched, weight_mu, size, stride, groups), _wants_gradient(*arguments),
    )  # fmt: skip
    return y if input.dim() == 5 else y.squeeze(0)


def gaussian_kl(mu: Tensor, sigma: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> Tensor:
    """KL divergence between fully factorized Gaussians, summed over weights, in nats.

    KL[N(mu, sigma^2) || N(prior_mu, prior_sigma^2)] = sum 1/2 (v - 1 - ln v + ((mu - prior_mu) / prior_sigma)^2) with
    v = (sigma / prior_sigma)^2 (the L_KL of McClure et al. 2018, Eq. 5).

    Parameters
    ----------
    mu, sigma, prior_mu, prior_sigma : Tensor
        Means and standard deviations, broadcast against each other; sigmas positive.

    Returns
    -------
    Tensor
        Scalar of at least fp32, differentiable in all four.
    """
    mu, sigma, prior_mu, prior_sigma = (
        v.to(torch.promote_types(v.dtype, torch.float32)) for v in (mu, sigma, prior_mu, prior_sigma)
    )
    shift = (mu - prior_mu) / prior_sigma
    t = (sigma - prior_sigma) / prior_sigma
    # v - 1 - ln v in fp32: near the prior log1p keeps the digits that cancel, far below it only the ratio has them.
    near, ratio = t.clamp_min(-0.5), sigma / prior_sigma
    log_ratio = torch.where(t > -0.5, torch.log1p(near), torch.log(ratio))
    return (0.5 * (t * (t + 2.0) + shift.square()) - log_ratio).sum()


def _seed_tensor(seed: Tensor | int | None, device: torch.device) -> Tensor:
    """The seed as an int64 scalar on the input's device, so that no backend has to wait for the host to draw it."""
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64, device=device)
    if not isinstance(seed, Tensor):
        try:
            return torch.full((), operator.index(seed), dtype=torch.int64, device=device)
        except (TypeError, RuntimeError, OverflowError) as error:
            raise ValueError(f"seed must be a 64-bit integer, got {seed!r}") from error
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"seed must be an int64 scalar, got {seed.dtype} of shape {tuple(seed.shape)}")
    return seed.reshape(()).to(device)


def _wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a backward may follow, for which r is kept. Forward mode, whose tangents would be dropped, is refused."""
    given = [t for t in tensors if t is not None]
    if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(t).tangent is not None for t in given):
        raise RuntimeError("ffg_conv3d has no forward-mode derivative; use reverse mode (torch.autograd.grad)")
    return torch.is_grad_enabled() and any(t.requires_grad for t in given)


def _integers(name: str, value) -> Triple:
    """An int, or three of them, as a triple."""
    triple = _triple(value)
    if len(triple) != 3 or not all(isinstance(v, int | torch.SymInt) for v in triple):
        raise ValueError(f"{name} must be an int or three of them, got {value!r}")
    return tuple(triple)


def _resolve_padding(x: Tensor, kernel, padding, dilation) -> tuple[Tensor, Triple]:
    """The padding as a triple; where 'same' is lopsided (even kernels), the odd zero is added behind the volume."""
    if padding == "valid":
        return x, (0, 0, 0)
    if padding != "same":
        return x, padding
    sides = same_padding(kernel, dilation)
    if any(front != behind for front, behind in sides):
        x = F.pad(x, [side for front, behind in reversed(sides) for side in (0, behind - front)])
    return x, tuple(front for front, _ in sides)


def _check(x, weight_mu, weight_sigma, bias_mu, bias_sigma, stride, padding, dilation, groups) -> None:
    """Refuse what does not fit together, naming shapes and values."""
    if x.dim() not in (4, 5) or weight_mu.dim() != 5:
        raise ValueError(
            f"expected input [N, C, D, H, W] or [C, D, H, W] and weights [F, C / groups, kD, kH, kW], got shapes "
            f"{tuple(x.shape)} and {tuple(weight_mu.shape)}"
        )
    if weight_sigma.shape != weight_mu.shape:
        raise ValueError(f"weight_sigma {tuple(weight_sigma.shape)} differs from weight_mu {tuple(weight_mu.shape)}")
    if (bias_mu is None) != (bias_sigma is None):
        raise ValueError("give both bias_mu and bias_sigma, or neither")
    n_filters, channels = weight_mu.shape[0], x.shape[-4]
    for name, bias in (("bias_mu", bias_mu), ("bias_sigma", bias_sigma)):
        if bias is not None and bias.shape != (n_filters,):
            raise ValueError(f"{name} must have shape ({n_filters},), got {tuple(bias.shape)}")
    if groups < 1 or channels != weight_mu.shape[1] * groups or n_filters % groups:
        raise ValueError(
            f"{channels} channels into {n_filters} filters of {weight_mu.shape[1]} channels do not fit groups={groups}"
        )
    if min(stride) < 1 or min(dilation) < 1:
        raise ValueError(f"stride and dilation must be positive, got {stride} and {dilation}")
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f"padding must be an int, a triple, 'same' or 'valid', got {padding!r}")
        if padding == "same" and stride != (1, 1, 1):
            raise ValueError(f"padding='same' needs stride 1, got {stride}")
    elif min(padding) < 0:
        raise ValueError(f"padding must not be negative, got {padding}")
    for name, t in (
        ("weight_mu", weight_mu),
        ("weight_sigma", weight_sigma),
        ("bias_mu", bias_mu),
        ("bias_sigma", bias_sigma),
    ):
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            raise ValueError(f"{name} is {t.dtype} on {t.device}, the input {x.dtype} on {x.device}")
    if x.dtype not in _DTYPES:
        raise ValueError(f"input must be floating point (fp16, bf16, fp32, fp64), got {x.dtype}")
