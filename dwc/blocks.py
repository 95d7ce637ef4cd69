"""Divide a volume into blocks for prediction, as large as a memory limit allows.

A network of 3x3x3 convolutions sees `sum(dilations)` voxels around each voxel, its reach.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise, product

import numpy as np

from dwc.data.head import Region

__all__ = ["PLANES", "divide", "extent", "grow", "memory", "plan_blocks"]

PLANES = 8  # along the first axis that a layer computes at a time


def grow(region: Region, reach: int, shape: Sequence[int]) -> Region:
    """A region extended by `reach` on each side, within the volume."""
    return tuple(slice(max(0, r.start - reach), min(n, r.stop + reach)) for r, n in zip(region, shape, strict=True))


def extent(region: Region) -> tuple[int, ...]:
    """A region's shape."""
    return tuple(side.stop - side.start for side in region)


def divide(region: Region, parts: Sequence[int]) -> list[Region]:
    """Split a region into `parts` along each axis, of nearly equal size, in C order."""
    sides = []
    for side, n in zip(region, parts, strict=True):
        edges = np.linspace(side.start, side.stop, n + 1).astype(int).tolist()
        sides.append([slice(start, stop) for start, stop in pairwise(edges)])
    return list(product(*sides))


def plan_blocks(
    region: Region, shape: Sequence[int], dilations: Sequence[int], width: int, n_summed: int, limit: float
) -> list[Region]:
    """The division of a region that computes the fewest voxels within a memory limit, or single voxels if none fits.

    `shape` is the volume's, `limit` in bytes; for several networks give the largest reach and width.
    """
    sizes = extent(region)
    choices = [sorted({-(-size // edge) for edge in range(1, size + 1)}) for size in sizes]
    best: tuple[int, ...] = sizes
    least_work = math.inf
    for parts in product(*choices):
        edges = [-(-size // n) for size, n in zip(sizes, parts, strict=True)]
        work = math.prod(parts) * sum(math.prod(layer) for layer in _layers(edges, shape, dilations)[1:])
        if work < least_work and memory(edges, shape, dilations, width, n_summed) <= limit:
            best, least_work = parts, work
    return divide(region, best)


def memory(edges: Sequence[int], shape: Sequence[int], dilations: Sequence[int], width: int, n_summed: int) -> int:
    """Peak memory of one block in fp32, in bytes: the planes that each layer holds, and the sum of probabilities.

    `edges` are the block's, `n_summed` the classes whose probabilities are summed over draws.
    """
    held = [
        min(2 * dilation + 2 * PLANES, layer[0]) * math.prod(layer[1:])
        for dilation, layer in zip(dilations, _layers(edges, shape, dilations), strict=False)
    ]
    # What a layer holds is copied once with its padding, while its output is made.
    return 4 * (width * (sum(held) + 2 * max(held)) + n_summed * math.prod(edges))


def _layers(edges: Sequence[int], shape: Sequence[int], dilations: Sequence[int]) -> list[list[int]]:
    """The extent of the image and of each hidden layer's output that a block needs, at most."""
    reaches = [*accumulate(reversed(dilations), initial=0)][::-1]
    return [[min(edge + 2 * reach, size) for edge, size in zip(edges, shape, strict=True)] for reach in reaches]
