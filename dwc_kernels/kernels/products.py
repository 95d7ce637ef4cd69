"""Device functions that the three kernels share: operands of the tensor cores, and the loop over taps and channels."""

# mypy: disallow-untyped-defs=False
# Device functions have no Python types.

import triton
import triton.language as tl
from triton import knobs

__all__ = [
    "both_products",
    "column_blocks",
    "deviation",
    "elements",
    "operand",
    "place",
    "product",
    "settled",
    "voxel_blocks",
]

INTERPRETED = tl.constexpr(knobs.runtime.interpret)


@triton.jit
def place(pid, D, H, W, F, BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, N: tl.constexpr):
    """Where tile ``pid`` of N columns starts in [samples, D, H, W, F]; the columns of one box follow each other."""
    n_f = tl.cdiv(F, N)
    n_w = tl.cdiv(W, BW)
    n_h = tl.cdiv(H, BH)
    n_d = tl.cdiv(D, BD)
    box, f = pid // n_f, pid % n_f
    line, w = box // n_w, box % n_w
    plane, h = line // n_h, line % n_h
    return plane // n_d, plane % n_d * BD, h * BH, w * BW, f * N


@triton.jit
def elements(sample, d0, h0, w0, f0, D, H, W, F, BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, N: tl.constexpr):
    """A tile [M, N] in a tensor [samples, D, H, W, F]: its corner (int64), offsets from there, and which exist."""
    row = tl.arange(0, BD * BH * BW)
    dw = row % BW
    dh = row // BW % BH
    dd = row // (BW * BH)
    f = f0 + tl.arange(0, N)
    corner = (((sample * D + d0).to(tl.int64) * H + h0) * W + w0) * F
    offset = ((dd * H + dh) * W + dw)[:, None] * F + f[None, :]
    return corner, offset, ((d0 + dd < D) & (h0 + dh < H) & (w0 + dw < W))[:, None] & (f < F)[None, :]


@triton.jit
def to_tf32(x):
    """x rounded to the nearest tf32, ties away from zero; NaN and infinity stay what they are.

    The instruction makes infinity of a signaling NaN of low bits, as seen on an H200; the sum with 0 quiets it first.
    """
    if INTERPRETED:  # the interpreter runs no assembly
        bits = x.to(tl.int32, bitcast=True)
        finite = (bits & 0x7F800000) != 0x7F800000
        return tl.where(finite, ((bits + 0x1000) & -0x2000).to(tl.float32, bitcast=True), x + x)
    else:
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; add.rn.f32 t, $1, 0f00000000; cvt.rna.tf32.f32 $0, t; }", "=r,r", [x],
            dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip


@triton.jit
def operand(x, PRECISION: tl.constexpr):
    """x as the tensor cores take it: tf32 is rounded here, for they would truncate."""
    if PRECISION == "tf32" and x.dtype == tl.float32:
        return to_tf32(x)
    else:
        return x


@triton.jit
def product(x, z, PRECISION: tl.constexpr):
    """x * z as an operand: in bf16 for bf16, in fp32 for anything else, so that a square never meets fp16's range."""
    if x.dtype == tl.bfloat16:
        return x * z
    else:
        return operand(x.to(tl.float32) * z.to(tl.float32), PRECISION)


@triton.jit
def deviation(var):
    """sqrt(var), and its reciprocal or 0 where var = 0."""
    # The reciprocal square root takes a subnormal for zero, so small variances are scaled by 2^64 before it.
    small = var < 1e-30
    scaled = tl.where(small, var * 18446744073709551616.0, var)
    inverse = tl.where(var == 0.0, 0.0, tl.rsqrt(scaled))
    std = tl.where(var == float("inf"), var, scaled * inverse)
    inverse = tl.where(small, inverse * 4294967296.0, inverse)
    return tl.where(small, std * 2.3283064365386963e-10, std), inverse


@triton.jit
def settled(acc, ARCH: tl.constexpr):
    """acc itself, at no cost. On sm_90 a use of the accumulator after its product makes Triton wait for the product
    there, and between two such waits ptxas lets the matrix instructions overlap. Without it ptxas serializes every
    single one (warning C7515) where an operand is a product of two blocks, and of fp32 in some volumes. With squares
    of bf16 it does not, and the waits would only cost. Elsewhere there is nothing to settle.
    """
    if ARCH == "sm_90":
        return acc.to(tl.int32, bitcast=True).to(tl.float32, bitcast=True)
    else:
        return acc


@triton.jit
def whole(C, t):
    """C itself, a multiple of 16 bytes of t's elements, said so that the compiler sees it and vectorizes loads."""
    STEP: tl.constexpr = 128 // t.dtype.element_ty.primitive_bitwidth
    return C // STEP * STEP


@triton.jit
def voxel_blocks(
    t,  # [N, D, H, W, C], a pointer or a descriptor
    N, D, H, W, C,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, BC: tl.constexpr,  # of a block
    ARCH: tl.constexpr,
):  # fmt: skip
    """A descriptor of t for boxes of voxels: the launcher's own, or one made here of a pointer on chips without a copy
    engine for tensors, so that the compiler sees the strides."""
    if ARCH == "sm_80":
        channels = whole(C, t)
        line = W * channels
        plane = H.to(tl.int64) * line
        return tl.make_tensor_descriptor(
            t, [N, D, H, W, channels], [D * plane, plane, line, channels, 1], [1, BD, BH, BW, BC]
        )
    else:
        return t


@triton.jit
def column_blocks(t, taps, F, C, N: tl.constexpr, BC: tl.constexpr, ARCH: tl.constexpr):
    """A descriptor of t [taps, F, C] for blocks of N columns, in the same way."""
    if ARCH == "sm_80":
        channels = whole(C, t)
        return tl.make_tensor_descriptor(t, [taps, F, channels], [F * channels, channels, 1], [1, N, BC])
    else:
        return t


@triton.jit
def first_tap(origin, extent: tl.constexpr, size, pad, dilation):
    """The first tap that reaches the volume from any row of the box: ceil((pad - last row) / dilation), at least 0."""
    last = tl.minimum(origin + extent, size) - 1
    return (tl.maximum(pad - last, 0) + dilation - 1) // dilation


@triton.jit
def end_tap(origin, size_a, pad, dilation, K: tl.constexpr):
    """One past the last such tap: ceil((size_a + pad - first row) / dilation), at most K."""
    return tl.minimum((tl.maximum(size_a + pad - origin, 0) + dilation - 1) // dilation, K)


@triton.jit
def phase_of(tap, pad, dilation, STRIDE: tl.constexpr):
    """Where a tap of a strided convolution reads along one dimension: the phase, and the shift within it."""
    ahead = (pad + STRIDE - 1) // STRIDE  # keeps the division to positive numbers
    at = tap * dilation - pad + ahead * STRIDE
    return at % STRIDE, at // STRIDE - ahead


@triton.jit
def both_products(
    a_desc,  # [N, Da, Ha, Wa, C]: the mean's operand
    b_desc,  # None or like a: the variance's operand is a * b, or a^2
    mu_desc, mu_tail_desc,  # [taps, F, C], blocks of N0 and of N1 columns
    var_desc, var_tail_desc,  # [taps, F, C]: sigma^2
    sample, d0, h0, w0, f0,  # the tile: a box of rows at a corner, and columns from f0 on
    N, Da, Ha, Wa, C,  # size of a; with a stride, of its phases
    D, H, W, F,  # size of what the rows and columns are taken from
    pad_d, pad_h, pad_w, dil_d, dil_h, dil_w,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SD: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,  # stride; from 2 on, a is `layouts.split_phases`
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr,  # voxels of the tile
    BC: tl.constexpr,  # channels per product
    C_STEPS: tl.constexpr,  # iterations per tap
    N0: tl.constexpr, N1: tl.constexpr,  # columns of the first and of the second accumulator pair
    PRECISION: tl.constexpr, ARCH: tl.constexpr,
):  # fmt: skip
    """The sums over taps and channels of a * mu and of a * b * sigma^2 for one tile, in one pass over a and b."""
    M: tl.constexpr = BD * BH * BW
    TAPS: tl.constexpr = KD * KH * KW
    a_blocks = voxel_blocks(a_desc, N, Da, Ha, Wa, C, BD, BH, BW, BC, ARCH)
    if b_desc is not None:
        b_blocks = voxel_blocks(b_desc, N, Da, Ha, Wa, C, BD, BH, BW, BC, ARCH)
    mu_blocks = column_blocks(mu_desc, TAPS, F, C, N0, BC, ARCH)
    var_blocks = column_blocks(var_desc, TAPS, F, C, N0, BC, ARCH)
    if N1 > 0:
        mu_tail_blocks = column_blocks(mu_tail_desc, TAPS, F, C, N1, BC, ARCH)
        var_tail_blocks = column_blocks(var_tail_desc, TAPS, F, C, N1, BC, ARCH)
    # Only taps that connect some voxel of the box to the volume.
    STRIDED: tl.constexpr = SD * SH * SW > 1
    if STRIDED:
        kd, kh, kw = 0, 0, 0
        n_kd, n_kh, n_kw = KD, KH, KW
    else:
        kd = first_tap(d0, BD, D, pad_d, dil_d)
        kh = first_tap(h0, BH, H, pad_h, dil_h)
        kw = first_tap(w0, BW, W, pad_w, dil_w)
        n_kd = tl.maximum(end_tap(d0, Da, pad_d, dil_d, KD) - kd, 0)
        n_kh = tl.maximum(end_tap(h0, Ha, pad_h, dil_h, KH) - kh, 0)
        n_kw = tl.maximum(end_tap(w0, Wa, pad_w, dil_w, KW) - kw, 0)
    d, h, w = d0 - pad_d + kd * dil_d, h0 - pad_h + kh * dil_h, w0 - pad_w + kw * dil_w
    tap = (kd * KH + kh) * KW + kw

    mean = tl.zeros([M, N0], tl.float32)
    var = tl.zeros([M, N0], tl.float32)
    mean_tail = tl.zeros([M, N1 if N1 > 0 else 1], tl.float32)
    var_tail = tl.zeros([M, N1 if N1 > 0 else 1], tl.float32)
    i, j, c = 0, 0, 0  # tap (i, j) along H and W, and the channel
    for _ in tl.range(n_kd * n_kh * n_kw * C_STEPS, disallow_acc_multi_buffer=True):
        t = tap + i * KW + j
        if STRIDED:
            phase_d, shift_d = phase_of(tap // (KH * KW), pad_d, dil_d, SD)
            phase_h, shift_h = phase_of(i, pad_h, dil_h, SH)
            phase_w, shift_w = phase_of(j, pad_w, dil_w, SW)
            n = ((phase_d * SH + phase_h) * SW + phase_w) * (N // (SD * SH * SW)) + sample
            ad, ah, aw = d0 + shift_d, h0 + shift_h, w0 + shift_w
        else:
            n, ad, ah, aw = sample, d, h + i * dil_h, w + j * dil_w
        a = a_blocks.load([n, ad, ah, aw, c]).reshape(M, BC)
        if b_desc is None:
            ab = product(a, a, PRECISION)
        else:
            ab = product(a, b_blocks.load([n, ad, ah, aw, c]).reshape(M, BC), PRECISION)
        WAITS: tl.constexpr = "none" if b_desc is None and a.dtype == tl.bfloat16 else ARCH
        a = operand(a, PRECISION)
        mean = settled(tl.dot(a, mu_blocks.load([t, f0, c]).reshape(N0, BC).T, mean, PRECISION), WAITS)
        if N1 > 0:
            mean_tail = settled(
                tl.dot(a, mu_tail_blocks.load([t, f0 + N0, c]).reshape(N1, BC).T, mean_tail, PRECISION), WAITS
            )
        var = settled(tl.dot(ab, var_blocks.load([t, f0, c]).reshape(N0, BC).T, var, PRECISION), WAITS)
        if N1 > 0:
            var_tail = settled(
                tl.dot(ab, var_tail_blocks.load([t, f0 + N0, c]).reshape(N1, BC).T, var_tail, PRECISION), WAITS
            )
        # On to the next step by carries: a division here would cost more than all other index arithmetic.
        if C_STEPS > 1:
            c += BC
            carry = c == C_STEPS * BC
            c = tl.where(carry, 0, c)
            j += carry.to(tl.int32)
        else:
            j += 1
        carry = j == n_kw
        j = tl.where(carry, 0, j)
        i += carry.to(tl.int32)
        carry = i == n_kh
        i = tl.where(carry, 0, i)
        d += tl.where(carry, dil_d, 0)
        tap += tl.where(carry, KH * KW, 0)
    return mean, mean_tail, var, var_tail
