"""Time many tiles of the kernels on the GPU at hand: ``python -m benchmarks.tile_times [--out DIR]``.

`kernels.tiles` chooses tiles by a model; this shows what its choices cost. For each layer, dtype and kernel it times
the tiles that the model ranks first, a sample of the others, and those of specialized warps, of which the model knows
nothing. It writes ``tiles.csv``: the tile, the median of CUDA-graph replays, and the model's time. Processes compile
ahead on all cores into Triton's cache; one process times.
"""

import argparse
import csv
import multiprocessing
import os
import random
import statistics
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import astuple, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwc_kernels.kernels.tiles import KINDS, Problem, Tile

__all__ = ["Row", "main"]

LAYERS = (
    *((96, 96, 3, dilation) for dilation in (1, 2, 4, 8)),
    *((1, 96, 3, 1), (96, 50, 1, 1), (21, 21, 3, 1), (64, 64, 3, 1), (256, 256, 3, 1)),
)
DTYPES = {"bf16": torch.bfloat16, "tf32": torch.float32, "fp16": torch.float16}
SAMPLES, SIZE = 10, (32, 32, 32)


@dataclass(frozen=True)
class Row:
    """One tile of one kernel."""

    device: str
    dtype: str
    kind: str
    channels: int
    filters: int
    kernel: int
    dilation: int
    box: str
    summed: int  # channels per product
    wide: int
    tail: int
    chunk: int
    warps: int
    stages: int
    specialized: bool
    median_ms: float
    model_ms: float | None


Layer = tuple[int, int, int, int]  # channels, filters, kernel, dilation


@cache
def tensors(layer: Layer, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """g, r, x, mu, sigma and a bias of a layer."""
    channels, filters, kernel, _ = layer
    torch.manual_seed(0)
    options: dict[str, Any] = dict(device="cuda", dtype=dtype)
    g, r = (torch.randn(SAMPLES, filters, *SIZE, **options) for _ in range(2))
    x = torch.randn(SAMPLES, channels, *SIZE, **options)
    mu = torch.randn(filters, channels, *(kernel,) * 3, **options) / (channels * kernel**3) ** 0.5
    last = (t.contiguous(memory_format=torch.channels_last_3d) for t in (g, r, x))
    return *last, mu, mu.abs() * 0.1, torch.rand(filters, **options)


def call_of(kind: str, layer: Layer, dtype: torch.dtype, tile: Tile) -> Callable[[], Any]:
    """One launch of a kernel with a tile, the packing of its weights included."""
    from dwc_kernels import kernels

    g, r, x, mu, sigma, bias = tensors(layer, dtype)
    one = (1, 1, 1)
    geometry = (one, (layer[2] // 2 * layer[3],) * 3, (layer[3],) * 3, 1)
    seed = torch.zeros((), dtype=torch.int64, device="cuda")
    return {
        "forward": lambda: kernels.forward(x, mu, sigma, bias, bias, *geometry, seed, tile=tile),
        "grad_input": lambda: kernels.grad_input(g, r, x, mu, sigma, *geometry, tile=tile),
        "grad_weight": lambda: kernels.grad_weight(g, r, x, sigma, *geometry, bias_sigma=bias, tile=tile),
    }[kind]


def problem_and_chip(kind: str, layer: Layer, dtype: torch.dtype) -> tuple[Problem, Any]:
    """What `tiles` is asked for this kernel of the layer."""
    from dwc_kernels.kernels.launch import asked

    x, mu = tensors(layer, dtype)[2:4]
    return asked(kind, x, SIZE, mu, (1, 1, 1), 1)


def tiles_of(kind: str, layer: Layer, dtype: torch.dtype, limit: int) -> list[Tile]:
    """Half of them the model's first choices, the others drawn from the rest; then those of specialized warps."""
    from dwc_kernels.kernels.specialized.variant import candidates
    from dwc_kernels.kernels.tiles import ranked

    problem, chip = problem_and_chip(kind, layer, dtype)
    found = ranked(problem, chip)
    first, rest = found[: limit // 2], found[limit // 2 :]
    drawn = random.Random(0).sample(rest, min(len(rest), limit - len(first)))
    return [*first, *drawn, *candidates(problem, chip)]


def set_precision() -> None:
    torch.backends.cudnn.conv.fp32_precision = "tf32"


def compile_ahead(job: tuple[str, Layer, str, Tile]) -> str:
    """Run a kernel once, so that it is in Triton's cache; what failed."""
    from triton.runtime.errors import OutOfResources

    set_precision()
    kind, layer, dtype, tile = job
    try:
        call_of(kind, layer, DTYPES[dtype], tile)()
        torch.cuda.synchronize()
    except OutOfResources as error:
        return str(error)
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tile_times", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/tiles"), help="folder for tiles.csv")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument(
        "--layers", type=int, default=len(LAYERS), help="so many of the layers, 96 -> 96 at four dilations first"
    )
    parser.add_argument("--tiles", type=int, default=24, help="timed per kernel, layer and dtype")
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.tile_times: no GPU here", file=sys.stderr)
        return 2
    from dwc_kernels.kernels.tiles import estimate
    from dwc_kernels.timing import device_times

    set_precision()
    options.out.mkdir(parents=True, exist_ok=True)
    jobs = [
        (kind, layer, dtype, tile)
        for dtype in options.dtype
        for layer in LAYERS[: options.layers]
        for kind in options.kind
        for tile in tiles_of(kind, layer, DTYPES[dtype], options.tiles)
    ]
    device, spawn = torch.cuda.get_device_name(), multiprocessing.get_context("spawn")
    with (
        ProcessPoolExecutor(max(1, (os.cpu_count() or 2) - 1), mp_context=spawn) as pool,
        (options.out / "tiles.csv").open("w", newline="") as file,
    ):
        writer = csv.writer(file)
        writer.writerow(f.name for f in fields(Row))
        for (kind, layer, dtype, tile), failed in zip(jobs, pool.map(compile_ahead, jobs), strict=True):
            if failed:
                print(f"{kind} {dtype} {layer} {tile}: {failed}", flush=True)
                continue
            problem, chip = problem_and_chip(kind, layer, DTYPES[dtype])
            measured = statistics.median(device_times(call_of(kind, layer, DTYPES[dtype], tile), options.repeats))
            model = 1e3 * estimate(problem, tile, chip)["total"] / chip.clock if not tile.specialized else None
            box, *rest = astuple(tile)
            row = Row(device, dtype, kind, *layer, "x".join(map(str, box)), *rest, measured, model)
            writer.writerow(astuple(row))
            print(*astuple(row)[1:], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
