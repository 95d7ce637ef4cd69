"""Scans as files: NIfTI-1, NIfTI-2 and FreeSurfer's mgh and mgz, plain or compressed.

What a header claims is compared with limits and with the file before anything is allocated, and no more of a stream is
read than the volume needs. nibabel interprets the header; the bytes are read here.
"""

import io
import logging
import os
from dataclasses import dataclass
from itertools import permutations
from math import prod
from pathlib import Path
from typing import TypeAlias

import nibabel as nib
import numpy as np
from nibabel.freesurfer.mghformat import MGHHeader
from nibabel.volumeutils import apply_read_scaling

from dwc.base.errors import InputError
from dwc.data.paths import existing_file
from dwc.data.streams import BZIP2, GZIP, PAIR, check_the_end, enough_memory, exactly, partner, reading, skip, unpacked

__all__ = ["ScanFile", "canonical_affine", "load_image", "load_labels", "open_scan", "varying"]

Header: TypeAlias = nib.Nifti1Header | MGHHeader

_MOST_VOXELS = 640**3
_MOST_HEADER = 1 << 26  # bytes before the voxels, extensions included
_BEST_COMPRESSION = 1100  # deflate cannot pack better than 1032 : 1
_MOST_HEADER_FIELDS = 544  # bytes of the longest header, NIfTI-2's
_VOXEL_MM = (0.05, 25.0)
_EXTENT_MM = (10.0, 550.0)  # of the longest edge
_FARTHEST_MM = 1e5  # of the first voxel from the origin
_UNITS = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # mm of a unit, by its code in xyzt_units; 0 says nothing: mm
_ROUNDING = 0.02  # label values this close to a whole number are that number
_SAME_GRID = 0.01  # of a voxel
_DIRECTION_DECIMALS = 5  # float32 headers
_SLAB = 16  # planes of labels at a time
_QUATERNION_ROUNDING = 1e-3  # of the squared length of (b, c, d) above 1
_POINTERS = {
    b"version https://git-lfs": "is a git-LFS pointer, not the scan; fetch it with `git lfs pull`",
    b"/annex/objects/": "is a git-annex pointer, not the scan; fetch it with `datalad get` or `git annex get`",
}
_SILENT = logging.getLogger("dwc.nifti")
_SILENT.addHandler(logging.NullHandler())  # nibabel mends small faults of headers and would print each
_SILENT.propagate = False


@dataclass(frozen=True, eq=False)
class ScanFile:
    """A scan whose header has been checked and whose voxels have not yet been read.

    Attributes
    ----------
    path : Path
        The file that was named.
    header
        nibabel's header; a quaternion that rounding made too long is shortened.
    shape : tuple of int
        Voxels along the three axes.
    affine : ndarray
        Voxel to RAS in mm, [4, 4], whatever the header's unit is.
    """

    path: Path
    header: Header
    shape: tuple[int, int, int]
    affine: np.ndarray
    _data_path: Path
    _offset: int

    @property
    def voxel_sizes(self) -> np.ndarray:
        """Edges of a voxel in mm, [3]."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    @property
    def scaling(self) -> tuple[float, float]:
        """Slope and intercept of the header; 1 and 0 where it has none."""
        slope, inter = self.header.get_slope_inter() if isinstance(self.header, nib.Nifti1Header) else (None, None)
        return (1.0 if slope is None else slope), (0.0 if inter is None else inter)

    def read(self) -> np.ndarray:
        """The values, scaled as the header says; all are finite."""
        dtype = self.header.get_data_dtype()
        n_bytes = prod(self.shape) * dtype.itemsize
        with reading(self.path), unpacked(self._data_path) as stream:
            skip(stream, self._offset)
            buffer = exactly(stream, n_bytes)
            if not isinstance(stream, io.BufferedReader):
                check_the_end(stream, self._data_path)
            stored = np.ndarray(self.shape, dtype, buffer, order="F").astype(dtype.newbyteorder("="), copy=False)
            slope, inter = (np.float64(value) for value in self.scaling)
            with np.errstate(all="ignore"):
                values = apply_read_scaling(stored, slope, inter)
                if values.dtype.itemsize > 8:  # float128, which no other part reads
                    values = values.astype(np.float64)
            if values.dtype.kind == "f" and not (finite := np.isfinite(values)).all():
                count = values.size - np.count_nonzero(finite)
                scaled = "" if (slope, inter) == (1, 0) else f" (scl_slope {slope:g}, scl_inter {inter:g})"
                raise InputError(
                    f"{self.path}: {count} voxels are NaN or infinite{scaled}; replace them, by 0 where there is no "
                    f"tissue"
                )
        return values


def open_scan(path: str | os.PathLike) -> ScanFile:
    """Check the header of a NIfTI-1, NIfTI-2, mgh or mgz file; the voxels are read later, by `ScanFile.read`.

    A 4-D file of one volume counts as 3-D. Headers in metres or micrometres are converted to mm.
    """
    path = existing_file(path)
    named = PAIR.fullmatch(path.name)
    with reading(path):
        header_path = partner(path, ".hdr") if named and named[2].lower() == ".img" else path
    with reading(path), unpacked(header_path) as stream:
        header, offset, in_pair = _header(stream.read(_MOST_HEADER_FIELDS), path)
        shape = _shape(header, path)
        dtype = header.get_data_dtype()
        if dtype.kind not in "iuf":
            raise InputError(f"{path}: voxels of type {dtype}; give one real number per voxel")
        affine = _affine(header, path)
    _check_geometry(path, shape, affine)
    if in_pair and not named:
        raise InputError(
            f"{path}: its header says that the voxels are in an .img file beside it (magic ni1 or ni2); name it .hdr, "
            f"or convert the pair to .nii.gz"
        )
    with reading(path):
        data_path = partner(header_path, ".img") if in_pair else header_path
        _check_claim(path, data_path, offset, prod(shape) * dtype.itemsize)
    return ScanFile(path, header, shape, affine, data_path, offset)


def load_image(path: str | os.PathLike) -> nib.Nifti1Image:
    """Open a T1 image and check it; the voxels of the result are in memory, its affine is in mm."""
    scan = open_scan(path)
    data = varying(path, scan.read())
    return nib.Nifti1Image(data, scan.affine, dtype=data.dtype)


def varying(path: str | os.PathLike, data: np.ndarray) -> np.ndarray:
    """The voxels of an image, unless they are all the same."""
    if data.min() == data.max():
        raise InputError(f"{path}: every voxel is {data.flat[0]:g}; a constant volume is no image, check the file")
    return data


def load_labels(path: str | os.PathLike, image: str | os.PathLike | None = None) -> nib.Nifti1Image:
    """Open a volume of label ids and check it; the voxels of the result are integers.

    Values within 0.02 of a whole number, as headers with a slope give them, are that number.

    Parameters
    ----------
    path, image : path
        The labels, and the image whose voxels they must lie on, in any storage order (not checked where None).
    """
    scan = open_scan(path)
    with enough_memory(path):
        ids = _whole_numbers(scan, scan.read())
    if ids.dtype == np.int8 and ids.min() < 0:
        raise InputError(
            f"{path}: label ids in 8 bits, some below 0 ({ids.min()}); they were cut to that type, save them as int16"
        )
    if image is not None:
        _check_same_grid(scan, open_scan(image))
    return nib.Nifti1Image(ids, scan.affine, dtype=ids.dtype)


def canonical_affine(shape: tuple[int, ...], affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What brings a volume into RAS order: nibabel's orientation transform [3, 2], and the affine afterwards [4, 4]."""
    orientation = _orientation(affine)
    return orientation, affine @ nib.orientations.inv_ornt_aff(orientation, shape)


def _orientation(affine: np.ndarray) -> np.ndarray:
    """Which axis of RAS each of a volume's axes is nearest to, and its sign.

    `nib.io_orientation` takes the axes in storage order, which decides where one lies half-way between two of RAS. Here
    the set of axes does.
    """
    left, _, right = np.linalg.svd(affine[:3, :3] / np.linalg.norm(affine[:3, :3], axis=0))
    directions = (left @ right).T

    def without_sign(axis: int) -> list[float]:
        direction = directions[axis].round(_DIRECTION_DECIMALS)
        return list(direction * np.sign(direction[np.flatnonzero(direction)[0]]))

    ordered = sorted(range(3), key=without_sign)
    nearest = max(
        permutations(range(3)),
        key=lambda targets: np.abs(directions[ordered, targets]).sum().round(_DIRECTION_DECIMALS),
    )
    orientation = np.empty((3, 2))
    orientation[ordered, 0] = nearest
    orientation[ordered, 1] = np.sign(directions[ordered, nearest])
    return orientation


def _header(block: bytes, path: Path) -> tuple[Header, int, bool]:
    """The header, where the voxels begin, and whether that is in a file of their own."""
    for pointer, what in _POINTERS.items():
        if block.startswith(pointer):
            raise InputError(f"{path}: {what}")
    if block[:4] == b"\0\0\0\1" and len(block) >= 284:
        return MGHHeader(block[:284], check=False), 284, False
    kinds = (
        (nib.Nifti1Header, block[344:347], (b"n+1", b"ni1"), 348),
        (nib.Nifti2Header, block[4:7], (b"n+2", b"ni2"), 540),
    )
    for kind, magic, known, size in kinds:
        if magic in known and len(block) >= size:
            header = kind(block[:size], check=False)
            header.check_fix(logger=_SILENT, error_level=40)
            in_pair = magic.startswith(b"ni")
            begin = float(header["vox_offset"])
            if not 0 <= begin <= _MOST_HEADER:
                raise InputError(f"{path}: vox_offset {begin:g} in the header cannot be right; repair it")
            return header, int(begin) or (0 if in_pair else size + 4), in_pair
    if len(block) >= 348 and 348 in (int.from_bytes(block[:4], order) for order in ("little", "big")):
        raise InputError(f"{path}: Analyze is not supported, it does not say left from right; convert it to .nii.gz")
    what, remedy = "it has neither's header", "convert it to .nii.gz"
    if not block:
        what, remedy = "the file is empty", "copy it again"
    elif block.lstrip()[:1] == b"<":
        what, remedy = "it is a web page or XML", "download the scan again"
    elif len(block) < 348:
        what, remedy = "it is truncated or damaged", "copy it again"
    raise InputError(f"{path}: not a NIfTI or mgz volume ({what}); {remedy}")


def _shape(header: Header, path: Path) -> tuple[int, int, int]:
    shape = tuple(int(size) for size in header.get_data_shape())
    if min(shape, default=0) < 1:
        raise InputError(f"{path}: shape {shape} holds no voxel; export the scan again")
    if len(shape) < 3 or any(size > 1 for size in shape[3:]):
        raise InputError(f"{path}: shape {shape} is {len(shape)}-D; give one 3-D volume")
    if prod(shape) > _MOST_VOXELS:
        raise InputError(
            f"{path}: the header claims {' x '.join(map(str, shape))} voxels, more than 640^3; crop the scan, or "
            f"repair dim in the header"
        )
    return shape[0], shape[1], shape[2]


def _affine(header: Header, path: Path) -> np.ndarray:
    """Voxel to RAS in mm."""
    unit = 1.0
    if isinstance(header, nib.Nifti1Header):
        code = int(header["xyzt_units"]) & 7
        if code not in _UNITS:
            raise InputError(f"{path}: xyzt_units {code} in the header is no unit of length; write 2 for mm")
        unit = _UNITS[code]
        if not header["sform_code"] and header["qform_code"]:
            _shorten_quaternion(header, path)
    with np.errstate(all="ignore"):
        affine = np.asarray(header.get_best_affine(), np.float64)
        if unit != 1:
            affine[:3] = (affine[:3] * unit).astype(np.float32)  # 0.001 m is 1 mm, not 1.00000005
        edges = np.linalg.norm(affine[:3, :3], axis=0)
        if not (np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-6 * np.prod(edges) > 0):
            raise InputError(f"{path}: its affine has no volume (voxel size 0 or not finite); repair the header")
    return affine


def _shorten_quaternion(header: nib.Nifti1Header, path: Path) -> None:
    """Mend a quaternion whose (b, c, d) is longer than 1 by rounding: a rotation by 180 degrees."""
    fields = ("quatern_b", "quatern_c", "quatern_d")
    b_c_d = [float(header[field]) for field in fields]
    squared = sum(value * value for value in b_c_d)
    if not squared <= 1 + _QUATERNION_ROUNDING:
        named = ", ".join(f"{field} {value:g}" for field, value in zip(fields, b_c_d, strict=True))
        raise InputError(f"{path}: {named} in the header are no rotation; repair them, or set an sform")
    if squared > 1:
        for field, value in zip(fields, b_c_d, strict=True):
            header[field] = value / np.sqrt(squared)


def _check_geometry(path: Path, shape: tuple[int, int, int], affine: np.ndarray) -> None:
    sizes = np.linalg.norm(affine[:3, :3], axis=0)
    extent = float(max(sizes * shape))
    low, high = _VOXEL_MM
    shortest, longest = _EXTENT_MM
    if np.abs(affine[:3, 3]).max() > _FARTHEST_MM:
        raise InputError(
            f"{path}: its first voxel is {np.abs(affine[:3, 3]).max():.3g} mm away from the origin; look at qoffset_x, "
            f"srow_x and the like in the header"
        )
    if not (low <= sizes.min() and sizes.max() <= high and shortest <= extent <= longest):
        voxel = " x ".join(f"{size:.3g}" for size in sizes)
        raise InputError(
            f"{path}: voxels of {voxel} mm and a longest edge of {extent:.4g} mm are no head; look at pixdim, srow_x, "
            f"srow_y, srow_z and xyzt_units in the header"
        )


def _check_claim(path: Path, data_path: Path, offset: int, n_bytes: int) -> None:
    """Compare what the header claims with the size of the file, before anything is allocated."""
    has = data_path.stat().st_size
    with open(data_path, "rb") as file:
        magic = file.read(3)
    if magic[:2] == GZIP:
        has *= _BEST_COMPRESSION
    elif magic == BZIP2:
        return
    if has < offset + n_bytes:
        raise InputError(
            f"{path}: truncated or damaged (the header claims {offset + n_bytes} bytes, {data_path.name} cannot hold "
            f"them); copy the file again"
        )


def _whole_numbers(scan: ScanFile, values: np.ndarray) -> np.ndarray:
    if values.dtype.kind != "f":
        return values
    ids = np.empty(values.shape, np.int32, order="F")
    for begin in range(0, values.shape[2], _SLAB):
        part = values[:, :, begin : begin + _SLAB]
        whole = np.rint(part)
        _refuse_values(scan, part, np.abs(part - whole) > _ROUNDING, "not whole numbers")
        _refuse_values(scan, part, np.abs(part) > np.iinfo(np.int32).max, "too large")
        ids[:, :, begin : begin + _SLAB] = whole
    return ids


def _refuse_values(scan: ScanFile, values: np.ndarray, bad: np.ndarray, what: str) -> None:
    if bad.any():
        slope, inter = scan.scaling
        remedy = {"too large": "give label ids below 2^31"}.get(what, "resample with nearest, store as integers")
        raise InputError(
            f"{scan.path}: labels are {what} ({values[bad][0]:.8g}), with scl_slope {slope:g} and scl_inter {inter:g}; "
            f"{remedy}"
        )


def _check_same_grid(labels: ScanFile, image: ScanFile) -> None:
    """Labels lie on the image's voxels, up to 1 % of a voxel, whatever the order they are stored in."""
    ours, theirs = (_in_ras_order(scan) for scan in (labels, image))
    if ours[0] != theirs[0]:
        what = f"shape {labels.shape} is not the image's {image.shape}"
    else:
        corners = np.array([(*corner, 1) for corner in np.ndindex(2, 2, 2)]) * [*(np.array(ours[0]) - 1), 1]
        moved = (corners @ (ours[1] - theirs[1]).T)[:, :3]
        in_voxels = moved @ np.linalg.inv(theirs[1][:3, :3]).T
        if np.abs(in_voxels).max() <= _SAME_GRID:
            return
        what = f"affine differs from the image's by up to {np.linalg.norm(moved, axis=1).max():.3g} mm"
    raise InputError(
        f"{labels.path}: off the grid of {image.path}, {what}; resample the labels onto the image (nearest)"
    )


def _in_ras_order(scan: ScanFile) -> tuple[tuple[int, ...], np.ndarray]:
    orientation, affine = canonical_affine(scan.shape, scan.affine)
    return tuple(scan.shape[int(axis)] for axis in np.argsort(orientation[:, 0])), affine
