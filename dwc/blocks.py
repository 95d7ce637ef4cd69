"""Divide a volume into blocks for prediction, as large as a memory limit allows, and stream each through the layers.

A network of 3x3x3 convolutions sees `sum(dilations)` voxels around each voxel, its reach.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate, chain, pairwise, product

import numpy as np
from torch import Tensor

from dwc.data.head import Region

__all__ = ["PLANES", "divide", "extent", "grow", "memory", "plan_blocks", "stream"]

PLANES = 4  # along the first axis that a layer computes at a time


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
    layers = _layers(edges, shape, dilations)[1:]
    held = sum(
        min(_held(dilation), depth + 2 * dilation) * (height + 2 * dilation) * (breadth + 2 * dilation)
        for dilation, (depth, height, breadth) in zip(dilations, layers, strict=True)
    )
    made = 3 * PLANES * max(height * breadth for _, height, breadth in layers)
    return 4 * (width * (held + made) + n_summed * math.prod(edges))


def stream(
    slabs: Iterator[Tensor], seen: Region, wanted: Region, dilation: int, layer: Callable[[Tensor], Tensor]
) -> Iterator[Tensor]:
    """A 3x3x3 layer in the region `wanted` from its input in `seen`, both a few planes at a time.

    It holds only the planes that the kernel reaches, so that memory does not grow with the first axis. `slabs` are [1,
    channels, <= PLANES, h, w]; `layer` convolves without padding. Outside of `seen` its input is zero.
    """
    before = [s.start - w.start + dilation for s, w in zip(seen, wanted, strict=True)]
    after = wanted[0].stop + dilation - seen[0].stop
    rows, columns = (slice(n, n + side.stop - side.start) for n, side in zip(before[1:], seen[1:], strict=True))
    depth, height, breadth = extent(wanted)
    planes, begin, end = None, 0, before[0]  # those from `begin` to `end` are in use
    for slab in chain(slabs, [None]):
        new = after if slab is None else slab.shape[2]
        if planes is None:
            assert slab is not None
            shape = (1, _held(dilation), height + 2 * dilation, breadth + 2 * dilation, slab.shape[1])
            planes = slab.new_zeros(shape)  # the first axis lets PyTorch see that channels are last: much faster
        if end + new > planes.shape[1]:
            for number in range(end - begin):  # one by one, since source and target overlap
                planes[:, number] = planes[:, begin + number]
            begin, end = 0, end - begin
        if slab is None:
            planes[:, end : end + new] = 0
        else:
            planes[:, end : end + new, rows, columns] = slab.movedim(1, -1)
        end += new
        while depth and end - begin >= 2 * dilation + min(PLANES, depth):
            n = min(PLANES, depth)
            yield layer(planes[:, begin : begin + 2 * dilation + n].movedim(-1, 1))
            begin, depth = begin + n, depth - n


def _held(dilation: int) -> int:
    """Planes of its input that `stream` holds."""
    return 2 * dilation + PLANES + max(PLANES, dilation)


def _layers(edges: Sequence[int], shape: Sequence[int], dilations: Sequence[int]) -> list[list[int]]:
    """The extent of the image and of each hidden layer's output that a block needs, at most."""
    reaches = [*accumulate(reversed(dilations), initial=0)][::-1]
    return [[min(edge + 2 * reach, size) for edge, size in zip(edges, shape, strict=True)] for reach in reaches]
