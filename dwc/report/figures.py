"""Pictures of volumes: the scan, its true and predicted classes, and the errors in red."""

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from dwc.base.files import write_whole
from dwc.colours import class_colours
from dwc.metrics.confusion import confusion_matrix, mean_dice
from dwc.report.slices import PLANES, busiest, picture_box, slice_of

__all__ = ["overlay", "save", "site_slices"]

_LEGEND_AT_MOST = 16  # classes; longer legends are not readable
_PANEL = 2.4  # inches
_RED = (1.0, 0.1, 0.1)


@dataclass(frozen=True)
class _Row:
    """A row of RGB panels [rows, columns, 3] of equal shape, each with a note in its corner or None."""

    panels: list[np.ndarray]
    notes: list[str | None]
    has_sides: bool


def overlay(
    image: np.ndarray,
    truth: np.ndarray | None,
    predictions: Mapping[str, np.ndarray],
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Write a PNG with a row per plane (axial, sagittal, coronal): scan, truth, and each prediction with its errors.

    All volumes are [size, size, size] on one conformed grid, whose axes run to the left, to inferior and to anterior.
    The predicted classes are keyed by caption; without `truth` no errors or Dice are shown. `names` are those of the
    classes; 16 classes or fewer get a legend. The slices are those with the most labelled voxels. Anterior or superior
    is up; anterior is right in the sagittal plane, the patient's left is right in the others (radiological convention).
    """
    n_classes = _n_classes((truth, *predictions.values()), names)
    scores = {name: _dice(truth, classes, n_classes) for name, classes in predictions.items()}
    captions = [f"{name}\n{dice}" if dice else name for name, dice in scores.items()]
    rows = _rows(image, truth, predictions, PLANES, class_colours(n_classes))
    return _draw(rows, _columns(captions, truth is not None), path, names=names, title=title)


def site_slices(
    pictures: Mapping[str, tuple[np.ndarray, np.ndarray | None, Mapping[str, np.ndarray], str]],
    path: str | Path,
    *,
    names: Sequence[str] | None = None,
) -> Path:
    """Write a PNG with an axial and a sagittal row per site: scan, truth, and each prediction with its errors in red.

    `pictures` maps each site to (image, truth, predictions, title beside its rows), with the arguments of `overlay`;
    all sites must have the same predictions.
    """
    volumes = (classes for _, truth, predictions, _ in pictures.values() for classes in (truth, *predictions.values()))
    n_classes = _n_classes(volumes, names)
    colours, rows = class_colours(n_classes), []
    for image, truth, predictions, _ in pictures.values():
        pair = _rows(image, truth, predictions, PLANES[:2], colours)
        for k, classes in enumerate(predictions.values()):
            pair[0].notes[2 + 2 * k] = _dice(truth, classes, n_classes)
        rows += pair
    columns = _columns(next(iter(pictures.values()))[2], True)
    return _draw(rows, columns, path, names=names, sides=[title for *_, title in pictures.values()])


def _n_classes(volumes: Iterable[np.ndarray | None], names: Sequence[str] | None) -> int:
    """How many classes need a colour: the named ones, or up to the highest in any volume."""
    return max(*(int(classes.max()) + 1 for classes in volumes if classes is not None), len(names or ()))


def _columns(captions: Iterable[str], has_truth: bool) -> list[str]:
    predicted = [part for caption in captions for part in ((caption, "errors") if has_truth else (caption,))]
    return ["scan", *(["truth"] if has_truth else []), *predicted]


def _rows(
    image: np.ndarray,
    truth: np.ndarray | None,
    predictions: Mapping[str, np.ndarray],
    planes: Sequence[str],
    colours: np.ndarray,
) -> list[_Row]:
    """A volume's row of panels in each plane: scan, truth, and each prediction with its errors."""
    reference = truth if truth is not None else next(iter(predictions.values()))
    box, places = picture_box(image), busiest(reference if reference.any() else image)
    window = np.percentile(image[image > 0], 99.5) if (image > 0).any() else 1
    red = np.array([_RED, _RED])
    layers: list[tuple[np.ndarray | None, np.ndarray]] = [(None, colours)]  # classes to overlay, and their colours
    layers += [] if truth is None else [(truth, colours)]
    for classes in predictions.values():
        layers += [(classes, colours)] if truth is None else [(classes, colours), (classes != truth, red)]
    rows = []
    for plane in planes:
        grey = np.clip(slice_of(image, plane, places, box) / window, 0, 1)
        panels = [
            _painted(grey, None if shown is None else slice_of(shown, plane, places, box), paint)
            for shown, paint in layers
        ]
        rows.append(_Row(panels, [None] * len(panels), plane != "sagittal"))
    return rows


def _draw(
    rows: Sequence[_Row],
    columns: Sequence[str],
    path: str | Path,
    *,
    names: Sequence[str] | None,
    title: str | None = None,
    sides: Sequence[str] = (),
) -> Path:
    """Lay out rows of panels on black, with column titles on top; each of `sides` labels an equal share of the rows."""
    heights = [row.panels[0].shape[0] / row.panels[0].shape[1] for row in rows]
    margin, legend_names = 0.4 if sides else 0.0, list(names or ())[1:]
    width = _PANEL * len(columns) + margin
    per_line = int(width / 2.0)
    lines = -(-len(legend_names) // per_line) if len(legend_names) < _LEGEND_AT_MOST else 0
    legend = 0.3 * lines
    top = 0.3 + 0.22 * max(caption.count("\n") for caption in columns) + (0.35 if title else 0)
    height = _PANEL * sum(heights) + top + legend
    figure = Figure(figsize=(width, height), facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(rows), len(columns), squeeze=False,
        gridspec_kw=dict(height_ratios=heights, wspace=0.02, hspace=0.02, left=(0.05 + margin) / width, right=0.995,
                         bottom=(legend + 0.05) / height, top=1 - top / height),
    )  # fmt: skip
    for row, panels in zip(rows, axes, strict=True):
        for axis, picture, note in zip(panels, row.panels, row.notes, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set_axis_off()
            if note:
                _write(axis, 0.02, 0.98, note, va="top")
        if row.has_sides:
            _write(panels[0], 0.02, 0.03, "R")
            _write(panels[0], 0.98, 0.03, "L", ha="right")
    for axis, caption in zip(axes[0], columns, strict=True):
        axis.set_title(caption, color="white", fontsize=12)
    _name_sides(figure, axes[:, 0], sides, 0.5 * margin / width)
    if title:
        figure.suptitle(title, color="white", fontsize=14, y=1 - 0.08 / height, va="top")
    if legend:
        colours = class_colours(len(legend_names) + 1)[1:]
        patches = [Patch(color=colour, label=name) for colour, name in zip(colours, legend_names, strict=True)]
        figure.legend(handles=patches, loc="lower center", ncols=-(-len(patches) // lines), fontsize=11,
                      labelcolor="white", frameon=False)  # fmt: skip
    return save(figure, path)


def _write(axis: Axes, x: float, y: float, text: str, **alignment: Any) -> None:
    """Write text in a panel's corner, legible on any background."""
    paper = dict(facecolor="black", alpha=0.6, edgecolor="none", pad=1.5)
    axis.text(x, y, text, color="white", fontsize=11, bbox=paper, transform=axis.transAxes, **alignment)


def _name_sides(figure: Figure, axes: np.ndarray, sides: Sequence[str], x: float) -> None:
    """Write each name beside its rows, with a line between the rows of different names."""
    blocks: list[np.ndarray] = np.array_split(axes, len(sides)) if sides else []
    for above, name in zip(blocks, sides, strict=True):
        high, low = above[0].get_position().y1, above[-1].get_position().y0
        figure.text(x, (high + low) / 2, name, color="white", fontsize=13, rotation=90, ha="center", va="center")
    for above, below in pairwise(blocks):
        y = (above[-1].get_position().y0 + below[0].get_position().y1) / 2
        figure.add_artist(Line2D([0, 1], [y, y], color="0.55", linewidth=0.8))


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as a PNG atomically; equal figures give equal bytes."""
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    write_whole(path, png.getvalue())
    return Path(path)


def _painted(grey: np.ndarray, classes: np.ndarray | None, colours: np.ndarray) -> np.ndarray:
    """A grey slice as RGB, overlaid with the colours of all classes except 0."""
    picture = np.repeat(grey[..., None], 3, axis=2)
    if classes is None:
        return picture
    classes = classes.astype(np.intp)
    return np.where(classes[..., None] > 0, 0.2 * picture + 0.8 * colours[classes], picture)


def _dice(truth: np.ndarray | None, classes: np.ndarray, n_classes: int) -> str | None:
    dice = None if truth is None else mean_dice(confusion_matrix(truth, classes, n_classes))
    return None if dice is None else f"Dice {dice:.3f}"
