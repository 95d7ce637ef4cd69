"""convert takes over a whole network or nothing, keeps what was on it, and says what it leaves."""

import copy
import importlib
import logging

import pytest
import torch
from monai.networks.nets import UNETR, DynUNet, SegResNet, UNet, VNet
from monai.networks.utils import copy_model_state
from torch import nn
from torch.nn.utils import parametrizations, prune

from dwc_kernels import (
    FFGConv3d,
    FFGConvTranspose3d,
    FFGLinear,
    conversion_report,
    convert,
    kl_loss,
    mean_names,
    sampling,
)


def small_unet():
    torch.manual_seed(0)
    return UNet(spatial_dims=3, in_channels=1, out_channels=2, channels=(4, 8, 16), strides=(2, 2), num_res_units=1)


def small_dynunet():
    torch.manual_seed(0)
    return DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16], deep_supervision=True, deep_supr_num=1)


def small_segresnet():
    torch.manual_seed(0)
    return SegResNet(3, 8, 1, 2, blocks_down=(1, 1), blocks_up=(1,))


def small_unetr():
    torch.manual_seed(0)
    return UNETR(1, 2, (16, 16, 16), feature_size=4, hidden_size=24, mlp_dim=32, num_heads=2)


@pytest.fixture
def x():
    return torch.randn(1, 1, 16, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", [small_unet, small_dynunet, small_segresnet, small_unetr])
def test_a_converted_network_has_the_means_it_was_trained_to(make, x):
    net = make().eval()
    expected = net(x)
    convert(net)
    assert not any(type(m) in (nn.Conv3d, nn.ConvTranspose3d) for m in net.modules())
    assert any(isinstance(m, FFGConvTranspose3d) for m in net.modules()) or make is small_segresnet
    torch.testing.assert_close(net(x), expected)
    assert not torch.equal(net.train()(x), net.train()(x))


def test_a_vnet_is_converted_and_samples(x):
    torch.manual_seed(0)
    net = VNet(3, 1, 2).eval()
    with torch.no_grad():
        expected = net(x)
        convert(net)
        torch.testing.assert_close(net(x), expected)
        with sampling(net, True):
            assert not torch.equal(net(x), net(x))


@pytest.fixture
def video():
    """torchvision, whose wheel on PyPI is built for CUDA and lacks its operators beside PyTorch for the CPU."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError:  # it needs these two to exist, its networks do not call them
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module("torchvision.models.video")


def test_a_network_of_torchvision_is_converted(video):
    net, x = video.r3d_18().eval(), torch.randn(1, 3, 4, 16, 16)
    expected = net(x)
    convert(net)
    torch.testing.assert_close(net(x), expected)


def test_a_plain_checkpoint_loads_as_means_in_strict_mode(x):
    plain, net = small_unet(), convert(small_unet())
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(torch.randn_like(p))
    rhos = {name: p.clone() for name, p in net.named_parameters() if name.endswith("rho")}
    net.load_state_dict(plain.state_dict(), strict=True)
    torch.testing.assert_close(net.eval()(x), plain.eval()(x))
    assert all(torch.equal(rhos[name], p) for name, p in net.named_parameters() if name in rhos)
    broken = {k: v for k, v in plain.state_dict().items() if "0.conv.unit0.conv" not in k}
    with pytest.raises(RuntimeError, match=r"Missing key.*weight_mu"):
        net.load_state_dict(broken)


def test_a_weight_normalized_checkpoint_loads_as_means():
    def made():
        return nn.Sequential(parametrizations.weight_norm(nn.Conv3d(1, 2, 3)))

    plain, net = made(), convert(made())
    net.load_state_dict(plain.state_dict())
    assert torch.equal(net[0].weight_mu, plain[0].weight)
    net.load_state_dict({"0.weight_g": plain[0].parametrizations.weight.original0 * 2,
        "0.weight_v": plain[0].parametrizations.weight.original1, "0.bias": plain[0].bias})  # fmt: skip
    torch.testing.assert_close(net[0].weight_mu, plain[0].weight * 2)


def test_a_converted_checkpoint_loads_as_before_and_a_plain_one_not_twice(x):
    net = convert(small_unet())
    other = convert(small_unet(), sigma_init=0.5)
    other.load_state_dict(net.state_dict())
    assert torch.equal(kl_loss(other), kl_loss(net))
    mixed = dict(net.state_dict())
    name = next(k for k in mixed if k.endswith("weight_mu"))
    mixed[name.replace("weight_mu", "weight")] = mixed[name]
    with pytest.raises(RuntimeError, match="Unexpected key"):
        net.load_state_dict(mixed)


def test_monais_loader_fills_the_means(x):
    plain, net = small_unet(), convert(small_unet())
    with torch.no_grad():
        for p in plain.parameters():
            p.add_(1)
    _, updated, _ = copy_model_state(net, plain, mapping=mean_names(net))
    torch.testing.assert_close(net.eval()(x), plain.eval()(x))
    assert len(updated) >= len(plain.state_dict())


def test_tied_weights_stay_tied_and_count_once():
    net = nn.Sequential(nn.Conv3d(2, 2, 1), nn.ReLU(), nn.Conv3d(2, 2, 1))
    net[2].weight = net[0].weight
    weight = net[0].weight
    convert(net)
    assert net[0].weight_mu is net[2].weight_mu is weight
    assert net[0].weight_rho is net[2].weight_rho
    assert net[0].bias_mu is not net[2].bias_mu
    expected = net[0].kl_loss() + net[2].kl_of("bias")
    torch.testing.assert_close(kl_loss(net), expected)


def test_a_weight_tied_to_a_layer_that_is_not_converted_stays_tied():
    net = nn.ModuleDict({"embedding": nn.Embedding(5, 3), "head": nn.Linear(3, 5)})
    net["head"].weight = net["embedding"].weight
    convert(net)
    assert net["head"].weight_mu is net["embedding"].weight


def test_an_optimizer_made_before_goes_on_with_the_means():
    net = nn.Sequential(nn.Conv3d(1, 1, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    convert(net)
    before = net[0].weight_mu.detach().clone()
    net(torch.ones(1, 1, 2, 2, 2)).sum().backward()
    optimizer.step()
    assert not torch.equal(net[0].weight_mu, before)


def test_a_failure_midway_converts_nothing():
    net = nn.Sequential(nn.Conv3d(2, 2, 1), nn.Sequential(parametrizations.spectral_norm(nn.Conv3d(2, 2, 1))))
    before = dict(net.named_modules())
    with pytest.raises(ValueError, match=r"^1\.0: .*weight_norm.*skip=\['1\.0'\]"):
        convert(net)
    with pytest.raises(ValueError, match="backend"):
        convert(net[0], backend="nope")
    assert dict(net.named_modules()) == before
    assert type(net[0]) is nn.Conv3d


def test_lazy_layers_are_told_to_run_once():
    with pytest.raises(ValueError, match=r"^0: LazyConv3d has no weights yet; run one batch"):
        convert(nn.Sequential(nn.LazyConv3d(2, 1)))
    net = nn.Sequential(nn.LazyConv3d(2, 1))
    net(torch.ones(1, 3, 2, 2, 2))
    assert isinstance(convert(net)[0], FFGConv3d)


class Standardized(nn.Conv3d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


@pytest.mark.parametrize(
    "skip",
    [
        "1",
        ["1"],
        Standardized,
        [Standardized],
        lambda path, module: path == "1",
        [lambda p, m: isinstance(m, Standardized)],
    ],
)
def test_skip_takes_paths_types_and_predicates(skip):
    net = convert(nn.Sequential(nn.Conv3d(2, 2, 1), Standardized(2, 2, 1)), skip=skip)
    assert isinstance(net[0], FFGConv3d)
    assert isinstance(net[1], Standardized)


def test_skipping_a_block_skips_what_is_in_it_and_a_wrong_name_is_an_error():
    net = nn.Sequential(nn.Sequential(nn.Conv3d(1, 1, 1)), nn.Conv3d(1, 1, 1))
    with pytest.raises(ValueError, match="'decoder' is no module"):
        convert(net, skip="decoder")
    convert(net, skip="0")
    assert type(net[0][0]) is nn.Conv3d


def test_hooks_and_attributes_come_along():
    conv, seen = nn.Conv3d(1, 1, 1), []
    handle = conv.register_forward_hook(lambda module, args, y: seen.append("forward"))
    conv.register_forward_pre_hook(lambda module, args: seen.append("before"))
    conv.register_full_backward_hook(lambda module, gx, gy: seen.append("backward"))
    conv.weight.register_hook(lambda g: seen.append("weight"))
    conv.tag = "stem"
    conv.register_buffer("calls", torch.zeros(1))
    net = convert(nn.Sequential(conv))
    net(torch.ones(1, 1, 2, 2, 2, requires_grad=True)).sum().backward()
    assert sorted(seen) == ["backward", "before", "forward", "weight"]
    assert net[0].tag == "stem"
    assert "0.calls" in net.state_dict()
    handle.remove()
    seen.clear()
    net(torch.ones(1, 1, 2, 2, 2))
    assert seen == ["before"]


def test_weights_made_by_hooks_are_refused_by_path():
    net = nn.Sequential(nn.ReLU(), prune.l1_unstructured(nn.Conv3d(2, 2, 1), "weight", amount=1))
    with pytest.raises(ValueError, match=r"^1: .*forward hooks"):
        convert(net)


def test_the_report_names_every_layer_and_why_it_stays():
    net = nn.ModuleDict(
        {
            "conv": nn.Conv3d(1, 2, 3),
            "flat": nn.Conv2d(1, 2, 3),
            "norm": nn.BatchNorm3d(2),
            "script": torch.jit.script(nn.Conv3d(1, 2, 1)),
            "quantized": torch.ao.nn.quantized.Conv3d(1, 2, 1),
            "attention": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True),
            "head": nn.Linear(4, 2),
        }
    )
    report = {entry.path: entry for entry in conversion_report(net, skip="head")}
    assert report["conv"].converted
    assert report["conv"].parameters == 2 * 27 + 2
    assert (report["flat"].kind, report["flat"].reason) == ("Conv2d", "has no variational form")
    assert not report["norm"].converted
    assert "scripted" in report["script"].reason
    assert report["script"].parameters == 4
    assert "quantized" in report["quantized"].reason
    assert report["quantized"].parameters == 2
    assert "reads its weight itself" in report["attention.linear1"].reason
    assert "reads its weight itself" in report["attention.self_attn.out_proj"].reason
    assert report["head"].reason == "skipped"
    assert type(net["conv"]) is nn.Conv3d  # nothing was changed


def test_attention_still_runs_after_a_conversion():
    layer = convert(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)).eval()
    assert layer(torch.randn(1, 3, 4)).shape == (1, 3, 4)


def test_what_stays_deterministic_is_logged(caplog):
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Conv2d(1, 2, 3))
    with caplog.at_level(logging.INFO, logger="dwc_kernels"):
        convert(net)
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings == ["convert left 20 of 76 parameters as they are (Conv2d); see conversion_report"]
    assert "1: Conv2d, 20 parameters, has no variational form" in caplog.text
    caplog.clear()
    convert(nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU()))
    assert not caplog.records


def test_converting_twice_changes_nothing():
    net = convert(nn.Sequential(nn.Conv3d(1, 2, 1), nn.Linear(2, 2)))
    before = dict(net.named_modules())
    assert dict(convert(net).named_modules()) == before
    assert all(entry.converted for entry in conversion_report(net))


def test_a_linear_layer_and_a_single_layer_are_taken_over():
    linear = nn.Linear(3, 2)
    layer = convert(linear)
    assert isinstance(layer, FFGLinear)
    x = torch.randn(4, 3)
    torch.testing.assert_close(layer.eval()(x), linear(x))


def test_converting_under_data_parallel_is_refused():
    with pytest.raises(ValueError, match="before DataParallel"):
        convert(nn.DataParallel(nn.Conv3d(1, 1, 1)))


def test_from_conv3d_copies(x):
    conv = nn.Conv3d(1, 2, 3)
    layer = FFGConv3d.from_conv3d(conv)
    with torch.no_grad():
        conv.weight.zero_()
    assert layer.weight_mu.any()
    assert torch.equal(copy.deepcopy(layer).weight_mu, layer.weight_mu)


def test_a_layer_also_held_outside_the_module_tree_is_converted_there_too():
    class Listed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv3d(1, 1, 1)
            self.ops, self.named = [self.conv], {"conv": self.conv}

        def forward(self, x):
            return self.ops[0](x) + self.named["conv"](x)

    net = convert(Listed())
    x = torch.ones(1, 1, 2, 2, 2)
    assert net.ops[0] is net.named["conv"] is net.conv
    assert not torch.equal(net(x), net(x))


def test_methods_replaced_on_an_instance_are_refused_by_path():
    conv = nn.Conv3d(1, 2, 3)
    plain_forward = conv.forward
    conv.forward = lambda x: plain_forward(x)
    with pytest.raises(ValueError, match=r"^1: its forward was replaced on the instance.*skip=\['1'\]"):
        convert(nn.Sequential(nn.ReLU(), conv))
    assert type(conv) is nn.Conv3d


def test_a_class_with_methods_of_its_own_is_refused_and_one_that_only_sets_arguments_is_not():
    class Padded(nn.Conv3d):
        def __init__(self, channels):
            super().__init__(channels, channels, 3, padding=1)

        @staticmethod
        def stride_of(level):
            return 2**level

    class Counting(Padded):
        def n_taps(self):
            return self.weight[0].numel()

    with pytest.raises(ValueError, match=r"^1: Counting has a n_taps of its own.*skip=\['1'\]"):
        convert(nn.Sequential(Padded(2), Counting(2)))
    normalized = parametrizations.weight_norm(Padded(2))
    assert all(isinstance(layer, FFGConv3d) for layer in convert(nn.Sequential(Padded(2), normalized)))


@pytest.mark.parametrize("where", ["layer", "parent", "wrapper"])
def test_compiled_networks_are_refused_by_path(where):
    net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU())
    if where == "wrapper":
        net = torch.compile(net, backend="eager")
    else:
        (net if where == "parent" else net[0]).compile(backend="eager")
    with pytest.raises(ValueError, match=r"0: .*compiled; convert before torch.compile"):
        convert(net)


@pytest.mark.parametrize("skip", ["b", "block", ["block.0"], lambda path, module: path.startswith("b")])
def test_a_shared_layer_is_skipped_under_any_of_its_names(skip):
    conv = nn.Conv3d(1, 1, 1)
    net = nn.ModuleDict({"a": conv, "b": conv, "block": nn.Sequential(conv)})
    convert(net, skip=skip)
    assert type(net["a"]) is nn.Conv3d


@pytest.mark.parametrize("skip", [[3], None, 3])
def test_what_skip_cannot_take_is_refused(skip):
    with pytest.raises(ValueError, match="skip takes paths"):
        convert(nn.Sequential(nn.Conv3d(1, 1, 1)), skip=skip)


def test_what_is_no_network_is_refused_by_its_type():
    with pytest.raises(ValueError, match=r"must be a torch\.nn\.Module, got a dict"):
        convert({})


def test_arguments_are_checked_where_nothing_is_converted():
    for bad in (dict(backend="nope"), dict(prior_sigma=0.0), dict(sigma_init=-1.0)):
        with pytest.raises(ValueError, match=next(iter(bad)).removeprefix("prior_")):
            convert(nn.Sequential(nn.Conv2d(1, 1, 1)), **bad)


def test_a_second_conversion_keeps_the_sigmas_and_priors_of_tied_layers_tied():
    net = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1))
    net[1].weight = net[0].weight
    convert(net, skip="1", prior_sigma=0.5)
    convert(net)
    assert net[0].weight_rho is net[1].weight_rho
    torch.testing.assert_close(kl_loss(net), net[0].kl_loss() + net[1].kl_of("bias"))
    net.to_empty(device="cpu")
    assert net[1].prior_weight_sigma == 0.5


def test_layers_that_share_a_weight_direction_alone_are_not_tied():
    first, second = (parametrizations.weight_norm(nn.Conv3d(2, 2, 1)) for _ in range(2))
    second.parametrizations.weight.original1 = first.parametrizations.weight.original1
    net = convert(nn.Sequential(first, second))
    assert net[0].weight_rho is not net[1].weight_rho
    torch.testing.assert_close(kl_loss(net), net[0].kl_loss() + net[1].kl_loss())


def test_a_bias_that_is_pruned_is_refused():
    net = nn.Sequential(prune.l1_unstructured(nn.Conv3d(1, 2, 1), "bias", amount=1))
    with pytest.raises(ValueError, match=r"^0: the bias of Conv3d is made by forward hooks"):
        convert(net)


def test_a_parent_that_reads_the_weight_is_told_what_to_do():
    class Reader(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(3, 3)

        def forward(self, x):
            return nn.functional.linear(x, self.fc.weight)

    with pytest.raises(AttributeError, match=r"FFGLinear has no weight .*weight_mu.*skip="):
        convert(Reader())(torch.ones(1, 3))
    assert not hasattr(FFGLinear(1, 1), "bias")


def test_the_report_counts_tied_weights_once():
    net = nn.Sequential(nn.Conv3d(1, 1, 1), nn.Conv3d(1, 1, 1))
    net[1].weight = net[0].weight
    for _ in range(2):
        assert sum(entry.parameters for entry in conversion_report(net)) == 3
        convert(net)


def test_a_frozen_weight_keeps_a_frozen_mean_and_its_sigma_trains():
    net = nn.Sequential(nn.Conv3d(1, 1, 1))
    net[0].weight.requires_grad_(False)
    convert(net)
    assert (net[0].weight_mu.requires_grad, net[0].weight_rho.requires_grad) == (False, True)


def made_on_meta():
    with torch.device("meta"):
        return convert(nn.Sequential(nn.Conv3d(1, 2, 3), nn.Linear(2, 2)), prior_sigma=0.5, sigma_init=0.1)


@pytest.mark.parametrize("assign", [True, False])
def test_a_plain_checkpoint_fills_a_network_made_on_meta(assign):
    plain, net = nn.Sequential(nn.Conv3d(1, 2, 3), nn.Linear(2, 2)), made_on_meta()
    if not assign:
        net.to_empty(device="cpu")
    net.load_state_dict(plain.state_dict(), assign=assign)
    assert torch.equal(net[0].weight_mu, plain[0].weight)
    assert all(t.device.type == "cpu" for t in net.state_dict().values())
    torch.testing.assert_close(net[1].weight_sigma, torch.full((2, 2), 0.1))
    torch.testing.assert_close(kl_loss(net), kl_loss(convert(plain, prior_sigma=0.5, sigma_init=0.1)))
