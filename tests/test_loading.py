"""A network from its file as a PyTorch module, from Python and through torch.hub."""

from pathlib import Path

import numpy as np
import pytest
import torch

import dwc
from dwc.data.grid import Grid

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("kind", ["map", "finetune"])
def test_a_loaded_network_and_its_preprocessing_segment_a_scan_as_the_means_do(networks, site, kind):
    net = dwc.load_network(networks[kind].name)
    with torch.inference_mode():
        classes = net(net.preprocessing(site / "sub-3_T1w.nii.gz")).argmax(1)[0].numpy()
    means = dwc.Posterior(networks[kind].mu, {}, networks[kind].metadata)
    segmented = dwc.predict(means, site / "sub-3_T1w", dwc.PredictionSettings(device="cpu"))
    np.testing.assert_array_equal(classes, segmented.prediction.labels)
    ids = net.preprocessing.label_map.to_ids(classes)
    np.testing.assert_array_equal(ids, np.asarray(segmented.labels().dataobj))


def test_a_loaded_network_says_what_it_expects_and_draws_in_training_mode_only(networks):
    net = dwc.load_network(Path(networks["finetune"].name).parent)
    facts = net.preprocessing
    assert (facts.grid, facts.intensity, facts.label_map.name) == (Grid(32, 1.0), "z_score", "coarse")
    x = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(net(x), net(x))
    assert not torch.equal(net.train()(x), net(x))


def test_one_network_is_loaded_and_not_several(networks):
    with pytest.raises(dwc.InputError, match="give one posterior"):
        dwc.load_network([networks["a"].name, networks["b"].name])


def test_torch_hub_loads_a_network_from_the_source_tree(networks):
    net = torch.hub.load(str(ROOT), "meshnet", source="local", posterior=networks["map"].name)
    x = torch.randn(1, 1, 8, 8, 8)
    assert torch.equal(net(x), dwc.load_network(networks["map"].name)(x))
    assert net.preprocessing.label_map.name == "coarse"
