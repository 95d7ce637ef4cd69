"""What is wrong or odd about scans and labels, told before anything runs: geometry, intensities, labels, duplicates.

A finding is an error where a command would refuse the scan, or the split of the data set; everything else is a warning.
"""

import hashlib
import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import nibabel as nib
import numpy as np
from nibabel.affines import apply_affine
from nibabel.spatialimages import HeaderDataError
from tqdm import tqdm

from dwc.base import launcher
from dwc.base.errors import InputError
from dwc.data.conform import Placement, check_ids, classes_on_grid, image_on_grid
from dwc.data.grid import Grid
from dwc.data.intensity import SIGNAL, to_uint8
from dwc.data.labels import LabelMap
from dwc.data.manifest import namesakes
from dwc.data.reading import ScanFile, enough_memory, load_labels, open_scan, varying
from dwc.data.scan import Scan

__all__ = ["CheckedScan", "Finding", "check_scans", "leak", "tell"]

_FEW_LEVELS = 64  # of 255
_THICK_MM = 4.0
_ANISOTROPIC = 3.0  # the longest edge of a voxel over the shortest
_DISAGREEMENT_MM = 2.0  # between sform and qform
_UNLISTED = 0.05  # of the labelled voxels
_ON_SIGNAL = 0.6  # of the labelled voxels
_MOST_WARNINGS = 20  # that are printed when something else is to be done
_FEW_SCANS = 3  # of a site, below which no scan is compared with its neighbours
# FreeSurfer's ids of structures that are on one side
_LEFT = (2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 17, 18, 26, 28)
_RIGHT = (41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60)

Topic = Literal[
    "geometry", "units", "intensity", "cut off", "labels", "left and right", "overlap", "duplicate", "subject", "file"
]


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (an error) or odd (a warning) about a scan, as a line that names the file."""

    severity: Literal["error", "warning"]
    topic: Topic
    message: str


@dataclass(frozen=True, eq=False)
class CheckedScan:
    """A scan and what was found.

    Attributes
    ----------
    scan : Scan
        The scan.
    findings : tuple of Finding
        What is wrong or odd.
    facts : dict
        For tables: shape, voxel_mm, axes, intensity (least and greatest value), grey_levels, unlisted_ids and
        labels_on_signal (shares); those that could be determined.
    voxels_of_class : ndarray or None
        Voxels of each class on the grid, [n_classes].
    content : str or None
        SHA-256, hex, of the image on the grid: equal for the same scan in another file format, type or storage order.
    """

    scan: Scan
    findings: tuple[Finding, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    voxels_of_class: np.ndarray | None = None
    content: str | None = None

    @property
    def is_refused(self) -> bool:
        """Whether there is an error among the findings."""
        return any(finding.severity == "error" for finding in self.findings)


def check_scans(
    scans: Sequence[Scan],
    grid: Grid,
    label_map: LabelMap | None = None,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> list[CheckedScan]:
    """Check scans, each by itself and against the others.

    Parameters
    ----------
    scans : sequence of Scan
        Those without a label are checked as images.
    grid, label_map : Grid, LabelMap
        What they will be conformed to. Labels are not read without a label map.
    workers : int
        Threads; each holds a scan in memory, about 0.5 GB at 256^3. None: one per core, up to 8.
    progress : bool
        Show a progress bar.
    """
    if workers is None:
        workers = min(8, (os.cpu_count() or 1) // launcher.local_processes())
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        checked = list(
            tqdm(
                pool.map(lambda scan: _check(scan, grid, label_map), scans),
                total=len(scans), desc="checking scans", unit="scan", disable=None if progress else True,
            )
        )  # fmt: skip
    for compare in (_duplicates, _mirrored, _subjects):
        checked = _with_findings(checked, compare(checked))
    return checked


def tell(checked: Sequence[CheckedScan]) -> None:
    """Raise the first error of checked scans; without any, print the first warnings to stderr."""
    _refuse(checked)
    warnings = _warnings_of(checked)
    for line in warnings[:_MOST_WARNINGS]:
        print(f"warning: {line}", file=sys.stderr)
    if len(warnings) > _MOST_WARNINGS:
        print(f"warning: {len(warnings) - _MOST_WARNINGS} more; dwc data check lists them", file=sys.stderr)


def _refuse(checked: Iterable[CheckedScan]) -> None:
    """Raise the first error of checked scans, and say how many more there are."""
    errors = [finding.message for one in checked for finding in one.findings if finding.severity == "error"]
    if errors:
        more = f" (and {len(errors) - 1} more; `dwc data check` lists them)" if len(errors) > 1 else ""
        raise InputError(f"{errors[0]}{more}")


def _warnings_of(checked: Iterable[CheckedScan]) -> list[str]:
    """The warnings of checked scans, a line each, none twice."""
    return list(dict.fromkeys(f.message for one in checked for f in one.findings if f.severity == "warning"))


def _check(scan: Scan, grid: Grid, label_map: LabelMap | None) -> CheckedScan:
    """A scan by itself; what an error leaves undetermined stays out of the facts."""
    found: list[Finding] = []
    facts: dict[str, Any] = {}
    content = voxels_of_class = None
    try:
        with enough_memory(scan.image):
            image, placement = _check_image(scan, grid, found, facts)
            content = hashlib.sha256(image.tobytes()).hexdigest()
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
        "axes": "".join(nib.aff2axcodes(opened.affine)),
        "right_handed": bool(np.linalg.det(opened.affine[:3, :3]) > 0),
    }
    values = varying(scan.image, opened.read())
    facts["intensity"] = (float(values.min()), float(values.max()))
    values = to_uint8(values)
    facts["grey_levels"] = int(np.count_nonzero(np.bincount(values.ravel(), minlength=256)[SIGNAL + 1 :]))
    found += _intensity_findings(scan, facts["grey_levels"])
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
        found.append(_odd("cut off", label, f"{cut:.1%} of the labelled voxels lie outside of the grid"))
    facts["labels_on_signal"] = float(np.mean(image[classes > 0] > SIGNAL)) if classes.any() else 0.0
    found += _overlap_findings(scan, label, facts["labels_on_signal"])
    return np.bincount(classes.ravel(), minlength=label_map.n_classes)


def _header_findings(opened: ScanFile) -> list[Finding]:
    found = []
    header = opened.header
    sizes = opened.voxel_sizes
    if sizes.max() > _THICK_MM or sizes.max() > _ANISOTROPIC * sizes.min():
        voxel = " x ".join(f"{size:.3g}" for size in sizes)
        found.append(_odd("geometry", opened.path, f"voxels of {voxel} mm are coarse or long; small structures suffer"))
    if not isinstance(header, nib.Nifti1Header):
        return found
    unit, in_mm = {1: ("metres", 1000.0), 3: ("micrometres", 0.001)}.get(int(header["xyzt_units"]) & 7, ("", 1.0))
    if unit:
        found.append(_odd("units", opened.path, f"the header is in {unit} (xyzt_units); converted to mm"))
    with np.errstate(all="ignore"):
        pixdim = np.abs(np.asarray(header["pixdim"][1:4], float)) * in_mm
    if not np.allclose(pixdim, sizes, rtol=0.01):
        shown = " x ".join(f"{size:.3g}" for size in pixdim)
        found.append(_odd("geometry", opened.path, f"pixdim says {shown} mm, its affine something else; that is used"))
    has_sform, has_qform = bool(header["sform_code"]), bool(header["qform_code"])
    if not has_sform and not has_qform:
        found.append(
            _odd("left and right", opened.path, "has neither sform nor qform, left and right are a guess; write one")
        )
    if has_sform and has_qform:
        found += _forms_findings(opened)
    return found


def _forms_findings(opened: ScanFile) -> list[Finding]:
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(opened.shape) - 1.0)
    try:
        forms = (opened.header.get_sform(), opened.header.get_qform())
    except (ValueError, HeaderDataError):
        return [_odd("geometry", opened.path, "its qform is no rotation; the sform is used")]
    by_sform, by_qform = (apply_affine(form, corners) for form in forms)
    apart = float(np.linalg.norm(by_sform - by_qform, axis=1).max())
    if not apart > _DISAGREEMENT_MM:
        return []
    return [_odd("geometry", opened.path, f"sform and qform disagree by up to {apart:.3g} mm; the sform is used")]


def _intensity_findings(scan: Scan, levels: int) -> list[Finding]:
    if levels >= _FEW_LEVELS:
        return []
    what = f"the head has {levels} grey levels of 255; export the scan with its full range, without outliers"
    return [_odd("intensity", scan.image, what)]


def _placement_findings(scan: Scan, moved_mm: float, cut_mm: float) -> list[Finding]:
    found = []
    if moved_mm:
        found.append(_odd("cut off", scan.image, f"the grid was moved by {moved_mm:.0f} mm so that it holds the head"))
    if cut_mm:
        found.append(
            _odd(
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
        found.append(_odd("labels", label, f"{unlisted:.0%} of the labelled voxels have ids that are not listed"))
    if ids.dtype.itemsize == 1 and max(label_map.ids) > np.iinfo(ids.dtype).max:
        found.append(_odd("labels", label, f"{ids.dtype} cannot hold all ids of {label_map.name}; were they cut?"))
    sides = []
    for one_side, parcels in ((_LEFT, 1000), (_RIGHT, 2000)):
        here = np.argwhere(np.isin(ids, one_side) | ((ids >= parcels) & (ids < parcels + 1000)))
        if len(here):
            sides.append(apply_affine(affine, here.mean(axis=0))[0])
    if len(sides) == 2 and sides[0] > sides[1]:
        found.append(_odd("left and right", label, "ids of the left side are on the right; the volume is mirrored"))
    return found


def _overlap_findings(scan: Scan, label: Path, share: float) -> list[Finding]:
    if share >= _ON_SIGNAL:
        return []
    what = f"{share:.0%} of the labelled voxels are brighter than air in {scan.image.name}; do they belong together?"
    return [_odd("overlap", label, what)]


def _duplicates(checked: Sequence[CheckedScan]) -> dict[int, list[Finding]]:
    """The same scan under two names: an error if one is trained on and the other tested on."""
    first: dict[str, int] = {}
    found = defaultdict(list)
    for number, one in enumerate(checked):
        if one.content is None:
            continue
        twin = checked[first.setdefault(one.content, number)]
        if twin is one:
            continue
        if one.scan.split != twin.scan.split:
            found[number].append(Finding("error", "duplicate", leak(one.scan, twin.scan)))
        else:
            what = f"holds the same scan as {twin.scan.image}; leave one out"
            found[number].append(_odd("duplicate", one.scan.image, what))
    return found


def leak(one: Scan, twin: Scan) -> str:
    """What to say of one scan in both parts of the split."""
    return f"{one.image}: holds the same scan as {twin.image}, one to train and one to test on; leave one out"


def _mirrored(checked: Sequence[CheckedScan]) -> dict[int, list[Finding]]:
    """Scans whose axes are of another handedness than most of their site's: a flip in a conversion shows so."""
    of_site = defaultdict(list)
    for number, one in enumerate(checked):
        if "right_handed" in one.facts:
            of_site[one.scan.site].append(number)
    found = defaultdict(list)
    for site, numbers in of_site.items():
        right = [number for number in numbers if checked[number].facts["right_handed"]]
        left = [number for number in numbers if not checked[number].facts["right_handed"]]
        few, many = sorted((right, left), key=len)
        if len(numbers) > _FEW_SCANS and len(few) * 4 <= len(many):
            for number in few:
                scan = checked[number].scan
                what = f"its axes {checked[number].facts['axes']} are mirrored against the others of site {site}"
                found[number].append(_odd("left and right", scan.image, f"{what}; check that left is left"))
    return found


def _subjects(checked: Sequence[CheckedScan]) -> dict[int, list[Finding]]:
    """Subjects that may be one person under two names."""
    alike = namesakes(one.scan for one in checked)
    found = defaultdict(list)
    for names in alike:
        number = next(number for number, one in enumerate(checked) if one.scan.subject == names[-1])
        what = f"subjects {' and '.join(names)} may be one person; name each in one way"
        found[number].append(_odd("subject", checked[number].scan.image, what))
    return found


def _with_findings(checked: Sequence[CheckedScan], found: dict[int, list[Finding]]) -> list[CheckedScan]:
    return [replace(one, findings=(*one.findings, *found.get(number, ()))) for number, one in enumerate(checked)]


def _odd(topic: Topic, path: object, what: str) -> Finding:
    return Finding("warning", topic, f"{path}: {what}")
