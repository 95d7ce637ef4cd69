"""The scans that a user means: files, folders, BIDS data sets, patterns and lists of them. No volume is opened."""

import glob
import os
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from dwc.base.errors import InputError
from dwc.data.bids import images_in_bids, is_segmentation
from dwc.data.manifest import read_manifest
from dwc.data.paths import check_printable, existing_file, unreadable
from dwc.prediction_settings import MAPS

__all__ = ["EXTENSIONS", "GivenScan", "find_scan", "given_scans", "stem_of"]

EXTENSIONS = (".nii.gz", ".nii", ".mgz", ".mgh", ".img.gz", ".img", ".hdr.gz", ".hdr")
_LEFT_OUT = EXTENSIONS[:3]  # may be left out
_IN_FOLDERS = EXTENSIONS[:4]  # in a folder, of a pair neither file is looked for
_TABLES = (".csv", ".tsv")
_LISTS = (".txt", ".list", ".lst")
# BIDS suffixes of volumes that are no T1 image
_OTHER = re.compile(
    r".*_(T2w|FLAIR|PDw?|PDT2|T2star|T2starw|T[12]map|angio|bold|sbref|cbv|dwi|epi|fieldmap|phase\w*|magnitude\d?|asl|"
    r"m0scan|pet|MEGRE|mask|probseg)",
    re.DOTALL,
)


@dataclass(frozen=True)
class GivenScan:
    """A scan, where its results go below the output folder, and, if it cannot be used, why."""

    image: Path
    folder: Path = Path()
    fault: str = ""


def find_scan(path: str | Path) -> Path:
    """The scan's file; its extension may be left out."""
    path = Path(path)
    check_printable(str(path))
    try:
        for candidate in (path, *(path.with_name(path.name + extension) for extension in _LEFT_OUT)):
            if candidate.is_file() or candidate.is_symlink():
                return existing_file(candidate)
        is_folder = path.is_dir()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error
    if is_folder:
        raise InputError(f"{path}: is a folder; give scans")
    raise InputError(f"{path}: no such file, with or without {', '.join(_LEFT_OUT)}; check the path")


def given_scans(given: Iterable[str | Path], out: Path) -> list[GivenScan]:
    """The scans that are meant, in the order given; those of a folder, pattern or table in the order of their names.

    Parameters
    ----------
    given : iterable of path
        Scans, with or without extension. A folder: the `*_T1w` images of a BIDS data set, `mri/orig.mgz` of subjects of
        FreeSurfer, or all volumes at any depth but for segmentations, results and images whose BIDS suffix is not T1w.
        A pattern (`*`, `?`, `[...]`, `**`). A text file with one of these per line, relative to it, or a manifest.
    out : path
        The output folder, in which no scans are looked for.

    Results of a scan that lies below a folder, the fixed part of a pattern or the folder of a list lie likewise below
    the output folder; those of other scans lie in it.
    """
    scans = [scan for path in given for scan in _expanded(Path(path), out)]
    if not scans:
        raise InputError("no scan: give NIfTI or mgz files, folders, a BIDS data set or a list of them")
    if all(scan.fault for scan in scans):
        raise InputError(scans[0].fault + (f" (and {len(scans) - 1} more)" if len(scans) > 1 else ""))
    return scans


def stem_of(scan: Path) -> str:
    """The name of a scan without its extension and `_T1w`."""
    extension = next((end for end in EXTENSIONS if scan.name.lower().endswith(end)), scan.suffix)
    return scan.name[: len(scan.name) - len(extension)].removesuffix("_T1w")


def _expanded(path: Path, out: Path) -> Iterator[GivenScan]:
    try:
        check_printable(str(path))
        if path.is_dir():
            yield from _in_folder(path, out)
        elif path.suffix.lower() in _TABLES and path.is_file():
            for scan in read_manifest(path, test_fraction=0, lenient=True):
                yield GivenScan(scan.image, _below(scan.image, path.parent), scan.fault)
        elif path.suffix.lower() in _LISTS and path.is_file():
            yield from _in_list(path, out)
        elif glob.has_magic(str(path)) and not path.exists():
            yield from _by_pattern(path, out)
        else:
            yield GivenScan(find_scan(path))
    except InputError as error:
        yield GivenScan(path, fault=str(error))
    except (OSError, ValueError) as error:
        yield GivenScan(path, fault=str(unreadable(path, error, "check its permissions")))


def _in_list(path: Path, out: Path) -> Iterator[GivenScan]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: this list is not UTF-8 text; write one path per line") from error
    entries = [path.parent / line for line in lines if line and not line.startswith("#")]
    if not entries:
        raise InputError(f"{path}: the list is empty; write one path per line")
    for entry in entries:
        if entry.suffix.lower() in (*_LISTS, *_TABLES):
            raise InputError(f"{path}: names another list, {entry}; list scans and folders")
        for scan in _expanded(entry, out):
            yield GivenScan(scan.image, _below(scan.image, path.parent), scan.fault)


def _by_pattern(pattern: Path, out: Path) -> Iterator[GivenScan]:
    root = next(folder for folder in pattern.parents if not glob.has_magic(str(folder)))
    matches = [Path(match) for match in sorted(glob.glob(str(pattern), recursive=True))]
    scans = {folder: _scans_among(os.listdir(folder)) for folder in {match.parent for match in matches}}
    chosen = [match for match in matches if match.is_dir() or match.name in scans[match.parent]]
    if not chosen:
        raise InputError(f"{pattern}: matches no scan; check the pattern")
    for match in chosen:
        for scan in _expanded(match, out):
            yield GivenScan(scan.image, _below(scan.image, root), scan.fault)


def _in_folder(root: Path, out: Path) -> Iterator[GivenScan]:
    images = images_in_bids(root) or list(_in_plain_folder(root, out))
    if not images:
        raise InputError(
            f"{root}: holds no scan, no *_T1w image of a BIDS data set and no other volume; check the path"
        )
    for image, fault in images:
        yield GivenScan(image, _below(image, root), fault)


def _in_plain_folder(root: Path, out: Path) -> Iterator[tuple[Path, str]]:
    """Volumes at any depth, and why one cannot be used."""
    seen: set[str] = set()
    is_inside_out = os.path.realpath(root) != os.path.realpath(out)
    for folder, inner, names in os.walk(root, followlinks=True, onerror=_refuse):
        real = os.path.realpath(folder)
        if real in seen or (is_inside_out and real == os.path.realpath(out)):
            inner.clear()
            continue
        seen.add(real)
        if os.path.basename(folder) == "mri" and "orig.mgz" in names:  # FreeSurfer's
            inner.clear()
            names = ["orig.mgz"]
        inner[:] = sorted(name for name in inner if not name.startswith("."))
        yield from _images(Path(folder), names)


def _images(folder: Path, names: Sequence[str]) -> Iterator[tuple[Path, str]]:
    by_result = defaultdict(list)
    for name in _scans_among(names):
        if name.lower().endswith(_IN_FOLDERS):
            by_result[stem_of(Path(name))].append(name)
    for alike in by_result.values():
        several = f"{folder}: the results of {' and '.join(alike)} would have one name; keep one"
        yield folder / alike[0], several if len(alike) > 1 else ""


def _scans_among(names: Iterable[str]) -> list[str]:
    """The volumes of a folder that are neither segmentations nor results nor of another modality, in order."""
    stems = {}
    for name in sorted(names):
        extension = next((end for end in EXTENSIONS if name.lower().endswith(end)), None)
        if extension and not name.startswith("."):
            stems[name] = name[: -len(extension)]
    known = set(stems.values())

    def is_scan(stem: str) -> bool:
        return not (is_segmentation(stem, known) or _OTHER.fullmatch(stem) or _is_result(stem, known))

    return [name for name, stem in stems.items() if is_scan(stem)]


def _is_result(stem: str, stems: Iterable[str]) -> bool:
    """Whether a volume lies beside the segmentation that it was written with."""
    owners = {name.removesuffix("_dseg") for name in stems if name.endswith("_dseg")}
    return any(stem in (f"{owner}_{suffix}" for suffix in (*MAPS, "desc-conformed_T1w")) for owner in owners)


def _below(image: Path, root: Path) -> Path:
    """The image's folder relative to another, if it lies below it."""
    folder, root = Path(os.path.abspath(image.parent)), Path(os.path.abspath(root))
    return folder.relative_to(root) if folder.is_relative_to(root) else Path()


def _refuse(error: OSError) -> None:
    raise unreadable(error.filename, error, "check its permissions") from error
