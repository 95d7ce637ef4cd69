"""Label maps: which class of the network each label id of a segmentation belongs to.

A label map is a table (TSV) of `index`, `class` and `name`. This module reads, checks and applies such tables; it
does not read volumes.
"""

import csv
import hashlib
import os
from dataclasses import dataclass, field
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dwc.base.errors import InputError
from dwc.data.paths import check_printable, unreadable

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable

__all__ = ["LEFT", "RIGHT", "LabelMap", "read_tsv"]

# FreeSurfer's ids of structures on one side, but for the cortex: 1000 + parcel on the left, 2000 + parcel on the right
LEFT = (2, 3, 4, 5, 7, 8, 10, 11, 12, 13, 17, 18, 26, 28)
RIGHT = (41, 42, 43, 44, 46, 47, 49, 50, 51, 52, 53, 54, 58, 60)

_COLUMNS = ("index", "class", "name")
_SIDES = ("Left-", "Right-", "ctx-lh-", "ctx-rh-")
_MAX_CLASSES = 256  # classes are stored as uint8
_SLAB = 16  # planes at a time
_MAX_ID = 1_000_000  # ids are looked up in a table of this length at most


def read_tsv(path: "str | os.PathLike | Traversable", columns: tuple[str, ...] | None = None) -> list[dict[str, str]]:
    """Rows of a tab-separated table with a header; blank lines and lines that start with `#` are skipped."""
    try:
        lines = Path(str(path)).read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: this table is not UTF-8 text; give a tab-separated text file") from error
    except OSError as error:
        raise unreadable(str(path), error, "give a tab-separated text file") from error
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip() and not line.startswith("#")]
    try:
        records = [record for _, line in numbered for record in csv.reader([line], delimiter="\t")]
    except csv.Error as error:
        raise InputError(f"{path}: not a tab-separated table ({error}); give one of short cells") from error
    header, body = (records[0], records[1:]) if records else ([], [])
    if columns is not None and tuple(header) != columns:
        raise InputError(f"{path}: columns are {header or 'missing'}; write a tab-separated header {' '.join(columns)}")
    for (number, _), record in zip(numbered[1:], body, strict=True):
        if len(record) != len(header):
            raise InputError(f"{path}, line {number}: {len(record)} columns, not {len(header)}; separate them by tabs")
    return [dict(zip(header, record, strict=True)) for record in body]


@dataclass(frozen=True)
class LabelMap:
    """A function from label ids to classes 0..n_classes-1; ids that are not listed are class 0.

    Attributes
    ----------
    name : str
        "fifty", "coarse" or the stem of the user's file.
    ids, classes : tuple[int, ...]
        Label id of each row and the class it belongs to.
    names : tuple[str, ...]
        Name of each class, without the side of the brain.
    """

    name: str
    ids: tuple[int, ...]
    classes: tuple[int, ...]
    names: tuple[str, ...] = field(repr=False)

    @classmethod
    def load(cls, name_or_path: str | os.PathLike) -> "LabelMap":
        """Load a label map: "fifty", "coarse", or the path of a TSV with the columns index, class and name.

        "fifty" is FreeSurfer's aparc+aseg with left and right merged. "coarse" is "fifty" followed by a table that
        gathers the 50 classes into 8 tissues and background.
        """
        if name_or_path == "fifty":
            return cls._from_table("fifty", files(__package__) / "fifty_classes.tsv")
        if name_or_path == "coarse":
            coarse = cls._from_table("coarse", files(__package__) / "coarse_classes.tsv")
            return cls.load("fifty").then(coarse)
        try:
            is_file = Path(name_or_path).is_file()
        except (OSError, ValueError) as error:
            raise unreadable(name_or_path, error) from error
        if not is_file:
            raise InputError(f"{name_or_path}: no such label map; give fifty, coarse or the path of a TSV file")
        return cls._from_table(Path(name_or_path).stem, name_or_path)

    @classmethod
    def _from_table(cls, name: str, path: "str | os.PathLike | Traversable") -> "LabelMap":
        rows = read_tsv(path, _COLUMNS)
        if not rows:
            raise InputError(f"{path}: the label map has no rows; list index, class and name")
        class_of: dict[int, int] = {}
        names: dict[int, str] = {}
        for row in rows:
            check_printable(row["name"], "the name of a class")
            if not all(row[column].isdecimal() and len(row[column]) < 20 for column in ("index", "class")):
                raise InputError(
                    f"{path}: index {row['index']!r}, class {row['class']!r}; both must be whole numbers from 0 on"
                )
            index, klass = int(row["index"]), int(row["class"])
            if index > _MAX_ID:
                raise InputError(f"{path}: index {index} is larger than {_MAX_ID}; renumber the label ids")
            if index in class_of:
                raise InputError(f"{path}: index {index} is listed twice; list each id once")
            class_of[index] = klass
            names.setdefault(klass, _without_side(row["name"]))
        if 0 in class_of and class_of[0] != 0:
            raise InputError(f"{path}: index 0 is class {class_of[0]}; unlabelled voxels must be class 0")
        names.setdefault(0, "Unknown")
        missing = sorted(set(range(max(names) + 1)) - set(names))
        if missing:
            raise InputError(
                f"{path}: no id has class {missing[0]}; number the classes 0..{len(names) - 1} without gaps"
            )
        if not 2 <= len(names) <= _MAX_CLASSES:
            raise InputError(f"{path}: {len(names)} classes; a label map has 2 to {_MAX_CLASSES}")
        return cls(name, tuple(class_of), tuple(class_of.values()), tuple(names[k] for k in range(len(names))))

    def then(self, other: "LabelMap") -> "LabelMap":
        """Compose: this map first, then `other`, whose ids are this map's classes. Takes the name of `other`."""
        class_of = dict(zip(other.ids, other.classes, strict=True))
        return LabelMap(other.name, self.ids, tuple(class_of.get(k, 0) for k in self.classes), other.names)

    @property
    def n_classes(self) -> int:
        """Number of classes, background (class 0) included."""
        return len(self.names)

    @cached_property
    def sides(self) -> tuple[str, ...]:
        """The side that each class is on by FreeSurfer's ids: left, right, both (merged), or n/a, as the background."""
        found: list[set[str]] = [set() for _ in self.names]
        for index, klass in zip(self.ids, self.classes, strict=True):
            if index in LEFT or index // 1000 == 1:
                found[klass].add("left")
            if index in RIGHT or index // 1000 == 2:
                found[klass].add("right")
        found[0].clear()
        return tuple("both" if len(sides) == 2 else next(iter(sides), "n/a") for sides in found)

    @cached_property
    def titles(self) -> tuple[str, ...]:
        """Name of each class for people to read, with the side of the brain where a class has one side only."""
        words = {"left": "Left-", "right": "Right-"}
        return tuple(words.get(side, "") + name for side, name in zip(self.sides, self.names, strict=True))

    @cached_property
    def sha256(self) -> str:
        """Hex digest of the canonical table: what each id means and the names of the classes, in the order of ids."""
        pairs = sorted((i, k) for i, k in zip(self.ids, self.classes, strict=True) if k)
        lines = [f"{i}\t{k}\t{self.names[k]}" for i, k in pairs]
        return hashlib.sha256("\n".join([*self.names, *lines]).encode()).hexdigest()

    def apply(self, ids: np.ndarray) -> np.ndarray:
        """Classes of label ids, uint8, of the same shape; every id that is not listed becomes class 0."""
        ids = np.asarray(ids)
        if ids.dtype.kind not in "biu":
            raise TypeError(f"label ids must be integers, not {ids.dtype}")
        table = np.zeros(max(self.ids) + 2, np.uint8)  # the last entry, which no listed id has, is for unlisted ids
        table[list(self.ids)] = self.classes
        classes = np.empty_like(ids, np.uint8)
        for part, result in zip(_slabs(ids), _slabs(classes), strict=True):
            outside = (part < 0) | (part >= len(table))
            # widened first: the last entry's index does not fit into 8 bits, and perhaps not into 16
            result[...] = table[np.where(outside, len(table) - 1, part.astype(np.int64))]
        return classes

    def to_ids(self, classes: np.ndarray) -> np.ndarray:
        """Label ids of classes, int32: the first listed id of each class, so the left one where sides are merged.

        Class 0 becomes id 0. `apply(to_ids(classes))` is `classes`.
        """
        classes = np.asarray(classes)
        if classes.dtype.kind not in "biu" or (
            classes.size and not 0 <= classes.min() <= classes.max() < self.n_classes
        ):
            raise ValueError(f"classes must be integers in 0..{self.n_classes - 1}")
        table = np.zeros(self.n_classes, np.int32)
        for index, klass in zip(reversed(self.ids), reversed(self.classes), strict=True):
            table[klass] = index if klass else 0
        return table[classes]


def _slabs(array: np.ndarray) -> list[np.ndarray]:
    """Views of a few planes each of a volume, so that what is made of one is small; other arrays as a whole."""
    if array.ndim < 3:
        return [array]
    return [array[..., begin : begin + _SLAB] for begin in range(0, array.shape[-1], _SLAB)]


def _without_side(name: str) -> str:
    for side in _SIDES:
        name = name.removeprefix(side)
    return name
