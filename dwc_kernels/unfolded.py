"""Convolutions of a few voxels with many weights as matrix products, for the CPU.

PyTorch's convolutions copy the weights into a layout of their own on every call, which costs as much as the products
where each weight meets only a few voxels. Here the input is unfolded instead: one row for each voxel of the output, one
column for each weight of a filter. Squares of sigma are formed a block at a time and never leave the cache.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from dwc_kernels.geometry import Triple

__all__ = ["both_convolutions", "both_correlations", "both_transposed", "suits"]

# Rows of the unfolded input and weights: with more rows PyTorch's convolutions outrun the products, and with more than
# the fewer rows also those by oneDNN with AVX-512, as long as its copies of the weights stay in the cache.
_ROWS, _FEWER_ROWS, _CACHED_WEIGHTS = 32, 8, 1 << 21
_BLOCK = 1 << 19  # weights squared at a time


def suits(x: Tensor, weight: Tensor, dilation: Triple, groups: int, n_rows: int) -> bool:
    """Whether to convolve x [N, C, D, H, W] with weight [F, C, kD, kH, kW] here, to ``n_rows`` output voxels."""
    here = x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)
    few = 0 < n_rows <= _ROWS and weight.numel() >= x.numel() + n_rows * weight.shape[0]
    if not (here and few and groups == 1 and dilation == (1, 1, 1)):
        return False
    taken = x.shape[0] > 1 and x.dtype == torch.float32  # by oneDNN, if it is there
    cached = n_rows > _FEWER_ROWS and weight.numel() < _CACHED_WEIGHTS
    return not (taken and cached and torch.backends.cpu.get_cpu_capability() == "AVX512")


def both_convolutions(
    x: Tensor,  # [N, C, D, H, W]
    mu: Tensor,  # [F, C, kD, kH, kW]
    sigma: Tensor,
    size: Triple,  # D', H', W'
    stride: Triple,
    padding: Triple,
) -> tuple[Tensor, Tensor]:
    """conv3d(x, mu) and conv3d(x^2, sigma^2), both [N, F, D', H', W'] and channels_last_3d."""
    rows, sigma = _rows(x, mu.shape[2:], size, stride, padding), sigma.flatten(1)
    mean = torch.mm(rows, mu.flatten(1).t())
    squares, var = rows.square(), torch.empty_like(mean)
    for some, squared in _squares(sigma, 0):
        torch.mm(squares, squared.t(), out=var[:, some])
    return _volume(mean, x, size), _volume(var, x, size)


def both_transposed(
    g: Tensor,  # [N, F, D', H', W']
    times: Tensor,
    x: Tensor,  # [N, C, D, H, W], of which only the shape is read
    mu: Tensor,  # [F, C, kD, kH, kW]
    sigma: Tensor,
    stride: Triple,
    padding: Triple,
) -> tuple[Tensor, Tensor]:
    """The adjoints of both convolutions: of that with mu applied to g, and of that with sigma^2 to g * times."""
    rows, rows_times, sigma = _voxels(g), _voxels(g * times), sigma.flatten(1)
    both = g.new_empty(2, len(rows), sigma.shape[1])
    torch.mm(rows, mu.flatten(1), out=both[0])
    for some, squared in _squares(sigma, 1):
        torch.mm(rows_times, squared, out=both[1, :, some])
    mean, var = _fold(both.view(2 * len(g), *g.shape[2:], *mu.shape[1:]), x.shape[2:], stride, padding).chunk(2)
    return mean, var


def both_correlations(
    x: Tensor,  # [N, C, D, H, W]
    g: Tensor,  # [N, F, D', H', W']
    times: Tensor,
    sigma: Tensor,  # [F, C, kD, kH, kW]
    stride: Triple,
    padding: Triple,
) -> tuple[Tensor, Tensor]:
    """dL/dmu and dL/dsigma of the weights: corr(x, g) and 2 sigma * corr(x^2, g * times), in the shape of sigma."""
    rows, flat = _rows(x, sigma.shape[2:], g.shape[2:], stride, padding), sigma.flatten(1)
    dmu = torch.mm(_voxels(g).t(), rows)
    squares, dsigma, twice = rows.square(), torch.empty_like(dmu), _voxels(g * times).mul_(2.0)
    for some in _blocks(*flat.shape):
        torch.mm(twice[:, some].t(), squares, out=dsigma[some]).mul_(flat[some])
    return dmu.view(sigma.shape), dsigma.view(sigma.shape)


def _blocks(n: int, width: int) -> Iterator[slice]:
    """Slices of n lines of ``width`` weights, a whole number of vectors: products of other widths are slower."""
    step = max(16, _BLOCK // width // 16 * 16)
    return (slice(start, min(start + step, n)) for start in range(0, n, step))


def _squares(sigma: Tensor, axis: int) -> Iterator[tuple[slice, Tensor]]:
    """Blocks along an axis of a matrix, squared into the same memory one after the other."""
    scratch = sigma.new_empty(0)
    for some in _blocks(sigma.shape[axis], sigma.shape[1 - axis]):
        block = sigma[some] if axis == 0 else sigma[:, some]
        scratch = scratch if scratch.numel() >= block.numel() else sigma.new_empty(block.numel())
        yield some, torch.square(block, out=scratch[: block.numel()].view(block.shape))


def _voxels(g: Tensor) -> Tensor:
    """[N, F, D', H', W'] as a row for each voxel."""
    return g.permute(0, 2, 3, 4, 1).reshape(-1, g.shape[1])


def _volume(rows: Tensor, x: Tensor, size: Triple) -> Tensor:
    return rows.view(x.shape[0], *size, -1).permute(0, 4, 1, 2, 3)


def _rows(x: Tensor, kernel: Triple, size: Triple, stride: Triple, padding: Triple) -> Tensor:
    """The voxels under the kernel for each output voxel, a copy: [N D' H' W', C kD kH kW]."""
    (pd, ph, pw), (sd, sh, sw) = padding, stride
    x = torch.constant_pad_nd(x, (pw, pw, ph, ph, pd, pd)).contiguous()
    n, c, d, h, w = x.stride()
    windows = x.as_strided((x.shape[0], *size, x.shape[1], *kernel), (n, d * sd, h * sh, w * sw, c, d, h, w))
    return windows.contiguous().view(x.shape[0] * size[0] * size[1] * size[2], -1)


def _fold(windows: Tensor, size: Triple, stride: Triple, padding: Triple) -> Tensor:
    """Sum [N, D', H', W', C, kD, kH, kW] where windows overlap, one axis after the other: [N, C, D, H, W]."""
    for axis, (n, s, p) in enumerate(zip(size, stride, padding, strict=True), 1):
        shape = list(windows.shape)
        n_windows, kernel = shape[axis], shape.pop(5)
        shape[axis] = n
        total = windows.new_zeros(shape)
        for tap in range(kernel):
            # Window i puts this tap at voxel s i + tap - p.
            first = max(0, -(-(p - tap) // s))
            count = min(n_windows, (n - 1 + p - tap) // s + 1) - first
            if count > 0:
                covered = total[(slice(None),) * axis + (slice(first * s + tap - p, n, s),)].narrow(axis, 0, count)
                covered += windows.select(5, tap).narrow(axis, first, count)
        windows = total
    return windows.permute(0, 4, 1, 2, 3)
