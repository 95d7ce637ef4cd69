"""Compile the kernels over many widths, sizes, dtypes and chips and list what spills; no GPU is needed.

    python -m benchmarks.kernel_sweep [--out docs/results/kernels] [--arch sm_90 ...] [--dtype bf16 ...]
        [--kind forward ...]

Sizes reach the kernels as arguments, so volumes that take the same tile are one case, and cases that ask the same of
the compiler share one compilation. Each finished case is at once a row of ``sweep.csv``, with a hash of all that the
compiler is given; called again, the command compiles only what is missing, what is asked most first.
"""

import argparse
import csv
import hashlib
import io
import itertools
import os
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import triton
from triton.runtime import JITFunction

from benchmarks.kernel_report_compile import asked_of_triton, compile_kernel, run_tool
from dwc.base.files import write_whole
from dwc_kernels.kernels.chips import CHIPS
from dwc_kernels.kernels.tiles import KINDS, Problem, Tile, choose, problem_of, shared_bytes

__all__ = ["Case", "Fact", "cases", "main", "summary"]

ARCHITECTURES = ("sm_90", "sm_80", "sm_89", "sm_100", "sm_120")
DTYPES = ("bf16", "tf32", "fp16")
MOST_ASKED = {"sm_90", "sm_80"}, {"bf16", "tf32"}
WIDTHS = (96, 21, 256, 30, 64, 16, 32)  # channels and filters
EDGES = (32, 31, 45, 182)  # voxels along each edge of a volume
KERNELS = (3, 1, 5)


class Case(NamedTuple):
    """A kernel of a layer on a chip, for all volumes that take its tile."""

    arch: str
    shape: tuple[int, int, int]  # channels, filters, kernel size
    problem: Problem  # of one of the volumes
    tile: Tile
    edges: str


@dataclass(frozen=True)
class Fact:
    """One case: what was asked, and what the compiler says."""

    source: str  # hash of what the compiler is given
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
        return self.source, *map(str, (self.channels, self.filters, self.kernel)), self.tile, self.edges


def compiler() -> str:
    """The versions of Triton and of both assemblers in its wheel."""
    return "\n".join([triton.__version__, *(run_tool(name, "--version") for name in ("ptxas", "ptxas-blackwell"))])


@cache
def device_code(kind: str) -> str:
    """A kernel's device code and what compiles it."""
    modules = (sys.modules[f"dwc_kernels.kernels.{name}"] for name in ("products", "noise", kind))
    functions = (f for module in modules for f in vars(module).values() if isinstance(f, JITFunction))
    return "".join([compiler(), *sorted({f.src for f in functions})])


@cache
def source_hash(case: Case) -> str:
    """A hash of all that the compiler is given for a case: cases with the same one are the same machine code."""
    asked = asked_of_triton(case.problem, case.tile, case.arch)
    constants = {place: str(value) for place, value in asked.constants.items()}
    given = (
        device_code(case.problem.kind), case.arch, asked.signature, constants, asked.attributes,
        case.tile.warps, case.tile.stages,
    )  # fmt: skip
    return hashlib.sha256(repr(given).encode()).hexdigest()[:12]


def shapes() -> list[tuple[int, int, int]]:
    """(channels, filters, kernel size): square layers, and the network's first and last."""
    square = [(width, width, kernel) for width, kernel in itertools.product(WIDTHS, KERNELS)]
    return [(96, 96, 3), (1, 96, 3), (96, 50, 1), *square[1:]]


def cases(
    architectures: Iterable[str] = ARCHITECTURES, dtypes: Iterable[str] = DTYPES, kinds: Iterable[str] = KINDS
) -> list[Case]:
    """Every case once, what is asked most first."""
    every = []
    for shape, arch, dtype, kind in itertools.product(shapes(), architectures, dtypes, kinds):
        channels, filters, kernel = shape
        found: dict[tuple[Tile, bool], tuple[Problem, list[int]]] = {}
        for edge in EDGES:
            samples = 10 if edge < 100 else 1
            problem = problem_of(kind, dtype, samples, (edge,) * 3, channels, filters, (kernel,) * 3)
            aligned = kind != "forward" or edge % 4 == 0  # only the forward's noise asks
            found.setdefault((choose(problem, CHIPS[arch]), aligned), (problem, []))[1].append(edge)
        for (tile, _), (problem, edges) in found.items():
            every.append(Case(arch, shape, problem, tile, " ".join(map(str, edges))))
    return sorted(every, key=rank)


def rank(case: Case) -> tuple[bool, ...]:
    """What is asked most comes first; of the rest forwards come last, because they take longest to compile."""
    archs, dtypes = MOST_ASKED
    other_arch, other_dtype = case.arch not in archs, case.problem.dtype not in dtypes
    other = other_arch or other_dtype
    return other, other and case.problem.kind == "forward", other_dtype, other_arch


def spelled(tile: Tile) -> str:
    """A tile in one word."""
    box = "x".join(map(str, tile.box))
    return f"{box}_k{tile.channels}_n{tile.wide}+{tile.tail}_c{tile.chunk}_w{tile.warps}_s{tile.stages}"


def compiled(case: Case) -> Fact:
    """Compile one case; RuntimeError where nothing is left of it."""
    problem, c = case.problem, compile_kernel(case.problem, case.tile, case.arch)
    if not c.matrix_opcode:
        raise RuntimeError(f"the compiler left no product of {case}")
    return Fact(
        source_hash(case), case.arch, problem.dtype, problem.kind, *case.shape, case.edges, spelled(case.tile),
        c.registers, c.spills, c.stack, c.local, int(c.serialized), c.full_waits, c.barriers,
        c.shared, shared_bytes(problem, case.tile, CHIPS[case.arch]),
    )  # fmt: skip


def same_code(fact: Fact, case: Case) -> Fact:
    """The row of a case whose machine code is that of a fact."""
    channels, filters, kernel = case.shape
    return replace(
        fact, channels=channels, filters=filters, kernel=kernel, edges=case.edges, tile=spelled(case.tile),
        shared_model=shared_bytes(case.problem, case.tile, CHIPS[case.arch]),
    )  # fmt: skip


def read(path: Path) -> list[Fact]:
    """The facts on file."""
    if not path.exists():
        return []
    with path.open() as file:
        rows = list(csv.DictReader(file))
    kinds = {f.name: f.type for f in fields(Fact)}
    return [Fact(**{name: int(v) if kinds[name] is int else v for name, v in row.items()}) for row in rows]


def key_of(case: Case) -> tuple[str, ...]:
    """The `Fact.key` of a case."""
    return source_hash(case), *map(str, case.shape), spelled(case.tile), case.edges


def as_csv(facts: list[Fact]) -> str:
    """Rows below their header."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [f.name for f in fields(Fact)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(fact) for fact in facts)
    return text.getvalue()


def summary(facts: list[Fact], total: int) -> str:
    """How many of all cases are done, and a Markdown table: per chip, dtype and kernel, which of them spill."""
    n_compiled = len({fact.source for fact in facts})
    lines = [f"{len(facts)} of {total} cases, in {n_compiled} compilations.", ""]
    lines += ["| chip | dtype | kernel | cases | spill | most bytes | which spill |", "| --- " * 7 + "|"]
    groups: dict[tuple[str, str, str], list[Fact]] = {}
    for fact in facts:
        groups.setdefault((fact.arch, fact.dtype, fact.kind), []).append(fact)
    for arch, dtype, kind in itertools.product(ARCHITECTURES, DTYPES, KINDS):
        if (arch, dtype, kind) not in groups:
            continue
        group = groups[arch, dtype, kind]
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
    path, every = options.out / "sweep.csv", {key_of(case): case for case in cases()}
    facts = [same_code(fact, every[fact.key]) for fact in read(path) if fact.key in every]
    write_whole(path, as_csv(facts).encode())
    done, codes = {fact.key for fact in facts}, {fact.source: fact for fact in facts}
    try:
        with path.open("a", newline="") as file:
            writer = csv.DictWriter(file, [f.name for f in fields(Fact)], lineterminator="\n")
            for case in cases(options.arch, options.dtype, options.kind):
                if key_of(case) in done:
                    continue
                known = codes.get(source_hash(case))
                fact = compiled(case) if known is None else same_code(known, case)
                codes[fact.source] = fact
                facts.append(fact)
                writer.writerow(asdict(fact))
                file.flush()
    finally:  # also for what Ctrl-C leaves
        table = summary(facts, len(every))
        print(table)
        write_whole(options.out / "sweep.md", f"{table}\n".encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())
