"""Clean up a segmentation by connected components."""

from collections import Counter

import numpy as np
from scipy import ndimage

from dwc.data.labels import LabelMap

__all__ = ["largest_components"]

_LEAST = 0.01  # of the largest part of the same class


def largest_components(labels: np.ndarray, label_map: LabelMap) -> np.ndarray:
    """Classes without islands, uint8 [D, H, W].

    First only the largest part of all structures together is kept, then of each class its largest parts, as many as the
    class has ids in the label map (two for a left and a right one) but none below 1 % of the largest. Parts hang
    together through the faces of voxels. A removed voxel takes the class of the nearest kept one, background included.
    """
    kept = _largest(labels > 0, 1) | (labels == 0)
    parts_of_class = Counter(label_map.classes)
    for klass, box in enumerate(ndimage.find_objects(labels), start=1):
        if box is not None:
            inside = (labels[box] == klass) & kept[box]
            kept[box] &= (labels[box] != klass) | _largest(inside, parts_of_class[klass])
    if kept.all():
        return labels
    nearest = ndimage.distance_transform_edt(~kept, return_distances=False, return_indices=True)
    return labels[tuple(nearest)]


def _largest(mask: np.ndarray, n: int) -> np.ndarray:
    parts, n_parts = ndimage.label(mask)
    if n_parts <= 1:
        return mask
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    chosen = np.argsort(sizes, kind="stable")[::-1][:n]
    is_kept = np.zeros(len(sizes), bool)
    is_kept[chosen] = sizes[chosen] >= _LEAST * sizes.max()
    return is_kept[parts]
