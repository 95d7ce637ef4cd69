"""Which backend runs a convolution, by a check that says why; nothing heavy is imported to answer."""

import functools
import importlib.util
import math
import os

import torch
from torch import Tensor

from dwc_kernels.geometry import Triple

__all__ = ["BACKENDS", "choose_backend", "why_not_triton"]

BACKENDS = ("auto", "reference", "triton")


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _why_not_here(device_type: str, device_index: int | None) -> str | None:
    """Why Triton cannot run on a device of this process; a constant for `torch.compile`."""
    if not _has_triton():
        return "Triton is not installed"
    if device_type != "cuda":
        interpreted = os.environ.get("TRITON_INTERPRET", "0") == "1"
        return None if interpreted and device_type == "cpu" else f"the input is on {device_type}, not on a GPU"
    if torch.version.hip is not None:
        return "the kernels are written for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device_index) < (8, 0):
        return "the GPU is older than sm_80"
    return None


# What torch.compiler.assume_constant_result sets; calling it would import the compiler, two seconds for every user.
_why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not_triton(x: Tensor, weight: Tensor, size: Triple, stride: Triple = (1, 1, 1), groups: int = 1) -> str | None:
    """Say why the Triton kernels cannot convolve x [N, C, D, H, W] with weight [F, C, kD, kH, kW]; None if they can.

    ``size`` is D', H', W' of the output. With a stride only the forward is a kernel. TRITON_INTERPRET=1 in the
    environment runs the kernels on the CPU, slowly, to check them.
    """
    reason = _why_not_here(x.device.type, x.device.index)
    if reason:
        return reason
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{x.dtype} has no tensor-core product"
    if groups != 1:
        return f"groups={groups} is not 1"
    if max(weight.shape[2:]) > 7:
        return f"a kernel of {tuple(weight.shape[2:])} is larger than 7"
    if x.numel() == 0:
        return "the input is empty"
    planes = ((x.shape[1], *x.shape[3:]), (weight.shape[0], *size[1:]))
    if max(8 * math.prod(plane) for plane in planes) >= 2**31:
        return f"8 planes of one of {planes} pass 2^31 elements, the reach of an offset within a tile"
    return None


def choose_backend(
    backend: str, x: Tensor, weight: Tensor, size: Triple, stride: Triple = (1, 1, 1), groups: int = 1
) -> str:
    """The backend that runs: "auto" is Triton for CUDA tensors it can take, else the reference.

    Raises
    ------
    ValueError
        If "triton" is asked for and cannot run, saying why.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(map(repr, BACKENDS))}, got {backend!r}")
    if backend == "reference" or (backend == "auto" and not x.is_cuda):
        return "reference"
    reason = why_not_triton(x, weight, size, stride, groups)
    if backend == "triton" and reason:
        raise ValueError(f"backend='triton' cannot run: {reason}; use backend='auto' or 'reference'")
    return "reference" if reason else "triton"
