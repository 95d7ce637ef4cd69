"""The chips that kernels are compiled for, and the rates by which tiles are chosen and times are modelled."""

from dataclasses import dataclass, replace

__all__ = ["CHIPS", "L2_REACH", "TENSOR_REACH", "WARP", "Chip"]

WARP = 32  # threads


@dataclass(frozen=True, eq=False)  # each is one chip, so a plan is found by identity
class Chip:
    """Rates of one chip, per multiprocessor and cycle where not said otherwise."""

    name: str
    arch: str  # whose machine code it runs
    multiprocessors: int
    clock: float  # Hz, at which the vendor states its peak
    macs: dict[str, int]  # peak tensor-core multiply-adds by the dtype of the operands
    l2: float  # bytes from L2, at most
    dram: float  # bytes per second of the whole chip
    shared: int  # bytes of shared memory that the programs on a multiprocessor can have
    holds: int = 238  # registers of a thread that accumulators and operands may fill without spilling, as compiled
    warp_matrix: bool = False  # matrix instructions of one warp, fed from registers, not of four fed from shared memory
    tensor_memory: bool = False  # accumulators live there and not in registers

    @property
    def rows_per_warp(self) -> int:
        """Rows of a tile for each warp."""
        return 16 if self.warp_matrix else 32


# What products reach of the peak was measured on an H200: 795 of 989 TFLOP/s in bf16. Assumed for all chips.
TENSOR_REACH = 0.804
# 5120 bytes per cycle from L2 are stated for the A100 and assumed for H100 and B200: 9.4 TB/s on an H200, where copies
# were measured to move 5.3 TB/s; 6.8 TB/s fit the times of tiles best. Assumed for all chips, too.
L2_REACH = 0.72

# Peak products, clocks and memory rates are those of NVIDIA's A100, H100 SXM and DGX B200 data sheets.
CHIPS = {
    "sm_80": Chip(
        "A100 SXM 80GB", "sm_80", 108, 1.41e9, {"bf16": 1024, "fp16": 1024, "tf32": 512, "ieee": 64},
        5120 / 108, 2.04e12, 163 << 10,
        holds=115, warp_matrix=True,
    ),
    "sm_90": Chip(
        "H100 SXM", "sm_90", 132, 1.83e9, {"bf16": 2048, "fp16": 2048, "tf32": 1024, "ieee": 128},
        5120 / 132, 3.35e12, 227 << 10,
    ),
    "sm_100": Chip(
        "B200", "sm_100", 148, 1.85e9, {"bf16": 4096, "fp16": 4096, "tf32": 2048, "ieee": 128},
        5120 / 148, 8.0e12, 227 << 10,
        holds=200, tensor_memory=True,
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
