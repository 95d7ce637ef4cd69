"""Resampling: images by linear interpolation, labels by a vote of the same linear weights.

Both are given the positions of the new voxels in the old volume as one affine, so that what lies on the same lattice is
copied and never interpolated. Which lattice a scan goes to is decided in `conform`.
"""

import numpy as np
from scipy import ndimage

__all__ = ["resample_image", "resample_labels", "tidied"]

_HEADER_ROUNDING = 0.03  # of a voxel
_SLAB = 16  # planes of labels at a time
_DECIMALS = 4  # of positions that labels are voted on: half-way is half-way whatever the rounding errors


def tidied(positions: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """An affine [4, 4] whose rows are whole numbers where only a header's rounding errors keep them from it.

    A row is rounded if that moves no voxel of a volume of `shape` by more than 0.03 voxels. So voxels that fall on
    voxels do so exactly.
    """
    rounded = np.rint(positions)
    moved = np.abs(rounded - positions) @ [*shape, 1.0]
    return np.where((moved <= _HEADER_ROUNDING)[:, None], rounded, positions)


def resample_image(data: np.ndarray, positions: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Values at new voxels, linear between the old ones, 0 outside; of the same dtype.

    Parameters
    ----------
    data : ndarray
        3-D.
    positions : ndarray
        Affine from the new voxels' indices to those of `data`, [4, 4].
    shape : tuple of int
        Of the result.
    """
    if _is_a_copy(positions):
        return _gathered(data, _indices(positions, shape))
    linear, offset = positions[:3, :3], positions[:3, 3]
    return ndimage.affine_transform(data, linear, offset, shape, order=1, mode="constant", cval=0)


def resample_labels(data: np.ndarray, positions: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """Labels at new voxels, 0 outside: of the eight old voxels around, the label whose linear weights add up to most.

    Equal votes go to the nearest voxel's label, and half-way to the one of even index: so no side and no label gains.
    Parameters are as in `resample_image`.
    """
    if _is_a_copy(positions):
        return _gathered(data, _indices(positions, shape))
    result = np.empty(shape, data.dtype)
    for begin in range(0, shape[0], _SLAB):
        slab = (min(_SLAB, shape[0] - begin), *shape[1:])
        there = positions.copy()
        there[:3, 3] += positions[:3, 0] * begin
        result[begin : begin + slab[0]] = _vote(data, [axis.round(_DECIMALS) for axis in _indices(there, slab)], slab)
    return result


def _vote(data: np.ndarray, axes: list[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
    lower = [np.floor(axis) for axis in axes]
    shares = [axis - low for axis, low in zip(axes, lower, strict=True)]  # of the upper neighbour
    nearest = _gathered(data, [np.rint(axis) for axis in axes])
    corners = list(np.ndindex(2, 2, 2))
    around = [_gathered(data, [low + up for low, up in zip(lower, corner, strict=True)]) for corner in corners]
    inside = np.ones(shape, bool)
    for axis, size in zip(axes, data.shape, strict=True):
        inside &= (axis >= 0) & (axis <= size - 1)
    mixed = np.zeros(shape, bool)
    for labels in around:
        mixed |= labels != nearest
    mixed &= inside
    result = np.broadcast_to(nearest, shape) * inside
    if not mixed.any():
        return result
    votes = [np.broadcast_to(labels, shape)[mixed] for labels in around]
    weights = []
    for corner in corners:
        each = [share if up else 1 - share for share, up in zip(shares, corner, strict=True)]
        weights.append(np.broadcast_to(each[0] * each[1] * each[2], shape)[mixed])
    winner = np.broadcast_to(nearest, shape)[mixed]
    most = _sum_of(winner, votes, weights) + 1e-6  # the nearest wins where all else is equal
    for labels in votes:
        score = _sum_of(labels, votes, weights)
        wins = score > most
        winner[wins], most[wins] = labels[wins], score[wins] + 1e-9
    result[mixed] = winner
    return result


def _sum_of(labels: np.ndarray, votes: list[np.ndarray], weights: list[np.ndarray]) -> np.ndarray:
    """The weights of all corners that hold these labels, added up."""
    total = np.zeros(labels.shape)
    for vote, weight in zip(votes, weights, strict=True):
        total += weight * (vote == labels)
    return total


def _is_a_copy(positions: np.ndarray) -> bool:
    """Whether new voxels fall on old ones: an affine of whole numbers."""
    return bool((positions == np.rint(positions)).all())


def _indices(positions: np.ndarray, shape: tuple[int, ...]) -> list[np.ndarray]:
    """Positions along each old axis, no larger than they must be to broadcast to `shape`."""
    steps = np.ogrid[tuple(slice(size) for size in shape)]
    axes = []
    for *factors, begin in positions[:3]:
        axis = np.full((1, 1, 1), begin)
        for factor, step in zip(factors, steps, strict=True):
            if factor:
                axis = axis + factor * step
        axes.append(axis)
    return axes


def _gathered(data: np.ndarray, axes: list[np.ndarray]) -> np.ndarray:
    """Voxels at whole positions, 0 outside."""
    inside = np.ones((1, 1, 1), bool)
    places = []
    for axis, size in zip(axes, data.shape, strict=True):
        inside = inside & (axis >= 0) & (axis < size)
        places.append(np.clip(axis, 0, size - 1).astype(np.intp))
    return np.where(inside, data[tuple(places)], data.dtype.type(0))
