"""The benchmark of the host's cost runs the real launchers, which plan a shape once."""

import pytest

pytest.importorskip("triton")

from benchmarks.host_cost import host_cost
from dwc_kernels.kernels import launch


def test_the_launchers_plan_once_and_then_take_the_plan(monkeypatch):
    planned = []
    chosen = launch.tile_for
    monkeypatch.setattr(launch, "tile_for", lambda problem, chip: planned.append(problem.kind) or chosen(problem, chip))
    cost = host_cost(16, 16, calls=3)
    assert sorted(planned) == ["forward", "grad_input", "grad_weight"]
    assert all(later > 0 for _, later in cost.values())
