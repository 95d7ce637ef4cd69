"""What the three launchers share: geometry, layouts, descriptors and the capability check. No kernel lives here."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dwc_kernels.kernels.tiles import Problem

__all__ = ["Geometry", "descriptor", "fold_taps", "grid_of", "pack", "precision", "problem", "voxels_last"]

Triple = tuple[int, int, int]


@dataclass(frozen=True)
class Geometry:
    """Kernel, padding and dilation of a convolution at stride 1."""

    kernel: Triple
    padding: Triple
    dilation: Triple

    def output_size(self, size: Triple) -> Triple:
        return tuple(
            n + 2 * p - d * (k - 1) for n, k, p, d in zip(size, self.kernel, self.padding, self.dilation, strict=True)
        )

    def adjoint(self) -> "Geometry":
        """The convolution with the mirrored filter that is this one's adjoint."""
        reach = (d * (k - 1) - p for k, p, d in zip(self.kernel, self.padding, self.dilation, strict=True))
        return Geometry(self.kernel, tuple(reach), self.dilation)


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


def pack(weight: Tensor, dtype: torch.dtype, how: str) -> Tensor:
    """[F, C, kD, kH, kW] -> [taps, F, C'] in ``dtype``, rounded to tf32 if ``how`` says so; C' as in `voxels_last`."""
    n_filters, channels = weight.shape[:2]
    packed = weight.to(dtype).permute(2, 3, 4, 0, 1).reshape(-1, n_filters, channels)
    packed = F.pad(packed, (0, -channels % (16 // packed.element_size()))).contiguous()
    if dtype == torch.float32 and how == "tf32":
        packed = ((packed.view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)
    return packed


def square(sigma: Tensor, dtype: torch.dtype) -> tuple[Tensor, torch.dtype]:
    """sigma^2 and the dtype in which it multiplies: bf16 for bf16, fp32 for anything else."""
    return sigma.float().square(), dtype if dtype == torch.bfloat16 else torch.float32


def fold_taps(x: Tensor, geometry: Geometry) -> Tensor:
    """[N, C, D, H, W] -> [N, taps * C, D', H', W']: taps become channels, tap by tap.

    With a channel or three, a block of a product would be mostly zeros; folded, the sum over taps fills it.
    """
    sides = [side for p in reversed(geometry.padding) for side in (p, p)]
    x = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, *sides))
    strides = x.stride()
    taps = x.as_strided(
        (x.shape[0], *geometry.output_size_padded(x.shape[1:4]), *geometry.kernel, x.shape[4]),
        (*strides[:4], *(d * s for d, s in zip(geometry.dilation, strides[1:4], strict=True)), strides[4]),
    )
    return taps.flatten(4).permute(0, 4, 1, 2, 3)


def descriptor(x: Tensor, block: list[int]) -> TensorDescriptor | None:
    """A descriptor of x for blocks of one shape; None for empty blocks."""
    return TensorDescriptor.from_tensor(x, block) if math.prod(block) else None
