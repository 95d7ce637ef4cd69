"""How tensors are laid out for the kernels: voxels last, taps folded into channels, strides split into phases."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from dwc_kernels.geometry import Triple
from dwc_kernels.kernels.launch import Geometry

__all__ = ["described", "fold_taps", "split_phases", "voxels_last"]


def described(x: Tensor) -> Tensor:
    """x as a descriptor takes it: contiguous, at a 16-byte address, and with the regular strides.

    PyTorch lets a dimension of size 1 have any stride; a descriptor wants a multiple of 16 bytes there, too.
    """
    x = x.contiguous()
    if 1 in x.shape:
        x = x.view(-1).view(x.shape)
    return x if x.data_ptr() % 16 == 0 else x.clone()


def voxels_last(x: Tensor) -> Tensor:
    """[N, C, D, H, W] -> [N, D, H, W, C'] with C' - C zero channels, so that a voxel is a multiple of 16 bytes.

    A view where x has that layout already.
    """
    x = x.permute(0, 2, 3, 4, 1)
    missing = padding_channels(x)
    return described(F.pad(x, (0, missing)) if missing else x)


def padding_channels(x: Tensor) -> int:
    """Elements by which the last dimension falls short of a multiple of 16 bytes."""
    return -x.shape[-1] % (16 // x.element_size())


def fold_taps(x: Tensor, geometry: Geometry) -> Tensor:
    """[N, C, D, H, W] -> [N, D', H', W', taps * C and zeros to a multiple of 16 bytes]: taps become channels.

    With one to four channels, a block of a product would be mostly zeros; folded, the sum over taps fills it.
    """
    size, n_folded = geometry.output_size(x.shape[2:]), x.shape[1] * math.prod(geometry.kernel)
    sides = [side for p in reversed(geometry.padding) for side in (p, p)]
    x = F.pad(x.permute(0, 2, 3, 4, 1), (0, 0, *sides))
    sample, *voxel, channel = x.stride()
    steps = [n * s for n, s in zip(voxel, geometry.stride, strict=True)]
    reach = [n * d for n, d in zip(voxel, geometry.dilation, strict=True)]
    taps = x.as_strided((x.shape[0], *size, *geometry.kernel, x.shape[4]), (sample, *steps, *reach, channel))
    missing = -n_folded % (16 // x.element_size())
    folded = x.new_empty(x.shape[0], *size, n_folded + missing)
    folded[..., :n_folded].view(taps.shape).copy_(taps)
    folded[..., n_folded:] = 0
    return folded


def split_phases(x: Tensor, stride: Triple) -> Tensor:
    """[N, C, D, H, W] -> [phases * N, D / sD, H / sH, W / sW, C'], sizes rounded up and filled with zeros.

    Voxel (d, h, w) lies in phase (d mod sD, h mod sH, w mod sW), so that a tap of a strided convolution reads
    neighbouring voxels of one phase.
    """
    x = x.permute(0, 2, 3, 4, 1)
    ends = [-n % s for n, s in zip(x.shape[1:4], stride, strict=True)]
    x = F.pad(x, (0, padding_channels(x), 0, ends[2], 0, ends[1], 0, ends[0]))
    d, h, w = (n // s for n, s in zip(x.shape[1:4], stride, strict=True))
    x = x.reshape(-1, d, stride[0], h, stride[1], w, stride[2], x.shape[4]).permute(2, 4, 6, 0, 1, 3, 5, 7)
    return described(x.reshape(-1, d, h, w, x.shape[-1]))


def empty_voxels_last(like: Tensor, n_channels: int, size: Triple) -> Tensor:
    """An empty [N, n_channels, *size] in channels_last_3d."""
    shape = (like.shape[0], n_channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last_3d)
