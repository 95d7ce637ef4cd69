"""The table of memory counts what is really kept, and the README states what it says."""

from pathlib import Path

import pytest
import torch

from benchmarks import memory
from benchmarks.composition import saved_bytes
from benchmarks.shapes import LAYERS, Layer

README = Path(__file__).parents[2] / "dwc_kernels" / "README.md"


@pytest.mark.parametrize("op", memory.OPS.values(), ids=memory.OPS)
def test_what_is_counted_on_fake_tensors_is_what_real_ones_keep(op, monkeypatch):
    monkeypatch.setattr(memory, "SIZE", (4, 5, 6))
    layer = Layer("small", 8, 5, 3, 2)
    x = torch.rand(2, 8, 4, 5, 6).to(memory_format=torch.channels_last_3d).requires_grad_()
    parameters = [torch.rand(5, 8, 3, 3, 3).requires_grad_() for _ in range(2)]
    parameters += [torch.rand(5).requires_grad_() for _ in range(2)]
    kept = saved_bytes(lambda: op(x, *parameters, padding=2, dilation=2), *parameters)
    counted = memory.count_layer(layer, torch.float32, op, samples=2).kept
    assert counted == kept - x.untyped_storage().nbytes()  # the input is the last layer's


def test_the_readme_states_what_is_counted():
    text = README.read_text()
    conv2 = {name: memory.count_layer(LAYERS[1], torch.bfloat16, op) for name, op in memory.OPS.items()}
    step = {name: memory.count_step(torch.bfloat16, op) for name, op in memory.OPS.items()}
    for row, counts in (("96 -> 96, 3x3x3", conv2), ("the whole network, one step", step)):
        numbers = [counts[op].kept for op in memory.OPS] + [counts[op].peak for op in memory.OPS]
        assert f"| {row} | " + " | ".join(f"{n / 1e6:.1f}" for n in numbers) + " |" in text
