"""A 96-channel layer on the CPU, forward and backward: the op against the plain composition, interleaved.

`make benchmark` prints, per input layout and dtype, the medians summed over dilations 1, 2, 4, 8 and their ratio, the
share of the noise in the op, and the ratio of bytes kept for the backward. The composition always computes in fp32.
Correctness is checked before anything is timed.
"""

import statistics
import time
from functools import partial

import pytest
import torch

from benchmarks.composition import composition, saved_bytes
from dwc_kernels import ffg_conv3d
from dwc_kernels.noise import normal

SHAPE = (2, 96, 32, 32, 32)
DILATIONS = (1, 2, 4, 8)
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}
ROUNDS = 3


@pytest.fixture(params=LAYOUTS)
def layout(request):
    return request.param


@pytest.fixture(params=DILATIONS)
def dilation(request):
    return request.param


@pytest.fixture
def layer(layout):
    """Input, parameters and output gradient of one layer, all requiring gradients."""
    generator = torch.Generator().manual_seed(0)
    channels = SHAPE[1]
    x, g = (torch.randn(SHAPE, generator=generator).to(memory_format=LAYOUTS[layout]) for _ in range(2))
    mu = torch.randn(channels, channels, 3, 3, 3, generator=generator) * 0.02
    sigma = torch.rand(mu.shape, generator=generator) * 1e-2
    return [t.requires_grad_() for t in (x, mu, sigma)], g


def step(op, tensors, g, autocast, **options):
    for t in tensors:
        t.grad = None
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = op(*tensors, **options)
    y.backward(g.to(y.dtype))
    return y.detach()


def check(layer, dilation, autocast):
    """On one sample, output and gradients agree with the fp64 composition's under the same noise."""
    (x, *parameters), g = layer
    tensors = [x.detach()[:1].requires_grad_(), *parameters]
    g = g[:1]
    eps = normal(g, 3)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = step(composition, doubles, g.double(), False, eps=eps.double(), padding=dilation, dilation=dilation)
    y = step(ffg_conv3d, tensors, g, autocast, seed=3, padding=dilation, dilation=dilation)
    for ours, theirs in ((y, exact), *((t.grad, e.grad) for t, e in zip(tensors, doubles, strict=True))):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        assert error < (2e-2 if autocast else 1e-5), f"relative error {error:.1e}"


@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "bf16"])
def test_forward_and_backward_against_composition(benchmark, layer, layout, dilation, autocast, results):
    check(layer, dilation, autocast)
    tensors, g = layer
    options = {"padding": dilation, "dilation": dilation}
    baseline, noise = [], []

    def run_the_others():
        for times, call in (
            (baseline, lambda: step(composition, tensors, g, False, **options)),
            (noise, lambda: normal(tensors[0], 3)),
        ):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)

    benchmark.pedantic(
        lambda: step(ffg_conv3d, tensors, g, autocast, **options),
        setup=run_the_others,
        rounds=ROUNDS,
        warmup_rounds=1,
    )
    assert len(baseline) == ROUNDS + 1  # one for each round and the warm-up, in turn with the op
    composition_s, noise_s = (statistics.median(times[1:]) for times in (baseline, noise))
    kept = [saved_bytes(partial(op, *tensors, **options), *tensors[1:]) for op in (ffg_conv3d, composition)]  # in fp32
    benchmark.extra_info |= {"composition_s": composition_s, "noise_s": noise_s, "saved_bytes": kept}
    dtype = "bf16" if autocast else "fp32"
    results.append((layout, dtype, dilation, benchmark.stats.stats.median, composition_s, noise_s, *kept))
