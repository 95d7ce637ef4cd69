"""The slots in shared memory through which specialized warps work together, and the warps that fill them.

One warp copies boxes of the row operand and weights, two draw noise. A slot of rows can hold the halo of several taps
along D and H, which then share one copy: a line of eight voxels has the length at which the swizzle repeats. A shift
along W is not by whole lines, so every tap along W has copies of its own.
"""

# mypy: disallow-untyped-defs=False
# Device functions have no Python types.

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from dwc_kernels.kernels.noise import normal_tile
from dwc_kernels.kernels.products import end_tap, first_tap, place
from dwc_kernels.kernels.specialized.variant import BOX, CHANNELS, COLUMNS

__all__ = [
    "BC",
    "BW",
    "NC",
    "PART",
    "M",
    "allocated",
    "barriers",
    "copier",
    "drawer",
    "noise_layout",
    "placed",
    "slot_layout",
]

BD, BH, BW = (gl.constexpr(n) for n in BOX)
BC = gl.constexpr(CHANNELS)  # of a slot of rows or weights
M = gl.constexpr(BOX[1] * BOX[2])  # rows of a plane of the tile
PART = gl.constexpr(COLUMNS)  # of a slot of noise
NC = gl.constexpr(4)  # columns for which noise is drawn at a time


@gluon.constexpr_function
def slot_layout(rank):
    """The layout of slots in shared memory, in lines of BC channels."""
    return gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=16, rank=rank)


@gluon.constexpr_function
def runs_layout():
    """The layout of runs of four rows [M / 4, NC], whose noise is drawn together, in the threads of two warps."""
    return gl.DistributedLinearLayout([], [[1, 0], [2, 0], [4, 0], [8, 0], [0, 1]], [[0, 2]], [], [M // 4, NC])


@gluon.constexpr_function
def noise_layout():
    """The layout of noise [M, NC] or more columns in shared memory: `sums_layout` reads it with few bank conflicts."""
    return gl.SwizzledSharedLayout(vec=4, per_phase=1, max_phase=NC, order=[0, 1])


@gluon.jit
def fresh(values):
    """The same integers, but so that the compiler cannot have computed with them before.

    It would compute what follows from them once for all tiles and groups of warps, and keep it on the stack.
    """
    copies = ()
    for i in gl.static_range(len(values)):
        copy = gl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [values[i]], gl.int32, is_pure=False, pack=1)
        copies = copies + (copy,)  # type: ignore[assignment]  # noqa: RUF005 (gluon knows no *)
    return copies


@gluon.jit
def reach(origin, extent: gl.constexpr, size, size_a, pad, dilation, K: gl.constexpr):
    """The taps along one dimension that connect some voxel of the tile to the volume: the first, and how many."""
    first = first_tap(origin, extent, size, pad, dilation)
    return first, gl.maximum(end_tap(origin, size_a, pad, dilation, K) - first, 0)


@gluon.jit
def placed(tile, geometry, V: gl.constexpr):
    """Where a tile starts, and the first and the number of the taps that it meets along D, H and W."""
    sizes, size, F, pads = geometry
    Da, Ha, Wa = fresh(sizes)
    D, H, W = fresh(size)
    pad_d, pad_h, pad_w = fresh(pads)
    (F,) = fresh((F,))
    sample, d0, h0, w0, f0 = place(tile, D, H, W, F, BD, BH, BW, V.wide + V.tail)
    kd, n_kd = reach(d0, BD, D, Da, pad_d, V.dilation[0], V.kernel[0])
    kh, n_kh = reach(h0, BH, H, Ha, pad_h, V.dilation[1], V.kernel[1])
    kw, n_kw = reach(w0, BW, W, Wa, pad_w, V.dilation[2], V.kernel[2])
    return (sample, d0, h0, w0, f0), (kd, kh, kw), (n_kd, n_kh, n_kw)


@gluon.jit
def barriers(SLOTS: gl.constexpr, READERS: gl.constexpr):
    """For each slot of a ring a barrier that says it is full, and one that says all its readers are done."""
    full = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(SLOTS):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=READERS)
    return full, empty


@gluon.jit
def allocated(V: gl.constexpr):
    """The slots of rows and of weights, and their barriers.

    Where there is no second row operand or no tail, the first slots stand in their place.
    """
    LINES: gl.constexpr = V.row_slots * V.planes * V.lines
    a = gl.allocate_shared_memory(gl.bfloat16, [LINES, BW, BC], slot_layout(2))
    b = a
    if V.pair:
        b = gl.allocate_shared_memory(gl.bfloat16, [LINES, BW, BC], slot_layout(2))
    mu = gl.allocate_shared_memory(gl.bfloat16, [V.weight_slots, 1, V.wide, BC], slot_layout(3))
    var = gl.allocate_shared_memory(gl.bfloat16, [V.weight_slots, 1, V.wide, BC], slot_layout(3))
    mu_tail, var_tail = mu, var
    if V.tail > 0:
        mu_tail = gl.allocate_shared_memory(gl.bfloat16, [V.weight_slots, 1, V.tail, BC], slot_layout(3))
        var_tail = gl.allocate_shared_memory(gl.bfloat16, [V.weight_slots, 1, V.tail, BC], slot_layout(3))
    row_barriers = barriers(V.row_slots, 2)
    weight_barriers = barriers(V.weight_slots, 2)
    fence_async_shared()
    return (a, b), (mu, mu_tail, var, var_tail), row_barriers, weight_barriers


@gluon.jit
def copy_rows(desc, rest_desc, slots, slot, full, n, d, h, w, c, V: gl.constexpr):
    """Start the copy of a box into a slot: of each plane eight lines, and then the rest."""
    PLANES: gl.constexpr = V.planes
    for p in range(PLANES):
        line = (slot * PLANES + p) * V.lines
        to = slots.index(line)._reinterpret(gl.bfloat16, [1, 1, BH, BW, BC], desc.layout)
        tma.async_copy_global_to_shared(desc, [n, d + p, h, w, c], full, to)
        if V.lines > BH:
            to = slots.index(line + BH)._reinterpret(gl.bfloat16, [1, 1, V.lines - BH, BW, BC], desc.layout)
            tma.async_copy_global_to_shared(rest_desc, [n, d + p, h + BH, w, c], full, to)


@gluon.jit
def copier(
    a_desc, a_rest_desc, b_desc, b_rest_desc, mu_desc, mu_tail_desc, var_desc, var_tail_desc,
    memory, geometry, n_tiles, V: gl.constexpr,
):  # fmt: skip
    """The warp that copies: for each tile what `both_products` takes, in its order."""
    rows, weights, row_barriers, weight_barriers = memory
    mu, mu_tail, var, var_tail = weights
    ROW_BYTES: gl.constexpr = (1 + V.pair) * V.planes * V.lines * BW * BC * 2
    WEIGHT_BYTES: gl.constexpr = 2 * (V.wide + V.tail) * BC * 2
    copy = 0
    step = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        corner, first, count = placed(tile, geometry, V)
        n, d0, h0, w0, f0 = corner
        pad_d, pad_h, pad_w = geometry[3]
        for kd in range(first[0], first[0] + (1 if V.share_d else count[0])):
            for kh in range(first[1], first[1] + (1 if V.share_h else count[1])):
                for kw in range(first[2], first[2] + count[2]):
                    for block in range(V.blocks):
                        d = d0 - pad_d + kd * V.dilation[0]
                        h = h0 - pad_h + kh * V.dilation[1]
                        w = w0 - pad_w + kw * V.dilation[2]
                        slot = copy % V.row_slots
                        full = row_barriers[0].index(slot)
                        mbarrier.wait(row_barriers[1].index(slot), ((copy // V.row_slots) & 1) ^ 1)
                        mbarrier.expect(full, ROW_BYTES)
                        copy_rows(a_desc, a_rest_desc, rows[0], slot, full, n, d, h, w, block * BC, V)
                        if V.pair:
                            copy_rows(b_desc, b_rest_desc, rows[1], slot, full, n, d, h, w, block * BC, V)
                        copy += 1
                        for i in range(count[0] if V.share_d else 1):
                            for j in range(count[1] if V.share_h else 1):
                                slot = step % V.weight_slots
                                full = weight_barriers[0].index(slot)
                                mbarrier.wait(weight_barriers[1].index(slot), ((step // V.weight_slots) & 1) ^ 1)
                                mbarrier.expect(full, WEIGHT_BYTES)
                                at = [((kd + i) * V.kernel[1] + kh + j) * V.kernel[2] + kw, f0, block * BC]
                                tma.async_copy_global_to_shared(mu_desc, at, full, mu.index(slot))
                                tma.async_copy_global_to_shared(var_desc, at, full, var.index(slot))
                                if V.tail > 0:
                                    at = [at[0], f0 + V.wide, block * BC]
                                    tma.async_copy_global_to_shared(mu_tail_desc, at, full, mu_tail.index(slot))
                                    tma.async_copy_global_to_shared(var_tail_desc, at, full, var_tail.index(slot))
                                step += 1


@gluon.jit
def drawer(noise, geometry, n_tiles, seed, V: gl.constexpr):
    """The warps that draw noise: for each tile what `multiplier` takes, in its order."""
    slots, full, empty = noise
    key = gl.load(seed)
    PARTS: gl.constexpr = (V.wide + V.tail) // PART
    TAIL_PARTS: gl.constexpr = V.tail // PART
    run = gl.arange(0, M // 4, gl.SliceLayout(1, runs_layout()))
    column = gl.arange(0, NC, gl.SliceLayout(0, runs_layout()))
    step = 0
    for tile in range(gl.program_id(0), n_tiles, gl.num_programs(0)):
        D, H, W = fresh(geometry[1])
        (F,) = fresh((geometry[2],))
        sample, d0, h0, w0, f0 = place(tile, D, H, W, F, BD, BH, BW, V.wide + V.tail)
        volume = D.to(gl.int64) * H * W
        for i in range(4 * PARTS):
            # The tail first; then by plane, by part, and in turn for the two groups of warps that multiply.
            j = i if i < 4 * TAIL_PARTS else i - 4 * TAIL_PARTS
            parts = TAIL_PARTS if i < 4 * TAIL_PARTS else PARTS - TAIL_PARTS
            plane = j % 2 * 2 + j // 2 // parts
            part = j // 2 % parts
            f = f0 + part * PART + (V.wide if i < 4 * TAIL_PARTS else 0)
            line = ((d0 + plane) * H + h0).to(gl.int64) * W + w0
            voxel = (run // (BW // 4) * W + run % (BW // 4) * 4).to(gl.int64) + line
            first = voxel[:, None] + (column.to(gl.int64) * volume + (sample.to(gl.int64) * F + f) * volume)[None, :]
            slot = step % V.noise_slots
            mbarrier.wait(empty.index(slot), ((step // V.noise_slots) & 1) ^ 1)
            for k in range(PART // NC):
                slots.index(slot * (PART // NC) + k).store(normal_tile(key, first, M, NC, V.aligned))
                first += NC * volume
            mbarrier.arrive(full.index(slot), count=1)
            step += 1
