"""The intensity scheme: what a network takes in."""

import numpy as np

__all__ = ["moments", "z_score"]


def moments(image: np.ndarray) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation over all voxels of an image, summed in float64."""
    return np.float32(image.mean(dtype=np.float64)), np.float32(image.std(dtype=np.float64))


def z_score(voxels: np.ndarray, mean: np.float32, sd: np.float32) -> np.ndarray:
    """(voxels - mean) / sd, computed in float32: what a network takes in, with the `moments` of the whole volume."""
    return (voxels.astype(np.float32) - np.float32(mean)) / np.float32(sd)
