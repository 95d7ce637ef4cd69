"""What only a GPU can show: bf16 and tf32 products, CUDA graphs, streams, autocast and the choice of the kernels.

    DWC_TEST_DEVICE=cuda python -m pytest tests/dwc_kernels/kernels

runs these and, compiled, the tests that are interpreted elsewhere.
"""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as F

from dwc.meshnet import MeshNet
from dwc_kernels import FFGConv3d, ffg_conv3d, kernels, tune
from dwc_kernels.kernels import launch, tiles, tuned
from dwc_kernels.kernels.specialized.variant import candidates
from dwc_kernels.noise import normal
from dwc_kernels.timing import captured
from tests.dwc_kernels import problems
from tests.dwc_kernels.kernels.test_kernels import GEOMETRIES, NOISE, STRIDED
from tests.dwc_kernels.problems import DEVICE, results

if DEVICE != "cuda":
    pytest.skip("needs a GPU and DWC_TEST_DEVICE=cuda", allow_module_level=True)

ONE = (1, 1, 1)
TF32 = 2.0**-11  # the rounding of an operand

make = partial(problems.make, size=(4, 5, 6), batch=1)
LARGE = {
    "96 -> 96, 32^3": (dict(c=96, f=96, size=(32, 32, 32)), dict(padding=1)),
    "96 -> 96, dilation 8": (dict(c=96, f=96, size=(32, 32, 32)), dict(padding=8, dilation=8)),
    "96 -> 50, 1x1x1": (dict(c=96, f=50, kernel=1, size=(32, 32, 32)), {}),
    "1 -> 96": (dict(c=1, f=96, size=(32, 32, 32)), dict(padding=1)),
    "21 -> 21, 45^3": (dict(c=21, f=21, size=(45, 45, 45)), dict(padding=2, dilation=2)),
    "256 -> 256, 9x10x11": (dict(c=256, f=256, size=(9, 10, 11)), dict(padding=1)),
}
EVERY = GEOMETRIES | {f"stride {name}": case for name, case in STRIDED.items()} | LARGE


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "tf32"])
@pytest.mark.parametrize("case", EVERY)
def test_tensor_cores_are_as_accurate_as_the_composition(case, dtype):
    arguments, geometry = EVERY[case]
    slack = NOISE
    if dtype == "tf32":
        torch.backends.cudnn.conv.fp32_precision = "tf32"
        slack = TF32  # cuDNN multiplies some shapes exactly
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(dtype, torch.float32)
    tensors = make(**arguments, dtype=dtype)
    problems.assert_as_accurate_as_composition(tensors, backend="triton", slack=slack, **geometry)


SPECIALIZED = {
    "96 -> 96": (dict(c=96, f=96, size=(32, 32, 32), batch=2), dict(padding=1)),
    "96 -> 96, dilation 2": (dict(c=96, f=96, size=(32, 32, 32), batch=2), dict(padding=2, dilation=2)),
    "96 -> 96, dilation 8": (dict(c=96, f=96, size=(32, 32, 32), batch=2), dict(padding=8, dilation=8)),
    "21 -> 21, 20x18x16": (dict(c=21, f=21, size=(20, 18, 16), batch=2), dict(padding=1)),
    "64 -> 50, 17x32x31": (dict(c=64, f=50, size=(17, 32, 31)), dict(padding=1)),
    "128 -> 128, 1x1x1": (dict(c=128, f=128, kernel=1, size=(16, 16, 16)), {}),
    "40 -> 3, 5x7x9, no bias": (dict(c=40, f=3, size=(5, 7, 9), batch=3, bias=False), dict(padding=1)),
    "96 -> 96, 5x5x5": (dict(c=96, f=96, kernel=5, size=(10, 9, 12)), dict(padding=2)),
    "32 -> 40, one voxel": (dict(c=32, f=40, size=(1, 1, 1)), dict(padding=9, dilation=9)),
}


def with_specialized_warps(columns, monkeypatch):
    """Every kernel that can runs with specialized warps, with one of their choices of columns."""

    def tile_for(problem, chip):
        found = candidates(problem, chip)
        return found[columns] if found else tiles.choose(problem, chip)

    if launch.chip_of(torch.device("cuda", 0)).arch != "sm_90":
        pytest.skip("specialized warps need sm_90")
    monkeypatch.setattr(launch, "tile_for", tile_for)
    launch.forget_plans()
    yield
    launch.forget_plans()


@pytest.fixture(params=[0, 1, 2], ids=["64 + 32 columns", "64 columns", "32 columns"])
def specialized_warps(request, monkeypatch):
    yield from with_specialized_warps(request.param, monkeypatch)


@pytest.fixture(params=["triton", "specialized warps"])
def either_form(request, monkeypatch):
    if request.param == "triton":
        yield
    else:
        yield from with_specialized_warps(0, monkeypatch)


@pytest.mark.usefixtures("poisoned_memory", "specialized_warps")
@pytest.mark.parametrize("case", SPECIALIZED)
def test_specialized_warps_are_as_accurate_as_the_composition(case):
    arguments, geometry = SPECIALIZED[case]
    tensors = make(**arguments, dtype=torch.bfloat16)
    problems.assert_as_accurate_as_composition(tensors, backend="triton", slack=NOISE, **geometry)


@pytest.mark.parametrize("width", [32, 31])
def test_specialized_warps_draw_the_same_noise(width):
    x = torch.zeros(2, 32, 9, 10, width).bfloat16().contiguous(memory_format=torch.channels_last_3d)
    mu, bias = torch.zeros(64, 32, 3, 3, 3).bfloat16(), torch.linspace(-1, 1, 64).bfloat16()
    arguments = (x, mu, mu, bias, bias.abs() + 0.1, ONE, ONE, ONE, 1, torch.tensor(5))
    expected = kernels.forward(*arguments)
    problem, chip = launch.asked("forward", x, x.shape[2:], mu, ONE, 1)
    for tile in candidates(problem, chip):
        for found, same in zip(kernels.forward(*arguments, tile=tile), expected, strict=True):
            assert torch.equal(found, same)


def layer_and_input(dtype=torch.bfloat16):
    torch.manual_seed(0)
    layer = FFGConv3d(32, 48, 3, padding=2, dilation=2, sigma_init=0.1).to(dtype)
    return layer, torch.randn(2, 32, 16, 15, 18, dtype=dtype).requires_grad_()


def test_noise_of_the_device_is_that_of_the_cpu():
    for shape in ((2, 3, 4, 5, 6), (1001,)):
        on_cpu = normal(torch.empty(shape, device="cpu"), 2**40 + 3)
        torch.testing.assert_close(normal(torch.empty(shape), 2**40 + 3).cpu(), on_cpu, rtol=0, atol=2e-6)


def test_a_layer_on_a_gpu_runs_the_kernels_without_being_told(monkeypatch):
    calls = []
    for name in ("forward", "grad_input", "grad_weight"):
        run = getattr(kernels, name)
        monkeypatch.setattr(kernels, name, lambda *a, f=run, n=name, **k: calls.append(n) or f(*a, **k))
    layer, x = layer_and_input()
    layer(x).sum().backward()
    assert calls == ["forward", "grad_input", "grad_weight"]


def test_repeated_steps_give_the_same_bits_and_those_of_the_operators():
    layer, x = layer_and_input()
    seed = torch.tensor(5)
    arguments = (x, layer.weight_mu, layer.weight_sigma, layer.bias_mu, layer.bias_sigma)
    arguments = [t.detach().requires_grad_() for t in arguments]
    g = torch.randn(2, 48, 16, 15, 18).bfloat16()
    geometry = dict(padding=2, dilation=2, seed=seed)
    first, *others = (results(ffg_conv3d, arguments, g, **geometry) for _ in range(5))
    y, _ = torch.ops.dwc.ffg_conv3d(*arguments, ONE, (2,) * 3, (2,) * 3, 1, seed, "triton")
    others.append([y, *torch.autograd.grad(y, arguments, g)])
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(other, first, strict=True))


@pytest.mark.usefixtures("either_form")
def test_a_cuda_graph_replays_a_step_with_the_seed_that_stands_in_memory():
    layer, x = layer_and_input()
    seed = torch.tensor(5)
    parameters = [x, *layer.parameters()]

    def step():
        y = ffg_conv3d(x, layer.weight_mu, layer.weight_sigma, layer.bias_mu, layer.bias_sigma,
                       padding=2, dilation=2, seed=seed)  # fmt: skip
        return [y, *torch.autograd.grad(y.float().square().sum(), parameters)]

    found = []
    replay = captured(lambda: found.__setitem__(slice(None), step()))
    for value in (5, 6, -(2**60)):
        seed.fill_(value)
        replay()
        again = [t.clone() for t in found]
        for ours, eager in zip(again, step(), strict=True):
            assert torch.equal(ours, eager)


@pytest.mark.usefixtures("either_form")
def test_two_streams_do_not_disturb_each_other():
    layers = [layer_and_input() for _ in range(2)]
    expected = [layer(x, seed=7).clone() for layer, x in layers]
    streams = [torch.cuda.Stream() for _ in layers]
    torch.cuda.synchronize()
    for _ in range(10):
        found = []
        for stream, (layer, x) in zip(streams, layers, strict=True):
            with torch.cuda.stream(stream):
                y = layer(x, seed=7)
                found.append((y, torch.autograd.grad(y.sum(), x)[0]))
        torch.cuda.synchronize()
        assert all(torch.equal(y, e) for (y, _), e in zip(found, expected, strict=True))


def test_a_network_under_autocast_learns_as_with_the_reference():
    torch.manual_seed(0)
    network = MeshNet(n_classes=5, width=21, dilations=(1, 2, 4, 8, 1)).to("cuda")
    x = torch.randn(2, 1, 32, 32, 32)
    labels = (x[:, 0] > 0).long() + (x[:, 0] > 1).long()
    histories = []
    for backend in ("triton", "reference"):
        net, history = copy.deepcopy(network), []
        for layer in net.layers:
            layer.backend = backend
        optimizer = torch.optim.Adam(net.parameters(), 1e-2, fused=True)
        torch.manual_seed(1)
        for _ in range(30):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.bfloat16):
                loss = F.cross_entropy(net(x).float(), labels)
            loss.backward()
            optimizer.step()
            history.append(loss.item())
        histories.append(history)
    ours, theirs = histories
    assert theirs[-1] < 0.8 * theirs[0]
    assert abs(ours[0] - theirs[0]) < 0.02 * theirs[0]
    assert abs(ours[-1] - theirs[-1]) < 0.1 * theirs[0]


def test_a_step_holds_less_memory_than_the_composition():
    eps = torch.randn(4, 96, 32, 32, 32).bfloat16()
    peaks = []
    for op in (partial(ffg_conv3d, seed=1), partial(problems.definition, eps=eps)):
        tensors = make(c=96, f=96, size=(32, 32, 32), batch=4, dtype=torch.bfloat16)
        tensors[0] = problems.in_layout(tensors[0], "channels_last")
        for _ in range(2):  # the first call also compiles and keeps what it needs from then on
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            y = op(*tensors, padding=1)
            torch.autograd.grad(y, tensors, y.detach())
            peak = torch.cuda.max_memory_allocated() - before
            del y
        peaks.append(peak)
    assert peaks[0] < 0.7 * peaks[1], peaks


def test_tuning_stores_tiles_that_launches_then_take(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    options = ["--width", "21", "--classes", "5", "--samples", "2", "--size", "16", "--tiles", "2", "--repeats", "3"]
    assert tune.main(options) == 0, capsys.readouterr()
    (path,) = (tmp_path / "dwc_kernels").iterdir()
    assert len(tuned.stored_tiles(path)) == 9
    layer, x = layer_and_input()
    assert layer(x).isfinite().all()
