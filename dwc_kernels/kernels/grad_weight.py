"""The weight and bias gradients of `ffg_conv3d`: all sums over voxels in one pass over x, g and r.

    dmu   = corr(x, g)        dsigma   = 2 sigma * corr(x^2, g * r)
    db_mu = sum g             db_sigma = 2 b_sigma * sum g * r

A program owns one block of 32 channels at four taps (the 128 rows of a matrix product) and N0 + N1 filters (its
columns) and sums over its share of the voxels: one box of g and r serves four taps and both products. Then
each sums g and g * r themselves over a part of that share, for the biases. A second kernel adds all partial sums in a
fixed order, without atomics: the same inputs give the same bits.
"""

# mypy: disallow-untyped-defs=False
# Device functions have no Python types.

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwc_kernels import reference
from dwc_kernels.geometry import Triple
from dwc_kernels.kernels.launch import ONE, Geometry, Plan, run_on, triple
from dwc_kernels.kernels.layouts import fold_taps, voxels_last
from dwc_kernels.kernels.products import column_blocks, operand, product, settled, voxel_blocks
from dwc_kernels.kernels.tiles import STACKED_ROWS, Tile, programs, splits
from dwc_kernels.kernels.tiles import stacks as stacks_of

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
def reach(s0, s1, s2, s3, size_in, size):
    """The outputs [first, end) of one dimension that any of four shifts connects to the volume; at least one."""
    least = tl.minimum(tl.minimum(s0, s1), tl.minimum(s2, s3))
    most = tl.maximum(tl.maximum(s0, s1), tl.maximum(s2, s3))
    first = tl.minimum(tl.maximum(-most, 0), size - 1)
    return first, tl.maximum(tl.minimum(size, size_in - least), first + 1)


@triton.jit
def bias_sums(
    g_desc, r_desc,  # [N, D, H, W, F], blocks of N0 filters
    out,  # [shares, 2, F]: partial sums of g, then of g * r
    share, shares, f0,  # which of the boxes, and which filters
    N, D, H, W, F,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, N0: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Sum g and g * r over a share of the boxes, in fp32."""
    K: tl.constexpr = BD * BH * BW
    n_w, n_h, n_d = tl.cdiv(W, BW), tl.cdiv(H, BH), tl.cdiv(D, BD)
    boxes = N * n_d * n_h * n_w
    g_blocks = voxel_blocks(g_desc, N, D, H, W, F, BD, BH, BW, N0, ARCH)
    r_blocks = voxel_blocks(r_desc, N, D, H, W, F, BD, BH, BW, N0, ARCH)
    db_mu = tl.zeros([K, N0], tl.float32)
    db_var = tl.zeros([K, N0], tl.float32)
    # The first shares have one box more; a product of boxes and shares would not fit 32 bits.
    first = share * (boxes // shares) + tl.minimum(share, boxes % shares)
    last = first + boxes // shares + (share < boxes % shares).to(tl.int32)
    for box in range(first, last):
        w = box % n_w * BW
        h = box // n_w % n_h * BH
        d = box // (n_w * n_h) % n_d * BD
        n = box // (n_w * n_h * n_d)
        g = g_blocks.load([n, d, h, w, f0]).reshape(K, N0).to(tl.float32)
        db_mu += g
        db_var += g * r_blocks.load([n, d, h, w, f0]).reshape(K, N0).to(tl.float32)
    f = f0 + tl.arange(0, N0)
    tl.store(out + share * 2 * F + f, tl.sum(db_mu, 0), mask=f < F)
    tl.store(out + (share * 2 + 1) * F + f, tl.sum(db_var, 0), mask=f < F)


@triton.jit
def weight_sums(
    x_desc, g_desc, g_tail_desc, r_desc, r_tail_desc, out_desc, out_tail_desc,  # of `grad_weight_kernel`
    program, split, splits, f0,  # which taps and channels, which share of the voxels, which filters
    N, Di, Hi, Wi, C, D, H, W, F, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, C_BLOCKS: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    PRECISION: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """Sum over this program's share of the boxes for 32 channels at four taps and N0 + N1 filters."""
    BC: tl.constexpr = 32
    K: tl.constexpr = BD * BH * BW
    TAPS: tl.constexpr = KD * KH * KW
    STACKS: tl.constexpr = (TAPS + 3) // 4 * C_BLOCKS
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
    out_blocks = column_blocks(out_desc, splits * 2 * STACKS, 128, F, 128, N0, ARCH)
    if N1 > 0:
        g_tail_blocks = voxel_blocks(g_tail_desc, N, D, H, W, F, BD, BH, BW, N1, ARCH)
        r_tail_blocks = voxel_blocks(r_tail_desc, N, D, H, W, F, BD, BH, BW, N1, ARCH)
        out_tail_blocks = column_blocks(out_tail_desc, splits * 2 * STACKS, 128, F, 128, N1, ARCH)
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

    row = split * 2 * STACKS + program
    out_blocks.store([row, 0, f0], settled(dmu, ARCH).reshape(1, 128, N0))
    out_blocks.store([row + STACKS, 0, f0], settled(dvar, ARCH).reshape(1, 128, N0))
    if N1 > 0:
        out_tail_blocks.store([row, 0, f0 + N0], settled(dmu_tail, ARCH).reshape(1, 128, N1))
        out_tail_blocks.store([row + STACKS, 0, f0 + N0], settled(dvar_tail, ARCH).reshape(1, 128, N1))


SIZES = ["N", "Di", "Hi", "Wi", "D", "H", "W", "pad_d", "pad_h", "pad_w", "dil_d", "dil_h", "dil_w", "splits"]


@triton.jit(do_not_specialize=SIZES)
def grad_weight_kernel(
    x_desc,  # [N, Di, Hi, Wi, C]; like the next six a descriptor, or a pointer where `voxel_blocks` says
    g_desc, g_tail_desc, r_desc, r_tail_desc,  # [N, D, H, W, F], blocks of N0 and of N1 filters
    out_desc, out_tail_desc,  # [splits * 2 * stacks, 128, F]: partial sums for mu, then for sigma^2
    bias_out,  # [splits * stacks, 2, F], or None without biases
    N, Di, Hi, Wi, C,  # size of x
    D, H, W, F,  # of g, with its padding channels
    pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
    splits,  # shares into which the voxels are divided
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    C_BLOCKS: tl.constexpr,  # blocks of 32 channels
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,  # voxels per iteration
    N0: tl.constexpr, N1: tl.constexpr,  # filters of the first and the second accumulator pair
    PRECISION: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One program: four taps of 32 channels, N0 + N1 filters and one share of the voxels, and a part of the biases."""
    STACKS: tl.constexpr = (KD * KH * KW + 3) // 4 * C_BLOCKS
    pid = tl.program_id(0)
    program = pid % STACKS
    split = pid // STACKS % splits
    f0 = pid // (STACKS * splits) * (N0 + N1)
    weight_sums(
        x_desc, g_desc, g_tail_desc, r_desc, r_tail_desc, out_desc, out_tail_desc, program, split, splits, f0,
        N, Di, Hi, Wi, C, D, H, W, F, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
        KD, KH, KW, C_BLOCKS, BD, BH, BW, N0, N1, PRECISION, ARCH,
    )  # fmt: skip
    if bias_out is not None:
        share = split * STACKS + program
        shares = splits * STACKS
        bias_sums(g_desc, r_desc, bias_out, share, shares, f0, N, D, H, W, F, BD, BH, BW, N0, ARCH)
        if N1 > 0:
            bias_sums(g_tail_desc, r_tail_desc, bias_out, share, shares, f0 + N0, N, D, H, W, F, BD, BH, BW, N1, ARCH)


# Rows, filters and splits of a program of `sum_kernel`: small, so that many sum the many splits of few weights. The
# interpreter runs one program after the other.
SUMS, INTERPRETED_SUMS = (4, 32, 16), (32, 64, 1)


@triton.jit(do_not_specialize=["splits", "stacks", "F", "WIDTH", "C"])
def sum_kernel(
    partial,  # [splits, 2, stacks, 128, WIDTH]
    bias_partial,  # [splits * stacks, 2, WIDTH] or None
    weight_sigma, dmu, dsigma,  # [F, C, taps]
    bias_sigma, db_mu, db_sigma,  # [F] or None
    splits, stacks, F, WIDTH, C,
    TAPS: tl.constexpr,  # of the layer
    FOLDED: tl.constexpr,  # whether they have become channels
    C_BLOCKS: tl.constexpr,
    ROWS: tl.constexpr, N: tl.constexpr,  # rows and filters of a program
    BLOCK: tl.constexpr,  # splits that are read together
):  # fmt: skip
    """One program: ROWS rows of N filters, summed over the splits in a fixed order and put in the weights' order."""
    pid = tl.program_id(0)
    row = pid % (128 // ROWS) * ROWS + tl.arange(0, ROWS)
    stack = pid // (128 // ROWS) % stacks
    f = pid // (128 // ROWS) // stacks * N + tl.arange(0, N)
    WIDTH = tl.multiple_of(WIDTH, 4)
    at = partial + (stack * 128 + row)[:, None] * WIDTH + f[None, :]
    half = stacks.to(tl.int64) * 128 * WIDTH  # elements from the sums for mu to those for sigma^2
    exists = (f < F)[None, :]
    mu = tl.zeros([ROWS, N], tl.float32)
    var = tl.zeros([ROWS, N], tl.float32)
    for start in range(0, splits, BLOCK):
        share = start + tl.arange(0, BLOCK)[:, None, None]
        mask = exists[None] & (share < splits)
        block = at[None] + share * (2 * half)
        mu += tl.sum(tl.load(block, mask=mask, other=0.0), 0)
        var += tl.sum(tl.load(block + half, mask=mask, other=0.0), 0)
    channel, slot = channel_and_slot(row)
    channel += stack % C_BLOCKS * 32
    tap = stack // C_BLOCKS * 4 + slot
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

    # The biases, by the program that has the first rows.
    if bias_partial is not None:  # noqa: SIM102 (known at compile time)
        if pid % (128 // ROWS * stacks) == 0:
            SHARES: tl.constexpr = ROWS * BLOCK
            b_mu = tl.zeros([SHARES, N], tl.float32)
            b_var = tl.zeros([SHARES, N], tl.float32)
            for start in range(0, splits * stacks, SHARES):
                share = start + tl.arange(0, SHARES)[:, None]
                bias_at = bias_partial + share * 2 * WIDTH + f[None, :]
                b_mu += tl.load(bias_at, mask=exists & (share < splits * stacks), other=0.0)
                b_var += tl.load(bias_at + WIDTH, mask=exists & (share < splits * stacks), other=0.0)
            b_sigma = tl.load(bias_sigma + f, mask=f < F, other=0.0).to(tl.float32)
            tl.store(db_mu + f, tl.sum(b_mu, 0).to(db_mu.dtype.element_ty), mask=f < F)
            tl.store(db_sigma + f, (2.0 * b_sigma * tl.sum(b_var, 0)).to(db_sigma.dtype.element_ty), mask=f < F)


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
    """dL/dmu and dL/dsigma in the shape and dtype of weight_sigma, then of the biases; empty without ``bias_sigma``.

    With a stride, they come from the reference.
    """
    if stride != ONE:
        return reference.grad_weight(g, r, x, weight_sigma, stride, padding, dilation, groups, bias_sigma=bias_sigma)
    geometry = Geometry(triple(weight_sigma.shape[2:]), padding, dilation)
    plan = Plan.of("grad_weight", x, g.shape[2:], weight_sigma, stride, groups, tile)
    work, tile = plan.problem, plan.tile
    (n_filters, channels), taps, has_bias = weight_sigma.shape[:2], math.prod(geometry.kernel), bias_sigma is not None
    if work.folded:
        x, geometry = fold_taps(x, geometry), Geometry.POINT
    else:
        x = voxels_last(x)
    g, r = voxels_last(g), voxels_last(r)
    parts = splits(work, tile, plan.chip)
    c_blocks, stacks, width = -(-work.channels // 32), stacks_of(work), g.shape[-1]
    sums = torch.empty((parts * 2 * stacks, STACKED_ROWS, width), dtype=torch.float32, device=x.device)
    bias_sums = sums.new_empty(parts * stacks, 2, width) if has_bias else None
    blocks = [[1, *tile.box, n] for n in (tile.wide, tile.tail)]
    plan.launch(
        grad_weight_kernel, programs(work, tile) * parts, x.device,
        plan.descriptor(x, [1, *tile.box, 32]), *(plan.descriptor(t, block) for t in (g, r) for block in blocks),
        *(plan.descriptor(sums, [1, STACKED_ROWS, n]) for n in (tile.wide, tile.tail)), bias_sums,
        *x.shape, *g.shape[1:], *geometry.padding, *geometry.dilation, parts,
        *geometry.kernel, c_blocks, *tile.box, tile.wide, tile.tail,
    )  # fmt: skip
    weight_sigma = weight_sigma.contiguous()
    dmu, dsigma = torch.empty_like(weight_sigma), torch.empty_like(weight_sigma)
    db_mu, db_sigma = (weight_sigma.new_empty(n_filters if has_bias else 0) for _ in range(2))
    biases = (None,) * 3 if bias_sigma is None else (bias_sigma.contiguous(), db_mu, db_sigma)
    rows, columns, block = INTERPRETED_SUMS if plan.chip.arch == "interpreter" else SUMS
    run_on(
        x.device, sum_kernel, stacks * (STACKED_ROWS // rows) * -(-n_filters // columns),
        sums, bias_sums, weight_sigma, dmu, dsigma, *biases, parts, stacks, n_filters, width, channels,
        taps, work.folded, c_blocks, rows, columns, block,
    )  # fmt: skip
    return dmu, dsigma, db_mu, db_sigma
