"""Weight gradients of wide layers on the CPU, as batched matrix products over rows of voxels.

PyTorch's own are slower for dilated convolutions, and everywhere where oneDNN does not run with AVX-512.
"""

import torch
from torch import Tensor

from dwc_kernels.geometry import Triple

__all__ = ["correlate_both"]


def correlate_both(
    x: Tensor, g: Tensor, x_times: Tensor, g_times: Tensor, shape: torch.Size, padding: Triple, dilation: Triple
) -> tuple[Tensor, Tensor]:
    """The weight gradients of convolutions of x and of x * x_times, with g and g * g_times those of their outputs.

    At stride 1 without groups. Rows are padded with zeros along W to one pitch, so a tap's shift along W is a shift of
    the row index; shifts along D and H select planes and lines, and those outside the volume are never multiplied.
    """
    (n, n_filters, *out_size), (c, *size) = g.shape, x.shape[1:]
    kd, kh, kw = shape[2:]
    (pd, ph, pw), (dd, dh, dw) = padding, dilation
    # Row v of the output meets row v + shift of the input: zeros behind a line also stand before the next one.
    tail = (kw - 1) * dw
    pitch = max(size[2] + pw, out_size[2] + tail - pw, out_size[2])
    a = torch.zeros(2, size[0], size[1] * pitch + tail, c, dtype=x.dtype, device=x.device)
    b = torch.zeros(2, out_size[0], out_size[1], pitch, n_filters, dtype=x.dtype, device=x.device)
    a_lines = a[:, :, : size[1] * pitch].view(2, size[0], size[1], pitch, c)[..., pw : pw + size[2], :]
    wide = torch.promote_types(x.dtype, torch.float32)
    total = torch.zeros(kd, kh, kw, 2, c, n_filters, dtype=wide, device=x.device)
    for sample in range(n):
        a_lines[0] = x[sample].permute(1, 2, 3, 0)
        torch.mul(a_lines[0], x_times[sample].permute(1, 2, 3, 0), out=a_lines[1])
        b[0, ..., : out_size[2], :] = g[sample].permute(1, 2, 3, 0)
        torch.mul(b[0, ..., : out_size[2], :], g_times[sample].permute(1, 2, 3, 0), out=b[1, ..., : out_size[2], :])
        for i in range(kd):
            for j in range(kh):
                dz, dy = i * dd - pd, j * dh - ph
                y0, y1 = max(0, -dy), min(out_size[1], size[1] - dy)
                if y0 >= y1:
                    continue
                for z in range(max(0, -dz), min(out_size[0], size[0] - dz)):
                    rows = (y1 - y0) * pitch
                    lines = b[:, z, y0:y1].view(2, rows, n_filters)
                    for k in range(kw):
                        start = (y0 + dy) * pitch + k * dw
                        taps = a[:, z + dz, start : start + rows].transpose(1, 2)
                        if x.dtype == total.dtype:
                            total[i, j, k].baddbmm_(taps, lines)
                        else:  # bf16 rounds each product once and never the sum
                            total[i, j, k] += torch.bmm(taps, lines)
    both = total.permute(3, 5, 4, 0, 1, 2)
    return both[0], both[1]
