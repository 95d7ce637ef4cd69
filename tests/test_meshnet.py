import gc
import json

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import Ledger
from dwc.base.errors import InputError
from dwc.meshnet import DILATIONS, MeshNet
from dwc.posterior import Posterior
from dwc_kernels import FFGConv3d


def test_the_defaults_are_table_1():
    network = MeshNet()
    rows = [(layer.out_channels, layer.kernel_size, layer.padding, layer.dilation) for layer in network.layers]
    expected = [(96, (3,) * 3, (dilation,) * 3, (dilation,) * 3) for dilation in (1, 1, 1, 2, 4, 8, 1)]
    assert rows == [*expected, (50, (1,) * 3, (0,) * 3, (1,) * 3)]
    assert all(isinstance(layer, FFGConv3d) for layer in network.layers)
    torch.testing.assert_close(network.layers[3].weight_sigma, torch.full((96, 96, 3, 3, 3), 1e-3))
    assert (network.layers[3].prior_weight_mu == 0).all()
    assert (network.layers[3].prior_weight_sigma == 1).all()


@pytest.mark.parametrize("bayesian", [False, True])
def test_logits_are_one_per_class_on_the_images_grid(bayesian):
    network = MeshNet(n_classes=5, width=3, dilations=(1, 4), in_channels=2, bayesian=bayesian)
    assert network(torch.randn(2, 2, 5, 6, 7)).shape == (2, 5, 5, 6, 7)


@pytest.mark.parametrize("weight_norm", [False, True])
def test_plain_and_bayesian_networks_of_the_same_means_agree_without_noise(weight_norm):
    plain = MeshNet(3, 4, (1, 2), bayesian=False, weight_norm=weight_norm)
    bayesian = MeshNet(3, 4, (1, 2), weight_norm=weight_norm)
    Posterior.from_model(plain).to_model(bayesian)
    image = torch.randn(1, 1, 8, 8, 8)
    torch.testing.assert_close(bayesian(image, sample=False), plain(image))
    assert not torch.allclose(bayesian(image, sample=True), plain(image))
    torch.testing.assert_close(bayesian.eval()(image), plain(image))


def test_weight_normalization_is_torchs_on_the_means_and_can_be_left_out():
    with_it, without = MeshNet(3, 4, (1,)), MeshNet(3, 4, (1,), weight_norm=False)
    assert nn.utils.parametrize.is_parametrized(with_it.layers[0], "weight_mu")
    assert not nn.utils.parametrize.is_parametrized(without.layers[0])


def test_the_architecture_is_json_and_rebuilds_the_network():
    network = MeshNet(n_classes=9, width=6, dilations=(1, 3), in_channels=2)
    architecture = json.loads(json.dumps(network.architecture))
    assert architecture == network.architecture
    again = MeshNet.from_architecture(architecture, bayesian=True)
    assert again.architecture == architecture
    again.load_state_dict(network.state_dict())


def test_the_kl_is_the_sum_of_torchs_own_over_all_weights():
    torch.manual_seed(0)
    network = MeshNet(3, 4, (1, 2))
    normal, kl = torch.distributions.Normal, torch.distributions.kl_divergence
    expected = sum(
        kl(
            normal(getattr(layer, f"{name}_mu").double(), getattr(layer, f"{name}_sigma").double()),
            normal(getattr(layer, f"prior_{name}_mu").double(), getattr(layer, f"prior_{name}_sigma").double()),
        ).sum()
        for layer in network.layers
        for name in ("weight", "bias")
    )
    torch.testing.assert_close(network.kl_loss().double(), expected, rtol=1e-5, atol=0)
    with pytest.raises(TypeError, match="negative_log_prior"):
        MeshNet(3, 4, (1,), bayesian=False).kl_loss()


def test_activations_keep_their_scale_through_the_layers_at_the_start():
    torch.manual_seed(0)
    network = MeshNet(n_classes=50, width=32, dilations=DILATIONS).eval()
    x = torch.randn(2, 1, 16, 16, 16)
    with torch.no_grad():
        for layer in network.layers[:-1]:
            x = torch.relu(layer(x))
            assert 0.2 < x.square().mean().sqrt() < 5
        assert 0.2 < network.layers[-1](x).std() < 5


def test_a_file_whose_tensors_do_not_fit_its_architecture_is_refused():
    posterior = Posterior.from_model(MeshNet(3, 4, (1,)))
    posterior.metadata["architecture"]["width"] = 5
    with pytest.raises(InputError, match="has shape"):
        MeshNet.from_posterior(posterior)
    posterior.metadata["architecture"] = None
    with pytest.raises(InputError, match="holds no MeshNet"):
        MeshNet.from_posterior(posterior)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"depth": 3}, "'depth' is unknown"),
        ({"n_classes": None}, "n_classes is 'None'"),
        ({"width": "4"}, "width is '4'"),
        ({"width": True}, "width is 'True'"),
        ({"in_channels": 0}, "in_channels is '0'"),
        ({"dilations": "1"}, "dilations is '1'"),
        ({"dilations": 1}, "dilations is '1'"),
        ({"dilations": []}, r"dilations is '\[\]'"),
        ({"dilations": [1, 0.5]}, r"dilations is '\[1, 0.5\]'"),
        ("MeshNet", "holds no MeshNet"),
        (["MeshNet"], "holds no MeshNet"),
        ({"activation": "tanh"}, "activation is 'tanh'"),
        ({"activation": ["elu"]}, "activation is"),
    ],
)
def test_an_architecture_that_makes_no_network_is_refused_by_name(change, words):
    posterior = Posterior.from_model(MeshNet(3, 4, (1,)))
    whole = posterior.metadata["architecture"]
    posterior.metadata["architecture"] = {**whole, **change} if isinstance(change, dict) else change
    with pytest.raises(InputError, match=f"posterior: .*{words}"):
        MeshNet.from_posterior(posterior)


def test_an_architecture_without_activation_as_earlier_versions_wrote_it_is_that_of_relu():
    posterior = Posterior.from_model(MeshNet(3, 4, (1,)))
    digest = posterior.sha256
    del posterior.metadata["architecture"]["activation"]
    assert MeshNet.from_posterior(posterior).architecture["activation"] == "relu"
    assert posterior.sha256 != digest  # the file's own header stays as it is


@pytest.mark.parametrize("key", ["n_classes", "width", "dilations", "in_channels"])
def test_an_architecture_that_lacks_a_part_is_refused_by_name(key):
    posterior = Posterior.from_model(MeshNet(50, 4, (1,)))
    del posterior.metadata["architecture"][key]
    with pytest.raises(InputError, match=f"posterior: its architecture's '{key}' is missing"):
        MeshNet.from_posterior(posterior)


@pytest.mark.parametrize("bayesian", [True, False])
@pytest.mark.parametrize("activation", ["relu", "elu"])
def test_the_activation_works_in_place_and_its_gradient_is_that_of_the_plain_formula(activation, bayesian):
    torch.manual_seed(0)
    network = MeshNet(3, 4, (1, 2), activation=activation, bayesian=bayesian).double()
    x = torch.randn(2, 1, 6, 6, 6, dtype=torch.float64, requires_grad=True)
    results = []
    for forward in (network, lambda x: composed(network, x, activation)):
        torch.manual_seed(1)  # one noise for both
        logits = forward(x)
        parameters = [x, *network.parameters()]
        results.append([logits, *torch.autograd.grad(logits.square().sum(), parameters, allow_unused=True)])
    torch.testing.assert_close(*results)


def composed(network: MeshNet, x: Tensor, activation: str) -> Tensor:
    for layer in network.layers[:-1]:
        x = getattr(nn.functional, activation)(layer(x))
    return network.layers[-1](x)


@pytest.mark.parametrize("activation", ["relu", "elu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activation_checkpointing_replays_the_noise_to_the_bit(dtype, activation):
    gradients = {}
    for again in (False, True):
        torch.manual_seed(0)
        network = MeshNet(3, 4, (1, 2, 1), activation=activation, activation_checkpointing=again)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            logits = network(torch.randn(2, 1, 8, 8, 8))
        logits.float().square().mean().backward()
        gradients[again] = [parameter.grad for parameter in network.parameters()] + [torch.rand(3)]
    assert all(torch.equal(*pair) for pair in zip(gradients[False], gradients[True], strict=True))


@pytest.fixture
def uncollected():
    """No garbage collection: it would end the lives of tensors in cycles at a time that earlier tests decide."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.usefixtures("uncollected")
def test_activation_checkpointing_halves_what_is_kept_for_the_backward():
    kept, peak = {}, {}
    for again in (False, True):
        with FakeTensorMode():
            network, image = MeshNet(activation_checkpointing=again), torch.empty(10, 1, 32, 32, 32)
            with Ledger() as ledger:
                logits = network(image)
                kept[again] = ledger.now - logits.untyped_storage().nbytes()
                logits.square().mean().backward()
                peak[again] = ledger.peak
    hidden = 4 * image.numel() * network.architecture["width"]  # bytes of a layer's output
    assert kept[True] < 0.55 * kept[False]
    assert peak[True] < 12 * hidden < 0.67 * peak[False]


@pytest.mark.parametrize(
    "arguments", [{"n_classes": 0}, {"width": 0}, {"dilations": ()}, {"dilations": (0,)}, {"width": 2.5}]
)
def test_sizes_that_make_no_network_are_refused_by_name(arguments):
    with pytest.raises(InputError, match=f"`{next(iter(arguments))}` .*: give positive whole numbers"):
        MeshNet(**{"n_classes": 3, "width": 2, "dilations": (1,), **arguments})


def test_an_unknown_activation_is_refused():
    with pytest.raises(InputError, match="`activation` 'tanh': choose one of relu, elu"):
        MeshNet(3, 2, (1,), activation="tanh")
