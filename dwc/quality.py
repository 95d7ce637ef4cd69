"""Signs that a segmentation should be looked at: measured on the scan and on its prediction, with fixed limits.

docs/quality.md has the measurement that the limits follow.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import ndimage

from dwc.data.grid import Grid
from dwc.data.head import head_mask
from dwc.data.labels import LabelMap
from dwc.prediction import Prediction

__all__ = ["LIMITS", "Limit", "flagged", "measure", "reasons", "score"]

_NEAR_MM = 6.0  # of the head: no air; of the lower edge: what the network takes for air may be brain
_BLUR = 5  # voxels over which ghosts in the air are alike, and noise averages out
_FLUID = (4, 5, 14, 15, 24, 43, 44, 72)  # FreeSurfer's ids of ventricles and cerebrospinal fluid
_WHITE = (2, 41, 77, 192, 251, 252, 253, 254, 255)
_HIND = (7, 8, 15, 16, 46, 47)  # cerebellum and brain stem
_INFERIOR, _ANTERIOR = 1, 2  # axes of the conformed grid


@dataclass(frozen=True)
class Limit:
    """A measure's value on good scans, the value from which on it is a flag, above or below, and what to say then."""

    measure: str
    typical: float
    limit: float
    reason: str

    def excess(self, value: float) -> float:
        """0 at the typical value, more than 1 beyond the limit."""
        return (value - self.typical) / (self.limit - self.typical)


LIMITS = (
    Limit("noise", 0.2, 0.35, "noise is {:.2f} of the tissue's range of intensities"),
    Limit("ghosts", 0.0, 0.035, "ghosts or other structure in the air, {:.3f} of the tissue's intensity"),
    Limit("contrast", 0.65, 0.4, "white matter is {:.2f} of the tissue's range brighter than cortex; is it a T1 scan?"),
    Limit("cut_cm2", 0.0, 80.0, "the field of view or the grid cuts {:.0f} cm2 of the head at the top or a side"),
    Limit("cut_below_cm2", 0.0, 40.0, "the field of view cuts {:.0f} cm2 of the brain from below"),
    Limit("brain_ml", 1200.0, 1650.0, "brain of {:.0f} ml without fluid, larger than most"),
    Limit("brain_ml", 1200.0, 750.0, "brain of {:.0f} ml without fluid, smaller than most"),
    Limit(
        "hind_below_mm", 48.0, 30.0, "cerebellum and brain stem are {:.0f} mm below the cerebrum; upside down or cut?"
    ),
    Limit("hind_behind_mm", 25.0, -5.0, "cerebellum and brain stem are {:.0f} mm behind the cerebrum; front to back?"),
    Limit("loose", 0.0, 0.06, "{:.0%} of the brain lies in parts of its own"),
    Limit("entropy", 0.115, 0.16, "mean entropy in the brain of {:.2f} of its largest value; the networks are unsure"),
)


def measure(image: np.ndarray, prediction: Prediction, label_map: LabelMap, grid: Grid) -> dict[str, float]:
    """The measures of `LIMITS` and the mean mutual information in the brain, as far as they exist.

    `image` is the conformed one. What needs white matter and cortex is left out where the label map has neither.
    """
    is_white, is_cortex, is_hind, is_fluid = (_of(label_map, test) for test in (_white, _cortex, _hind, _fluid))
    labels = prediction.labels
    brain = (labels > 0) & ~is_fluid[labels]
    found = {"cut_cm2": _cut(image, grid)}
    if is_white.any() and is_cortex.any():
        found["brain_ml"] = brain.sum() * grid.voxel_size**3 / 1000
        found["cut_below_cm2"] = _cut_below(image, brain, grid)
    if not brain.any():
        return _plain(found)
    low, middle, high = np.percentile(image[brain], [10, 50, 90])
    tissue_range = max(high - low, 1.0)
    found["noise"] = _roughness(image, ndimage.binary_erosion(brain)) / tissue_range
    found["ghosts"] = _ghosts(image, grid) / max(middle, 1.0)
    parts, _ = ndimage.label(brain)
    found["loose"] = 1 - np.bincount(parts.ravel())[1:].max() / brain.sum()
    found["entropy"] = prediction.entropy[brain].mean() / np.log(label_map.n_classes)  # so that networks compare
    if prediction.mutual_information is not None:
        found["mutual_information"] = prediction.mutual_information[brain].mean()
    white, cortex, hind = is_white[labels], is_cortex[labels], is_hind[labels]
    if white.any() and cortex.any():
        found["contrast"] = (np.median(image[white]) - np.median(image[cortex])) / tissue_range
        if hind.any():
            offset = (_centre(hind) - _centre(white | cortex)) * grid.voxel_size
            found["hind_below_mm"], found["hind_behind_mm"] = offset[_INFERIOR], -offset[_ANTERIOR]
    return _plain(found)


def reasons(measures: Mapping[str, float]) -> list[str]:
    """What to say of each measure that is beyond its limit."""
    return [limit.reason.format(measures[limit.measure]) for limit in _beyond(measures)]


def flagged(measures: Mapping[str, float]) -> list[str]:
    """The measures that are beyond their limits."""
    return [limit.measure for limit in _beyond(measures)]


def score(measures: Mapping[str, float]) -> float:
    """How far the worst measure is on its way to its limit; more than 1 is a flag."""
    return max(limit.excess(measures[limit.measure]) for limit in LIMITS if _has(measures, limit))


def _beyond(measures: Mapping[str, float]) -> list[Limit]:
    return [limit for limit in LIMITS if _has(measures, limit) and limit.excess(measures[limit.measure]) > 1]


def _has(measures: Mapping[str, float], limit: Limit) -> bool:
    return bool(np.isfinite(measures.get(limit.measure, np.nan)))


def _plain(found: Mapping[str, float]) -> dict[str, float]:
    return {name: round(float(value), 5) for name, value in found.items()}


def _of(label_map: LabelMap, test: Callable[[int], bool]) -> np.ndarray:
    """Whether all ids of each class but 0 pass a test, [n_classes]."""
    passed = np.ones(label_map.n_classes, bool)
    passed[0] = False
    for index, klass in zip(label_map.ids, label_map.classes, strict=True):
        passed[klass] &= test(index)
    return passed


def _white(index: int) -> bool:
    return index in _WHITE


def _cortex(index: int) -> bool:
    return index in (3, 42) or index // 1000 in (1, 2)


def _hind(index: int) -> bool:
    return index in _HIND


def _fluid(index: int) -> bool:
    return index in _FLUID


def _centre(mask: np.ndarray) -> np.ndarray:
    return np.argwhere(mask).mean(axis=0)


def _roughness(image: np.ndarray, inside: np.ndarray) -> float:
    """Median size of the second difference along each axis within a mask, averaged over the axes."""
    values = []
    for axis in range(3):
        inner = tuple(slice(1, -1) if a == axis else slice(None) for a in range(3))
        second = np.abs(np.diff(image.astype(np.int16), 2, axis))[inside[inner]]
        values.append(float(np.median(second)) if second.size else 0.0)
    return float(np.mean(values))


def _ghosts(image: np.ndarray, grid: Grid) -> float:
    """Standard deviation of the blurred image in the air around the head."""
    air = ~ndimage.binary_dilation(head_mask(image), iterations=max(1, round(_NEAR_MM / grid.voxel_size)))
    blurred = ndimage.uniform_filter(image.astype(np.float32), _BLUR)
    return float(blurred[air].std()) if air.any() else 0.0


def _cut(image: np.ndarray, grid: Grid) -> float:
    """The largest area of the head, cm^2, at an edge of the field of view, but for the lower one."""
    head, areas = head_mask(image), []
    for axis in range(3):
        first, last = _field_of_view(image, axis)
        edges = [first] if axis == _INFERIOR else [first, last]
        areas += [int(np.take(head, edge, axis).sum()) for edge in edges]
    return max(areas) * grid.voxel_size**2 / 100


def _cut_below(image: np.ndarray, brain: np.ndarray, grid: Grid) -> float:
    """The area of the brain, cm^2, close to the lower edge of the field of view."""
    _, last = _field_of_view(image, _INFERIOR)
    near = max(0, last - round(_NEAR_MM / grid.voxel_size))
    return int(np.take(brain, near, _INFERIOR).sum()) * grid.voxel_size**2 / 100


def _field_of_view(image: np.ndarray, axis: int) -> tuple[int, int]:
    """The first and last plane with values, which padding does not have."""
    others = tuple(other for other in range(3) if other != axis)
    filled = np.flatnonzero((image > 0).mean(axis=others) > 1e-3)
    return (int(filled[0]), int(filled[-1])) if len(filled) else (0, image.shape[axis] - 1)
