"""Compile the kernels over many widths, sizes, dtypes and chips and list what spills; no GPU is needed.

    python -m benchmarks.kernel_sweep [--out docs/results/kernels] [--arch sm_90 ...] [--dtype bf16 ...]
        [--kind forward ...]

Sizes reach the kernels as arguments, so shapes that take the same tile share one compilation. Each finished compilation
is at once a row of ``sweep.csv``, with a hash of the kernels' source and of the compiler's version; called again, the
command compiles only what is missing.
"""

import argparse
import csv
import hashlib
import io
import itertools
import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path

import triton
from triton.runtime import JITFunction

from benchmarks.kernel_report_compile import compile_kernel, run_tool
from dwc.base.files import write_whole
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.tiles import KINDS, Problem, Tile, choose, problem_of, shared_bytes

__all__ = ["Fact", "cases", "main", "summary"]

ARCHITECTURES = ("sm_90", "sm_80", "sm_89", "sm_100", "sm_120")
DTYPES = ("bf16", "tf32", "fp16")
WIDTHS = (96, 21, 256, 30, 64, 16, 32)  # channels and filters
EDGES = (32, 31, 45, 182)  # voxels along each edge of a volume
KERNELS = (3, 1, 5)


@dataclass(frozen=True)
class Fact:
    """One compilation: what was asked, and what the compiler says."""

    source: str  # hash of the kernels' source and of the compiler's version
    arch: str
    dtype: str
    kind: str
    channels: int
    filters: int
    kernel: int
    edges: str  # that take this tile
    tile: str
    registers: int
    spills: int  # bytes
    stack: int  # bytes
    local: int  # instructions on local memory
    serialized: int  # whether ptxas serialized the matrix instructions
    full_waits: int
    barriers: int
    shared: int  # bytes, by the compiler
    shared_model: int  # by `tiles.shared_bytes`

    @property
    def key(self) -> tuple[str, ...]:
        return self.source, self.arch, self.dtype, self.kind, str(self.channels), str(self.filters), str(self.kernel), \
            self.tile, self.edges  # fmt: skip


def compiler() -> str:
    """The versions of Triton and of both assemblers in its wheel."""
    return "\n".join([triton.__version__, *(run_tool(name, "--version") for name in ("ptxas", "ptxas-blackwell"))])


@cache
def source_hash(kind: str) -> str:
    """A hash of a kernel's device code and of what compiles it; tiles are part of each row."""
    modules = (sys.modules[f"dwc_kernels.kernels.{name}"] for name in ("products", "noise", kind))
    functions = (f for module in modules for f in vars(module).values() if isinstance(f, JITFunction))
    return hashlib.sha256("".join([compiler(), *sorted({f.src for f in functions})]).encode()).hexdigest()[:12]


def shapes() -> list[tuple[int, int, int]]:
    """(channels, filters, kernel size): square layers, and the network's first and last."""
    square = [(width, width, kernel) for width, kernel in itertools.product(WIDTHS, KERNELS)]
    return [(96, 96, 3), (1, 96, 3), (96, 50, 1), *square[1:]]


def cases(
    architectures: Iterable[str] = ARCHITECTURES, dtypes: Iterable[str] = DTYPES, kinds: Iterable[str] = KINDS
) -> Iterator[tuple[str, tuple[int, int, int], Problem, Tile, str]]:
    """Arch, shape, problem, tile and the edges that share them, each compilation once."""
    for shape, arch, dtype, kind in itertools.product(shapes(), architectures, dtypes, kinds):
        channels, filters, kernel = shape
        found: dict[tuple[Tile, bool], tuple[Problem, list[int]]] = {}
        for edge in EDGES:
            samples = 10 if edge < 100 else 1
            problem = problem_of(kind, dtype, samples, (edge,) * 3, channels, filters, (kernel,) * 3)
            aligned = kind != "forward" or edge % 4 == 0  # only the forward's noise asks
            found.setdefault((choose(problem, CHIPS[arch]), aligned), (problem, []))[1].append(edge)
        for (tile, _), (problem, edges) in found.items():
            yield arch, shape, problem, tile, " ".join(map(str, edges))


def spelled(tile: Tile) -> str:
    """A tile in one word."""
    box = "x".join(map(str, tile.box))
    return f"{box}_k{tile.channels}x{tile.unroll}_n{tile.wide}+{tile.tail}_c{tile.chunk}_w{tile.warps}_s{tile.stages}"


def compiled(arch: str, shape: tuple[int, int, int], problem: Problem, tile: Tile, edges: str) -> Fact:
    """Compile one case."""
    c = compile_kernel(problem, tile, arch)
    return Fact(
        source_hash(problem.kind), arch, problem.dtype, problem.kind, *shape, edges, spelled(tile),
        c.registers, c.spills, c.stack, c.local, int(c.serialized), c.full_waits, c.barriers,
        c.shared, shared_bytes(problem, tile, CHIPS[arch]),
    )  # fmt: skip


def read(path: Path) -> list[Fact]:
    """The facts on file."""
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    kinds = {f.name: f.type for f in fields(Fact)}
    return [Fact(**{name: int(v) if kinds[name] is int else v for name, v in row.items()}) for row in rows]


def asked(case: tuple[str, tuple[int, int, int], Problem, Tile, str]) -> tuple[str, ...]:
    """The `Fact.key` of a case."""
    arch, shape, problem, tile, edges = case
    source = source_hash(problem.kind)
    return source, arch, problem.dtype, problem.kind, *map(str, shape), spelled(tile), edges


def as_csv(facts: list[Fact]) -> str:
    """Rows below their header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Fact)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(fact) for fact in facts)
    return text.getvalue()


def summary(facts: list[Fact], total: int) -> str:
    """How many of all compilations are done, and a Markdown table: per chip, dtype and kernel, which of them spill."""
    lines = [f"{len(facts)} of {total} compilations.", ""]
    lines += ["| chip | dtype | kernel | compiled | spill | most bytes | which spill |", "| --- " * 7 + "|"]
    groups: dict[tuple[str, str, str], list[Fact]] = {}
    for fact in facts:
        groups.setdefault((fact.arch, fact.dtype, fact.kind), []).append(fact)
    for (arch, dtype, kind), group in groups.items():
        spilling = sorted((f for f in group if f.spills or f.local), key=lambda f: -f.spills)
        named = ", ".join(f"{f.channels}->{f.filters} k{f.kernel} ({f.edges}): {f.spills}" for f in spilling[:4])
        named += ", ..." if len(spilling) > 4 else ""
        most = max((f.spills for f in spilling), default=0)
        lines.append(f"| {arch} | {dtype} | {kind} | {len(group)} | {len(spilling)} | {most} | {named} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernel_sweep", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("docs/results/kernels"), help="folder of sweep.csv, sweep.md")
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=ARCHITECTURES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=KINDS)
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 interprets kernels instead of compiling them; unset it")
    options.out.mkdir(parents=True, exist_ok=True)
    path, every = options.out / "sweep.csv", set(map(asked, cases()))
    facts = [fact for fact in read(path) if fact.key in every]
    write_whole(path, as_csv(facts).encode())
    known = {fact.key for fact in facts}
    try:
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Fact)], lineterminator="\n")
            for case in cases(options.arch, options.dtype, options.kind):
                if asked(case) not in known:
                    facts.append(compiled(*case))
                    writer.writerow(asdict(facts[-1]))
                    file.flush()
    finally:  # also for what Ctrl-C leaves
        table = summary(facts, len(every))
        print(table)
        write_whole(options.out / "sweep.md", f"{table}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
