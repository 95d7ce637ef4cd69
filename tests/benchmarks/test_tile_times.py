"""The model of tiles against the times that a GPU gave."""

import pytest

from benchmarks.tile_times import LAYERS
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.tiles import KINDS, choose, problem_of
from tests.dwc_kernels.h200 import mostly_sums, timed

TIMED = timed()


@pytest.mark.parametrize("problem", TIMED, ids=lambda p: f"{p.kind} {p.dtype} {p.channels}->{p.columns}")
def test_the_model_chooses_a_tile_that_was_among_the_fastest_on_the_gpu(problem):
    times = TIMED[problem]
    chosen = choose(problem, CHIPS["sm_90"])
    assert times[chosen] <= (1.5 if mostly_sums(problem) else 1.065) * min(times.values())


def test_every_layer_and_kernel_was_timed():
    layers = {(channels, filters, kernel) for channels, filters, kernel, _ in LAYERS}
    wanted = {problem_of(kind, "bf16", 10, (32,) * 3, c, f, (k,) * 3) for kind in KINDS for c, f, k in layers}
    assert wanted <= set(TIMED)
