"""A small variational network with all kinds of layers, and its input."""

import pytest
import torch
from torch import nn

from dwc_kernels import convert


@pytest.fixture
def net():
    torch.manual_seed(0)
    layers = nn.Conv3d(1, 4, 3, padding=1), nn.ReLU(), nn.ConvTranspose3d(4, 4, 2, stride=2), nn.Dropout(0.5)
    return convert(nn.Sequential(*layers, nn.Conv3d(4, 3, 1)), sigma_init=0.1)


@pytest.fixture
def x():
    return torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(1))
