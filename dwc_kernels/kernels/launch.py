"""What the three launchers share: geometry, layouts, descriptors and the capability check. No kernel lives here."""

import math
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dwc_kernels.backends import why_not_triton
from dwc_kernels.kernels.tiles import Problem, Tile

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """Kernel, padding and dilation of a convolution at stride 1."""

    kernel: Triple
    padding: Triple
    dilation: Triple

    POINT: ClassVar["Geometry"]  # of a 1x1x1 convolution

    def output_size(self, size: Triple) -> Triple:
        return tuple(
            n + 2 * p - d * (k - 1) for n, k, p, d in zip(size, self.kernel, self.padding, self.dilation, strict=True)
        )

    def adjoint(self) -> "Geometry":
        """The convolution with the mirrored filter that is this one's adjoint."""
        reach = (d * (k - 1) - p for k, p, d in zip(self.kernel, self.padding, self.dilation, strict=True))
        return Geometry(self.kernel, tuple(reach), self.dilation)


Geometry.POINT = Geometry((1, 1, 1), (0, 0, 0), (1, 1, 1))


def require(x: Tensor, weight: Tensor, stride: Triple, groups: int) -> None:
    """Refuse arguments that the kernels cannot take."""
    reason = why_not_triton(x, weight, stride, groups)
    if reason:
        raise ValueError(f"the Triton kernels cannot run: {reason}")


def architecture(device: torch.device) -> str:
    """The key of the chip in `tiles.CHIPS` that is most like the device."""
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    major, _ = torch.cuda.get_device_capability(device)
    return {8: "sm_80", 9: "sm_90"}.get(major, "sm_100")


@lru_cache(maxsize=64)
def device_name(device: torch.device) -> str:
    """The name under which tiles measured on the device are stored."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def device_of(x: Tensor):
    """A context in which launches go to the tensor's device."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def precision(x: Tensor) -> str:
    """How fp32 operands are multiplied: "tf32" or "ieee", as PyTorch is told for convolutions; exact on the CPU.

    With fp16 only the variance is fp32, and it is never exact: fp16's own 11 bits are all it has.
    """
    if x.dtype == torch.float16:
        return "tf32" if x.is_cuda else "ieee"
    return "tf32" if x.is_cuda and torch.backends.cudnn.conv.fp32_precision == "tf32" else "ieee"


def problem(kind: str, x: Tensor, size: Triple, channels: int, columns: int, kernel: Triple) -> Problem:
    """The problem as the tile model knows it."""
    dtype = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(x.dtype) or precision(x)
    return Problem(kind, dtype, x.shape[0], tuple(size), channels, columns, kernel)


def voxels_last(x: Tensor) -> Tensor:
    """[N, C, D, H, W] -> [N, D, H, W, C'], contiguous and 16-byte aligned, with C' - C zero channels so that a voxel is
    a multiple of 16 bytes, as descriptors want it. A view where x has that layout already."""
    x = x.permute(0, 2, 3, 4, 1)
    missing = -x.shape[-1] % (16 // x.element_size())
    x = F.pad(x, (0, missing)) if missing else x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def pack(weight: Tensor, dtype: torch.dtype, how: str, width: int) -> Tensor:
    """[F, C, kD, kH, kW] -> [taps, F, width] in ``dtype``, rounded to tf32 if ``how`` says so."""
    n_filters, channels = weight.shape[:2]
    packed = weight.to(dtype).permute(2, 3, 4, 0, 1).reshape(-1, n_filters, channels)
    packed = F.pad(packed, (0, width - channels)).contiguous()
    if dtype == torch.float32 and how == "tf32":
        packed = ((packed.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return packed


def column_descriptors(
    weight_mu: Tensor, weight_sigma: Tensor, rows: Tensor, how: str, tile: Tile, arch: str
) -> list[TensorDescriptor | Tensor | None]:
    """Descriptors of mu (wide, tail) and of sigma^2 (wide, tail) to multiply with rows [N, D, H, W, C'].

    sigma^2 multiplies in bf16 or in fp32, never in fp16.
    """
    squares = torch.bfloat16 if rows.dtype == torch.bfloat16 else torch.float32
    mu = pack(weight_mu, rows.dtype, how, rows.shape[-1])
    var = pack(weight_sigma.float().square(), squares, how, rows.shape[-1])
    return [descriptor(t, [1, n, tile.channels], arch) for t in (mu, var) for n in (tile.wide, tile.tail)]


def loop_constants(tile: Tile, channels: int) -> tuple[int, ...]:
    """BD, BH, BW, BC, C_BLOCKS, C_STEPS, N0, N1 of `products.both_products`."""
    steps = math.ceil(channels / (tile.channels * tile.unroll))
    return (*tile.box, tile.channels, tile.unroll, steps, tile.wide, tile.tail)


def folds(weight: Tensor) -> bool:
    """Whether taps become channels: where a block of channels would be mostly padding."""
    return weight.shape[1] <= 4 and 1 < weight[0].numel() <= 128


def fold_weight(weight: Tensor) -> Tensor:
    """[F, C, kD, kH, kW] -> [F, taps * C, 1, 1, 1], in the order of `fold_taps`."""
    return weight.permute(0, 2, 3, 4, 1).reshape(weight.shape[0], -1, 1, 1, 1)


def fold_taps(x: Tensor, geometry: Geometry) -> Tensor:
    """[N, C, D, H, W] -> [N, taps * C, D', H', W']: taps become channels, tap by tap.

    With a channel or three, a block of a product would be mostly zeros; folded, the sum over taps fills it.
    """
    size = geometry.output_size(x.shape[2:])
    sides = [side for p in reversed(geometry.padding) for side in (p, p)]
    x = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, *sides))
    strides = x.stride()
    taps = x.as_strided(
        (x.shape[0], *size, *geometry.kernel, x.shape[4]),
        (*strides[:4], *(d * s for d, s in zip(geometry.dilation, strides[1:4], strict=True)), strides[4]),
    )
    return taps.flatten(4).permute(0, 4, 1, 2, 3)


def descriptor(x: Tensor, block: list[int], arch: str) -> TensorDescriptor | Tensor | None:
    """A descriptor of x for blocks of one shape; None for empty blocks; x itself where `voxel_blocks` makes its own."""
    if not math.prod(block):
        return None
    return x if arch in ("sm_80", "gfx942") else TensorDescriptor.from_tensor(x, block)
