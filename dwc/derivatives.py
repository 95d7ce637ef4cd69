"""Name and write the result files of a predicted scan: BIDS-like derivatives on the scan's own grid."""

import csv
import gzip
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import nibabel as nib
import numpy as np

from dwc.base.cells import as_text
from dwc.base.errors import InputError
from dwc.base.files import write_whole
from dwc.data.conform import to_native
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.paths import check_printable, existing_file, unreadable
from dwc.data.reading import ScanFile, open_scan
from dwc.metrics.confusion import volumes
from dwc.prediction import Prediction

__all__ = ["Derivatives", "find_scan", "name_derivatives", "native_labels", "write_derivatives"]

_EXTENSIONS = (".nii.gz", ".nii", ".mgz", ".mgh", ".img.gz", ".img", ".hdr.gz", ".hdr")
_GEOMETRY = (
    "pixdim", "xyzt_units", "qform_code", "quatern_b", "quatern_c", "quatern_d", "qoffset_x", "qoffset_y", "qoffset_z",
    "sform_code", "srow_x", "srow_y", "srow_z",
)  # fmt: skip


@dataclass(frozen=True)
class Derivatives:
    """Result files of one scan, on its own grid.

    Attributes
    ----------
    labels, table, entropy, picture : Path
        `<stem>_dseg.nii.gz`, label ids; `<stem>_dseg.tsv`, index (label id) and name of each class;
        `<stem>_entropy.nii.gz`, float32, nats; `<stem>_overlay.png`.
    volumes : Path
        `<stem>_volumes.tsv`, index, name and volume_mm3 of each class, and sd_mm3, its standard deviation over the
        draws, which is counted on the conformed grid; n/a with fewer than two draws.
    """

    labels: Path
    table: Path
    entropy: Path
    volumes: Path
    picture: Path


def find_scan(path: str | Path) -> Path:
    """The scan's file; its extension may be left out."""
    path = Path(path)
    check_printable(str(path))
    try:
        for candidate in (path, *(path.with_name(path.name + extension) for extension in _EXTENSIONS[:3])):
            if candidate.is_file() or candidate.is_symlink():
                return existing_file(candidate)
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if is_folder:
        raise InputError(f"{path}: is a folder; give scans")
    raise InputError(f"{path}: no such file, with or without {', '.join(_EXTENSIONS[:3])}; check the path")


def name_derivatives(scans: Sequence[Path], out: Path, *, overwrite: bool = False) -> list[Derivatives]:
    """The result files of each scan in `out`, named after it without its extension and `_T1w`; they must not clash."""
    stems = [_stem(scan) for scan in scans]
    stem, count = Counter(stems).most_common(1)[0]
    if count > 1:
        names = ", ".join(str(scan) for scan, theirs in zip(scans, stems, strict=True) if theirs == stem)
        raise InputError(f"{names}: would all be written as {out / stem}_dseg.nii.gz; give each its own `out`")
    suffixes = ("dseg.nii.gz", "dseg.tsv", "entropy.nii.gz", "volumes.tsv", "overlay.png")
    derivatives = [Derivatives(*(out / f"{stem}_{suffix}" for suffix in suffixes)) for stem in stems]
    for path in (path for files in derivatives for path in astuple(files)):
        if path.exists() and not overwrite:
            raise InputError(f"{path}: exists already; give another `out`, or `overwrite` to replace it")
    return derivatives


def write_derivatives(
    files: Derivatives, prediction: Prediction, scan: Path, *, label_map: LabelMap, grid: Grid
) -> np.ndarray:
    """Write a scan's labels, table, entropy and volumes, but not its picture; returns mm^3 per class, [n_classes].

    The images get the grid, qform and sform of `scan`; `label_map` and `grid` are the networks'.
    """
    classes = to_native(prediction.labels, scan, grid, order=0)
    ids = _ids(label_map)
    source = open_scan(scan)
    voxel_volume = abs(np.linalg.det(source.affine[:3, :3]))
    mm3 = volumes(classes, label_map.n_classes, voxel_volume).numpy()
    write_whole(files.entropy, _compressed(_nifti(to_native(prediction.entropy, scan, grid, order=1), source)))
    write_whole(files.labels, _compressed(_nifti(ids[classes], source)))
    write_whole(files.table, _tsv(("index", "name"), zip(ids, label_map.names, strict=True)))
    rows = zip(ids, label_map.names, (f"{volume:.3f}" for volume in mm3), _spread(prediction, grid), strict=True)
    write_whole(files.volumes, _tsv(("index", "name", "volume_mm3", "sd_mm3"), rows))
    return mm3


def native_labels(prediction: Prediction, scan: Path, label_map: LabelMap, grid: Grid) -> nib.Nifti1Image:
    """The label ids of a prediction on the scan's own grid."""
    classes = to_native(prediction.labels, scan, grid, order=0)
    return _nifti(_ids(label_map)[classes], open_scan(scan))


def _ids(label_map: LabelMap) -> np.ndarray:
    """The label id of each class, as int16 if they fit, which NIfTI readers expect of labels."""
    ids = label_map.to_ids(np.arange(label_map.n_classes))
    return ids.astype(np.int16 if ids.max() <= np.iinfo(np.int16).max else np.int32)


def _spread(prediction: Prediction, grid: Grid) -> list[str]:
    """Standard deviation of each class's volume over the draws, in mm^3."""
    n_draws, n_classes = prediction.draws.shape
    if n_draws < 2:
        return ["n/a"] * n_classes
    return [f"{sd * grid.voxel_size**3:.3f}" for sd in prediction.draws.std(axis=0, ddof=1)]


def _stem(scan: Path) -> str:
    extension = next((end for end in _EXTENSIONS if scan.name.lower().endswith(end)), scan.suffix)
    return scan.name[: len(scan.name) - len(extension)].removesuffix("_T1w")


def _nifti(voxels: np.ndarray, source: ScanFile) -> nib.Nifti1Image:
    """A NIfTI image on the grid of `source`: the bits of its geometry, and nothing else from its header."""
    header = source.header
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


def _compressed(image: nib.Nifti1Image) -> bytes:
    return gzip.compress(image.to_bytes(), compresslevel=5, mtime=0)  # no date, so that equal results are equal files


def _tsv(header: Sequence[str], rows: Iterable[Sequence[object]]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, delimiter="\t", lineterminator="\n")
    writer.writerow(header)
    writer.writerows([as_text(cell) if isinstance(cell, str) else cell for cell in row] for row in rows)
    return text.getvalue().encode()
