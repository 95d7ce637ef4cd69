"""What the three launchers share: the plan of a launch, layouts and descriptors. No kernel lives here."""

import math
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.runtime import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from dwc_kernels.backends import why_not_triton
from dwc_kernels.geometry import Triple, output_size
from dwc_kernels.kernels.tiles import CHIPS, Chip, Problem, Tile, problem_of, tile_for

ONE = (1, 1, 1)


@dataclass(frozen=True)
class Geometry:
    """Kernel, padding and dilation of a convolution at stride 1."""

    kernel: Triple
    padding: Triple
    dilation: Triple

    POINT: ClassVar["Geometry"]  # of a 1x1x1 convolution

    def output_size(self, size: Triple) -> Triple:
        return output_size(size, self.kernel, ONE, self.padding, self.dilation)

    def adjoint(self) -> "Geometry":
        """The convolution with the mirrored filter that is this one's adjoint."""
        reach = (d * (k - 1) - p for k, p, d in zip(self.kernel, self.padding, self.dilation, strict=True))
        return Geometry(self.kernel, tuple(reach), self.dilation)


Geometry.POINT = Geometry(ONE, (0, 0, 0), ONE)


@lru_cache(maxsize=64)
def chip_of(device: torch.device) -> Chip:
    """The chip of `tiles.CHIPS` whose machine code the device runs, with the device's own name and sizes."""
    if device.type != "cuda":
        return CHIPS["interpreter"]
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return replace(CHIPS["gfx942"], name=properties.name, multiprocessors=properties.multi_processor_count)
    major, minor = properties.major, properties.minor
    nearest = "sm_80" if (major, minor) == (8, 0) else {8: "sm_89", 9: "sm_90", 12: "sm_120"}.get(major, "sm_100")
    return replace(
        CHIPS[nearest],
        name=properties.name,
        multiprocessors=properties.multi_processor_count,
        shared=properties.shared_memory_per_block_optin,
    )


def operand_dtype(x: Tensor, chip: Chip) -> str:
    """What the products multiply: "bf16", "fp16", or for fp32 "tf32" or "ieee", as PyTorch is told for convolutions."""
    half = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(x.dtype)
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32" and chip.arch != "interpreter"
    return half or ("tf32" if tf32 else "ieee")


@dataclass(frozen=True)
class Plan:
    """How one launch runs: what is asked, of which chip, with which tile."""

    problem: Problem
    chip: Chip
    tile: Tile

    @classmethod
    def of(
        cls, kind: str, x: Tensor, size: Triple, weight: Tensor, stride: Triple, groups: int, tile: Tile | None
    ) -> "Plan":
        """The plan for x [N, C, D, H, W], output voxels ``size`` and weight [F, C, kD, kH, kW].

        Raises
        ------
        ValueError
            If the kernels cannot run on these arguments, saying why.
        """
        reason = why_not_triton(x, weight, size, stride, groups)
        if reason:
            raise ValueError(f"the Triton kernels cannot run: {reason}")
        chip, (filters, channels, *kernel) = chip_of(x.device), weight.shape
        tiled = x.shape[2:] if kind == "grad_input" else size
        problem = problem_of(kind, operand_dtype(x, chip), x.shape[0], tiled, channels, filters, kernel)
        return cls(problem, chip, tile or tile_for(problem, chip))

    @property
    def precision(self) -> str:
        """How fp32 operands are multiplied. With fp16 the variance is fp32 and needs no more than fp16's 11 bits."""
        exact = self.problem.dtype == "ieee" or self.chip.arch == "interpreter"
        return "ieee" if exact else "tf32"

    @property
    def loop(self) -> tuple[int, ...]:
        """BD, BH, BW, BC, C_BLOCKS, C_STEPS, N0, N1 of `products.both_products`."""
        tile = self.tile
        steps = math.ceil(self.problem.channels / (tile.channels * tile.unroll))
        return (*tile.box, tile.channels, tile.unroll, steps, tile.wide, tile.tail)

    def descriptor(self, x: Tensor, block: list[int]) -> TensorDescriptor | Tensor | None:
        """A descriptor of x for such blocks; None for empty ones; x itself where `voxel_blocks` makes its own."""
        if not math.prod(block):
            return None
        return x if self.chip.arch in ("sm_80", "gfx942") else TensorDescriptor.from_tensor(x, block)

    def columns(self, weight_mu: Tensor, weight_sigma: Tensor, rows: Tensor) -> list:
        """Descriptors of mu (wide, tail) and of sigma^2 (wide, tail) to multiply with rows [N, D, H, W, C'].

        sigma^2 multiplies in bf16 or in fp32, never in fp16.
        """
        squares = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
        mu = pack(weight_mu, rows.dtype, self.precision, rows.shape[-1])
        var = pack(weight_sigma.float().square(), squares, self.precision, rows.shape[-1])
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


def run_on(device: torch.device, kernel: JITFunction, programs: int, *arguments: Any, **options: Any) -> None:
    """Run the programs on a device, in its current stream."""
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **options)


def voxels_last(x: Tensor) -> Tensor:
    """[N, C, D, H, W] -> [N, D, H, W, C'], contiguous and 16-byte aligned, with C' - C zero channels so that a voxel is
    a multiple of 16 bytes, as descriptors want it. A view where x has that layout already."""
    x = x.permute(0, 2, 3, 4, 1)
    missing = -x.shape[-1] % (16 // x.element_size())
    x = F.pad(x, (0, missing)) if missing else x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def pack(weight: Tensor, dtype: torch.dtype, precision: str, width: int) -> Tensor:
    """[F, C, kD, kH, kW] -> [taps, F, width] in ``dtype``, rounded to tf32 if ``precision`` says so."""
    n_filters, channels = weight.shape[:2]
    packed = weight.to(dtype).permute(2, 3, 4, 0, 1).reshape(-1, n_filters, channels)
    packed = F.pad(packed, (0, width - channels)).contiguous()
    if dtype == torch.float32 and precision == "tf32":
        packed = ((packed.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return packed


def fold_weight(weight: Tensor) -> Tensor:
    """[F, C, kD, kH, kW] -> [F, taps * C, 1, 1, 1], in the order of `fold_taps`."""
    return weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], -1, 1, 1, 1)


def fold_taps(x: Tensor, geometry: Geometry) -> Tensor:
    """[N, C, D, H, W] -> [N, D', H', W', taps * C and zeros to a multiple of 16 bytes]: taps become channels.

    With a channel or three, a block of a product would be mostly zeros; folded, the sum over taps fills it.
    """
    size, n_folded = geometry.output_size(x.shape[2:]), x.shape[1] * math.prod(geometry.kernel)
    sides = [side for p in reversed(geometry.padding) for side in (p, p)]
    x = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, *sides))
    strides = x.stride()
    taps = x.as_strided(
        (x.shape[0], *size, *geometry.kernel, x.shape[4]),
        (*strides[:4], *(d * s for d, s in zip(geometry.dilation, strides[1:4], strict=True)), strides[4]),
    )
    folded = x.new_empty(x.shape[0], *size, n_folded + -n_folded % (16 // x.element_size()))
    folded[..., :n_folded].view(taps.shape).copy_(taps)
    folded[..., n_folded:] = 0
    return folded
