"""What a person sees while a network trains: progress bar and TensorBoard's pictures."""

import io
from dataclasses import replace

import matplotlib.image
import numpy as np
import pytest
import torch

from dwc.data.dataset import SubVolumes
from dwc.meshnet import MeshNet
from dwc.training import log
from dwc.training.log import Journal
from dwc.training.loop import train_network
from dwc.training.panel import Panel

pytest_plugins = ["tests.tiny_runs"]


class Volume(SubVolumes):
    """One scan in memory: a bright box in air, whose anterior half is class 1 and whose posterior half is class 2."""

    def __init__(self, label_map):
        self.label_map = label_map

    def volume(self, v):
        image, truth = np.zeros((2, 32, 32, 32), np.uint8)
        image[6:26, 4:28, 8:24], truth[6:26, 10:12, 16:24], truth[6:26, 10:12, 8:16] = 200, 1, 2
        return image, truth

    def scaling(self, v):
        return lambda image: image.astype(np.float32) / 255


class Classes:
    n_classes = 3


@pytest.fixture
def network():
    torch.manual_seed(0)
    return MeshNet(width=2, n_classes=3, dilations=(1, 2), bayesian=True)


def test_the_panel_shows_scan_truth_prediction_and_entropy_with_anterior_up(network):
    picture = Panel(Volume(Classes())).draw(network, torch.device("cpu"), "fp32")
    assert picture.dtype == np.uint8
    assert picture.shape == (16 * 16, 4 * 20 * 16, 3)  # the head's box, each voxel as 16 x 16 pixels
    scan, truth, _, entropy = np.split(picture, 4, axis=1)
    assert (scan == 200).all()
    front, back = truth[80, 128], truth[180, 128]  # class 1 is anterior
    blue, yellow = (np.array(colour) for colour in ((0x44, 0x77, 0xDD), (0xE6, 0xA8, 0x17)))
    assert np.abs(front - (0.3 * 200 + 0.7 * blue)).max() < 2
    assert np.abs(back - (0.3 * 200 + 0.7 * yellow)).max() < 2
    assert entropy.min() > 0
    assert (entropy[..., 0] == entropy[..., 1]).all()


def test_the_panels_prediction_is_that_of_the_whole_scan(network):
    panel = Panel(Volume(Classes()))
    with torch.inference_mode():
        whole = network(torch.from_numpy(panel.image)[None, None], sample=False)[0].argmax(dim=0).numpy()
    predicted = np.split(panel.draw(network, torch.device("cpu"), "fp32"), 4, axis=1)[2]
    classes = whole[panel.block][:, 0]
    assert len(np.unique(classes)) > 1
    assert np.abs(predicted[::16, ::16] - 255 * panel._painted(classes).swapaxes(0, 1)[::-1]).max() < 1


def test_tensorboard_gets_a_picture_after_each_epoch_and_training_the_same_bits(settings, tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    watched = train_network(replace(settings, mode="vi", out=tmp_path / "watched"))
    monkeypatch.setattr(log, "find_spec", lambda name: None)
    assert train_network(replace(settings, mode="vi", out=tmp_path / "alone")).sha256 == watched.sha256
    assert not (tmp_path / "alone" / "tensorboard").exists()
    events = EventAccumulator(str(tmp_path / "watched" / "tensorboard"))
    events.Reload()
    images = events.Images("validation/scan, truth, prediction, entropy")
    assert [image.step for image in images] == [2, 4, 6]
    assert matplotlib.image.imread(io.BytesIO(images[-1].encoded_image_string)).ndim == 3


def test_the_progress_bar_says_when_the_first_dice_comes_and_then_of_which_step_it_is(tmp_path, capfd):
    journal = Journal(tmp_path, [], title="map", step=0, steps_per_epoch=2, total_steps=4)
    with journal:
        journal.step(1, loss=0.5)
        journal._bar.refresh()
        assert "held-out Dice from step 2 on" in capfd.readouterr().err
        row = {"step": 2, "dice": 0.25, "dice_with_background": 0.5, "penalty": 1.0, "layers": {}}
        journal.epoch(row)
        journal.step(3, loss=0.5)
        journal._bar.refresh()
        assert "held-out Dice 0.250 at step 2" in capfd.readouterr().err
        journal.epoch(row | {"step": 4, "dice": None})
        journal.step(4, loss=0.5)
        journal._bar.refresh()
        assert "held-out Dice undefined at step 4" in capfd.readouterr().err
