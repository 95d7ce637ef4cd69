"""Conforming: any scan onto the network's grid, and results back onto the scan's own grid.

What `mri_convert --conform` does, on a grid of any size: the intensities become uint8 first, then the volume is
resampled about its centre to isotropic voxels in LIA orientation along the scanner's axes. Volumes are put into RAS
order first, so that results do not depend on the order in which a file stores them.
"""

import os
from dataclasses import dataclass, replace
from typing import Literal

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine, from_matvec

from dwc.base.errors import InputError
from dwc.data.grid import LIA, Grid
from dwc.data.intensity import SIGNAL, to_uint8
from dwc.data.labels import LabelMap
from dwc.data.reading import canonical_affine, load_image, load_labels, open_scan
from dwc.data.resampling import resample_image, resample_labels, tidied
from dwc.data.streams import enough_memory

__all__ = ["Placement", "conform_image", "conform_labels", "load_image", "load_labels", "place", "to_native"]

_MOST_UNLISTED = 0.25  # of the labelled voxels
_MOST_CUT = 0.05  # of the labelled voxels; less is a grid chosen small, and a warning of `check_scans`
_SPECKS = 0.002  # share of a plane that is bright for other reasons than a head
_SLAB = 16  # planes of a scan at a time
_DOWN = 1  # the grid's axis from the top of the head down
_BEYOND = 0.999  # voxels of the grid that a scan may reach beyond the last without being cut


@dataclass(frozen=True)
class Placement:
    """Where the grid lies on a scan.

    Attributes
    ----------
    positions : ndarray
        Affine from the grid's voxels to the scan's, [4, 4], the scan in RAS order.
    affine : ndarray
        From the grid's voxels to RAS mm, [4, 4].
    orientation : ndarray
        nibabel's orientation transform [3, 2] that brings the scan into RAS order.
    shape : tuple of int
        Of the scan in RAS order.
    moved_mm : float
        How far the grid has been moved off FreeSurfer's centre, so that it cuts no signal.
    cut_mm : float
        How much of the signal along the grid's axes it cuts all the same, added up.
    """

    positions: np.ndarray
    affine: np.ndarray
    orientation: np.ndarray
    shape: tuple[int, int, int]
    moved_mm: float = 0.0
    cut_mm: float = 0.0


def place(path: str | os.PathLike, grid: Grid) -> Placement:
    """Where the grid lies on a scan.

    FreeSurfer's rule: voxel size/2 of the grid is voxel shape/2 of the scan, counted in RAS order, or in LIA order if
    the scan is a cube along the scanner's axes as FreeSurfer's conformed volumes are. Along axes on which the scan has
    the grid's spacing the grid is put on the scan's voxels, so that odd sizes need no interpolation either. A grid
    that would cut signal is centred on the signal instead; where there is more of it than the grid holds, the superior
    end is kept.

    The voxels are read only if the scan reaches beyond the grid.
    """
    scan = open_scan(path)
    placement = _on_centre(scan.shape, scan.affine, grid)
    if not _excess(*_span(placement), grid).any():
        return placement
    return _on_signal(placement, in_ras_order(to_uint8(scan.read()), placement) > SIGNAL, grid)


def conform_image(path: str | os.PathLike, grid: Grid) -> np.ndarray:
    """The image on the grid, uint8 [size, size, size] in LIA orientation.

    A volume that is uint8 and on such a grid already is returned byte for byte. Any other type is first scaled to
    uint8 (`to_uint8`). Then it is interpolated linearly, zero outside the scan. An oblique scan is straightened to the
    scanner's axes. On coarser grids there is no smoothing before the interpolation, as in `mri_convert`: fine
    structure may alias.
    """
    image = load_image(path)
    with enough_memory(path):
        return image_on_grid(path, to_uint8(np.asanyarray(image.dataobj)), image.affine, grid)[0]


def conform_labels(
    path: str | os.PathLike, grid: Grid, label_map: LabelMap, image: str | os.PathLike | None = None
) -> np.ndarray:
    """The classes of a label volume on the grid, uint8 [size, size, size]; class 0 outside.

    Between voxels the class is chosen by a vote of the weights that interpolate the image.

    Ids that the label map does not list become class 0, as long as they fill no more than a quarter of the voxels that
    are not 0. If they fill more, the labels are of another kind: an image, or a segmentation whose cortex has other
    ids, as in FreeSurfer's aseg (3 and 42, two fifths of a brain). Where such ids are background on purpose, list them
    in the label map as class 0.

    Parameters
    ----------
    path : path
        Volume of label ids.
    grid, label_map : Grid, LabelMap
        Where to, and which class each id belongs to.
    image : path
        The image these labels belong to: they must lie on its voxels, and go where `conform_image` takes it.
    """
    with enough_memory(path):
        labels = load_labels(path, image)
        ids = np.asanyarray(labels.dataobj)
        classes = label_map.apply(ids)
        check_ids(path, ids, classes, label_map)
        placement = None if image is None else place(image, grid)
        return classes_on_grid(path, classes, labels.affine, grid, placement)[0]


def to_native(array: np.ndarray, path: str | os.PathLike, grid: Grid, *, order: Literal[0, 1]) -> np.ndarray:
    """Bring an array on the conformed grid back onto the scan's own voxels, of the same dtype.

    Parameters
    ----------
    array : ndarray [size, size, size]
        What was computed on `conform_image(path, grid)`.
    path : path
        The scan.
    order : int
        0 for labels, which are chosen by a vote, 1 for maps (linear). Voxels outside the conformed cube are 0.
    """
    if array.shape != grid.shape:
        raise ValueError(f"array of shape {array.shape} is not on {grid}")
    placement = place(path, grid)
    positions = tidied(np.linalg.inv(placement.positions), placement.shape)
    resample = resample_image if order else resample_labels
    native = resample(array, positions, placement.shape)
    back = nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), placement.orientation)
    return np.ascontiguousarray(nib.apply_orientation(native, back))


def image_on_grid(
    path: str | os.PathLike, data: np.ndarray, affine: np.ndarray, grid: Grid
) -> tuple[np.ndarray, Placement]:
    """A uint8 image on the grid, and where the grid lies on it."""
    placement = _on_centre(data.shape, affine, grid)
    data = in_ras_order(data, placement)
    placement = _on_signal(placement, data > SIGNAL, grid)
    data = resample_image(data, placement.positions, grid.shape)
    if data.min() == data.max():
        raise InputError(f"{path}: only the value {data.flat[0]} is left on {grid}; check the image and its affine")
    return data, placement


def classes_on_grid(
    path: str | os.PathLike, classes: np.ndarray, affine: np.ndarray, grid: Grid, placement: Placement | None
) -> tuple[np.ndarray, float]:
    """Classes on the grid where it lies on the image, or else about the labels' own centre; and the share cut off."""
    own = _on_centre(classes.shape, affine, grid)  # the labels' storage order may be another than the image's
    classes = in_ras_order(classes, own)
    placement = placement or _on_signal(own, classes > 0, grid)
    cut = _cut_voxels(classes, placement, grid) / max(int(np.count_nonzero(classes)), 1)
    if cut > _MOST_CUT:
        raise InputError(
            f"{path}: {cut:.0%} of the labelled voxels lie outside of {grid}; crop scan and labels to the head, or "
            f"choose a larger `grid_size`"
        )
    return resample_labels(classes, placement.positions, grid.shape), cut


def in_ras_order(data: np.ndarray, placement: Placement) -> np.ndarray:
    """A scan's voxels in RAS order."""
    return nib.apply_orientation(data, placement.orientation)


def check_ids(path: str | os.PathLike, ids: np.ndarray, classes: np.ndarray, label_map: LabelMap) -> float:
    """The share of the labelled voxels whose ids the label map does not list, after refusing labels of another kind."""
    if not classes.any():
        raise InputError(
            f"{path}: holds none of the ids of label map {label_map.name!r}; give `label_map` or aparc+aseg ids"
        )
    unlisted = ids[(classes == 0) & ~np.isin(ids, (0, *label_map.ids))]
    share = unlisted.size / np.count_nonzero(ids)
    if share > _MOST_UNLISTED:
        found, counts = np.unique(unlisted, return_counts=True)
        common = ", ".join(map(str, found[np.argsort(counts)[:-4:-1]]))
        raise InputError(
            f"{path}: {share:.0%} of the labelled voxels have ids that label map {label_map.name!r} does not list "
            f"({common}); give FreeSurfer aparc+aseg ids, or a `label_map` that lists them (class 0: background)"
        )
    return share


def _on_centre(shape: tuple[int, ...], affine: np.ndarray, grid: Grid) -> Placement:
    """FreeSurfer's centre, put on the scan's voxels where they have the grid's spacing."""
    orientation, affine = canonical_affine(shape, affine)
    size = np.array(shape)[np.argsort(orientation[:, 0])]
    linear = np.eye(4)
    linear[:3, :3] = np.linalg.inv(affine[:3, :3]) @ (LIA * grid.voxel_size)
    linear = tidied(linear, grid.shape)[:3, :3]
    begin = size / 2 - linear @ np.full(3, grid.size / 2)  # the grid's first voxel on the scan
    if len(set(size)) == 1 and np.allclose(np.abs(linear), np.abs(LIA.T) * np.abs(linear).max(), atol=1e-6):
        begin -= linear.sum(axis=1) < 0  # a conformed volume, whose own order is the grid's and not RAS
    for axis, row in enumerate(linear):
        if sorted(np.abs(row)) == [0, 0, 1]:  # the grid's spacing: onto the voxels
            begin[axis] = np.floor(begin[axis])
            ends = sorted((begin[axis], begin[axis] + row.sum() * (grid.size - 1)))
            if size[axis] <= grid.size:  # FreeSurfer's centre of an even size is off to one side: keep the last plane
                begin[axis] += max(size[axis] - 1 - ends[1], 0) - max(ends[0], 0)
    positions = np.eye(4)
    positions[:3, :3], positions[:3, 3] = linear, begin
    return Placement(positions, affine @ positions, orientation, (int(size[0]), int(size[1]), int(size[2])))


def _on_signal(placement: Placement, signal: np.ndarray, grid: Grid) -> Placement:
    """The grid moved where it would cut signal (bool, the scan in RAS order)."""
    if not _excess(*_span(placement), grid).any():
        return placement
    bright = _planes_with_signal(placement, signal)
    if not all(len(planes) for planes in bright):
        return placement
    first, last = _span(placement)
    low = np.maximum([planes[0] for planes in bright], first)
    high = np.minimum([planes[-1] for planes in bright], last)
    excess = _excess(low, high, grid)
    if not excess.any():
        return placement
    step = np.rint((low + high) / 2 - (grid.size - 1) / 2)
    if high[_DOWN] - low[_DOWN] > grid.size - 1:
        step[_DOWN] = min(np.floor(low[_DOWN]), 0)
    step[excess == 0] = 0
    positions = placement.positions.copy()
    positions[:3, 3] += positions[:3, :3] @ step
    moved = replace(placement, positions=positions, affine=placement.affine @ from_matvec(np.eye(3), step))
    cut = _excess(low - step, high - step, grid).sum() * grid.voxel_size
    return replace(moved, moved_mm=float(np.linalg.norm(step) * grid.voxel_size), cut_mm=float(cut))


def _planes_with_signal(placement: Placement, signal: np.ndarray) -> list[np.ndarray]:
    """The planes along each of the grid's axes, within it or not, in which more than specks is signal."""
    to_grid = np.linalg.inv(placement.positions)
    first = np.floor(_span(placement)[0]).astype(int)
    length = np.ceil(_span(placement)[1]).astype(int) + 1 - first
    counts = [np.zeros(n, int) for n in length]
    for begin in range(0, len(signal), _SLAB):
        voxels = np.argwhere(signal[begin : begin + _SLAB]) + np.array([begin, 0, 0])
        planes = np.rint(apply_affine(to_grid, voxels)).astype(int) - first
        for count, plane in zip(counts, planes.T, strict=True):
            count += np.bincount(plane, minlength=len(count))
    return [
        np.flatnonzero(count > _SPECKS * signal.size / len(count)) + begin
        for count, begin in zip(counts, first, strict=True)
    ]


def _span(placement: Placement) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest of the grid's planes along each axis that the scan reaches, within the grid or not."""
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(placement.shape) - 1.0)
    on_grid = apply_affine(np.linalg.inv(placement.positions), corners)
    return on_grid.min(axis=0), on_grid.max(axis=0)


def _excess(low: np.ndarray, high: np.ndarray, grid: Grid) -> np.ndarray:
    """How many voxels reach beyond the grid along each of its axes, [3]; less than one counts as none."""
    over = np.maximum(-low, 0) + np.maximum(high - (grid.size - 1), 0)
    return np.where(over > _BEYOND, over, 0)


def _cut_voxels(classes: np.ndarray, placement: Placement, grid: Grid) -> int:
    """Labelled voxels (of classes in RAS order) that lie beyond the grid."""
    if not _excess(*_span(placement), grid).any():
        return 0
    on_grid = apply_affine(np.linalg.inv(placement.positions), np.argwhere(classes))
    return int(((on_grid < -_BEYOND) | (on_grid > grid.size - 1 + _BEYOND)).any(axis=1).sum())
