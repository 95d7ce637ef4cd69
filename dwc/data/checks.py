"""What is wrong or odd about scans and labels, told before anything runs: geometry, intensities, labels, duplicates."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.spatialimages import HeaderDataError
from tqdm import tqdm

from dwc.base import launcher, ranks
from dwc.base.errors import InputError
from dwc.data.comparison import compare
from dwc.data.conform import Placement, check_ids, classes_on_grid, image_on_grid
from dwc.data.findings import CheckedScan, Finding, odd
from dwc.data.grid import Grid
from dwc.data.intensity import SIGNAL, content_of, to_uint8
from dwc.data.labels import LEFT, RIGHT, LabelMap
from dwc.data.reading import ScanFile, load_labels, open_scan, varying
from dwc.data.scan import Scan
from dwc.data.streams import enough_memory

__all__ = ["axes_of", "check_each", "check_scans", "examine"]

_FEW_LEVELS = 64  # of 255
_INNER = 0.99  # of the voxels that are not black
_HEAD_MM = 30.0  # no head is shorter; a header in cm that is taken for mm shows so
_SLAB_MM = 80.0  # shorter is a part of a head
_LEAST_VOLUME = 0.5  # of a voxel, as a share of a box with its edges
_THICK_MM = 4.0
_ANISOTROPIC = 3.0  # the longest edge of a voxel over the shortest
_DISAGREEMENT_MM = 2.0  # between sform and qform
_UNLISTED = 0.05  # of the labelled voxels
_ON_SIGNAL = 0.6  # of the labelled voxels


def check_scans(
    scans: Sequence[Scan],
    grid: Grid,
    label_map: LabelMap | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> list[CheckedScan]:
    """Check scans, each by itself and against the others; ranks share the work, and each has all results.

    Parameters
    ----------
    scans : sequence of Scan
        Those without a label are checked as images.
    grid, label_map : Grid, LabelMap
        What they will be conformed to. Labels are not read without a label map.
    workers : int
        Threads; each holds a scan in memory, about 0.5 GB at 256^3. None: one per core, up to 8.
    progress : bool
        Show a progress bar, on the first rank.
    """
    return compare(check_each(scans, grid, label_map, workers=workers, progress=progress))


def check_each(
    scans: Sequence[Scan],
    grid: Grid,
    label_map: LabelMap | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> list[CheckedScan]:
    """`check_scans` without the comparison."""
    if workers is None:
        workers = min(8, (os.cpu_count() or 1) // launcher.local_processes())
    ours = ranks.share(scans)
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        checked = list(
            tqdm(
                pool.map(lambda scan: _check(scan, grid, label_map), ours),
                total=len(ours), desc="checking scans", unit="scan",
                disable=None if progress and ranks.is_main() else True,
            )
        )  # fmt: skip
    if ranks.world_size() == 1:
        return checked
    parts = ranks.gather([one.to_json() for one in checked])
    return [CheckedScan.from_json(scan, values) for scan, values in zip(scans, ranks.merge(parts), strict=True)]


def examine(path: Path, grid: Grid) -> tuple[np.ndarray, CheckedScan]:
    """A scan's image on the grid, as `conform_image` gives it, and what is odd about it."""
    scan = Scan(path, None, "", "", "test")
    found: list[Finding] = []
    facts: dict[str, Any] = {}
    with enough_memory(path):
        image, _ = _check_image(scan, grid, found, facts)
    for finding in found:
        if finding.severity == "error":
            raise InputError(finding.message)
    return image, CheckedScan(scan, tuple(found), facts, content=content_of(image))


def axes_of(opened: ScanFile) -> dict[str, Any]:
    """The facts that tell a mirrored scan from its neighbours."""
    return {
        "axes": "".join(nib.aff2axcodes(opened.affine)),
        "right_handed": bool(np.linalg.det(opened.affine[:3, :3]) > 0),
    }


def _check(scan: Scan, grid: Grid, label_map: LabelMap | None) -> CheckedScan:
    """A scan by itself; what an error leaves undetermined stays out of the facts."""
    found: list[Finding] = []
    facts: dict[str, Any] = {}
    content = voxels_of_class = None
    if scan.fault:
        return CheckedScan(scan, (Finding("error", "file", scan.fault),))
    if scan.remark:
        found.append(odd("labels", scan.image, scan.remark))
    try:
        with enough_memory(scan.image):
            image, placement = _check_image(scan, grid, found, facts)
            content = content_of(image)
            if scan.label is not None and label_map is not None:
                voxels_of_class = _check_labels(scan, scan.label, image, placement, grid, label_map, found, facts)
    except InputError as error:
        found.append(Finding("error", "file", str(error)))
    return CheckedScan(scan, tuple(found), facts, voxels_of_class, content)


def _check_image(scan: Scan, grid: Grid, found: list[Finding], facts: dict[str, Any]) -> tuple[np.ndarray, Placement]:
    """The image on the grid and where that lies; adds to the findings and facts."""
    opened = open_scan(scan.image)
    found += _header_findings(opened)
    facts |= {
        "shape": opened.shape,
        "voxel_mm": tuple(float(f"{size:.4g}") for size in opened.voxel_sizes),
        **axes_of(opened),
    }
    values = varying(scan.image, opened.read())
    facts["intensity"] = (float(values.min()), float(values.max()))
    is_scaled = values.dtype != np.uint8
    values = to_uint8(values)
    counts = np.bincount(values.ravel(), minlength=256)
    facts["grey_levels"] = _levels_of_the_head(counts)
    found += _intensity_findings(scan, facts["grey_levels"], int(counts.argmax()) if is_scaled else 0)
    image, placement = image_on_grid(scan.image, values, opened.affine, grid)
    found += _placement_findings(scan, placement.moved_mm, placement.cut_mm)
    return image, placement


def _check_labels(
    scan: Scan, label: Path, image: np.ndarray, placement: Placement, grid: Grid, label_map: LabelMap,
    found: list[Finding], facts: dict[str, Any],
) -> np.ndarray:  # fmt: skip
    """Voxels of each class on the grid; adds to the findings and facts."""
    labels = load_labels(label, scan.image)
    ids = np.asanyarray(labels.dataobj)
    classes = label_map.apply(ids)
    facts["unlisted_ids"] = check_ids(label, ids, classes, label_map)
    found += _label_findings(label, ids, labels.affine, label_map, facts["unlisted_ids"])
    classes, cut = classes_on_grid(label, classes, labels.affine, grid, placement)
    if cut:
        found.append(odd("cut off", label, f"{cut:.1%} of the labelled voxels lie outside of the grid"))
    facts["labels_on_signal"] = float(np.mean(image[classes > 0] > SIGNAL)) if classes.any() else 0.0
    found += _overlap_findings(scan, label, facts["labels_on_signal"])
    return np.bincount(classes.ravel(), minlength=label_map.n_classes)


def _header_findings(opened: ScanFile) -> list[Finding]:
    found = []
    header = opened.header
    sizes = opened.voxel_sizes
    if sizes.max() > _THICK_MM or sizes.max() > _ANISOTROPIC * sizes.min():
        voxel = " x ".join(f"{size:.3g}" for size in sizes)
        found.append(odd("geometry", opened.path, f"voxels of {voxel} mm are coarse or long; small structures suffer"))
    extent = sizes * opened.shape
    if extent.max() < _HEAD_MM:
        what = (
            f"its longest edge is {extent.max():.3g} mm, no head; look at pixdim, srow_x and xyzt_units in the header"
        )
        found.append(Finding("error", "units", f"{opened.path}: {what}"))
    if extent.min() < min(_SLAB_MM, extent.max() / 2):
        found.append(odd("geometry", opened.path, f"its shortest edge is {extent.min():.3g} mm, a slab of a head"))
    volume = abs(np.linalg.det(opened.affine[:3, :3])) / np.prod(sizes)
    if volume < _LEAST_VOLUME:
        what = f"its axes are far from right angles (a voxel has {volume:.2g} of a box's volume); look at its affine"
        found.append(odd("geometry", opened.path, what))
    if not isinstance(header, nib.Nifti1Header):
        return found
    unit, in_mm = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}.get(int(header["xyzt_units"]) & 7, ("", 1.0))
    if unit:
        found.append(odd("units", opened.path, f"the header is in {unit} (xyzt_units); converted to mm"))
    with np.errstate(all="ignore"):
        pixdim = np.abs(np.asarray(header["pixdim"][1:4], float)) * in_mm
    if not np.allclose(pixdim, sizes, rtol=0.01):
        shown = " x ".join(f"{size:.3g}" for size in pixdim)
        found.append(odd("geometry", opened.path, f"pixdim says {shown} mm, its affine something else; that is used"))
    has_sform, has_qform = bool(header["sform_code"]), bool(header["qform_code"])
    if not has_sform and not has_qform:
        found.append(
            odd("left and right", opened.path, "has neither sform nor qform, left and right are a guess; write one")
        )
    if has_sform and has_qform:
        found += _forms_findings(opened)
    return found


def _forms_findings(opened: ScanFile) -> list[Finding]:
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(opened.shape) - 1.0)
    try:
        forms = (opened.header.get_sform(), opened.header.get_qform())
    except (ValueError, HeaderDataError):
        return [odd("geometry", opened.path, "its qform is no rotation; the sform is used")]
    by_sform, by_qform = (apply_affine(form, corners) for form in forms)
    apart = float(np.linalg.norm(by_sform - by_qform, axis=1).max())
    if not np.isfinite(apart):
        return [odd("geometry", opened.path, "its qform is not finite; the sform is used")]
    if not apart > _DISAGREEMENT_MM:
        return []
    return [odd("geometry", opened.path, f"sform and qform disagree by up to {apart:.3g} mm; the sform is used")]


def _levels_of_the_head(counts: np.ndarray) -> int:
    """The occupied grey levels of the signal, by a range that the brightest 1 % of the voxels do not set."""
    bright = counts[1:].cumsum()
    top = 1 + int(np.searchsorted(bright, _INNER * bright[-1]))
    return int(np.count_nonzero(counts[top * SIGNAL // 255 + 1 : top + 1]))


def _intensity_findings(scan: Scan, levels: int, most_common: int) -> list[Finding]:
    found = []
    if levels < _FEW_LEVELS:
        what = f"the head has {levels} grey levels of 255; export the scan with its full range, without outliers"
        found.append(odd("intensity", scan.image, what))
    if most_common > SIGNAL:
        what = f"its most common grey level is {most_common} of 255, where air is 0; give padding the value of air"
        found.append(odd("intensity", scan.image, what))
    return found


def _placement_findings(scan: Scan, moved_mm: float, cut_mm: float) -> list[Finding]:
    found = []
    if moved_mm:
        found.append(odd("cut off", scan.image, f"the grid was moved by {moved_mm:.0f} mm so that it holds the head"))
    if cut_mm:
        found.append(
            odd(
                "cut off",
                scan.image,
                f"{cut_mm:.0f} mm of it lie outside of the grid; crop it to the head if that is brain",
            )
        )
    return found


def _label_findings(
    label: Path, ids: np.ndarray, affine: np.ndarray, label_map: LabelMap, unlisted: float
) -> list[Finding]:
    found = []
    if unlisted > _UNLISTED:
        found.append(odd("labels", label, f"{unlisted:.0%} of the labelled voxels have ids that are not listed"))
    if ids.dtype.itemsize == 1 and max(label_map.ids) > np.iinfo(ids.dtype).max:
        found.append(odd("labels", label, f"{ids.dtype} cannot hold all ids of {label_map.name}; were they cut?"))
    sides = []
    for one_side, parcels in ((LEFT, 1000), (RIGHT, 2000)):
        here = np.argwhere(np.isin(ids, one_side) | ((ids >= parcels) & (ids < parcels + 1000)))
        if len(here):
            sides.append(apply_affine(affine, here.mean(axis=0))[0])
    if len(sides) == 2 and sides[0] > sides[1]:
        found.append(odd("left and right", label, "ids of the left side are on the right; the volume is mirrored"))
    return found


def _overlap_findings(scan: Scan, label: Path, share: float) -> list[Finding]:
    if share >= _ON_SIGNAL:
        return []
    what = f"{share:.0%} of the labelled voxels are brighter than air in {scan.image.name}; do they belong together?"
    return [odd("overlap", label, what)]
