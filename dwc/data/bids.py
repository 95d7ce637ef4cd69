"""Scans of a folder: a BIDS data set, raw or derivatives, or a plain folder of volumes.

Only names are read here, so that a data set without dataset_description.json, with links to sessions or with files
that BIDS does not know is taken as it is.
"""

import csv
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from dwc.base.errors import InputError
from dwc.data.paths import unreadable
from dwc.data.scan import SPLITS, Scan, is_missing
from dwc.data.subjects import plain_name, subject_of

__all__ = ["has_split", "scans_in_folder"]

_NIFTI = re.compile(r"(.+)\.nii(\.gz)?", re.IGNORECASE)
_VOLUMES = (".nii.gz", ".nii", ".mgz", ".mgh")
_SEGMENTATIONS = ("_dseg", "_seg", "_aparc+aseg", "_aseg", "_labels", "_label")  # in a plain folder
_TEMPLATE = ("space", "cohort", "res")  # entities of what was resampled
_NOT_MAGNITUDE = ("phase", "real", "imag")  # values of the entity part
_FIRST_CHOICE = (None, "preproc")  # descriptions of an image: as it was scanned, or prepared; others need a choice
_ALL_STRUCTURES = "aparcaseg"  # description of the segmentation with all structures

Key = tuple[str, frozenset[tuple[str, str]]]  # folder below the data set, entities but desc


@dataclass(frozen=True)
class _File:
    """A volume of a BIDS data set and what its name says."""

    path: Path
    folder: str  # sub-*/[ses-*/]anat
    entities: dict[str, str]
    suffix: str

    @property
    def key(self) -> Key:
        """What an image and its segmentation share."""
        return self.folder, frozenset((name, value) for name, value in self.entities.items() if name != "desc")


def scans_in_folder(path: Path) -> list[Scan]:
    """The scans of a folder, in the order of their names; their part of the split as participants.tsv says, or train.

    In a BIDS data set, `sub-*/[ses-*/]anat/*_T1w.nii[.gz]` are the images, one for each set of entities but `desc`. The
    labels are the `*_dseg.nii[.gz]` beside them, or else below `derivatives/`, whose own image is taken then: its
    voxels are those of the labels. Images in a template's space are left out where the scan that they were made from is
    there too. A folder without `sub-*` is taken as plain: all its volumes are images, but for the `*_dseg` of another.
    """
    try:
        subjects = [folder for folder in sorted(path.glob("sub-*")) if folder.is_dir()]
        return _from_bids(path, subjects) if subjects else _from_plain(path)
    except OSError as error:
        raise unreadable(path, error, "check its permissions") from error


def has_split(path: Path) -> bool:
    """Whether the folder's participants.tsv has a column split."""
    return "split" in _participants(path)[0]


def _from_bids(path: Path, subjects: list[Path]) -> list[Scan]:
    images = _group(file for file in _volumes(path, subjects) if file.suffix == "T1w")
    labels = _group(file for file in _volumes(path, subjects) if file.suffix == "dseg")
    derived = [(_group(files, "T1w"), _group(files, "dseg")) for files in _derivatives(path)]
    columns, participants = _participants(path)
    scans = []
    for key in sorted(images, key=lambda key: images[key][0].path):
        if _is_resampled(key, images):
            continue
        image = _choose_image(images[key])
        label = _choose_label(image, labels.get(key, []))
        if label is None:
            found = [(theirs.get(key), label) for theirs, there in derived for label in there.get(key, [])]
            label = _choose_label(image, [file for _, file in found])
            beside = next((theirs for theirs, file in found if file.path == label), None)
            image = _choose_image(beside) if beside else image
        subject = subject_of(image) or image.name
        row = participants.get(plain_name(subject), {})
        site, split = row.get("site", ""), row.get("split", "")
        if "split" in columns and split not in SPLITS:
            raise InputError(f"{path / 'participants.tsv'}: split of {subject} is {split!r}; write train or test")
        site = path.resolve().name if is_missing(site) else site
        scans.append(Scan(image, label, subject, site, "test" if split == "test" else "train"))
    return scans


def _from_plain(path: Path) -> list[Scan]:
    files = defaultdict(list)
    for file in sorted(path.iterdir()):
        extension = next((end for end in _VOLUMES if file.name.lower().endswith(end)), None)
        if extension and not file.name.startswith("."):
            files[file.name[: -len(extension)]].append(file)
    for named in files.values():
        if len(named) > 1:
            names = ", ".join(file.name for file in named)
            raise InputError(f"{path}: several files of one name ({names}); keep one, or write a manifest")
    volumes = {stem: file for stem, (file,) in files.items()}
    segmentations = {stem for stem in volumes if stem.endswith("_dseg") or _segmented(stem, volumes)}
    scans = []
    for stem, file in volumes.items():
        if stem in segmentations:
            continue
        fit = [volumes[name] for name in sorted(segmentations) if _segmented(name, [stem])]
        if len(fit) > 1:
            names = ", ".join(label.name for label in fit)
            raise InputError(f"{file}: several segmentations fit ({names}); keep one, or write a manifest")
        subject = subject_of(Path(file.name)) or stem
        scans.append(Scan(file, fit[0] if fit else None, subject, path.resolve().name, "train"))
    return scans


def _segmented(stem: str, images: Iterable[str]) -> bool:
    """Whether a file's name says that it is the segmentation of one of the images."""
    owner = next((stem.removesuffix(end) for end in _SEGMENTATIONS if stem.endswith(end)), None)
    return owner is not None and any(image.removesuffix("_T1w") == owner.removesuffix("_T1w") for image in images)


def _volumes(path: Path, subjects: Iterable[Path]) -> list[_File]:
    """The volumes in anat folders; those that a linked folder shows again are left out."""
    found: dict[tuple[Path, str], _File] = {}
    folders = [anat for subject in subjects for anat in (subject / "anat", *sorted(subject.glob("ses-*/anat")))]
    for folder in sorted(folders, key=lambda folder: (folder.resolve() != folder.absolute(), folder)):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.name.startswith(".") or not (name := _NIFTI.fullmatch(file.name)):
                continue
            *pairs, suffix = name[1].split("_")
            entities = dict(pair.split("-", 1) for pair in pairs if "-" in pair)
            if entities.get("part") not in _NOT_MAGNITUDE:
                parsed = _File(file, str(folder.relative_to(path)), entities, suffix)
                found.setdefault((folder.resolve(), file.name), parsed)
    return list(found.values())


def _derivatives(path: Path) -> list[list[_File]]:
    """The volumes of each pipeline below derivatives/."""
    root = path / "derivatives"
    pipelines = [root, *sorted(root.glob("*"))] if root.is_dir() else []
    subjects = [(pipeline, sorted(pipeline.glob("sub-*"))) for pipeline in pipelines if pipeline.is_dir()]
    return [_volumes(pipeline, theirs) for pipeline, theirs in subjects if not pipeline.name.startswith("sub-")]


def _group(files: Iterable[_File], suffix: str | None = None) -> dict[Key, list[_File]]:
    groups = defaultdict(list)
    for file in files:
        if suffix in (None, file.suffix):
            groups[file.key].append(file)
    return dict(groups)


def _is_resampled(key: Key, images: dict[Key, list[_File]]) -> bool:
    """Whether an image is another one of the folder brought to a template's space, and so no scan of its own."""
    folder, entities = key
    native = frozenset(pair for pair in entities if pair[0] not in _TEMPLATE)
    return native != entities and (folder, native) in images


def _choose_image(files: list[_File]) -> Path:
    """The one of several versions of a scan that networks are meant to see."""
    for description in _FIRST_CHOICE:
        files_here = [file for file in files if file.entities.get("desc") == description]
        if len(files_here) == 1:
            return files_here[0].path
        if files_here:
            break
    if len(files) > 1:
        names = ", ".join(sorted(file.path.name for file in files))
        raise InputError(f"{files[0].path.parent}: several images of one scan ({names}); keep one, or write a manifest")
    return files[0].path


def _choose_label(image: Path, files: list[_File]) -> Path | None:
    if len(files) > 1:
        preferred = [file for file in files if file.entities.get("desc") == _ALL_STRUCTURES]
        if len(preferred) != 1:
            names = ", ".join(file.path.name for file in files)
            raise InputError(
                f"{image}: several segmentations fit ({names}); keep one, or name one desc-{_ALL_STRUCTURES}"
            )
        files = preferred
    return files[0].path if files else None


def _participants(path: Path) -> tuple[list[str], dict[str, dict[str, str]]]:
    """Columns and rows by `plain_name` of participants.tsv, of a derivatives folder the raw data set's where it has none."""
    file = path / "participants.tsv"
    resolved = path.resolve()
    if not file.is_file() and resolved.parent.name == "derivatives":
        file = resolved.parent.parent / "participants.tsv"
    if not file.is_file():
        return [], {}
    try:
        lines = list(csv.reader(file.read_text(encoding="utf-8-sig").splitlines(), delimiter="\t"))
    except OSError as error:
        raise unreadable(file, error) from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file}: not a tab-separated table in UTF-8 ({error}); repair or remove it") from error
    columns = [name.strip().casefold() for name in lines[0]] if lines else []
    if "participant_id" not in columns:
        raise InputError(f"{file}: has no column participant_id; separate columns by tabs, or remove the file")
    rows: dict[str, dict[str, str]] = {}
    for cells in lines[1:]:
        row = dict(zip(columns, (cell.strip() for cell in cells), strict=False))
        if subject := row.get("participant_id"):
            used = {name: row.get(name, "") for name in ("site", "split")}
            if rows.setdefault(plain_name(subject), used) != used:
                raise InputError(
                    f"{file}: {subject} is listed twice, with other sites or splits; list each participant once"
                )
    return columns, rows
