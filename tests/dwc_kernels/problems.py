"""Arguments of the op, its definition in plain PyTorch, and the yardstick by which every backend is measured."""

import os

import torch
import torch.nn.functional as F

from dwc_kernels import ffg_conv3d
from dwc_kernels.noise import normal

DEVICE = os.environ.get("DWC_TEST_DEVICE", "cpu")
NAMES = ("y", "x", "weight_mu", "weight_sigma", "bias_mu", "bias_sigma")


def make(c=3, f=5, kernel=3, size=(6, 7, 9), batch=2, groups=1, bias=True, dtype=torch.float32):
    """Arguments of the op, ReLU-like input with a background of zeros."""
    gen = torch.Generator(DEVICE).manual_seed(0)

    def randn(*shape):
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    x = randn(batch, c, *size).relu()
    x[..., : size[-1] // 3] = 0
    tensors = [x, randn(f, c // groups, *kernel), randn(f, c // groups, *kernel).abs() * 0.1 + 1e-3]
    if bias:
        tensors += [randn(f), randn(f).abs() * 0.1 + 1e-3]
    return [t.to(dtype).requires_grad_() for t in tensors]


def in_layout(x, layout):
    """x as a leaf that is "contiguous", "channels_last" or "sliced" out of a larger tensor."""
    x = x.detach()
    if layout == "channels_last":
        x = x.contiguous(memory_format=torch.channels_last_3d)
    elif layout == "sliced":
        x = F.pad(x, (1, 2, 0, 1))[..., :-1, 1:-2]
    return x.requires_grad_()


def results(op, tensors, g, **options):
    """Output and gradients."""
    y = op(*tensors, **options)
    return [y.detach(), *torch.autograd.grad(y, tensors, g.to(y.dtype))]


def definition(x, weight_mu, weight_sigma, bias_mu=None, bias_sigma=None, *, eps, **geometry):
    """The composition, with the derivative of sqrt(var) defined as 0 where var = 0 (background without bias)."""
    mean = F.conv3d(x, weight_mu, bias_mu, **geometry)
    var = F.conv3d(x.square(), weight_sigma.square(), None if bias_sigma is None else bias_sigma.square(), **geometry)
    return mean + torch.where(var > 0, var, 1.0).sqrt() * (var > 0) * eps


def relative_error(out, exact):
    return ((out.double() - exact).norm() / exact.norm().clamp_min(1e-300)).item()


def assert_as_accurate_as_composition(tensors, *, backend="auto", slack=0.0, **geometry):
    """Output and every gradient err at most twice as much as the composition does in the same dtype, against fp64.

    The composition's own error depends on the layout, through the order in which PyTorch sums: the larger one counts.
    To it comes one rounding, for gradients of a few elements and for fp32, whose errors are of that size.
    """
    dtype = tensors[0].dtype
    with torch.no_grad():
        y = F.conv3d(tensors[0].double(), tensors[1].double(), **geometry)
    g = torch.randn(y.shape, generator=torch.Generator(DEVICE).manual_seed(1), dtype=torch.float64).to(dtype).double()
    eps = normal(y, 7)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = results(definition, doubles, g, eps=eps.double(), **geometry)
    ours = results(ffg_conv3d, tensors, g, seed=7, backend=backend, **geometry)
    composed = []
    for layout in ("contiguous", "channels_last"):
        inputs = [in_layout(tensors[0], layout), *tensors[1:]]
        composed.append(results(definition, inputs, g, eps=eps.to(dtype), **geometry))
    for name, e, o, *both in zip(NAMES, exact, ours, *composed, strict=False):
        assert o.isfinite().all(), name
        rounding = torch.finfo(dtype).eps if e.numel() < 100 or dtype in (torch.float32, torch.float64) else 0.0
        rounding *= 10 if dtype == torch.float64 else 1  # fp64 is its own yardstick
        allowed = 2 * max(relative_error(c, e) for c in both) + rounding + slack
        assert relative_error(o, e) <= allowed, (name, allowed, relative_error(o, e))


def assert_fp16_squares_neither_overflow_nor_vanish(size, **options):
    """x^2 beyond 65504 and sigma^2 below 2^-24 are what fp16 cannot hold."""
    x, mu, _ = make(size=size, bias=False)
    tensors = [(x.detach() * 300).half(), mu.detach().half() * 0, torch.full_like(mu, 1e-4).half()]
    tensors = [t.detach().requires_grad_() for t in tensors]
    eps = normal(torch.empty(2, 5, *size), 7)
    g = torch.ones(eps.shape)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = results(definition, doubles, g.double(), eps=eps.double(), padding=1)
    for o, e in zip(results(ffg_conv3d, tensors, g, seed=7, padding=1, **options), exact, strict=True):
        assert relative_error(o, e) < 2e-3


def assert_background_has_zero_gradient(size, **options):
    """sqrt has no derivative at 0; ours is 0 there and never NaN."""
    x, mu, sigma = make(size=size, bias=False)
    x = torch.zeros_like(x).requires_grad_()
    g = torch.ones(2, 5, *size)
    y, dx, dmu, dsigma = results(ffg_conv3d, [x, mu, sigma], g, padding=1, **options)
    assert not any(t.any() for t in (y, dmu, dsigma))
    assert dx.isfinite().all()
