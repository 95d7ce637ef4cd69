"""What works over a whole network: KL, optimizers, priors, projection and checkpoints."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize

from dwc_kernels import (
    FFGConv3d,
    FFGLinear,
    SigmaProjection,
    convert,
    draw_weights,
    drawn_weights,
    inverse_softplus,
    kl_loss,
    parameter_groups,
    predict,
    set_prior,
    set_sigma_fraction,
)


def test_kl_loss_sums_all_layers_and_refuses_a_network_without_any(net):
    expected = sum(layer.kl_loss() for layer in net if hasattr(layer, "kl_loss"))
    torch.testing.assert_close(kl_loss(net), expected)
    with pytest.raises(ValueError, match="convert it first"):
        kl_loss(nn.Sequential(nn.Conv3d(1, 1, 1)))


def test_parameter_groups_keep_sigma_out_of_weight_decay(net):
    optimizer = torch.optim.SGD(parameter_groups(net, weight_decay=0.1, rho_lr=1e-2), lr=1e-3)
    rhos = {id(p) for name, p in net.named_parameters() if name.endswith("rho")}
    means, sigmas = optimizer.param_groups
    assert {id(p) for p in sigmas["params"]} == rhos
    assert (sigmas["weight_decay"], sigmas["lr"]) == (0.0, 1e-2)
    assert (means["weight_decay"], means["lr"]) == (0.1, 1e-3)
    assert len(means["params"]) + len(sigmas["params"]) == len(list(net.parameters()))
    before = net[0].weight_sigma.detach().clone()
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert torch.equal(net[0].weight_sigma, before)


def test_a_network_becomes_the_prior_of_another_or_of_itself(net):
    other = copy.deepcopy(net)
    set_prior(net, other)
    torch.testing.assert_close(kl_loss(net), torch.zeros(()), atol=1e-6, rtol=0)
    assert torch.equal(net[0].prior_weight_mu, other[0].weight_mu)
    assert net[0].prior_weight_mu.data_ptr() != other[0].weight_mu.data_ptr()
    set_sigma_fraction(net, 0.1)
    set_prior(net, net)
    torch.testing.assert_close(kl_loss(net), torch.zeros(()), atol=1e-6, rtol=0)


def test_a_prior_of_another_shape_is_refused_by_name_and_changes_nothing(net):
    other = copy.deepcopy(net)
    other[4] = FFGConv3d(4, 5, 1)
    with pytest.raises(ValueError, match=r"^4: weight_mu has shape"):
        set_prior(net, other)
    assert net[0].prior_weight_mu.dim() == 0
    with pytest.raises(ValueError, match="'0'"):
        set_prior(net, nn.Sequential(nn.ReLU(), FFGConv3d(1, 1, 1)))


def test_sigma_as_a_fraction_of_the_mean(net):
    with torch.no_grad():
        net[0].weight_mu[0] = 0
    set_sigma_fraction(net, 0.25, minimum=1e-4)
    torch.testing.assert_close(net[0].weight_sigma[1:], 0.25 * net[0].weight_mu[1:].abs().clamp_min(4e-4))
    torch.testing.assert_close(net[0].weight_sigma[0], torch.full_like(net[0].weight_sigma[0], 1e-4))
    with pytest.raises(ValueError, match="fraction"):
        set_sigma_fraction(net, 0.0)


def test_the_projection_keeps_sigma_at_or_below_its_prior(net):
    set_prior(net, net)
    net[4].set_prior(weight_sigma=0.05)
    project = SigmaProjection(net)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith("rho"):
                p.add_(torch.randn_like(p))
    project()
    assert (net[0].weight_sigma <= net[0].prior_weight_sigma).all()
    assert (net[4].weight_sigma <= 0.05).all()
    assert (net[4].weight_sigma > 0.0499).any()


def test_layers_made_on_meta_have_their_prior_after_reset_parameters():
    with torch.device("meta"):
        net = convert(nn.Sequential(nn.Conv3d(1, 2, 3), nn.Linear(2, 2)), prior_mu=0.5, prior_sigma=2.0)
    net.to_empty(device="cpu")
    for layer in net:
        for buffer in layer.buffers():
            buffer.fill_(float("nan"))
        layer.reset_parameters()
    assert kl_loss(net).isfinite()
    assert (net[0].prior_weight_mu, net[0].prior_bias_sigma) == (0.5, 2.0)
    torch.testing.assert_close(net[0].weight_sigma, torch.full_like(net[0].weight_sigma, 1e-3))


def test_a_prior_of_numbers_is_stored_as_numbers_and_one_of_tensors_as_tensors():
    layer, plain = FFGConv3d(8, 8, 3), nn.Conv3d(8, 8, 3)
    sizes = [sum(t.numel() for t in m.state_dict().values()) for m in (layer, plain)]
    assert sizes[0] == 2 * sizes[1] + 4
    per_filter = torch.rand(8, 1, 1, 1, 1) + 0.1
    layer.set_prior(weight_sigma=per_filter)
    assert layer.prior_weight_sigma.shape == per_filter.shape
    layer.reset_parameters()
    assert torch.equal(layer.prior_weight_sigma, per_filter)
    layer.set_prior(weight_sigma=0.25)
    assert layer.prior_weight_sigma.dim() == 0


@pytest.mark.parametrize("constant", [True, False])
def test_checkpoints_with_priors_of_full_shape_still_load(constant):
    layer = FFGConv3d(2, 3, 3)
    state = layer.state_dict()
    for name in ("prior_weight_mu", "prior_weight_sigma", "prior_bias_mu", "prior_bias_sigma"):
        shape = layer.weight_mu.shape if "weight" in name else layer.bias_mu.shape
        state[name] = torch.full(shape, 0.5) if constant else torch.rand(shape) + 0.5
    other = FFGConv3d(2, 3, 3)
    other.load_state_dict(state)
    for name in ("prior_weight_mu", "prior_weight_sigma"):
        assert (getattr(other, name) == state[name]).all()
        assert getattr(other, name).dim() == (0 if constant else 5)
    other.reset_parameters()
    assert (other.prior_weight_sigma == state["prior_weight_sigma"]).all()
    with pytest.raises(RuntimeError, match="prior_weight_mu"):
        other.load_state_dict(state | {"prior_weight_mu": torch.zeros(7)})
    again = FFGConv3d(2, 3, 3)
    again.set_prior(layer)
    again.load_state_dict(other.state_dict())  # from a tensor to numbers
    assert torch.equal(again.kl_loss(), FFGConv3d.kl_loss(again))
    assert again.prior_weight_sigma.shape == other.prior_weight_sigma.shape


def test_a_weight_normalized_network_takes_everything():
    net = convert(nn.Sequential(parametrizations.weight_norm(nn.Conv3d(1, 2, 3)), nn.ReLU()))
    set_prior(net, net)
    with draw_weights(net, 0):
        net(torch.ones(1, 1, 3, 3, 3)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())
    assert predict(net, torch.ones(1, 1, 3, 3, 3), 2, seed=0).mean.isfinite().all()


@pytest.mark.parametrize("name", ["weight_mu", "weight_rho"])
@pytest.mark.parametrize("normalize", [parametrizations.weight_norm, parametrizations.spectral_norm])
def test_a_parametrized_layer_is_copied_also_within_a_context(normalize, name):
    net = nn.Sequential(normalize(FFGConv3d(1, 2, 3), name)).eval()
    x = torch.ones(1, 1, 3, 3, 3)
    mean = net(x)
    with draw_weights(net, 0):
        other = copy.deepcopy(net)
    torch.testing.assert_close(other(x), mean)
    assert all(p is not q for p, q in zip(net.parameters(), other.parameters(), strict=True))


def test_the_fused_kl_is_the_composition_in_value_and_slopes():
    torch.manual_seed(0)
    layer = FFGConv3d(30, 40, 5)  # several chunks, the last one not full
    for sigmas in (torch.rand_like(layer.weight_mu), torch.full_like(layer.weight_mu, 0.9)):
        with torch.no_grad():
            layer.weight_rho.copy_(inverse_softplus(sigmas + 1e-3))
        for prior in (
            dict(weight_mu=0.1, weight_sigma=1.0),
            dict(weight_mu=torch.rand(40, 1, 1, 1, 1), weight_sigma=sigmas + 0.01),
        ):
            layer.set_prior(**prior)
            value = layer.kl_of("weight")
            slopes = torch.autograd.grad(value, (layer.weight_mu, layer.weight_rho))
            mu, rho = (p.detach().double().requires_grad_() for p in (layer.weight_mu, layer.weight_rho))
            mu_0, sigma_0 = layer.prior_weight_mu.double(), layer.prior_weight_sigma.double()
            v = (F.softplus(rho) / sigma_0).square()
            exact = 0.5 * (v - 1 - v.log() + ((mu - mu_0) / sigma_0).square()).sum()
            torch.testing.assert_close(value.double(), exact, rtol=1e-6, atol=0)
            for ours, theirs in zip(slopes, torch.autograd.grad(exact, (mu, rho)), strict=True):
                assert ((ours - theirs).norm() / theirs.norm()).item() < 5e-6


def test_kl_has_a_second_derivative_and_skips_what_is_frozen():
    layer = FFGConv3d(1, 1, 1, bias=False).double()
    (slope,) = torch.autograd.grad(layer.kl_loss(), layer.weight_mu, create_graph=True)
    assert torch.autograd.grad(slope.sum(), layer.weight_mu)[0].item() == pytest.approx(1.0)
    layer = layer.float()
    (slope,) = torch.autograd.grad(layer.kl_loss(), layer.weight_mu, create_graph=True)
    assert torch.autograd.grad(slope.sum(), layer.weight_mu)[0].item() == pytest.approx(1.0)
    layer.weight_rho.requires_grad_(False)
    layer.kl_loss().backward()
    assert layer.weight_rho.grad is None


class Halved(nn.Module):
    def forward(self, rho):
        return rho / 2

    def right_inverse(self, rho):
        return rho * 2


def test_parametrized_sigmas_are_told_apart_and_stay_out_of_weight_decay():
    net = nn.Sequential(FFGConv3d(1, 2, 3), FFGConv3d(2, 2, 3))
    for layer in net:
        for name in ("weight_rho", "bias_rho"):
            parametrize.register_parametrization(layer, name, Halved())
    torch.testing.assert_close(kl_loss(net), net[0].kl_loss() + net[1].kl_loss())
    drawn = drawn_weights(net, 0)
    assert [drawn[path][0].shape for path in "01"] == [layer.weight_mu.shape for layer in net]
    means, sigmas = parameter_groups(net, weight_decay=0.1)
    assert {id(p) for p in sigmas["params"]} == {id(p) for n, p in net.named_parameters() if "rho" in n}
    assert len(means["params"]) == 4
    with pytest.raises(ValueError, match=r"^0: remove the parametrization of weight_rho"):
        SigmaProjection(net)


def test_layers_that_share_sigma_alone_count_and_are_drawn_apart():
    net = nn.Sequential(FFGConv3d(1, 1, 3), FFGConv3d(1, 1, 3))
    net[1].weight_rho = net[0].weight_rho
    torch.testing.assert_close(kl_loss(net), net[0].kl_loss() + net[1].kl_loss())
    drawn = drawn_weights(net, 0)
    assert not torch.equal(drawn["0"][0], drawn["1"][0])


def test_tied_weights_with_two_priors_are_refused_by_name():
    net = nn.Sequential(nn.Conv3d(1, 1, 3), nn.Conv3d(1, 1, 3))
    net[1].weight = net[0].weight
    convert(net)
    for sigma in (0.01, torch.rand(1, 1, 3, 3, 3) + 0.1):
        net[0].set_prior(weight_sigma=sigma)
        with pytest.raises(ValueError, match="0 and 1 share their weight but not its prior"):
            kl_loss(net)
        net[1].set_prior(weight_sigma=sigma)
        assert kl_loss(net).isfinite()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("sigma_0", [1e-6, 0.1, 50.0])
def test_the_projection_ends_close_below_the_prior_in_every_dtype(dtype, sigma_0):
    layer = FFGConv3d(1, 2, 3, dtype=dtype, prior_sigma=sigma_0, sigma_init=max(2 * sigma_0, 1e-5))
    SigmaProjection(layer)()
    assert layer.weight_sigma.max() <= layer.prior_weight_sigma
    assert layer.weight_sigma.min() >= layer.prior_weight_sigma * (1 - max(2.0**-20, 16 * torch.finfo(dtype).eps))


def test_to_empty_restores_numbers_and_a_lost_prior_of_tensors_is_an_error(net):
    net[0].set_prior(net[0])
    net.to_empty(device="cpu")
    assert net[4].prior_weight_sigma == 1.0
    torch.testing.assert_close(net[4].weight_sigma, torch.full_like(net[4].weight_sigma, 0.1))
    net[0].reset_parameters()
    with pytest.raises(RuntimeError, match="to_empty has lost the prior's weight_mu: call set_prior"):
        kl_loss(net)
    net[0].set_prior(weight_mu=0.0, weight_sigma=1.0, bias_mu=0.0, bias_sigma=1.0)
    for layer in net[2], net[4]:
        layer.reset_parameters()
    assert kl_loss(net).isfinite()


def test_a_checkpoint_whose_prior_has_no_width_is_refused(net):
    state = net.state_dict() | {"0.prior_weight_sigma": torch.tensor(0.0)}
    with pytest.raises(
        RuntimeError, match=r"0\.prior_weight_sigma: the prior's weight_sigma must be finite and positive"
    ):
        net.load_state_dict(state)


def test_a_prior_passes_through_wrappers(net):
    compiled = torch.compile(net, backend="eager")
    averaged = torch.optim.swa_utils.AveragedModel(net)
    for target, source in ((compiled, net), (net, nn.DataParallel(compiled)), (nn.DataParallel(net), averaged)):
        set_prior(target, source)
    torch.testing.assert_close(kl_loss(net), torch.zeros(()), atol=1e-6, rtol=0)


def test_complex_input_is_refused_in_both_modes():
    layer = FFGConv3d(1, 1, 1)
    for training in (True, False):
        with pytest.raises(ValueError, match="must be floating point"):
            layer.train(training)(torch.ones(1, 1, 1, 1, 1, dtype=torch.complex64))


def test_a_linear_layer_takes_no_rows():
    layer = FFGLinear(3, 2)
    y = layer(torch.ones(4, 0, 3))
    assert y.shape == (4, 0, 2)
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("sigma", [float("inf"), float("nan"), 0.0, 1e-50])
def test_sigmas_that_the_dtype_cannot_hold_are_refused_and_change_nothing(sigma, dtype):
    with pytest.raises(ValueError, match="sigma_init must be positive and finite"):
        FFGConv3d(1, 2, 3, sigma_init=sigma, dtype=dtype)
    net = convert(nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)).to(dtype))
    before = [layer.weight_rho.clone() for layer in net]
    for values in ({"fraction": sigma}, {"fraction": 0.1, "minimum": sigma}):
        if sigma == 1e-50 and "minimum" not in values:  # the minimum takes over
            continue
        with torch.no_grad():
            net[1].weight_mu[0, 0] = 0
        with pytest.raises(ValueError, match="fraction"):
            set_sigma_fraction(net, **values)
    assert all(torch.equal(layer.weight_rho, rho) for layer, rho in zip(net, before, strict=True))


def test_a_prior_for_a_bias_that_a_layer_does_not_have_is_refused():
    layer = FFGConv3d(1, 2, 3, bias=False)
    with pytest.raises(ValueError, match="bias_mu was given, but the layer has no bias"):
        layer.set_prior(weight_mu=1.0, bias_mu=1.0)
    assert layer.prior_weight_mu == 0
