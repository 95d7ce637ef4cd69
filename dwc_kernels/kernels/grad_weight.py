import triton
import triton.language as tl
from dwc_kernels.kernels.products import settled, product, operand


@triton.jit
def stack(b0, b1, b2, b3):
    """Four blocks [K, 32] as the rows of one [128, K], without leaving the registers.

    Row bits 3 and 6 choose the block, for those are the row bits that a thread of a tensor-core operand holds itself; the
    launcher undoes the order of rows on the result.
    """
    K: tl.constexpr = b0.shape[0]
    s = tl.join(tl.join(b0, b2), tl.join(b1, b3))  # [K, 32, 2, 2]: block = 2 * third + fourth
    return s.reshape(K, 4, 8, 2, 2).permute(3, 1, 4, 2, 0).reshape(128, K)


@triton.jit
def valid(tap, size, size_in, pad, dilation):
    """The outputs [first, end) that a tap connects to the volume."""
    shift = tap * dilation - pad
    return tl.maximum(-shift, 0), tl.minimum(size, size_in - shift)


@triton.jit
def grad_weight_kernel(
    x_desc,  # [N, Di, Hi, Wi, C]
    g_desc, g_tail_desc, r_desc, r_tail_desc,  # [N, D, H, W, F], blocks of N0 and of N1 filters
    out_desc, out_tail_desc,  # [splits, 2, programs, 128] rows of F: partial sums for mu and for sigma^2
    samples, Di, Hi, Wi, D, H, W, pad_d, pad_h, pad_w, dil_d, dil_h, dil_w, splits,
    KD: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, C_BLOCKS: tl.constexpr,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, N0: tl.constexpr, N1: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    BC: tl.constexpr = 32
    K: tl.constexpr = BD * BH * BW
    TAPS: tl.constexpr = KD * KH * KW
    PROGRAMS: tl.constexpr = (TAPS + 3) // 4 * C_BLOCKS
    pid = tl.program_id(0)
    program = pid % PROGRAMS
    split = pid // PROGRAMS % splits
    f0 = pid // (PROGRAMS * splits) * (N0 + N1)
    c = program % C_BLOCKS * BC
    t0 = program // C_BLOCKS * 4
    t1 = tl.minimum(t0 + 1, TAPS - 1)
    t2 = tl.minimum(t0 + 2, TAPS - 1)
    t3 = tl.minimum(t0 + 3, TAPS - 1)
    d_0, d_1, d_2, d_3 = t0 // (KH * KW) * dil_d - pad_d, t1 // (KH * KW) * dil_d - pad_d, t2 // (KH * KW) * dil_d - pad_d, t3 // (KH * KW) * dil_d - pad_d
    h_0, h_1, h_2, h_3 = t0 // KW % KH * dil_h - pad_h, t1 // KW % KH * dil_h - pad_h, t2 // KW % KH * dil_h - pad_h, t3 // KW % KH * dil_h - pad_h
    w_0, w_1, w_2, w_3 = t0 % KW * dil_w - pad_w, t1 % KW * dil_w - pad_w, t2 % KW * dil_w - pad_w, t3 % KW * dil_w - pad_w
    
    n_w = tl.cdiv(W, BW)
    n_h = tl.cdiv(H, BH)
    n_d = tl.cdiv(D, BD)
    boxes = samples * n_d * n_h * n_w
    first = (split * boxes) // splits
    last = ((split + 1) * boxes) // splits
    w = first % n_w * BW
    h = first // n_w % n_h * BH
    d = first // (n_w * n_h) % n_d * BD
    n = first // (n_w * n_h * n_d)

    dmu = tl.zeros([128, N0], tl.float32)
    dvar = tl.zeros([128, N0], tl.float32)
    if N1 > 0:
        dmu_tail = tl.zeros([128, N1], tl.float32)
        dvar_tail = tl.zeros([128, N1], tl.float32)
    for _ in tl.range(first, last):
        g = g_desc.load([n, d, h, w, f0]).reshape(K, N0)
        gr = product(g, r_desc.load([n, d, h, w, f0]).reshape(K, N0), PRECISION)
        if N1 > 0:
            g_tail = g_tail_desc.load([n, d, h, w, f0 + N0]).reshape(K, N1)
            gr_tail = product(g_tail, r_tail_desc.load([n, d, h, w, f0 + N0]).reshape(K, N1), PRECISION)
        x = stack(
            x_desc.load([n, d + d_0, h + h_0, w + w_0, c]).reshape(K, BC),
            x_desc.load([n, d + d_1, h + h_1, w + w_1, c]).reshape(K, BC),
            x_desc.load([n, d + d_2, h + h_2, w + w_2, c]).reshape(K, BC),
            x_desc.load([n, d + d_3, h + h_3, w + w_3, c]).reshape(K, BC),
        )
        a = operand(x, PRECISION)
        dmu = settled(tl.dot(a, operand(g, PRECISION), dmu, PRECISION))
        if N1 > 0:
            dmu_tail = settled(tl.dot(a, operand(g_tail, PRECISION), dmu_tail, PRECISION))
        a2 = product(x, x, PRECISION)
        dvar = settled(tl.dot(a2, gr, dvar, PRECISION))
        if N1 > 0:
            dvar_tail = settled(tl.dot(a2, gr_tail, dvar_tail, PRECISION))
        w += BW
        step_h = w >= W
        w = tl.where(step_h, 0, w)
        h += tl.where(step_h, BH, 0)
        step_d = h >= H
        h = tl.where(step_d, 0, h)
        d += tl.where(step_d, BD, 0)
        step_n = d >= D
        d = tl.where(step_n, 0, d)
        n += step_n.to(tl.int32)

    row = (split * 2 * PROGRAMS + program) * 128
    out_desc.store([row, f0], settled(dmu))
    out_desc.store([row + PROGRAMS * 128, f0], settled(dvar))
    if N1 > 0:
        out_tail_desc.store([row, f0 + N0], settled(dmu_tail))
        out_tail_desc.store([row + PROGRAMS * 128, f0 + N0], settled(dvar_tail))
