"""What the host does for one call of the kernels: microseconds of the launchers' Python, without a GPU.

    python -m benchmarks.host_cost [--calls 2000]

The launchers run as for an H100, up to Triton's own launch, which is left out because it costs any kernel the same.
"first" is the first call of a shape, which plans its tiles; "later" is the median of the calls after it. Each backward
follows its own forward, as in training. The tensors are small, in the kernels' layout and in the CPU's memory, so
allocation is not the GPU's; a layer with few channels also copies its folded input here. On a GPU,
`python -m benchmarks.gpu` has the host's whole time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from dwc_kernels import kernels
from dwc_kernels.kernels import launch
from dwc_kernels.kernels.chips import CHIPS

__all__ = ["host_cost", "main"]

SHAPES = ((1, 96), (16, 16), (96, 96))  # channels, filters
SIZE = (8, 8, 8)  # voxels


def host_cost(channels: int, filters: int, calls: int) -> dict[str, tuple[float, float]]:
    """Microseconds of the first call and median of the later ones, for forward and backward of a 3x3x3 layer."""
    x, g = (torch.zeros(1, n, *SIZE).to(memory_format=torch.channels_last_3d) for n in (channels, filters))
    weight, bias = torch.zeros(filters, channels, 3, 3, 3), torch.zeros(filters)
    geometry = ((1, 1, 1), (1, 1, 1), (1, 1, 1), 1)
    seed = torch.tensor(0)

    def forward() -> Tensor:
        return kernels.forward(x, weight, weight, bias, bias, *geometry, seed)[1]

    def backward(r: Tensor) -> None:
        kernels.grad_input(g, r, x, weight, weight, *geometry)
        kernels.grad_weight(g, r, x, weight, *geometry, bias_sigma=bias)

    spent: dict[str, list[float]] = {"forward": [], "backward": []}
    with ExitStack() as stack:
        # Functions rather than mocks, which would take longer to call than what is timed.
        here = {
            "chip_of": lambda _: CHIPS["sm_90"],
            "operand_dtype": lambda *_: "tf32",
            "why_not_triton": lambda *_: None,
        }
        for name, function in here.items():
            stack.enter_context(mock.patch.object(launch, name, function))
        for name in ("launch", "grad_weight", "noise", "weights"):
            stack.enter_context(
                mock.patch.object(sys.modules[f"dwc_kernels.kernels.{name}"], "run_on", _launch_nothing)
            )
        launch.forget_plans()
        for _ in range(calls):
            r = _timed(forward, spent["forward"])
            _timed(partial(backward, r), spent["backward"])
    return {name: (times[0], statistics.median(times[1:])) for name, times in spent.items()}


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
    values = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print("| channels -> filters | forward, first | later | backward, first | later |", "| --- " * 5 + "|", sep="\n")
    for channels, filters in SHAPES:
        cost = host_cost(channels, filters, values.calls)
        cells = [f"{microseconds:.0f} us" for call in ("forward", "backward") for microseconds in cost[call]]
        print(f"| {channels} -> {filters} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
