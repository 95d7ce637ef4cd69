"""What the host does for one call of the kernels: microseconds of Python per call, without a GPU.

    python -m benchmarks.host_cost [--calls 2000]

The launchers run as for an H100, up to Triton's own launch, which is left out because it costs any kernel the same.
"first" is the first call of a shape, which plans its tiles; "later" is the median of the calls after it. The tensors
are in the CPU's memory, so allocation is not the GPU's. On a GPU, `python -m benchmarks.gpu` has the host's whole time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from unittest import mock

import torch
from torch import Tensor

from dwc_kernels import kernels
from dwc_kernels.kernels import launch
from dwc_kernels.kernels.chips import CHIPS

__all__ = ["host_cost", "main"]

SHAPES = ((1, 96), (16, 16), (96, 96))  # channels, filters


def host_cost(channels: int, filters: int, calls: int) -> dict[str, tuple[float, float]]:
    """Microseconds of the first call and median of the later ones, for forward and backward of 3x3x3 at 8^3 voxels."""
    x = torch.zeros(1, channels, 8, 8, 8).to(memory_format=torch.channels_last_3d)
    weight, bias = torch.zeros(filters, channels, 3, 3, 3), torch.zeros(filters)
    geometry = ((1, 1, 1), (1, 1, 1), (1, 1, 1), 1)
    seed = torch.tensor(0)
    y, r = x.new_zeros(1, filters, 8, 8, 8), x.new_zeros(1, filters, 8, 8, 8)

    def forward() -> tuple[Tensor, Tensor]:
        return kernels.forward(x, weight, weight, bias, bias, *geometry, seed)

    def backward() -> None:
        kernels.grad_input(y, r, x, weight, weight, *geometry)
        kernels.grad_weight(y, r, x, weight, *geometry, bias_sigma=bias)

    with ExitStack() as stack:
        for name, value in {"chip_of": CHIPS["sm_90"], "operand_dtype": "tf32", "why_not_triton": None}.items():
            stack.enter_context(mock.patch.object(launch, name, return_value=value))
        for name in ("launch", "grad_weight", "noise", "weights"):
            stack.enter_context(mock.patch.object(sys.modules[f"dwc_kernels.kernels.{name}"], "run_on"))
        launch.forget_plans()
        return {call.__name__: _timed(call, calls) for call in (forward, backward)}


def _timed(call: Callable[[], object], calls: int) -> tuple[float, float]:
    microseconds = []
    for _ in range(calls):
        began = time.perf_counter()
        call()
        microseconds.append(1e6 * (time.perf_counter() - began))
    return microseconds[0], statistics.median(microseconds[1:])


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
