"""The page of one scan in the report on segmentations: viewer, structures, measures of quality."""

import base64
import gzip
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from dwc.base.errors import InputError
from dwc.base.files import write_whole
from dwc.derivatives import Derivatives
from dwc.quality import LIMITS
from dwc.report.cohort import Cohort
from dwc.report.pages import data_address, render
from dwc.report.thumbnails import PANEL, thumbnail
from dwc.report.volumes import Volumes, read_volumes
from dwc.report.words import DASH, millilitres, number

__all__ = ["ScanPage", "Shown", "made_from", "write_scan_page"]

_NO_VIEWER = "call `make viewer` in the clone of dwc, which gets NiiVue from npm, and make the report again."
_DIGITS = 12  # of a SHA-256
_GREYS = 0xFC  # 64 levels: they look the same and compress better


@dataclass(frozen=True)
class Shown:
    """What all pages share: the map of uncertainty ("" for none), where it is brightest, and the address of NiiVue."""

    map_name: str
    most_uncertain: float
    viewer: str | None


@dataclass(frozen=True)
class ScanPage:
    """A scan's page and its picture, as a data address; `trouble` says why there is neither."""

    path: Path | None = None
    picture: str = ""
    height: int = 0
    trouble: str = ""


def write_scan_page(
    cohort: Cohort, scan: str, sidecar: dict[str, Any] | InputError | None, path: Path, shown: Shown
) -> ScanPage:
    """Write the page of a scan; one that failed (None) has none, nor one whose files cannot be read."""
    if not isinstance(sidecar, dict):
        return ScanPage(trouble=str(sidecar or ""))
    try:
        volumes = read_volumes(Derivatives(cohort.folder / scan), sidecar)
    except InputError as error:
        return ScanPage(trouble=str(error))
    quality, reason = cohort.scans.loc[scan, ["quality", "reason"]]
    picture = thumbnail(volumes, shown.most_uncertain)
    address = data_address(picture, "webp")
    embedded = _embedded(volumes, shown.most_uncertain) if shown.viewer else None
    page = render(
        "scan.html",
        scripts=["viewer.js"] if shown.viewer else [],
        viewer=shown.viewer,
        name=scan,
        quality=quality,
        reason=reason,
        outliers=[{"name": name, "z": number(z)} for name, z in cohort.outliers(scan).items()],
        map_name=volumes.map_name.replace("_", " "),
        size=f"{len(str(embedded)) / 1e6:.1f} MB",
        volumes=embedded,
        no_viewer=_NO_VIEWER,
        picture=address,
        n_measured=cohort.n_measured,
        structures=_structures(cohort, scan, volumes),
        measures=_measures(sidecar["Quality"].get("Measures")),
        made_from=made_from(sidecar),
    )
    write_whole(path, page)
    return ScanPage(path, address, height=PANEL[0] * (1 if volumes.uncertainty is None else 2))


def _structures(cohort: Cohort, scan: str, volumes: Volumes) -> list[dict[str, Any]]:
    """The total, then each class of the scan's own table."""
    places = volumes.places()
    looks = {klass.name: (klass.colour, places.get(position)) for position, klass in enumerate(volumes.klasses)}
    rows = []
    for name in cohort.mm3:
        colour, place = looks.get(name, ("", None))
        z = cohort.z.loc[scan, name]
        rows.append({
            "name": name, "colour": colour, "place": place, "ml": millilitres(cohort.mm3.loc[scan, name]),
            "sd": millilitres(cohort.sd_mm3.loc[scan, name]), "median": millilitres(cohort.mm3[name].median()),
            "z": number(z), "outlying": abs(z) > cohort.limit, "entropy": number(cohort.entropy.loc[scan, name]),
        })  # fmt: skip
    return rows


def _measures(measures: Any) -> list[dict[str, Any]]:
    """The measures in a sidecar beside their limits."""
    rows = []
    for name, value in measures.items() if isinstance(measures, dict) else ():
        limits = [limit for limit in LIMITS if limit.measure == name]
        words = [f"{'above' if limit.limit > limit.typical else 'below'} {limit.limit:g}" for limit in limits]
        is_number = isinstance(value, int | float)
        rows.append({
            "name": str(name).replace("_", " "), "value": f"{value:.4g}" if is_number else DASH,
            "flagged": is_number and any(limit.excess(value) > 1 for limit in limits),
            "limits": " or ".join(words) or DASH,
        })  # fmt: skip
    return rows


def made_from(sidecar: Mapping[str, Any]) -> dict[str, str]:
    """What a scan's results were made from, in words."""
    label_map, networks = sidecar.get("LabelMap"), sidecar.get("Networks")
    return {
        "scan": ", ".join(sidecar["Sources"]),
        "networks": ", ".join(str(digest)[:_DIGITS] for digest in networks) if isinstance(networks, list) else DASH,
        "label map": str(label_map.get("Name")) if isinstance(label_map, dict) else DASH,
        **{name.lower(): str(sidecar.get(name, DASH)) for name in ("Samples", "Seed", "Precision", "Version")},
    }


def _embedded(volumes: Volumes, most_uncertain: float) -> dict[str, Any]:
    """What viewer.js shows: NIfTI files in base64, and the colours and names of the classes."""
    arrays = {"image": (volumes.image & _GREYS, 1.0), "classes": (volumes.classes, 1.0)}
    if volumes.uncertainty is not None:
        arrays["uncertainty"] = volumes.uncertainty, volumes.slope
    red, green, blue = zip(*(klass.rgb for klass in volumes.klasses), strict=True)
    n_classes = len(volumes.klasses)
    return {
        "volumes": [
            {"kind": kind, "base64": _nifti(array, volumes.affine, slope), "most": most_uncertain}
            for kind, (array, slope) in arrays.items()
        ],
        "labels": {"R": red, "G": green, "B": blue, "A": [0, *[255] * (n_classes - 1)], "I": [*range(n_classes)],
                   "labels": [klass.name for klass in volumes.klasses]},
        "map": volumes.map_name.replace("_", " "),
    }  # fmt: skip


def _nifti(array: np.ndarray, affine: np.ndarray, slope: float) -> str:
    image = nib.Nifti1Image(array, affine, dtype=np.uint8)
    image.header.set_slope_inter(slope, 0)
    image.header.set_xyzt_units("mm")
    return base64.b64encode(gzip.compress(image.to_bytes(), compresslevel=6, mtime=0)).decode()
