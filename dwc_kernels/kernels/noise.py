"""Standard normal noise inside a kernel: the device function whose PyTorch twin is ``dwc_kernels/noise.py``.

Element ``i`` of the output, counted in logical NCDHW order, is lane ``i % 4`` of group ``i // 4``; Philox-4x32 with 7 rounds
turns (seed, group) into four words, and two Box-Muller pairs turn the words into four normals. The rows of a tile are runs
along W, so four rows share a group and one Philox block serves them all. Where W is no multiple of 4 the runs straddle two
groups and both are computed: the noise of an element never depends on the tile it falls in.
"""

import triton
import triton.language as tl

__all__ = ["normal_tile"]


@triton.jit
def box_muller(radius_word, angle_word):
    """Two normals from two words: u in (0, 1] gives the radius, a signed fraction of a turn the angle.

    Sine and cosine come from minimax polynomials at the half angle, |pi t| <= pi/2 (within 5e-9 before rounding): no range
    reduction, hence none of the slow path and stack frame that the library's cosine brings.
    """
    u = radius_word.to(tl.float32) * 2.0**-32 + 2.0**-33
    radius = tl.sqrt(-2.0 * tl.log(u))
    t = angle_word.to(tl.int32, bitcast=True).to(tl.float32) * 2.0**-32
    s = t * t
    sin = (((0.07730874208 * s - 0.598097988) * s + 2.550042129) * s - 5.167707727) * s + 3.1415926
    cos = ((((-0.02439671661 * s + 0.234937559) * s - 1.335212057) * s + 4.058709164) * s - 4.934802137) * s + 1.0
    sin = sin * t
    return radius * (1.0 - 2.0 * sin * sin), radius * (2.0 * sin * cos)


@triton.jit
def four_normals(seed, group):
    """The four lanes of each group (int64)."""
    zero = tl.zeros_like(group).to(tl.uint32)
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
