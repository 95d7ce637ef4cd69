"""The weight gradient of ``ffg_conv3d``: both of its sums over voxels in one pass over x, g and r.

    dmu = corr(x, g)        dsigma = 2 sigma * corr(x^2, g * r)

A program owns one block of 32 channels at four taps (the 128 rows of a matrix product) and N0 + N1 filters (its
columns) and sums over its share of the voxels: one box of g and r serves four taps and both products. The partial sums
of the shares are added in a fixed order afterwards, without atomics, so that the same inputs give the same bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwc_kernels.geometry import Triple
from dwc_kernels.kernels.launch import Geometry, Plan, fold_taps, voxels_last
from dwc_kernels.kernels.products import column_blocks, operand, product, settled, voxel_blocks
from dwc_kernels.kernels.tiles import STACKED_ROWS, Tile, programs, splits

__all__ = ["grad_weight"]


@triton.jit
def stack(b0, b1, b2, b3):
    """Four blocks [K, 32] as the rows of one [128, K], without leaving the registers.

    Row bits 3 and 6 choose the block, for those are the row bits that a thread of a tensor-core operand holds itself;
    the launcher undoes the order of rows on the result.
    """
    K: tl.constexpr = b0.shape[0]
    s = tl.join(tl.join(b0, b2), tl.join(b1, b3))  # [K, 32, 2, 2]: block = 2 * third + fourth
    return s.reshape(K, 4, 8, 2, 2).permute(3, 1, 4, 2, 0).reshape(128, K)


@triton.jit
def corner(tap, TAPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w):
    """Where a tap reads, relative to the output voxel; taps past the last repeat it and their rows are dropped."""
    t = tl.minimum(tap, TAPS - 1)
    return t // (KH * KW) * dil_d - pad_d, t // KW % KH * dil_h - pad_h, t % KW * dil_w - pad_w


@triton.jit
def reach(s0, s1, s2, s3, size_in, size):
    """The outputs [first, end) of one dimension that any of four shifts connects to the volume; at least one."""
    least = tl.minimum(tl.minimum(s0, s1), tl.minimum(s2, s3))
    most = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
    first = tl.minimum(tl.maximum(-most, 0), size - 1)
    return first, tl.maximum(tl.minimum(size, size_in - least), first + 1)


SIZES = ["N", "Di", "Hi", "Wi", "D", "H", "W", "pad_d", "pad_h", "pad_w", "dil_d", "dil_h", "dil_w", "splits"]


@triton.jit(do_not_specialize=SIZES)
def grad_weight_kernel(
    x_desc,  # [N, Di, Hi, Wi, C]
    g_desc, g_tail_desc, r_desc, r_tail_desc,  # [N, D, H, W, F], blocks of N0 and of N1 filters
    out_desc, out_tail_desc,  # [splits * 2 * programs, 128, F]: partial sums for mu, then for sigma^2
    N, Di, Hi, Wi, C, D, H, W, F, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w, splits,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, C_BLOCKS: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, PRECISION: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """One program: 32 channels at four taps against N0 + N1 filters, summed over its share of the voxels."""
    BC: tl.constexpr = 32
    K: tl.constexpr = BD * BH * BW
    TAPS: tl.constexpr = KD * KH * KW
    PROGRAMS: tl.constexpr = (TAPS + 3) // 4 * C_BLOCKS
    pid = tl.program_id(0)
    program = pid % PROGRAMS
    split = pid // PROGRAMS % splits
    f0 = pid // (PROGRAMS * splits) * (N0 + N1)
    c = program % C_BLOCKS * BC
    tap = program // C_BLOCKS * 4
    d_0, h_0, w_0 = corner(tap, TAPS, KH, KW, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w)
    d_1, h_1, w_1 = corner(tap + 1, TAPS, KH, KW, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w)
    d_2, h_2, w_2 = corner(tap + 2, TAPS, KH, KW, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w)
    d_3, h_3, w_3 = corner(tap + 3, TAPS, KH, KW, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w)

    # Only outputs that one of the four taps connects to the volume.
    d0, d1 = reach(d_0, d_1, d_2, d_3, Di, D)
    h0, h1 = reach(h_0, h_1, h_2, h_3, Hi, H)
    w0, w1 = reach(w_0, w_1, w_2, w_3, Wi, W)
    n_w = tl.cdiv(w1 - w0, BW)
    n_h = tl.cdiv(h1 - h0, BH)
    n_d = tl.cdiv(d1 - d0, BD)
    boxes = N * n_d * n_h * n_w
    first = (split * boxes) // splits  # within 32 bits, as `tiles.splits` sees to
    last = ((split + 1) * boxes) // splits
    w = w0 + first % n_w * BW
    h = h0 + first // n_w % n_h * BH
    d = d0 + first // (n_w * n_h) % n_d * BD
    n = first // (n_w * n_h * n_d)

    x_blocks = voxel_blocks(x_desc, N, Di, Hi, Wi, C, BD, BH, BW, BC, ARCH)
    g_blocks = voxel_blocks(g_desc, N, D, H, W, F, BD, BH, BW, N0, ARCH)
    r_blocks = voxel_blocks(r_desc, N, D, H, W, F, BD, BH, BW, N0, ARCH)
    out_blocks = column_blocks(out_desc, splits * 2 * PROGRAMS, 128, F, 128, N0, ARCH)
    if N1 > 0:
        g_tail_blocks = voxel_blocks(g_tail_desc, N, D, H, W, F, BD, BH, BW, N1, ARCH)
        r_tail_blocks = voxel_blocks(r_tail_desc, N, D, H, W, F, BD, BH, BW, N1, ARCH)
        out_tail_blocks = column_blocks(out_tail_desc, splits * 2 * PROGRAMS, 128, F, 128, N1, ARCH)
    dmu = tl.zeros([128, N0], tl.float32)
    dvar = tl.zeros([128, N0], tl.float32)
    if N1 > 0:
        dmu_tail = tl.zeros([128, N1], tl.float32)
        dvar_tail = tl.zeros([128, N1], tl.float32)
    for _ in tl.range(first, last, disallow_acc_multi_buffer=True):
        g = g_blocks.load([n, d, h, w, f0]).reshape(K, N0)
        gr = product(g, r_blocks.load([n, d, h, w, f0]).reshape(K, N0), PRECISION)
        if N1 > 0:
            g_tail = g_tail_blocks.load([n, d, h, w, f0 + N0]).reshape(K, N1)
            gr_tail = product(g_tail, r_tail_blocks.load([n, d, h, w, f0 + N0]).reshape(K, N1), PRECISION)
        x = stack(
            x_blocks.load([n, d + d_0, h + h_0, w + w_0, c]).reshape(K, BC),
            x_blocks.load([n, d + d_1, h + h_1, w + w_1, c]).reshape(K, BC),
            x_blocks.load([n, d + d_2, h + h_2, w + w_2, c]).reshape(K, BC),
            x_blocks.load([n, d + d_3, h + h_3, w + w_3, c]).reshape(K, BC),
        )
        a = operand(x, PRECISION)
        dmu = settled(tl.dot(a, operand(g, PRECISION), dmu, PRECISION), ARCH)
        if N1 > 0:
            dmu_tail = settled(tl.dot(a, operand(g_tail, PRECISION), dmu_tail, PRECISION), ARCH)
        a2 = product(x, x, PRECISION)
        dvar = settled(tl.dot(a2, gr, dvar, PRECISION), ARCH)
        if N1 > 0:
            dvar_tail = settled(tl.dot(a2, gr_tail, dvar_tail, PRECISION), ARCH)
        w += BW
        step_h = w >= w1
        w = tl.where(step_h, w0, w)
        h += tl.where(step_h, BH, 0)
        step_d = h >= h1
        h = tl.where(step_d, h0, h)
        d += tl.where(step_d, BD, 0)
        step_n = d >= d1
        d = tl.where(step_n, d0, d)
        n += step_n.to(tl.int32)

    row = split * 2 * PROGRAMS + program
    out_blocks.store([row, 0, f0], settled(dmu, ARCH).reshape(1, 128, N0))
    out_blocks.store([row + PROGRAMS, 0, f0], settled(dvar, ARCH).reshape(1, 128, N0))
    if N1 > 0:
        out_tail_blocks.store([row, 0, f0 + N0], settled(dmu_tail, ARCH).reshape(1, 128, N1))
        out_tail_blocks.store([row + PROGRAMS, 0, f0 + N0], settled(dvar_tail, ARCH).reshape(1, 128, N1))


def grad_weight(
    g: Tensor,  # [N, F, D', H', W']
    r: Tensor,
    x: Tensor,  # [N, C, D, H, W]
    weight_sigma: Tensor,  # [F, C, kD, kH, kW]
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    *,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """dL/dmu and dL/dsigma in the shape and dtype of weight_sigma.

    Raises
    ------
    ValueError
        If the kernels cannot run on these arguments, saying why.
    """
    geometry = Geometry(tuple(weight_sigma.shape[2:]), padding, dilation)
    plan = Plan.of("grad_weight", x, g.shape[2:], weight_sigma, stride, groups, tile)
    work, tile = plan.problem, plan.tile
    if work.folded:
        x, geometry = fold_taps(x, geometry), Geometry.POINT
    else:
        x = voxels_last(x)
    n_filters, g, r = g.shape[1], voxels_last(g), voxels_last(r)
    parts = splits(work, tile, plan.chip)
    c_blocks, groups_of_taps = -(-work.channels // 32), -(-math.prod(work.kernel) // 4)
    partial = torch.empty(
        (parts, 2, groups_of_taps, c_blocks, STACKED_ROWS, g.shape[-1]), dtype=torch.float32, device=x.device
    )
    sums = partial.view(-1, *partial.shape[-2:])
    blocks = [[1, *tile.box, n] for n in (tile.wide, tile.tail)]
    plan.launch(
        grad_weight_kernel, programs(work, tile) * parts, x.device,
        plan.descriptor(x, [1, *tile.box, 32]), *(plan.descriptor(t, block) for t in (g, r) for block in blocks),
        *(plan.descriptor(sums, [1, STACKED_ROWS, n]) for n in (tile.wide, tile.tail)),
        *x.shape, *g.shape[1:], *geometry.padding, *geometry.dilation, parts,
        *geometry.kernel, c_blocks, *tile.box, tile.wide, tile.tail,
    )  # fmt: skip
    # Rows of `stack` are (tap bit 1, channel bits 4-3, tap bit 0, channel bits 2-0).
    total = partial.sum(0).view(2, groups_of_taps, c_blocks, 2, 4, 2, 8, -1)
    total = total.permute(0, 7, 2, 4, 6, 1, 3, 5).reshape(2, -1, c_blocks * 32, groups_of_taps * 4)
    total = total[:, :n_filters, : work.channels, : math.prod(work.kernel)]
    if work.folded:
        total = total.reshape(2, n_filters, -1, weight_sigma.shape[1]).transpose(2, 3)
    dmu, dvar = total.reshape(2, *weight_sigma.shape)
    return dmu.to(weight_sigma.dtype), (2.0 * dvar * weight_sigma).to(weight_sigma.dtype)
