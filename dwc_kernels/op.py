"""The op as `torch.library` operators, so that `torch.compile`, autograd and fake tensors see through it.

`dwc::ffg_conv3d` samples and returns (y, r). `dwc::ffg_conv3d_grad_input`, `..._grad_weight` and `..._grad_bias` are
its backward, derived by hand (see `reference`) from x and r alone; they have no derivative themselves. Each forwards to
the backend it is given. Choosing a backend, checking arguments and casting under autocast happen in `functional`.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import CustomOpDef
from torch.library import custom_op

from dwc_kernels import reference
from dwc_kernels.flops import count_when_asked
from dwc_kernels.geometry import Triple, output_size
from dwc_kernels.reference import output_layout

__all__ = ["ffg_conv3d", "sample", "transforming"]

_PLAIN = (Tensor, torch.nn.Parameter)


def _as_given(x: Tensor) -> AbstractContextManager[Any]:
    """Turn autocast off: the arguments are cast already, and what a backend computes in fp32 must stay in fp32."""
    device = x.device.type
    on = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.autocast(device, enabled=False) if on else nullcontext()


def _implementation(backend: str) -> ModuleType:
    """Return the module with forward, grad_input and grad_weight; Triton is imported only when it is used."""
    if backend == "reference":
        return reference
    from dwc_kernels import kernels

    return kernels


def _sampled(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    """`ffg_conv3d`, of which these are the arguments, with r in whatever layout the backend has it."""
    *weights, stride, padding, dilation, groups, seed, backend, keep_r, transposed_size = rest
    arguments = (x, *weights, tuple(stride), tuple(padding), tuple(dilation), groups, seed)
    with _as_given(x):
        if transposed_size:
            return reference.forward(*arguments, keep_r=keep_r, transposed_size=tuple(transposed_size))
        return _implementation(backend).forward(*arguments, keep_r=keep_r)


def _r_layout(x: Tensor, backend: str) -> torch.memory_format:
    return torch.channels_last_3d if backend == "triton" else output_layout(x)


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
    transposed_size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the sample y and r = eps / (2 sqrt(var)), both [N, F, D', H', W']; r is empty where none is kept.

    ``transposed_size`` is D', H', W' of a transposed convolution, which only the reference runs.
    """
    geometry = (stride, padding, dilation, groups)
    y, r = _sampled(
        x, weight_mu, weight_sigma, bias_mu, bias_sigma, *geometry, seed, backend, keep_r, transposed_size
    )  # fmt: skip
    return y, r.contiguous(memory_format=_r_layout(x, backend)) if keep_r else r


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
    transposed: bool = False,
) -> Tensor:
    """Return dL/dx, [N, C, D, H, W]."""
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    with _as_given(x):
        if transposed:
            return reference.grad_input(g, r, x, weight_mu, weight_sigma, *geometry, transposed=True)
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
    wants_mu: bool = True,
    wants_sigma: bool = True,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return dL/dmu and dL/dsigma of the weights and of the biases; empty what is not wanted, and without bias_sigma.

    The kernels always compute both, so the reference takes over where only one is wanted.
    """
    geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
    with _as_given(x):
        if transposed or not (wants_mu and wants_sigma):
            return reference.grad_weight(
                g, r, x, weight_sigma, *geometry,
                bias_sigma=bias_sigma, wants_mu=wants_mu, wants_sigma=wants_sigma, transposed=transposed,
            )  # fmt: skip
        return _implementation(backend).grad_weight(g, r, x, weight_sigma, *geometry, bias_sigma=bias_sigma)


@custom_op("dwc::ffg_conv3d_grad_bias", mutates_args=())
def ffg_conv3d_grad_bias(g: Tensor, r: Tensor, bias_sigma: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """Return dL/dmu and dL/dsigma of the biases alone, for layers whose weights are frozen."""
    with _as_given(g):
        return _implementation(backend).grad_bias(g, r, bias_sigma)


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
    transposed_size: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    if transposed_size:
        shape = (x.shape[0], weight_mu.shape[1] * groups, *transposed_size)
    else:
        size = output_size(x.shape[2:], weight_mu.shape[2:], tuple(stride), tuple(padding), tuple(dilation))
        shape = (x.shape[0], weight_mu.shape[0], *size)
    y, r = (
        torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout)
        for layout in (output_layout(x), _r_layout(x, backend))
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
    transposed: bool = False,
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
    wants_mu: bool = True,
    wants_sigma: bool = True,
    transposed: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n_biases = 0 if bias_sigma is None else g.shape[1]
    dmu, dsigma = (weight_sigma.new_empty(weight_sigma.shape if wanted else 0) for wanted in (wants_mu, wants_sigma))
    db_mu, db_sigma = (weight_sigma.new_empty(n_biases if wanted else 0) for wanted in (wants_mu, wants_sigma))
    return dmu, dsigma, db_mu, db_sigma


@ffg_conv3d_grad_bias.register_fake
def _(g: Tensor, r: Tensor, bias_sigma: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return torch.empty_like(bias_sigma), torch.empty_like(bias_sigma)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight_mu, weight_sigma, _, bias_sigma, *ctx.geometry, _, ctx.backend, _, transposed_size = inputs
    ctx.transposed = transposed_size is not None
    _, r = output
    ctx.mark_non_differentiable(r)
    ctx.set_materialize_grads(False)  # else every backward is handed a tensor of zeros as the gradient of r
    ctx.save_for_backward(x, r, weight_mu, weight_sigma, bias_sigma)


def _backward(ctx: Any, g: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    every: tuple[Tensor | None, ...]
    dx = dmu = dsigma = db_mu = db_sigma = None
    if g is None:
        return (None,) * 13
    x, r, weight_mu, weight_sigma, bias_sigma = saved = ctx.saved_tensors  # once: checkpointing allows no more
    wants_x, *wants_weights, wants_b_mu, wants_b_sigma = ctx.needs_input_grad[:5]
    biases = bias_sigma if wants_b_mu or wants_b_sigma else None
    # Under vmap and under autograd's batched gradients tensors have no layout.
    unlaid = transforming() or torch._C._functorch.is_legacy_batchedtensor(g)
    # With a graph of the gradients the operators are needed: they refuse a second derivative.
    direct = not unlaid and not torch.is_grad_enabled() and _unobserved((g, *saved))
    if direct and ctx.backend == "reference" and not ctx.transposed and wants_x and all(wants_weights):
        stride, padding, dilation, groups = ctx.geometry
        geometry = (tuple(stride), tuple(padding), tuple(dilation), groups)
        with _as_given(x):
            every = reference.gradients(g, r, x, weight_mu, weight_sigma, *geometry, bias_sigma=biases)
    else:
        layout = None if unlaid else output_layout(x)
        if wants_x:
            arguments = (*ctx.geometry, ctx.backend, ctx.transposed)
            dx = _once(ffg_conv3d_grad_input, direct, g, r, x, weight_mu, weight_sigma, *arguments)
            dx = dx.contiguous(memory_format=layout) if layout else dx
        # One kernel serves weights and biases where it can; frozen means or sigmas are left out of both.
        wants_mu, wants_sigma = wants_weights[0] or wants_b_mu, wants_weights[1] or wants_b_sigma
        if any(wants_weights):
            arguments = (*ctx.geometry, ctx.backend, biases, wants_mu, wants_sigma, ctx.transposed)
            dmu, dsigma, db_mu, db_sigma = _once(ffg_conv3d_grad_weight, direct, g, r, x, weight_sigma, *arguments)
        elif biases is not None:
            db_mu, db_sigma = _once(ffg_conv3d_grad_bias, direct, g, r, bias_sigma, ctx.backend)
        every = (dx, dmu, dsigma, db_mu, db_sigma)
    return *(t if wanted else None for t, wanted in zip(every, ctx.needs_input_grad, strict=False)), *[None] * 8


ffg_conv3d.register_autograd(_backward, setup_context=_save)


def transforming() -> bool:
    """Whether a transform of torch.func is running."""
    return torch._C._are_functorch_transforms_active()


class _Transformable(torch.autograd.Function):
    """The same derivative for torch.func, which does not take the one that is registered with the operator."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor,
        weight_mu: Tensor,
        weight_sigma: Tensor,
        bias_mu: Tensor | None,
        bias_sigma: Tensor | None,
        stride: Triple,
        padding: Triple,
        dilation: Triple,
        groups: int,
        seed: Tensor,
        backend: str,
        keep_r: bool,
        transposed_size: Triple | None,
    ) -> tuple[Tensor, Tensor]:
        tensors, geometry = (x, weight_mu, weight_sigma, bias_mu, bias_sigma), (stride, padding, dilation, groups)
        return ffg_conv3d(*tensors, *geometry, seed, backend, keep_r, transposed_size)

    setup_context = staticmethod(_save)
    backward = staticmethod(_backward)


class _Once(torch.autograd.Function):
    """An operator of the backward, which has no derivative itself, for torch.func."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: CustomOpDef, *arguments: Any) -> Any:
        return op(*arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError("ffg_conv3d has no second derivative")


def _refuse_to_compile() -> None:
    raise RuntimeError("torch.compile cannot trace torch.func derivatives of ffg_conv3d; take them without compiling")


# Called while tracing, not traced: from an error in the traced code the compiler would go on without compiling, into an
# assertion of its own.
_refuse_to_compile._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _once(op: CustomOpDef, direct: bool, *arguments: Any) -> Any:
    if transforming():
        if torch.compiler.is_compiling():
            _refuse_to_compile()
        return _Once.apply(op, *arguments)
    return (op._init_fn if direct else op)(*arguments)


class _Direct(torch.autograd.Function):
    """The same derivative without the operators, whose calls cost the host more than a small convolution."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple[Tensor, Tensor]:
        output = _sampled(*arguments)
        _save(ctx, arguments, output)
        return output

    backward = staticmethod(_backward)


def _unobserved(arguments: tuple[Any, ...]) -> bool:
    """Whether plain tensors in memory are computed with here and now, and nobody traces, counts or batches calls."""
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() or torch._C._is_tracing():
        return False
    batched = torch._C._functorch.is_legacy_batchedtensor
    return all(type(t) in _PLAIN and not (t.is_meta or batched(t)) for t in arguments if isinstance(t, Tensor))


def sample(*arguments: Any) -> Tensor:
    """`ffg_conv3d`'s y, differentiable in reverse mode by autograd and by torch.func alike."""
    if transforming():
        return _Transformable.apply(*arguments)[0]
    return (_Direct.apply if _unobserved(arguments) else ffg_conv3d)(*arguments)[0]


def _one_by_one(op: CustomOpDef) -> Callable[..., Any]:
    """The rule of an operator under vmap: a call for each sample, so that each has the bits it has alone."""

    def rule(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        results = []
        for i in range(info.batch_size):
            one = (a.select(dim, i) if isinstance(dim, int) else a for a, dim in zip(arguments, in_dims, strict=True))
            results.append(op(*one))
        if isinstance(results[0], Tensor):
            return torch.stack(results), 0
        return tuple(map(torch.stack, zip(*results, strict=True))), (0,) * len(results[0])

    return rule


for _op in (ffg_conv3d, ffg_conv3d_grad_input, ffg_conv3d_grad_weight, ffg_conv3d_grad_bias):
    _op.register_vmap(_one_by_one(_op))

count_when_asked()
