import pytest
import torch
from torch.nn.functional import one_hot

from dwc.metrics.confusion import mean_dice
from dwc.training.validation import draw_sub_volumes, validation_confusion

CPU = {"n_classes": 4, "batch_size": 2, "device": torch.device("cpu")}


@pytest.fixture
def dataset():
    torch.manual_seed(0)
    # Images are the "prediction": class 3 is never true, class 2 never predicted.
    return [(torch.tensor([0, 1, 3])[torch.randint(3, (1, 4, 4, 4))], torch.randint(3, (4, 4, 4))) for _ in range(5)]


def logits_of(images):
    return one_hot(images[:, 0], 4).movedim(-1, 1).float()


def test_the_confusion_counts_every_voxel_of_the_drawn_sub_volumes_once(dataset):
    confusion = validation_confusion(logits_of, dataset, [0, 2, 4], **CPU)
    assert confusion.sum() == 3 * 64
    for truth in range(4):
        for predicted in range(4):
            count = sum(int(((labels == truth) & (image[0] == predicted)).sum()) for image, labels in dataset[::2])
            assert confusion[truth, predicted] == count


def test_nothing_held_out_is_no_dice_rather_than_zero():
    confusion = validation_confusion(logits_of, [], [], **CPU)
    assert mean_dice(confusion, with_background=True) is None


def test_it_ends_between_batches_when_told(dataset):
    asked = []
    assert validation_confusion(logits_of, dataset, [0, 1, 2], keep_going=lambda: asked.append(0), **CPU) is None
    assert len(asked) == 1


def test_the_draw_is_bounded_fixed_by_its_seed_and_without_repeats():
    draw = draw_sub_volumes(1000, 50, seed=3)
    assert draw == draw_sub_volumes(1000, 50, seed=3)
    assert draw != draw_sub_volumes(1000, 50, seed=4)
    assert len(set(draw)) == 50
    assert draw == sorted(draw)
    assert draw_sub_volumes(7, 50, seed=3) == list(range(7))
