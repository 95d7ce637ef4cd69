"""The op on the CPU against its fp64 definition, in every dtype, layout and geometry."""

import pytest
import torch
import torch.nn.functional as F

from dwc_kernels import ffg_conv3d, ffg_conv_transpose3d, reference, winograd
from tests.dwc_kernels.problems import (
    assert_as_accurate_as_composition,
    assert_background_has_zero_gradient,
    assert_fp16_squares_neither_overflow_nor_vanish,
    in_layout,
    make,
    relative_error,
    results,
)

LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last_3d}

GEOMETRIES = {
    "channels 1 -> 16": (dict(c=1, f=16), dict(padding=1)),
    "channels 21 -> 50": (dict(c=21, f=50), dict(padding=1)),
    "channels 65 -> 66, dilation 2": (dict(c=65, f=66), dict(padding=2, dilation=2)),
    "channels 64 -> 96, dilation beyond": (dict(c=64, f=96, size=(3, 4, 5)), dict(padding=11, dilation=11)),
    "channels 96 -> 64, padding beyond": (dict(c=96, f=64, kernel=(3, 2, 3)), dict(padding=(4, 1, 3))),
    "channels 96 -> 3": (dict(c=96, f=3), dict(padding=1)),
    "1x1x1 kernel": (dict(c=16, f=50, kernel=1), {}),
    "5x5x5 kernel": (dict(kernel=5), dict(padding=2)),
    "lopsided kernel": (dict(kernel=(1, 2, 3)), dict(padding=(0, 1, 2), dilation=(1, 2, 1))),
    "one voxel": (dict(size=(1, 1, 1)), dict(padding=1)),
    "33x5x2": (dict(size=(33, 5, 2)), dict(padding=2, dilation=2)),
    "dilation 2": ({}, dict(padding=2, dilation=2)),
    "dilation 8": ({}, dict(padding=8, dilation=8)),
    "dilation beyond the volume": (dict(size=(3, 4, 5)), dict(padding=11, dilation=11)),
    "no padding": ({}, {}),
    "padding beyond the kernel": ({}, dict(padding=4)),
    "stride 2": ({}, dict(stride=2, padding=1)),
    "stride 2, dilation 2": ({}, dict(stride=(2, 1, 3), padding=2, dilation=2)),
    "groups": (dict(c=6, f=4, groups=2), dict(padding=1, groups=2)),
    "depthwise": (dict(c=4, f=8, groups=4), dict(padding=2, dilation=2, groups=4)),
    "more weights than voxels": (dict(c=64, f=72, size=(2, 3, 2)), dict(padding=1)),
    "more weights than voxels, stride 2": (dict(c=24, f=20, size=(4, 3, 4)), dict(stride=2, padding=1)),
    "more weights than voxels, groups": (dict(c=24, f=20, size=(2, 2, 2), groups=2), dict(padding=1, groups=2)),
    "no bias, batch 3": (dict(bias=False, batch=3), dict(padding=1)),
}
WINOGRAD = {
    f"Winograd, dilation {d}": (dict(c=64, f=64, size=(16, 16, 16), batch=1), dict(padding=d, dilation=d))
    for d in (1, 2, 4)
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", [*GEOMETRIES, *WINOGRAD])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_fp32_is_as_accurate_as_the_composition(case, layout):
    arguments, geometry = (GEOMETRIES | WINOGRAD)[case]
    x, *rest = make(**arguments)
    assert_as_accurate_as_composition([in_layout(x, layout), *rest], **geometry)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["channels 21 -> 50", "dilation 8", "stride 2", "groups", "Winograd, dilation 2"])
def test_other_dtypes_are_as_accurate_as_the_composition(case, dtype):
    arguments, geometry = (GEOMETRIES | WINOGRAD)[case]
    assert_as_accurate_as_composition(make(**arguments, dtype=dtype), **geometry)


@pytest.mark.parametrize("case", ["channels 65 -> 66, dilation 2", "channels 96 -> 3", "stride 2"])
def test_bf16_products_are_as_accurate_as_the_composition(case, monkeypatch):
    monkeypatch.setattr(reference, "multiplies_bf16", lambda: True)
    arguments, geometry = GEOMETRIES[case]
    assert_as_accurate_as_composition(make(**arguments, dtype=torch.bfloat16), **geometry)


@pytest.mark.parametrize(
    ("arguments", "geometry", "layout"),
    [
        (dict(c=16, f=16, size=(2, 6, 6)), dict(padding=1), "contiguous"),
        (dict(c=16, f=16, size=(4, 4, 4), kernel=5), dict(padding=2), "contiguous"),
        (dict(c=16, f=16, size=(1, 5, 5)), dict(padding=(2, 1, 1)), "contiguous"),
        (dict(c=1, f=2, size=(1, 16, 16), kernel=(2, 1, 5)), dict(padding=(2, 1, 0)), "channels_last"),
        (
            dict(c=2, f=16, size=(1, 16, 2), kernel=(5, 1, 3), groups=2),
            dict(padding=(2, 2, 1), groups=2),
            "channels_last",
        ),
        (dict(c=2, f=4, size=(8, 8, 2), kernel=(1, 3, 5)), dict(padding=(0, 1, 3)), "channels_last"),
    ],
)
def test_bf16_is_right_where_the_kernel_reaches_beyond_the_volume(arguments, geometry, layout):
    """PyTorch's own products are random there on CPUs with bf16 products, so the composition is no yardstick."""
    x, *rest = make(**arguments, bias=False, dtype=torch.bfloat16)
    tensors = [x.detach().to(memory_format=LAYOUTS[layout]).requires_grad_(), *rest]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    options = dict(seed=3, **geometry)
    g = torch.randn_like(ffg_conv3d(*tensors, **options))
    exact = results(ffg_conv3d, doubles, g, **options)
    for _ in range(3):
        for ours, theirs in zip(results(ffg_conv3d, tensors, g, **options), exact, strict=True):
            assert relative_error(ours, theirs) < 2e-2


@pytest.mark.parametrize("op", [ffg_conv3d, ffg_conv_transpose3d])
def test_a_dilation_of_a_single_tap_never_reaches_pytorch(op, monkeypatch):
    """In bf16 its convolutions read and write beyond their memory for it, and sooner or later the process ends."""
    seen = []
    monkeypatch.setattr(reference, "forward", lambda *a, f=reference.forward, **o: seen.append(a[7]) or f(*a, **o))
    x, weight = torch.randn(1, 4, 5, 5, 5), torch.randn(4, 4, 1, 3, 1)
    y = op(x, weight, weight.abs(), stride=2, padding=(0, 1, 0), dilation=(2, 1, 3), seed=3)
    assert torch.equal(y, op(x, weight, weight.abs(), stride=2, padding=(0, 1, 0), seed=3))
    assert seen == [(1, 1, 1)] * 2


@pytest.mark.parametrize("case", WINOGRAD)
def test_the_cases_of_winograd_take_it_in_forward_and_backward(case, monkeypatch):
    arguments, geometry = WINOGRAD[case]
    answers = []
    monkeypatch.setattr(winograd, "suits", lambda *a, f=winograd.suits: answers.append(f(*a)) or answers[-1])
    results(ffg_conv3d, make(**arguments), torch.ones(1, 64, 16, 16, 16), **geometry)
    assert answers == [True] * 4  # the mean, g and g * r back to x, both to the weights


def test_fp16_squares_neither_overflow_nor_vanish():
    assert_fp16_squares_neither_overflow_nor_vanish((6, 7, 9))


@pytest.mark.usefixtures("poisoned_memory")
def test_all_zero_input_has_zero_gradient_not_nan():
    assert_background_has_zero_gradient((6, 7, 9))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_zero_sigma_is_the_mean(layout, dtype):
    x, mu, sigma, b_mu, b_sigma = (t.detach() for t in make(dtype=dtype))
    x, mu = (t.contiguous(memory_format=layout) for t in (x, mu))
    y = ffg_conv3d(x, mu, torch.zeros_like(sigma), b_mu, torch.zeros_like(b_sigma), padding=1)
    expected = F.conv3d(x, mu, b_mu, padding=1)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    if layout == torch.channels_last_3d and dtype == torch.float32:  # the layout in which the op convolves
        assert torch.equal(y, expected)
