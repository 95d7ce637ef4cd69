"""The input gradient of `ffg_conv3d`: both of its products in one pass over g and r.

    dx = convT(g, mu) + 2 x * convT(g * r, sigma^2)

The adjoint of a convolution at stride 1 is the convolution with the mirrored filter and the rest of the padding, so
this is the forward's loop (`products.both_products`) over filters in place of channels; g * r is formed in registers.
"""

# mypy: disallow-untyped-defs=False
# Device functions have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwc_kernels import reference
from dwc_kernels.geometry import Triple
from dwc_kernels.kernels.launch import ONE, Geometry, Plan, triple
from dwc_kernels.kernels.layouts import voxels_last
from dwc_kernels.kernels.products import both_products, elements, place
from dwc_kernels.kernels.tiles import Tile, programs
from dwc_kernels.kernels.weights import packed_adjoint

__all__ = ["grad_input"]


@triton.jit
def finish(
    mean, var,  # [BD * BH * BW, N]: sums over taps and filters
    x, dx,  # [samples, D, H, W, C]
    sample, c0, d0, h0, w0,  # where the tile starts
    C, D, H, W,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr,  # channels finished at a time
):  # fmt: skip
    """dx = mean + 2 x * var for N channels from c0 on, CHUNK at a time to stay within the registers."""
    M: tl.constexpr = BD * BH * BW
    if N > CHUNK:
        HALF: tl.constexpr = N // 2
        mean_low, mean_high = tl.split(mean.reshape(M, 2, HALF).permute(0, 2, 1))
        var_low, var_high = tl.split(var.reshape(M, 2, HALF).permute(0, 2, 1))
        finish(mean_low, var_low, x, dx, sample, c0, d0, h0, w0, C, D, H, W, BD, BH, BW, HALF, CHUNK)
        finish(mean_high, var_high, x, dx, sample, c0 + HALF, d0, h0, w0, C, D, H, W, BD, BH, BW, HALF, CHUNK)
    else:
        corner, offset, mask = elements(sample, d0, h0, w0, c0, D, H, W, C, BD, BH, BW, N)
        value = tl.load(x + corner + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + corner + offset, (mean + 2.0 * (value * var)).to(dx.dtype.element_ty), mask=mask)


SIZES = ["N", "Do", "Ho", "Wo", "D", "H", "W", "pad_d", "pad_h", "pad_w", "dil_d", "dil_h", "dil_w"]


@triton.jit(do_not_specialize=SIZES)
def grad_input_kernel(
    g_desc, r_desc,  # [N, Do, Ho, Wo, F]; like the next four descriptors, or pointers where `voxel_blocks` says
    mu_desc, mu_tail_desc,  # [taps mirrored, C, F], blocks of N0 and of N1 channels
    var_desc, var_tail_desc,  # [taps mirrored, C, F]: sigma^2
    x, dx,  # [N, D, H, W, C]
    N, Do, Ho, Wo, F, D, H, W, C, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,  # the rest as in `both_products`
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    C_STEPS: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    CHUNK: tl.constexpr,  # of `finish`
    PRECISION: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One program: a box of BD x BH x BW voxels of dx of one sample and N0 + N1 channels."""
    sample, d0, h0, w0, c0 = place(tl.program_id(0), D, H, W, C, BD, BH, BW, N0 + N1)
    mean, mean_tail, var, var_tail = both_products(
        g_desc, r_desc, mu_desc, mu_tail_desc, var_desc, var_tail_desc, sample, d0, h0, w0, c0,
        N, Do, Ho, Wo, F, D, H, W, C, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
        KD, KH, KW, 1, 1, 1, BD, BH, BW, BC, C_STEPS, N0, N1, PRECISION, ARCH,
    )  # fmt: skip
    if N1 > 0:
        finish(mean_tail, var_tail, x, dx, sample, c0 + N0, d0, h0, w0, C, D, H, W, BD, BH, BW, N1, CHUNK)
    finish(mean, var, x, dx, sample, c0, d0, h0, w0, C, D, H, W, BD, BH, BW, N0, CHUNK)


def grad_input(
    g: Tensor,  # [N, F, D', H', W']
    r: Tensor,
    x: Tensor,  # [N, C, D, H, W]
    weight_mu: Tensor,  # [F, C, kD, kH, kW]
    weight_sigma: Tensor,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    *,
    tile: Tile | None = None,
) -> Tensor:
    """dL/dx in the dtype and layout of x; with a stride, by the reference.

    Raises
    ------
    ValueError
        If the kernels cannot run on these arguments, saying why.
    """
    if stride != ONE:
        return reference.grad_input(g, r, x, weight_mu, weight_sigma, stride, padding, dilation, groups)
    geometry = Geometry(triple(weight_mu.shape[2:]), padding, dilation).adjoint()
    plan = Plan.of("grad_input", x, g.shape[2:], weight_mu, stride, groups, tile)
    layout = reference.output_layout(x)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    dx = torch.empty_like(x)
    weights = packed_adjoint(weight_mu, weight_sigma, plan.precision, r)
    g, r = voxels_last(g), voxels_last(r)
    if plan.tile.specialized:
        from dwc_kernels.kernels.specialized import launch

        launch.launch_grad_input(plan, g, r, geometry, weights, x, dx)
        return dx.contiguous(memory_format=layout)
    block = [1, *plan.tile.box, plan.tile.channels]
    plan.launch(
        grad_input_kernel, programs(plan.problem, plan.tile), x.device,
        plan.descriptor(g, block), plan.descriptor(r, block), *plan.columns(*weights), x, dx,
        *g.shape, *x.shape[2:], x.shape[1], *geometry.padding, *geometry.dilation, *geometry.kernel, *plan.loop,
        CHUNK=plan.tile.chunk,
    )  # fmt: skip
    return dx.contiguous(memory_format=layout)
