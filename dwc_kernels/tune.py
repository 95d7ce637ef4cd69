"""Measure tiles on the GPU at hand and keep the best: ``python -m dwc_kernels.tune``.

For each layer it times the tiles that the model (``kernels.tiles``) ranks first and stores the fastest in a JSON file
named after the device in the user's cache folder, which the launchers read from then on. Nothing is tuned behind
anyone's back.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["main", "store", "time_calls", "tune_layer"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def store(path: Path, tiles: dict[str, dict]) -> None:
    """Add tiles to the file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    known = json.loads(path.read_text()) if path.exists() else {}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known | tiles, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def time_calls(call, repeats: int, warmup: int = 5) -> list[float]:
    """Milliseconds of each call, by the GPU's own events."""
    for _ in range(warmup):
        call()
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return times


def tune_layer(x: Tensor, mu: Tensor, sigma: Tensor, *, n_tiles: int, repeats: int) -> dict[str, dict]:
    """Time the best-ranked tiles of the three kernels for one layer; the fastest of each, by `tiles.tuned_key`."""
    from triton.runtime.errors import OutOfResources

    from dwc_kernels import kernels
    from dwc_kernels.kernels.launch import Plan
    from dwc_kernels.kernels.tiles import candidates, estimate, tuned_key

    one, size = (1, 1, 1), x.shape[2:]
    geometry = (one, tuple(k // 2 for k in mu.shape[2:]), one, 1)
    seed = torch.zeros((), dtype=torch.int64, device=x.device)
    y, r = kernels.forward(x, mu, sigma, None, None, *geometry, seed)
    calls = {
        "forward": lambda tile: kernels.forward(x, mu, sigma, None, None, *geometry, seed, tile=tile),
        "grad_input": lambda tile: kernels.grad_input(y, r, x, mu, sigma, *geometry, tile=tile),
        "grad_weight": lambda tile: kernels.grad_weight(y, r, x, sigma, *geometry, tile=tile),
    }
    best = {}
    for kind, call in calls.items():
        plan = Plan.of(kind, x, size, mu, one, 1, None)
        by_estimate = sorted(
            candidates(plan.problem, plan.chip), key=lambda t, p=plan: estimate(p.problem, t, p.chip)["total"]
        )
        times = {}
        for tile in by_estimate[:n_tiles]:
            try:
                times[tile] = statistics.median(time_calls(lambda c=call, t=tile: c(t), repeats))
            except OutOfResources as error:
                print(f"{tile} does not fit: {error}", flush=True)
        tile = min(times, key=times.get)
        theirs = f"{times[by_estimate[0]]:.3f} ms" if by_estimate[0] in times else "does not fit"
        print(f"{tuned_key(plan.problem)}: {times[tile]:.3f} ms with {tile} (the model's choice: {theirs})", flush=True)
        best[tuned_key(plan.problem)] = asdict(tile)
    return best


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m dwc_kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=96, help="channels of the hidden layers")
    parser.add_argument("--classes", type=int, default=50)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--size", type=int, default=32, help="voxels along an edge")
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=["bf16"])
    parser.add_argument("--tiles", type=int, default=8, help="candidates timed per kernel")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("dwc_kernels.tune: no GPU here; the launchers use the model's tiles", file=sys.stderr)
        return 2
    from dwc_kernels.kernels.launch import chip_of
    from dwc_kernels.kernels.tiles import tuned, tuned_path

    device = torch.device("cuda", torch.cuda.current_device())
    path = tuned_path(chip_of(device).name)
    layers = ((1, options.width, 3), (options.width, options.width, 3), (options.width, options.classes, 1))
    for dtype in options.dtype:
        for channels, filters, k in layers:
            shape = (options.samples, channels, *(options.size,) * 3)
            x = torch.randn(shape, device=device, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last_3d)
            mu = torch.randn(filters, channels, k, k, k, device=device, dtype=DTYPES[dtype]) / (channels * k**3) ** 0.5
            best = tune_layer(x, mu, mu.abs() * 0.1, n_tiles=options.tiles, repeats=options.repeats)
            store(path, best)
    tuned.cache_clear()
    print(f"stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
