"""The input gradient of ``ffg_conv3d``: both of its products in one pass over g and r.

    dx = convT(g, mu) + 2 x * convT(g * r, sigma^2)

The adjoint of a convolution at stride 1 is the convolution with the mirrored filter and the rest of the padding, so
this is the forward's loop (``products.both_products``) over filters in place of channels; g * r is formed in registers.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwc_kernels.kernels.launch import (
    Geometry,
    Triple,
    architecture,
    column_descriptors,
    descriptor,
    device_name,
    device_of,
    loop_constants,
    precision,
    problem,
    require,
    voxels_last,
)
from dwc_kernels.kernels.products import both_products, column_blocks, voxel_blocks
from dwc_kernels.kernels.tiles import Tile, programs, tile_for
from dwc_kernels.reference import output_layout

__all__ = ["grad_input"]


@triton.jit
def finish(
    mean, var, x, dx, sample, c0, d0, h0, w0, C, D, H, W,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr,
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
        row = tl.arange(0, M)
        dw = row % BW
        dh = row // BW % BH
        dd = row // (BW * BH)
        c = c0 + tl.arange(0, N)
        base = (((sample * D + d0).to(tl.int64) * H + h0) * W + w0) * C
        offset = ((dd * H + dh) * W + dw)[:, None] * C + c[None, :]
        mask = ((d0 + dd < D) & (h0 + dh < H) & (w0 + dw < W))[:, None] & (c < C)[None, :]
        value = tl.load(x + base + offset, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + base + offset, (mean + 2.0 * value * var).to(dx.dtype.element_ty), mask=mask)


SIZES = ["N", "Do", "Ho", "Wo", "D", "H", "W", "pad_d", "pad_h", "pad_w", "dil_d", "dil_h", "dil_w"]


@triton.jit(do_not_specialize=SIZES)
def grad_input_kernel(
    g_desc, r_desc,  # [N, Do, Ho, Wo, F]; like the next four descriptors, or pointers where `voxel_blocks` says
    mu_desc, mu_tail_desc,  # [taps mirrored, C, F], blocks of N0 and of N1 channels
    var_desc, var_tail_desc,  # [taps mirrored, C, F]: sigma^2
    x, dx,  # [N, D, H, W, C]
    N, Do, Ho, Wo, F, D, H, W, C, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    C_BLOCKS: tl.constexpr, C_STEPS: tl.constexpr,
    N0: tl.constexpr, N1: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One program: a box of BD x BH x BW voxels of dx of one sample and N0 + N1 channels."""
    n_c = tl.cdiv(C, N0 + N1)
    n_w = tl.cdiv(W, BW)
    n_h = tl.cdiv(H, BH)
    n_d = tl.cdiv(D, BD)
    pid = tl.program_id(0)
    c0 = pid % n_c * (N0 + N1)
    w0 = pid // n_c % n_w * BW
    h0 = pid // (n_c * n_w) % n_h * BH
    d0 = pid // (n_c * n_w * n_h) % n_d * BD
    sample = pid // (n_c * n_w * n_h * n_d)
    TAPS: tl.constexpr = KD * KH * KW
    mean, mean_tail, var, var_tail = both_products(
        voxel_blocks(g_desc, N, Do, Ho, Wo, F, BD, BH, BW, BC, ARCH),
        voxel_blocks(r_desc, N, Do, Ho, Wo, F, BD, BH, BW, BC, ARCH),
        column_blocks(mu_desc, TAPS, C, F, N0, BC, ARCH), column_blocks(mu_tail_desc, TAPS, C, F, N1, BC, ARCH),
        column_blocks(var_desc, TAPS, C, F, N0, BC, ARCH), column_blocks(var_tail_desc, TAPS, C, F, N1, BC, ARCH),
        sample, d0, h0, w0, c0,
        Do, Ho, Wo, D, H, W, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
        KD, KH, KW, BD, BH, BW, BC, C_BLOCKS, C_STEPS, N0, N1, PRECISION, ARCH,
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
    """dL/dx in the dtype and layout of x.

    Raises
    ------
    ValueError
        If the kernels cannot run on these arguments, saying why.
    """
    require(x, weight_mu, stride, groups)
    geometry = Geometry(tuple(weight_mu.shape[2:]), padding, dilation).adjoint()
    n_filters, channels = weight_mu.shape[:2]
    layout = output_layout(x)
    x = x.contiguous(memory_format=torch.channels_last_3d)
    dx = torch.empty_like(x)
    how = precision(x)
    work = problem("grad_input", x, x.shape[2:], n_filters, channels, geometry.kernel)
    arch = architecture(x.device)
    tile = tile or tile_for(work, arch, device_name(x.device))
    g, r = voxels_last(g), voxels_last(r)
    mirrored = (w.flip(2, 3, 4).transpose(0, 1) for w in (weight_mu, weight_sigma))
    columns = column_descriptors(*mirrored, g, how, tile, arch)
    block = [1, *tile.box, tile.channels]
    with device_of(x):
        grad_input_kernel[(programs(work, tile),)](
            descriptor(g, block, arch), descriptor(r, block, arch), *columns, x, dx,
            *g.shape, *x.shape[2:], channels, *geometry.padding, *geometry.dilation, *geometry.kernel,
            *loop_constants(tile, n_filters), CHUNK=tile.chunk, PRECISION=how, ARCH=arch,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return dx.contiguous(memory_format=layout)
