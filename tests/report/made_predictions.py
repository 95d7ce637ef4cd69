"""A folder as `dwc predict` leaves it, made by hand: scans of a bright box with two classes in it."""

import hashlib
import json
from pathlib import Path

import nibabel
import numpy as np

from dwc.base.tsv import as_tsv
from dwc.scan_table import Row, scan_table

LIA = np.array([[-1.0, 0, 0, 0], [0, 0, 1, 0], [0, -1, 0, 0], [0, 0, 0, 1]])
UNITS = ("volume_mm3", "sd_mm3", "entropy")


class Classes:
    """What the table of scans asks of a label map."""

    titles = ("background", "Thalamus", "Hippocampus")


def write_cohort(folder: Path, names: list[str], *, failed: dict[str, str] | None = None) -> Path:
    """Scans with a thalamus of 1000, 1010, 1020 ... mm3; `failed` are names and reasons."""
    rows = [Row(name, "failed", (reason,), []) for name, reason in (failed or {}).items()]
    for number, name in enumerate(names):
        rows.append(write_scan(folder, name, 1000.0 + 10 * number))
    (folder / "volumes.tsv").write_bytes(scan_table(rows, Classes()))
    return folder


def write_scan(folder: Path, name: str, thalamus: float, *, affine: np.ndarray = LIA, flag: str = "pass") -> Row:
    """The results of a scan, and beside them the scan itself; returns its row of the table."""
    stem = folder / name
    stem.parent.mkdir(parents=True, exist_ok=True)
    image, labels = np.zeros((32, 24, 28), np.int16), np.zeros((32, 24, 28), np.int16)
    image[4:28, 4:20, 4:24] = 500
    labels[10:15, 8:16, 8:20], labels[15:18, 8:16, 8:20] = 10, 17
    entropy = (labels > 0).astype(np.uint8) * 200
    scan = stem.with_name(f"{stem.name}_T1w.nii.gz")
    nibabel.save(nibabel.Nifti1Image(image, affine), scan)
    nibabel.save(nibabel.Nifti1Image(labels, affine), stem.with_name(f"{stem.name}_dseg.nii.gz"))
    uncertain = nibabel.Nifti1Image(entropy, affine)
    uncertain.header.set_slope_inter(0.005, 0)
    nibabel.save(uncertain, stem.with_name(f"{stem.name}_entropy.nii.gz"))
    table = [(0, "background", "#000000", "n/a", "n/a"), (17, "Hippocampus", "#aa4fb0", "both", "17,53"),
             (10, "Thalamus", "#4477dd", "both", "10,49")]  # fmt: skip
    header = ("index", "name", "color", "side", "freesurfer_ids")
    stem.with_name(f"{stem.name}_dseg.tsv").write_bytes(as_tsv(header, table))
    values = {"total": (thalamus + 500, 7.0, 0.3), "Thalamus": (thalamus, 5.0, 0.25), "Hippocampus": (500.0, 2.0, 0.4)}
    structures = [{"name": key, **dict(zip(UNITS, three, strict=True))} for key, three in values.items()]
    reasons = ["noise is 0.40 of the tissue's range of intensities"] if flag == "check" else []
    sidecar = {
        "Sources": [scan.name],
        "Networks": ["ab" * 32],
        "LabelMap": {"Name": "two"},
        "Samples": 10,
        "Version": "0.1.0",
        "Conformed": False,
        "Maps": ["entropy"],
        "SHA256": {"Source": hashlib.sha256(scan.read_bytes()).hexdigest()},
        "Quality": {"Flag": flag, "Reasons": reasons, "Measures": {"noise": 0.4 if flag == "check" else 0.1}},
        "Structures": structures,
    }
    stem.with_name(f"{stem.name}_dseg.json").write_text(json.dumps(sidecar))
    return Row(name, flag, tuple(reasons), structures)
