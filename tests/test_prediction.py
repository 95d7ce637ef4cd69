import math
from dataclasses import replace
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch

from dwc.base.errors import InputError
from dwc.data.cache import prepare
from dwc.data.cubes import join_volume, split_volume
from dwc.data.grid import Grid
from dwc.data.labels import LabelMap
from dwc.data.manifest import Scan
from dwc.meshnet import MeshNet
from dwc.posterior import Posterior
from dwc.prediction import load_networks, predict_volume
from dwc_kernels import FFGConv3d, inverse_softplus

pytest_plugins = ["tests.tiny_runs"]
pytestmark = pytest.mark.usefixtures("one_thread")


def network(*, sigma: float | None = None, seed: int = 0) -> MeshNet:
    """Three classes, one hidden layer of two filters; a MAP network without sigma."""
    torch.manual_seed(seed)
    net = MeshNet(3, 2, (1,), bayesian=sigma is not None, weight_norm=False)
    for layer in net.layers:
        if isinstance(layer, FFGConv3d):
            for rho in (layer.weight_rho, layer.bias_rho):
                torch.nn.init.constant_(rho, float(inverse_softplus(torch.tensor(sigma))))
    return net


def image(edge: int = 64) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (edge, edge, 32), np.uint8)


@torch.no_grad()
def probabilities(net: MeshNet, volume: np.ndarray) -> np.ndarray:
    """[n, n_classes, 32, 32, 32] of a network without noise, by a z-score of the test's own."""
    z = (volume - volume.mean()) / volume.std()
    cubes = torch.from_numpy(split_volume(z.astype(np.float32)))[:, None]
    return net(cubes, sample=False).softmax(dim=1).numpy()


def entropy_of(p: np.ndarray, shape) -> np.ndarray:
    return join_volume(-(p * np.log(p)).sum(axis=1), shape)


def test_a_map_network_gives_its_most_probable_class_and_the_entropy_in_nats():
    net, volume = network(), image()
    prediction = predict_volume([net], volume)
    p = probabilities(net, volume)
    assert (prediction.labels.dtype, prediction.entropy.dtype) == (np.uint8, np.float32)
    assert (prediction.labels == join_volume(p.argmax(axis=1), volume.shape)).mean() > 0.9999
    np.testing.assert_allclose(prediction.entropy, entropy_of(p, volume.shape), atol=1e-5)
    assert 0 <= prediction.entropy.min() < prediction.entropy.max() <= math.log(3) + 1e-6


def test_the_confidence_is_the_probability_of_the_chosen_class():
    nets, volume = [network(seed=0), network(seed=1)], image()
    mean = sum(probabilities(net, volume) for net in nets) / 2
    confidence = predict_volume(nets, volume).confidence
    assert confidence.dtype == np.float32
    np.testing.assert_allclose(confidence, join_volume(mean.max(axis=1), volume.shape), atol=1e-5)
    assert 1 / 3 <= confidence.min() < confidence.max() <= 1


def test_volumes_are_z_scored_as_in_training(tmp_path):
    voxels = np.random.default_rng(1).integers(0, 200, (64, 64, 64), np.uint8)
    nibabel.save(nibabel.Nifti1Image(voxels, Grid(64, 3.0).affine(np.zeros(3))), tmp_path / "a.nii.gz")
    scan = Scan(tmp_path / "a.nii.gz", None, "a", "H", "test")
    data = prepare([scan], LabelMap.load("coarse"), Grid(64, 3.0), tmp_path / "cache", progress=False)
    seen = []

    class Spy(MeshNet):
        def forward(self, x, sample=None):
            seen.append(x.clone())
            return super().forward(x, sample)

    predict_volume([Spy(3, 2, (1,), bayesian=False)], data.volume(0)[0])
    expected = torch.from_numpy(data.z_score(0, data._cubes(0, "image")))  # items need labels, this scan has none
    assert torch.equal(torch.cat(seen)[:, 0], expected)


def test_ensembles_average_probabilities_not_votes():
    nets, volume = [network(seed=0), network(seed=1)], image()
    mean = sum(probabilities(net, volume) for net in nets) / 2
    prediction = predict_volume(nets, volume)
    np.testing.assert_allclose(prediction.entropy, entropy_of(mean, volume.shape), atol=1e-5)
    assert (prediction.labels == join_volume(mean.argmax(axis=1), volume.shape)).mean() > 0.9999


def test_a_bayesian_network_whose_sigmas_vanish_predicts_as_its_means():
    net, volume = network(sigma=1e-7), image()
    prediction = predict_volume([net], volume, n_samples=3)
    np.testing.assert_allclose(prediction.entropy, entropy_of(probabilities(net, volume), volume.shape), atol=1e-4)


@torch.no_grad()
def test_samples_approach_the_mean_of_the_softmax_over_the_networks_noise():
    net, volume = network(sigma=0.5), image(32)
    torch.manual_seed(7)
    z = torch.from_numpy(((volume - volume.mean()) / volume.std()).astype(np.float32))[None, None]
    p = torch.stack([net(z, sample=True).softmax(dim=1)[0] for _ in range(200)]).mean(dim=0)
    expected = torch.special.entr(p).sum(dim=0).numpy()
    one, two, many = (predict_volume([net], volume, n_samples=n).entropy for n in (1, 2, 150))
    errors = [abs(entropy - expected).mean() for entropy in (many, two, one)]
    assert errors[0] < 0.03
    assert errors[0] < 0.3 * errors[1] < 0.3 * errors[2]
    assert many.mean() == pytest.approx(expected.mean(), abs=0.01)


def test_the_seed_decides_and_the_callers_random_numbers_stay_untouched():
    net, volume = network(sigma=0.5), image()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = predict_volume([net], volume, n_samples=2)
    assert torch.equal(torch.rand(3), expected)
    again, other = (predict_volume([net], volume, n_samples=2, seed=seed) for seed in (0, 1))
    np.testing.assert_array_equal(first.entropy, again.entropy)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert abs(first.entropy - other.entropy).mean() > 0.01


def test_each_sub_volume_and_network_has_noise_of_its_own():
    net = network(sigma=0.5)
    volume = np.tile(image(32), (2, 2, 1))  # four equal sub-volumes
    cubes = split_volume(predict_volume([net], volume, n_samples=1).entropy)
    for i in range(3):
        assert abs(np.corrcoef((cubes[i] - cubes.mean(0)).ravel(), (cubes[i + 1] - cubes.mean(0)).ravel())[0, 1]) < 0.5
        assert abs(cubes[i] - cubes[i + 1]).mean() > 0.01
    twice = predict_volume([net, net], volume, n_samples=1)  # with one noise for both it would equal the single one
    assert abs(split_volume(twice.entropy) - cubes).mean() > 0.01


def test_a_sub_volume_is_predicted_the_same_whatever_else_the_volume_holds():
    net, volume = network(sigma=0.5), image()
    swapped = volume.copy()
    swapped[32:, 32:] = volume[32:, 32:][::-1]  # mean and sd stay
    first, second = (predict_volume([net], v, n_samples=12).entropy for v in (volume, swapped))
    np.testing.assert_array_equal(first[:32], second[:32])
    assert (first[32:, 32:] != second[32:, 32:]).any()


def test_the_number_of_threads_changes_no_more_than_rounding():
    net, volume = network(sigma=0.5), image()
    one = predict_volume([net], volume, n_samples=2)
    torch.set_num_threads(2)
    try:
        two = predict_volume([net], volume, n_samples=2)
    finally:
        torch.set_num_threads(1)
    np.testing.assert_allclose(one.entropy, two.entropy, atol=1e-5)
    assert (one.labels == two.labels).mean() > 0.9999


def test_bf16_predicts_nearly_as_fp32():
    net, volume = network(sigma=0.1), image()
    full, half = (predict_volume([net], volume, n_samples=2, precision=precision) for precision in ("fp32", "bf16"))
    assert half.entropy.dtype == np.float32
    assert (full.labels == half.labels).mean() > 0.97


@pytest.mark.parametrize(
    ("networks", "options"), [([], {}), ([None], {"n_samples": 0}), ([None], {"seed": -1})], ids=str
)
def test_a_prediction_of_nothing_is_refused(networks, options):
    with pytest.raises(ValueError, match="networks, n_samples"):
        predict_volume(networks, image(), **options)


def test_an_ensemble_of_map_and_bayesian_networks_loads_with_its_grid_and_classes(networks):
    ensemble = load_networks([networks["map"].name, networks["finetune"].name])
    assert [net.bayesian for net in ensemble.networks] == [False, True]
    assert ensemble.grid == Grid(32, 1.0)
    assert ensemble.label_map.sha256 == LabelMap.load("coarse").sha256
    assert [posterior.sha256 for posterior in ensemble.posteriors] == [networks[n].sha256 for n in ("map", "finetune")]


def changed(posterior: Posterior, path: Path, **metadata) -> str:
    replace(posterior, metadata={**posterior.metadata, **metadata}).save(path)
    return str(path)


def test_networks_of_one_label_map_predict_together_whatever_its_file_was_called(networks, tmp_path):
    theirs = {**networks["a"].metadata["label_map"], "name": "ours"}
    renamed = changed(networks["a"], tmp_path / "renamed.safetensors", label_map=theirs)
    assert len(load_networks([networks["map"].name, renamed]).networks) == 2


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"label_map": {"name": "coarse", "sha256": "0" * 64}}, "label map name coarse, sha256 0000.* is not .* as in"),
        (
            {"preprocessing": {"grid_size": 64, "voxel_size": 4.0, "sub_volume": 32, "intensity": "z-score"}},
            "preprocessing .*grid_size 64.* is not .*grid_size 32",
        ),
        ({"preprocessing": None}, "preprocessing missing is not"),
    ],
)
def test_networks_of_another_label_map_or_grid_are_refused_naming_both(networks, tmp_path, metadata, message):
    odd = changed(networks["a"], tmp_path / "odd.safetensors", **metadata)
    with pytest.raises(InputError, match=message) as refusal:
        load_networks([networks["map"].name, odd])
    assert odd in str(refusal.value)
    assert networks["map"].name in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"label_map": None}, "was trained on label map None; give its TSV as --label_map"),
        ({"label_map": {"name": "mine", "sha256": "0"}}, "was trained on label map 'mine'; give its TSV"),
        ({"label_map": {"name": "fifty", "sha256": "0"}}, "another table of label map 'fifty'"),
        ({"preprocessing": None}, "names no preprocessing grid"),
        (
            {"preprocessing": {"grid_size": 32, "voxel_size": 1.0, "sub_volume": 16, "intensity": "z-score"}},
            "this dwc cannot preprocess",
        ),
        ({"label_map": {"name": "fifty", "sha256": LabelMap.load("fifty").sha256}}, "has 9 classes, its label map"),
        ({"architecture": None}, "holds no MeshNet"),
    ],
)
def test_a_network_whose_header_does_not_fit_is_refused(networks, tmp_path, metadata, message):
    path = changed(networks["map"], tmp_path / "odd.safetensors", **metadata)
    with pytest.raises(InputError, match=message):
        load_networks([path])


def test_the_same_network_twice_is_refused(networks, tmp_path):
    networks["a"].save(tmp_path / "copy.safetensors")
    with pytest.raises(InputError, match=r"copy.safetensors: is the same network as .*posterior.safetensors"):
        load_networks([networks["a"].name, tmp_path / "copy.safetensors"])


def test_a_label_map_of_ones_own_is_given_as_its_table(networks, tmp_path):
    table = tmp_path / "mine.tsv"
    table.write_text("index\tclass\tname\n" + "".join(f"{10 + k}\t{k}\tc{k}\n" for k in range(1, 9)))
    mine = LabelMap.load(table)
    path = changed(networks["map"], tmp_path / "n.safetensors", label_map={"name": "mine", "sha256": mine.sha256})
    assert load_networks([path], str(table)).label_map == mine
