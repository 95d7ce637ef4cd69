"""A colour for each class, and the tables of label ids, names and colours that viewers open."""

import colorsys
import math
import re
from collections.abc import Sequence
from itertools import count, islice

import numpy as np

from dwc.base.tsv import as_tsv
from dwc.data.labels import LabelMap

__all__ = ["VIEWER_TABLES", "class_colours", "label_table", "viewer_tables"]

VIEWER_TABLES = ("labels_freesurfer.txt", "labels_itksnap.txt", "labels_slicer.ctbl")
# Distinguishable with most kinds of colour blindness, and from the red of errors.
_FIRST = ("#4477dd", "#e6a817", "#aa4fb0", "#14c6a4", "#f2ec6b", "#8fd3ff", "#5f8f2f", "#ffb3c6")
_APART = 0.35  # in RGB of 0..1


def class_colours(n_classes: int) -> np.ndarray:
    """RGB in 0..1 of each class, [n_classes, 3]: black, eight colour-blind-safe, then hues a golden angle apart.

    Hues near the colour of class 1 are left out: it is white matter, which touches most others.
    """
    lights = ((0.65, 0.95), (0.95, 0.85), (0.45, 0.75))  # saturation and value, alternating so that neighbours differ
    first = [tuple(int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)) for colour in _FIRST]
    hues = (colorsys.hsv_to_rgb(k * 0.618034 % 1, *lights[k % 3]) for k in count(len(_FIRST) + 1))
    others = (hue for hue in hues if math.dist(hue, first[0]) > _APART)
    return np.array([(0.0, 0.0, 0.0), *first, *islice(others, max(0, n_classes - len(_FIRST) - 1))])[:n_classes]


def label_table(label_map: LabelMap) -> bytes:
    """The table of a BIDS segmentation: index, name, color, side of the brain, and FreeSurfer's ids of the class."""
    rows = []
    for klass, (index, title, (red, green, blue)) in enumerate(_labels(label_map)):
        merged = ",".join(str(i) for i, k in zip(label_map.ids, label_map.classes, strict=True) if k == klass)
        rows.append((index, title, f"#{red:02x}{green:02x}{blue:02x}", label_map.sides[klass], merged or "n/a"))
    return as_tsv(("index", "name", "color", "side", "freesurfer_ids"), rows)


def viewer_tables(label_map: LabelMap) -> dict[str, bytes]:
    """Content of `VIEWER_TABLES`, for FreeSurfer's freeview, ITK-SNAP and 3D Slicer."""
    about = f"label map {label_map.name}; a name without a side stands for the left and the right structure"
    background, *labels = _labels(label_map)
    freesurfer = [f"# {about}", f"{background[0]} {_word(background[1])} 0 0 0 0"]
    itksnap = [f"# ITK-SNAP label descriptions, {about}", '0 0 0 0 0 0 0 "Clear Label"']
    slicer = [f"# Color table file, {about}", f"{background[0]} {_word(background[1])} 0 0 0 0"]
    for index, title, colour in sorted(labels):
        red, green, blue = colour
        freesurfer.append(f"{index} {_word(title)} {red} {green} {blue} 0")  # its alpha counts transparency
        quoted = title.replace('"', "'")
        itksnap.append(f'{index} {red} {green} {blue} 1 1 1 "{quoted}"')
        slicer.append(f"{index} {_word(title)} {red} {green} {blue} 255")
    tables = (freesurfer, itksnap, slicer)
    return {name: _text(lines) for name, lines in zip(VIEWER_TABLES, tables, strict=True)}


def _labels(label_map: LabelMap) -> list[tuple[int, str, tuple[int, int, int]]]:
    """Label id, title and colour 0..255 of each class."""
    n = label_map.n_classes
    colours = (class_colours(n) * 255).round().astype(int).tolist()
    ids = label_map.to_ids(np.arange(n)).tolist()
    return [(index, title, tuple(rgb)) for index, title, rgb in zip(ids, label_map.titles, colours, strict=True)]


def _word(name: str) -> str:
    """A name without white space, which separates columns."""
    return re.sub(r"\s+", "_", name)


def _text(lines: Sequence[str]) -> bytes:
    return "".join(f"{line}\n" for line in lines).encode()
