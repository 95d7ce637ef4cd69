"""The op against the plain composition on the CPU for the layers deep in a U-Net: `python -m benchmarks.small_volumes`.

Forward and backward, in turn, the least CPU seconds of each, and of PyTorch's six convolutions alone, which both need;
``time`` is the median of the ratios of neighbouring runs, which changes little on a busy machine. With several threads
CPU seconds count their waiting too, so one thread is the default. Correctness is checked before anything is timed.
"""

import argparse
import time
from collections.abc import Callable
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.composition import composition, saved_bytes
from dwc_kernels import ffg_conv3d
from dwc_kernels.noise import normal

__all__ = ["CASES", "compare", "main"]

CASES = (  # channels, filters, voxels along an axis, stride
    (512, 512, 2, 1),
    (256, 256, 2, 1),
    (256, 512, 4, 2),
    (320, 320, 4, 1),
    (128, 128, 8, 1),
    (64, 128, 16, 2),
    (32, 32, 16, 1),
    (16, 16, 8, 1),
    (1, 1, 1, 1),
)


def convolutions(x: Tensor, weight_mu: Tensor, weight_sigma: Tensor, **geometry: Any) -> Tensor:
    """Those of the composition, two forward and four backward, without squares, root and noise."""
    return F.conv3d(x, weight_mu, **geometry) + F.conv3d(x, weight_sigma, **geometry)


def compare(case: tuple[int, int, int, int], batch: int, seconds: float) -> dict[str, float]:
    """Milliseconds and kilobytes kept of both, the median ratio of the times, and milliseconds of the convolutions."""
    channels, filters, size, stride = case
    generator = torch.Generator().manual_seed(0)
    weight = (filters, channels, 3, 3, 3)
    tensors = [
        torch.randn(batch, channels, size, size, size, generator=generator),
        torch.randn(weight, generator=generator) / (27 * channels) ** 0.5,
        torch.rand(weight, generator=generator) * 1e-2,
    ]
    tensors = [t.requires_grad_() for t in tensors]
    g = torch.ones_like(composition(*tensors, stride=stride, padding=1))

    def step(op: Callable[..., Tensor], **options: object) -> list[Tensor]:
        y = op(*tensors, stride=stride, padding=1, **options)
        return [y, *torch.autograd.grad(y, tensors, g)]

    for ours, theirs in zip(step(ffg_conv3d, seed=3), step(composition, eps=normal(g, 3)), strict=True):
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if error > 1e-5:
            raise AssertionError(f"{case}: relative error {error:.1e}")
    ops: tuple[Callable[..., Tensor], ...] = (composition, ffg_conv3d, convolutions)
    times: dict[Callable[..., Tensor], list[float]] = {op: [] for op in ops}
    start = time.process_time()
    while len(times[composition]) < 5 or time.process_time() - start < seconds:
        for op, spent in times.items():
            before = time.process_time()
            step(op)
            spent.append(time.process_time() - before)
    theirs_s, ours_s, convolutions_s = (min(spent[1:]) for spent in times.values())
    ratios = [ours / theirs for theirs, ours in zip(times[composition][1:], times[ffg_conv3d][1:], strict=True)]
    kept = [saved_bytes(partial(op, *tensors, stride=stride, padding=1), *tensors) for op in ops[:2]]
    return {
        "convolutions_ms": 1e3 * convolutions_s,
        "composition_ms": 1e3 * theirs_s,
        "op_ms": 1e3 * ours_s,
        "time": median(ratios),
        "composition_KB": kept[0] / 1024,
        "op_KB": kept[1] / 1024,
    }


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=2.0, help="CPU seconds for each layer")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = {
        f"{c} -> {f}, {s}^3, stride {t}": compare((c, f, s, t), arguments.batch, arguments.seconds)
        for c, f, s, t in CASES
    }
    print(pd.DataFrame.from_dict(rows, orient="index").to_string(float_format="%.2f"))


if __name__ == "__main__":
    main()
