"""Pictures of a volume: the scan, its true and predicted classes, and the errors in red.

Drawn without a display and written whole. The room shows what it is given and computes only the Dice in the titles.
"""

import colorsys
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dwc.files import write_whole
from dwc.metrics import confusion_matrix, mean_dice

__all__ = ["class_colours", "overlay"]

_PLANES = ("axial", "sagittal", "coronal")
_LEGEND_AT_MOST = 16  # classes; more names than that are no help
_PANEL = 2.4  # inches
_RED = (1.0, 0.1, 0.1)


def class_colours(n_classes: int) -> np.ndarray:
    """RGB in 0..1 of each class, [n_classes, 3]: black, then hues a golden angle apart, so that neighbours differ."""
    lights = ((0.65, 0.95), (0.95, 0.85), (0.45, 0.75))  # saturation and value, in turn
    hues = [colorsys.hsv_to_rgb(k * 0.618034 % 1, *lights[k % 3]) for k in range(1, n_classes)]
    return np.array([(0.0, 0.0, 0.0), *hues])


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

    The slices are those with the most labelled voxels. Anterior or superior is up, anterior is to the right in
    the sagittal plane, and the patient's left is on the right elsewhere, as radiologists look at it.

    Parameters
    ----------
    image : ndarray
        [size, size, size], conformed: voxel axes run to the left, to inferior and to anterior.
    truth : ndarray or None
        Classes on the same grid; without it there are no errors and no Dice.
    predictions : mapping of str to ndarray
        Classes by the name that titles them.
    path : path
        PNG to write.
    names : sequence of str, optional
        Name of each class; a legend is drawn for 16 classes or fewer.
    title : str, optional
        Above it all.

    Returns
    -------
    Path
        What was written.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    n_classes = max(int(classes.max()) for classes in (truth, *predictions.values()) if classes is not None) + 1
    colours = class_colours(max(n_classes, len(names or ())))
    reference = truth if truth is not None else next(iter(predictions.values()))
    box, places = _box(image), _busiest(reference if reference.any() else image)
    columns = [("scan", image, None, False)]
    if truth is not None:
        columns.append(("truth", image, truth, False))
    for name, classes in predictions.items():
        columns.append((_caption(name, truth, classes, n_classes), image, classes, False))
        if truth is not None:
            columns.append(("errors", image, classes != truth, True))

    shapes = [_slice(image, plane, places, box).shape for plane in _PLANES]
    heights = [rows / columns_ for rows, columns_ in shapes]
    width, legend = _PANEL * len(columns), 0.5 if names and len(names) <= _LEGEND_AT_MOST else 0.0
    top = 0.45 + 0.3 * bool(title)
    height = _PANEL * sum(heights) + top + legend
    figure = Figure(figsize=(width, height), facecolor="black")
    FigureCanvasAgg(figure)
    axes = figure.subplots(
        len(_PLANES), len(columns), squeeze=False,
        gridspec_kw=dict(height_ratios=heights, wspace=0.02, hspace=0.02, left=0.01, right=0.99,
                         bottom=legend / height + 0.005, top=1 - top / height),
    )  # fmt: skip
    window = np.percentile(image[image > 0], 99.5) if (image > 0).any() else 1
    for row, plane in enumerate(_PLANES):
        for column, (caption, scan, classes, is_error) in enumerate(columns):
            panel = axes[row, column]
            grey = np.clip(_slice(scan, plane, places, box) / window, 0, 1)
            shown = None if classes is None else _slice(classes, plane, places, box)
            panel.imshow(_painted(grey, shown, [_RED, _RED] if is_error else colours), interpolation="nearest")
            panel.set_axis_off()
            if row == 0:
                panel.set_title(caption, color="white", fontsize=9)
            if column == 0 and plane != "sagittal":
                for side, x in (("R", 0.02), ("L", 0.94)):
                    panel.text(x, 0.03, side, color="white", fontsize=8, transform=panel.transAxes)
    if title:
        figure.suptitle(title, color="white", fontsize=11, y=1 - 0.08 / height, va="top")
    if legend:
        patches = [Patch(color=colours[k], label=names[k]) for k in range(1, len(names))]
        figure.legend(handles=patches, loc="lower center", ncols=min(len(patches), 3 * len(columns)), fontsize=7,
                      labelcolor="white", frameon=False)  # fmt: skip
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    write_whole(path, png.getvalue())
    return Path(path)


def _painted(grey: np.ndarray, classes: np.ndarray | None, colours: Sequence) -> np.ndarray:
    """A grey slice as RGB, with the colour of each class other than 0 laid over it."""
    picture = np.repeat(grey[..., None], 3, axis=2)
    if classes is None:
        return picture
    classes = classes.astype(np.intp)
    return np.where(classes[..., None] > 0, 0.2 * picture + 0.8 * np.asarray(colours)[classes], picture)


def _caption(name: str, truth: np.ndarray | None, classes: np.ndarray, n_classes: int) -> str:
    dice = None if truth is None else mean_dice(confusion_matrix(truth, classes, n_classes))
    return name if dice is None else f"{name}\nDice {dice:.3f}"


def _busiest(volume: np.ndarray) -> dict[str, int]:
    """For each plane, the slice with the most voxels above zero."""
    counted = volume > 0
    over = {"sagittal": (1, 2), "axial": (0, 2), "coronal": (0, 1)}
    return {plane: int(counted.sum(axis=axes).argmax()) for plane, axes in over.items()}


def _box(image: np.ndarray) -> tuple[slice, ...]:
    """The part of the volume that the head fills, and a margin."""
    head = image >= 0.1 * image.max()
    box = []
    for axis, size in enumerate(image.shape):
        filled = np.flatnonzero(head.any(axis=tuple({0, 1, 2} - {axis})))
        margin = size // 32
        box.append(slice(max(filled[0] - margin, 0), min(filled[-1] + 1 + margin, size)))
    return tuple(box)


def _slice(volume: np.ndarray, plane: str, places: Mapping[str, int], box: tuple[slice, ...]) -> np.ndarray:
    """A plane of an LIA volume [left, inferior, anterior] as an upright picture [row from the top, column]."""
    left, inferior, anterior = box
    place = places[plane]
    if plane == "sagittal":
        return volume[place, inferior, anterior]
    if plane == "coronal":
        return volume[left, inferior, place].T
    return volume[left, place, anterior].T[::-1]
