"""The forward of `ffg_conv3d`: mean and variance products, bias and noise in one pass over the input.

    mean = conv(x, mu) + b_mu        var = conv(x^2, sigma^2) + b_sigma^2
    y    = mean + sqrt(var) * eps    r   = eps / (2 sqrt(var)), 0 where var = 0

A program owns a box of BD x BH x BW output voxels (the rows of a matrix product) and N0 + N1 filters (its columns),
sums over taps and channels (`products.both_products`) and finishes in registers: x^2, mean, var and eps are never in
memory.
"""

# mypy: disallow-untyped-defs=False
# Device functions have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwc_kernels.geometry import Triple
from dwc_kernels.kernels.launch import ONE, Geometry, Plan, triple
from dwc_kernels.kernels.layouts import empty_voxels_last, fold_taps, split_phases, voxels_last
from dwc_kernels.kernels.noise import normal_tile
from dwc_kernels.kernels.products import both_products, deviation, elements, place
from dwc_kernels.kernels.tiles import Tile, programs
from dwc_kernels.kernels.weights import packed
from dwc_kernels.reference import output_layout

__all__ = ["forward"]


@triton.jit
def finish(
    mean, var,  # [BD * BH * BW, N]: sums over taps and channels
    bias_mu, bias_sigma,  # [F] or None
    y, r,  # [samples, D, H, W, F]; r or None
    seed, sample, f0, d0, h0, w0,  # where the tile starts
    F, D, H, W,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, N: tl.constexpr,
    CHUNK: tl.constexpr,  # filters finished at a time
    ALIGNED: tl.constexpr,  # W is a multiple of 4
):  # fmt: skip
    """Bias, noise and stores of N filters from f0 on, CHUNK at a time to stay within the registers."""
    M: tl.constexpr = BD * BH * BW
    if N > CHUNK:
        HALF: tl.constexpr = N // 2
        mean_low, mean_high = tl.split(mean.reshape(M, 2, HALF).permute(0, 2, 1))
        var_low, var_high = tl.split(var.reshape(M, 2, HALF).permute(0, 2, 1))
        finish(
            mean_low, var_low, bias_mu, bias_sigma, y, r, seed, sample, f0, d0, h0, w0, F, D, H, W,
            BD, BH, BW, HALF, CHUNK, ALIGNED,
        )  # fmt: skip
        finish(
            mean_high, var_high, bias_mu, bias_sigma, y, r, seed, sample, f0 + HALF, d0, h0, w0, F, D, H, W,
            BD, BH, BW, HALF, CHUNK, ALIGNED,
        )  # fmt: skip
    else:
        f = f0 + tl.arange(0, N)
        if bias_mu is not None:
            mean += tl.load(bias_mu + f, mask=f < F, other=0.0).to(tl.float32)
            b_sigma = tl.load(bias_sigma + f, mask=f < F, other=0.0).to(tl.float32)
            var += b_sigma * b_sigma
        volume = D.to(tl.int64) * H * W
        run = tl.arange(0, M // 4)  # rows come in runs of four along W
        rw = run % (BW // 4) * 4
        rh = run // (BW // 4) % BH
        rd = run // (BW // 4 * BH)
        voxel = ((d0 + rd) * H + h0 + rh).to(tl.int64) * W + w0 + rw
        eps = normal_tile(seed, (sample.to(tl.int64) * F + f)[None, :] * volume + voxel[:, None], M, N, ALIGNED)
        std, inverse = deviation(var)
        corner, offset, mask = elements(sample, d0, h0, w0, f0, D, H, W, F, BD, BH, BW, N)
        tl.store(y + corner + offset, (mean + std * eps).to(y.dtype.element_ty), mask=mask)
        if r is not None:
            half = 0.5 * eps * inverse
            if r.dtype.element_ty == tl.float16:  # r saturates where 1 / std leaves fp16's range (std < 8e-6)
                half = tl.maximum(half, -65504.0, propagate_nan=tl.PropagateNan.ALL)
                half = tl.minimum(half, 65504.0, propagate_nan=tl.PropagateNan.ALL)
            tl.store(r + corner + offset, half.to(r.dtype.element_ty), mask=mask)


SIZES = ["N", "Di", "Hi", "Wi", "D", "H", "W", "pad_d", "pad_h", "pad_w", "dil_d", "dil_h", "dil_w"]


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    x_desc,  # [N, Di, Hi, Wi, C]; like the next four a descriptor, or a pointer where `voxel_blocks` says
    mu_desc, mu_tail_desc,  # [taps, F, C], blocks of N0 and of N1 filters
    var_desc, var_tail_desc,  # [taps, F, C]: sigma^2
    bias_mu, bias_sigma,  # [F] or None
    y, r,  # [N, D, H, W, F]; r or None
    seed,  # int64 scalar in memory, so that a CUDA graph can be replayed with another
    N, Di, Hi, Wi, C, D, H, W, F, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,  # the rest as in `both_products`
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,
    C_STEPS: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr,
    CHUNK: tl.constexpr, ALIGNED: tl.constexpr,  # of `finish`
    PRECISION: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """One program: a box of BD x BH x BW voxels of one sample and N0 + N1 filters, from descriptors to y and r."""
    sample, d0, h0, w0, f0 = place(tl.program_id(0), D, H, W, F, BD, BH, BW, N0 + N1)
    mean, mean_tail, var, var_tail = both_products(
        x_desc, None, mu_desc, mu_tail_desc, var_desc, var_tail_desc, sample, d0, h0, w0, f0,
        N, Di, Hi, Wi, C, D, H, W, F, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
        KD, KH, KW, SD, SH, SW, BD, BH, BW, BC, C_STEPS, N0, N1, PRECISION, ARCH,
    )  # fmt: skip
    key = tl.load(seed)
    if N1 > 0:
        finish(
            mean_tail, var_tail, bias_mu, bias_sigma, y, r, key, sample, f0 + N0, d0, h0, w0, F, D, H, W,
            BD, BH, BW, N1, CHUNK, ALIGNED,
        )  # fmt: skip
    finish(
        mean, var, bias_mu, bias_sigma, y, r, key, sample, f0, d0, h0, w0, F, D, H, W,
        BD, BH, BW, N0, CHUNK, ALIGNED,
    )  # fmt: skip


def forward(
    x: Tensor,  # [N, C, D, H, W]
    weight_mu: Tensor,  # [F, C, kD, kH, kW]
    weight_sigma: Tensor,
    bias_mu: Tensor | None,  # [F]
    bias_sigma: Tensor | None,
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
    seed: Tensor,  # int64 scalar
    *,
    keep_r: bool = True,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor]:
    """Sample the convolution: y in the layout of x and r in channels_last_3d, [N, F, D', H', W'], in the dtype of x.

    Without ``keep_r``, where no backward will follow, r is empty and never written.

    Raises
    ------
    ValueError
        If the kernels cannot run on these arguments, saying why.
    """
    geometry = Geometry(triple(weight_mu.shape[2:]), padding, dilation, stride)
    size, n_filters = geometry.output_size(x.shape[2:]), weight_mu.shape[0]
    plan = Plan.of("forward", x, size, weight_mu, stride, groups, tile)
    y = empty_voxels_last(x, n_filters, size)
    r = torch.empty_like(y) if keep_r else None
    layout = output_layout(x)
    shared = r if stride == ONE else None  # with a stride, no kernel computes the gradients
    weights = packed(weight_mu, weight_sigma, plan.precision, folded=plan.problem.folded, r=shared)
    if plan.problem.folded:
        a, geometry = fold_taps(x, geometry), Geometry.POINT
    else:
        a = voxels_last(x) if stride == ONE else split_phases(x, stride)
    if bias_mu is not None and bias_sigma is not None:
        bias_mu, bias_sigma = bias_mu.contiguous(), bias_sigma.contiguous()
    if plan.tile.specialized:
        from dwc_kernels.kernels.specialized import launch

        launch.launch_forward(plan, a, geometry, weights, bias_mu, bias_sigma, y, r, seed)
        return y.contiguous(memory_format=layout), x.new_empty(0) if r is None else r
    plan.launch(
        forward_kernel, programs(plan.problem, plan.tile), x.device,
        plan.descriptor(a, [1, *plan.tile.box, plan.tile.channels]), *plan.columns(*weights),
        bias_mu, bias_sigma, y, r, seed,
        *a.shape, *size, n_filters, *geometry.padding, *geometry.dilation, *geometry.kernel, *geometry.stride,
        *plan.loop, CHUNK=plan.tile.chunk, ALIGNED=size[2] % 4 == 0,
    )  # fmt: skip
    return y.contiguous(memory_format=layout), x.new_empty(0) if r is None else r
