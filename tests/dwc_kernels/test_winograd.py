"""Winograd's sums equal the direct ones, as closely, and are taken only where they are fewer."""

import pytest
import torch
import torch.nn.functional as F

from dwc_kernels import reference, winograd
from tests.dwc_kernels.problems import assert_as_accurate_as_composition, make

ONE = (1, 1, 1)
GEOMETRIES = [  # size, padding, dilation
    ((6, 7, 9), ONE, ONE),
    ((6, 7, 9), (0, 2, 3), (1, 2, 3)),
    ((13, 5, 17), (8, 2, 1), (8, 2, 1)),
    ((9, 9, 9), (5, 4, 0), (1, 1, 4)),
    ((3, 3, 3), (0, 0, 0), ONE),
]


def relative(ours, exact):
    return ((ours - exact).norm() / exact.norm()).item()


@pytest.mark.parametrize(("size", "padding", "dilation"), GEOMETRIES)
def test_sums_and_weight_gradients_equal_the_direct_ones(size, padding, dilation):
    torch.manual_seed(0)
    x, w = torch.randn(2, 5, *size), torch.randn(7, 5, 3, 3, 3)
    exact = F.conv3d(x.double(), w.double(), None, 1, padding, dilation)
    y = winograd.convolve(x, w, padding, dilation)
    assert y.shape == exact.shape
    assert relative(y, exact) < 1e-6
    g = torch.randn_like(y)
    exact = torch.nn.grad.conv3d_weight(x.double(), w.shape, g.double(), 1, padding, dilation)
    assert relative(winograd.correlate(x, g, padding, dilation), exact) < 2e-6


def test_products_formed_on_the_way_are_the_products_formed_before():
    torch.manual_seed(0)
    size, *geometry = GEOMETRIES[1]
    x, w = torch.randn(2, 5, *size), torch.randn(7, 5, 3, 3, 3)
    y = winograd.convolve(x * x, w, *geometry)
    assert torch.equal(winograd.convolve(x, w, *geometry, times=x), y)
    g, r = torch.randn_like(y), torch.randn_like(y)
    dw = winograd.correlate(x * x, g * r, *geometry)
    assert torch.equal(winograd.correlate(x, g, *geometry, x_times=x, g_times=r), dw)


@pytest.mark.parametrize("dilation", [1, 2, 4, 8])
def test_a_wide_layer_errs_at_most_twice_as_much_as_direct_sums(dilation):
    torch.manual_seed(0)
    geometry = ((dilation,) * 3, (dilation,) * 3)
    x, w, g = torch.randn(1, 64, 32, 32, 32), torch.randn(64, 64, 3, 3, 3), torch.randn(1, 64, 32, 32, 32)
    assert winograd.suits(x, w.shape, ONE, *geometry)
    few = slice(4)  # of the filters and channels, because fp64 is slow
    exact = F.conv3d(x.double(), w[few].double(), None, 1, *geometry)
    direct = F.conv3d(x, w[few], None, 1, *geometry)
    assert relative(winograd.convolve(x, w, *geometry)[:, few], exact) < 2 * relative(direct, exact)
    exact = torch.nn.grad.conv3d_weight(x[:, few].double(), (64, 4, 3, 3, 3), g.double(), 1, *geometry)
    direct = torch.nn.grad.conv3d_weight(x[:, few], (64, 4, 3, 3, 3), g, 1, *geometry)
    assert relative(winograd.correlate(x, g, *geometry)[:, few], exact) < 2 * relative(direct, exact)


@pytest.mark.parametrize(
    ("shape", "weight", "stride", "dilation", "dtype", "suits"),
    [
        ((1, 64, 16, 16, 16), (64, 64, 3, 3, 3), 1, 1, torch.float32, True),
        ((1, 64, 16, 16, 16), (64, 64, 3, 3, 3), 1, 1, torch.float64, False),  # gradcheck's dtype: direct
        ((1, 64, 16, 16, 16), (64, 64, 5, 5, 5), 1, 1, torch.float32, False),
        ((1, 64, 16, 16, 16), (64, 64, 3, 3, 3), 2, 1, torch.float32, False),
        ((1, 64, 16, 16, 16), (64, 32, 3, 3, 3), 1, 1, torch.float32, False),  # two groups
        ((1, 16, 16, 16, 16), (16, 16, 3, 3, 3), 1, 1, torch.float32, False),  # narrow
        ((1, 64, 6, 6, 6), (64, 64, 3, 3, 3), 1, 1, torch.float32, False),  # few tiles
        ((1, 64, 16, 16, 16), (64, 64, 3, 3, 3), 1, 16, torch.float32, False),  # padding only around the middle tap
    ],
)
def test_only_wide_stride_one_layers_whose_tiles_are_full_take_it(shape, weight, stride, dilation, dtype, suits):
    x = torch.zeros(shape, dtype=dtype)
    assert winograd.suits(x, weight, (stride,) * 3, (dilation,) * 3, (dilation,) * 3) == suits


def test_the_variance_of_a_wide_layer_is_never_summed_in_differences(monkeypatch):
    """A voxel whose inputs are all 0 has variance exactly 0 next to voxels of any size."""
    taken = []
    monkeypatch.setattr(winograd, "convolve", lambda *a, f=winograd.convolve: taken.append(a) or f(*a))
    x = torch.zeros(1, 64, 16, 16, 16)
    x[..., 8:] = 1e3
    sigma = torch.full((64, 64, 3, 3, 3), 0.1)
    y, r = reference.forward(x, sigma, sigma, None, None, ONE, ONE, ONE, 1, torch.tensor(0))
    assert len(taken) == 1  # the mean
    assert (y[..., :7] == 0).all()
    assert (r[..., :7] == 0).all()


@pytest.mark.parametrize(
    ("capability", "dilation", "n_taken"),
    [("AVX2", 1, 5), ("AVX2", 2, 5), ("AVX512", 1, 0), ("AVX512", 2, 2)],  # dilated, oneDNN is slow to the weights
)
def test_where_onednn_is_faster_the_sums_are_direct_and_as_accurate(capability, dilation, n_taken, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    taken = []
    monkeypatch.setattr(winograd, "convolve", lambda *a, f=winograd.convolve: taken.append(f) or f(*a))
    monkeypatch.setattr(winograd, "correlate", lambda *a, f=winograd.correlate: taken.append(f) or f(*a))
    tensors = make(c=64, f=64, size=(16, 16, 16))
    assert_as_accurate_as_composition(tensors, padding=dilation, dilation=dilation)
    assert len(taken) == n_taken


def test_a_single_small_volume_takes_winograd_because_pytorch_leaves_onednn_out(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    for batch, wins in ((1, False), (2, True)):
        x = torch.zeros(batch, 64, 16, 16, 16)
        assert winograd.onednn_wins(x, (64, 64, 3, 3, 3), ONE, ONE, ONE, 1) == wins
