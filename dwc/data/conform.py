"""Conforming: any scan onto the network's grid, and results back onto the scan's own grid.

What `mri_convert --conform` does, on a grid of any size: the intensities become uint8 first, then the volume is
resampled about its centre to isotropic voxels in LIA orientation along the scanner's axes. This room checks volumes as
it opens them; it keeps no files.
"""

import gzip
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import nibabel as nib
import numpy as np
from nibabel.filebasedimages import ImageFileError
from nibabel.funcs import squeeze_image
from nibabel.processing import resample_from_to
from nibabel.spatialimages import HeaderDataError

from dwc.base.errors import InputError
from dwc.data.grid import LIA, Grid
from dwc.data.labels import LabelMap

__all__ = ["conform_image", "conform_labels", "load_image", "load_labels", "to_native"]

_FORMATS = (nib.Nifti1Pair, nib.MGHImage)  # Nifti1Pair is the base of NIfTI-1 and NIfTI-2
_AFFINE_TOLERANCE = 1e-3  # mm, in any entry of an affine
_MOST_UNLISTED = 0.25  # of the labelled voxels


def load_image(path: str | os.PathLike) -> nib.spatialimages.SpatialImage:
    """Open a T1 image (NIfTI-1, NIfTI-2 or FreeSurfer's mgz) and check it.

    Returns
    -------
    image
        3-D and real-valued, its voxels in memory; a 4-D file of one volume counts as 3-D.

    Raises
    ------
    InputError
        The file is missing, not such a volume, truncated, 4-D, has no size in space, or its values are not finite or
        all the same.
    """
    image = _load(path)
    data = np.asanyarray(image.dataobj)
    if data.min() == data.max():
        raise InputError(f"{path}: every voxel is {data.flat[0]:g}; a constant volume is no image, check the file")
    return image


def load_labels(path: str | os.PathLike, image: str | os.PathLike | None = None) -> nib.spatialimages.SpatialImage:
    """Open a volume of label ids and check it; the voxels of the result are integers.

    Parameters
    ----------
    path, image : path
        The labels, and the image whose shape and affine they must have (not checked where None).

    Raises
    ------
    InputError
        As `load_image` (constant labels are allowed), or the values are not whole numbers, or the grid is another.
    """
    labels = _load(path)
    ids = np.asanyarray(labels.dataobj)
    if ids.dtype.kind == "f":
        with np.errstate(invalid="ignore"):
            whole = ids.astype(np.int32)
        if not np.array_equal(whole, ids):
            raise InputError(f"{path}: labels are not whole numbers ({ids[whole != ids][0]:g}); resample with nearest")
        labels = _in_memory(labels, whole)
    if image is not None:
        _check_same_grid(Path(path), labels, Path(image))
    return labels


def conform_image(path: str | os.PathLike, grid: Grid) -> np.ndarray:
    """The image on the grid, uint8 [size, size, size] in LIA orientation.

    A volume that is uint8 and on such a grid already is returned byte for byte. Any other type is first scaled to
    uint8: 0 is the minimum and 255 the value that 0.1 % of the non-zero voxels exceed, in a histogram of 1000 bins.
    Then it is interpolated linearly, zero outside the scan. An oblique scan is straightened to the scanner's axes.
    Going to coarser voxels this is plain linear interpolation at the new voxels' centres, without smoothing, as in
    `mri_convert`: fine structure may alias.

    Raises
    ------
    InputError
        As `load_image`; or nothing of the image is left on the grid.
    """
    image = load_image(path)
    data = _to_uint8(np.asanyarray(image.dataobj))
    if not _is_on(grid, image):
        data = _resample(data, image.affine, grid.shape, grid.affine(_centre(image)), order=1)
    if data.min() == data.max():
        raise InputError(f"{path}: only the value {data.flat[0]} is left on {grid}; check the image and its affine")
    return data


def conform_labels(
    path: str | os.PathLike, grid: Grid, label_map: LabelMap, image: str | os.PathLike | None = None
) -> np.ndarray:
    """The classes of a label volume on the grid, uint8 [size, size, size], by nearest neighbour; class 0 outside.

    Ids that the label map does not list become class 0, as long as they fill no more than a quarter of the voxels that
    are not 0. More says that the labels are of another kind: an image, or a segmentation whose cortex has other ids,
    as in FreeSurfer's aseg (3 and 42, two fifths of a brain). Where such ids are background on purpose, list them
    in the label map as class 0.

    Parameters
    ----------
    path : path
        Volume of label ids.
    grid, label_map : Grid, LabelMap
        Where to, and which class each id belongs to.
    image : path
        The image these labels belong to; they must share its grid.

    Raises
    ------
    InputError
        As `load_labels`; or no voxel has an id of a class other than 0, or too many have unlisted ids.
    """
    labels = load_labels(path, image)
    ids = np.asanyarray(labels.dataobj)
    classes = label_map.apply(ids)
    _check_ids(path, ids, classes, label_map)
    if _is_on(grid, labels):
        return classes
    return _resample(classes, labels.affine, grid.shape, grid.affine(_centre(labels)), order=0)


def to_native(array: np.ndarray, path: str | os.PathLike, grid: Grid, *, order: int) -> np.ndarray:
    """Bring an array on the conformed grid back onto the scan's own grid, of the same dtype.

    Parameters
    ----------
    array : ndarray [size, size, size]
        What was computed on `conform_image(path, grid)`.
    path : path
        The scan.
    order : int
        0 for labels (nearest), 1 for maps (linear). Voxels outside the conformed cube are 0.
    """
    if array.shape != grid.shape:
        raise ValueError(f"array of shape {array.shape} is not on {grid}")
    image = _open(path)
    if _is_on(grid, image):
        return array
    return _resample(array, grid.affine(_centre(image)), image.shape, image.affine, order)


def _open(path) -> nib.spatialimages.SpatialImage:
    """The 3-D image of a file, its header checked and its voxels not yet read."""
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; check the path")
    try:
        image = nib.load(path)
    except (ImageFileError, HeaderDataError, OSError, EOFError, zlib.error, ValueError) as error:
        raise InputError(f"{path}: not a NIfTI or mgz volume ({_line(error)}); convert it to .nii.gz") from error
    if not isinstance(image, _FORMATS):
        raise InputError(f"{path}: {type(image).__name__} is not supported; convert it to .nii.gz")
    shape = image.shape
    if len(shape) > 3 and set(shape[3:]) == {1}:
        with _reading(path):
            image = squeeze_image(image)
    if len(image.shape) != 3:
        raise InputError(f"{path}: shape {shape} is {len(shape)}-D; give one 3-D volume")
    if 0 in shape:
        raise InputError(f"{path}: shape {shape} holds no voxel; export the scan again")
    if not np.isfinite(image.affine).all() or abs(np.linalg.det(image.affine[:3, :3])) < 1e-9:
        raise InputError(f"{path}: its affine has no volume (voxel size 0 or not finite); repair the header")
    if image.get_data_dtype().kind not in "iuf":
        raise InputError(f"{path}: voxels of type {image.get_data_dtype()}; give one real number per voxel")
    return image


def _load(path) -> nib.spatialimages.SpatialImage:
    """The checked 3-D image of a file, its voxels in memory."""
    image = _open(path)
    with _reading(path):
        _check_gzip(Path(path))
        data = np.asanyarray(image.dataobj)
    if data.dtype.kind == "f" and not np.isfinite(data).all():
        count = data.size - np.count_nonzero(np.isfinite(data))
        raise InputError(f"{path}: {count} voxels are NaN or infinite; replace them, by 0 where there is no tissue")
    return _in_memory(image, data)


@contextmanager
def _reading(path) -> Iterator[None]:
    """Name the file whose voxels cannot be read."""
    try:
        yield
    except (OSError, EOFError, gzip.BadGzipFile, zlib.error, ValueError) as error:
        raise InputError(f"{path}: truncated or damaged ({_line(error)}); copy the file again") from error


def _check_gzip(path: Path) -> None:
    """Read to the end, where gzip keeps its checksum; nibabel stops at the last voxel."""
    if path.suffix in (".gz", ".mgz"):
        with gzip.open(path) as file:
            while file.read(1 << 20):
                pass


def _in_memory(image, data: np.ndarray) -> nib.Nifti1Image:
    return nib.Nifti1Image(data, image.affine, dtype=data.dtype)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_same_grid(path: Path, labels, image_path: Path) -> None:
    image = _open(image_path)
    if labels.shape != image.shape:
        what = f"shape {labels.shape} is not the image's {image.shape}"
    elif not np.allclose(labels.affine, image.affine, rtol=0, atol=_AFFINE_TOLERANCE):
        what = f"affine differs from the image's by up to {np.abs(labels.affine - image.affine).max():.3g} mm"
    else:
        return
    raise InputError(f"{path}: off the grid of {image_path}, {what}; resample the labels onto the image (nearest)")


def _check_ids(path, ids: np.ndarray, classes: np.ndarray, label_map: LabelMap) -> None:
    if not classes.any():
        raise InputError(
            f"{path}: holds none of the ids of label map {label_map.name!r}; give --label_map or aparc+aseg ids"
        )
    unlisted = ids[(classes == 0) & ~np.isin(ids, (0, *label_map.ids))]
    part = unlisted.size / np.count_nonzero(ids)
    if part > _MOST_UNLISTED:
        found, counts = np.unique(unlisted, return_counts=True)
        common = ", ".join(map(str, found[np.argsort(counts)[:-4:-1]]))
        raise InputError(
            f"{path}: {part:.0%} of the labelled voxels have ids that label map {label_map.name!r} does not list "
            f"({common}); give FreeSurfer aparc+aseg ids, or a --label_map that lists them (class 0: background)"
        )


def _is_on(grid: Grid, image) -> bool:
    linear = image.affine[:3, :3]
    return image.shape == grid.shape and np.allclose(linear, LIA * grid.voxel_size, rtol=0, atol=1e-4)


def _centre(image) -> np.ndarray:
    return (image.affine @ [*(np.array(image.shape) / 2), 1])[:3]


def _resample(data: np.ndarray, affine, to_shape, to_affine, order: int) -> np.ndarray:
    image = resample_from_to(nib.Nifti1Image(data, affine, dtype=data.dtype), (to_shape, to_affine), order=order)
    return np.asanyarray(image.dataobj)


def _to_uint8(data: np.ndarray, n_bins: int = 1000, clipped: float = 0.001) -> np.ndarray:
    """Scale to 0..255 as `mri_convert` does; uint8 stays as it is."""
    if data.dtype == np.uint8:
        return data
    low, high = float(data.min()), float(data.max())
    counts, _ = np.histogram(data, n_bins, (low, high))
    n_clipped = int(clipped * np.count_nonzero(data))
    in_last = np.cumsum([0, *counts[::-1]])  # voxels in the last 0, 1, 2, ... bins
    top = n_bins - 1 - int(np.searchsorted(in_last, n_clipped))
    high_kept = low + max(top, 1) * (high - low) / n_bins
    scaled = (data.astype(np.float32) - low) * (255 / (high_kept - low))
    return np.clip(scaled, 0, 255, out=scaled).round().astype(np.uint8)
