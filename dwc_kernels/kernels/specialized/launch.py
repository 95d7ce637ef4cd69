"""Launches of the kernels with specialized warps."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.runtime import JITFunction

from dwc_kernels.geometry import Triple
from dwc_kernels.kernels.launch import Geometry, Plan, run_on
from dwc_kernels.kernels.specialized.kernels import forward_kernel, grad_input_kernel
from dwc_kernels.kernels.specialized.rings import slot_layout
from dwc_kernels.kernels.specialized.variant import BOX, CHANNELS, Variant, variant_of
from dwc_kernels.kernels.tiles import programs

__all__ = ["launch_forward", "launch_grad_input"]


def _launch(
    kernel: JITFunction, plan: Plan, v: Variant, rows: Sequence[Tensor], padding: Triple,
    weights: tuple[Tensor, Tensor], *outputs: Any,
) -> None:  # fmt: skip
    def descriptor(x: Tensor, *block: int) -> TensorDescriptor | None:
        layout = slot_layout(len(block))
        return TensorDescriptor.from_tensor(x, list(block), layout) if math.prod(block) else None

    boxes = [descriptor(x, 1, 1, n, BOX[2], CHANNELS) for x in rows for n in (BOX[1], v.lines - BOX[1])]
    columns = [descriptor(w, 1, n, CHANNELS) for w in weights for n in (v.wide, v.tail)]
    n_tiles = programs(plan.problem, plan.tile)
    run_on(
        rows[0].device, kernel, min(n_tiles, plan.chip.multiprocessors),
        *boxes, *columns, *outputs, n_tiles, *rows[0].shape[1:4], *plan.problem.size, plan.problem.columns, *padding,
        v, num_warps=4,
    )  # fmt: skip


def _variant(plan: Plan, geometry: Geometry, **given: bool) -> Variant:
    v = variant_of(plan.problem, plan.tile, geometry.dilation, plan.chip.shared, **given)
    if v is None:
        raise ValueError(f"{plan.tile} does not fit the shared memory of {plan.chip.name}")
    return v


def launch_forward(
    plan: Plan, x: Tensor, geometry: Geometry, weights: tuple[Tensor, Tensor],
    bias_mu: Tensor | None, bias_sigma: Tensor | None, y: Tensor, r: Tensor | None, seed: Tensor,
) -> None:  # fmt: skip
    """Run the forward on x [N, D, H, W, C'] and packed weights."""
    v = _variant(plan, geometry, bias=bias_mu is not None, keep_r=r is not None)
    outputs = (y if t is None else t for t in (bias_mu, bias_sigma, y, r))  # y in place of what is never touched
    _launch(forward_kernel, plan, v, [x], geometry.padding, weights, *outputs, seed)


def launch_grad_input(
    plan: Plan, g: Tensor, r: Tensor, geometry: Geometry, weights: tuple[Tensor, Tensor], x: Tensor, dx: Tensor
) -> None:
    """Run the input gradient on g and r [N, D, H, W, F'] and packed adjoint weights."""
    _launch(grad_input_kernel, plan, _variant(plan, geometry), [g, r], geometry.padding, weights, x, dx)
