"""Standard normal noise inside a kernel: the device function whose PyTorch twin is `dwc_kernels/noise.py`.

Element ``i`` of the output, counted in logical NCDHW order, is lane ``i % 4`` of group ``i // 4``; Philox-4x32 with 7
rounds turns (seed, group) into four words, and two Box-Muller pairs turn the words into four normals. The rows of a
tile are runs along W, so four rows share a group and one Philox block serves them all. Where W is no multiple of 4 the
runs straddle two groups and both are computed: the noise of an element never depends on the tile it falls in.
"""

# mypy: disallow-untyped-defs=False
# Device functions have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwc_kernels.kernels.launch import run_on

__all__ = ["normal", "normal_tile"]


@triton.jit
def box_muller(radius_word, angle_word):
    """Two normals from two words: u in (0, 1] gives the radius, a signed fraction of a turn the angle.

    Sine and cosine are minimax polynomials on the eighth of a turn around the nearest quarter (within 2e-9 before
    rounding). The reduction is exact, so there is none of the slow path and stack frame of the library's cosine.
    """
    u = radius_word.to(tl.float32) * 2.0**-32 + 2.0**-33
    radius = tl.sqrt(-2.0 * tl.log(u))
    turn = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    quarter = tl.floor(4.0 * turn + 0.5)
    t = turn - 0.25 * quarter
    s = t * t
    sin = t * (((-75.26482907 * s + 81.58885228) * s - 41.34163442) * s + 6.283185236)
    cos = (((59.2204073 * s - 85.44285212) * s + 64.93931621) * s - 19.73920865) * s + 1.0
    quadrant = quarter.to(tl.int32)
    odd = (quadrant & 1) == 1
    # cos and sin at the quarter turns: (1, 0), (0, 1), (-1, 0), (0, -1).
    z0 = radius * tl.where(odd, sin, cos)
    z1 = radius * tl.where(odd, cos, sin)
    return tl.where(((quadrant + 1) & 2) == 2, -z0, z0), tl.where((quadrant & 2) == 2, -z1, z1)


@triton.jit
def four_normals(seed, group):
    """The four lanes of each group (int64)."""
    zero = group.to(tl.uint32) * 0  # no `zeros_like`, which gluon lacks
    c0, c1, c2, c3 = tl.philox(seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), zero, zero, n_rounds=7)
    z0, z1 = box_muller(c0, c1)
    z2, z3 = box_muller(c2, c3)
    return z0, z1, z2, z3


@triton.jit
def pick(z, lane):
    """z[lane] for lane 0..3, of four tensors."""
    return tl.where(lane < 2, tl.where(lane == 0, z[0], z[1]), tl.where(lane == 2, z[2], z[3]))


@triton.jit
def normal_tile(
    seed,  # int64 scalar
    run,  # [M / 4, N] int64: the linear index of the first of four elements that follow each other along W
    M: tl.constexpr,
    N: tl.constexpr,
    ALIGNED: tl.constexpr,  # every run starts a group
):
    """Noise [M, N] for a tile whose rows are, four by four, the elements of the runs."""
    z = four_normals(seed, run >> 2)
    if not ALIGNED:
        following = four_normals(seed, (run >> 2) + 1)
        lane = (run & 3).to(tl.int32)
        z = (
            pick(z, lane),
            tl.where(lane < 3, pick(z, lane + 1), following[0]),
            tl.where(lane < 2, pick(z, lane + 2), tl.where(lane == 2, following[0], following[1])),
            tl.where(lane == 0, z[3], pick((following[0], following[0], following[1], following[2]), lane)),
        )
    lanes = tl.join(tl.join(z[0], z[2]), tl.join(z[1], z[3]))  # [M / 4, N, 2, 2]: lane = 2 * third + fourth
    return tl.reshape(tl.permute(lanes, (0, 2, 3, 1)), [M, N])


@triton.jit(do_not_specialize=["C", "V"])
def normal_kernel(
    out,  # [N, C, V] or, channels last, [N, V, C]
    seed,  # int64 scalar in memory
    size,  # elements
    C, V,
    CHANNELS_LAST: tl.constexpr,
    GROUPS: tl.constexpr,  # per program
):  # fmt: skip
    """One program: the noise of GROUPS groups of four elements."""
    group = tl.program_id(0).to(tl.int64) * GROUPS + tl.arange(0, GROUPS)
    z = four_normals(tl.load(seed), group)
    for lane in tl.static_range(4):
        i = group * 4 + lane
        at = i
        if CHANNELS_LAST:
            at = (i // V // C * V + i % V) * C + i // V % C
        tl.store(out + at, z[lane], mask=i < size)


def normal(like: Tensor, seed: Tensor) -> Tensor:
    """Draw N(0, 1) in fp32 for every element of a tensor, in one launch and without waiting for the seed.

    The same numbers as `dwc_kernels.noise.normal`, up to the rounding of sine, cosine and logarithm; ``seed`` is an
    int64 scalar on the device of ``like``.
    """
    eps = torch.empty_like(like, dtype=torch.float32)
    last = like.dim() == 5 and eps.is_contiguous(memory_format=torch.channels_last_3d)
    dense = eps if last or eps.is_contiguous() else torch.empty(like.shape, dtype=torch.float32, device=like.device)
    channels, voxels = (like.shape[1], like.shape[2:].numel()) if last else (1, 1)
    size, groups = dense.numel(), 256
    if size:
        run_on(
            like.device, normal_kernel, triton.cdiv(size, 4 * groups), dense, seed, size, channels, voxels, last, groups
        )
    return dense if dense is eps else eps.copy_(dense)
