"""The voxels of a segmented scan for its pictures: scan, classes and a map of uncertainty, in one order of axes."""

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from scipy import ndimage

from dwc.base.cells import from_text
from dwc.base.errors import InputError
from dwc.data.head import head_box
from dwc.data.labels import read_tsv
from dwc.data.reading import ScanFile, open_scan
from dwc.derivatives import Derivatives
from dwc.prediction_settings import MAPS

__all__ = ["Klass", "Volumes", "map_of", "read_volumes"]

_COLUMNS = ("index", "name", "color", "side", "freesurfer_ids")
_COLOUR = re.compile("#[0-9a-f]{6}")
_BRIGHTEST = 99.8  # percentile of the head that is shown white


@dataclass(frozen=True)
class Klass:
    """A class of the label map, in the order of its table; `colour` is #rrggbb."""

    label: int
    name: str
    colour: str

    @property
    def rgb(self) -> tuple[int, int, int]:
        """0..255."""
        red, green, blue = bytes.fromhex(self.colour[1:])
        return red, green, blue


@dataclass(frozen=True)
class Volumes:
    """A scan and its results, cropped to the head, axes to the left, inferior and anterior, as far as voxels allow.

    Attributes
    ----------
    image : ndarray
        uint8 [D, H, W].
    classes : ndarray
        Of the voxels: positions in `klasses`, uint8 [D, H, W].
    uncertainty : ndarray or None
        The map as stored, uint8 [D, H, W]; times `slope` are its values.
    affine : ndarray
        Voxel to RAS in mm.
    """

    image: np.ndarray
    classes: np.ndarray
    klasses: list[Klass]
    uncertainty: np.ndarray | None
    map_name: str
    slope: float
    affine: np.ndarray

    @property
    def spacing(self) -> np.ndarray:
        """Edges of a voxel in mm, [3]."""
        return np.linalg.norm(self.affine[:3, :3], axis=0)

    def places(self) -> dict[int, list[float]]:
        """For each class that there is, a voxel of it that is far from its border, in mm (RAS)."""
        places = {}
        for position, region in enumerate(ndimage.find_objects(self.classes), start=1):
            if region is not None:
                inside = ndimage.distance_transform_edt(np.pad(self.classes[region] == position, 1), self.spacing)
                deepest = np.array(np.unravel_index(inside.argmax(), inside.shape)) - 1
                voxel = deepest + [axis.start for axis in region]
                places[position] = (self.affine[:3, :3] @ voxel + self.affine[:3, 3]).round(1).tolist()
        return places


def read_volumes(files: Derivatives, sidecar: dict[str, Any]) -> Volumes:
    """Read the scan that a sidecar names, and the results beside it."""
    image, affine = _in_lia(open_scan(_image_of(files, sidecar)))
    klasses = _read_klasses(files.table)
    labels, _ = _in_lia(open_scan(files.labels))
    uncertainty, slope = None, 1.0
    if name := map_of(sidecar):
        stored = open_scan(files.map(name))
        slope = stored.scaling[0]
        values, _ = _in_lia(stored)
        uncertainty = np.rint(values / slope).astype(np.uint8)
    for array, path in ((labels, files.labels), (uncertainty, files.map(name))):
        if array is not None and array.shape != image.shape:
            raise InputError(f"{path}: has other voxels than its scan; run dwc predict again")
    classes = _positions(labels, klasses, files.labels)
    grey = _as_bytes(image)
    box = _grown(head_box(grey), classes)
    affine = affine.copy()
    affine[:3, 3] += affine[:3, :3] @ [axis.start for axis in box]
    shown = None if uncertainty is None else uncertainty[box]
    return Volumes(grey[box], classes[box], klasses, shown, name, slope, affine)


def map_of(sidecar: dict[str, Any]) -> str:
    """The map of uncertainty to show of those that there are; "" for none. Confidence is none."""
    return next((name for name in MAPS if name != "confidence" and name in sidecar["Maps"]), "")


def _image_of(files: Derivatives, sidecar: dict[str, Any]) -> Path:
    """The image that the results lie on; the scan must be the one that was segmented."""
    if sidecar["Conformed"]:
        return files.image
    source = files.stem.parent / next(iter(sidecar["Sources"]), "")
    if not source.is_file():
        raise InputError(f"{source}: no such file; put the scan back for its pictures")
    if hashlib.sha256(source.read_bytes()).hexdigest() != sidecar["SHA256"].get("Source"):
        raise InputError(f"{source}: is not the scan that was segmented; run dwc predict again")
    return source


def _in_lia(scan: ScanFile) -> tuple[np.ndarray, np.ndarray]:
    """Voxels with axes nearest to left, inferior and anterior, and their affine; nothing is resampled."""
    found = nib.orientations.io_orientation(scan.affine)
    turn = nib.orientations.ornt_transform(found, nib.orientations.axcodes2ornt("LIA"))
    affine = scan.affine @ nib.orientations.inv_ornt_aff(turn, scan.shape)
    return nib.orientations.apply_orientation(scan.read(), turn), affine


def _read_klasses(path: Path) -> list[Klass]:
    rows = read_tsv(path, _COLUMNS)
    try:
        klasses = [Klass(int(row["index"]), from_text(row["name"]), row["color"]) for row in rows]
        whole = 0 < len(klasses) <= 256 and all(_COLOUR.fullmatch(klass.colour) for klass in klasses)
    except ValueError:
        whole = False
    if not whole:
        raise InputError(f"{path}: is no table of labels; run dwc predict again")
    return klasses


def _positions(labels: np.ndarray, klasses: Sequence[Klass], path: Path) -> np.ndarray:
    """Label ids as positions in the table, uint8."""
    ids = np.array([klass.label for klass in klasses])
    order = np.argsort(ids)
    found = np.searchsorted(ids, labels, sorter=order).clip(max=len(ids) - 1)
    positions = order[found].astype(np.uint8)
    if (odd := ids[positions] != labels).any():
        raise InputError(f"{path}: label {labels[odd][0]:g} is not in its table; run dwc predict again")
    return positions


def _as_bytes(image: np.ndarray) -> np.ndarray:
    low = float(image.min())
    bright = image[image > low]
    high = float(np.percentile(bright, _BRIGHTEST)) if bright.size else low + 1
    return np.rint(np.clip((image - low) * (255 / (high - low)), 0, 255)).astype(np.uint8)


def _grown(box: tuple[slice, ...], classes: np.ndarray) -> tuple[slice, ...]:
    """The box with all labelled voxels in it."""
    labelled = ndimage.find_objects((classes > 0).astype(np.uint8))
    if not labelled:
        return box
    both = zip(box, labelled[0], strict=True)
    return tuple(slice(min(a.start, b.start), max(a.stop, b.stop)) for a, b in both)
