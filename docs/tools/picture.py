"""Draw docs/real.png: a scan, its segmentation and its uncertainty, from what `dwc predict` wrote.

dwc import brainchop/public/models/model30chan50cls --label-map fifty --out net.safetensors
dwc predict --network net.safetensors S1_T1w.nii.gz --out derivatives
python docs/tools/picture.py S1_T1w.nii.gz derivatives docs/real.png
"""

import sys
from pathlib import Path

import nibabel as nib
import numpy as np
from matplotlib.figure import Figure

from dwc.colours import class_colours
from dwc.data.labels import LabelMap

COLUMNS = ("scan", "50 classes", "uncertainty (entropy, nats)")


def draw(scan: Path, folder: Path, out: Path) -> None:
    """Write the picture: an axial and a sagittal row, in radiological convention."""
    stem = scan.name.removesuffix(".nii.gz").removesuffix("_T1w")
    image, labels, entropy = (
        nib.as_closest_canonical(nib.load(path))
        for path in (scan, folder / f"{stem}_dseg.nii.gz", folder / f"{stem}_entropy.nii.gz")
    )
    fifty = LabelMap.load("fifty")
    classes = fifty.apply(np.asarray(labels.dataobj))
    grey, nats = np.asarray(image.dataobj, dtype=float), entropy.get_fdata()
    grey = np.clip(grey / np.percentile(grey[grey > 0], 99.5), 0, 1)
    inside = np.argwhere(classes > 0)
    middle, low, high = np.median(inside, axis=0).astype(int), inside.min(axis=0), inside.max(axis=0)
    box = tuple(slice(max(a - 22, 0), b + 22) for a, b in zip(low, high, strict=True))
    # The central sagittal slice would lie in the gap between the hemispheres.
    places = ((2, middle[2] + 4), (0, middle[0] + (high[0] - low[0]) // 6))
    colours = class_colours(fifty.n_classes)

    figure = Figure(figsize=(7.2, 4.75), facecolor="black")
    axes = figure.subplots(
        2, 3, gridspec_kw=dict(left=0.005, right=0.9, top=0.93, bottom=0.005, wspace=0.02, hspace=0.02)
    )
    for row, (axis, place) in zip(axes, places, strict=True):

        def cut(volume: np.ndarray, axis: int = axis, place: int = place) -> np.ndarray:
            plane = np.take(volume[box], place - box[axis].start, axis=axis)
            turned = np.rot90(plane)
            return turned[:, ::-1] if axis else turned  # the patient's left is on the right

        scan_slice, class_slice = cut(grey), cut(classes)
        painted = np.repeat(scan_slice[..., None], 3, axis=2)
        painted = np.where(class_slice[..., None] > 0, 0.25 * painted + 0.75 * colours[class_slice], painted)
        row[0].imshow(scan_slice, cmap="gray", vmin=0, vmax=1)
        row[1].imshow(painted)
        shown = row[2].imshow(cut(nats), cmap="inferno", vmin=0, vmax=1.5)
        for panel in row:
            panel.set_axis_off()
    for panel, title in zip(axes[0], COLUMNS, strict=True):
        panel.set_title(title, color="white", fontsize=11)
    bar = figure.colorbar(shown, cax=figure.add_axes((0.915, 0.3, 0.018, 0.4)))
    bar.ax.tick_params(colors="white", labelsize=8)
    figure.savefig(out, dpi=115, metadata={"Software": None}, pil_kwargs={"optimize": True})


if __name__ == "__main__":
    draw(*map(Path, sys.argv[1:4]))
