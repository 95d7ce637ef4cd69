"""Slices of volumes in LIA order [left, inferior, anterior] as upright pictures, shared by all pictures of scans."""

from collections.abc import Mapping

import numpy as np

__all__ = ["PLANES", "busiest", "picture_box", "slice_of"]

PLANES = ("axial", "sagittal", "coronal")


def busiest(volume: np.ndarray) -> dict[str, int]:
    """For each plane, the slice with the most voxels above zero."""
    counted = volume > 0
    over = {"sagittal": (1, 2), "axial": (0, 2), "coronal": (0, 1)}
    return {plane: int(counted.sum(axis=axes).argmax()) for plane, axes in over.items()}


def picture_box(image: np.ndarray) -> tuple[slice, ...]:
    """The bounding box of the head plus a margin."""
    head = image >= 0.2 * image.max()
    box = []
    for axis, size in enumerate(image.shape):
        profile = head.sum(axis=tuple({0, 1, 2} - {axis}))
        filled = np.flatnonzero(profile >= 0.03 * profile.max())  # ignores noise
        margin = size // 24
        box.append(slice(max(filled[0] - margin, 0), min(filled[-1] + 1 + margin, size)))
    return tuple(box)


def slice_of(volume: np.ndarray, plane: str, places: Mapping[str, int], box: tuple[slice, ...]) -> np.ndarray:
    """A plane of a volume as a picture [row from the top, column]; right is anterior, or the patient's left."""
    left, inferior, anterior = box
    place = places[plane]
    if plane == "sagittal":
        return volume[place, inferior, anterior]
    if plane == "coronal":
        return volume[left, inferior, place].T
    return volume[left, place, anterior].T[::-1]
