"""The op as torch.library operators, so that torch.compile, autograd and fake tensors see through it.

`dwc::ffg_conv3d` samples and returns (y, r); `dwc::ffg_conv3d_grad_input`, `..._grad_weight` and `..._grad_bias` are
its backward, derived by hand (see `reference`) from x and r alone, and have no derivative themselves. Each forwards to
the backend it is told; choosing one, checking arguments and casting under autocast are the work of `functional`. The
backward lays out for the reference what two of its operators read.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.library import custom_op

from dwc_kernels import reference
from dwc_kernels.geometry import output_size
from dwc_kernels.reference import native, output_layout

__all__ = ["ffg_conv3d"]


def _as_given(x: Tensor) -> torch.autocast:
    """Autocast has cast the arguments already; inside, it would cast what the backend computes in fp32 on purpose."""
    return torch.autocast(x.device.type, enabled=False)


def _implementation(backend: str):
    """The module with forward, grad_input and grad_weight; Triton is imported only when it is used."""
    if backend == "reference":
        return reference
    from dwc_kernels import kernels

    return kernels


@custom_op("dwc::ffg_conv3d", mutates_args=())
def ffg_conv3d(
    x: Tensor,
    weight_mu: Tensor,
    weight_sigma: Tensor,
    bias_mu: Tensor | None,
    bias_sigma: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    seed: Tensor,
    backend: str,
    keep_r: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the sample y and r = eps / (2 sqrt(var)), both [N, F, D', H', W']; r is empty where none is kept."""
    arguments = (x, weight_mu, weight_sigma, bias_mu, bias_sigma, tuple(stride), tuple(padding), tuple(dilation))
    with _as_given(x):
        return _implementation(backend).forward(*arguments, groups, seed, keep_r=keep_r)


@custom_op("dwc::ffg_conv3d_grad_input", mutates_args=())
def ffg_conv3d_grad_input(
    g: Tensor,
    r: Tensor,
    x: Tensor,
    weight_mu: Tensor,
    weight_sigma: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> Tensor:
    """Return dL/dx, [N, C, D, H, W]."""
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    with _as_given(x):
        return _implementation(backend).grad_input(g, r, x, weight_mu, weight_sigma, *geometry)


@custom_op("dwc::ffg_conv3d_grad_weight", mutates_args=())
def ffg_conv3d_grad_weight(
    g: Tensor,
    r: Tensor,
    x: Tensor,
    weight_sigma: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Return dL/dmu and dL/dsigma, both of the weights' shape."""
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    with _as_given(x):
        return _implementation(backend).grad_weight(g, r, x, weight_sigma, *geometry)


@custom_op("dwc::ffg_conv3d_grad_bias", mutates_args=())
def ffg_conv3d_grad_bias(g: Tensor, r: Tensor, bias_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return dL/db_mu = sum g and dL/db_sigma = 2 b_sigma * sum g * r, both [F]; one backend for all."""
    voxels, wide = (0, 2, 3, 4), torch.promote_types(g.dtype, torch.float32)
    db_mu = g.sum(voxels, dtype=wide)
    db_var = (g.to(wide) * r).sum(voxels)
    return db_mu.to(bias_sigma.dtype), (2 * bias_sigma * db_var).to(bias_sigma.dtype)


@ffg_conv3d_grad_bias.register_fake
def _(g, r, bias_sigma):
    return torch.empty_like(bias_sigma), torch.empty_like(bias_sigma)


@ffg_conv3d.register_fake
def _(x, weight_mu, weight_sigma, bias_mu, bias_sigma, stride, padding, dilation, groups, seed, backend, keep_r=True):
    size = output_size(x.shape[2:], weight_mu.shape[2:], stride, padding, dilation)
    shape = (x.shape[0], weight_mu.shape[0], *size)
    y, r = (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for layout in (output_layout(x), torch.channels_last_3d)
    )
    return y, r if keep_r else x.new_empty(0)


@ffg_conv3d_grad_input.register_fake
def _(g, r, x, weight_mu, weight_sigma, stride, padding, dilation, groups, backend):
    return torch.empty_like(x, memory_format=output_layout(x))


@ffg_conv3d_grad_weight.register_fake
def _(g, r, x, weight_sigma, stride, padding, dilation, groups, backend):
    dmu = torch.empty_like(weight_sigma, memory_format=torch.contiguous_format)
    return dmu, torch.empty_like(dmu)


def _save(ctx, inputs, output):
    x, weight_mu, weight_sigma, _, bias_sigma, *ctx.geometry, _, ctx.backend, _ = inputs
    _, r = output
    ctx.mark_non_differentiable(r)
    ctx.save_for_backward(x, r, weight_mu, weight_sigma, bias_sigma)


def _backward(ctx, g, _):
    x, r, weight_mu, weight_sigma, bias_sigma = ctx.saved_tensors
    dx = dmu = dsigma = db_mu = db_sigma = None
    layout = output_layout(x)
    if ctx.backend == "reference" and any(ctx.needs_input_grad[:3]):  # once for both gradients
        g, x = native(g), native(x)
    if ctx.needs_input_grad[0]:
        dx = ffg_conv3d_grad_input(g, r, x, weight_mu, weight_sigma, *ctx.geometry, ctx.backend)
        dx = dx.contiguous(memory_format=layout)
    if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
        dmu, dsigma = ffg_conv3d_grad_weight(g, r, x, weight_sigma, *ctx.geometry, ctx.backend)
    if ctx.needs_input_grad[3] or ctx.needs_input_grad[4]:
        db_mu, db_sigma = ffg_conv3d_grad_bias(g, r, bias_sigma)
    return dx, dmu, dsigma, db_mu, db_sigma, *[None] * 7


ffg_conv3d.register_autograd(_backward, setup_context=_save)
