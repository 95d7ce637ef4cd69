"""What the host does for one call of the op: microseconds of a CPU, without a GPU.

    python -m benchmarks.host_cost [--calls 2000]

Everything runs as for an H100 up to Triton's own launch, which is left out because it costs any kernel the same. The
launchers are timed alone, each backward after its own forward as in training; the op adds the checks of arguments, the
seed and autograd. "first" is the first call of a shape, which plans its tiles, all else the median of later
calls. The composition is the same layer of PyTorch's own operators, as the CPU's: with one channel and one voxel, they
compute next to nothing.

The tensors are small, in the kernels' layout and in the CPU's memory, so allocation is not the GPU's; a layer with few
channels also copies its folded input here. On a GPU, `python -m benchmarks.gpu` has the host's whole time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from benchmarks.composition import composition
from dwc_kernels import backends, ffg_conv3d, kernels
from dwc_kernels.kernels import launch
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.weights import pack

__all__ = ["host_cost", "main", "op_cost", "part_cost"]

SHAPES = ((1, 96), (16, 16), (96, 96))  # channels, filters
SIZE = (8, 8, 8)  # voxels
GEOMETRY = ((1, 1, 1), (1, 1, 1), (1, 1, 1), 1)


def host_cost(channels: int, filters: int, calls: int) -> dict[str, tuple[float, float]]:
    """Microseconds of the launchers, first call and median of the later ones, for both passes of a 3x3x3 layer."""
    x, g, weight, bias = _tensors(channels, filters, SIZE)
    seed = torch.tensor(0)

    def forward() -> Tensor:
        return kernels.forward(x, weight, weight, bias, bias, *GEOMETRY, seed)[1]

    def backward(r: Tensor) -> None:
        kernels.grad_input(g, r, x, weight, weight, *GEOMETRY)
        kernels.grad_weight(g, r, x, weight, *GEOMETRY, bias_sigma=bias)

    spent: dict[str, list[float]] = {"forward": [], "backward": []}
    with _as_on_a_gpu():
        launch.forget_plans()
        for _ in range(calls):
            r = _timed(forward, spent["forward"])
            _timed(partial(backward, r), spent["backward"])
    return {name: (times[0], statistics.median(times[1:])) for name, times in spent.items()}


def part_cost(channels: int, filters: int, calls: int) -> dict[str, float]:
    """Median microseconds of what a forward's launcher does first: find its plan, pack its weights."""
    x, _, weight, _ = _tensors(channels, filters, SIZE)
    plan = partial(launch.Plan.of, "forward", x, SIZE, weight, (1, 1, 1), 1, None)
    spent: dict[str, list[float]] = {"plan": [], "weights": []}
    with _as_on_a_gpu():
        precision, folded = plan().precision, plan().problem.folded
        for _ in range(calls):
            _timed(plan, spent["plan"])
            _timed(
                lambda: pack(weight, weight, {"folded" if folded else "forward", "adjoint"}, precision),
                spent["weights"],
            )
    return {name: statistics.median(times) for name, times in spent.items()}


def op_cost(
    function: Callable[..., Tensor], channels: int, filters: int, size: tuple[int, int, int], calls: int
) -> dict[str, float]:
    """Median microseconds of a function's forward and backward, with all that autograd does for them."""
    x, g, weight, bias = _tensors(channels, filters, size)
    inputs = [t.clone().requires_grad_() for t in (x, weight, weight, bias, bias)]
    spent: dict[str, list[float]] = {"forward": [], "backward": []}
    with _as_on_a_gpu():
        for _ in range(calls):
            y = _timed(lambda: function(*inputs, padding=1), spent["forward"])
            _timed(partial(torch.autograd.grad, y, inputs, g), spent["backward"])
    return {name: statistics.median(times) for name, times in spent.items()}


def _tensors(channels: int, filters: int, size: tuple[int, int, int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x, g, a weight and a bias of a 3x3x3 layer."""
    x, g = (torch.zeros(1, n, *size).to(memory_format=torch.channels_last_3d) for n in (channels, filters))
    return x, g, torch.zeros(filters, channels, 3, 3, 3), torch.zeros(filters)


@contextmanager
def _as_on_a_gpu() -> Iterator[None]:
    """Let tensors of the CPU pass for an H100's, and launch nothing."""
    modules = [sys.modules[f"dwc_kernels.kernels.{name}"] for name in ("launch", "grad_weight", "noise", "weights")]
    # Functions rather than mocks, which would take longer to call than what is timed.
    replaced: list[tuple[Any, str, Callable[..., Any]]] = [
        (backends, "_why_not_here", lambda *_: None),
        (launch, "chip_of", lambda _: CHIPS["sm_90"]),
        *((module, "run_on", _launch_nothing) for module in modules),
    ]
    with ExitStack() as stack:
        for module, name, function in replaced:
            stack.enter_context(mock.patch.object(module, name, function))
        yield


def _launch_nothing(device: torch.device, kernel: object, programs: int, *arguments: Any, **options: Any) -> None:
    """In place of `launch.run_on`."""


def _timed(call: Callable[[], Any], microseconds: list[float]) -> Any:
    began = time.thread_time()
    result = call()
    microseconds.append(1e6 * (time.thread_time() - began))
    return result


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=2000)
    calls = parser.parse_args(arguments).calls
    torch.set_num_threads(1)
    rows: dict[str, list[float]] = {}
    for shape in SHAPES:
        launchers, ours = host_cost(*shape, calls), op_cost(partial(ffg_conv3d, backend="triton"), *shape, SIZE, calls)
        parts = part_cost(*shape, calls)
        cost = {
            "op, forward": ours["forward"],
            "launcher, first": launchers["forward"][0],
            "launcher": launchers["forward"][1],
            "of it: plan": parts["plan"],
            "of it: packed weights": parts["weights"],
            "op, backward": ours["backward"],
            "launchers, first": launchers["backward"][0],
            "launchers": launchers["backward"][1],
        }
        for name, microseconds in cost.items():
            rows.setdefault(name, []).append(microseconds)
    print("| us | " + " | ".join(f"{channels} -> {filters}" for channels, filters in SHAPES) + " |")
    print("| --- " * (1 + len(SHAPES)) + "|")
    for name, values in rows.items():
        print(f"| {name} | " + " | ".join(f"{microseconds:.0f}" for microseconds in values) + " |")
    composed = op_cost(composition, 1, 1, (1, 1, 1), calls)
    print(f"\nThe composition: {composed['forward']:.0f} us forward, {composed['backward']:.0f} us backward.")


if __name__ == "__main__":
    main()
