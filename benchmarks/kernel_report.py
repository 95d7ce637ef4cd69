"""What the compiler says of the three kernels, for every layer of Table 1, on chips that need not be there.

    python -m benchmarks.kernel_report [--arch sm_80 sm_89 sm_90 sm_100 sm_120] [--dtype bf16 tf32 fp16 ieee]
        [--layer conv2 ...] [--json F] [--dump DIR]

Facts (registers, spills, shared memory, instruction mix) come from ptxas and the disassembly. Times are *modelled*,
never measured: by `tiles.estimate`, which was fitted to an H200, with the instructions of the compiled loop.
"""

import argparse
import itertools
import json
import math
import os
import sys
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks.kernel_report_compile import Compiled, compile_kernel
from benchmarks.shapes import LAYERS, SAMPLES, SIZE, Layer
from dwc.base.files import write_whole
from dwc_kernels.kernels.chips import CHIPS, L2_REACH, TENSOR_REACH, Chip
from dwc_kernels.kernels.tiles import (
    KINDS,
    Problem,
    Tile,
    choose,
    estimate,
    loop_macs,
    operand_bytes,
    problem_of,
    second_dtype,
    shared_bytes,
    stacks,
)

__all__ = ["Row", "layer_problem", "main", "report", "visited_share"]

ARCHITECTURES = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120")


@dataclass(frozen=True)
class Row:
    """One kernel of one layer: where its time would go, in microseconds of the model."""

    layer: str
    kind: str
    arch: str
    dtype: str
    visited: float  # share of (tile, tap) pairs that is not skipped
    useful: float  # share of the products that meets neither padding nor idle rows and columns
    l2_bytes_per_flop: float
    dram_bytes_per_flop: float
    floor: float  # flops over the peak or bytes over the bandwidth, whichever is more
    modelled: float


def layer_problem(layer: Layer, kind: str, dtype: str) -> Problem:
    """The problem that the launcher hands to the tile model."""
    return problem_of(kind, dtype, SAMPLES, SIZE, layer.channels, layer.filters, (layer.kernel,) * 3)


@cache
def compiled_for(problem: Problem, arch: str) -> Compiled:
    """The kernel with the tile that the model chooses; dilation and padding are arguments, so layers share it."""
    return compile_kernel(problem, choose(problem, CHIPS[arch]), arch)


def visited_share(size: tuple[int, int, int], box: tuple[int, int, int], kernel: int, dilation: int) -> float:
    """Share of (tile, tap) pairs that some voxel of the tile connects to the volume; the others are skipped."""
    share = 1.0
    padding = dilation * (kernel - 1) // 2
    for n, b in zip(size, box, strict=True):
        pairs = [(o, k) for o in range(0, n, b) for k in range(kernel)]
        inside = [o + k * dilation - padding < n and min(o + b, n) - 1 + k * dilation - padding >= 0 for o, k in pairs]
        share *= sum(inside) / len(pairs)
    return share


def summed_share(size: tuple[int, int, int], box: tuple[int, int, int], kernel: int, dilation: int) -> float:
    """The same for grad_weight, whose programs visit the boxes that one of their four taps connects to the volume."""
    padding, taps = dilation * (kernel - 1) // 2, kernel**3
    boxes = full = 0
    for first in range(0, taps, 4):
        group = [min(t, taps - 1) for t in range(first, first + 4)]
        count = 1
        for axis, (n, b) in enumerate(zip(size, box, strict=True)):
            shifts = [t // kernel ** (2 - axis) % kernel * dilation - padding for t in group]
            start = min(max(-max(shifts), 0), n - 1)
            count *= math.ceil((max(min(n, n - min(shifts)), start + 1) - start) / b)
        boxes += count
        full += math.prod(math.ceil(n / b) for n, b in zip(size, box, strict=True))
    return boxes / full


def inside_share(size: tuple[int, int, int], kernel: int, dilation: int) -> float:
    """Share of (voxel, tap) products that meet no padding."""
    padding = dilation * (kernel - 1) // 2
    return math.prod(
        sum(0 <= v + k * dilation - padding < n for v in range(n) for k in range(kernel)) / (n * kernel) for n in size
    )


def peak(dtype: str, chip: Chip) -> float:
    """FLOP/s of the two products together."""
    return 4 * chip.multiprocessors * chip.clock / (1 / chip.macs[dtype] + 1 / chip.macs[second_dtype(dtype)])


def loop_cycles(problem: Problem, tile: Tile, arch: str) -> float:
    """Cycles of the tensor cores at their peak for one iteration of the main loop."""
    macs = CHIPS[arch].macs
    return loop_macs(problem, tile) * (1 / macs[problem.dtype] + 1 / macs[second_dtype(problem.dtype)])


def loop_issue(compiled: Compiled) -> float:
    """Cycles in which one of the 4 schedulers issues one iteration of the main loop.

    The busiest issues what every warp runs, for its share of the warps, and what one warp runs alone.
    """
    every, elected = compiled.loop_instructions - compiled.elected, compiled.elected
    return every * max(1.0, compiled.tile.warps / 4) + elected


def issue_ratio(problem: Problem, compiled: Compiled) -> float:
    """Issue cycles over tensor-core cycles at peak of the main loop."""
    return loop_issue(compiled) / loop_cycles(problem, compiled.tile, compiled.arch)


def traffic_ratios(problem: Problem, tile: Tile, arch: str) -> tuple[float, float]:
    """L2 and shared-memory cycles over tensor-core cycles at peak of the main loop."""
    cycles = estimate(problem, tile, CHIPS[arch])
    tensor = cycles["tensor"] * TENSOR_REACH
    return cycles["l2"] / tensor, cycles["shared"] / tensor


def layer_row(layer: Layer, kind: str, arch: str, dtype: str) -> Row:
    """The model's numbers for one kernel of one layer."""
    problem, chip = layer_problem(layer, kind, dtype), CHIPS[arch]
    compiled = compiled_for(problem, arch)
    tile = compiled.tile
    share = summed_share if kind == "grad_weight" else visited_share
    visited = share(SIZE, tile.box, problem.kernel[0], layer.dilation)
    voxels = SAMPLES * math.prod(SIZE)
    flops = 4 * layer.macs * voxels  # two products of two operations
    row_bytes, column_bytes = operand_bytes(problem, tile)
    dram = problem.itemsize * voxels * dram_elements(layer, kind)
    cycles = estimate(problem, tile, chip, issue=loop_issue(compiled), visited=visited)["total"]
    modelled = max(cycles / chip.clock, dram / chip.dram)
    floor = max(flops / peak(dtype, chip), dram / chip.dram)
    inside = layer.macs * inside_share(SIZE, layer.kernel, layer.dilation) * voxels
    return Row(
        layer.name, kind, arch, dtype, visited, inside / (visited * issued_macs(problem, tile)),
        (row_bytes + column_bytes) / (4 * loop_macs(problem, tile)), dram / flops, floor * 1e6, modelled * 1e6,
    )  # fmt: skip


def issued_macs(problem: Problem, tile: Tile) -> float:
    """Multiply-adds that one product issues, idle rows and columns and padding included."""
    boxes = problem.samples * math.prod(math.ceil(n / b) for n, b in zip(problem.size, tile.box, strict=True))
    columns = math.ceil(problem.columns / tile.columns)
    if problem.kind == "grad_weight":
        return loop_macs(problem, tile) * boxes * columns * stacks(problem)
    steps = math.prod(problem.kernel) * math.ceil(problem.channels / tile.channels)
    return loop_macs(problem, tile) * boxes * columns * steps


def dram_elements(layer: Layer, kind: str) -> int:
    """Elements per voxel that must cross device memory once: inputs read, outputs written."""
    c, f = layer.channels, layer.filters
    return {"forward": c + 2 * f, "grad_input": 2 * f + 2 * c, "grad_weight": 2 * f + c}[kind]


def report(
    architectures: list[str], dtypes: list[str], layers: list[Layer]
) -> tuple[list[tuple[Problem, Compiled]], list[Row]]:
    """Compile what the layers need, each kernel once, and model each layer."""
    wanted = list(itertools.product(architectures, dtypes, KINDS, layers))
    problems = dict.fromkeys((layer_problem(layer, kind, dtype), arch) for arch, dtype, kind, layer in wanted)
    facts = [(problem, compiled_for(problem, arch)) for problem, arch in problems]
    return facts, [layer_row(layer, kind, arch, dtype) for arch, dtype, kind, layer in wanted]


def print_facts(facts: list[tuple[Problem, Compiled]]) -> None:
    """One line per compiled kernel."""
    print("Facts from the compiler. Of the main loop, over its tensor-core cycles at peak: issue, instructions per \n"
          "warp x warps / 4 of the disassembly; L2 and smem, the cycles of its bytes. Waits are those for all \n"
          "products in flight (sm_90), barriers those of all warps, both per iteration.")  # fmt: skip
    print(f"{'arch':7}{'dtype':6}{'kernel':12}{'sum->out, taps':17}{'tile':24}"
          f"{'regs':>5}{'spill':>6}{'stack':>6}{'shared':>8}{'warps':>6}{'waits':>6}{'bars':>5} "
          f"{'matrix':24}{'issue':>6}{'L2':>6}{'smem':>6}  main loop")  # fmt: skip
    for problem, c in facts:
        t = c.tile
        tile = f"{'x'.join(map(str, t.box))} {t.wide}+{t.tail} k{t.channels} s{t.stages}"
        shape = f"{problem.channels}->{problem.columns}, {math.prod(problem.kernel)}"
        mix = ", ".join(f"{n} {k}" for k, n in c.loop.items())
        l2, shared = traffic_ratios(problem, t, c.arch)
        flag = " serialized" if c.serialized else ""
        print(f"{c.arch:7}{c.dtype:6}{c.kind:12}{shape:17}{tile:24}{c.registers:5}{c.spills:6}{c.stack:6}{c.shared:8}"
              f"{c.resident_warps:6}{c.full_waits:6}{c.barriers:5} {c.matrix_opcode:24}{issue_ratio(problem, c):6.2f}"
              f"{l2:6.2f}{shared:6.2f}  {c.loop_instructions}: {mix}{flag}")  # fmt: skip


def print_model(rows: list[Row]) -> None:
    """One line per kernel and layer."""
    print("\nModelled, not measured: microseconds of each kernel alone, batch "
          f"{SAMPLES} x {'x'.join(map(str, SIZE))}. Products reach {TENSOR_REACH:.0%} of their peak.")  # fmt: skip
    for arch in dict.fromkeys(r.arch for r in rows):
        c = CHIPS[arch]
        l2 = c.l2 * c.multiprocessors * c.clock * L2_REACH
        print(f"  {arch}: {c.name}, {c.multiprocessors} multiprocessors at {c.clock / 1e9:.2f} GHz, "
              f"L2 {l2 / 1e12:.1f} TB/s, DRAM {c.dram / 1e12:.2f} TB/s")  # fmt: skip
    print(f"{'arch':7}{'dtype':6}{'kernel':12}{'layer':9}{'visited':>8}{'useful':>8}{'L2 B/flop':>11}"
          f"{'DRAM B/flop':>12}{'floor':>8}{'modelled':>10}")  # fmt: skip
    for r in rows:
        print(f"{r.arch:7}{r.dtype:6}{r.kind:12}{r.layer:9}{r.visited:8.2f}{r.useful:8.2f}{r.l2_bytes_per_flop:11.4f}"
              f"{r.dram_bytes_per_flop:12.4f}{r.floor:8.0f}{r.modelled:10.0f}")  # fmt: skip


def dump(facts: list[tuple[Problem, Compiled]], folder: Path) -> None:
    """Write PTX, cubin and SASS of every kernel."""
    folder.mkdir(parents=True, exist_ok=True)
    for problem, c in facts:
        name = f"{c.kind}_{c.arch}_{c.dtype}_{problem.channels}x{problem.columns}x{math.prod(problem.kernel)}"
        for suffix, code in c.code.items():
            write_whole(folder / f"{name}.{suffix}", code if isinstance(code, bytes) else code.encode())


def plain(problem: Problem, c: Compiled) -> dict[str, Any]:
    """The facts of one kernel as JSON has them, with the names of the layers that run it."""
    layers = [layer.name for layer in LAYERS if layer_problem(layer, c.kind, c.dtype) == problem]
    known = asdict(problem) | {k: v for k, v in asdict(c).items() if k != "code"}
    ratios = {"issue_ratio": issue_ratio(problem, c), "traffic_ratios": traffic_ratios(problem, c.tile, c.arch)}
    return known | ratios | {"layers": layers, "shared_model": shared_bytes(problem, c.tile, CHIPS[c.arch])}


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_report", description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=["sm_80", "sm_90", "sm_100"])
    parser.add_argument("--dtype", nargs="+", choices=("bf16", "tf32", "fp16", "ieee"), default=["bf16", "tf32"])
    parser.add_argument("--layer", nargs="+", choices=[x.name for x in LAYERS], default=[x.name for x in LAYERS])
    parser.add_argument("--json", type=Path, metavar="F", help="write facts and model to this file")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write PTX, cubin and SASS into this folder")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it")
    facts, rows = report(options.arch, options.dtype, [layer for layer in LAYERS if layer.name in options.layer])
    print_facts(facts)
    print_model(rows)
    if options.dump:
        dump(facts, options.dump)
    if options.json:
        text = json.dumps({"facts": [plain(*fact) for fact in facts], "model": [asdict(r) for r in rows]}, indent=1)
        write_whole(options.json, text.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
