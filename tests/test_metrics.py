import math

import numpy as np
import pytest
import torch
from torch.nn.functional import one_hot

from dwc.metrics import confusion_matrix, dice, mean_dice, volumes


@pytest.fixture
def volume_pair():
    """Class 3 is predicted and never true, class 2 true and never predicted, class 4 neither."""
    torch.manual_seed(0)
    return torch.randint(3, (6, 7, 9)), torch.tensor([0, 1, 3])[torch.randint(3, (6, 7, 9))]


def test_the_confusion_counts_truth_in_rows_and_prediction_in_columns(volume_pair):
    truth, predicted = volume_pair
    confusion = confusion_matrix(truth, predicted, 5)
    assert confusion.dtype == torch.int64
    assert confusion.sum() == truth.numel()
    for row in range(5):
        for column in range(5):
            assert confusion[row, column] == ((truth == row) & (predicted == column)).sum()


def test_uint8_arrays_of_many_classes_count_as_tensors_do():
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 256, (2, 20, 20, 20), np.uint8)
    confusion = confusion_matrix(truth, predicted, 256)
    expected = confusion_matrix(torch.from_numpy(truth).long(), torch.from_numpy(predicted).long(), 256)
    assert torch.equal(confusion, expected)
    assert confusion[255].sum() == (truth == 255).sum()


def test_the_confusion_of_parts_adds_up_to_that_of_the_whole(volume_pair):
    truth, predicted = volume_pair
    parts = confusion_matrix(truth[:2], predicted[:2], 5) + confusion_matrix(truth[2:], predicted[2:], 5)
    assert torch.equal(parts, confusion_matrix(truth, predicted, 5))


@pytest.mark.parametrize(
    ("truth", "predicted", "message"),
    [([0, 1], [0, 1, 1], "shape"), ([0, 3], [0, 1], "true classes 0..3"), ([0, 1], [-1, 1], "predicted classes -1..1")],
)
def test_a_confusion_of_what_cannot_be_compared_is_refused(truth, predicted, message):
    with pytest.raises(ValueError, match=message):
        confusion_matrix(np.array(truth), np.array(predicted), 3)


def test_dice_is_equation_18_and_monais(volume_pair):
    monai = pytest.importorskip("monai.metrics", reason="MONAI, the oracle for Dice, is not installed")
    truth, predicted = volume_pair
    ours = dice(confusion_matrix(truth, predicted, 5))
    channels = (one_hot(classes, 5).movedim(-1, 0)[None] for classes in (predicted, truth))
    theirs = monai.compute_dice(*channels, ignore_empty=True)[0]
    torch.testing.assert_close(ours.float(), theirs.float(), equal_nan=True)


def test_a_class_absent_from_the_truth_is_left_out_and_a_missed_one_counts_zero(volume_pair):
    confusion = confusion_matrix(*volume_pair, 5)
    per_class = dice(confusion)
    assert math.isnan(per_class[3])
    assert math.isnan(per_class[4])
    assert per_class[2] == 0
    assert mean_dice(confusion, with_background=True) == pytest.approx(float(per_class[:3].mean()))
    assert mean_dice(confusion) == pytest.approx(float(per_class[1:3].mean()))


def test_a_perfect_prediction_has_dice_1_and_nothing_to_find_has_none():
    truth = torch.arange(3).repeat(4)
    assert mean_dice(confusion_matrix(truth, truth, 5)) == 1
    empty = torch.zeros(12, dtype=torch.int64)
    assert mean_dice(confusion_matrix(empty, truth, 3)) is None
    assert mean_dice(confusion_matrix(empty, truth, 3), with_background=True) == pytest.approx(2 * 4 / (12 + 4))


def test_volumes_are_voxel_counts_times_the_voxels_volume():
    labels = np.array([[0, 2, 2], [2, 1, 0]], np.uint8)
    assert volumes(labels, 4, 1.5).tolist() == [3.0, 1.5, 4.5, 0.0]
