"""Where the noise of a whole network comes from: seeds, sampling or not, weights drawn once, and predictions."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

from dwc_kernels import (
    FFGConv3d,
    FFGLinear,
    convert,
    draw_weights,
    drawn_weights,
    predict,
    sampling,
    seed_noise,
)
from dwc_kernels.noise import normal


def test_seed_noise_differs_between_layers_calls_and_ranks_and_repeats():
    torch.manual_seed(0)
    twins = nn.ModuleList([FFGConv3d(1, 2, 1, sigma_init=1.0) for _ in range(2)])
    twins[1].load_state_dict(twins[0].state_dict())
    x = torch.ones(1, 1, 4, 4, 4)

    def draws(seed, rank):
        seed_noise(twins, seed, rank=rank)
        return [layer(x).detach() for _ in range(2) for layer in twins]

    first = draws(3, 0)
    everything = [*first, *draws(3, 1), *draws(3, 2), *draws(4, 0)]
    for i, a in enumerate(everything):
        assert not any(torch.equal(a, b) for b in everything[i + 1 :])
    assert all(torch.equal(a, b) for a, b in zip(first, draws(3, 0), strict=True))
    draws(3, 1)
    torch.manual_seed(3)
    seed_noise(twins, 3, rank=0)
    assert torch.equal(twins[0](x), first[0])


def test_sampling_overrides_the_mode_and_the_argument_overrides_it(net, x):
    net.eval()
    mean = net(x)
    with sampling(net, True):
        assert not torch.equal(net(x), mean)
        with sampling(net, False):
            assert torch.equal(net(x), mean)
        assert torch.equal(net[0](x, sample=False), net[0](x, sample=False))
        assert not torch.equal(net(x), net(x))
    assert torch.equal(net(x), mean)
    with pytest.raises(RuntimeError, match="inside"), sampling(net, True):
        raise RuntimeError("inside")
    assert torch.equal(net(x), mean)


def test_sampling_takes_nothing_but_true_and_false(net):
    with pytest.raises(ValueError, match="sample must be True or False, got 'eval'"), sampling(net, "eval"):
        pass


def test_drawn_weights_make_one_deterministic_network(net, x):
    net.eval()
    with draw_weights(net, 5):
        first, again = net(x), net(x)
        batch = torch.cat([net(x[:1]), net(x[1:])])
    assert torch.equal(first, again)
    torch.testing.assert_close(batch, first)  # one draw for all volumes
    with draw_weights(net, 5, rank=0):
        assert torch.equal(net(x), first)
    with draw_weights(net, 5, rank=1):
        assert not torch.equal(net(x), first)
    with draw_weights(net, 6):
        assert not torch.equal(net(x), first)
    torch.manual_seed(1)
    with draw_weights(net):
        drawn = net(x)
    torch.manual_seed(1)
    with draw_weights(net):
        assert torch.equal(net(x), drawn)


def test_a_drawn_weight_is_mu_plus_sigma_times_the_noise_function_and_layers_differ():
    twins = nn.ModuleList([FFGLinear(4, 3, sigma_init=0.5) for _ in range(2)])
    twins[1].load_state_dict(twins[0].state_dict())
    with draw_weights(twins, 7):
        weights = [layer(torch.eye(4)) - layer(torch.zeros(4)) for layer in twins]
    eps = [(w.t() - layer.weight_mu) / layer.weight_sigma for w, layer in zip(weights, twins, strict=True)]
    assert (eps[0] - eps[1]).abs().min() > 1e-4
    many = FFGLinear(300, 200, sigma_init=0.5)
    with draw_weights(many, 7):
        drawn = many._fixed_weights(None)[0]
        eps = ((drawn - many.weight_mu) / many.weight_sigma).flatten()
    assert abs(eps.mean()) < 0.02
    assert abs(eps.std() - 1) < 0.02
    # The documented function of (layer's seed, index): one seed reproduces all of it.
    from dwc_kernels.drawing import _derived_seeds

    torch.testing.assert_close(
        eps.view(200, 300), normal(many.weight_mu, _derived_seeds(7, 2, 0)[0]), rtol=0, atol=1e-3
    )


def test_sums_over_voxels_spread_as_drawn_weights_say_and_not_as_independent_voxels():
    layer = FFGConv3d(1, 1, 1, sigma_init=0.1)
    x = torch.ones(1, 1, 8, 8, 8)
    with torch.no_grad():
        voxels = torch.stack([layer(x).sum() for _ in range(200)])
        weights = []
        for seed in range(200):
            with draw_weights(layer, seed):
                weights.append(layer(x).sum())
    exact = 512 * 0.1 * 2**0.5
    assert torch.stack(weights).std() == pytest.approx(exact, rel=0.2)
    assert voxels.std() == pytest.approx(exact / 512**0.5, rel=0.2)


def test_gradients_reach_mean_and_sigma_through_drawn_weights(net, x):
    with draw_weights(net, 1):
        net(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in net.parameters())


def test_drawn_weights_have_the_dtype_that_the_layer_has_in_its_forward(net, x):
    net.eval()
    with draw_weights(net, 0):
        y = net(x)
        torch.testing.assert_close(net.double()(x.double()).float(), y)


def test_shared_weights_are_drawn_once():
    net = nn.Sequential(nn.Conv3d(2, 2, 1, bias=False), nn.Conv3d(2, 2, 1, bias=False))
    net[1].weight = net[0].weight
    convert(net, sigma_init=1.0)
    with draw_weights(net, 0):
        x = torch.randn(1, 2, 2, 2, 2)
        assert torch.equal(net[0](x), net[1](x))


@pytest.mark.parametrize("draw", ["weights", "voxels"])
def test_predict_agrees_with_the_samples_it_was_made_of(net, x, draw):
    net.train()
    prediction = predict(net, x, 5, draw=draw, seed=3)
    assert net.training
    assert net[3].training
    kept = []
    predict(net, x, 5, draw=draw, seed=3, forward=lambda x: kept.append(net(x)) or kept[-1])
    p = torch.stack(kept).softmax(2)
    entropy = -(p.mean(0) * p.mean(0).log()).sum(1)
    torch.testing.assert_close(prediction.mean, p.mean(0))
    torch.testing.assert_close(prediction.variance, p.var(0, correction=0))
    torch.testing.assert_close(prediction.entropy, entropy)
    expected = entropy + (p * p.log()).sum(2).mean(0)
    torch.testing.assert_close(prediction.mutual_information, expected, rtol=1e-3, atol=1e-5)
    assert prediction.mutual_information.min() >= 0
    assert not torch.equal(kept[0], kept[1])


def test_predict_leaves_the_generator_and_takes_other_outputs(net, x):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    raw = predict(net, x, 3, activation=None, draw="voxels", seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert raw.entropy is None
    assert raw.mutual_information is None
    binary = predict(net, x, 3, activation="sigmoid", seed=1)
    assert binary.entropy.shape == (2, 8, 8, 8)
    certain = predict(net, x, 1, seed=1)
    assert not certain.variance.any()
    assert not certain.mutual_information.any()
    for bad in (dict(n_samples=0), dict(draw="both"), dict(activation="relu")):
        with pytest.raises(ValueError, match=next(iter(bad))):
            predict(net, x, **bad)


@pytest.mark.parametrize("draw", ["weights", "voxels"])
def test_a_seeded_prediction_is_the_same_on_every_rank(net, x, draw):
    means = []
    for rank in (0, 1):
        seed_noise(net, 0, rank=rank)
        keys = [layer._rank_key for layer in net if hasattr(layer, "_rank_key")]
        means.append(predict(net, x, 3, draw=draw, seed=7).mean)
        assert [layer._rank_key for layer in net if hasattr(layer, "_rank_key")] == keys
    assert torch.equal(*means)


def test_predict_names_the_remedy_for_networks_that_return_several_tensors(net, x):
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = net

        def forward(self, x):
            return self.net(x), None

    pair = Pair()
    with pytest.raises(ValueError, match=r"returned a tuple.*forward="):
        predict(pair, x, 2)
    assert predict(pair, x, 2, forward=lambda x: pair(x)[0]).mean.shape == (2, 3, 8, 8, 8)


def test_a_copy_made_while_weights_are_drawn_is_outside_the_drawing(net, x):
    with draw_weights(net, 0):
        copied = copy.deepcopy(net)
    assert not torch.equal(copied.train()(x), copied(x))
    assert torch.equal(copied[0].eval()(x), net[0].eval()(x))


def test_a_network_saved_while_weights_are_drawn_is_outside_the_drawing(net, x):
    file = io.BytesIO()
    with draw_weights(net, 0):
        torch.save(net, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert not torch.equal(loaded.train()(x), loaded(x))


def test_contexts_that_end_in_another_order_leave_nothing_behind(net, x):
    """As those of two threads do."""
    outer, inner = sampling(net, True), sampling(net, False)
    outer.__enter__()
    inner.__enter__()
    outer.__exit__(None, None, None)
    net.eval()
    with draw_weights(net, 1):
        drawn = net(x)
        inner.__exit__(None, None, None)
        assert torch.equal(net(x), drawn)
    assert torch.equal(net(x), net(x))
    assert not torch.equal(net(x), drawn)


@pytest.mark.parametrize("wrong", [1.5, "1", 2**70])
def test_what_is_no_64_bit_integer_is_refused_by_name(wrong):
    net = convert(nn.Sequential(nn.Linear(2, 2)))
    x = torch.zeros(1, 2)
    for name, call in {
        "seed": lambda: seed_noise(net, wrong),
        "rank": lambda: seed_noise(net, 0, rank=wrong),
        "seed ": lambda: drawn_weights(net, wrong),
        "rank ": lambda: drawn_weights(net, 0, rank=wrong),
        "seed  ": lambda: predict(net, x, 1, seed=wrong),
        "n_samples": lambda: predict(net, x, wrong),
    }.items():
        with pytest.raises(ValueError, match=f"^{name.strip()} must be an? "):
            call()


def test_a_seed_of_numpy_is_the_same_seed():
    net = convert(nn.Sequential(nn.Linear(2, 2)))
    ours, theirs = (drawn_weights(net, seed)["0"][0] for seed in (3, np.int64(3)))
    assert torch.equal(ours, theirs)
