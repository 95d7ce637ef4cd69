"""Which tile a kernel uses: a small stated model, and what ``dwc_kernels.tune`` measured where it ran. Nothing compiles here.

A tile is good when its accumulators fit the registers, its pipeline fits shared memory, little arrives per product, few
columns are idle and the last wave of programs is full. ``choose`` estimates each candidate's time as

    waves * (steps * max(tensor-core cycles, L2 cycles, shared-memory cycles) + epilogue cycles)

and takes the least. The rates are peak rates of the chips, so the time is a lower bound; only the order matters here.
"""

import math
from dataclasses import dataclass

__all__ = ["CHIPS", "KINDS", "Chip", "Problem", "Tile", "candidates", "choose", "estimate"]

KINDS = ("forward", "grad_input", "grad_weight")


@dataclass(frozen=True)
class Chip:
    """Rates of one chip, per multiprocessor and cycle where not said otherwise."""

    name: str
    multiprocessors: int
    clock: float  # Hz, at which the vendor states its peak
    macs: dict[str, int]  # tensor-core multiply-adds by the dtype of the operands
    l2: float  # bytes from L2
    dram: float  # bytes per second of the whole chip
    shared: int  # bytes of shared memory that the programs on a multiprocessor can have
    registers: int = 255  # most a thread can have
    accumulators: int = 192  # registers of a thread that accumulators may fill
    warp: int = 32


# Peak products, clocks and memory rates: NVIDIA's A100, H100 SXM and DGX B200 data sheets and AMD's MI300X data sheet.
# L2: 5120 bytes per cycle is A100's stated figure (A100 whitepaper); the others are taken to be no better per chip.
CHIPS = {
    "sm_80": Chip("A100 SXM 80GB", 108, 1.41e9, {"bf16": 1024, "fp16": 1024, "tf32": 512, "ieee": 64}, 5120 / 108, 2.04e12, 163 << 10, accumulators=128),
    "sm_90": Chip("H100 SXM", 132, 1.83e9, {"bf16": 2048, "fp16": 2048, "tf32": 1024, "ieee": 128}, 5120 / 132, 3.35e12, 227 << 10),
    "sm_100": Chip("B200", 148, 1.85e9, {"bf16": 4096, "fp16": 4096, "tf32": 2048, "ieee": 128}, 5120 / 148, 8.0e12, 227 << 10),
    "gfx942": Chip("MI300X", 304, 2.1e9, {"bf16": 1024, "fp16": 1024, "tf32": 512, "ieee": 128}, 64, 5.3e12, 64 << 10, 512, 256, 64),
}  # fmt: skip


@dataclass(frozen=True)
class Problem:
    """What a kernel is asked for: ``channels`` are summed over, ``columns`` come out (grad_weight: rows and columns)."""

    kind: str
    dtype: str  # "bf16", "fp16", "tf32" or "ieee": of the operands
    samples: int
    size: tuple[int, int, int]  # voxels of the box that is tiled
    channels: int
    columns: int
    kernel: tuple[int, int, int]

    @property
    def itemsize(self) -> int:
        return 2 if self.dtype in ("bf16", "fp16") else 4


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
