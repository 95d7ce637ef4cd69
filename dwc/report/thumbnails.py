"""One picture of a segmented scan: contours of its classes above its uncertainty, in three planes."""

import io

import matplotlib.image
import numpy as np
import torch
from matplotlib import colormaps
from torch import Tensor
from torch.nn.functional import interpolate

from dwc.report.slices import PLANES, busiest, picture_box, slice_of
from dwc.report.volumes import Volumes

__all__ = ["PANEL", "thumbnail"]

PANEL = (240, 210)  # rows and columns
_LINE = 0.9  # share of a contour's colour over the scan
_DIMMED = 0.75  # the scan under contours, which bright tissue would hide
_QUALITY = 82


def thumbnail(volumes: Volumes, most_uncertain: float) -> bytes:
    """A WebP of two rows (one without a map) of panels: axial, sagittal, coronal.

    Each is the slice with the most labelled voxels. The patient's left is right; anterior is right in the sagittal
    plane. Uncertainty is bright from 0 to `most_uncertain`.
    """
    shown = volumes.classes if volumes.classes.any() else volumes.image
    places, box = busiest(shown), picture_box(volumes.image)
    palette = np.array([klass.rgb for klass in volumes.klasses], np.float32) / 255
    rows: list[list[np.ndarray]] = [[], []]
    for plane in PLANES:
        spacing = _spacing(plane, volumes.spacing)
        grey = _fitted(slice_of(volumes.image, plane, places, box) / 255, spacing)
        classes = _fitted_classes(slice_of(volumes.classes, plane, places, box), spacing)
        rows[0].append(_framed(_with_contours(grey, classes, palette)))
        if volumes.uncertainty is not None:
            values = slice_of(volumes.uncertainty, plane, places, box) * volumes.slope
            share = _fitted(values / max(most_uncertain, 1e-9), spacing)
            rows[1].append(_framed(_with_heat(grey, share)))
    picture = np.concatenate([np.concatenate(row, axis=1) for row in rows if row])
    content = io.BytesIO()
    matplotlib.image.imsave(content, (255 * picture).round().astype(np.uint8), format="webp",
                            pil_kwargs={"quality": _QUALITY, "method": 4})  # fmt: skip
    return content.getvalue()


def _spacing(plane: str, spacing: np.ndarray) -> tuple[float, float]:
    """Edges of a slice's voxels in mm, along rows and columns."""
    left, inferior, anterior = spacing.tolist()
    return {"axial": (anterior, left), "sagittal": (inferior, anterior), "coronal": (inferior, left)}[plane]


def _size(shape: tuple[int, ...], spacing: tuple[float, float]) -> tuple[int, int]:
    """The size at which a slice fills a panel as far as its proportions allow."""
    edges = [n * mm for n, mm in zip(shape, spacing, strict=True)]
    scale = min(most / edge for most, edge in zip(PANEL, edges, strict=True))
    return max(1, round(scale * edges[0])), max(1, round(scale * edges[1]))


def _fitted(values: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    fitted = _resized(torch.from_numpy(np.ascontiguousarray(values, np.float32))[None], _size(values.shape, spacing))
    return fitted[0].clamp(0, 1).numpy()


def _fitted_classes(classes: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """The class that is strongest after linear interpolation, so that borders are smooth at any voxel size."""
    present = np.unique(classes)
    masks = torch.from_numpy((classes == present[:, None, None]).astype(np.float32))
    return present[_resized(masks, _size(classes.shape, spacing)).argmax(dim=0).numpy()]


def _resized(stack: Tensor, size: tuple[int, int]) -> Tensor:
    return interpolate(stack[None], size=size, mode="bilinear", antialias=True)[0]


def _with_contours(grey: np.ndarray, classes: np.ndarray, palette: np.ndarray) -> np.ndarray:
    """A line inside the border of each class."""
    padded = np.pad(classes, 1, mode="edge")
    around = (padded[:-2, 1:-1], padded[2:, 1:-1], padded[1:-1, :-2], padded[1:-1, 2:])
    border = (classes > 0) & np.any([classes != other for other in around], axis=0)
    picture = np.repeat(_DIMMED * grey[..., None], 3, axis=2)
    picture[border] = (1 - _LINE) * picture[border] + _LINE * palette[classes[border]]
    return picture


def _with_heat(grey: np.ndarray, share: np.ndarray) -> np.ndarray:
    heat = colormaps["inferno"](share)[..., :3]
    weight = np.clip(2 * share, 0, 1)[..., None]
    return (1 - weight) * 0.6 * grey[..., None] + weight * heat


def _framed(picture: np.ndarray) -> np.ndarray:
    """The picture in the middle of a black panel."""
    panel = np.zeros((*PANEL, 3), np.float32)
    top, left = ((most - n) // 2 for most, n in zip(PANEL, picture.shape[:2], strict=True))
    panel[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return panel
