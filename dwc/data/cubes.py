"""Split volumes into cubes and join them again."""

import numpy as np

from dwc.data.constants import SIDE

__all__ = ["join_volume", "split_volume"]


def split_volume(volume: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Split a volume [D, H, W] into non-overlapping cubes [n, side, side, side], in C order of their positions."""
    if volume.ndim != 3 or any(size % side for size in volume.shape):
        raise ValueError(f"a volume of shape {volume.shape} does not split into cubes of {side}")
    d, h, w = (size // side for size in volume.shape)
    cubes = volume.reshape(d, side, h, side, w, side).transpose(0, 2, 4, 1, 3, 5)
    return np.ascontiguousarray(cubes).reshape(-1, side, side, side)


def join_volume(cubes: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The inverse of `split_volume`: a volume of `shape` from cubes [n, side, side, side]."""
    side = cubes.shape[-1]
    d, h, w = (size // side for size in shape)
    return cubes.reshape(d, h, w, side, side, side).transpose(0, 3, 1, 4, 2, 5).reshape(shape)
