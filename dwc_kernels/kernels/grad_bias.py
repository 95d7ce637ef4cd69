"""The bias gradients alone, of layers whose weights are frozen; elsewhere `grad_weight` computes them on its way.

    db_mu = sum g        db_sigma = 2 b_sigma * sum g * r

g * r is formed in registers, so that nothing of the output's size is written.
"""

# mypy: disallow-untyped-defs=False
# Device functions have no Python types.

import torch
import triton
import triton.language as tl
from torch import Tensor

from dwc_kernels import reference
from dwc_kernels.kernels import launch
from dwc_kernels.kernels.grad_weight import bias_sums
from dwc_kernels.kernels.launch import descriptor
from dwc_kernels.kernels.layouts import voxels_last
from dwc_kernels.kernels.tiles import boxes

__all__ = ["grad_bias"]

BOX, FILTERS = (2, 8, 8), 32  # of a block of g and r
PROGRAMS = 8  # on a multiprocessor, to hide the time of loads


@triton.jit(do_not_specialize=["shares", "N", "D", "H", "W"])
def grad_bias_kernel(
    g_desc, r_desc,  # [N, D, H, W, F], descriptors, or pointers where `voxel_blocks` says
    out,  # [shares, 2, F]: partial sums of g, then of g * r
    shares, N, D, H, W, F,
    BD: tl.constexpr, BH: tl.constexpr, BW: tl.constexpr, N0: tl.constexpr,
    ARCH: tl.constexpr,
):  # fmt: skip
    """One program: N0 filters and one share of the voxels."""
    pid = tl.program_id(0)
    bias_sums(g_desc, r_desc, out, pid % shares, shares, pid // shares * N0, N, D, H, W, F, BD, BH, BW, N0, ARCH)


def grad_bias(
    g: Tensor,  # [N, F, D, H, W]
    r: Tensor,  # like g, or empty where dL/dsigma is not wanted
    bias_sigma: Tensor,  # [F]
) -> tuple[Tensor, Tensor]:
    """dL/dmu and dL/dsigma of the biases, in the dtype of bias_sigma; the latter is 0 where r is empty."""
    if not r.numel():
        return reference.grad_bias(g, r, bias_sigma)
    chip, n_filters = launch.chip_of(g.device), g.shape[1]
    g, r = voxels_last(g), voxels_last(r)
    column_blocks = -(-n_filters // FILTERS)
    shares = max(1, min(g.shape[0] * boxes(g.shape[1:4], BOX), chip.multiprocessors * PROGRAMS // column_blocks))
    partial = torch.empty(shares, 2, g.shape[-1], dtype=torch.float32, device=g.device)
    block = [1, *BOX, FILTERS]
    launch.run_on(
        g.device, grad_bias_kernel, shares * column_blocks, descriptor(g, block, chip), descriptor(r, block, chip),
        partial, shares, *g.shape, *BOX, FILTERS, ARCH=chip.arch,
    )  # fmt: skip
    sum_g, sum_gr = partial.sum(0)[:, :n_filters]
    return sum_g.to(bias_sigma.dtype), (2 * bias_sigma * sum_gr).to(bias_sigma.dtype)
