import math
from dataclasses import replace
from pathlib import Path
from typing import get_args

import nibabel
import numpy as np
import pytest
import torch
from torch import Tensor

from dwc.base.errors import InputError
from dwc.data.cache import prepare
from dwc.data.grid import Grid
from dwc.data.head import head_box
from dwc.data.intensity import Scheme
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
    """Probabilities [n_classes, D, H, W] of a network at its means, in one pass, with the test's own z-score."""
    return net(z_scored(volume), sample=False)[0].softmax(dim=0).numpy()


def z_scored(volume: np.ndarray) -> Tensor:
    return torch.from_numpy(((volume - volume.mean()) / volume.std()).astype(np.float32))[None, None]


def entropy_of(p: np.ndarray) -> np.ndarray:
    return -(p * np.log(p)).sum(axis=0)


def drawn(net: MeshNet) -> MeshNet:
    """A plain network with weights drawn from a Bayesian one, using PyTorch's generator."""
    plain = MeshNet(*list(net.architecture.values())[1:4], bayesian=False, weight_norm=False)
    for ours, theirs in zip(plain.layers, net.layers, strict=True):
        ours.weight.data = torch.normal(theirs.weight_mu, theirs.weight_sigma)
        ours.bias.data = torch.normal(theirs.bias_mu, theirs.bias_sigma)
    return plain


def test_a_map_network_gives_its_most_probable_class_and_the_entropy_in_nats():
    net, volume = network(), image()
    prediction = predict_volume([net], volume)
    p = probabilities(net, volume)
    assert (prediction.labels.dtype, prediction.entropy.dtype) == (np.uint8, np.float32)
    assert (prediction.labels == p.argmax(axis=0)).mean() > 0.9999
    np.testing.assert_allclose(prediction.entropy, entropy_of(p), atol=1e-5)
    assert 0 <= prediction.entropy.min() < prediction.entropy.max() <= math.log(3) + 1e-6
    np.testing.assert_array_equal(prediction.draws, [np.bincount(prediction.labels.ravel(), minlength=3)])


def test_the_confidence_is_the_probability_of_the_chosen_class():
    nets, volume = [network(seed=0), network(seed=1)], image()
    mean = sum(probabilities(net, volume) for net in nets) / 2
    confidence = predict_volume(nets, volume).confidence
    assert confidence.dtype == np.float32
    np.testing.assert_allclose(confidence, mean.max(axis=0), atol=1e-5)
    assert 1 / 3 <= confidence.min() < confidence.max() <= 1


@pytest.mark.parametrize(("dilations", "activation"), [((1, 2, 4), "relu"), ((2, 16, 1), "elu")], ids=str)
@pytest.mark.parametrize("limit", [5e-5, 2e-4, 1e-3], ids=str)
@pytest.mark.parametrize("sigma", [None, 0.3], ids=["map", "bayesian"])
def test_blocks_of_any_size_give_what_one_pass_over_the_scan_gives(limit, sigma, dilations, activation):
    torch.manual_seed(1)
    net = MeshNet(3, 2, dilations, activation=activation, bayesian=sigma is not None, weight_norm=False)
    volume = image(32)[:19, :13, :16]
    whole, blocks = (predict_volume([net], volume, n_samples=2, memory_limit=gb) for gb in (1, limit))
    np.testing.assert_array_equal(blocks.labels, whole.labels)
    np.testing.assert_allclose(blocks.entropy, whole.entropy, atol=1e-5)
    np.testing.assert_allclose(blocks.confidence, whole.confidence, atol=1e-5)
    np.testing.assert_array_equal(blocks.draws, whole.draws)
    if sigma is None:
        np.testing.assert_allclose(blocks.entropy, entropy_of(probabilities(net, volume)), atol=1e-5)


def test_the_scan_is_predicted_in_the_heads_box_and_the_air_around_it_is_background():
    torch.manual_seed(1)
    net, volume = MeshNet(3, 2, (1, 2), bayesian=False, weight_norm=False), np.zeros((40, 44, 32), np.uint8)
    volume[8:30, 5:44, 10:20] = image(64)[:22, :39, :10]
    prediction, p = predict_volume([net], volume, memory_limit=1e-4), probabilities(net, volume)
    box = head_box(volume)
    assert box == (slice(8, 30), slice(5, 44), slice(10, 20))
    np.testing.assert_array_equal(prediction.labels[box], p.argmax(axis=0)[box])
    np.testing.assert_allclose(prediction.entropy[box], entropy_of(p)[box], atol=1e-5)
    air = np.ones(volume.shape, bool)
    air[box] = False
    assert not prediction.labels[air].any()
    assert not prediction.entropy[air].any()
    assert (prediction.confidence[air] == 1).all()
    np.testing.assert_array_equal(prediction.draws[0], np.bincount(prediction.labels.ravel(), minlength=3))


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_head_moved_by_16_voxels_gets_the_same_labels(axis):
    torch.manual_seed(1)
    net, volume = MeshNet(3, 2, (1, 2, 4), bayesian=False, weight_norm=False), np.zeros((64, 64, 64), np.uint8)
    volume[16:32, 12:36, 14:40] = image(64)[:16, :24, :26]
    still, moved = (predict_volume([net], np.roll(volume, step, axis), memory_limit=2e-3).labels for step in (0, 16))
    assert still.any()
    assert (np.roll(still, 16, axis) == moved).mean() > 0.9999


@pytest.mark.parametrize("scheme", get_args(Scheme))
def test_volumes_are_scaled_as_in_training(tmp_path, scheme):
    voxels = np.random.default_rng(1).integers(0, 200, (64, 64, 64), np.uint8)
    nibabel.save(nibabel.Nifti1Image(voxels, Grid(64, 3.0).affine(np.zeros(3))), tmp_path / "a.nii.gz")
    scan = Scan(tmp_path / "a.nii.gz", None, "a", "H", "test")
    where = LabelMap.load("coarse"), Grid(64, 3.0), tmp_path / "cache"
    data = prepare([scan], *where, intensity=scheme, progress=False)
    seen = []

    class Spy(MeshNet):
        def block_features(self, image, block, weights):
            seen.append(image.clone())
            return super().block_features(image, block, weights)

    predict_volume([Spy(3, 2, (1,), bayesian=False)], data.volume(0)[0], intensity=scheme)
    np.testing.assert_array_equal(seen[0][0], data.scaling(0)(data.volume(0)[0]))


@pytest.mark.parametrize("limit", [1, 1e-3, 3e-4], ids=str)
def test_an_ensemble_of_unlike_networks_averages_the_same_voxels_and_scores_their_truth(limit):
    torch.manual_seed(1)
    shapes = ((2, (1,)), (5, (2, 4)), (3, (1, 1, 2)))
    nets = [MeshNet(3, width, dilations, bayesian=False, weight_norm=False) for width, dilations in shapes]
    volume = image(32)[:26, :20, :23]
    truth = np.random.default_rng(1).integers(0, 3, volume.shape, np.uint8)
    found = predict_volume(nets, volume, memory_limit=limit, truth=truth)
    mean = sum(probabilities(net, volume) for net in nets) / len(nets)
    np.testing.assert_allclose(found.entropy, entropy_of(mean), atol=1e-5)
    of_truth = np.take_along_axis(mean, truth[None].astype(np.int64), axis=0)
    assert found.log_likelihood == pytest.approx(np.log(of_truth).sum(), rel=1e-5)
    information = entropy_of(mean) - sum(entropy_of(probabilities(net, volume)) for net in nets) / len(nets)
    np.testing.assert_allclose(found.mutual_information, information, atol=1e-5)


def test_a_true_label_outside_the_heads_box_counts_as_nearly_impossible():
    volume = np.zeros((64, 64, 64), np.uint8)
    volume[16:32, 12:36, 14:40] = image(64)[:16, :24, :26]
    truth = np.zeros(volume.shape, np.uint8)
    without, within = (predict_volume([network()], volume, truth=t).log_likelihood for t in (truth, _marked(truth)))
    assert within - without == pytest.approx(math.log(1e-6), rel=1e-5)
    assert predict_volume([network()], volume).log_likelihood is None


def _marked(truth: np.ndarray) -> np.ndarray:
    marked = truth.copy()
    marked[0, 0, 0] = 1
    return marked


def test_ensembles_average_probabilities_not_votes():
    nets, volume = [network(seed=0), network(seed=1)], image()
    mean = sum(probabilities(net, volume) for net in nets) / 2
    prediction = predict_volume(nets, volume)
    np.testing.assert_allclose(prediction.entropy, entropy_of(mean), atol=1e-5)
    assert (prediction.labels == mean.argmax(axis=0)).mean() > 0.9999


def test_a_bayesian_network_weighs_as_much_as_a_map_network_however_often_it_is_drawn():
    nets, volume = [network(sigma=1e-7, seed=0), network(seed=1)], image()
    mean = sum(probabilities(net, volume) for net in nets) / 2
    np.testing.assert_allclose(predict_volume(nets, volume, n_samples=3).entropy, entropy_of(mean), atol=1e-4)


def test_mutual_information_and_variance_are_how_far_networks_disagree():
    nets, volume = [network(seed=0), network(seed=1)], image()
    p, q = (probabilities(net, volume) for net in nets)
    prediction = predict_volume(nets, volume, memory_limit=1e-3)
    information = entropy_of((p + q) / 2) - (entropy_of(p) + entropy_of(q)) / 2
    np.testing.assert_allclose(prediction.mutual_information, information, atol=1e-4)
    np.testing.assert_allclose(prediction.variance, (((p - q) / 2) ** 2).sum(axis=0), atol=1e-4)
    assert prediction.mutual_information.max() > 0.01
    alone = predict_volume(nets[:1], volume)
    assert not alone.mutual_information.any()
    assert not alone.variance.any()


def test_a_bayesian_network_whose_sigmas_vanish_predicts_as_its_means():
    net, volume = network(sigma=1e-7), image()
    prediction = predict_volume([net], volume, n_samples=3)
    np.testing.assert_allclose(prediction.entropy, entropy_of(probabilities(net, volume)), atol=1e-4)


@torch.no_grad()
def test_samples_approach_the_mean_of_the_softmax_over_draws_of_the_weights():
    net, volume = network(sigma=0.5), image(32)[:12, :12, :12]
    torch.manual_seed(7)
    p = sum(probabilities(drawn(net), volume) for _ in range(600)) / 600
    few, many = (predict_volume([net], volume, n_samples=n).entropy for n in (3, 600))
    assert abs(many - entropy_of(p)).mean() < 0.02
    assert abs(many - entropy_of(p)).mean() < 0.3 * abs(few - entropy_of(p)).mean()


@torch.no_grad()
def test_the_spread_of_a_volume_over_draws_is_that_of_weights_drawn_by_brute_force():
    net, volume = network(sigma=0.2), image(32)[:12, :12, :12]
    torch.manual_seed(7)
    labels = [probabilities(drawn(net), volume).argmax(axis=0).ravel() for _ in range(600)]
    theirs = np.array([np.bincount(each, minlength=3) for each in labels])
    ours = predict_volume([net], volume, n_samples=600).draws
    assert ours.shape == (600, 3)
    np.testing.assert_allclose(ours.mean(axis=0), theirs.mean(axis=0), atol=0.2 * theirs.std(axis=0).max())
    np.testing.assert_allclose(ours.std(axis=0), theirs.std(axis=0), rtol=0.1)


@torch.no_grad()
def test_drawn_weights_and_local_noise_agree_voxel_by_voxel_but_not_in_sums_over_voxels():
    net, x = network(sigma=0.1), z_scored(image(32)[:12, :12, :12])
    torch.manual_seed(7)
    weights = [net.convolutions(seed)[0] for seed in range(1500)]
    once = torch.stack([torch.conv3d(x, *each, padding=1)[0, 0] for each in weights])
    local = torch.stack([net.layers[0](x, sample=True)[0, 0] for _ in range(1500)])
    spread = local.std(dim=0)
    assert ((once.mean(dim=0) - local.mean(dim=0)) / spread).abs().mean() < 0.06
    assert (once.std(dim=0) / spread - 1).abs().mean() < 0.06
    sums = [each.sum(dim=(1, 2, 3)).std() for each in (once, local)]
    assert sums[0] > 5 * sums[1]


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


def test_each_draw_and_each_network_has_weights_of_its_own_however_many_draws_there_are():
    net, volume = network(sigma=0.5), image()
    two, four = (predict_volume([net, net], volume, n_samples=n).draws for n in (2, 4))
    assert len(np.unique(four, axis=0)) == 8
    np.testing.assert_array_equal(two, four[[0, 1, 4, 5]])


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


def test_the_folder_of_a_run_stands_for_its_posterior(networks):
    ensemble = load_networks([Path(networks["map"].name).parent, networks["finetune"].name])
    assert [posterior.sha256 for posterior in ensemble.posteriors] == [networks[n].sha256 for n in ("map", "finetune")]
    with pytest.raises(InputError, match=r"holds no posterior\.safetensors; give the folder of a run"):
        load_networks(Path(networks["map"].name).parents[1])


SAME_GRID = {"grid_size": 32, "voxel_size": 1.0, "sub_volume": 32}


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
        (
            {"preprocessing": {**SAME_GRID, "intensity": "min-max per volume"}},
            "preprocessing intensity min-max per volume is not intensity z-score per volume as in",
        ),
    ],
)
def test_networks_of_another_label_map_or_grid_are_refused_naming_both(networks, tmp_path, metadata, message):
    odd = changed(networks["a"], tmp_path / "odd.safetensors", **metadata)
    with pytest.raises(InputError, match=message) as refusal:
        load_networks([networks["map"].name, odd])
    assert odd in str(refusal.value)
    assert networks["map"].name in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_file_of_an_earlier_version_predicts_with_relu_and_z_scores_and_beside_a_new_one(networks, tmp_path):
    metadata = networks["a"].metadata
    architecture = {key: value for key, value in metadata["architecture"].items() if key != "activation"}
    old = changed(networks["a"], tmp_path / "old.safetensors", architecture=architecture, preprocessing=SAME_GRID)
    ensemble = load_networks([old, networks["map"].name])
    assert ensemble.intensity == "z_score"
    assert ensemble.networks[0].architecture["activation"] == "relu"


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"label_map": None}, "was trained on label map None; give its TSV as `label_map`"),
        ({"label_map": {"name": "mine", "sha256": "0"}}, "was trained on label map 'mine'; give its TSV"),
        ({"label_map": {"name": "fifty", "sha256": "0"}}, "another table of label map 'fifty'"),
        ({"preprocessing": None}, "names no preprocessing grid"),
        (
            {"preprocessing": {"grid_size": 32, "voxel_size": 1.0, "sub_volume": 16, "intensity": "z-score"}},
            "this dwc cannot preprocess",
        ),
        ({"label_map": {"name": "fifty", "sha256": LabelMap.load("fifty").sha256}}, "has 9 classes, but its label map"),
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
