"""The commands that measure on a GPU, run to their end on a CPU that plays one: interpreted kernels, a host's clock."""

import contextlib
import csv
import json
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from torch.profiler import ProfilerActivity
from triton.runtime.errors import OutOfResources

from benchmarks import gpu
from benchmarks.shapes import Layer
from dwc_kernels import kernels, timing, tune
from dwc_kernels.kernels import tiles, tuned
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.launch import Plan, forget_plans
from dwc_kernels.kernels.specialized import variant

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # 1 / sqrt(0), not taken


LAYERS = (Layer("first", 1, 6, 3, 1), Layer("last", 6, 4, 1, 1))


class HostEvent:
    """torch.cuda.Event by the host's clock."""

    def __init__(self, enable_timing):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


@pytest.fixture
def pretended_gpu(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    forget_plans()
    for name in ("reset_peak_memory_stats", "synchronize"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    for name in ("memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda: 0)
    monkeypatch.setattr(torch.cuda, "Event", HostEvent)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "pretended")
    for name, value in {
        "DEVICE": "cpu",
        "ACTIVITY": ProfilerActivity.CPU,
        "MATMUL": 64,
        "SIZE": (2, 4, 4),
        "LAYERS": LAYERS,
    }.items():
        monkeypatch.setattr(gpu, name, value)
    monkeypatch.setattr(gpu, "print_table", lambda dtypes: None)
    monkeypatch.setattr(torch, "compile", lambda run, dynamic: run)
    monkeypatch.setattr(timing, "captured", lambda call: call)
    monkeypatch.setattr(timing, "L2_MIB", 1)
    monkeypatch.setattr(gpu, "capture_stream", contextlib.nullcontext)
    yield
    forget_plans()


def test_the_benchmark_checks_times_and_writes_its_table_and_plot(pretended_gpu, tmp_path):
    assert gpu.main(["--out", str(tmp_path / "out"), "--dtype", "fp32", "--repeats", "2"]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "gpu.csv").open()))
    assert {(r["layer"], r["contender"], r["phase"]) for r in rows} == {
        (layer, contender, phase)
        for layer in ("first", "last", "network")
        for contender in gpu.CONTENDERS
        for phase in ("forward", "backward", "step")
    }
    assert (tmp_path / "out" / "gpu.png").stat().st_size > 0
    assert all(float(r["host_ms"]) > 0 for r in rows)


@pytest.mark.parametrize("fails", [False, True])
def test_the_benchmark_leaves_pytorch_s_precision_settings_as_they_were(pretended_gpu, monkeypatch, tmp_path, fails):
    def asked():
        precisions = torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.cuda.matmul
        allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32  # which may raise
        return *allowed, *(p.fp32_precision for p in precisions), torch.backends.cudnn.benchmark

    def errors(layer, dtype):
        assert torch.backends.cudnn.conv.fp32_precision == "ieee"
        if fails:
            raise RuntimeError("out of memory")
        return {"y": (1.0, 0.0)}

    before = asked()
    monkeypatch.setattr(gpu, "errors", errors)
    with pytest.raises(RuntimeError) if fails else contextlib.nullcontext():
        gpu.main(["--out", str(tmp_path), "--dtype", "fp32"])
    assert asked() == before


def test_precisions_that_follow_the_general_setting_follow_it_afterwards():
    program = (
        "import torch\nfrom benchmarks.gpu import settings_restored\nbackends = torch.backends\n"
        "backends.fp32_precision = 'ieee'\nwith settings_restored():\n"
        "    backends.cudnn.conv.fp32_precision = backends.cuda.matmul.fp32_precision = 'tf32'\n"
        "print(backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision)\n"
        "backends.fp32_precision = 'tf32'\n"
        "print(backends.cudnn.conv.fp32_precision, backends.cuda.matmul.fp32_precision)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "ieee ieee\ntf32 tf32\n", done.stderr


def test_a_layer_that_is_wrong_is_named_and_not_timed(pretended_gpu, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(gpu, "errors", lambda layer, dtype: {"y": (1.0, 0.0)})
    assert gpu.main(["--out", str(tmp_path), "--dtype", "fp32"]) == 1
    assert "first: wrong, not timed" in capsys.readouterr().err
    assert len((tmp_path / "gpu.csv").read_text().splitlines()) == 1


def test_what_the_tuner_stores_the_launchers_use(pretended_gpu):
    x = torch.randn(1, 5, 2, 4, 4)
    mu = torch.randn(6, 5, 1, 1, 1)
    best = tune.tune_layer(x, mu, mu.abs(), n_tiles=3, repeats=2)
    assert {key.split()[0] for key in best} == set(tiles.KINDS)
    for kind in tiles.KINDS:
        before = Plan.of(kind, x, x.shape[2:], mu, (1, 1, 1), 1, None)
        other = next(t for t in tiles.candidates(before.problem, before.chip) if t != before.tile)
        best[tuned.tuned_key(before.problem)] = tune.asdict(other)
        tune.store(tuned.tuned_path(before.chip.name), json.loads(json.dumps(best)))
        forget_plans()
        assert Plan.of(kind, x, x.shape[2:], mu, (1, 1, 1), 1, None).tile == other


def layer_to_tune():
    mu = torch.randn(6, 5, 1, 1, 1)
    return torch.randn(1, 5, 2, 4, 4), mu, mu.abs()


def test_the_tuner_checks_and_times_with_biases(pretended_gpu, monkeypatch):
    forward, grad_weight, seen = kernels.forward, kernels.grad_weight, []

    def spied_forward(*arguments, **options):
        seen.append(arguments[3] is not None and arguments[4] is not None)
        return forward(*arguments, **options)

    def spied_grad_weight(*arguments, bias_sigma=None, **options):
        seen.append(bias_sigma is not None)
        return grad_weight(*arguments, bias_sigma=bias_sigma, **options)

    monkeypatch.setattr(kernels, "forward", spied_forward)
    monkeypatch.setattr(kernels, "grad_weight", spied_grad_weight)
    tune.tune_layer(*layer_to_tune(), n_tiles=1, repeats=1)
    assert len(seen) > 2
    assert all(seen)


def test_a_tile_whose_bias_gradient_is_wrong_is_not_taken(pretended_gpu, monkeypatch):
    right = kernels.grad_weight

    def grad_weight(*arguments, **options):
        *rest, db_sigma = right(*arguments, **options)
        return *rest, 2 * db_sigma

    monkeypatch.setattr(kernels, "grad_weight", grad_weight)
    with pytest.raises(ValueError, match="grad_weight ieee 5->6 1x1x1 fits"):
        tune.tune_layer(*layer_to_tune(), n_tiles=1, repeats=1)


@pytest.mark.parametrize("content", ["{", '{"forward ieee 5->6 1x1x1": {"box": [3, 4, 8]}}'])
def test_the_tuner_replaces_a_broken_file(pretended_gpu, content, capsys):
    x, mu, sigma = layer_to_tune()
    path = tuned.tuned_path("the interpreter")
    path.parent.mkdir()
    path.write_text(content)
    tune.store(path, tune.tune_layer(x, mu, sigma, n_tiles=1, repeats=1))
    assert str(path) in capsys.readouterr().err
    assert len(tuned.stored_tiles(path)) == len(tiles.KINDS)
    assert Plan.of("forward", x, x.shape[2:], mu, (1, 1, 1), 1, None).tile in tuned.stored_tiles(path).values()


def test_a_tile_whose_result_is_wrong_is_not_taken(pretended_gpu, monkeypatch, capsys):
    x, mu, sigma = layer_to_tune()
    problem = Plan.of("forward", x, x.shape[2:], mu, (1, 1, 1), 1, None)
    wrong = problem.tile  # the one that the model prefers
    right = kernels.forward

    def forward(*arguments, tile, **options):
        y, r = right(*arguments, tile=tile, **options)
        return y + (0.1 if tile == wrong else 0.0), r

    monkeypatch.setattr(kernels, "forward", forward)
    best = tune.tune_layer(x, mu, sigma, n_tiles=2, repeats=1)
    assert best[tuned.tuned_key(problem.problem)] != json.loads(json.dumps(tune.asdict(wrong)))
    assert "not taken" in capsys.readouterr().err


@pytest.mark.parametrize("wrong_at", [None, (1, 4), (2, 4), (8, 4), (1, 3)])
def test_specialized_warps_are_taken_if_they_win_and_are_right_at_every_dilation_and_in_odd_lines(
    pretended_gpu, monkeypatch, capsys, wrong_at
):
    x, mu = torch.randn(1, 5, 2, 4, 4), torch.randn(6, 5, 1, 1, 3)
    sigma = mu.abs()
    plan = Plan.of("forward", x, x.shape[2:], mu, (1, 1, 1), 1, None)
    specialized = replace(plan.tile, specialized=True)
    right, seen = kernels.forward, set()

    def forward(*arguments, tile, **options):
        if tile != specialized:
            time.sleep(0.05)  # so that they win
            return right(*arguments, tile=tile, **options)
        where = arguments[7][0], arguments[0].shape[-1]
        seen.add(where)
        y, r = right(*arguments, tile=plan.tile, **options)
        return y + (0.1 if where == wrong_at else 0.0), r

    def candidates(problem, chip):
        return [specialized] if problem.kind == "forward" else []

    monkeypatch.setattr(kernels, "forward", forward)
    monkeypatch.setattr(variant, "candidates", candidates)
    best = tune.tune_layer(x, mu, sigma, n_tiles=1, repeats=1)[tuned.tuned_key(plan.problem)]
    assert seen == {(1, 4), (2, 4), (4, 4), (8, 4), (1, 3)}
    assert (best == tune.asdict(specialized)) == (wrong_at is None)
    assert ("not taken" in capsys.readouterr().err) == (wrong_at is not None)


def test_the_tuner_tries_the_packaged_tile_too(pretended_gpu, monkeypatch):
    x, mu, sigma = layer_to_tune()
    plan = Plan.of("forward", x, x.shape[2:], mu, (1, 1, 1), 1, None)
    packaged, right, seen = tiles.ranked(plan.problem, plan.chip)[-1], kernels.forward, set()
    monkeypatch.setattr(tuned, "measured_tile", lambda problem, *_: packaged if problem.kind == "forward" else None)
    monkeypatch.setattr(kernels, "forward", lambda *a, tile, **k: seen.add(tile) or right(*a, tile=tile, **k))
    tune.tune_layer(x, mu, sigma, n_tiles=1, repeats=1)
    assert seen == {plan.tile, packaged}


def test_no_tile_that_fits_is_an_error_in_words(pretended_gpu, monkeypatch):
    def forward(*arguments, tile, **options):
        raise OutOfResources(300 << 10, 227 << 10, "shared memory")

    monkeypatch.setattr(kernels, "forward", forward)
    with pytest.raises(ValueError, match=r"none of the 2 tiles tried for forward ieee 5->6 1x1x1 fits"):
        tune.tune_layer(*layer_to_tune(), n_tiles=2, repeats=1)


def test_a_chip_without_room_for_any_tile_is_an_error_in_words():
    tiny = replace(CHIPS["sm_90"], name="a tiny GPU", shared=1 << 10)
    with pytest.raises(ValueError, match="no tile of forward in bf16 fits the 1 KB of shared memory of a tiny GPU"):
        tiles.choose(tiles.problem_of("forward", "bf16", 1, (8, 8, 8), 96, 96, (3, 3, 3)), tiny)
