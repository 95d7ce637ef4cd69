"""Divide a volume into blocks for prediction, as large as a memory limit allows.

A network of 3x3x3 convolutions sees `sum(dilations)` voxels around each voxel, its reach.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise, product

import numpy as np

from dwc.data.head import Region

__all__ = ["divide", "extent", "grow", "memory", "plan_blocks"]


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
    region: Region, shape: Sequence[int], dilations: Sequence[int], width: int, n_classes: int, limit: float
) -> list[Region]:
    """The division of a region that computes the fewest voxels within a memory limit, or single voxels if none fits.

    `shape` is the volume's, `limit` in bytes; for several networks give the largest reach and width.
    """
    sizes = [side.stop - side.start for side in region]
    choices = [sorted({-(-size // edge) for edge in range(1, size + 1)}) for size in sizes]
    reaches = list(accumulate(reversed(dilations), initial=0))
    best: tuple[int, ...] = tuple(sizes)
    least_work = math.inf
    for parts in product(*choices):
        edges = [-(-size // n) for size, n in zip(sizes, parts, strict=True)]
        spans = [
            math.prod(_span(edge, n, reach, reaches[-1]) for edge, n in zip(edges, shape, strict=True))
            for reach in reaches
        ]
        work = math.prod(parts) * sum(spans[:-1])
        if work < least_work and memory(spans, width, n_classes) <= limit:
            best, least_work = parts, work
    return divide(region, best)


def _span(edge: int, size: int, reach: int, farthest: int) -> int:
    """Voxels that a layer computes along an axis if `reach` of them are needed on each side of a block."""
    return edge + 2 * reach if edge + 2 * farthest < size else size


def memory(spans: Sequence[int], width: int, n_classes: int) -> int:
    """Peak memory of one block in fp32, in bytes: the sum of its probabilities, and a layer's input and output.

    `spans` are the voxels of each hidden layer's output, last layer first, and of the image.
    """
    return 4 * (
        spans[0] * n_classes + width * max(out + of for out, of in zip(spans[:-1], [*spans[1:-1], 0], strict=True))
    )
