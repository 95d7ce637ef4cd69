"""The weight and bias gradients of `ffg_conv3d`: all sums over voxels in one pass over x, g and r.

    dmu   = corr(x, g)        dsigma   = 2 sigma * corr(x^2, g * r)
    db_mu = sum g             db_sigma = 2 b_sigma * sum g * r

A program owns one block of 32 channels at four taps (the 128 rows of a matrix product) and N0 + N1 filters (its
columns) and sums over its share of the voxels: one box of g and r serves four taps and both products. The bias is the
weight of a constant input of one, so its sums take a row of the same products, in the place of a tap that is left over
(3x3x3 has 27 taps in 7 groups of 4). A second kernel adds the shares in a fixed order, without atomics: the same inputs
give the same bits.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwc_kernels.geometry import Triple
from dwc_kernels.kernels.launch import Geometry, Plan, fold_taps, run_on, voxels_last
from dwc_kernels.kernels.products import column_blocks, operand, product, settled, voxel_blocks
from dwc_kernels.kernels.tiles import STACKED_ROWS, Tile, splits

__all__ = ["grad_weight"]


@triton.jit
def stack(b0, b1, b2, b3):
    """Four blocks [K, 32] as the rows of one [128, K], without leaving the registers.

    Row bits 3 and 6 choose the block, because a thread of a tensor-core operand holds the rows that differ in those
    bits itself; `channel_and_slot` reads the order of rows back.
    """
    K: tl.constexpr = b0.shape[0]
    s = tl.join(tl.join(b0, b2), tl.join(b1, b3))  # [K, 32, 2, 2]: block = 2 * third + fourth
    return s.reshape(K, 4, 8, 2, 2).permute(3, 1, 4, 2, 0).reshape(128, K)


@triton.jit
def channel_and_slot(row):
    """The channel (0..31) and the block (0..3) of a row of `stack`."""
    return row // 16 % 4 * 8 + row % 8, row // 64 * 2 + row // 8 % 2


@triton.jit
def corner(tap, TAPS: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w):
    """Where a tap reads, relative to the output voxel; taps past the last repeat it and their rows are dropped."""
    t = tl.minimum(tap, TAPS - 1)
    return t // (KH * KW) * dil_d - pad_d, t // KW % KH * dil_h - pad_h, t % KW * dil_w - pad_w


@triton.jit
def reach(s0, s1, s2, s3, size_in, size, everything):
    """The outputs [first, end) of one dimension that any of four shifts connects to the volume, at least one; or all
    outputs, where the bias needs ``everything``."""
    least = tl.minimum(tl.minimum(s0, s1), tl.minimum(s2, s3))
    most = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
    first = tl.minimum(tl.maximum(-most, 0), size - 1)
    end = tl.maximum(tl.minimum(size, size_in - least), first + 1)
    return tl.where(everything, 0, first), tl.where(everything, size, end)


SIZES = ["N", "Di", "Hi", "Wi", "D", "H", "W", "pad_d", "pad_h", "pad_w", "dil_d", "dil_h", "dil_w", "splits"]


@triton.jit(do_not_specialize=SIZES)
def grad_weight_kernel(
    x_desc,  # [N, Di, Hi, Wi, C]
    g_desc, g_tail_desc, r_desc, r_tail_desc,  # [N, D, H, W, F], blocks of N0 and of N1 filters
    out_desc, out_tail_desc,  # [splits * 2 * programs, 128, F]: partial sums for mu, then for sigma^2
    N, Di, Hi, Wi, C,  # size of x
    D, H, W, F,  # of g, with its padding channels
    pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
    splits,  # parts into which the voxels are divided
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    BIAS: tl.constexpr,  # whether the sums of the biases take a row
    C_BLOCKS: tl.constexpr,  # blocks of 32 channels
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,  # voxels per iteration
    N0: tl.constexpr, N1: tl.constexpr,  # filters of the first and the second accumulator pair
    PRECISION: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One program: 32 channels at four taps against N0 + N1 filters, summed over its share of the voxels."""
    BC: tl.constexpr = 32
    K: tl.constexpr = BD * BH * BW
    TAPS: tl.constexpr = KD * KH * KW
    PROGRAMS: tl.constexpr = (TAPS + BIAS + 3) // 4 * C_BLOCKS
    # Which taps, channels, filters and share of the voxels.
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

    # Only outputs that one of the four taps connects to the volume; the bias is connected to all.
    ones = (tap <= TAPS) & (tap + 4 > TAPS) if BIAS else tap < 0
    d0, d1 = reach(d_0, d_1, d_2, d_3, Di, D, ones)
    h0, h1 = reach(h_0, h_1, h_2, h_3, Hi, H, ones)
    w0, w1 = reach(w_0, w_1, w_2, w_3, Wi, W, ones)
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
        x0 = x_blocks.load([n, d + d_0, h + h_0, w + w_0, c]).reshape(K, BC)
        x1 = x_blocks.load([n, d + d_1, h + h_1, w + w_1, c]).reshape(K, BC)
        x2 = x_blocks.load([n, d + d_2, h + h_2, w + w_2, c]).reshape(K, BC)
        x3 = x_blocks.load([n, d + d_3, h + h_3, w + w_3, c]).reshape(K, BC)
        if BIAS:
            one = tl.full([K, BC], 1.0, x0.dtype)
            if TAPS % 4 == 0:
                x0 = tl.where(ones, one, x0)
            elif TAPS % 4 == 1:
                x1 = tl.where(ones, one, x1)
            elif TAPS % 4 == 2:
                x2 = tl.where(ones, one, x2)
            else:
                x3 = tl.where(ones, one, x3)
        x = stack(x0, x1, x2, x3)
        a = operand(x, PRECISION)
        dmu = settled(tl.dot(a, operand(g, PRECISION), dmu, PRECISION), ARCH)
        if N1 > 0:
            dmu_tail = settled(tl.dot(a, operand(g_tail, PRECISION), dmu_tail, PRECISION), ARCH)
        a2 = product(x, x, PRECISION)
        dvar = settled(tl.dot(a2, gr, dvar, PRECISION), ARCH)
        if N1 > 0:
            dvar_tail = settled(tl.dot(a2, gr_tail, dvar_tail, PRECISION), ARCH)
        # On to the next box by carries.
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


@triton.jit(do_not_specialize=["splits", "programs", "F", "WIDTH", "C"])
def sum_kernel(
    partial,  # [splits, 2, programs, 128, WIDTH]
    weight_sigma, dmu, dsigma,  # [F, C, taps]
    bias_sigma, db_mu, db_sigma,  # [F] or None
    splits, programs, F, WIDTH, C,
    TAPS: tl.constexpr,  # of the layer
    FOLDED: tl.constexpr,  # whether they have become channels
    C_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """One program: ROWS rows of N filters, summed over the splits in their order and put in the weights' order."""
    pid = tl.program_id(0)
    row = pid % (128 // ROWS) * ROWS + tl.arange(0, ROWS)
    program = pid // (128 // ROWS) % programs
    f = pid // (128 // ROWS) // programs * N + tl.arange(0, N)
    WIDTH = tl.multiple_of(WIDTH, 4)
    at = partial + (program * 128 + row)[:, None] * WIDTH + f[None, :]
    half = programs.to(tl.int64) * 128 * WIDTH  # elements from the sums for mu to those for sigma^2
    exists = (f < F)[None, :]
    mu = tl.zeros([ROWS, N], tl.float32)
    var = tl.zeros([ROWS, N], tl.float32)
    for _ in range(splits):
        mu += tl.load(at, mask=exists, other=0.0)
        var += tl.load(at + half, mask=exists, other=0.0)
        at += 2 * half

    channel, slot = channel_and_slot(row)
    channel += program % C_BLOCKS * 32
    tap = program // C_BLOCKS * 4 + slot
    if bias_sigma is not None:
        is_bias = ((tap == (1 if FOLDED else TAPS)) & (channel == 0))[:, None] & exists
        b_sigma = tl.load(bias_sigma + f, mask=f < F, other=0.0).to(tl.float32)[None, :]
        column = tl.broadcast_to(f[None, :], [ROWS, N])
        tl.store(db_mu + column, mu.to(db_mu.dtype.element_ty), mask=is_bias)
        tl.store(db_sigma + column, (2.0 * b_sigma * var).to(db_sigma.dtype.element_ty), mask=is_bias)
    if FOLDED:
        inside = (tap == 0) & (channel < C * TAPS)
        tap, channel = channel // C, channel % C
    else:
        inside = (tap < TAPS) & (channel < C)
    index = f[None, :] * (C * TAPS) + (channel * TAPS + tap)[:, None]
    mask = inside[:, None] & exists
    sigma = tl.load(weight_sigma + index, mask=mask, other=0.0).to(tl.float32)
    tl.store(dmu + index, mu.to(dmu.dtype.element_ty), mask=mask)
    tl.store(dsigma + index, (2.0 * var * sigma).to(dsigma.dtype.element_ty), mask=mask)


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
    bias_sigma: Tensor | None = None,  # [F]
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dL/dmu and dL/dsigma in the shape and dtype of weight_sigma, then of the biases; empty without ``bias_sigma``."""
    geometry = Geometry(tuple(weight_sigma.shape[2:]), padding, dilation)
    plan = Plan.of("grad_weight", x, g.shape[2:], weight_sigma, stride, groups, tile)
    work, tile = plan.problem, plan.tile
    (n_filters, channels), taps, has_bias = weight_sigma.shape[:2], math.prod(geometry.kernel), bias_sigma is not None
    if work.folded:
        x, geometry = fold_taps(x, geometry), Geometry.POINT
    else:
        x = voxels_last(x)
    g, r = voxels_last(g), voxels_last(r)
    parts = splits(work, tile, plan.chip)
    c_blocks = -(-work.channels // 32)
    stacks = -(-(math.prod(work.kernel) + has_bias) // 4) * c_blocks
    sums = torch.empty((parts * 2 * stacks, STACKED_ROWS, g.shape[-1]), dtype=torch.float32, device=x.device)
    blocks = [[1, *tile.box, n] for n in (tile.wide, tile.tail)]
    plan.launch(
        grad_weight_kernel, stacks * -(-n_filters // tile.columns) * parts, x.device,
        plan.descriptor(x, [1, *tile.box, 32]), *(plan.descriptor(t, block) for t in (g, r) for block in blocks),
        *(plan.descriptor(sums, [1, STACKED_ROWS, n]) for n in (tile.wide, tile.tail)),
        *x.shape, *g.shape[1:], *geometry.padding, *geometry.dilation, parts,
        *geometry.kernel, has_bias, c_blocks, *tile.box, tile.wide, tile.tail,
    )  # fmt: skip
    weight_sigma = weight_sigma.contiguous()
    dmu, dsigma = torch.empty_like(weight_sigma), torch.empty_like(weight_sigma)
    db_mu, db_sigma = (weight_sigma.new_empty(n_filters if has_bias else 0) for _ in range(2))
    biases = (bias_sigma.contiguous(), db_mu, db_sigma) if has_bias else (None,) * 3
    rows, columns = 32, 64
    run_on(
        x.device, sum_kernel, stacks * (STACKED_ROWS // rows) * -(-n_filters // columns),
        sums, weight_sigma, dmu, dsigma, *biases, parts, stacks, n_filters, g.shape[-1], channels,
        taps, work.folded, c_blocks, rows, columns,
    )  # fmt: skip
    return dmu, dsigma, db_mu, db_sigma
