"""Weights as the products read them: mu and sigma^2, taps first, for the forward and for its adjoint, in one launch."""

# mypy: disallow-untyped-defs=False
# Device functions have no Python types.

import math
import weakref
from collections.abc import Callable
from typing import Literal

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwc_kernels.kernels.launch import run_on
from dwc_kernels.kernels.products import operand

__all__ = ["packed", "packed_adjoint"]

Orientation = Literal["forward", "folded", "adjoint"]
Pair = tuple[Tensor, Tensor]  # mu and sigma^2, both [taps, columns, channels to be summed over]


@triton.jit(do_not_specialize=["F", "C", "row", "tap_stride", "row_adjoint"])
def pack_kernel(
    mu, sigma,  # [F, C, taps]
    mu_out, var_out,  # [taps, F, row], or [F, row] with tap and channel as one dimension; None if not wanted
    mu_adjoint, var_adjoint,  # [taps mirrored, C, row_adjoint]; None if not wanted
    F, C,
    row, tap_stride,  # elements of a row of the first pair, and from one tap to the next
    row_adjoint,
    TAPS: tl.constexpr,
    FOLDED: tl.constexpr,  # whether the first pair has tap and channel as one dimension
    BF: tl.constexpr, BC: tl.constexpr,  # filters and channels of a program
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One program: BF filters and BC channels of one tap, read once; what lies between C or F and a row's end is 0."""
    pid = tl.program_id(0)
    tap = pid % TAPS
    c = pid // TAPS % tl.cdiv(C, BC) * BC + tl.arange(0, BC)[None, :]
    f = pid // TAPS // tl.cdiv(C, BC) * BF + tl.arange(0, BF)[:, None]
    at = (f * C + c) * TAPS + tap
    exists = (f < F) & (c < C)
    mean = operand(tl.load(mu + at, mask=exists, other=0.0), PRECISION)
    std = tl.load(sigma + at, mask=exists, other=0.0).to(tl.float32)
    var = std * std
    if mu_out is not None:
        at = f * row + tap * tap_stride + c
        exists = (f < F) & (c < (C if FOLDED else row))
        tl.store(mu_out + at, mean, mask=exists)
        tl.store(var_out + at, operand(var.to(var_out.dtype.element_ty), PRECISION), mask=exists)
    if mu_adjoint is not None:
        at = ((TAPS - 1 - tap) * C + c) * row_adjoint + f
        exists = (c < C) & (f < row_adjoint)
        tl.store(mu_adjoint + at, mean, mask=exists)
        tl.store(var_adjoint + at, operand(var.to(var_adjoint.dtype.element_ty), PRECISION), mask=exists)


def pack(weight_mu: Tensor, weight_sigma: Tensor, orientations: set[Orientation], precision: str) -> dict[str, Pair]:
    """Pack the weights [F, C, kD, kH, kW] in every orientation that is asked for.

    A row is filled with zeros to a multiple of 16 bytes. sigma^2 is bf16 for bf16 weights and else fp32, never fp16;
    fp32 is rounded to tf32 where ``precision`` says so.
    """
    n_filters, channels, *kernel = weight_mu.shape
    taps, step = math.prod(kernel), 16 // weight_mu.element_size()
    squares = torch.bfloat16 if weight_mu.dtype == torch.bfloat16 else torch.float32

    def pair(*shape: int, make: Callable[..., Tensor] = weight_mu.new_empty) -> Pair:
        return make(shape), make(shape, dtype=squares)

    def filled(n: int) -> int:
        return n + -n % step

    pairs: dict[str, Pair] = {}
    if "forward" in orientations:
        pairs["forward"] = pair(taps, n_filters, filled(channels))
    if "folded" in orientations:
        # A folded row ends in zeros that no program writes.
        pairs["folded"] = pair(1, n_filters, filled(taps * channels), make=weight_mu.new_zeros)
    if "adjoint" in orientations:
        pairs["adjoint"] = pair(taps, channels, filled(n_filters))
    first = pairs.get("forward") or pairs.get("folded") or (None, None)
    second = pairs.get("adjoint", (None, None))
    row = 0 if first[0] is None else first[0].shape[-1]
    folded, block = "folded" in orientations, 64
    run_on(
        weight_mu.device, pack_kernel, taps * triton.cdiv(channels, block) * triton.cdiv(n_filters, block),
        weight_mu.contiguous(), weight_sigma.contiguous(), *first, *second, n_filters, channels,
        row, channels if folded else n_filters * row, filled(n_filters), taps, folded, block, block, precision,
    )  # fmt: skip
    return pairs


# The adjoint that a forward packed for its own backward, by the memory of the r that only this backward is given.
_waiting: "weakref.WeakKeyDictionary[torch.UntypedStorage, tuple[tuple, Pair]]" = weakref.WeakKeyDictionary()


def _state(weight_mu: Tensor, weight_sigma: Tensor, precision: str) -> tuple | None:
    """What a backward must agree in with its forward to use its adjoint; None for tensors that have no version.

    A CUDA graph must not read what was packed outside of a capture: by the time of its replay that memory is free.
    """
    if weight_mu.is_inference() or weight_sigma.is_inference():
        return None
    stream = torch.cuda.current_stream(weight_mu.device).cuda_stream if weight_mu.is_cuda else 0
    capturing = weight_mu.is_cuda and torch.cuda.is_current_stream_capturing()
    tensors = (
        (weakref.ref(t.untyped_storage()), t.storage_offset(), t.shape, t.stride(), t.dtype, t._version)
        for t in (weight_mu, weight_sigma)
    )
    return (*tensors, precision, stream, capturing)


def packed(weight_mu: Tensor, weight_sigma: Tensor, precision: str, *, folded: bool, r: Tensor | None = None) -> Pair:
    """The weights of a forward: [taps, F, C'], or [1, F, taps * C'] where taps are folded into channels.

    They are packed in every call, because writes that change no version (fused optimizers, `.data`, NumPy, CUDA graphs)
    cannot be seen. With r, the same launch packs the adjoint for the backward that will be given this r.
    """
    first: Orientation = "folded" if folded else "forward"
    state = None if r is None else _state(weight_mu, weight_sigma, precision)
    if r is None or state is None:
        return pack(weight_mu, weight_sigma, {first}, precision)[first]
    pairs = pack(weight_mu, weight_sigma, {first, "adjoint"}, precision)
    _waiting[r.untyped_storage()] = state, pairs["adjoint"]
    return pairs[first]


def packed_adjoint(weight_mu: Tensor, weight_sigma: Tensor, precision: str, r: Tensor) -> Pair:
    """The weights [mirrored taps, C, F'] of an input gradient: left by the forward of this r, once, or packed anew."""
    state, pair = _waiting.pop(r.untyped_storage(), (None, None))
    if pair is not None and state == _state(weight_mu, weight_sigma, precision):
        return pair
    return pack(weight_mu, weight_sigma, {"adjoint"}, precision)["adjoint"]
