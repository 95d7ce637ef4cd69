"""What the kernels with specialized warps are compiled for, and the tiles with which they can run."""

import math
from dataclasses import dataclass
from functools import lru_cache

import triton

from dwc_kernels.geometry import Triple
from dwc_kernels.kernels.chips import Chip
from dwc_kernels.kernels.tiles import Problem, Tile

__all__ = ["BOX", "CHANNELS", "COLUMNS", "Variant", "candidates", "fits", "known_triton", "variant_of"]

BOX: Triple = (4, 8, 8)  # voxels of a tile
CHANNELS = 32  # of a slot of rows or weights
COLUMNS = 32  # of a slot of noise
MOST_ROW_SLOTS = 4
LINE_BYTES = BOX[2] * CHANNELS * 2
NOISE_BYTES = BOX[1] * BOX[2] * COLUMNS * 4
BARRIER_BYTES = 1024  # at most
RELEASES = {(3, 6), (3, 7)}  # of Triton that these kernels compile with; gluon is experimental and changes


@dataclass(frozen=True)
class Variant:
    """What `kernels` is compiled for."""

    pair: bool  # the row operands are g and r, as in the input gradient, and not x and x
    kernel: Triple
    dilation: Triple
    blocks: int  # of channels
    wide: int  # columns, as in `tiles.Tile`
    tail: int
    chunk: int
    share_d: bool  # the taps along D share a copy of rows
    share_h: bool  # those along H do
    planes: int  # of such a copy
    lines: int  # of each plane
    row_slots: int
    weight_slots: int
    noise_slots: int
    aligned: bool  # W is a multiple of 4
    bias: bool
    keep_r: bool


@lru_cache(maxsize=512)
def variant_of(
    problem: Problem, tile: Tile, dilation: Triple, shared: int, *, bias: bool = False, keep_r: bool = False
) -> Variant | None:
    """How a launch runs with ``shared`` bytes of memory; None if it holds less than two slots of rows.

    Taps share their copies along D and H, or along D, or not at all, as the memory allows.
    """
    pair = problem.kind == "grad_input"
    d, h, w = (n if k > 1 else 1 for n, k in zip(dilation, problem.kernel, strict=True))
    noise_slots = 0 if pair else BOX[0] * tile.columns // COLUMNS
    left = shared - BARRIER_BYTES - 4 * tile.columns * CHANNELS * tile.stages - NOISE_BYTES * noise_slots
    for share_d, share_h in ((True, True), (True, False), (False, False)):
        planes = BOX[0] + share_d * d * (problem.kernel[0] - 1)
        rest = share_h * h * (problem.kernel[1] - 1)
        row_slots = left // ((1 + pair) * planes * (BOX[1] + rest) * LINE_BYTES)
        if row_slots >= 2 and rest & (rest - 1) == 0:  # what is copied at once has a power of two of lines
            return Variant(
                pair, problem.kernel, (d, h, w), math.ceil(problem.channels / CHANNELS), tile.wide, tile.tail,
                tile.chunk, share_d, share_h, planes, BOX[1] + rest, min(row_slots, MOST_ROW_SLOTS), tile.stages,
                noise_slots, problem.size[2] % 4 == 0, bias, keep_r,
            )  # fmt: skip
    return None


def known_triton() -> bool:
    """Whether these kernels compile with the Triton that is installed."""
    return tuple(int(n) for n in triton.__version__.split(".")[:2]) in RELEASES


def candidates(problem: Problem, chip: Chip) -> list[Tile]:
    """The tiles of specialized warps for a problem; none where they cannot run."""
    if chip.arch != "sm_90" or problem.dtype != "bf16" or problem.kind == "grad_weight" or not known_triton():
        return []
    if problem.stride != (1, 1, 1) or problem.folded:
        return []
    chunk = 8 if problem.kind == "forward" else 16
    tiles = [
        Tile(BOX, CHANNELS, wide, tail, chunk, 4, 5, specialized=True) for wide, tail in ((64, 32), (64, 0), (32, 0))
    ]
    return [tile for tile in tiles if variant_of(problem, tile, (1, 1, 1), chip.shared)]


def fits(problem: Problem, tile: Tile, chip: Chip) -> bool:
    """Whether specialized warps can run a problem with such a tile."""
    return tile in candidates(problem, chip)
