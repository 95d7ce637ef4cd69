"""Transposed convolutions and linear layers: samples with the definition's mean, variance and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from dwc_kernels import FFGConvTranspose3d, FFGLinear, ffg_conv_transpose3d, ffg_linear
from dwc_kernels.noise import normal

GEOMETRIES = {
    "U-Net's 2x2x2": (dict(kernel=2), dict(stride=2)),
    "3x3x3, stride 2": (dict(kernel=3), dict(stride=2, padding=1, output_padding=1)),
    "stride 1": (dict(kernel=3), dict(padding=1)),
    "stride 1, no padding": (dict(kernel=3), {}),
    "padding beyond the kernel": (dict(kernel=3), dict(padding=3)),
    "dilated": (dict(kernel=3), dict(padding=2, dilation=2)),
    "dilated with output padding": (dict(kernel=3), dict(padding=2, dilation=2, output_padding=1)),
    "groups": (dict(kernel=2, c=4, f=6, groups=2), dict(stride=2, groups=2)),
    "lopsided": (dict(kernel=(1, 2, 3)), dict(stride=(1, 2, 3), padding=(0, 1, 0))),
    "wide, stride 1": (dict(kernel=3, c=64, f=64, size=(16, 16, 16), n=1), dict(padding=1)),
    "no bias": (dict(kernel=2, bias=False), dict(stride=2)),
}


def made(kernel, c=3, f=5, size=(7, 6, 9), n=2, groups=1, bias=True, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    tensors = [randn(n, c, *size).relu(), randn(c, f // groups, *kernel), randn(c, f // groups, *kernel).abs() * 0.1]
    if bias:
        tensors += [randn(f), randn(f).abs() * 0.1]
    return [t.to(dtype).requires_grad_() for t in tensors]


def definition(x, mu, sigma, b_mu=None, b_sigma=None, *, eps, **geometry):
    mean = F.conv_transpose3d(x, mu, b_mu, **geometry)
    var = F.conv_transpose3d(x.square(), sigma.square(), None if b_sigma is None else b_sigma.square(), **geometry)
    return mean + torch.where(var > 0, var, 1.0).sqrt() * (var > 0) * eps


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", GEOMETRIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_transposed_convolution_is_its_definition(case, dtype):
    arguments, geometry = GEOMETRIES[case]
    tensors = made(**arguments, dtype=dtype)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    y = ffg_conv_transpose3d(*tensors, seed=7, **geometry)
    exact = definition(*doubles, eps=normal(y, 7).double(), **geometry)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    pairs = [(y, exact)]
    pairs += zip(torch.autograd.grad(y, tensors, g.to(dtype)), torch.autograd.grad(exact, doubles, g), strict=True)
    for ours, theirs in pairs:
        assert ours.isfinite().all()
        error = ((ours.double() - theirs).norm() / theirs.norm()).item()
        assert error < (2e-6 if dtype == torch.float32 else 1e-13)


def test_gradcheck_of_a_transposed_convolution():
    tensors = made(kernel=2, c=2, f=2, size=(2, 3, 2), n=1, dtype=torch.float64)
    tensors[0] = (tensors[0].detach() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: ffg_conv_transpose3d(*t, seed=3, stride=2), tensors)


@pytest.mark.parametrize("output_size", [None, (14, 13, 18)])
def test_the_module_reads_like_conv_transpose3d(output_size):
    conv = nn.ConvTranspose3d(4, 6, 3, stride=2, padding=1, groups=2, bias=False)
    layer = FFGConvTranspose3d.from_conv_transpose3d(conv).eval()
    x = torch.randn(2, 4, 7, 7, 9)
    torch.testing.assert_close(layer(x, output_size), conv(x, output_size))
    assert layer(x, output_size, sample=True).shape == conv(x, output_size).shape
    assert layer(x[0], sample=True, seed=1).shape == conv(x[0]).shape
    assert repr(layer) == repr(conv).replace("Conv", "FFGConv")
    with torch.no_grad():
        layer.weight_rho.fill_(-100)
    torch.testing.assert_close(layer(x, sample=True), conv(x))


def test_a_linear_layer_samples_its_definition():
    torch.manual_seed(0)
    layer = FFGLinear(5, 4, sigma_init=0.3).double()
    x = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    y = layer(x, seed=5)
    eps = normal(torch.empty(4, 6), 5).t().reshape(2, 3, 4)  # the noise of a volume [1, 4, 1, 1, 6]
    var = x.square() @ layer.weight_sigma.square().t() + layer.bias_sigma.square()
    expected = F.linear(x, layer.weight_mu, layer.bias_mu) + var.sqrt() * eps
    torch.testing.assert_close(y, expected)
    parameters = (x, *layer.parameters())
    for ours, theirs in zip(
        torch.autograd.grad(y.square().sum(), parameters),
        torch.autograd.grad(expected.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs)
    assert layer(x[0, 0]).shape == (4,)
    assert repr(layer) == repr(nn.Linear(5, 4)).replace("Linear", "FFGLinear")


def test_arguments_that_do_not_fit_are_named():
    x, mu, sigma, b_mu, b_sigma = (t.detach() for t in made(kernel=2))
    for arguments, options, message in (
        ((x, mu[:2], sigma[:2]), {}, "3 channels do not fit"),
        ((x, mu, sigma, b_mu[:2], b_sigma[:2]), {}, "bias_mu must have shape"),
        ((x, mu, sigma), dict(output_padding=2), "output_padding"),
        ((x, mu, sigma), dict(padding=9), "leaves nothing"),
        ((x, mu, sigma), dict(stride=2, backend="triton"), "triton"),
        ((x, mu, sigma), dict(stride=2, backend="nope"), "backend"),
    ):
        with pytest.raises(ValueError, match=message):
            ffg_conv_transpose3d(*arguments, **options)
    with pytest.raises(ValueError, match="expected input"):
        ffg_linear(torch.zeros(2, 3), torch.zeros(4, 5), torch.zeros(4, 5))
