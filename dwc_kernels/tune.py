"""Measure tiles on the GPU at hand and keep the best: `python -m dwc_kernels.tune`.

For each layer it checks and times the tiles that the model (`kernels.tiles`) ranks first, the one in the package, and
those of specialized warps where they can run, at dilations 1, 2, 4 and 8, for which there is one tile. It stores the
fastest in a JSON file named after the device in the user's cache folder, which the launchers read from then on. A tile
whose result is wrong on this GPU is not taken. Nothing is tuned unless this command is called.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dwc_kernels import reference
from dwc_kernels.timing import device_times, host_time

__all__ = ["main", "store", "tune_layer"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
DILATIONS = (1, 2, 4, 8)
Results = tuple[Tensor, ...]


def store(path: Path, tiles: dict[str, dict[str, Any]]) -> None:
    """Add tiles to the file, or replace one that is broken; it appears whole or not at all."""
    from dwc_kernels.kernels.tuned import stored_tiles

    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        known = {key: asdict(tile) for key, tile in stored_tiles(path).items()}
    except ValueError as error:
        print(f"replaced: {error}", file=sys.stderr, flush=True)
        known = {}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False) as file:
        json.dump(known | tiles, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(file.name, path)


def relative_errors(results: Results, exact: Results) -> list[float]:
    """||result - exact|| / ||exact|| of each tensor; NaN and infinity are never right."""
    return [
        ((a.double() - e.double()).norm() / e.double().norm().clamp_min(1e-300)).nan_to_num(torch.inf, torch.inf).item()
        for a, e in zip(results, exact, strict=True)
    ]


def as_tuple(results: Tensor | Results) -> Results:
    """One result or several, as a tuple."""
    return (results,) if isinstance(results, Tensor) else results


def runner(x: Tensor, mu: Tensor, sigma: Tensor, kind: str) -> Callable[..., Results]:
    """A function that runs one kernel of a layer: run(backend, convert, dilation, width, **options).

    ``backend`` is a module with the kernels' functions, ``convert`` is applied to each tensor, and of the volumes only
    ``width`` voxels along W are taken.
    """
    one = (1, 1, 1)
    seed = torch.zeros((), dtype=torch.int64, device=x.device)
    b_mu = torch.linspace(-1, 1, mu.shape[0], dtype=x.dtype, device=x.device)
    b_sigma = b_mu.abs() + 0.1
    y, r = reference.forward(x, mu, sigma, b_mu, b_sigma, one, tuple(k // 2 for k in mu.shape[2:]), one, 1, seed)

    def run(
        backend: Any, convert: Callable[[Tensor], Tensor], dilation: int = 1, width: int = x.shape[-1], **options: Any
    ) -> Results:
        geometry: tuple[Any, ...] = (one, tuple(k // 2 * dilation for k in mu.shape[2:]), (dilation,) * 3, 1)
        volumes = (t[..., :width] for t in (y, r, x))
        g_, r_, x_, mu_, sigma_, b_mu_, b_sigma_ = map(convert, (*volumes, mu, sigma, b_mu, b_sigma))
        if kind == "grad_weight":
            options["bias_sigma"] = b_sigma_
        arguments = {
            "forward": (x_, mu_, sigma_, b_mu_, b_sigma_, *geometry, seed),
            "grad_input": (g_, r_, x_, mu_, sigma_, *geometry),
            "grad_weight": (g_, r_, x_, sigma_, *geometry),
        }[kind]
        return as_tuple(getattr(backend, kind)(*arguments, **options))

    return run


def tune_layer(x: Tensor, mu: Tensor, sigma: Tensor, *, n_tiles: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Check and time the best-ranked tiles of the three kernels for one layer; the fastest of each, by `tuned_key`.

    A tile is right if its error against fp64 is at most twice that of the reference in the same dtype, and a rounding;
    that of specialized warps at every dilation and in lines that are no multiple of four, on which their code depends.

    Raises
    ------
    ValueError
        If no tile of a kernel fits this GPU and is right.
    """
    return dict(
        tune_kernel(kind, x, mu, runner(x, mu, sigma, kind), n_tiles, repeats)
        for kind in ("forward", "grad_input", "grad_weight")
    )


def tune_kernel(
    kind: str, x: Tensor, mu: Tensor, run: Callable[..., Results], n_tiles: int, repeats: int
) -> tuple[str, dict[str, Any]]:
    """The `tuned_key` of one kernel and its fastest tile."""
    from triton.runtime.errors import OutOfResources

    from dwc_kernels import kernels
    from dwc_kernels.kernels.launch import Plan, asked
    from dwc_kernels.kernels.specialized import variant
    from dwc_kernels.kernels.tiles import Tile, ranked
    from dwc_kernels.kernels.tuned import measured_path, measured_tile, tuned_key

    width = x.shape[-1]
    dilations = DILATIONS if max(mu.shape[2:]) > 1 else (1,)
    everywhere = [*((dilation, width) for dilation in dilations), (1, width - 1)]
    problem, chip = asked(kind, x, x.shape[2:], mu, (1, 1, 1), 1)
    key, by_estimate = tuned_key(problem), ranked(problem, chip)
    precision = Plan(problem, chip, by_estimate[0]).precision
    rounding = 2.0**-11 if precision == "tf32" and x.dtype == torch.float32 else torch.finfo(x.dtype).eps

    @cache
    def expected(*where: int) -> tuple[Results, list[float]]:
        exact = run(reference, Tensor.double, *where)
        return exact, relative_errors(run(reference, Tensor.contiguous, *where), exact)

    packaged = measured_tile(problem, chip, measured_path(chip.name))
    tried = dict.fromkeys(by_estimate[:n_tiles] + variant.candidates(problem, chip) + ([packaged] if packaged else []))
    times: dict[Tile, tuple[float, float]] = {}
    for tile in tried:
        call = partial(run, kernels, lambda t: t, tile=tile)
        errors, allowed = [], []
        try:
            for where in everywhere if tile.specialized else [(1, width)]:
                exact, composed = expected(*where)
                errors += relative_errors(call(*where), exact)
                allowed += [2 * theirs + rounding for theirs in composed]
        except OutOfResources as error:
            print(f"{tile} does not fit: {error}", flush=True)
            continue
        if not all(ours <= most for ours, most in zip(errors, allowed, strict=True)):
            print(f"{tile} is wrong on this GPU, errors {errors}: not taken", file=sys.stderr, flush=True)
            continue
        medians = [statistics.median(device_times(partial(call, dilation), repeats)) for dilation in dilations]
        times[tile] = statistics.mean(medians), host_time(call, repeats)
    if not times:
        raise ValueError(
            f"none of the {len(tried)} tiles tried for {key} fits {chip.name} and is right "
            "there; try more with --tiles, or use backend='reference'"
        )
    tile = min(times, key=lambda t: times[t][0])
    theirs = f"{times[by_estimate[0]][0]:.3f} ms" if by_estimate[0] in times else "does not run"
    print(f"{key}: {times[tile][0]:.3f} ms on the GPU, {times[tile][1]:.3f} ms of the host, with {tile} "
          f"(the model's choice: {theirs})", flush=True)  # fmt: skip
    return key, asdict(tile)


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
    from dwc_kernels.kernels.launch import chip_of, forget_plans
    from dwc_kernels.kernels.tuned import tuned_path

    device = torch.device("cuda", torch.cuda.current_device())
    path = tuned_path(chip_of(device).name)
    layers = ((1, options.width, 3), (options.width, options.width, 3), (options.width, options.classes, 1))
    for dtype in options.dtype:
        for channels, filters, k in layers:
            shape = (options.samples, channels, *(options.size,) * 3)
            x = torch.randn(shape, device=device, dtype=DTYPES[dtype]).to(memory_format=torch.channels_last_3d)
            mu = torch.randn(filters, channels, k, k, k, device=device, dtype=DTYPES[dtype]) / (channels * k**3) ** 0.5
            try:
                best = tune_layer(x, mu, mu.abs() * 0.1, n_tiles=options.tiles, repeats=options.repeats)
            except ValueError as error:
                print(f"dwc_kernels.tune: {error}", file=sys.stderr)
                return 1
            store(path, best)
    forget_plans()
    print(f"stored in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
