from pathlib import Path

import nibabel
import numpy as np
import pandas as pd
import torch

from benchmarks.cubes import GRID, draw, moved, position_scores
from dwc.data.cache import prepare
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan
from dwc.meshnet import MeshNet


def test_a_network_that_knows_no_place_scores_the_same_wherever_the_head_is(tmp_path):
    image, truth = np.zeros((64, 64, 64), np.uint8), np.zeros((64, 64, 64), np.int16)
    image[20:44, 20:40, 20:44], truth[20:44, 20:40, 20:44] = 200, 2
    for name, voxels in (("T1w", image), ("dseg", truth)):
        nibabel.save(nibabel.Nifti1Image(voxels, GRID.affine(np.zeros(3))), tmp_path / f"{name}.nii.gz")
    scan = Scan(tmp_path / "T1w.nii.gz", tmp_path / "dseg.nii.gz", "1", "H", "test")
    data = prepare([scan], LabelMap.load("coarse"), GRID, tmp_path / "cache", progress=False)
    network = MeshNet(9, 1, (1,), bayesian=False, weight_norm=False)
    with torch.no_grad():  # class 1 where it is bright
        for layer in network.layers:
            layer.weight.zero_()
            layer.bias.zero_()
        network.layers[0].weight[0, 0, 1, 1, 1] = 1
        network.layers[1].weight[1] = 1
        network.layers[1].bias[0] = 0.1
    scores = position_scores(network, data)
    assert scores.keys() == {"cubes", "cubes shifted", "whole", "head moved"}
    assert min(scores.values()) > 0.999


def test_what_leaves_a_volume_comes_back_on_the_other_side():
    volume = np.arange(4**3).reshape(4, 4, 4)
    np.testing.assert_array_equal(moved(moved(volume, 3), -3), volume)
    np.testing.assert_array_equal(moved(volume, 1)[:, 1:], volume[:, :-1])


def test_the_figure_has_a_group_per_kind_of_cube(tmp_path: Path):
    row = {"seed": 0, "steps": 600, "cubes": 0.4, "cubes shifted": 0.2, "whole": 0.3, "head moved": 0.2}
    draw(pd.DataFrame([{"training": "paper", **row}, {"training": "random", **row}]), tmp_path / "cubes.png")
    assert (tmp_path / "cubes.png").stat().st_size > 5000
