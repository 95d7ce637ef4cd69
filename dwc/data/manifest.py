"""Manifests: which scans there are, whose they are, and whether they train or test.

A manifest is a CSV or a BIDS-derivatives folder. This room finds the files and fixes the split; it opens no volume.
"""

import csv
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from dwc.base.errors import InputError

__all__ = ["Scan", "as_csv", "has_split_column", "read_manifest"]

_COLUMNS = ("image", "label", "subject", "site", "split")
_SPLITS = ("train", "test")
_TEMPLATE = ("space-", "cohort-", "res-")  # entities of what was resampled
_PREFERRED = "aparcaseg"  # the segmentation with all structures, where derivatives hold several


@dataclass(frozen=True)
class Scan:
    """One T1 image, its label volume (None where there is none), whose it is, and its part of the split."""

    image: Path
    label: Path | None
    subject: str
    site: str
    split: Literal["train", "test"]


def read_manifest(path: str | os.PathLike, *, seed: int = 0, test_fraction: float = 0.1) -> list[Scan]:
    """Read the scans of a manifest, in its order.

    Parameters
    ----------
    path : path
        A CSV with the columns `image,label[,subject,site,split]`, whose paths are relative to the CSV's folder; or a
        BIDS-derivatives folder, in which `sub-*/[ses-*/]anat/*_T1w.nii.gz` are the images and the `*_dseg.nii.gz` that
        agree with them in every entity but `desc` the labels (`desc-aparcaseg` where there are several). Images in a
        template's space are left out where the scan that they were made from is there too. An empty label is a scan for
        prediction only. A missing subject is read from `sub-...` in the path of the image, or else is the image's name,
        which then must not stand in two folders. A missing site is the name of the manifest's folder.
    seed : int
        Fixes the split. Not used where there is a split column.
    test_fraction : float
        Part of the subjects to test on, on average; 0: none. A subject is in one part of the split with all its scans;
        the same name at two sites is the same subject.

    Raises
    ------
    InputError
        The manifest is missing, unreadable, empty, or has unknown columns; a file it names is missing; an image is
        listed twice; a subject is in both parts of the split; a split is neither train nor test; two images in
        different folders have the same name and no subject.

    Notes
    -----
    Without a split column, seed and name give each subject a number in 0..1 (SHA-256), and those below `test_fraction`
    are for testing. No part stays empty: where all are below it, the subject of the largest number is for training
    (a single subject always is); where none is, that of the smallest is for testing.

    So a subject's part follows from its own name, and scans added later move nobody from training to testing, but for
    one who was for training only because all were below `test_fraction`.
    """
    path = Path(path)
    if not 0 <= test_fraction < 1:
        raise InputError(
            f"test fraction {test_fraction} is not a part of the subjects; give a number from 0 to below 1"
        )
    if path.is_dir():
        scans, split_is_given = _from_bids(path), False
    else:
        scans, split_is_given = _from_csv(path)
    if not scans:
        what = "*_T1w.nii.gz in sub-*/[ses-*/]anat" if path.is_dir() else "rows"
        raise InputError(f"{path}: the manifest is empty, it has no {what}; list at least one scan")
    if not split_is_given:
        return _split_by_subject(scans, seed, test_fraction)
    for subject, splits in _group(scans, lambda scan: scan.subject, lambda scan: scan.split).items():
        if len(set(splits)) > 1:
            raise InputError(f"{path}: subject {subject} is in both train and test; give each subject one split")
    return scans


def as_csv(scans: Iterable[Scan]) -> bytes:
    """A manifest of the scans with absolute paths, which `read_manifest` reads as they are, split and all."""
    rows = [[scan.image.absolute(), scan.label and scan.label.absolute(), scan.subject, scan.site, scan.split]
            for scan in scans]  # fmt: skip
    table = io.StringIO()
    csv.writer(table, lineterminator="\n").writerows([_COLUMNS, *rows])
    return table.getvalue().encode()


def has_split_column(path: str | os.PathLike) -> bool:
    """Whether a manifest fixes the split itself, rather than leaving it to the seed."""
    return not Path(path).is_dir() and "split" in _read_csv(Path(path))[0]


def _from_csv(path: Path) -> tuple[list[Scan], bool]:
    header, rows = _read_csv(path)
    scans: list[Scan] = []
    line_of: dict[Path, int] = {}
    namesake: dict[str, Path] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        if not row["image"]:
            raise InputError(f"{where}: the image is empty; name a file")
        for column in ("image", "label"):
            if row.get(column) and not (path.parent / row[column]).is_file():
                raise InputError(f"{where}: {column} {path.parent / row[column]} does not exist; paths are relative to "
                                 f"the manifest's folder")  # fmt: skip
        image = path.parent / row["image"]
        first = line_of.setdefault(image.resolve(), line)
        if first != line:
            raise InputError(f"{where}: image {row['image']} is already on line {first}; list each image once")
        if "split" in header and row["split"] not in _SPLITS:
            raise InputError(f"{where}: split is {row['split']!r}; write train or test, or leave the column out")
        subject = row.get("subject") or _bids_subject(Path(row["image"]))
        if not subject:
            subject = image.name.split(".")[0]
            other = namesake.setdefault(subject, image)
            if other.parent.resolve() != image.parent.resolve():
                raise InputError(f"{where}: {image} and {other} would both be subject {subject}, after their file "
                                 f"names; add a subject column")  # fmt: skip
        scans.append(
            Scan(
                image=image,
                label=path.parent / row["label"] if row.get("label") else None,
                subject=subject,
                site=row.get("site") or path.resolve().parent.name,
                split=row.get("split", "train"),
            )
        )
    return scans, "split" in header


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Header, and (line number, cells by column) of each row that is not blank."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, strict=True)
            lines = [
                (reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))
            ]
    except OSError as error:
        raise InputError(f"{path}: cannot read the manifest ({error.strerror}); give a CSV or a BIDS folder") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(
            f"{path}: not a CSV in UTF-8 ({error}); give a CSV with columns {','.join(_COLUMNS)}"
        ) from error
    if not lines:
        raise InputError(f"{path}: the manifest is empty; give a CSV with columns {','.join(_COLUMNS)}")
    header = lines[0][1]
    unknown = [column for column in header if column not in _COLUMNS]
    if unknown or "image" not in header or len(set(header)) < len(header):
        wrong = f"unknown columns {', '.join(map(repr, unknown))}" if unknown else f"columns {','.join(header)}"
        raise InputError(f"{path}: {wrong}; the columns are image,label[,subject,site,split], each once")
    for line, cells in lines[1:]:
        if len(cells) != len(header):
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells, not {len(header)}; quote cells that hold commas"
            )
    return header, [(line, dict(zip(header, cells, strict=True))) for line, cells in lines[1:]]


def _from_bids(path: Path) -> list[Scan]:
    images = sorted(path.glob("sub-*/anat/*_T1w.nii.gz")) + sorted(path.glob("sub-*/ses-*/anat/*_T1w.nii.gz"))
    folders = {image.parent for image in images}
    labels = _group(
        (label for folder in sorted(folders) for label in sorted(folder.glob("*_dseg.nii.gz"))), _acquisition
    )
    site = path.resolve().name
    acquisitions = {_acquisition(image) for image in images}
    return [
        Scan(image, _choose(image, labels.get(_acquisition(image), [])), _bids_subject(image), site, "train")
        for image in sorted(images)
        if not _is_resampled(image, acquisitions)
    ]


def _is_resampled(image: Path, acquisitions: set) -> bool:
    """Whether an image is another one of the folder brought to a template's space, and so no scan of its own."""
    folder, entities = _acquisition(image)
    native = frozenset(entity for entity in entities if not entity.startswith(_TEMPLATE))
    return native != entities and (folder, native) in acquisitions


def _acquisition(path: Path) -> tuple[Path, frozenset[str]]:
    """What a BIDS image and its segmentation share: the folder and all entities but `desc`."""
    *entities, _suffix = path.name.split("_")
    return path.parent, frozenset(entity for entity in entities if not entity.startswith("desc-"))


def _choose(image: Path, labels: list[Path]) -> Path | None:
    if len(labels) > 1:
        preferred = [label for label in labels if f"_desc-{_PREFERRED}_" in label.name]
        if len(preferred) != 1:
            names = ", ".join(label.name for label in labels)
            raise InputError(f"{image}: several segmentations fit ({names}); keep one, or name one desc-{_PREFERRED}")
        labels = preferred
    return labels[0] if labels else None


def _bids_subject(image: Path) -> str | None:
    for part in reversed(image.parts):
        if part.startswith("sub-"):
            return part.split("_")[0].split(".")[0]
    return None


def _split_by_subject(scans: list[Scan], seed: int, test_fraction: float) -> list[Scan]:
    subjects = sorted({scan.subject for scan in scans}, key=lambda subject: _number(subject, seed))
    n_test = sum(_number(subject, seed) < test_fraction for subject in subjects)
    if test_fraction:
        n_test = min(max(1, n_test), len(subjects) - 1)
    test = set(subjects[:n_test])
    return [replace(scan, split="test" if scan.subject in test else "train") for scan in scans]


def _number(subject: str, seed: int) -> float:
    """A number in 0..1 that is the subject's own, as good as drawn at random."""
    digest = hashlib.sha256(f"{seed} {subject}".encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64


def _group(items, key, value=lambda item: item) -> dict:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(value(item))
    return groups
