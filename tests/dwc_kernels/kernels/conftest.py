"""Kernels are interpreted on the CPU here, or compiled for the GPU at hand under DWC_TEST_DEVICE=cuda."""

from contextlib import nullcontext

import pytest
import torch

from tests.dwc_kernels.problems import DEVICE


@pytest.fixture(autouse=True)
def device():
    """New tensors are on the device, and fp32 is multiplied exactly unless a test says otherwise."""
    before = torch.backends.cudnn.conv.fp32_precision
    torch.backends.cudnn.conv.fp32_precision = "ieee"
    with nullcontext() if DEVICE == "cpu" else torch.device(DEVICE):
        yield
    torch.backends.cudnn.conv.fp32_precision = before
