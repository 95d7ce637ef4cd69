import math

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import one_hot

from dwc.metrics.calibration import BINS, CalibrationCounts, error_detection_auc, expected_calibration_error
from dwc.metrics.confusion import confusion_matrix, dice, mean_dice, volumes
from dwc.metrics.significance import paired_test


@pytest.fixture
def volume_pair():
    """Class 3 is predicted but never true, class 2 true but never predicted, class 4 neither."""
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


def test_the_paired_test_is_the_textbooks():
    a, b = np.array([0.62, 0.71, 0.55, 0.80]), np.array([0.60, 0.66, 0.56, 0.72])  # differences 2, 5, -1 and 8 %
    result = paired_test(a, b)
    mean, sd = 0.035, math.sqrt((0.015**2 + 0.015**2 + 0.045**2 + 0.045**2) / 3)
    assert (result.n, result.mean_difference) == (4, pytest.approx(mean))
    assert result.effect_size == pytest.approx(mean / sd)
    assert result.t == pytest.approx(mean / (sd / 2))
    half = 3.18244630528 * sd / 2  # Student's 97.5 % point for 3 degrees of freedom
    assert (result.ci_low, result.ci_high) == (pytest.approx(mean - half), pytest.approx(mean + half))
    assert 0.1 < result.p < 0.2


def test_the_paired_test_has_two_tails_and_a_sign():
    a, b = np.random.default_rng(0).random((2, 20))
    one, other = paired_test(a, b), paired_test(b, a)
    assert one.p == other.p
    assert (one.t, one.ci_low, one.effect_size) == (-other.t, pytest.approx(-other.ci_high), -other.effect_size)
    shifted = paired_test(b + 1 + 0.01 * a, b)
    assert shifted.p < 1e-20
    assert shifted.ci_low > 1


def test_volumes_without_a_score_are_left_out_with_their_pair():
    result = paired_test([0.5, math.nan, 0.7, 0.9], [0.4, 0.1, None, 0.7])
    assert (result.n, result.mean_difference) == (2, pytest.approx(0.15))


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("a", "b", "n", "mean"), [([0.5], [0.3], 1, 0.2), ([0.5, 0.7], [0.3, 0.5], 2, 0.2), ([0.5] * 3, [0.5] * 3, 3, 0)]
)
def test_one_pair_and_equal_differences_have_a_mean_and_no_test(a, b, n, mean):
    result = paired_test(a, b)
    assert (result.n, result.mean_difference) == (n, pytest.approx(mean))
    assert all(math.isnan(value) for value in (result.t, result.p, result.effect_size, result.ci_low, result.ci_high))


def test_scores_that_are_not_pairs_are_refused():
    with pytest.raises(ValueError, match="two lists of equal length"):
        paired_test([1.0, 2.0], [1.0])


def counted(confidence, entropy, correct, n_classes: int = 4) -> pd.DataFrame:
    counts = CalibrationCounts(n_classes)
    counts.add(*(np.asarray(values) for values in (confidence, entropy, correct)))
    return counts.frame()


def test_every_voxel_is_counted_once_by_confidence_and_once_by_entropy():
    frame = counted([[0.25, 1.0], [0.999, 0.26]], [[math.log(4), 0.0], [1e-6, 1.3]], [[False, True], [True, False]])
    confidence, entropy = (frame[frame.kind == kind].set_index("bin") for kind in ("confidence", "entropy"))
    assert (confidence.low.iloc[0], confidence.high.iloc[-1]) == (0, 1)
    assert (entropy.low.iloc[0], entropy.high.iloc[-1]) == (0, math.log(4))
    assert confidence.n[confidence.n > 0].to_dict() == {BINS // 4: 2, BINS - 1: 2}
    assert confidence.correct[BINS - 1] == 2
    assert confidence["sum"][BINS // 4] == pytest.approx(0.51)
    assert entropy.n[entropy.n > 0].to_dict() == {0: 2, 18: 1, BINS - 1: 1}
    assert entropy["sum"].sum() == pytest.approx(math.log(4) + 1.300001)


def test_counts_of_volumes_add_up():
    rng = np.random.default_rng(0)
    confidence, entropy, correct = rng.random((2, 5, 5)), rng.random((2, 5, 5)), rng.random((2, 5, 5)) < 0.5
    counts = CalibrationCounts(4)
    for v in range(2):
        counts.add(confidence[v], entropy[v], correct[v])
    pd.testing.assert_frame_equal(counts.frame(), counted(confidence, entropy, correct))
    with pytest.raises(ValueError, match=r"shapes .* differ"):
        counts.add(confidence, entropy, correct[0])


def test_the_calibration_error_is_how_far_confidence_is_from_accuracy():
    overconfident = counted(np.full(10, 0.91), np.zeros(10), np.arange(10) < 5)
    underconfident = counted(np.full(30, 0.6), np.zeros(30), np.ones(30, bool))
    assert expected_calibration_error(overconfident) == pytest.approx(0.41)
    both = pd.concat([overconfident, underconfident])
    assert expected_calibration_error(both) == pytest.approx(0.25 * 0.41 + 0.75 * 0.4)
    assert math.isnan(expected_calibration_error(CalibrationCounts(4).frame()))


def test_sites_are_pooled_before_the_calibration_error_is_taken():
    above, below = (counted(np.full(10, 0.52), np.zeros(10), np.arange(10) < right) for right in (10, 0))
    assert expected_calibration_error(pd.concat([above, below])) == pytest.approx(0.02)


def test_entropy_that_ranks_errors_first_finds_them_all_and_a_constant_one_none():
    correct = np.arange(12) < 9
    assert error_detection_auc(counted(np.ones(12), np.where(correct, 0.1, 1.2), correct)) == 1
    assert error_detection_auc(counted(np.ones(12), np.where(correct, 1.2, 0.1), correct)) == 0
    assert error_detection_auc(counted(np.ones(12), np.full(12, 0.3), correct)) == 0.5
    assert math.isnan(error_detection_auc(counted(np.ones(12), np.zeros(12), np.ones(12, bool))))
