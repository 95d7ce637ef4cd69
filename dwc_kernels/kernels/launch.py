"""The plan of a launch, and the launch itself: which chip, which tile, which descriptors. No kernel lives here."""

import math
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dwc_kernels.backends import why_not_triton
from dwc_kernels.geometry import Triple, output_size
from dwc_kernels.kernels.chips import CHIPS, Chip
from dwc_kernels.kernels.tiles import Problem, Tile, problem_of
from dwc_kernels.kernels.tuned import tile_for

__all__ = ["Geometry", "Plan", "asked", "chip_of", "descriptor", "forget_plans", "run_on"]

ONE = (1, 1, 1)


def triple(values: Iterable[int]) -> Triple:
    """Three integers as a tuple."""
    d, h, w = values
    return d, h, w


@dataclass(frozen=True)
class Geometry:
    """Kernel, padding, dilation and stride of a convolution."""

    kernel: Triple
    padding: Triple
    dilation: Triple
    stride: Triple = ONE

    POINT: ClassVar["Geometry"]  # of a 1x1x1 convolution

    def output_size(self, size: Iterable[int]) -> Triple:
        """Voxels that come out along D, H, W."""
        return output_size(triple(size), self.kernel, self.stride, self.padding, self.dilation)

    def adjoint(self) -> "Geometry":
        """The convolution with the mirrored filter that is the adjoint of this one, at stride 1."""
        reach = (d * (k - 1) - p for k, p, d in zip(self.kernel, self.padding, self.dilation, strict=True))
        return Geometry(self.kernel, triple(reach), self.dilation)


Geometry.POINT = Geometry(ONE, (0, 0, 0), ONE)


@lru_cache(maxsize=64)
def chip_of(device: torch.device) -> Chip:
    """The chip of `tiles.CHIPS` whose machine code the device runs, with the device's own name and sizes."""
    if device.type != "cuda":
        return CHIPS["interpreter"]
    properties = torch.cuda.get_device_properties(device)
    major, minor = properties.major, properties.minor
    nearest = "sm_80" if (major, minor) == (8, 0) else {8: "sm_89", 9: "sm_90", 12: "sm_120"}.get(major, "sm_100")
    return replace(
        CHIPS[nearest],
        name=properties.name,
        multiprocessors=properties.multi_processor_count,
        shared=properties.shared_memory_per_block_optin,  # type: ignore[attr-defined]
    )


def operand_dtype(x: Tensor, chip: Chip) -> str:
    """What the products multiply: "bf16", "fp16", or for fp32 "tf32" or "ieee", as PyTorch is told for convolutions."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(x.dtype)
    precision = torch.backends.cudnn.conv.fp32_precision  # type: ignore[attr-defined]
    tf32 = precision == "tf32" and chip.arch != "interpreter"
    return half or ("tf32" if tf32 else "ieee")


@dataclass(frozen=True)
class Plan:
    """How one launch runs: what is asked, of which chip, with which tile."""

    problem: Problem
    chip: Chip
    tile: Tile

    @classmethod
    def of(
        cls, kind: str, x: Tensor, size: Iterable[int], weight: Tensor, stride: Triple, groups: int, tile: Tile | None
    ) -> "Plan":
        """The plan for x [N, C, D, H, W], output voxels ``size`` and weight [F, C, kD, kH, kW].

        Raises
        ------
        ValueError
            If the kernels cannot run on these arguments, saying why.
        """
        problem, chip = asked(kind, x, triple(size), weight, stride, groups)
        return _planned(problem, chip) if tile is None else cls(problem, chip, tile)

    @cached_property
    def precision(self) -> str:
        """How fp32 operands are multiplied. With fp16 the variance is fp32 and needs no more than fp16's 11 bits."""
        exact = self.problem.dtype == "ieee" or self.chip.arch == "interpreter"
        return "ieee" if exact else "tf32"

    @cached_property
    def loop(self) -> tuple[int, ...]:
        """BD, BH, BW, BC, C_STEPS, N0, N1 of `products.both_products`."""
        tile = self.tile
        steps = math.ceil(self.problem.channels / tile.channels)
        return (*tile.box, tile.channels, steps, tile.wide, tile.tail)

    def descriptor(self, x: Tensor, block: list[int]) -> TensorDescriptor | Tensor | None:
        """A descriptor of x for such blocks, None for empty ones."""
        return descriptor(x, block, self.chip) if math.prod(block) else None

    def columns(self, mu: Tensor, var: Tensor) -> list[TensorDescriptor | Tensor | None]:
        """Descriptors of packed weights [taps, columns, channels]: mu (wide, tail) and sigma^2 (wide, tail)."""
        tile = self.tile
        return [self.descriptor(t, [1, n, tile.channels]) for t in (mu, var) for n in (tile.wide, tile.tail)]

    def launch(
        self, kernel: JITFunction, programs: int, device: torch.device, *arguments: Any, **constants: Any
    ) -> None:
        """Run the programs of one of the three main kernels."""
        run_on(
            device, kernel, programs, *arguments, **constants, PRECISION=self.precision, ARCH=self.chip.arch,
            num_warps=self.tile.warps, num_stages=self.tile.stages,
        )  # fmt: skip


def descriptor(x: Tensor, block: list[int], chip: Chip) -> TensorDescriptor | Tensor:
    """A descriptor of x for such blocks; x itself where `voxel_blocks` makes its own."""
    return x if chip.arch == "sm_80" else TensorDescriptor.from_tensor(x, block)


def run_on(device: torch.device, kernel: JITFunction, programs: int, *arguments: Any, **options: Any) -> None:
    """Run the programs on a device, in its current stream."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **options)


def asked(kind: str, x: Tensor, size: Triple, weight: Tensor, stride: Triple, groups: int) -> tuple[Problem, Chip]:
    """What a launch is asked for, and of which chip; the arguments and errors of `Plan.of`."""
    reason = why_not_triton(x, weight, size, stride, groups)
    if reason:
        raise ValueError(f"the Triton kernels cannot run: {reason}")
    chip, tiled = chip_of(x.device), triple(x.shape[2:]) if kind == "grad_input" else size
    return _problem(kind, operand_dtype(x, chip), x.shape[0], tiled, weight.shape, stride), chip


@lru_cache(maxsize=4096)
def _problem(
    kind: str, dtype: str, samples: int, size: tuple[int, ...], weight_shape: torch.Size, stride: Triple
) -> Problem:
    filters, channels, *kernel = weight_shape
    return problem_of(kind, dtype, samples, triple(size), channels, filters, triple(kernel), stride)


@lru_cache(maxsize=4096)
def _planned(problem: Problem, chip: Chip) -> Plan:
    return Plan(problem, chip, tile_for(problem, chip))


def forget_plans() -> None:
    """Plan anew from here on, with the tiles that are on file by then."""
    _planned.cache_clear()
