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

__all__ = ["has_split", "images_in_bids", "is_segmentation", "scans_in_folder"]

_NIFTI = re.compile(r"(.+)\.nii(\.gz)?", re.IGNORECASE)
_VOLUMES = (".nii.gz", ".nii", ".mgz", ".mgh")
_SEGMENTATIONS = ("_dseg", "_seg", "_aparc+aseg", "_aseg", "_labels", "_label")  # in a plain folder
_TEMPLATE = ("space", "cohort", "res")  # entities of what was resampled
_OF_VERSIONS = ("desc", "seg", "atlas", "label")  # entities that one scan's images and segmentations may differ in
_NATIVE = (("space", "orig"), ("space", "T1w"), ("space", "individual"))  # the scan's own space
_DEPTH = 3  # of folders below derivatives/ that are searched for pipelines
_NOT_MAGNITUDE = ("phase", "real", "imag")  # values of the entity part
_FIRST_CHOICE = (None, "preproc")  # descriptions of an image: as it was scanned, or prepared; others need a choice
_ALL_STRUCTURES = "aparcaseg"  # description of the segmentation with all structures


Identity = frozenset[tuple[str, str]]  # entities that tell one scan from another


@dataclass(frozen=True)
class _File:
    """A volume of a BIDS data set and what its name says."""

    path: Path
    entities: dict[str, str]
    suffix: str

    @property
    def identity(self) -> Identity:
        """What an image and its segmentation share."""
        return frozenset(
            (name, value)
            for name, value in self.entities.items()
            if name not in _OF_VERSIONS and (name, value) not in _NATIVE
        )

    def is_of(self, image: Identity) -> bool:
        """Whether a segmentation's entities, or fewer than the image's, are those of an image."""
        names = {name for name, _ in image}
        return frozenset(pair for pair in self.identity if pair[0] != "res" or "res" in names) <= image


def scans_in_folder(path: Path, *, lenient: bool = False) -> list[Scan]:
    """The scans of a folder, in the order of their names; their part of the split as participants.tsv says, or train.

    In a BIDS data set, `sub-*/[ses-*/]anat/*_T1w.nii[.gz]` are the images, one for each set of entities but `desc`. The
    labels are the `*_dseg.nii[.gz]` beside them, or else below `derivatives/`, also FreeSurfer's `aparc+aseg.mgz`; the
    pipeline's own image is taken with them, as their voxels are its. Labels may have fewer entities than the image.
    Images in a template's space are left out where the scan that they were made from is there too. A folder without
    `sub-*` is taken as plain: all its volumes are images, but for the segmentations (`*_dseg`, `*_seg`, ...) of others.

    `lenient` keeps ambiguous scans, with their `fault`, instead of refusing the folder.
    """
    try:
        subjects = [folder for folder in sorted(path.glob("sub-*")) if folder.is_dir()]
        return _from_bids(path, subjects, lenient) if subjects else _from_plain(path)
    except OSError as error:
        raise unreadable(path, error, "check its permissions") from error


def images_in_bids(path: Path) -> list[tuple[Path, str]]:
    """The images of a BIDS data set as they were scanned, and why one cannot be chosen; none in a plain folder."""
    subjects = [folder for folder in sorted(path.glob("sub-*")) if folder.is_dir()]
    images = _group(_volumes(path, subjects))
    chosen: dict[Path, tuple[Path, str]] = {}
    for identity in sorted(images, key=lambda identity: images[identity][0].path):
        if _is_resampled(identity, images):
            continue
        try:
            image, fault = _choose_image(images[identity]), ""
        except InputError as error:
            image, fault = images[identity][0].path, str(error)
        chosen.setdefault(image.resolve(), (image, fault))
    return list(chosen.values())


def is_segmentation(stem: str, stems: Iterable[str]) -> bool:
    """Whether a volume of a plain folder is a segmentation by its name, its own or one of the other volumes'."""
    return stem.endswith("_dseg") or _segmented(stem, stems)


def has_split(path: Path) -> bool:
    """Whether the folder's participants.tsv has a column split."""
    return "split" in _participants(path)[0]


def _from_bids(path: Path, subjects: list[Path], lenient: bool) -> list[Scan]:
    files = _volumes(path, subjects)
    images = _group(files)
    sources = [files, *_derivatives(path)]
    columns, participants = _participants(path)
    scans: dict[Path, Scan] = {}
    for identity in sorted(images, key=lambda identity: images[identity][0].path):
        if _is_resampled(identity, images):
            continue
        first = images[identity][0].path
        label, fault = None, ""
        try:
            image = _choose_image(images[identity])
            label, beside = _find_label(image, identity, sources)
            image = beside or image
        except InputError as error:
            if not lenient:
                raise
            image, fault = first, str(error)
        subject = subject_of(image) or image.name
        row = participants.get(plain_name(subject), {})
        site, split = row.get("site", ""), row.get("split", "")
        if "split" in columns and split not in SPLITS:
            raise InputError(f"{path / 'participants.tsv'}: split of {subject} is {split!r}; write train or test")
        site = path.resolve().name if is_missing(site) else site
        remark = "" if label or fault else _unfitting(identity, images, sources)
        scan = Scan(image, label, subject, site, "test" if split == "test" else "train", fault, remark)
        shown = scans.get(image.resolve())
        if shown is None or (shown.image.is_symlink() and not image.is_symlink()):
            scans[image.resolve()] = scan
    return list(scans.values())


def _find_label(image: Path, identity: Identity, sources: list[list[_File]]) -> tuple[Path | None, Path | None]:
    """The segmentation of an image, and the image that lies beside it in a pipeline's results."""
    beside, *derived = sources
    by_place = [beside], [files for files in derived if not _is_freesurfer(files)], derived
    for place, groups in enumerate(by_place):
        fit = [(file, files) for files in groups for file in files if file.suffix == "dseg" and file.is_of(identity)]
        closest = max((len(file.identity) for file, _ in fit), default=0)
        fit = [(file, files) for file, files in fit if len(file.identity) == closest]
        if label := _choose_label(image, [file for file, _ in fit]):
            own, files = next((file, files) for file, files in fit if file.path == label)
            theirs = [
                file
                for file in _group(files).get(own.identity, [])
                if place and file.entities.get("desc") in _FIRST_CHOICE
            ]
            return label, _choose_image(theirs) if theirs else None
    return None, None


def _unfitting(identity: Identity, images: dict[Identity, list[_File]], sources: list[list[_File]]) -> str:
    """What to say of a scan whose subject has segmentations that fit no image."""
    subject = dict(identity).get("sub")
    lost = sorted(
        file.path.name
        for files in sources
        for file in files
        if file.suffix == "dseg" and file.entities.get("sub") == subject and not any(map(file.is_of, images))
    )
    return (
        f"has no label; {', '.join(lost[:3])} fits no image by its name, rename it or write a manifest" if lost else ""
    )


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
    segmentations = {stem for stem in volumes if is_segmentation(stem, volumes)}
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
            places = [part for part in folder.relative_to(path).parts if "-" in part]
            entities = dict(pair.split("-", 1) for pair in (*places, *pairs) if "-" in pair)
            if entities.get("part") not in _NOT_MAGNITUDE:
                found.setdefault((folder.resolve(), file.name), _File(file, entities, suffix))
    return list(found.values())


def _derivatives(path: Path) -> list[list[_File]]:
    """The volumes of each pipeline below derivatives/."""
    results = []
    for pipeline in _pipelines(path / "derivatives", _DEPTH):
        subjects = [folder for folder in sorted(pipeline.glob("sub-*")) if folder.is_dir()]
        results += [_volumes(pipeline, subjects), _of_freesurfer(subjects)]
    return results


def _pipelines(folder: Path, depth: int) -> list[Path]:
    """Folders that hold subjects."""
    if not folder.is_dir():
        return []
    inner = [one for one in sorted(folder.iterdir()) if one.is_dir() and not one.name.startswith((".", "sub-"))]
    below = [found for one in inner for found in _pipelines(one, depth - 1)] if depth else []
    return [folder, *below] if any(folder.glob("sub-*")) else below


def _of_freesurfer(subjects: list[Path]) -> list[_File]:
    """The segmentation of all structures of each subject of a FreeSurfer folder, and the image that it lies on."""
    files = []
    for subject in subjects:
        entities = dict(pair.split("-", 1) for pair in subject.name.split("_") if "-" in pair)
        for name, suffix in (("aparc+aseg.mgz", "dseg"), ("orig.mgz", "T1w")):
            if (file := subject / "mri" / name).is_file():
                files.append(_File(file, entities, suffix))
    return files


def _is_freesurfer(files: list[_File]) -> bool:
    return bool(files) and files[0].path.parent.name == "mri"


def _group(files: Iterable[_File]) -> dict[Identity, list[_File]]:
    """The images, by what tells one scan from another."""
    groups = defaultdict(list)
    for file in files:
        if file.suffix == "T1w":
            groups[file.identity].append(file)
    return dict(groups)


def _is_resampled(identity: Identity, images: dict[Identity, list[_File]]) -> bool:
    """Whether an image is another one of the folder brought to a template's space, and so no scan of its own."""
    native = frozenset(pair for pair in identity if pair[0] not in _TEMPLATE)
    return native != identity and native in images


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
    """Columns and rows by `plain_name` of participants.tsv, a derivatives folder's or its raw data set's."""
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
