"""FFGConv3d reads like nn.Conv3d, samples when it says so, and carries its prior."""

import copy
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import nn
from torch.distributions import Normal, kl_divergence
from torch.nn.utils import parametrizations, prune
from torch.utils.checkpoint import checkpoint

from dwc_kernels import FFGConv3d, convert, gaussian_kl, inverse_softplus


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return FFGConv3d(3, 5, 3, padding=2, dilation=2, sigma_init=0.1)


@pytest.fixture
def x():
    return torch.randn(2, 3, 6, 7, 9, generator=torch.Generator().manual_seed(1))


def test_training_samples_eval_means_and_the_argument_overrides(layer, x):
    assert not torch.equal(layer(x), layer(x))
    assert torch.equal(layer(x, sample=False), layer(x, sample=False))
    layer.eval()
    assert torch.equal(layer(x), layer(x, sample=False))
    assert not torch.equal(layer(x, sample=True), layer(x))
    assert torch.equal(layer(x, sample=True, seed=1), layer(x, sample=True, seed=1))


def test_samples_have_the_mean_and_variance_of_sampled_weights(x):
    torch.manual_seed(0)
    layer = FFGConv3d(3, 2, 3, padding=1, sigma_init=0.2)
    n = 4000
    small = x[:1, :, :3, :3, :3]
    ys = layer(small.expand(n, -1, -1, -1, -1))
    weights = Normal(layer.weight_mu, layer.weight_sigma).sample((n,)).flatten(0, 1)
    biases = Normal(layer.bias_mu, layer.bias_sigma).sample((n,)).flatten(0, 1)
    zs = nn.functional.conv3d(small, weights, biases, padding=1).view_as(ys)
    sd = zs.std(0)
    assert ((ys.mean(0) - zs.mean(0)) / sd).abs().max() < 5 * (2 / n) ** 0.5
    assert (ys.std(0) / sd - 1).abs().max() < 5 / n**0.5


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize("padding", [2, "same", (1, 0, 2)])
def test_every_padding_mode_is_that_of_conv3d(mode, padding, x):
    conv = nn.Conv3d(3, 4, (3, 3, 2), padding=padding, dilation=(1, 2, 1), padding_mode=mode)
    layer = FFGConv3d.from_conv3d(conv).eval()
    torch.testing.assert_close(layer(x), conv(x))
    assert layer(x, sample=True).shape == conv(x).shape


@given(mu=st.floats(-3, 3), sigma=st.floats(1e-4, 3), prior_mu=st.floats(-3, 3), prior_sigma=st.floats(1e-3, 3))
def test_kl_is_that_of_torch_distributions(mu, sigma, prior_mu, prior_sigma):
    mu, sigma, prior_mu, prior_sigma = (
        torch.tensor(v, dtype=torch.float64) for v in (mu, sigma, prior_mu, prior_sigma)
    )
    expected = kl_divergence(Normal(mu, sigma), Normal(prior_mu, prior_sigma))
    torch.testing.assert_close(gaussian_kl(mu, sigma, prior_mu, prior_sigma), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("ratio", [1 - 2**-12, 0.5, 1e-3, 1e-6])
def test_kl_and_its_gradient_keep_their_digits_in_fp32(ratio):
    prior = torch.tensor(1e-3)
    sigma = (prior * ratio).requires_grad_()
    exact = sigma.detach().double().requires_grad_()
    zero = torch.zeros(())
    value, expected = gaussian_kl(zero, sigma, zero, prior), gaussian_kl(zero, exact, zero, prior.double())
    (gradient,), (slope,) = torch.autograd.grad(value, sigma), torch.autograd.grad(expected, exact)
    assert value.item() == pytest.approx(expected.item(), rel=1e-3)
    assert gradient.item() == pytest.approx(slope.item(), rel=1e-3)


def test_kl_loss_sums_weights_and_biases_without_a_forward(layer):
    expected = kl_divergence(Normal(layer.weight_mu, layer.weight_sigma), Normal(0.0, 1.0)).sum()
    expected += kl_divergence(Normal(layer.bias_mu, layer.bias_sigma), Normal(0.0, 1.0)).sum()
    torch.testing.assert_close(layer.kl_loss(), expected, rtol=1e-5, atol=0)
    layer.kl_loss().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())


def test_a_posterior_becomes_a_prior_in_one_call(layer):
    site = copy.deepcopy(layer)
    with torch.no_grad():
        site.weight_rho -= 1
    layer.set_prior(site)
    assert torch.equal(layer.prior_weight_sigma, site.weight_sigma)
    assert torch.equal(layer.prior_bias_mu, site.bias_mu)
    with torch.no_grad():
        layer.load_state_dict({k: v for k, v in site.state_dict().items() if "prior" not in k}, strict=False)
    assert layer.kl_loss().item() == 0.0


@pytest.mark.parametrize(
    ("prior", "message"),
    [
        (dict(weight_sigma=0.0), "positive"),
        (dict(weight_mu=float("nan")), "finite"),
        (dict(posterior=FFGConv3d(1, 1, 1), weight_mu=0.0), "not both"),
        (dict(posterior=FFGConv3d(3, 5, 1)), "shape"),
        (dict(posterior=FFGConv3d(3, 5, 3, bias=False)), "bias"),
        (dict(weight_mu=torch.zeros(7)), "shape"),
        (dict(weight_mu=5.0, weight_sigma=-1.0), "positive"),
        (dict(weight_mu="zero"), "weight_mu must be a number or a tensor, got 'zero'"),
        (dict(posterior=1.0), "must be a variational layer, got a float"),
    ],
)
def test_a_prior_that_cannot_be_is_refused(layer, prior, message):
    with pytest.raises(ValueError, match=message):
        layer.set_prior(**prior)
    assert not layer.prior_weight_mu.any()  # all of it or none


@pytest.mark.parametrize("sigma", [1e-6, 1e-3, 1.0, 30.0, 200.0])
def test_inverse_softplus_inverts(sigma):
    sigma = torch.tensor(sigma)
    torch.testing.assert_close(nn.functional.softplus(inverse_softplus(sigma)), sigma, rtol=3e-6, atol=0)


def test_convert_keeps_the_trained_means_and_weight_normalization(x):
    torch.manual_seed(0)
    model = nn.Sequential(
        parametrizations.weight_norm(nn.Conv3d(3, 4, 3, padding=1)),
        nn.ReLU(),
        nn.Sequential(nn.Conv3d(4, 2, 1, bias=False)),
    )
    expected = model(x)
    with torch.no_grad():
        converted = convert(model.eval(), prior_sigma=0.5)
    assert converted is model
    assert [type(m) for m in model.modules() if not list(m.children())].count(nn.Conv3d) == 0
    torch.testing.assert_close(model(x), expected)
    assert model[0].parametrizations.weight_mu[0].__class__.__name__ == "_WeightNorm"
    assert model[2][0].prior_weight_sigma.unique().item() == 0.5
    model.train()
    model(x).sum().backward()
    assert all(p.grad is not None for p in model.parameters())


def test_convert_keeps_shared_layers_shared_and_frozen_ones_frozen():
    conv = nn.Conv3d(2, 2, 1)
    conv.weight.requires_grad_(False)
    model = convert(nn.Sequential(conv, nn.Sequential(nn.ReLU(), conv)))
    assert model[0] is model[1][1]
    assert not model[0].weight_mu.requires_grad
    assert model[0].bias_mu.requires_grad


def test_convert_refuses_what_does_more_than_convolve():
    class Standardized(nn.Conv3d):
        def forward(self, x):
            return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)

    with pytest.raises(ValueError, match="Standardized has a forward of its own"):
        convert(nn.Sequential(Standardized(2, 2, 1)))
    with pytest.raises(ValueError, match="forward hooks"):  # whose weight is stale after load_state_dict
        convert(prune.l1_unstructured(nn.Conv3d(2, 2, 1), "weight", amount=1))


def test_convert_refuses_a_parametrization_it_cannot_keep():
    with pytest.raises(ValueError, match="weight_norm"):
        convert(parametrizations.spectral_norm(nn.Conv3d(2, 2, 1)))


def test_half_precision_kl_is_summed_in_fp32():
    layer = FFGConv3d(96, 96, 3)
    torch.testing.assert_close(layer.half().kl_loss(), layer.float().kl_loss(), rtol=1e-3, atol=0)


def test_state_travels_without_pickle(layer, x):
    other = FFGConv3d(3, 5, 3, padding=2, dilation=2)
    other.load_state_dict(load(save(layer.state_dict())))
    assert torch.equal(other(x, seed=1), layer(x, seed=1))
    assert torch.equal(other.kl_loss(), layer.kl_loss())


def test_deepcopy_is_independent(layer, x):
    other = copy.deepcopy(layer)
    assert torch.equal(other(x, seed=1), layer(x, seed=1))
    with torch.no_grad():
        other.weight_mu.zero_()
    assert layer.weight_mu.any()


def test_checkpointing_replays_the_noise(layer, x):
    grads = []
    for run in (layer, lambda t: checkpoint(layer, t, use_reentrant=False)):
        layer.zero_grad()
        torch.manual_seed(5)
        run(x).square().sum().backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_compiled_module_trains(layer, x):
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.manual_seed(5)
    compiled(x).sum().backward()
    compiled_grads = [p.grad.clone() for p in layer.parameters()]
    layer.zero_grad()
    torch.manual_seed(5)
    layer(x).sum().backward()
    assert all(p.grad.any() for p in layer.parameters())
    for ours, p in zip(compiled_grads, layer.parameters(), strict=True):
        torch.testing.assert_close(ours, p.grad)


def test_functional_call_takes_other_parameters(layer, x):
    zeros = {name: torch.full_like(p, -100.0 * name.endswith("rho")) for name, p in layer.named_parameters()}
    assert not torch.func.functional_call(layer, zeros, (x,)).any()


def test_moves_between_dtypes_and_devices(layer, x):
    assert layer.double()(x.double()).dtype == torch.float64
    with torch.device("meta"):
        assert FFGConv3d(3, 5, 3)(torch.empty(1, 3, 4, 4, 4)).device.type == "meta"


def test_repr_reads_like_conv3d(layer):
    assert repr(layer) == repr(nn.Conv3d(3, 5, 3, padding=2, dilation=2)).replace("Conv3d", "FFGConv3d")


@pytest.mark.parametrize("sigma_init", [0.0, "small", None])
def test_sigma_init_must_be_a_positive_number(sigma_init):
    with pytest.raises(ValueError, match="sigma_init"):
        FFGConv3d(1, 1, 1, sigma_init=sigma_init)


def test_the_package_imports_without_triton_the_compiler_or_anything_of_brains():
    unwanted = ("monai", "nibabel", "matplotlib", "jsonargparse", "scipy", "pandas", "dwc", "torch._dynamo")
    code = (
        "import sys; sys.modules['triton'] = None; import dwc_kernels; "
        f"print([m for m in {unwanted} if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
