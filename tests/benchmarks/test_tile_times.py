"""The model of tiles against the times that a GPU gave."""

import csv
from pathlib import Path

import pytest

from benchmarks.tile_times import LAYERS
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.tiles import KINDS, Problem, Tile, choose, problem_of

H200 = Path(__file__).parents[2] / "docs" / "results" / "kernels" / "h200"
# As the kernels are now: the forward awaits no products within a step, and a step has one block of channels.
FILES = {"forward": ("tiles_unsettled", "tiles_unsettled_96"), "grad_input": ("tiles",), "grad_weight": ("tiles",)}


def timed() -> dict[Problem, dict[Tile, float]]:
    """Milliseconds of tiles by problem; the fastest where a tile was timed twice."""
    found: dict[Problem, dict[Tile, float]] = {}
    for kind, names in FILES.items():
        rows = [row for name in names for row in csv.DictReader((H200 / f"{name}.csv").open())]
        for row in rows:
            if row["kind"] != kind or row["unroll"] != "1":
                continue
            channels, filters, kernel = (int(row[name]) for name in ("channels", "filters", "kernel"))
            problem = problem_of(kind, row["dtype"], 10, (32,) * 3, channels, filters, (kernel,) * 3)
            box = tuple(map(int, row["box"].split("x")))
            tile = Tile(box, *(int(row[name]) for name in ("summed", "wide", "tail", "chunk", "warps", "stages")))
            times = found.setdefault(problem, {})
            times[tile] = min(float(row["median_ms"]), times.get(tile, float("inf")))
    return found


TIMED = timed()


@pytest.mark.parametrize("problem", TIMED, ids=lambda p: f"{p.kind} {p.dtype} {p.channels}->{p.columns}")
def test_the_model_chooses_a_tile_that_was_among_the_fastest_on_the_gpu(problem):
    times = TIMED[problem]
    chosen = choose(problem, CHIPS["sm_90"])
    # The sums of a layer of few weights were most of its weight gradient's time, and are not made like that any more.
    limit = 1.5 if problem.folded and problem.kind == "grad_weight" else 1.1
    assert times[chosen] <= limit * min(times.values())


def test_every_layer_and_kernel_was_timed():
    layers = {(channels, filters, kernel) for channels, filters, kernel, _ in LAYERS}
    wanted = {problem_of(kind, "bf16", 10, (32,) * 3, c, f, (k,) * 3) for kind in KINDS for c, f, k in layers}
    assert wanted <= set(TIMED)
