import io

import matplotlib.image
import numpy as np
import pytest

from dwc.base.errors import InputError
from dwc.colours import class_colours
from dwc.report.figures import overlay, site_slices
from dwc.report.slices import busiest, slice_of


@pytest.fixture
def head():
    """An LIA ball whose classes mark the sides: 1 left, 2 right, 3 top, 4 front."""
    left, inferior, anterior = np.indices((32, 32, 32)) - 15.5
    ball = left**2 + inferior**2 + anterior**2 < 13**2
    classes = np.where(left > 0, 1, 2)
    classes[inferior < -8] = 3
    classes[anterior > 8] = 4
    return np.where(ball, 200, 0).astype(np.uint8), np.where(ball, classes, 0).astype(np.uint8)


def pixels(path) -> np.ndarray:
    return matplotlib.image.imread(io.BytesIO(path.read_bytes()))[..., :3]


def count(picture, colour) -> int:
    return int((abs(picture - colour).max(axis=-1) < 0.02).sum())


def test_slices_stand_upright_nose_to_the_right_and_left_on_the_right(head):
    box = (slice(None),) * 3
    axial, sagittal, coronal = (
        slice_of(head[1], plane, {plane: 16}, box) for plane in ("axial", "sagittal", "coronal")
    )
    assert (axial[5, 16], axial[20, 24], axial[20, 8]) == (4, 1, 2)  # front up, left on the right
    assert (sagittal[4, 16], sagittal[16, 27]) == (3, 4)  # crown up, front to the right
    assert (coronal[4, 16], coronal[20, 24], coronal[20, 8]) == (3, 1, 2)


def test_the_slices_shown_hold_the_most_labelled_voxels():
    volume = np.zeros((8, 8, 8))
    volume[2, 3:6, 1:7] = volume[1:7, 4, 5] = 1
    assert busiest(volume) == {"sagittal": 2, "axial": 4, "coronal": 5}


def test_errors_are_red_and_only_where_a_prediction_is_wrong(head, tmp_path):
    image, truth = head
    predicted = truth.copy()
    predicted[8:24, 8:24, 8:24] = 2
    right, wrong = (
        pixels(overlay(image, truth, {"DWC": classes}, tmp_path / f"{name}.png"))
        for name, classes in (("right", truth), ("wrong", predicted))
    )
    red = (1.0, 0.28, 0.28)  # over white
    assert count(right, red) == 0
    assert count(wrong, red) > 3000


def test_each_site_has_its_rows_and_the_errors_of_its_own_predictions(head, tmp_path):
    image, truth = head
    wrong = np.where(truth == 3, 1, truth)
    right = (image, truth, {"DWC": truth, "MAP pooled": truth}, "H: a")
    erring = (image, truth, {"DWC": wrong, "MAP pooled": truth}, "N: b")
    one, two = (
        pixels(site_slices(pictures, tmp_path / "sites.png", names=list("abcde")))
        for pictures in ({"H": right}, {"H": right, "N": erring})
    )
    assert two.shape[1] == one.shape[1]
    assert two.shape[0] > 1.8 * one.shape[0]
    red = (1.0, 0.28, 0.28)
    assert count(one, red) == 0
    lower, column = two[two.shape[0] // 2 :], two.shape[1] / 6
    assert count(two[: two.shape[0] // 2], red) == 0
    assert count(lower, red) == count(lower[:, int(3 * column) : int(4 * column) + 30], red) > 500


def test_a_scan_without_truth_is_drawn_beside_its_prediction(head, tmp_path):
    with_truth = overlay(*head, {"a": head[1]}, tmp_path / "with.png", names=list("abcde"), title="sub-01")
    without = overlay(head[0], None, {"a": head[1]}, tmp_path / "without.png")
    assert pixels(without).shape[1] == pytest.approx(pixels(with_truth).shape[1] / 2, abs=2)
    assert {path.name for path in tmp_path.iterdir()} == {"with.png", "without.png"}


def test_empty_predictions_and_empty_scans_are_drawn(head, tmp_path):
    nothing = np.zeros_like(head[1])
    assert overlay(head[0], None, {"a": nothing}, tmp_path / "a.png").stat().st_size > 1000
    assert overlay(nothing, nothing, {"a": nothing}, tmp_path / "b.png").stat().st_size > 1000


def test_classes_have_colours_of_their_own():
    colours = class_colours(50)
    assert not colours[0].any()
    apart = np.linalg.norm(colours[1:, None] - colours[None, 1:], axis=-1) + np.eye(49)
    assert apart.min() > 0.03
    assert np.linalg.norm(np.diff(colours[1:], axis=0), axis=-1).min() > 0.3


def test_a_picture_that_cannot_be_written_is_named(head, tmp_path):
    with pytest.raises(InputError, match=r"missing/a.png: cannot be written"):
        overlay(*head, {"a": head[1]}, tmp_path / "missing" / "a.png")
