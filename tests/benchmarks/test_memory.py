"""The table of memory counts what is really kept, and the README states what it says."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import memory
from benchmarks.composition import saved_bytes
from benchmarks.shapes import LAYERS, Layer
from dwc_kernels.kernels import weights

README = Path(__file__).parents[2] / "dwc_kernels" / "README.md"


@pytest.mark.parametrize("op", memory.OPS.values(), ids=memory.OPS)
def test_what_is_counted_on_fake_tensors_is_what_real_ones_keep(op, monkeypatch):
    monkeypatch.setattr(memory, "SIZE", (4, 5, 6))
    layer = Layer("small", 8, 5, 3, 2)
    x = torch.rand(2, 8, 4, 5, 6).to(memory_format=torch.channels_last_3d).requires_grad_()
    parameters = [torch.rand(5, 8, 3, 3, 3).requires_grad_() for _ in range(2)]
    parameters += [torch.rand(5).requires_grad_() for _ in range(2)]
    adjoints = {}  # packed by a forward for its backward

    def forward():
        before = set(weights._waiting)
        y = op(x, *parameters, padding=2, dilation=2)
        adjoints.update((r, pair) for r, (_, pair) in weights._waiting.items() if r not in before)
        return y

    kept = saved_bytes(forward, *parameters)
    kept += sum(t.untyped_storage().nbytes() for pair in adjoints.values() for t in pair)
    counted = memory.count_layer(layer, torch.float32, op, samples=2).kept
    assert counted == kept - x.untyped_storage().nbytes()  # the input is the last layer's


def test_the_count_sees_what_a_launcher_allocates(monkeypatch):
    layer = LAYERS[1]
    before = memory.count_layer(layer, torch.bfloat16, memory.OPS["ours"]).peak
    module = sys.modules[memory.grad_weight.__module__]
    kernel = module.voxels_last
    monkeypatch.setattr(module, "voxels_last", lambda t: kernel(t.float().to(t.dtype)))
    assert memory.count_layer(layer, torch.bfloat16, memory.OPS["ours"]).peak > before + 100e6


def test_bias_gradients_of_frozen_weights_take_no_memory_of_the_output_s_size():
    with torch.device("meta"):
        x = torch.empty(2, 96, 32, 32, 32, dtype=torch.bfloat16).to(memory_format=torch.channels_last_3d)
        weight, bias = (torch.empty(s, dtype=torch.bfloat16) for s in ((96, 96, 3, 3, 3), (96,)))
        inputs = [x, weight, weight.clone(), *(bias.clone().requires_grad_() for _ in range(2))]
        counted = memory.count(lambda *t: memory.OPS["ours"](*t, padding=1), inputs)
    size = x.numel() * x.element_size()
    assert counted.peak < 3.2 * size  # y, its gradient and r


def test_the_peak_of_a_wide_layer_is_below_the_composition_s():
    ours, composed = (memory.count_layer(LAYERS[1], torch.bfloat16, op).peak for op in memory.OPS.values())
    assert ours < 0.65 * composed


def test_the_readme_states_what_is_counted():
    text = README.read_text()
    conv2 = {name: memory.count_layer(LAYERS[1], torch.bfloat16, op) for name, op in memory.OPS.items()}
    step = {name: memory.count_step(torch.bfloat16, op) for name, op in memory.OPS.items()}
    for row, counts in (("96 -> 96, 3x3x3", conv2), ("the whole network, one step", step)):
        numbers = [counts[op].kept for op in memory.OPS] + [counts[op].peak for op in memory.OPS]
        assert f"| {row} | " + " | ".join(f"{n / 1e6:.1f}" for n in numbers) + " |" in text
