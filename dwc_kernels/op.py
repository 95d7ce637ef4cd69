"""The op as `torch.library` operators, so that `torch.compile`, autograd and fake tensors see through it.

`dwc::ffg_conv3d` samples and returns (y, r). `dwc::ffg_conv3d_grad_input`, `..._grad_weight` and `..._grad_bias` are
its backward, derived by hand (see `reference`) from x and r alone; they have no derivative themselves. Each forwards to
the backend it is given. Choosing a backend, checking arguments and casting under autocast happen in `functional`.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op

from dwc_kernels import reference
from dwc_kernels.geometry import output_size
from dwc_kernels.reference import native, output_layout

__all__ = ["ffg_conv3d"]


def _as_given(x: Tensor) -> torch.autocast:
    """Turn autocast off: the arguments are cast already, and what a backend computes in fp32 must stay in fp32."""
    return torch.autocast(x.device.type, enabled=False)


def _implementation(backend: str) -> ModuleType:
    """Return the module with forward, grad_input and grad_weight; Triton is imported only when it is used."""
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
    bias_sigma: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dL/dmu and dL/dsigma of the weights and of the biases; the latter are empty without bias_sigma."""
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    with _as_given(x):
        return _implementation(backend).grad_weight(g, r, x, weight_sigma, *geometry, bias_sigma=bias_sigma)


@custom_op("dwc::ffg_conv3d_grad_bias", mutates_args=())
def ffg_conv3d_grad_bias(g: Tensor, r: Tensor, bias_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """Return dL/dmu and dL/dsigma of the biases alone, for layers whose weights are frozen."""
    return reference.grad_bias(g, r, bias_sigma)


@ffg_conv3d.register_fake
def _(
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
    size = output_size(x.shape[2:], weight_mu.shape[2:], stride, padding, dilation)
    shape = (x.shape[0], weight_mu.shape[0], *size)
    y, r = (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for layout in (output_layout(x), torch.channels_last_3d)
    )
    return y, r if keep_r else x.new_empty(0)


@ffg_conv3d_grad_input.register_fake
def _(
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
    return torch.empty_like(x, memory_format=output_layout(x))


@ffg_conv3d_grad_weight.register_fake
def _(
    g: Tensor,
    r: Tensor,
    x: Tensor,
    weight_sigma: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    backend: str,
    bias_sigma: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dmu = torch.empty_like(weight_sigma, memory_format=torch.contiguous_format)
    n_biases = 0 if bias_sigma is None else g.shape[1]
    return dmu, torch.empty_like(dmu), dmu.new_empty(n_biases), dmu.new_empty(n_biases)


@ffg_conv3d_grad_bias.register_fake
def _(g: Tensor, r: Tensor, bias_sigma: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(bias_sigma), torch.empty_like(bias_sigma)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight_mu, weight_sigma, _, bias_sigma, *ctx.geometry, _, ctx.backend, _ = inputs
    _, r = output
    ctx.mark_non_differentiable(r)
    ctx.set_materialize_grads(False)  # else every backward is handed a tensor of zeros as the gradient of r
    ctx.save_for_backward(x, r, weight_mu, weight_sigma, bias_sigma)


def _backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    dx = dmu = dsigma = db_mu = db_sigma = None
    if g is None:
        return (None,) * 12
    x, r, weight_mu, weight_sigma, bias_sigma = ctx.saved_tensors
    layout = output_layout(x)
    wants_weights, wants_biases = any(ctx.needs_input_grad[1:3]), any(ctx.needs_input_grad[3:5])
    if ctx.backend == "reference" and (ctx.needs_input_grad[0] or wants_weights):  # once for both gradients
        g, x = native(g), native(x)
    if ctx.needs_input_grad[0]:
        dx = ffg_conv3d_grad_input(g, r, x, weight_mu, weight_sigma, *ctx.geometry, ctx.backend)
        dx = dx.contiguous(memory_format=layout)
    if wants_weights:
        biases = bias_sigma if wants_biases else None
        dmu, dsigma, *db = ffg_conv3d_grad_weight(g, r, x, weight_sigma, *ctx.geometry, ctx.backend, biases)
        db_mu, db_sigma = db if wants_biases else (None, None)
    elif wants_biases:
        db_mu, db_sigma = ffg_conv3d_grad_bias(g, r, bias_sigma)
    return dx, dmu, dsigma, db_mu, db_sigma, *[None] * 7


ffg_conv3d.register_autograd(_backward, setup_context=_save)
