"""3x3x3 convolutions with 8 products per voxel and channel pair instead of 27, for the CPU.

Winograd's F(2, 3), along each of the three axes: 4 products give two neighbouring outputs of a 3-tap filter, so 64 give
a 2x2x2 tile. With point matrices B, G and A (Lavin and Gray 2016, section 4.1), y = A'[(G w) (B' x)], and the weight
gradient is its adjoint, dw = G'[(A g) (B' x)]; the products over channels are batched matrix products. A dilated
convolution is one undilated convolution on each interleaved lattice of the volume, so a tile's voxels lie a dilation
apart. Additions and halvings only: the error stays that of direct fp32 sums. But a tile's outputs are differences of
shared terms, so a sum that must not be negative, as a variance, has no place here.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import product
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["convolve", "correlate", "onednn_wins", "suits"]

Triple = tuple[int, ...]  # of three
Slices = Sequence[Tensor]

_G = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
# Below, transforms and small matrix products cost more than the products that are saved.
_CHANNEL_PAIRS, _TILES = 64 * 64, 64


def suits(x: Tensor, weight_shape: Sequence[int], stride: Triple, padding: Triple, dilation: Triple) -> bool:
    """Whether `convolve` and `correlate` can run here, and are faster than direct sums that skip the padding.

    Parameters
    ----------
    x : Tensor
        [N, C, D, H, W].
    weight_shape : sequence of int
        [F, C, kD, kH, kW]; with groups, kernels other than 3x3x3, strides or dtypes other than fp32 the answer is no.
    stride, padding, dilation : tuple of int
        As for conv3d.
    """
    n_filters, channels, *kernel = weight_shape
    kind = x.device.type == "cpu" and x.dtype == torch.float32 and tuple(kernel) == (3, 3, 3)
    if not kind or tuple(stride) != (1, 1, 1) or channels != x.shape[1] or n_filters * channels < _CHANNEL_PAIRS:
        return False
    out = _out_size(x.shape[2:], padding, dilation)
    tiles = _tiles(out, dilation)
    direct = prod(
        sum(max(0, min(o, size + p - tap * d) - max(0, p - tap * d)) for tap in range(3))
        for o, size, p, d in zip(out, x.shape[2:], padding, dilation, strict=True)
    )
    points = 64 * prod(t * d for t, d in zip(tiles, dilation, strict=True))
    return tiles[1] * dilation[1] * tiles[2] * dilation[2] >= _TILES and points < 0.6 * direct


def onednn_wins(
    x: Tensor,  # [N, C, D, H, W]
    weight_shape: Sequence[int],  # [F, C / groups, kD, kH, kW]
    stride: Triple,
    padding: Triple,
    dilation: Triple,
    groups: int,
) -> bool:
    """Whether PyTorch convolves x by oneDNN with AVX-512, so near the CPU's peak that shorter sums win nothing.

    With AVX2, and for single small volumes, PyTorch is two to four times slower.
    """
    if x.device.type != "cpu" or x.dtype != torch.float32 or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    weight = x.new_empty(()).expand(weight_shape)
    geometry = (stride, padding, dilation, False, (0, 0, 0), groups)
    return torch._C._select_conv_backend(x, weight, None, *geometry) == torch._C._ConvBackend.Mkldnn  # type: ignore[attr-defined]


def convolve(x: Tensor, weight: Tensor, padding: Triple, dilation: Triple, times: Tensor | None = None) -> Tensor:
    """conv3d(x * times, weight) at stride 1; the product is formed on the way into the tiles.

    Parameters
    ----------
    x : Tensor
        fp32 [N, C, D, H, W], on the CPU.
    weight : Tensor
        fp32 [F, C, 3, 3, 3].
    padding, dilation : tuple of int
        As for conv3d.
    times : Tensor, optional
        As x; without it, x is convolved as it is.

    Returns
    -------
    Tensor
        fp32 [N, F, D', H', W'], channels_last_3d.
    """
    n_filters, channels = weight.shape[:2]
    out = _out_size(x.shape[2:], padding, dilation)
    tiles = _tiles(out, dilation)
    g = weight.new_tensor(_G)
    filters = torch.einsum("ai,bj,ck,fxijk->abcxf", g, g, g, weight).reshape(64, channels, n_filters)
    points = _Points(_INPUT, tiles, dilation, channels)
    products = _scratch(4, 4, 4, *points.slab, n_filters)
    along_d, along_dh = _scratch(2, *products.shape[1:]), _scratch(2, 2, *products.shape[2:])
    y = _scratch(len(x), *(2 * t * d for t, d in zip(tiles, dilation, strict=True)), n_filters)
    (td, th, tw), (dd, dh, dw) = tiles, dilation
    for n, tiled in enumerate(y.view(-1, td, 2, dd, th, 2, dh, tw, 2, dw, n_filters)):
        for t, phase, transformed in points.of(x, times, n, padding):
            torch.bmm(transformed, filters, out=products.view(64, -1, n_filters))
            _outputs(products.unbind(0), along_d.unbind(0))
            _outputs(along_d.unbind(1), along_dh.unbind(1))
            _outputs(along_dh.unbind(2), tiled[t, :, phase].movedim(2, 1).unbind(5))
    return y[:, : out[0], : out[1], : out[2]].permute(0, 4, 1, 2, 3)


def correlate(
    x: Tensor,
    g: Tensor,
    padding: Triple,
    dilation: Triple,
    x_times: Tensor | None = None,
    g_times: Tensor | None = None,
) -> Tensor:
    """The weight gradient of conv3d(x * x_times, weight) at stride 1; g * g_times is the gradient of its output.

    Parameters
    ----------
    x : Tensor
        fp32 [N, C, D, H, W], on the CPU.
    g : Tensor
        fp32 [N, F, D', H', W'].
    padding, dilation : tuple of int
        As for conv3d.
    x_times, g_times : Tensor, optional
        As x and g.

    Returns
    -------
    Tensor
        fp32 [F, C, 3, 3, 3].
    """
    tiles = _tiles(g.shape[2:], dilation)
    inputs = _Points(_INPUT, tiles, dilation, x.shape[1])
    gradients = _Points(_GRADIENT, tiles, dilation, g.shape[1])
    total = x.new_zeros(64, x.shape[1], g.shape[1])
    for n in range(len(x)):
        both = zip(inputs.of(x, x_times, n, padding), gradients.of(g, g_times, n, (0, 0, 0)), strict=True)
        for (_, _, left), (_, _, right) in both:
            total.baddbmm_(left.transpose(1, 2), right)
    m = x.new_tensor(_G)
    return torch.einsum("ai,bj,ck,abcxf->fxijk", m, m, m, total.view(4, 4, 4, *total.shape[1:]))


def _out_size(size: Sequence[int], padding: Triple, dilation: Triple) -> list[int]:
    return [s + 2 * (p - d) for s, p, d in zip(size, padding, dilation, strict=True)]


def _tiles(out: Sequence[int], dilation: Triple) -> tuple[int, ...]:
    """Tiles that cover an output, along each axis of one lattice."""
    return tuple(-(-o // (2 * d)) for o, d in zip(out, dilation, strict=True))


def _windows(x: Tensor, axis: int, dilation: int) -> Slices:
    """The 4 voxels behind each tile of 2 outputs: an axis of (tiles + 1) 2 d voxels to 4 slices of [tiles, d]."""
    pairs = x.unflatten(axis, (-1, 2, dilation))
    tiles = pairs.shape[axis] - 1
    return tuple(pairs.narrow(axis, later, tiles).select(axis + 1, i) for later in (0, 1) for i in (0, 1))


def _pairs(x: Tensor, axis: int, dilation: int) -> Slices:
    """The 2 voxels of each tile: an axis of tiles 2 d voxels to 2 slices of [tiles, d]."""
    return x.unflatten(axis, (-1, 2, dilation)).unbind(axis + 1)


def _input_points(x: Slices, out: Slices) -> None:
    """B' x, 4 voxels to 4 points."""
    torch.sub(x[0], x[2], out=out[0])
    torch.add(x[1], x[2], out=out[1])
    torch.sub(x[2], x[1], out=out[2])
    torch.sub(x[1], x[3], out=out[3])


def _gradient_points(g: Slices, out: Slices) -> None:
    """A g, 2 voxels to 4 points."""
    out[0].copy_(g[0])
    torch.add(g[0], g[1], out=out[1])
    torch.sub(g[0], g[1], out=out[2])
    torch.neg(g[1], out=out[3])


def _outputs(m: Slices, out: Slices) -> None:
    """A' m, 4 points to 2 voxels."""
    torch.add(m[1], m[2], out=out[0]).add_(m[0])
    torch.sub(m[1], m[2], out=out[1]).sub_(m[3])


class _Transform(NamedTuple):
    """A matrix from the voxels of a tile to its points, along one axis."""

    slices: Callable[[Tensor, int, int], Slices]
    combine: Callable[[Slices, Slices], None]
    overlap: int  # tiles' worth of voxels that the axis needs beyond its tiles


_INPUT = _Transform(_windows, _input_points, 1)
_GRADIENT = _Transform(_pairs, _gradient_points, 0)


class _Points:
    """The transform of a volume to 64 points per tile, a slab of tiles at a time so that it stays in the cache."""

    def __init__(self, transform: _Transform, tiles: Sequence[int], dilation: Triple, channels: int) -> None:
        self.transform, self.dilation = transform, dilation
        self.size = [2 * (t + transform.overlap) * d for t, d in zip(tiles, dilation, strict=True)]
        (_, th, tw), (_, dh, dw) = tiles, dilation
        self.slab = (th, dh, tw, dw)
        self.padded = _scratch(*self.size, channels).zero_()  # its border stays 0
        self.along_d = _scratch(4, *self.size[1:], channels)
        self.along_dh = _scratch(4, 4, th, dh, self.size[2], channels)
        self.points = _scratch(4, 4, 4, *self.slab, channels)

    def of(self, x: Tensor, times: Tensor | None, n: int, padding: Triple) -> Iterator[tuple[int, int, Tensor]]:
        """Each slab of volume n: tile and phase along D, and points [64, tiles, C] that last until the next slab."""
        slices, combine, _ = self.transform
        dd, dh, dw = self.dilation
        inside = self.padded[tuple(slice(p, p + s) for p, s in zip(padding, x.shape[2:], strict=True))]
        sample = x[n].permute(1, 2, 3, 0)
        if times is None:
            inside.copy_(sample)
        else:
            torch.mul(sample, times[n].permute(1, 2, 3, 0), out=inside)
        planes = slices(self.padded, 0, dd)
        for t, phase in product(*map(range, planes[0].shape[:2])):
            combine([p[t, phase] for p in planes], self.along_d.unbind(0))
            combine(slices(self.along_d, 1, dh), self.along_dh.unbind(1))
            combine(slices(self.along_dh, 4, dw), self.points.unbind(2))
            yield t, phase, self.points.view(64, -1, x.shape[1])


def _scratch(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device="cpu")
