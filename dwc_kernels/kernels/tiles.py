"""Which tiles a kernel can use, and which one a small stated model chooses. Nothing is compiled here.

Programs that share a multiprocessor share its rates, and each alone takes one step after the other: it waits for its
products before the next. So `estimate` gives each candidate's time as

    waves * max(programs on a multiprocessor * (steps * max(tensor cores, L2, shared memory, issue) + epilogue),
                steps * (tensor cores + issue + latency) + epilogue)

and `choose` takes the least. The latencies and epilogues are fitted to tiles that were timed on an H200
(`benchmarks.tile_times`). `benchmarks.kernel_report` prints the same model with the instructions of the compiled loop.
"""

import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache

from dwc_kernels.geometry import Triple
from dwc_kernels.kernels.chips import L2_REACH, TENSOR_REACH, WARP, Chip

__all__ = [
    "KINDS",
    "STACKED_ROWS",
    "Problem",
    "Tile",
    "candidates",
    "choose",
    "estimate",
    "loop_macs",
    "operand_bytes",
    "problem_of",
    "programs",
    "ranked",
    "second_dtype",
    "shared_bytes",
    "splits",
    "stacks",
    "tensor_columns",
]

KINDS = ("forward", "grad_input", "grad_weight")


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked for: ``channels`` are summed over, ``columns`` come out; in grad_weight both do."""

    kind: str
    dtype: str  # "bf16", "fp16", "tf32" or "ieee": of the operands
    samples: int
    size: Triple  # voxels of the box that is tiled
    channels: int
    columns: int
    kernel: Triple
    folded: bool = False  # taps have become channels
    stride: Triple = (1, 1, 1)  # of the loop; folding takes it away

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype in ("bf16", "fp16") else 4


def problem_of(
    kind: str,
    dtype: str,
    samples: int,
    size: Triple,
    channels: int,
    filters: int,
    kernel: Triple,
    stride: Triple = (1, 1, 1),
) -> Problem:
    """The problem of one kernel for a convolution of channels into filters.

    Where a block of channels would be mostly padding, taps become channels; the input gradient sums over filters.
    With a stride, only the forward is a kernel.
    """
    taps = math.prod(kernel)
    if kind == "grad_input":
        return Problem(kind, dtype, samples, size, filters, channels, kernel)
    if channels <= 4 and 1 < channels * taps <= 128:
        return Problem(kind, dtype, samples, size, channels * taps, filters, (1, 1, 1), folded=True)
    return Problem(kind, dtype, samples, size, channels, filters, kernel, stride=stride)


@dataclass(frozen=True)
class Tile:
    """The shape of one program and of its pipeline."""

    box: Triple  # voxels along D, H, W
    channels: int  # summed per product
    wide: int  # columns of the first accumulator pair
    tail: int  # and of the second, 0 for none: 96 = 64 + 32
    chunk: int  # columns finished at a time
    warps: int
    stages: int
    specialized: bool = False  # whether it is one of `specialized.variant`

    @property
    def rows(self) -> int:
        return math.prod(self.box)

    @property
    def columns(self) -> int:
        return self.wide + self.tail


BOXES = ((4, 8, 8), (4, 4, 8), (2, 4, 8), (2, 4, 4), (1, 4, 4))
COLUMNS = ((64, 32), (64, 0), (32, 16), (32, 0), (16, 0))
SUMMED_COLUMNS = ((64, 32), (64, 0), (32, 0), (16, 0))
# Of grad_weight, whose products sum over voxels; the last where registers hold no more.
SUMMED_BOXES = ((1, 4, 8), (1, 8, 8), (2, 8, 8), (1, 2, 8))
BARRIERS = 512  # bytes of shared memory that a pipeline's barriers take at most
CHUNK = 8  # columns finished at a time; more of them spill
LATENCY = {"forward": 400, "grad_input": 700, "grad_weight": 2200}  # cycles of a step that nothing of it hides
EPILOGUE = {"forward": 1.4, "grad_input": 2.0, "grad_weight": 0.0}  # cycles for each element of a tile
TENSOR_COLUMNS = 512  # of 128 words
STACKED_BUFFER = 8 << 10  # bytes through which stacked rows reach tensor memory, as compiled
STACKED_ROWS = 128  # of grad_weight: four taps of 32 channels


def candidates(problem: Problem, chip: Chip) -> list[Tile]:
    """The tiles that fit the chip's registers and shared memory."""
    boxes: tuple[Triple, ...]
    columns: tuple[tuple[int, int], ...] = SUMMED_COLUMNS if problem.kind == "grad_weight" else COLUMNS
    if problem.dtype == "ieee":  # not tensor cores: operands sit in registers, so many warps on a small tile
        shapes = [((1, 2, 8), 32, 8)] if problem.kind == "grad_weight" else [((2, 4, 8), 16, 8)]
        columns = ((32, 0), (16, 0))
    elif problem.kind == "grad_weight":
        boxes = SUMMED_BOXES if chip.warp_matrix else SUMMED_BOXES[:-1]
        shapes = [(box, 32, STACKED_ROWS // chip.rows_per_warp) for box in boxes]
    else:
        # With one tap the compiler merges the loop with what follows and needs registers for both: half the rows.
        one_tap = math.prod(problem.kernel) == 1
        boxes = BOXES[1:] if one_tap else BOXES
        per_warp = 16 if one_tap and not chip.tensor_memory else chip.rows_per_warp
        shapes = [
            (box, c, max(1, min(8, math.prod(box) // per_warp)))
            for box in boxes
            for c in (16, 32, 64)
            if c < 2 * problem.channels + 16
        ]
    depths = (3, 2) if problem.kind == "grad_weight" else (4, 3, 2)
    found: list[Tile] = []
    for box, channels, warps in shapes:
        for wide, tail in columns:
            tiles = (Tile(box, channels, wide, tail, CHUNK, warps, stages) for stages in depths)
            found += itertools.islice((t for t in tiles if fits(problem, t, chip) and not spills(problem, t, chip)), 1)
    return [finished(problem, tile, chip) for tile in found]


def spills(problem: Problem, tile: Tile, chip: Chip) -> bool:
    """Whether a tile spills although `fits` counts registers enough for it, as compiled."""
    if problem.kind != "grad_weight":  # few warps fetch more of a block each, and tensor memory is for four
        few = chip.arch == "sm_80" and tile.warps < 8
        return (few and tile.channels >= 32 and tile.columns >= 96) or (chip.tensor_memory and tile.warps < 4)
    one_tap = math.prod(problem.kernel) == 1
    if chip.arch == "sm_80":  # no copy engine for tensors: addresses take registers
        return tile.rows >= 128 or (tile.rows >= 64 and tile.columns >= 64 and not one_tap)
    # ptxas keeps these within fewer registers than there are.
    if chip.tensor_memory:
        return (tile.columns < 32 and tile.rows >= 64) or (
            problem.dtype == "fp16" and tile.columns < 64 and tile.rows < 64
        )
    most = 32 if problem.dtype == "tf32" else 64
    return chip.arch == "sm_120" and ((tile.columns < 32 and tile.rows >= 128) or (one_tap and tile.rows >= most))


def finished(problem: Problem, tile: Tile, chip: Chip) -> Tile:
    """The tile with fewer columns finished at a time where more would spill.

    Noise of lines that are no multiple of four is drawn twice, and takes registers that a full tile of fp32 lacks.
    """
    straddling = problem.kind == "forward" and problem.size[2] % 4 != 0
    full = chip.arch == "sm_90" and registers(problem, tile, chip) > 0.9 * chip.holds
    full |= chip.tensor_memory and tile.channels >= 64
    return replace(tile, chunk=CHUNK // 2) if straddling and full and problem.dtype == "tf32" else tile


def fits(problem: Problem, tile: Tile, chip: Chip) -> bool:
    """Whether the chip's shared and tensor memory and a thread's registers hold what the tile needs."""
    shared = shared_bytes(problem, tile, chip) + BARRIERS
    tensor = tensor_columns(problem, tile) if chip.tensor_memory else 0
    return shared <= chip.shared and tensor <= TENSOR_COLUMNS and registers(problem, tile, chip) <= chip.holds


def tensor_columns(problem: Problem, tile: Tile) -> float:
    """Columns of tensor memory for the sums and for the operands that pass through registers.

    Of a kernel that needs more than there are, Triton 3.7.1 leaves nothing and says nothing.
    """
    if problem.kind == "grad_weight":
        return 2 * tile.columns
    operands = square_bytes(problem) + (problem.itemsize if problem.itemsize == 4 else 0)
    return tile.rows / 128 * (2 * tile.columns + tile.channels * operands / 4)


def operand_bytes(problem: Problem, tile: Tile) -> tuple[int, int]:
    """Bytes that one iteration brings for the row operand and for the column operand of its products."""
    squares = square_bytes(problem)
    if problem.kind == "grad_weight":
        # Where all taps and channels make one stack, the compiler knows which of its boxes are the same.
        rows = 32 * min(4, math.prod(problem.kernel)) if stacks(problem) == 1 else STACKED_ROWS
        return tile.rows * rows * problem.itemsize, 2 * tile.rows * tile.columns * problem.itemsize
    operands = 2 if problem.kind == "grad_input" else 1
    row_bytes = tile.rows * tile.channels * problem.itemsize * operands
    return row_bytes, tile.columns * tile.channels * (problem.itemsize + squares)


def shared_bytes(problem: Problem, tile: Tile, chip: Chip) -> int:
    """Shared memory as Triton lays it out, without the barriers of copies, a few hundred bytes.

    What goes to registers is free one stage earlier.
    """
    row_bytes, column_bytes = operand_bytes(problem, tile)
    pipeline = (tile.stages - 1) * (row_bytes + column_bytes)
    if problem.kind == "grad_weight":
        stacked = tile.rows * STACKED_ROWS * problem.itemsize
        if chip.warp_matrix:  # the stacked rows change their layout
            extra = stacked
        else:  # g * r, and what has to be transposed or copied on its way to a product
            copies = problem.itemsize if problem.itemsize == 4 or chip.tensor_memory else 0
            extra = tile.rows * tile.columns * (square_bytes(problem) + copies)
            extra += min(stacked, STACKED_BUFFER) if chip.tensor_memory else 0
        return max(pipeline + extra, STACKED_ROWS * tile.wide * 4)  # the sums on their way out
    if not chip.warp_matrix:
        pipeline += column_bytes
    if chip.arch == "sm_80":  # a thread copies 4 bytes at least; blocks of less pass through one buffer
        sizes = (problem.itemsize, square_bytes(problem))
        blocks = [columns * tile.channels * size for columns in (tile.wide, tile.tail) for size in sizes]
        small = [block for block in blocks if block < 4 * WARP * tile.warps]
        pipeline += max(small, default=0) - (tile.stages - 1) * sum(small)
    if chip.tensor_memory and problem.itemsize == 2:
        pipeline += tile.rows * tile.channels * problem.itemsize
    return pipeline


def square_bytes(problem: Problem) -> int:
    """Bytes of an element of sigma^2, or of g * r, as a product takes it."""
    return 2 if problem.dtype == "bf16" else 4


def registers(problem: Problem, tile: Tile, chip: Chip) -> float:
    """Registers of a thread that hold accumulators and operands; addresses and counters come on top."""
    squares = square_bytes(problem)
    rows, summed = (STACKED_ROWS, tile.rows) if problem.kind == "grad_weight" else (tile.rows, tile.channels)
    words = rows * summed * (problem.itemsize + squares) / 4
    if not chip.tensor_memory:
        words += 2 * rows * tile.columns
    if problem.kind == "grad_weight":  # g * r is formed there, and fp32 passes through them to be transposed
        words += tile.columns * summed * (squares + (problem.itemsize if problem.itemsize == 4 else 0)) / 4
        if chip.warp_matrix and problem.itemsize == 4:  # and so do the rows
            words += rows * summed
    return words / (WARP * tile.warps)


def resident(problem: Problem, tile: Tile, chip: Chip) -> int:
    """Programs that share a multiprocessor."""
    by_registers = 65536 // (WARP * tile.warps * min(256, 32 + int(registers(problem, tile, chip))))
    return max(1, min(by_registers, chip.shared // shared_bytes(problem, tile, chip)))


def programs(problem: Problem, tile: Tile) -> int:
    """Programs of one launch; of grad_weight, per split of the voxels."""
    column_blocks = math.ceil(problem.columns / tile.columns)
    if problem.kind == "grad_weight":
        return stacks(problem) * column_blocks
    return problem.samples * boxes(problem.size, tile.box) * column_blocks


def stacks(problem: Problem) -> int:
    """Groups of four taps and 32 channels of grad_weight."""
    return math.ceil(math.prod(problem.kernel) / 4) * math.ceil(problem.channels / 32)


def boxes(size: Triple, box: Triple) -> int:
    """Boxes that cover a volume."""
    return math.prod(math.ceil(n / b) for n, b in zip(size, box, strict=True))


def splits(problem: Problem, tile: Tile, chip: Chip) -> int:
    """Parts into which grad_weight splits the voxels: one full wave of programs, at least four boxes each, and few
    enough that the kernel's product of parts and boxes stays below 2^31."""
    available = problem.samples * boxes(problem.size, tile.box)
    wanted = chip.multiprocessors * resident(problem, tile, chip) // programs(problem, tile)
    return max(1, min(wanted, available // 4, (2**31 - 1) // available))


def loop_macs(problem: Problem, tile: Tile) -> int:
    """Multiply-adds of one of the two products in one iteration."""
    if problem.kind == "grad_weight":
        return STACKED_ROWS * tile.columns * tile.rows
    return tile.rows * tile.columns * tile.channels


def second_dtype(dtype: str) -> str:
    """What the variance product runs in: fp16 squares go to tf32."""
    return "tf32" if dtype == "fp16" else dtype


def loop_issue(problem: Problem, tile: Tile) -> float:
    """Cycles in which the busiest scheduler issues one iteration, fitted to the disassembly of the sm_90 kernels."""
    rows, summed = (STACKED_ROWS, tile.rows) if problem.kind == "grad_weight" else (tile.rows, tile.channels)
    column_loads = 2 if tile.tail else 1
    if problem.kind == "grad_weight":
        loads, chains = 4 + 2 * column_loads, 2 * column_loads
    else:
        loads = 1 + (problem.kind == "grad_input") + 2 * column_loads
        chains = 2 * column_loads
    matrix = chains * rows / (16 * tile.warps) * summed * problem.itemsize / 32
    return (60 + 25 * loads + 4 * matrix) * tile.warps / 4


def estimate(
    problem: Problem, tile: Tile, chip: Chip, *, issue: float | None = None, visited: float = 1.0
) -> dict[str, float]:
    """Cycles of the whole launch by what costs them, and the model's ``total``.

    ``issue`` are the cycles of one iteration as compiled, if known; ``visited`` is the share of iterations that are not
    skipped.
    """
    rate = 1 / chip.macs[problem.dtype] + 1 / chip.macs[second_dtype(problem.dtype)]
    tensor = loop_macs(problem, tile) * rate / TENSOR_REACH
    row_bytes, column_bytes = operand_bytes(problem, tile)
    l2 = (row_bytes + column_bytes) / (chip.l2 * L2_REACH)
    issue = loop_issue(problem, tile) if issue is None else issue
    # Written once, rows read once into registers, columns read by the products of every 64 rows.
    rows = STACKED_ROWS if problem.kind == "grad_weight" else tile.rows
    shared = (2 * row_bytes + (1 + rows / 64) * column_bytes) / 128
    if problem.kind == "grad_weight":
        parts = splits(problem, tile, chip)
        steps: float = math.ceil(problem.samples * boxes(problem.size, tile.box) / parts)
        count = programs(problem, tile) * parts
    else:
        steps = math.prod(problem.kernel) * math.ceil(problem.channels / tile.channels)
        count = programs(problem, tile)
    steps *= visited
    epilogue = rows * tile.columns * EPILOGUE[problem.kind]
    together = min(resident(problem, tile, chip), math.ceil(count / chip.multiprocessors))
    waves = math.ceil(count / (chip.multiprocessors * together))
    busy = together * (steps * max(tensor, l2, shared, issue) + epilogue)
    alone = steps * (tensor + issue + LATENCY[problem.kind]) + epilogue
    in_all = waves * together
    return {
        "tensor": in_all * steps * tensor,
        "l2": in_all * steps * l2,
        "shared": in_all * steps * shared,
        "issue": in_all * steps * issue,
        "epilogue": in_all * epilogue,
        "total": waves * max(busy, alone),
    }


def ranked(problem: Problem, chip: Chip) -> list[Tile]:
    """The candidates, the one with the least estimate first.

    Raises
    ------
    ValueError
        If no tile fits the chip.
    """
    found = candidates(problem, chip)
    if not found:
        raise ValueError(
            f"no tile of {problem.kind} in {problem.dtype} fits the {chip.shared >> 10} KB of shared memory of "
            f"{chip.name}; use backend='reference'"
        )
    # Of equal estimates the one with fewer steps.
    return sorted(found, key=lambda tile: (round(estimate(problem, tile, chip)["total"]), -tile.channels))


@lru_cache(maxsize=512)
def choose(problem: Problem, chip: Chip) -> Tile:
    """The candidate with the least estimate on the chip."""
    return ranked(problem, chip)[0]
