"""The commands that measure on a GPU, run to their end on a CPU that plays one: interpreted kernels, a host's clock."""

import csv
import json
import time

import pytest
import torch
from torch.profiler import ProfilerActivity

from benchmarks import gpu
from benchmarks.shapes import Layer
from dwc_kernels import tune
from dwc_kernels.kernels import tiles
from dwc_kernels.kernels.launch import Plan

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
    tiles.tuned.cache_clear()
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
    settings = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    precision, benchmark = [s.fp32_precision for s in settings], torch.backends.cudnn.benchmark
    yield
    for setting, value in zip(settings, precision, strict=True):
        setting.fp32_precision = value
    torch.backends.cudnn.benchmark = benchmark
    tiles.tuned.cache_clear()


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
        best[tiles.tuned_key(before.problem)] = tune.asdict(other)
        tune.store(tiles.tuned_path(before.chip.name), json.loads(json.dumps(best)))
        tiles.tuned.cache_clear()
        assert Plan.of(kind, x, x.shape[2:], mu, (1, 1, 1), 1, None).tile == other
