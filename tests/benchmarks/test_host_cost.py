"""The benchmark of the host's cost runs the real launchers, plans a shape once, and copies nothing beside them."""

import re
from functools import partial

import pytest

pytest.importorskip("triton")

from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks import host_cost as benchmark
from dwc_kernels import ffg_conv3d
from dwc_kernels.kernels import launch


def test_the_launchers_plan_once_and_then_take_the_plan(monkeypatch):
    planned = []
    chosen = launch.tile_for
    monkeypatch.setattr(launch, "tile_for", lambda problem, chip: planned.append(problem.kind) or chosen(problem, chip))
    cost = benchmark.host_cost(16, 16, calls=3)
    assert sorted(planned) == ["forward", "grad_input", "grad_weight"]
    assert all(later > 0 for _, later in cost.values())


def test_a_step_is_timed_as_training_runs_it_without_copies_or_a_second_packing(monkeypatch):
    launched, copied = [], []
    monkeypatch.setattr(benchmark, "_launch_nothing", lambda _, kernel, *__, **___: launched.append(kernel.fn.__name__))

    class Copies(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if not func.is_view and "empty" not in func.name():
                copied.append(func.name())
            return out

    timed = benchmark._timed

    def counted(call, microseconds):
        with Copies():
            return timed(call, microseconds)

    monkeypatch.setattr(benchmark, "_timed", counted)
    benchmark.host_cost(96, 96, calls=2)
    step = ["pack_kernel", "forward_kernel", "grad_input_kernel", "grad_weight_kernel", "sum_kernel"]
    assert launched == 2 * step
    assert copied == []


def test_the_command_prints_op_launchers_their_parts_and_the_composition(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "SHAPES", ((16, 16), (1, 8)))
    benchmark.main(["--calls", "3"])
    printed = capsys.readouterr().out
    rows = dict(re.findall(r"^\| ([\w:, ]+) \| ([\d |]+) \|$", printed, re.M))
    assert list(rows) == ["op, forward", "launcher, first", "launcher", "of it: plan", "of it: packed weights",
                          "op, backward", "launchers, first", "launchers"]  # fmt: skip
    assert all(int(n) > 0 for row in rows.values() for n in row.split(" | "))
    assert re.search(r"The composition: [1-9]\d* us forward, [1-9]\d* us backward\.", printed)


def test_the_op_and_its_backward_launch_what_the_launchers_do(monkeypatch):
    launched = []
    monkeypatch.setattr(benchmark, "_launch_nothing", lambda _, kernel, *__, **___: launched.append(kernel.fn.__name__))
    benchmark.op_cost(partial(ffg_conv3d, backend="triton"), 16, 16, (4, 4, 8), calls=2)
    step = ["pack_kernel", "forward_kernel", "grad_input_kernel", "grad_weight_kernel", "sum_kernel"]
    assert launched == 2 * step
