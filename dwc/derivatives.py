"""Name and write the result files of a predicted scan: BIDS-like derivatives, by default on the scan's own grid."""

import gzip
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from dwc import __version__
from dwc.base.errors import InputError
from dwc.base.files import write_whole
from dwc.base.tsv import as_tsv
from dwc.colours import label_table
from dwc.data.conform import place, to_native
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.reading import ScanFile, open_scan
from dwc.inputs import stem_of
from dwc.metrics.confusion import volumes
from dwc.prediction import Prediction
from dwc.prediction_settings import MAPS, OutputSettings

__all__ = ["Derivatives", "is_foreign", "name_derivatives", "native_labels", "write_derivatives"]

_MARK = f"dwc {__version__}"  # in the header of each image

_GEOMETRY = (
    "pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip
_UNITS = {
    "entropy": "nats",
    "mutual_information": "nats",
    "variance": "summed over classes",
    "confidence": "probability",
}


@dataclass(frozen=True)
class Derivatives:
    """Result files of one scan, `<stem>_<suffix>`; see docs/prediction.md."""

    stem: Path

    def file(self, suffix: str) -> Path:
        """The file with a suffix, such as `dseg.nii.gz`."""
        return self.stem.with_name(f"{self.stem.name}_{suffix}")

    def map(self, name: str) -> Path:
        """uint8 map of uncertainty with a slope, one of `MAPS`."""
        return self.file(f"{name}.nii.gz")

    @property
    def labels(self) -> Path:
        """Label ids."""
        return self.file("dseg.nii.gz")

    @property
    def sidecar(self) -> Path:
        """JSON: what the results were made from, and their digests; written last."""
        return self.file("dseg.json")

    @property
    def table(self) -> Path:
        """Index (label id), name, colour, side and FreeSurfer's ids of each class."""
        return self.file("dseg.tsv")

    @property
    def entropy(self) -> Path:
        """`map("entropy")`."""
        return self.map("entropy")

    @property
    def volumes(self) -> Path:
        """Index, name and volume_mm3 of each class, and sd_mm3, its standard deviation over the draws, which is counted
        on the conformed grid; n/a with fewer than two draws.
        """
        return self.file("volumes.tsv")

    @property
    def image(self) -> Path:
        """The conformed scan, for results on its grid."""
        return self.file("desc-conformed_T1w.nii.gz")

    @property
    def picture(self) -> Path:
        """The scan with its classes in colour."""
        return self.file("overlay.png")

    def images(self, settings: OutputSettings) -> list[Path]:
        """The volumes that settings ask for."""
        conformed = [self.image] if settings.conformed else []
        return [*map(self.map, settings.maps), *conformed, self.labels]

    def files(self, settings: OutputSettings) -> list[Path]:
        """All files that settings ask for, but for the sidecar."""
        pictures = [self.picture] if settings.picture else []
        return [*self.images(settings), self.table, self.volumes, *pictures]


def name_derivatives(
    scans: Sequence[Path], out: Path, *, folders: Sequence[Path] | None = None, overwrite: bool = False
) -> list[Derivatives]:
    """The result files of each scan, named after it without its extension and `_T1w`; they must not clash.

    They lie in `out`, or in `folders` below it, one for each scan. Without `overwrite` none may exist.
    """
    places = [out / folder for folder in folders] if folders is not None else [out] * len(scans)
    names = [Derivatives(place / stem_of(scan)) for scan, place in zip(scans, places, strict=True)]
    twin, count = Counter(names).most_common(1)[0]
    if count > 1:
        shown = ", ".join(str(scan) for scan, files in zip(scans, names, strict=True) if files == twin)
        raise InputError(
            f"{shown}: would all be written as {twin.labels}; give each its own `out`, or the folder that holds them"
        )
    suffixes = OutputSettings(maps=MAPS, conformed=True, picture=True)  # all there are
    for path in (path for files in names for path in (*files.files(suffixes), files.sidecar)):
        if path.exists() and not overwrite:
            raise InputError(
                f"{path}: exists already; give another `out`, `skip_existing` to keep what is done, or `overwrite` to "
                f"replace it"
            )
    return names


def write_derivatives(
    files: Derivatives,
    prediction: Prediction,
    scan: Path,
    *,
    label_map: LabelMap,
    grid: Grid,
    settings: OutputSettings | None = None,
    image: np.ndarray | None = None,
) -> np.ndarray:
    """Write a scan's maps, labels, table and volumes, but not its picture and sidecar; returns mm^3 per class.

    The images get the grid, qform and sform of `scan`, or the conformed grid if the settings say so, with the conformed
    `image` beside them; `label_map` and `grid` are the networks'.
    """
    settings = settings or OutputSettings()
    target = _Target.of(scan, grid, conformed=settings.conformed)
    classes = target.resampled(prediction.labels, order=0)
    mm3 = volumes(classes, label_map.n_classes, target.voxel_volume).numpy()
    for name in settings.maps:
        write_whole(files.map(name), target.map(name, getattr(prediction, name)))
    if settings.conformed and image is not None:
        write_whole(files.image, _compressed(target.nifti(image)))
    write_whole(files.labels, _compressed(target.labels(classes, label_map)))
    write_whole(files.table, label_table(label_map))
    rows = zip(
        _ids(label_map), label_map.titles, map("{:.3f}".format, mm3), _spread(prediction.draws, grid), strict=True
    )
    write_whole(files.volumes, as_tsv(("index", "name", "volume_mm3", "sd_mm3"), list(rows)))
    return mm3


def is_foreign(path: Path) -> bool:
    """Whether there is a whole image that dwc has not written, such as labels made by hand."""
    try:
        header = open_scan(path).header
    except InputError:  # none, or what is left of one
        return False
    return not (isinstance(header, nib.Nifti1Header) and header["descrip"].tobytes().startswith(_MARK[:4].encode()))


def native_labels(prediction: Prediction, scan: Path, label_map: LabelMap, grid: Grid) -> nib.Nifti1Image:
    """The label ids of a prediction on the scan's own grid."""
    target = _Target.of(scan, grid, conformed=False)
    return target.labels(target.resampled(prediction.labels, order=0), label_map)


def _spread(counts: np.ndarray, grid: Grid) -> list[str]:
    """Standard deviation over draws of volumes counted in voxels, [n_draws, n], in mm^3; n/a for a single draw."""
    n_draws, n = counts.shape
    if n_draws < 2:
        return ["n/a"] * n
    return [f"{sd * grid.voxel_size**3:.3f}" for sd in counts.std(axis=0, ddof=1)]


@dataclass(frozen=True)
class _Target:
    """The grid that results are written on: the scan's own, or the conformed one."""

    scan: Path
    grid: Grid
    source: ScanFile | None
    affine: np.ndarray  # to mm

    @classmethod
    def of(cls, scan: Path, grid: Grid, *, conformed: bool) -> "_Target":
        if conformed:
            return cls(scan, grid, None, place(scan, grid).affine)
        source = open_scan(scan)
        return cls(scan, grid, source, source.affine)

    @property
    def voxel_volume(self) -> float:
        """mm^3."""
        return float(abs(np.linalg.det(self.affine[:3, :3])))

    def resampled(self, array: np.ndarray, *, order: int) -> np.ndarray:
        """An array of the conformed grid on this one."""
        return array if self.source is None else to_native(array, self.scan, self.grid, order=1 if order else 0)

    def nifti(self, voxels: np.ndarray) -> nib.Nifti1Image:
        """An image on this grid: the bits of the scan's geometry, and nothing else from its header."""
        if self.source is None:
            image = nib.Nifti1Image(voxels, self.affine, dtype=voxels.dtype)
            image.header.set_xyzt_units("mm")
            image.set_qform(self.affine, code=1)
            image.set_sform(self.affine, code=1)
            image.header["descrip"] = _MARK.encode()
            return image
        header = self.source.header
        affine = header.get_best_affine()  # in the header's unit
        kind = nib.Nifti2Image if isinstance(header, nib.Nifti2Header) else nib.Nifti1Image
        image = kind(voxels, affine, dtype=voxels.dtype)
        if isinstance(header, nib.Nifti1Header):  # NIfTI-2 headers included
            for field in _GEOMETRY:
                image.header[field] = header[field]
        else:
            image.set_qform(affine, code=1)
            image.set_sform(affine, code=1)
        return image

    def labels(self, classes: np.ndarray, label_map: LabelMap) -> nib.Nifti1Image:
        """Classes on this grid as label ids."""
        image = self.nifti(_ids(label_map)[classes])
        image.header.set_intent("label", name=label_map.name[:15])
        image.header["descrip"] = f"{_MARK} labels: {label_map.name}"[:79].encode()
        return image

    def map(self, name: str, values: np.ndarray) -> bytes:
        """A map of the conformed grid as the content of a file: uint8 with the slope that brings back its values."""
        values = self.resampled(values, order=1)
        slope = np.float32(values.max() / 255) or np.float32(1)
        image = self.nifti(np.rint(values / slope).astype(np.uint8))
        image.header["cal_max"] = values.max()
        image.header["descrip"] = f"{_MARK} {name}: {_UNITS[name]}".encode()
        image.header.set_slope_inter(slope, 0)
        return _compressed(image)


def _ids(label_map: LabelMap) -> np.ndarray:
    """The label id of each class, as int16 if they fit, which NIfTI readers expect of labels."""
    ids = label_map.to_ids(np.arange(label_map.n_classes))
    return ids.astype(np.int16 if ids.max() <= np.iinfo(np.int16).max else np.int32)


def _compressed(image: nib.Nifti1Image) -> bytes:
    return gzip.compress(image.to_bytes(), compresslevel=5, mtime=0)  # no date, so that equal results are equal files
