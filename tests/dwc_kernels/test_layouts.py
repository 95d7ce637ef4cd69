"""Outputs and gradients have the layout that `torch.nn` would give them."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from dwc_kernels import ffg_conv3d, reference
from tests.dwc_kernels.problems import (
    make,
)


def test_a_slice_of_channels_last_stays_channels_last():
    x, *rest = make()
    x = x.detach().contiguous(memory_format=torch.channels_last_3d)[..., 1:-1]
    assert ffg_conv3d(x, *rest, padding=1).is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_output_and_input_gradient_keep_the_layout(layout):
    x, *rest = make()
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    y = ffg_conv3d(x, *rest, padding=1)
    (dx,) = torch.autograd.grad(y.sum(), x)
    assert y.is_contiguous(memory_format=layout)
    assert dx.is_contiguous(memory_format=layout)


def test_a_single_channel_is_convolved_and_correlated_in_channels_last():
    """PyTorch goes by a stride that makes no other difference, and copies whole volumes where it is the wrong one."""
    strides = []

    class Strides(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.convolution.default, torch.ops.aten.convolution_backward.default):
                strides.extend(t.stride(1) for t in args[: 2 if "backward" not in str(func) else 3])
            return func(*args, **(kwargs or {}))

    x, mu, sigma, *_ = (t.detach() for t in make(c=1, f=16, size=(16, 16, 16)))
    x, one = x.to(memory_format=torch.channels_last_3d), (1, 1, 1)
    with Strides():
        y, r = reference.forward(x, mu, sigma, None, None, one, one, one, 1, torch.tensor(3))
        reference.grad_weight(torch.ones_like(y), r, x, sigma, one, one, one, 1)
    assert strides == [1] * 10  # input and weight of two convolutions, and the gradient too of two derivatives


@pytest.mark.parametrize("shape", [(2, 1, 4, 5, 6), (2, 3, 1, 1, 1), (2, 1, 1, 1, 1), (2, 3, 4, 5, 1)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
def test_where_the_shape_leaves_the_layout_open_it_is_that_of_conv3d(shape, layout):
    """Networks call `view` on what a plain layer gives them."""
    x = torch.randn(shape).to(memory_format=layout)
    weight = torch.randn(4, shape[1], 3, 3, 3)
    like_x = weight.to(memory_format=layout) if max(x.stride()) > 1 else weight  # where x itself says nothing
    theirs = F.conv3d(x, like_x, padding=2)
    assert ffg_conv3d(x, weight, weight.abs(), padding=2).stride() == theirs.stride()
