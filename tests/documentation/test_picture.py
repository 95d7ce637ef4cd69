"""The README's picture is drawn from what `dwc predict` writes."""

import importlib.util

import numpy as np
from matplotlib.image import imread

from tests.documentation.pages import ROOT


def test_the_picture_shows_scan_classes_and_uncertainty(save, tmp_path):
    spec = importlib.util.spec_from_file_location("picture", ROOT / "docs" / "tools" / "picture.py")
    picture = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(picture)

    labels = np.zeros((40, 44, 36), np.int16)
    labels[8:32, 8:36, 8:28] = 2  # white matter
    scan = save("S_T1w.nii.gz", (10 + 100 * (labels > 0)).astype(np.uint8))
    save("derivatives/S_dseg.nii.gz", labels)
    save("derivatives/S_entropy.nii.gz", (labels > 0).astype(np.uint8))
    picture.draw(scan, tmp_path / "derivatives", tmp_path / "out.png")

    drawn = imread(tmp_path / "out.png")[..., :3]
    grey = np.ptp(drawn, axis=2) < 0.02
    third = drawn.shape[1] // 3
    assert grey[:, :third].all()  # the scan
    assert not grey[:, third : 2 * third].all()  # the classes
