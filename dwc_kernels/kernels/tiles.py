"""Which tile a kernel uses: by a small stated model, or as ``dwc_kernels.tune`` measured. Nothing is compiled here.

A tile is good when its accumulators fit the registers, its pipeline fits shared memory, little arrives per product, few
columns are idle and the last wave of programs is full. ``choose`` estimates each candidate's time as

    waves * (steps * max(cycles of tensor cores, L2, shared memory, instruction issue) + epilogue)

and takes the least. The rates are peak rates of the chips, so the time is a lower bound; only the order matters here.
"""

import json
import math
import os
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

__all__ = [
    "CHIPS",
    "KINDS",
    "STACKED_ROWS",
    "Chip",
    "Problem",
    "Tile",
    "candidates",
    "choose",
    "estimate",
    "operand_bytes",
    "problem_of",
    "programs",
    "splits",
    "tile_for",
    "tuned",
    "tuned_key",
    "tuned_path",
]

KINDS = ("forward", "grad_input", "grad_weight")


@dataclass(frozen=True)
class Chip:
    """Rates of one chip, per multiprocessor and cycle where not said otherwise."""

    name: str
    arch: str  # whose machine code it runs
    multiprocessors: int
    clock: float  # Hz, at which the vendor states its peak
    macs: dict[str, int] = field(hash=False)  # tensor-core multiply-adds by the dtype of the operands
    l2: float  # bytes from L2
    dram: float  # bytes per second of the whole chip
    shared: int  # bytes of shared memory that the programs on a multiprocessor can have
    holds: int = 238  # registers of a thread that accumulators and operands may fill without spilling, as compiled
    rows_per_warp: int = 32  # of a tile
    unroll: int = 1  # channel blocks per iteration that still compile without spilling
    tensor_memory: bool = False  # accumulators live there and not in registers
    warp: int = 32


# Peak products, clocks and memory rates: NVIDIA's A100, H100 SXM and DGX B200 data sheets and AMD's MI300X data sheet.
# L2: 5120 bytes per cycle is A100's stated figure (A100 whitepaper); the others are taken to be no better per chip.
CHIPS = {
    "sm_80": Chip(
        "A100 SXM 80GB", "sm_80", 108, 1.41e9, {"bf16": 1024, "fp16": 1024, "tf32": 512, "ieee": 64},
        5120 / 108, 2.04e12, 163 << 10,
        holds=115, rows_per_warp=16,
    ),
    "sm_90": Chip(
        "H100 SXM", "sm_90", 132, 1.83e9, {"bf16": 2048, "fp16": 2048, "tf32": 1024, "ieee": 128},
        5120 / 132, 3.35e12, 227 << 10,
        unroll=3,
    ),
    "sm_100": Chip(
        "B200", "sm_100", 148, 1.85e9, {"bf16": 4096, "fp16": 4096, "tf32": 2048, "ieee": 128},
        5120 / 148, 8.0e12, 227 << 10,
        holds=200, tensor_memory=True,
    ),
    "gfx942": Chip(
        "MI300X", "gfx942", 304, 2.1e9, {"bf16": 1024, "fp16": 1024, "tf32": 512, "ieee": 128},
        64, 5.3e12, 64 << 10,
        warp=64,
    ),
}  # fmt: skip
# Chips for desktops and inference run sm_80's matrix instructions with less of everything; sm_120 has copy engines.
CHIPS["sm_89"] = replace(
    CHIPS["sm_80"], name="L40S", multiprocessors=142, clock=2.52e9, dram=8.64e11, shared=99 << 10,
    macs={"bf16": 512, "fp16": 512, "tf32": 256, "ieee": 128}, l2=2048 / 142,
)  # fmt: skip
CHIPS["sm_120"] = replace(
    CHIPS["sm_89"], name="RTX 5090", arch="sm_120", multiprocessors=170, clock=2.41e9, dram=1.79e12, l2=2048 / 170
)
# The interpreter runs one program after the other, so it wants few and large ones.
CHIPS["interpreter"] = replace(
    CHIPS["sm_90"], name="the interpreter", arch="interpreter", multiprocessors=1,
    macs=dict.fromkeys(CHIPS["sm_90"].macs, 2048),
)  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked for: ``channels`` are summed over, ``columns`` come out; in grad_weight both do."""

    kind: str
    dtype: str  # "bf16", "fp16", "tf32" or "ieee": of the operands
    samples: int
    size: tuple[int, int, int]  # voxels of the box that is tiled
    channels: int
    columns: int
    kernel: tuple[int, int, int]
    folded: bool = False  # taps have become channels

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype in ("bf16", "fp16") else 4


def problem_of(
    kind: str,
    dtype: str,
    samples: int,
    size: tuple[int, int, int],
    channels: int,
    filters: int,
    kernel: tuple[int, int, int],
) -> Problem:
    """The problem of one kernel for a convolution of channels into filters.

    Where a block of channels would be mostly padding, taps become channels; the input gradient sums over filters.
    """
    taps = math.prod(kernel)
    if kind == "grad_input":
        return Problem(kind, dtype, samples, tuple(size), filters, channels, tuple(kernel))
    if channels <= 4 and 1 < channels * taps <= 128:
        return Problem(kind, dtype, samples, tuple(size), channels * taps, filters, (1, 1, 1), folded=True)
    return Problem(kind, dtype, samples, tuple(size), channels, filters, tuple(kernel))


@dataclass(frozen=True)
class Tile:
    """The shape of one program and of its pipeline."""

    box: tuple[int, int, int]  # voxels along D, H, W
    channels: int  # summed per product
    unroll: int  # channel blocks per iteration of the loop
    wide: int  # columns of the first accumulator pair
    tail: int  # and of the second, 0 for none: 96 = 64 + 32
    chunk: int  # columns finished at a time
    warps: int
    stages: int

    @property
    def rows(self) -> int:
        return math.prod(self.box)

    @property
    def columns(self) -> int:
        return self.wide + self.tail


BOXES = ((4, 8, 8), (4, 4, 8), (2, 4, 8), (2, 4, 4), (1, 4, 4))
COLUMNS = ((64, 32), (64, 0), (32, 16), (32, 0), (16, 0))
SUMMED_COLUMNS = ((64, 32), (64, 0), (32, 0), (16, 0))
SUMMED_BOXES = ((1, 4, 8), (1, 8, 8), (2, 8, 8), (1, 2, 8))  # of grad_weight, whose products sum over voxels
STACKED_ROWS = 128  # of grad_weight: four taps of 32 channels


def candidates(problem: Problem, chip: Chip) -> list[Tile]:
    """The tiles that fit the chip's registers and shared memory."""
    columns = SUMMED_COLUMNS if problem.kind == "grad_weight" else COLUMNS
    if problem.dtype == "ieee":  # not tensor cores: operands sit in registers, so many warps on a small tile
        boxes = SUMMED_BOXES[-1:] if problem.kind == "grad_weight" else BOXES[2:3]
        shapes = [(box, 32 if problem.kind == "grad_weight" else 16, 1, 8) for box in boxes]
        columns = ((32, 0), (16, 0))
    elif problem.kind == "grad_weight":
        shapes = [(box, 32, 1, STACKED_ROWS // chip.rows_per_warp) for box in SUMMED_BOXES]
    else:
        blocks = {c: math.ceil(problem.channels / c) for c in (16, 32, 64)}
        # With one tap the compiler merges the loop with what follows and needs registers for both: half the rows.
        one_tap = math.prod(problem.kernel) == 1
        boxes = BOXES[1:] if one_tap else BOXES
        per_warp = 16 if one_tap and not chip.tensor_memory else chip.rows_per_warp
        # g and r together leave no registers for an unrolled loop.
        unrolls = range(1, (chip.unroll if problem.kind == "forward" else 1) + 1)
        shapes = [
            (box, c, unroll, max(1, min(8, math.prod(box) // per_warp)))
            for box in boxes
            for c, n in blocks.items()
            for unroll in unrolls
            if n % unroll == 0 and c < 2 * problem.channels + 16
        ]
    found = []
    for box, channels, unroll, warps in shapes:
        for wide, tail in columns:
            # A loop over one tap is merged with what follows it; 16 columns of 256 rows spill when finished at once.
            chunk = 8 if math.prod(problem.kernel) == 1 or wide == 16 else 16
            tile = Tile(box, channels, unroll, wide, tail, chunk, warps, 2)
            stages = [
                s
                for s in (4, 3, 2)[problem.kind == "grad_weight" :]
                if shared_bytes(problem, replace(tile, stages=s), chip) <= chip.shared
            ]
            if stages and registers(problem, tile, chip) <= chip.holds:
                found.append(replace(tile, stages=stages[0]))
    return found


def operand_bytes(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Bytes that one iteration brings for the row operand and for the column operand of its products."""
    squares = 2 if problem.dtype == "bf16" else 4  # sigma^2, or g * r, as a product takes it
    if problem.kind == "grad_weight":
        voxels = tile.rows
        return voxels * STACKED_ROWS * problem.itemsize, 2 * voxels * tile.columns * problem.itemsize
    channels = tile.channels * tile.unroll
    operands = 2 if problem.kind == "grad_input" else 1
    return tile.rows * channels * problem.itemsize * operands, tile.columns * channels * (problem.itemsize + squares)


def shared_bytes(problem: Problem, tile: Tile, chip: Chip) -> int:
    """Shared memory of the pipeline, as Triton lays it out: what goes to registers is free one stage earlier."""
    row_bytes, column_bytes = operand_bytes(problem, tile)
    if problem.kind == "grad_weight":
        squares = 2 if problem.dtype == "bf16" else 4
        total = (tile.stages - 1) * (row_bytes + column_bytes) + tile.rows * tile.columns * squares
    else:
        total = (tile.stages - 1) * row_bytes + tile.stages * column_bytes
    return total + (row_bytes + (8 << 10) if chip.tensor_memory else 0)  # there products read rows from shared memory


def registers(problem: Problem, tile: Tile, chip: Chip) -> float:
    """Registers of a thread that hold accumulators and operands; addresses and counters come on top."""
    squares = 2 if problem.dtype == "bf16" else 4
    rows, summed = (STACKED_ROWS, tile.rows) if problem.kind == "grad_weight" else (tile.rows, tile.channels)
    words = rows * summed * (problem.itemsize + squares) / 4
    if not chip.tensor_memory:
        words += 2 * rows * tile.columns
    if problem.kind == "grad_weight":  # g * r is formed there, and fp32 passes through them to be transposed
        words += tile.columns * summed * (squares + (problem.itemsize if problem.itemsize == 4 else 0)) / 4
    return words / (chip.warp * tile.warps)


def resident(problem: Problem, tile: Tile, chip: Chip) -> int:
    """Programs that share a multiprocessor."""
    by_registers = 65536 // (chip.warp * tile.warps * min(256, 32 + int(registers(problem, tile, chip))))
    return max(1, min(by_registers, chip.shared // shared_bytes(problem, tile, chip)))


def programs(problem: Problem, tile: Tile) -> int:
    """Programs of one launch; of grad_weight, per split of the voxels."""
    column_blocks = math.ceil(problem.columns / tile.columns)
    if problem.kind == "grad_weight":
        return stacks(problem) * column_blocks
    return problem.samples * boxes(problem.size, tile.box) * column_blocks


def stacks(problem: Problem) -> int:
    """Groups of four taps and 32 channels of grad_weight, with a bias, which takes the place of a tap."""
    return math.ceil((math.prod(problem.kernel) + 1) / 4) * math.ceil(problem.channels / 32)


def boxes(size: tuple[int, int, int], box: tuple[int, int, int]) -> int:
    """Boxes that cover a volume."""
    return math.prod(math.ceil(n / b) for n, b in zip(size, box, strict=True))


def splits(problem: Problem, tile: Tile, chip: Chip) -> int:
    """Parts into which grad_weight splits the voxels: one full wave of programs, at least four boxes each, and few
    enough that the kernel's product of parts and boxes stays below 2^31."""
    available = problem.samples * boxes(problem.size, tile.box)
    wanted = chip.multiprocessors * resident(problem, tile, chip) // programs(problem, tile)
    return max(1, min(wanted, available // 4, (2**31 - 1) // available))


def estimate(problem: Problem, tile: Tile, chip: Chip) -> dict[str, float]:
    """Cycles of the whole launch by what costs them, and the model's ``total``; for comparing tiles."""
    rows, summed = (
        (STACKED_ROWS, tile.rows) if problem.kind == "grad_weight" else (tile.rows, tile.channels * tile.unroll)
    )
    macs = rows * tile.columns * summed
    second = "tf32" if problem.dtype == "fp16" else problem.dtype
    tensor = macs / chip.macs[problem.dtype] + macs / chip.macs[second]
    row_bytes, column_bytes = operand_bytes(problem, tile)
    l2 = (row_bytes + column_bytes) / chip.l2
    # Instructions, fitted to the disassembly of the sm_90 kernels: a loop, its descriptor loads, its matrix
    # instructions.
    column_loads = 2 if tile.tail else 1
    if problem.kind == "grad_weight":
        loads, chains = 4 + 2 * column_loads, 2 * column_loads
    else:
        loads = (1 + (problem.kind == "grad_input") + 2 * column_loads) * tile.unroll
        chains = 2 * column_loads * tile.unroll
    matrix = chains * rows / (16 * tile.warps) * summed / tile.unroll * problem.itemsize / 32
    issue = (60 + 25 * loads + 4 * matrix) * tile.warps / 4
    # Written once, rows read once into registers, columns read by the products of every 64 rows.
    shared = (2 * row_bytes + (1 + rows / 64) * column_bytes) / 128
    if problem.kind == "grad_weight":
        parts = splits(problem, tile, chip)
        steps = math.ceil(problem.samples * boxes(problem.size, tile.box) / parts)
        count, epilogue = programs(problem, tile) * parts, 0.0
    else:
        steps = math.prod(problem.kernel) * math.ceil(problem.channels / (tile.channels * tile.unroll))
        count = programs(problem, tile)
        per_element = 24 if problem.kind == "forward" else 6  # instructions, from the disassembly
        epilogue = rows * tile.columns * per_element / 128
    waves = math.ceil(count / chip.multiprocessors)  # programs that share a multiprocessor share its rates
    bound = max(tensor, l2, shared, issue) + issue / 4  # a quarter of the issue is taken not to overlap
    return {
        "tensor": waves * steps * tensor,
        "l2": waves * steps * l2,
        "shared": waves * steps * shared,
        "issue": waves * steps * issue,
        "epilogue": waves * epilogue,
        "total": waves * (steps * bound + epilogue),
    }


@lru_cache(maxsize=512)
def choose(problem: Problem, chip: Chip) -> Tile:
    """The candidate with the least estimate on the chip."""
    return min(candidates(problem, chip), key=lambda tile: estimate(problem, tile, chip)["total"])


def tuned_path(device: str) -> Path:
    """Where ``python -m dwc_kernels.tune`` stores what it measured on a device of this name."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "dwc_kernels" / f"{device.replace(' ', '_').replace('/', '_')}.json"


def tuned_key(problem: Problem) -> str:
    """What a measured tile is remembered under: everything but the number of samples and voxels."""
    kernel = "x".join(map(str, problem.kernel))
    return f"{problem.kind} {problem.dtype} {problem.channels}->{problem.columns} {kernel}"


@lru_cache(maxsize=8)
def tuned(device: str) -> dict[str, Tile]:
    """The tiles measured on a device of this name; none where it was never tuned.

    Raises
    ------
    ValueError
        If the file is not what `dwc_kernels.tune` writes, naming it.
    """
    path = tuned_path(device)
    if not path.exists():
        return {}
    try:
        stored = json.loads(path.read_text())
        return {key: Tile(**{**tile, "box": tuple(tile["box"])}) for key, tile in stored.items()}
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(
            f"{path} holds no tiles ({error}); delete it, or run python -m dwc_kernels.tune again"
        ) from error


def tile_for(problem: Problem, chip: Chip) -> Tile:
    """The tile that was measured best on a device of this name, or else the model's choice for it."""
    return tuned(chip.name).get(tuned_key(problem)) or choose(problem, chip)
