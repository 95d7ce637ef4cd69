"""Bytes of tensors that a layer and a training step keep and reach, counted without computing anything.

    python -m benchmarks.memory [--dtype bf16 fp32] [--samples 10]

Meta tensors stand in for real ones, so every allocation of PyTorch's operators is counted and none is made. For the
op's own operators the real Triton launchers run, as on an H100, up to the launch of each kernel: packed weights,
partial sums and copies into another layout are counted with y and r. Workspaces that a library takes within one
operator, as cuDNN does, are in nobody's count.
"""

import argparse
import contextlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.composition import composition
from benchmarks.shapes import LAYERS, SAMPLES, SIZE, Layer
from dwc_kernels import ffg_conv3d, kernels
from dwc_kernels.kernels import grad_weight, launch, weights
from dwc_kernels.kernels.chips import CHIPS

__all__ = ["Count", "count_layer", "count_step", "main", "table"]

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def ours(*tensors: Any, **geometry: Any) -> Tensor:
    """The op as a GPU runs it."""
    with mock.patch("dwc_kernels.functional.choose_backend", return_value="triton"):
        return ffg_conv3d(*tensors, **geometry)


OPS: dict[str, Callable[..., Tensor]] = {"ours": ours, "composition": composition}


@dataclass(frozen=True)
class Count:
    """Bytes beyond inputs and parameters: alive after the forward, and the most alive at once."""

    kept: int
    peak: int


def nothing(*_: Any, **__: Any) -> None:
    """In place of a launch; a mock would keep the tensors of its calls."""


@contextlib.contextmanager
def launchers_alone(arch: str = "sm_90") -> Iterator[None]:
    """Let the launchers plan for a chip and allocate, but launch nothing."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(launch, "why_not_triton", return_value=None))
        stack.enter_context(mock.patch.object(launch, "chip_of", return_value=CHIPS[arch]))
        for module in (launch, weights, sys.modules[grad_weight.__module__]):
            stack.enter_context(mock.patch.object(module, "run_on", nothing))
        yield


def launched(name: str, arguments: dict[str, Any]) -> Any:
    """What the Triton launcher behind one of the op's operators returns, on meta tensors."""
    launcher = getattr(kernels, name.removeprefix("dwc::ffg_conv3d").removeprefix("_") or "forward")
    known = inspect.signature(launcher).parameters
    with launchers_alone():
        return launcher(**{key: value for key, value in arguments.items() if key in known})


class Ledger(TorchDispatchMode):
    """Follows the storages that operators create, from birth to release."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    @property
    def now(self) -> int:
        return sum(self.alive.values())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "dwc":
            with self:
                return launched(func.name(), named(func, args))
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in known and storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, self.now)
        return out


def named(func: Any, args: tuple[Any, ...]) -> dict[str, Any]:
    """The arguments of an operator by their names, with its defaults."""
    schema = func._schema.arguments
    values = *args, *(a.default_value for a in schema[len(args) :])
    return {a.name: tuple(v) if isinstance(v, list) else v for a, v in zip(schema, values, strict=True)}


def count(forward: Callable[..., Tensor], inputs: list[Tensor]) -> Count:
    """Run forward and backward of a function of the inputs on meta tensors."""
    with Ledger() as ledger:
        y = forward(*inputs)
        kept = ledger.now - y.untyped_storage().nbytes()
        torch.autograd.grad(y, [t for t in inputs if t.requires_grad], torch.empty_like(y))
    return Count(kept, ledger.peak)


def count_layer(layer: Layer, dtype: torch.dtype, op: Callable[..., Tensor], samples: int = SAMPLES) -> Count:
    """One layer with its bias; kept leaves out the output, which the next layer owns."""
    with torch.device("meta"):
        kernel = (layer.kernel,) * 3
        x = torch.empty(samples, layer.channels, *SIZE, dtype=dtype).to(memory_format=torch.channels_last_3d)
        shapes = [(layer.filters, layer.channels, *kernel)] * 2 + [(layer.filters,)] * 2
        inputs = [x, *(torch.empty(shape, dtype=dtype) for shape in shapes)]
        inputs = [t.requires_grad_() for t in inputs]
        return count(lambda *t: op(*t, padding=layer.padding, dilation=layer.dilation), inputs)


def count_step(dtype: torch.dtype, op: Callable[..., Tensor], samples: int = SAMPLES) -> Count:
    """Forward, ReLUs, cross-entropy and backward of the whole network."""
    with torch.device("meta"):
        x = torch.empty(samples, 1, *SIZE, dtype=dtype).to(memory_format=torch.channels_last_3d)
        labels = torch.empty(samples, *SIZE, dtype=torch.int64)
        weights = []
        for layer in LAYERS:
            shapes = [(layer.filters, layer.channels, *(layer.kernel,) * 3)] * 2 + [(layer.filters,)] * 2
            weights += [torch.empty(shape, dtype=dtype).requires_grad_() for shape in shapes]

        def loss(x: Tensor, *weights: Tensor) -> Tensor:
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
    print(f"Megabytes of tensors beyond input and parameters, batch {samples} x {'x'.join(map(str, SIZE))} (counted)")
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
