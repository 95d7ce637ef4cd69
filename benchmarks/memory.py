"""Bytes of tensors that a layer and a training step keep and reach, counted exactly and without computing anything.

    python -m benchmarks.memory [--dtype bf16 fp32] [--samples 10]

Meta tensors stand in for real ones, so every allocation that PyTorch's operators make is counted and none is made. The
op's own operators allocate what their fake implementations say: y and r, which is what the Triton kernels allocate for
voxels (beside them packed weights, of the size of the weights, and in the weight gradient the partial sums). Workspaces
that libraries take within one operator, as cuDNN does, are in nobody's count.
"""

import argparse
import sys
import weakref
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.composition import composition
from benchmarks.shapes import LAYERS, SAMPLES, SIZE, Layer
from dwc_kernels import ffg_conv3d

__all__ = ["Count", "count_layer", "count_step", "main", "table"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
OPS = {"ours": ffg_conv3d, "composition": composition}


@dataclass(frozen=True)
class Count:
    """Bytes beyond inputs and parameters: alive after the forward, and the most alive at once."""

    kept: int
    peak: int


class Ledger(TorchDispatchMode):
    """Follows the storages that operators create, from birth to release."""

    def __init__(self):
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        return sum(self.alive.values())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, self.now)
        return out


def count(forward, inputs: list[torch.Tensor]) -> Count:
    """Run forward and backward of a function of the inputs on meta tensors."""
    with Ledger() as ledger:
        y = forward(*inputs)
        kept = ledger.now - y.untyped_storage().nbytes()
        torch.autograd.grad(y, [t for t in inputs if t.requires_grad], torch.empty_like(y))
    return Count(kept, ledger.peak)


def count_layer(layer: Layer, dtype: torch.dtype, op, samples: int = SAMPLES) -> Count:
    """One layer with its bias; kept leaves out the output, which the next layer owns."""
    with torch.device("meta"):
        kernel = (layer.kernel,) * 3
        x = torch.empty(samples, layer.channels, *SIZE, dtype=dtype).to(memory_format=torch.channels_last_3d)
        shapes = [(layer.filters, layer.channels, *kernel)] * 2 + [(layer.filters,)] * 2
        inputs = [x, *(torch.empty(shape, dtype=dtype) for shape in shapes)]
        inputs = [t.requires_grad_() for t in inputs]
        return count(lambda *t: op(*t, padding=layer.padding, dilation=layer.dilation), inputs)


def count_step(dtype: torch.dtype, op, samples: int = SAMPLES) -> Count:
    """Forward, ReLUs, cross-entropy and backward of the whole network."""
    with torch.device("meta"):
        x = torch.empty(samples, 1, *SIZE, dtype=dtype).to(memory_format=torch.channels_last_3d)
        labels = torch.empty(samples, *SIZE, dtype=torch.int64)
        weights = []
        for layer in LAYERS:
            shapes = [(layer.filters, layer.channels, *(layer.kernel,) * 3)] * 2 + [(layer.filters,)] * 2
            weights += [torch.empty(shape, dtype=dtype).requires_grad_() for shape in shapes]

        def loss(x, *weights):
            h = x
            for i, layer in enumerate(LAYERS):
                h = op(h, *weights[4 * i : 4 * i + 4], padding=layer.padding, dilation=layer.dilation)
                h = F.relu(h) if layer is not LAYERS[-1] else h
            return F.cross_entropy(h, labels)

        return count(loss, [x, *weights])


def table(dtypes: list[str], samples: int = SAMPLES) -> list[tuple[str, str, dict[str, Count]]]:
    """(dtype, row, {op: Count}) for every layer and for the whole step."""
    rows = []
    for name in dtypes:
        for layer in LAYERS:
            rows.append((name, layer.name, {n: count_layer(layer, DTYPES[name], op, samples) for n, op in OPS.items()}))
        rows.append((name, "training step", {n: count_step(DTYPES[name], op, samples) for n, op in OPS.items()}))
    return rows


def print_table(dtypes: list[str], samples: int = SAMPLES) -> None:
    """One line per layer: megabytes kept for the backward and at the peak of forward and backward."""
    print(
        f"Megabytes of tensors beyond input and parameters, batch {samples} x {'x'.join(map(str, SIZE))} "
        "(counted, exact)"
    )
    print(f"{'':22}{'kept for backward':>25}{'peak':>25}")
    print(f"{'dtype':6}{'layer':16}{'ours':>12}{'composition':>13}{'ours':>12}{'composition':>13}")
    for dtype, row, counts in table(dtypes, samples):
        numbers = [counts[n].kept for n in OPS] + [counts[n].peak for n in OPS]
        print(
            f"{dtype:6}{row:16}" + "".join(f"{n / 1e6:{w}.1f}" for n, w in zip(numbers, (12, 13, 12, 13), strict=True))
        )


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__.splitlines()[0])
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16", "fp32"])
    parser.add_argument("--samples", type=int, default=SAMPLES)
    options = parser.parse_args(arguments)
    print_table(options.dtype, options.samples)
    return 0


if __name__ == "__main__":
    sys.exit(main())
