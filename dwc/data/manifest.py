"""Manifests: which scans there are, whose they are, and whether they train or test.

A manifest is a CSV or a folder (`bids`). This module finds the files and fixes the split; it opens no volume.
"""

import csv
import hashlib
import io
import os
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from dwc.base.cells import as_text, from_text
from dwc.base.errors import InputError, one_line, printable
from dwc.data.bids import has_split, scans_in_folder
from dwc.data.paths import check_printable, existing_file, unreadable
from dwc.data.scan import SPLITS, Scan, is_missing
from dwc.data.subjects import plain_name, subject_of

__all__ = ["Scan", "as_csv", "has_split_column", "labelled", "namesakes", "read_manifest"]

T = TypeVar("T")


_COLUMNS = ("image", "label", "subject", "site", "split")
_SEPARATORS = {",": "commas", ";": "semicolons", "\t": "tabs"}
_EXCEL = re.compile(r"\s*\"?sep=([,;\t])\"?[ \t,;]*\r?\n", re.IGNORECASE)  # Excel's own first line
_UTF16 = (b"\xff\xfe", b"\xfe\xff")  # how a spreadsheet's "Unicode text" begins


def read_manifest(
    path: str | os.PathLike, *, seed: int = 0, test_fraction: float = 0.1, lenient: bool = False
) -> list[Scan]:
    """Read the scans of a manifest, in its order.

    Parameters
    ----------
    path : path
        A CSV with the columns `image,label[,subject,site,split]`, whose paths are relative to the CSV's folder; a BIDS
        data set or another folder (`scans_in_folder`). Columns may also be separated by semicolons or tabs. An empty
        label is a scan for prediction only. A missing subject is read from `sub-...` in the path of the image, or else
        is the image's name, which then must not occur in two folders. A missing site is the name of the manifest's
        folder. `n/a` counts as empty.
    seed : int
        Fixes the split. Not used where there is a split column.
    test_fraction : float
        Part of the subjects to test on, on average; 0: none. A subject is in one part of the split with all its scans;
        the same name at two sites is the same subject.

    lenient : bool
        Keep scans whose files are missing or ambiguous, with their `fault`, instead of raising InputError.

    Raises
    ------
    InputError
        Among other things, where two spellings of one subject (`sub-01`, `01` and `1`) are in different parts of the
        split.

    Notes
    -----
    Without a split column, seed and name give each subject a number in 0..1 (SHA-256), and those below `test_fraction`
    are for testing. No part stays empty: where all are below it, the subject of the largest number is for training
    (a single subject always is); where none is, that of the smallest is for testing.

    So a subject's part follows from its own name, and scans added later move nobody from training to testing, but for
    one who was for training only because all were below `test_fraction`.
    """
    path = Path(path)
    check_printable(str(path))
    if not 0 <= test_fraction < 1:
        raise InputError(
            f"test fraction {test_fraction} is not a part of the subjects; give a number from 0 to below 1"
        )
    is_folder = _is_folder(path)
    scans = scans_in_folder(path, lenient=lenient) if is_folder else _from_csv(path, lenient)
    if not scans:
        what = "*_T1w.nii.gz in sub-*/[ses-*/]anat, nor other volumes" if is_folder else "rows"
        raise InputError(f"{path}: the manifest is empty, it has no {what}; list at least one scan")
    if not has_split_column(path):
        scans = _split_by_subject(scans, seed, test_fraction)
    _check_split(path, scans)
    return scans


def labelled(scans: Sequence[Scan], manifest: str | os.PathLike, purpose: str) -> list[Scan]:
    """The scans with a label. A CSV must have one for each scan; of a folder the others are left out, with a warning.

    `purpose` ends the error: "training needs one for each scan".
    """
    without = [scan for scan in scans if scan.label is None]
    if without and (len(without) == len(scans) or not _is_folder(Path(manifest))):
        raise InputError(f"{manifest}: {without[0].image} has no label; {purpose}")
    if without:
        what = f"{len(without)} of {len(scans)} scans have no label and are left out, the first is {without[0].image}"
        remarks = [f"{scan.image}: {scan.remark}" for scan in without if scan.remark]
        for line in (f"{manifest}: {what}", *remarks[:1]):
            print(f"warning: {printable(line)}", file=sys.stderr)
    return [scan for scan in scans if scan.label is not None]


def namesakes(scans: Iterable[Scan]) -> list[list[str]]:
    """Groups of subjects that may be one person: `sub-01`, `01` and `1`, of one site or of several."""
    spellings = _group(scans, lambda scan: plain_name(scan.subject), lambda scan: scan.subject)
    return [sorted(set(names)) for names in spellings.values() if len(set(names)) > 1]


def as_csv(scans: Iterable[Scan]) -> bytes:
    """A manifest of the scans with absolute paths, which `read_manifest` reads as they are, split and all."""
    rows = [[scan.image.absolute(), scan.label and scan.label.absolute(), scan.subject, scan.site, scan.split]
            for scan in scans]  # fmt: skip
    table = io.StringIO()
    cells = [[as_text(str(cell or "")) for cell in row] for row in rows]
    csv.writer(table, lineterminator="\n").writerows([_COLUMNS, *cells])
    return table.getvalue().encode()


def has_split_column(path: str | os.PathLike) -> bool:
    """Whether a manifest fixes the split itself, rather than leaving it to the seed."""
    path = Path(path)
    return has_split(path) if _is_folder(path) else "split" in _read_csv(path)[0]


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except (OSError, ValueError) as error:
        raise unreadable(path, error) from error


def _from_csv(path: Path, lenient: bool) -> list[Scan]:
    header, rows = _read_csv(path)
    scans: list[Scan] = []
    line_of: dict[Path, int] = {}
    namesake: dict[str, Path] = {}
    for line, row in rows:
        where = f"{path}, line {line}"
        if not row["image"]:
            raise InputError(f"{where}: the image is empty; name a file")
        files = {column: path.parent / row[column] for column in ("image", "label") if row.get(column)}
        fault = ""
        for column, file in files.items():
            try:
                _check_file(where, column, file)
            except InputError as error:
                if not lenient:
                    raise
                fault = fault or str(error)
        image = files["image"]
        first = line_of.setdefault(image.resolve(), line)
        if first != line:
            raise InputError(f"{where}: image {row['image']} is already on line {first}; list each image once")
        if "split" in header and row["split"] not in SPLITS:
            raise InputError(f"{where}: split is {row['split']!r}; write train or test, or leave the column out")
        subject = row.get("subject") or subject_of(Path(row["image"]))
        if not subject:
            subject = image.name.split(".")[0]
            other = namesake.setdefault(subject, image)
            if other.parent.resolve() != image.parent.resolve():
                raise InputError(f"{where}: {image} and {other} would both be subject {subject}, after their file "
                                 f"names; add a subject column")  # fmt: skip
        site = row.get("site") or path.resolve().parent.name
        is_tested_on = row.get("split") == "test"
        scans.append(Scan(image, files.get("label"), subject, site, "test" if is_tested_on else "train", fault))
    return scans


def _check_file(where: str, column: str, file: Path) -> None:
    try:
        check_printable(str(file))
        if not (file.exists() or file.is_symlink()):
            raise InputError(f"{file} does not exist; paths are relative to the manifest's folder")
        existing_file(file)
    except InputError as error:
        raise InputError(f"{where}: {column} {error}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{where}: {column} {unreadable(file, error)}") from error


def _read_csv(path: Path) -> tuple[list[str], list[tuple[int, dict[str, str]]]]:
    """Header, and (line number, cells by column) of each row that is not blank."""
    wanted = f"give a CSV with columns {','.join(_COLUMNS)}"
    try:
        content = path.read_bytes()
    except (OSError, ValueError) as error:
        raise unreadable(path, error, "give a CSV or a BIDS folder") from error
    try:
        text = content.decode("utf-16" if content.startswith(_UTF16) else "utf-8-sig")
        if named := _EXCEL.match(text):
            text = "\n" + text[named.end() :]
        separator = named[1] if named else _separator(text)
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True, strict=True)
        lines = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader if any(map(str.strip, cells))]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not a CSV in UTF-8 ({error}); {wanted}") from error
    if not lines:
        raise InputError(f"{path}: the manifest is empty; {wanted}")
    header = [name.lower() for name in lines[0][1]]
    while header and not header[-1]:
        header.pop()
    unknown = [column for column in header if column not in _COLUMNS]
    if unknown or "image" not in header or len(set(header)) < len(header):
        wrong = f"unknown columns {', '.join(map(repr, unknown))}" if unknown else f"columns {','.join(header)}"
        raise InputError(
            f"{path}: {one_line(wrong)}; the columns are image,label[,subject,site,split], each once, separated by "
            f"commas, semicolons or tabs"
        )
    rows = []
    n_files = 1 + max(header.index(name) for name in ("image", "label") if name in header)
    for line, cells in lines[1:]:
        other = max(_SEPARATORS, key=lambda mark: sum(mark in cell for cell in cells))
        if len(header) > 1 and len([cell for cell in cells if cell]) == 1 and other != separator and other in cells[0]:
            raise InputError(
                f"{path}, line {line}: separated by {_SEPARATORS[other]}, its header by {_SEPARATORS[separator]}; "
                f"write both alike"
            )
        if len(cells) >= n_files:  # a spreadsheet may have cut empty cells
            cells += [""] * (len(header) - len(cells))
        beyond = cells[len(header) :]
        if len(cells) < len(header) or any(beyond):
            raise InputError(
                f"{path}, line {line}: {len(cells)} cells, not {len(header)}; quote cells that hold "
                f"{_SEPARATORS[separator]}"
            )
        cells = ["" if is_missing(cell) else from_text(cell) for cell in cells[: len(header)]]
        rows.append((line, dict(zip(header, cells, strict=True))))
    return header, rows


def _separator(text: str) -> str:
    """What separates the columns of the header."""
    header = next((line for line in text.splitlines() if line.strip()), "")
    return max(_SEPARATORS, key=header.count)


def _check_split(path: Path, scans: list[Scan]) -> None:
    """Nobody is in both parts of the split, under one name or under two spellings of it at one site."""
    for subject, splits in _group(scans, lambda scan: scan.subject, lambda scan: scan.split).items():
        if len(set(splits)) > 1:
            raise InputError(f"{path}: subject {subject} is in both train and test; give each subject one split")
    for group in _group(scans, lambda scan: (scan.site, plain_name(scan.subject))).values():
        if len({scan.split for scan in group}) > 1:
            names = " and ".join(sorted({scan.subject for scan in group}))
            raise InputError(
                f"{path}: subjects {names} of site {group[0].site} look like one, and are in both train and test; name "
                f"each subject in one way"
            )


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


def _group(items: Iterable[T], key: Callable[[T], Any], value: Callable[[T], Any] = lambda item: item) -> dict:
    groups = defaultdict(list)
    for item in items:
        groups[key(item)].append(value(item))
    return groups
