"""Transforms of a MONAI bundle; they are copied into it, with the modules that they import, and run without dwc.

Each takes and returns a tensor [1, D, H, W], whose metadata is kept.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dwc.data.head import head_box
from dwc.data.intensity import Scheme, scaling_of, to_uint8

__all__ = ["grey_levels", "head", "label_ids", "scaled"]


def grey_levels(image: Tensor) -> Tensor:
    """The scanner's values as 0 to 255."""
    return _by(to_uint8, image.squeeze(0).numpy(), image)


def scaled(image: Tensor, intensity: Scheme) -> Tensor:
    """Grey levels as the network's input."""
    return _by(lambda voxels: scaling_of(voxels, intensity)(voxels), _whole(image), image)


def head(image: Tensor) -> Tensor:
    """1 in the box around the head, where labels are kept, else 0."""

    def mask(voxels: np.ndarray) -> np.ndarray:
        inside = np.zeros(voxels.shape, np.float32)
        inside[head_box(voxels)] = 1
        return inside

    return _by(mask, _whole(image), image)


def label_ids(classes: Tensor, ids: list[int]) -> Tensor:
    """The label id of each class."""
    return _by(lambda voxels: np.array(ids, np.float32)[voxels], _whole(classes), classes)


def _whole(image: Tensor) -> np.ndarray:
    """The voxels, which interpolation may have left between whole numbers, as uint8."""
    return image.squeeze(0).cpu().numpy().round().astype(np.uint8)


def _by(function: Callable[[np.ndarray], np.ndarray], voxels: np.ndarray, image: Tensor) -> Tensor:
    result = image.clone().float()
    result[0] = torch.from_numpy(function(voxels).astype(np.float32))
    return result
