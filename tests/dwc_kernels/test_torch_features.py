"""The layers under torch.func, vmap, FLOP counting, tracing, compilation, export and FSDP2."""

import ast
import copy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, grad, jacrev, vmap
from torch.nn.utils import prune

import dwc_kernels
from dwc_kernels import (
    FFGConv3d,
    FFGConvTranspose3d,
    FFGLinear,
    SigmaProjection,
    convert,
    draw_weights,
    ffg_conv3d,
    ffg_conv_transpose3d,
    kl_loss,
    parameter_groups,
    predict,
    set_prior,
)
from tests.dwc_kernels.problems import make


def test_func_grad_is_autograds_gradient():
    tensors = make()
    loss = lambda *t: ffg_conv3d(*t, padding=1, seed=3).square().sum()  # noqa: E731
    expected = torch.autograd.grad(loss(*tensors), tensors)
    for ours, theirs in zip(grad(loss, argnums=tuple(range(5)))(*tensors), expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_jacrev_is_a_gradient_for_each_output():
    x, mu, sigma = (t.detach() for t in make(c=1, f=2, size=(3, 3, 3), batch=1, bias=False))
    jacobian = jacrev(lambda m: ffg_conv3d(x, m, sigma, seed=3))(mu)
    mu.requires_grad_()
    y = ffg_conv3d(x, mu, sigma, seed=3)
    for i in range(y.numel()):
        (row,) = torch.autograd.grad(y.flatten()[i], mu, retain_graph=True)
        torch.testing.assert_close(jacobian.reshape(y.numel(), *mu.shape)[i], row)


@pytest.mark.parametrize("op", [ffg_conv3d, ffg_conv_transpose3d])
def test_per_sample_gradients_are_those_of_each_sample_alone(op):
    x, mu, sigma = (t.detach() for t in make(c=3, f=3, bias=False))
    loss = lambda m, s, x: op(x[None], m, s, stride=2, seed=3).square().sum()  # noqa: E731
    per_sample = vmap(grad(loss, argnums=(0, 1)), in_dims=(None, None, 0))(mu, sigma, x)
    for i in range(len(x)):
        for ours, theirs in zip(per_sample, grad(loss, argnums=(0, 1))(mu, sigma, x[i]), strict=True):
            assert torch.equal(ours[i], theirs)


def test_ensembles_of_weights_run_under_vmap():
    torch.manual_seed(0)
    nets = [nn.Sequential(FFGConv3d(1, 2, 3), nn.ReLU(), nn.Flatten(), FFGLinear(2, 2)) for _ in range(3)]
    parameters, buffers = torch.func.stack_module_state(nets)
    x = torch.randn(1, 1, 3, 3, 3)
    run = lambda p, b: functional_call(nets[0], (p, b), (x,))  # noqa: E731
    assert vmap(run, randomness="different")(parameters, buffers).shape == (3, 1, 2)
    for net in nets:
        net.eval()
    for i, y in enumerate(vmap(run)(parameters, buffers)):
        torch.testing.assert_close(y, nets[i](x))


def test_batched_gradients_are_the_gradients_one_by_one():
    tensors = make()
    y = ffg_conv3d(*tensors, padding=1, seed=3)
    gs = torch.randn(3, *y.shape)
    batched = torch.autograd.grad(y, tensors, gs, is_grads_batched=True, retain_graph=True)
    for i, g in enumerate(gs):
        for ours, theirs in zip(batched, torch.autograd.grad(y, tensors, g, retain_graph=True), strict=True):
            torch.testing.assert_close(ours[i], theirs)


def test_a_second_derivative_under_func_is_an_error():
    x, mu, sigma = (t.detach() for t in make(bias=False))
    loss = lambda m: ffg_conv3d(x, m, sigma, seed=3).square().sum()  # noqa: E731
    with pytest.raises(RuntimeError, match="second derivative"):
        grad(lambda m: grad(loss)(m).sum())(mu)


FLOPS = """
import dwc_kernels, torch, sys
from torch.nn import functional as F
{triton}
from torch.utils.flop_counter import FlopCounterMode
x, mu, sigma = (torch.rand(s, requires_grad=True) for s in ((2, 3, 5, 5, 5), (3, 4, 2, 2, 2), (3, 4, 2, 2, 2)))
pairs = (
    (dwc_kernels.ffg_conv3d, F.conv3d, (x, mu.transpose(0, 1), sigma.transpose(0, 1))),
    (dwc_kernels.ffg_conv_transpose3d, F.conv_transpose3d, (x, mu, sigma)),
)
for ours, theirs, (x, mu, sigma) in pairs:
    with FlopCounterMode(display=False) as counted:
        ours(x, mu, sigma, stride=2).sum().backward()
    with FlopCounterMode(display=False) as expected:
        (theirs(x, mu, stride=2) + theirs(x * x, sigma * sigma, stride=2)).sum().backward()
    assert counted.get_total_flops() == expected.get_total_flops() > 0
"""


@pytest.mark.parametrize("triton", ["", "sys.modules['triton'] = None"])
def test_flops_are_those_of_the_two_convolutions(triton):
    subprocess.run([sys.executable, "-c", FLOPS.format(triton=triton)], check=True)


@torch._dynamo.config.patch(recompile_limit=3, fail_on_recompile_limit_hit=True)
def test_a_new_integer_seed_does_not_recompile():
    tensors = make()
    compiled = torch.compile(
        lambda seed: ffg_conv3d(*tensors, padding=1, seed=seed), backend="aot_eager", fullgraph=True
    )
    for seed in (7, 8, 9, 10, 11, 2**40, -3):
        assert torch.equal(compiled(seed), ffg_conv3d(*tensors, padding=1, seed=seed))


def test_symbolic_tracing_takes_layers_whole_in_every_mode():
    net = convert(
        nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.ConvTranspose3d(2, 2, 2, 2), nn.Flatten(2), nn.Linear(8, 2))
    )
    x = torch.randn(1, 1, 3, 3, 3)
    traced = torch.fx.symbolic_trace(net)
    for mode in (True, False):
        net.train(mode)
        torch.manual_seed(0)
        expected = net(x)
        torch.manual_seed(0)
        assert torch.equal(traced.train(mode)(x), expected)
    net[0].weight_rho.data += 1  # sigma is no constant of the graph
    torch.manual_seed(0)
    expected = net.train()(x)
    torch.manual_seed(0)
    assert torch.equal(traced.train()(x), expected)


def test_onnx_export_while_sampling_says_what_to_do(monkeypatch):
    layer = FFGConv3d(1, 1, 1)
    monkeypatch.setattr(torch.onnx, "is_in_onnx_export", lambda: True)
    with pytest.raises(RuntimeError, match=r"eval\(\)"):
        layer(torch.ones(1, 1, 1, 1, 1))
    assert layer.eval()(torch.ones(1, 1, 1, 1, 1)).shape == (1, 1, 1, 1, 1)


def test_complex_dtypes_and_unknown_backends_are_refused_at_construction():
    with pytest.raises(ValueError, match="complex64"):
        FFGConv3d(1, 1, 1, dtype=torch.complex64)
    with pytest.raises(ValueError, match="complex64"):
        convert(nn.Sequential(nn.Conv3d(1, 1, 1, dtype=torch.complex64)))
    with pytest.raises(ValueError, match="'nope'"):
        FFGConv3d(1, 1, 1, backend="nope")


@pytest.mark.parametrize("frozen", ["rho", "mu"])
def test_frozen_parameters_cost_no_correlation_and_change_no_other_gradient(frozen):
    from torch.utils.flop_counter import FlopCounterMode

    layer, x = FFGConv3d(3, 4, 3, padding=1), torch.randn(2, 3, 5, 5, 5)
    layer(x, seed=1).square().sum().backward()
    full = {name: p.grad.clone() for name, p in layer.named_parameters()}
    for name, p in layer.named_parameters():
        p.grad = None
        p.requires_grad_(not name.endswith(frozen))
    with FlopCounterMode(display=False) as counter:
        layer(x, seed=1).square().sum().backward()
    one = 2 * 2 * 125 * 3 * 4 * 27
    assert counter.get_total_flops() == 3 * one  # mean, variance and one of the two correlations
    for name, p in layer.named_parameters():
        assert (p.grad is None) == name.endswith(frozen)
        if p.grad is not None:
            torch.testing.assert_close(p.grad, full[name])


def test_nothing_but_the_input_is_kept_where_only_the_means_are_trained():
    from benchmarks.composition import saved_bytes

    layer, x = FFGConv3d(8, 8, 3, padding=1), torch.randn(1, 8, 6, 6, 6)
    for p in (layer.weight_rho, layer.bias_rho):
        p.requires_grad_(False)
    known = (*layer.parameters(), *layer.buffers())
    sigma = layer.weight_sigma.numel() * 4 + 8 * 4
    assert saved_bytes(lambda: layer(x), *known) <= x.numel() * 4 + sigma


def test_kl_loss_under_fsdp2_is_that_of_the_whole_layer_also_from_meta(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        torch.manual_seed(0)
        net = nn.Sequential(FFGConv3d(1, 4, 3), FFGConv3d(4, 4, 1))
        net[0].set_prior(weight_mu=torch.rand(4, 1, 3, 3, 3), weight_sigma=torch.rand(4, 1, 1, 1, 1) + 0.1)
        expected = kl_loss(net)
        slopes = torch.autograd.grad(expected, tuple(net.parameters()))
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        kl = kl_loss(net)
        (kl + net(torch.ones(1, 1, 3, 3, 3)).sum() * 0).backward()
        torch.testing.assert_close(kl, expected)
        for p, slope in zip(net.parameters(), slopes, strict=True):
            torch.testing.assert_close(p.grad.full_tensor(), slope)
        with torch.device("meta"):
            late = nn.Sequential(FFGConv3d(1, 4, 3, prior_sigma=0.5))
        fully_shard(late, mesh=init_device_mesh("cpu", (1,)))
        late.to_empty(device="cpu")[0].reset_parameters()
        assert late[0].prior_weight_sigma == 0.5
        assert kl_loss(late).isfinite()
    finally:
        dist.destroy_process_group()


def test_networks_under_fsdp2_are_drawn_projected_and_become_priors(tmp_path):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        x = torch.randn(1, 1, 4, 4, 4)
        plain = nn.Sequential(FFGConv3d(1, 4, 3, sigma_init=0.5), FFGConv3d(4, 2, 1))
        plain[0].set_prior(weight_sigma=torch.rand(4, 1, 3, 3, 3) * 0.1 + 0.1)
        net = copy.deepcopy(plain)
        fully_shard(net, mesh=init_device_mesh("cpu", (1,)))
        torch.testing.assert_close(predict(net, x, 2, seed=0).mean, predict(plain, x, 2, seed=0).mean)
        net.reshard()  # FSDP2 leaves the root's parameters whole after a forward without gradients
        for project in SigmaProjection(net), SigmaProjection(plain):
            project()
        assert torch.equal(net[0].weight_sigma.full_tensor(), plain[0].weight_sigma)
        set_prior(plain, net)
        torch.testing.assert_close(kl_loss(plain), torch.zeros(()), atol=1e-5, rtol=0)
        sharded = nn.Sequential(nn.Conv3d(1, 1, 1))
        fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(ValueError, match=r"^0: its weight is sharded; convert before fully_shard"):
            convert(sharded)
    finally:
        dist.destroy_process_group()


def test_activations_in_place_leave_the_hooks_of_fsdp2_where_they_are(tmp_path):
    """Without them the weights are not gathered for the backward."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        net = nn.Sequential(FFGConv3d(1, 4, 1), nn.ReLU(inplace=True), FFGLinear(4, 4), nn.ReLU(inplace=True))
        for module in (net[0], net[2], net):
            fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
        net(torch.randn(2, 1, 4, 4, 4)).sum().backward()
        assert all(p.grad.full_tensor().isfinite().all() for p in net.parameters())
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize(
    ("layer", "shape", "channels_last"),
    [
        (FFGLinear(8, 6), (5, 8), False),
        (FFGLinear(8, 6), (2, 3, 8), False),
        (FFGConv3d(16, 16, 3, padding=1), (2, 16, 1, 1, 1), False),
        (FFGConv3d(16, 16, 3, padding=1), (2, 16, 2, 2, 2), True),
        (FFGConv3d(64, 64, 3, padding=1), (1, 64, 16, 16, 16), True),  # Winograd's, where PyTorch's are slower
        (FFGConvTranspose3d(8, 8, 2, 2), (2, 8, 3, 3, 3), False),
        (FFGConvTranspose3d(8, 8, 3), (2, 8, 3, 3, 3), True),
        (FFGConv3d(2, 3, 3, padding=1, padding_mode="circular"), (2, 4, 4, 4), False),
    ],
)
def test_an_activation_may_overwrite_the_output_in_place(layer, shape, channels_last):
    x = torch.randn(shape)
    x = x.contiguous(memory_format=torch.channels_last_3d) if channels_last else x
    expected, gradients = layer(x, seed=3).relu(), []
    for y in (expected, layer(x, seed=3).relu_()):
        assert torch.equal(y, expected)
        gradients.append(torch.autograd.grad(y.square().sum(), tuple(layer.parameters())))
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("fullgraph", [True, False])
def test_a_compiled_gradient_of_torch_func_is_a_clear_error(fullgraph):
    layer = FFGConv3d(1, 1, 1)

    def loss(p, x):
        return torch.func.functional_call(layer, p, (x,)).square().mean()

    compiled = torch.compile(torch.func.grad(loss), backend="eager", fullgraph=fullgraph)
    with pytest.raises(Exception, match=r"cannot trace torch.func derivatives of ffg_conv3d"):
        compiled(dict(layer.named_parameters()), torch.ones(1, 1, 1, 1, 2))


@pytest.fixture
def up_and_down():
    torch.manual_seed(0)
    return convert(nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU(), nn.ConvTranspose3d(2, 1, 2, stride=2)), sigma_init=0.5)


def test_the_mean_and_drawn_weights_are_traced_by_torch_jit_and_sampling_says_what_to_do(up_and_down):
    net, x = up_and_down, torch.ones(1, 1, 4, 4, 4)
    with torch.no_grad(), draw_weights(net, 0):
        assert torch.equal(torch.jit.trace(net, x)(x), net(x))
    with pytest.raises(RuntimeError, match=r"torch\.jit\.trace cannot record a sample; call eval"):
        torch.jit.trace(net, x)
    net.eval()
    assert torch.equal(torch.jit.trace(net, x)(x), net(x))


def test_an_exported_network_samples_in_training_mode_and_is_the_mean_in_eval_mode(up_and_down):
    net, x = up_and_down, torch.ones(1, 1, 4, 4, 4)
    sampler = torch.export.export(net, (x,)).module()
    torch.manual_seed(1)
    drawn = [sampler(x), sampler(x)]
    torch.manual_seed(1)
    assert torch.equal(drawn[0], net(x))
    assert not torch.equal(*drawn)
    net.eval()
    assert torch.equal(torch.export.export(net, (x,)).module()(x), net(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor compiles with g++")
def test_the_mean_is_compiled_ahead_of_time_into_a_package_that_runs_without_the_network(up_and_down, tmp_path):
    net, x = up_and_down.eval(), torch.randn(1, 1, 4, 4, 4)
    package = str(tmp_path / "net.pt2")
    torch._inductor.aoti_compile_and_package(torch.export.export(net, (x,)), package_path=package)
    compiled = torch._inductor.aoti_load_package(package)
    for image in (x, torch.randn(1, 1, 4, 4, 4)):
        torch.testing.assert_close(compiled(image), net(image))


def test_the_mean_and_drawn_weights_export_to_onnx_and_sampling_does_not():
    net, x = convert(nn.Sequential(nn.Conv3d(1, 2, 3), nn.ReLU())), torch.ones(1, 1, 4, 4, 4)
    torch.onnx.export(net.eval(), (x,), dynamo=True)
    with draw_weights(net, 0):
        torch.onnx.export(net, (x,), dynamo=True)
    with pytest.raises(Exception, match="ONNX has no operator that samples"):
        torch.onnx.export(net.train(), (x,), dynamo=True)


def test_the_package_imports_with_torch_and_numpy_alone():
    code = """
import sys
from importlib.abc import MetaPathFinder
import torch, numpy
class Block(MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name.partition(".")[0] not in sys.stdlib_module_names | {"torch", "numpy", "dwc_kernels"}:
            raise ImportError(f"blocked: {name}")
sys.meta_path.insert(0, Block())
import dwc_kernels
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_package_names_no_other_library():
    allowed = sys.stdlib_module_names | {"torch", "numpy", "triton", "dwc_kernels"}
    for path in Path(dwc_kernels.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) else []
            assert {name.partition(".")[0] for name in names} <= allowed, path


def test_averaged_and_pruned_networks_sample_and_load():
    net, x = nn.Sequential(FFGConv3d(2, 3, 3, padding=1)), torch.randn(1, 2, 4, 4, 4)
    average = torch.optim.swa_utils.AveragedModel(net, use_buffers=True)
    prune.l1_unstructured(net[0], "weight_mu", amount=0.5)
    average.update_parameters(nn.Sequential(FFGConv3d(2, 3, 3, padding=1)))
    for variant in (average, net):
        assert not torch.equal(variant(x), variant(x))
        assert kl_loss(variant).isfinite()
    net(x).sum().backward()
    assert (net[0].weight_mu == 0).float().mean() == 0.5
    other = FFGConv3d(2, 3, 3, padding=1)
    prune.identity(other, "weight_mu")
    other.load_state_dict(net[0].state_dict())
    other(x)  # pruning makes the weight before each forward
    assert torch.equal(other.weight_mu, net[0].weight_mu)


def test_a_scaled_fp16_step_trains():
    net, x = nn.Sequential(FFGConv3d(2, 3, 3, padding=1)), torch.randn(1, 2, 4, 4, 4)
    optimizer, scaler = torch.optim.SGD(parameter_groups(net, lr=0.1)), torch.amp.GradScaler("cpu", init_scale=256.0)
    before = net[0].weight_rho.detach().clone()
    with torch.autocast("cpu", torch.float16):
        loss = net(x).square().mean()
    scaler.scale(loss + kl_loss(net) / 1e3).backward()
    scaler.step(optimizer)
    assert net[0].weight_rho.isfinite().all()
    assert not torch.equal(net[0].weight_rho, before)
