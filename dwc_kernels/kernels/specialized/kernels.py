"""The kernels whose warps are specialized: groups of four that multiply what `rings` brings, and finish in registers.

A program has two groups, which share the weights; each owns two planes of a tile of 4 x 8 x 8 voxels. What is computed
is said in `forward` and `grad_input`.
"""

# mypy: disallow-untyped-defs=False
# Device functions have no Python types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, warpgroup_mma, warpgroup_mma_wait

from dwc_kernels.kernels.products import deviation
from dwc_kernels.kernels.specialized.rings import (
    BC,
    BW,
    NC,
    PART,
    M,
    allocated,
    barriers,
    copier,
    drawer,
    noise_layout,
    placed,
    slot_layout,
)

__all__ = ["forward_kernel", "grad_input_kernel"]

BK = gl.constexpr(16)  # channels of one matrix instruction; its rows are M


@gluon.constexpr_function
def sums_layout(n):
    """The layout of sums [M, n] in the registers of four warps."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, n, 16])


@gluon.constexpr_function
def rows_layout(n):
    """The layout of rows [M, BK] in registers, as an operand of a product with n columns."""
    return gl.DotOperandLayout(operand_index=0, parent=sums_layout(n), k_width=2)


@gluon.jit
def loaded(slots, line, k: gl.constexpr, N: gl.constexpr):
    """M rows of BK channels from a line on, as operands."""
    plane = slots.index(line)._reinterpret(gl.bfloat16, [M, BC], slot_layout(2))
    return plane.slice(k * BK, BK, 1).load(rows_layout(N))


@gluon.jit
def multiplied(rows, line, k: gl.constexpr, weights, mean, mean_tail, var, var_tail, V: gl.constexpr):
    """Start the products of the M rows from a line on with BK channels of the weights."""
    mu, mu_tail, variance, variance_tail = weights
    a = loaded(rows[0], line, k, V.wide)
    ab = a * (loaded(rows[1], line, k, V.wide) if V.pair else a)
    mean = warpgroup_mma(a, mu.slice(k * BK, BK, 0), mean, is_async=True)
    if V.tail > 0:
        a = gl.convert_layout(a, rows_layout(V.tail), assert_trivial=True)
        mean_tail = warpgroup_mma(a, mu_tail.slice(k * BK, BK, 0), mean_tail, is_async=True)
    var = warpgroup_mma(ab, variance.slice(k * BK, BK, 0), var, is_async=True)
    if V.tail > 0:
        ab = gl.convert_layout(ab, rows_layout(V.tail), assert_trivial=True)
        var_tail = warpgroup_mma(ab, variance_tail.slice(k * BK, BK, 0), var_tail, is_async=True)
    return mean, mean_tail, var, var_tail


@gluon.jit
def columns_of(slots, slot, N: gl.constexpr):
    """The weights [BC, N] of a slot."""
    return slots.index(slot).reshape([N, BC]).permute([1, 0])


@gluon.jit
def both_products(memory, copy, step, count, plane, V: gl.constexpr):
    """The sums over taps and channels of a * mu and of a * b * sigma^2 for ``plane`` and the next, b = a if no pair."""
    rows, slots, row_barriers, weight_barriers = memory
    WIDE: gl.constexpr = V.wide
    TAIL: gl.constexpr = V.tail if V.tail > 0 else V.wide
    m0 = gl.zeros([M, WIDE], gl.float32, sums_layout(WIDE))
    v0 = gl.zeros([M, WIDE], gl.float32, sums_layout(WIDE))
    m1 = gl.zeros([M, WIDE], gl.float32, sums_layout(WIDE))
    v1 = gl.zeros([M, WIDE], gl.float32, sums_layout(WIDE))
    mt0 = gl.zeros([M, TAIL], gl.float32, sums_layout(TAIL))
    vt0 = gl.zeros([M, TAIL], gl.float32, sums_layout(TAIL))
    mt1 = gl.zeros([M, TAIL], gl.float32, sums_layout(TAIL))
    vt1 = gl.zeros([M, TAIL], gl.float32, sums_layout(TAIL))
    for _ in range((1 if V.share_d else count[0]) * (1 if V.share_h else count[1]) * count[2] * V.blocks):
        row_slot = copy % V.row_slots
        mbarrier.wait(row_barriers[0].index(row_slot), (copy // V.row_slots) & 1)
        for i in range(count[0] if V.share_d else 1):
            for j in range(count[1] if V.share_h else 1):
                slot = step % V.weight_slots
                mbarrier.wait(weight_barriers[0].index(slot), (step // V.weight_slots) & 1)
                line = (row_slot * V.planes + plane + i * V.dilation[0]) * V.lines + j * V.dilation[1]
                weights = (
                    columns_of(slots[0], slot, WIDE), columns_of(slots[1], slot, TAIL),
                    columns_of(slots[2], slot, WIDE), columns_of(slots[3], slot, TAIL),
                )  # fmt: skip
                for k in gl.static_range(BC // BK):
                    m0, mt0, v0, vt0 = multiplied(rows, line, k, weights, m0, mt0, v0, vt0, V)
                    m1, mt1, v1, vt1 = multiplied(rows, line + V.lines, k, weights, m1, mt1, v1, vt1, V)
                    # The next rows take the registers of these, so nothing may be in flight.
                    if V.tail > 0:
                        mt0, vt0, mt1, vt1, m0, v0, m1, v1 = warpgroup_mma_wait(0, [mt0, vt0, mt1, vt1, m0, v0, m1, v1])
                    else:
                        m0, v0, m1, v1 = warpgroup_mma_wait(0, [m0, v0, m1, v1])
                mbarrier.arrive(weight_barriers[1].index(slot), count=1)
                step += 1
        mbarrier.arrive(row_barriers[1].index(row_slot), count=1)
        copy += 1
    return (m0, v0), (mt0, vt0), (m1, v1), (mt1, vt1), copy, step


@gluon.jit
def halves(sums, N: gl.constexpr):
    """The first and the second half of the columns of sums [M, N]: other registers of the same threads."""
    low, high = gl.permute(gl.reshape(sums, [M, 2, N // 2]), [0, 2, 1]).split()
    LAYOUT: gl.constexpr = sums_layout(N // 2)
    return gl.convert_layout(low, LAYOUT, assert_trivial=True), gl.convert_layout(high, LAYOUT, assert_trivial=True)


@gluon.jit
def elements(plane, f, size, F, N: gl.constexpr):
    """One plane [M, N] in a tensor [samples, D, H, W, F]: its corner (int64), offsets from there, and which exist."""
    sample, d, h0, w0 = plane
    D, H, W = size
    row = gl.arange(0, M, gl.SliceLayout(1, sums_layout(N)))
    dh, dw = row // BW, row % BW
    corner = (((sample * D + d).to(gl.int64) * H + h0) * W + w0) * F
    exists = ((d < D) & (h0 + dh < H) & (w0 + dw < W))[:, None] & (f < F)[None, :]
    return corner, (dh * W + dw)[:, None] * F + f[None, :], exists


@gluon.jit
def sampled(mean, var, outputs, noise, at, plane, f0, size, F, N: gl.constexpr, V: gl.constexpr):
    """Bias, noise (its columns from ``at`` on) and stores of one plane and N filters: y and r."""
    bias_mu, bias_sigma, y, r = outputs
    f = f0 + gl.arange(0, N, gl.SliceLayout(0, sums_layout(N)))
    if V.bias:
        mean += gl.load(bias_mu + f, mask=f < F, other=0.0).to(gl.float32)[None, :]
        b_sigma = gl.load(bias_sigma + f, mask=f < F, other=0.0).to(gl.float32)
        var += (b_sigma * b_sigma)[None, :]
    eps = noise[0].index(at // NC)._reinterpret(gl.float32, [M, N], noise_layout()).load(sums_layout(N))
    std, inverse = deviation(var)
    corner, offset, exists = elements(plane, f, size, F, N)
    gl.store(y + corner + offset, (mean + std * eps).to(gl.bfloat16), mask=exists)
    if V.keep_r:
        gl.store(r + corner + offset, (0.5 * eps * inverse).to(gl.bfloat16), mask=exists)


@gluon.jit
def combined(mean, var, outputs, plane, c0, size, C, N: gl.constexpr):
    """dx = mean + 2 x * var of one plane and N channels."""
    x, dx = outputs
    c = c0 + gl.arange(0, N, gl.SliceLayout(0, sums_layout(N)))
    corner, offset, exists = elements(plane, c, size, C, N)
    value = gl.load(x + corner + offset, mask=exists, other=0.0).to(gl.float32)
    gl.store(dx + corner + offset, (mean + 2.0 * (value * var)).to(gl.bfloat16), mask=exists)


@gluon.jit
def finish(sums, outputs, noise, step, plane, f0, size, F, column, N: gl.constexpr, V: gl.constexpr):
    """Finish one plane and N columns, V.chunk of them at a time to stay within the registers.

    ``step`` says which slot has the noise of the first part, ``column`` where in a part the columns begin.
    """
    mean, var = sums
    if PART == N and not V.pair:
        mbarrier.wait(noise[1].index(step % V.noise_slots), (step // V.noise_slots) & 1)
    if V.chunk < N:
        HALF: gl.constexpr = N // 2
        mean_low, mean_high = halves(mean, N)
        var_low, var_high = halves(var, N)
        following = step + (2 * (HALF // PART) if N > PART else 0)
        beside = 0 if N > PART else column + HALF
        finish((mean_low, var_low), outputs, noise, step, plane, f0, size, F, column, HALF, V)
        finish((mean_high, var_high), outputs, noise, following, plane, f0 + HALF, size, F, beside, HALF, V)
    elif V.pair:
        combined(mean, var, outputs, plane, f0, size, F, N)
    else:
        at = step % V.noise_slots * PART + column
        sampled(mean, var, outputs, noise, at, plane, f0, size, F, N, V)
    if PART == N and not V.pair:
        mbarrier.arrive(noise[2].index(step % V.noise_slots), count=1)


@gluon.jit
def multiplier(memory, noise, geometry, n_tiles, outputs, GROUP: gl.constexpr, V: gl.constexpr):
    """Four warps that multiply: two planes of each tile, from the slots to the outputs."""
    copy = 0
    step = 0
    draws = GROUP
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        corner, _, count = placed(tile, geometry, V)
        first, first_tail, second, second_tail, copy, step = both_products(memory, copy, step, count, 2 * GROUP, V)
        sample, d0, h0, w0, f0 = corner
        _, size, F, _ = geometry
        d = d0 + 2 * GROUP
        if V.tail > 0:
            finish(first_tail, outputs, noise, draws, (sample, d, h0, w0), f0 + V.wide, size, F, 0, V.tail, V)
            draws += 2 * (V.tail // PART)
            finish(second_tail, outputs, noise, draws, (sample, d + 1, h0, w0), f0 + V.wide, size, F, 0, V.tail, V)
            draws += 2 * (V.tail // PART)
        finish(first, outputs, noise, draws, (sample, d, h0, w0), f0, size, F, 0, V.wide, V)
        draws += 2 * (V.wide // PART)
        finish(second, outputs, noise, draws, (sample, d + 1, h0, w0), f0, size, F, 0, V.wide, V)
        draws += 2 * (V.wide // PART)


SIZES = ["n_tiles", "Da", "Ha", "Wa", "D", "H", "W", "pad_d", "pad_h", "pad_w"]


@gluon.jit(do_not_specialize=SIZES)
def forward_kernel(
    x_desc, x_rest_desc,  # [N, Da, Ha, Wa, C]: the first eight lines of a plane of a slot, and the rest if any
    mu_desc, mu_tail_desc, var_desc, var_tail_desc,  # [taps, F, C], blocks of V.wide and of V.tail filters
    bias_mu, bias_sigma,  # [F]; anything if not V.bias
    y, r,  # [N, D, H, W, F]; r is anything if not V.keep_r
    seed,  # int64 scalar in memory
    n_tiles, Da, Ha, Wa, D, H, W, F, pad_d, pad_h, pad_w,
    V: gl.constexpr,  # a `specialized.Variant`
):  # fmt: skip
    """The programs share the tiles: tile i is that of program i modulo their number."""
    memory = allocated(V)
    geometry = ((Da, Ha, Wa), (D, H, W), F, (pad_d, pad_h, pad_w))
    slots = gl.allocate_shared_memory(gl.float32, [V.noise_slots * (PART // NC), M, NC], noise_layout())
    full, empty = barriers(V.noise_slots, 1)
    noise = (slots, full, empty)
    outputs = (bias_mu, bias_sigma, y, r)
    gl.warp_specialize([
        (multiplier, (memory, noise, geometry, n_tiles, outputs, 0, V)),
        (multiplier, (memory, noise, geometry, n_tiles, outputs, 1, V)),
        (copier, (
            x_desc, x_rest_desc, None, None, mu_desc, mu_tail_desc, var_desc, var_tail_desc,
            memory, geometry, n_tiles, V,
        )),
        (drawer, (noise, geometry, n_tiles, seed, V)),
    ], [4, 1, 2], [240, 24, 24])  # fmt: skip


@gluon.jit(do_not_specialize=SIZES)
def grad_input_kernel(
    g_desc, g_rest_desc, r_desc, r_rest_desc,  # [N, Da, Ha, Wa, F]
    mu_desc, mu_tail_desc, var_desc, var_tail_desc,  # [taps mirrored, C, F], blocks of V.wide and of V.tail channels
    x, dx,  # [N, D, H, W, C]
    n_tiles, Da, Ha, Wa, D, H, W, C, pad_d, pad_h, pad_w,
    V: gl.constexpr,  # a `specialized.Variant`
):  # fmt: skip
    """The same for the input gradient, whose sum is over filters."""
    memory = allocated(V)
    geometry = ((Da, Ha, Wa), (D, H, W), C, (pad_d, pad_h, pad_w))
    gl.warp_specialize([
        (multiplier, (memory, None, geometry, n_tiles, (x, dx), 0, V)),
        (multiplier, (memory, None, geometry, n_tiles, (x, dx), 1, V)),
        (copier, (
            g_desc, g_rest_desc, r_desc, r_rest_desc, mu_desc, mu_tail_desc, var_desc, var_tail_desc,
            memory, geometry, n_tiles, V,
        )),
    ], [4, 1], [240, 24])  # fmt: skip
