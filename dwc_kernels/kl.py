"""The KL divergence between factorized Gaussians: an exact composition, and a fused form for the CPU."""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx

__all__ = ["gaussian_kl", "gaussian_kl_of_rho"]

# Weights at a time: the temporaries of a chunk stay in the cache, and PyTorch still splits it over threads.
_CHUNK = 1 << 16


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


def gaussian_kl_of_rho(mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> Tensor:
    """`gaussian_kl` with sigma = softplus(rho), for a prior that needs no gradient.

    On the CPU in fp32 it runs chunk by chunk and keeps nothing but its arguments for the backward; elsewhere, and
    under torch.compile, torch.func and forward-mode derivatives, it is the composition.
    """
    tensors = (mu, rho, prior_mu, prior_sigma)
    transformed = (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )
    ordinary = all(
        type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" and t.dtype == torch.float32 for t in tensors
    )
    if transformed or not ordinary or prior_mu.requires_grad or prior_sigma.requires_grad:
        return gaussian_kl(mu, F.softplus(rho), prior_mu, prior_sigma)
    return _FusedKL.apply(*tensors)


def _chunks(mu: Tensor, rho: Tensor, *prior: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching flat pieces of the parameters and of a prior that broadcasts to them; a single number stays one."""
    flat = [t.reshape(()) if t.numel() == 1 else t.expand(mu.shape).reshape(-1) for t in prior]
    mu, rho = mu.reshape(-1), rho.reshape(-1)
    for start in range(0, len(mu), _CHUNK):
        piece = slice(start, start + _CHUNK)
        yield mu[piece], rho[piece], *(t if t.dim() == 0 else t[piece] for t in flat)


def _log_ratio(t: Tensor, ratio: Tensor) -> Tensor:
    """ln(sigma / prior_sigma) as in `gaussian_kl`, with one logarithm where all weights are on one side."""
    low, high = t.aminmax()
    if low > -0.5:
        return torch.log1p(t)
    if high <= -0.5:
        return torch.log(ratio)
    return torch.where(t > -0.5, torch.log1p(t.clamp_min(-0.5)), torch.log(ratio))


class _FusedKL(torch.autograd.Function):
    """The sum and its slopes in closed form, a chunk at a time."""

    @staticmethod
    def forward(ctx: FunctionCtx, mu: Tensor, rho: Tensor, prior_mu: Tensor, prior_sigma: Tensor) -> Tensor:
        ctx.save_for_backward(mu, rho, prior_mu, prior_sigma)
        total = mu.new_zeros(())
        for m, r, m_0, s_0 in _chunks(mu, rho, prior_mu, prior_sigma):
            sigma, shift = F.softplus(r), (m - m_0).div_(s_0)
            t = (sigma - s_0).div_(s_0)
            log_ratio = _log_ratio(t, sigma.div_(s_0))
            total += (t + 2.0).mul_(t).addcmul_(shift, shift).mul_(0.5).sub_(log_ratio).sum()
        return total

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        mu, rho, prior_mu, prior_sigma = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, the composition
            wanted = [t for t, needed in zip((mu, rho), ctx.needs_input_grad, strict=False) if needed]
            value = gaussian_kl(mu, F.softplus(rho), prior_mu, prior_sigma)
            slopes = iter(torch.autograd.grad(value, wanted, g, create_graph=True))
            return *(next(slopes) if needed else None for needed in ctx.needs_input_grad[:2]), None, None
        dmu, drho = (
            torch.empty_like(mu, memory_format=torch.contiguous_format) if needed else None
            for needed in ctx.needs_input_grad[:2]
        )
        pieces = zip(_chunks(mu, rho, prior_mu, prior_sigma), _pieces(dmu, mu), _pieces(drho, mu), strict=True)
        for (m, r, m_0, s_0), m_out, r_out in pieces:
            if m_out is not None:
                torch.sub(m, m_0, out=m_out).div_(s_0).div_(s_0).mul_(g)
            if r_out is not None:  # (v - 1) / sigma, and d sigma / d rho = sigmoid(rho)
                sigma = F.softplus(r)
                t = (sigma - s_0).div_(s_0)
                torch.sigmoid(r, out=r_out).mul_(t).mul_(t.add_(2.0)).div_(sigma).mul_(g)
        return dmu, drho, None, None


def _pieces(out: Tensor | None, like: Tensor) -> Iterator[Tensor | None]:
    for start in range(0, like.numel(), _CHUNK):
        yield None if out is None else out.view(-1)[start : start + _CHUNK]
