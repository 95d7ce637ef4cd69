"""The op against its fp64 definition, and as a citizen of PyTorch: autograd, fake tensors, compile, autocast."""

import copy

import pytest
import torch
import torch.nn.functional as F

from benchmarks.composition import composition, saved_bytes
from dwc_kernels import ffg_conv3d, reference
from dwc_kernels.noise import normal

NAMES = ("x", "weight_mu", "weight_sigma", "bias_mu", "bias_sigma")


def make(c=3, f=5, kernel=3, size=(6, 7, 9), batch=2, groups=1, bias=True, dtype=torch.float32, seed=0):
    """Arguments of the op, ReLU-like input with a background of zeros."""
    gen = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(shape, generator=gen, dtype=torch.float64)

    kernel = (kernel,) * 3 if isinstance(kernel, int) else kernel
    x = randn(batch, c, *size).relu()
    x[..., : size[-1] // 3] = 0
    tensors = [x, randn(f, c // groups, *kernel), randn(f, c // groups, *kernel).abs() * 0.1 + 1e-3]
    if bias:
        tensors += [randn(f), randn(f).abs() * 0.1 + 1e-3]
    return [t.to(dtype).requires_grad_() for t in tensors]


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


def assert_as_accurate_as_composition(tensors, **geometry):
    """Output and every gradient err at most twice as much as the composition does in the same dtype, against fp64.

    The composition's own error depends on the layout, through the order in which PyTorch sums: the larger one counts.
    To it comes one rounding, for gradients of a few elements and for fp32, whose errors are of that size.
    """
    dtype = tensors[0].dtype
    with torch.no_grad():
        y = F.conv3d(tensors[0].double(), tensors[1].double(), **geometry)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype).double()
    eps = normal(y, 7)
    exact = results(
        definition, [t.detach().double().requires_grad_() for t in tensors], g, eps=eps.double(), **geometry
    )
    ours = results(ffg_conv3d, tensors, g, seed=7, **geometry)
    composed = []
    for layout in (torch.contiguous_format, torch.channels_last_3d):
        x = tensors[0].detach().contiguous(memory_format=layout).requires_grad_()
        composed.append(results(definition, [x, *tensors[1:]], g, eps=eps.to(dtype), **geometry))
    for name, e, o, *both in zip(("y", *NAMES), exact, ours, *composed, strict=False):
        assert o.isfinite().all(), name
        rounding = torch.finfo(dtype).eps if e.numel() < 100 or dtype in (torch.float32, torch.float64) else 0.0
        rounding *= 10 if dtype == torch.float64 else 1  # fp64 is its own yardstick
        allowed = 2 * max(relative_error(c, e) for c in both) + rounding
        assert relative_error(o, e) <= allowed, (name, allowed, relative_error(o, e))


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
    "no bias, batch 3": (dict(bias=False, batch=3), dict(padding=1)),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", GEOMETRIES)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "sliced"])
def test_fp32_is_as_accurate_as_the_composition(case, layout):
    arguments, geometry = GEOMETRIES[case]
    x, *rest = make(**arguments)
    if layout == "channels_last":
        x = x.detach().contiguous(memory_format=torch.channels_last_3d).requires_grad_()
    elif layout == "sliced":
        x = F.pad(x.detach(), (1, 2, 0, 1))[..., :-1, 1:-2].requires_grad_()
    assert_as_accurate_as_composition([x, *rest], **geometry)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("case", ["channels 21 -> 50", "dilation 8", "stride 2", "groups"])
def test_other_dtypes_are_as_accurate_as_the_composition(case, dtype):
    arguments, geometry = GEOMETRIES[case]
    assert_as_accurate_as_composition(make(**arguments, dtype=dtype), **geometry)


@pytest.mark.parametrize("case", ["channels 65 -> 66, dilation 2", "channels 96 -> 3", "stride 2"])
def test_bf16_products_are_as_accurate_as_the_composition(case, monkeypatch):
    monkeypatch.setattr(reference, "multiplies_bf16", lambda: True)
    arguments, geometry = GEOMETRIES[case]
    assert_as_accurate_as_composition(make(**arguments, dtype=torch.bfloat16), **geometry)


def test_fp16_squares_neither_overflow_nor_vanish():
    x, mu, sigma = make(bias=False)
    x, sigma = (x.detach() * 300).half(), torch.full_like(sigma, 1e-4).half()  # x^2 > 65504, sigma^2 < 2^-24
    tensors = [t.requires_grad_() for t in (x, mu.detach().half() * 0, sigma)]
    eps = normal(torch.empty(2, 5, 6, 7, 9), 7)
    g = torch.ones(eps.shape)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    exact = results(definition, doubles, g.double(), eps=eps.double(), padding=1)
    for o, e in zip(results(ffg_conv3d, tensors, g, seed=7, padding=1), exact, strict=True):
        assert relative_error(o, e) < 2e-3


@pytest.mark.usefixtures("poisoned_memory")
def test_all_zero_input_has_zero_gradient_not_nan():
    x, mu, sigma = make(bias=False)
    x = torch.zeros_like(x).requires_grad_()
    y, dx, dmu, dsigma = results(ffg_conv3d, [x, mu, sigma], torch.ones(2, 5, 6, 7, 9), padding=1)
    assert not y.any()
    assert not dmu.any()
    assert not dsigma.any()
    assert dx.isfinite().all()


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


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    tensors = make()
    gradients = torch.autograd.grad(ffg_conv3d(*tensors, padding=1).square().sum(), tensors, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError):
            torch.autograd.grad(gradient.sum(), tensors, retain_graph=True, allow_unused=True)


@pytest.mark.parametrize("kept", range(5))
def test_only_what_requires_a_gradient_gets_one(kept):
    tensors = [t.detach() for t in make()]
    g = torch.randn(2, 5, 6, 7, 9)
    everything = results(ffg_conv3d, [t.clone().requires_grad_() for t in tensors], g, padding=1, seed=3)
    tensors[kept].requires_grad_()
    y = ffg_conv3d(*tensors, padding=1, seed=3)
    (gradient,) = torch.autograd.grad(y, tensors[kept], g)
    torch.testing.assert_close(gradient, everything[1 + kept])


def test_small_std_keeps_fp16_gradients_finite():
    tensors = [t.detach().half().requires_grad_() for t in make()]
    with torch.no_grad():
        for sigma in (tensors[2], tensors[4]):
            sigma.fill_(1e-6)
    assert all(t.isfinite().all() for t in results(ffg_conv3d, tensors, torch.ones(2, 5, 6, 7, 9), padding=1))


@pytest.mark.parametrize(
    "geometry", [dict(padding=2, dilation=2), dict(stride=2, padding=1), dict(groups=2, padding=1)]
)
def test_gradcheck_in_fp64(geometry):
    tensors = make(c=2, f=4, size=(3, 4, 3), batch=1, groups=geometry.get("groups", 1), dtype=torch.float64)
    tensors[0] = (tensors[0].detach() + 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *t: ffg_conv3d(*t, seed=3, **geometry), tensors, fast_mode=False)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last_3d])
@pytest.mark.parametrize(("c", "f", "bias"), [(3, 5, True), (1, 1, False), (3, 1, True)])
def test_opcheck(layout, c, f, bias):
    x, *rest = make(c=c, f=f, size=(4, 5, 6), bias=bias)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    parameters = rest if bias else [*rest, None, None]
    one = (1, 1, 1)
    torch.library.opcheck(
        torch.ops.dwc.ffg_conv3d.default, (x, *parameters, one, one, one, 1, torch.tensor(3), "reference")
    )
    y, r = torch.ops.dwc.ffg_conv3d(x, *parameters, one, one, one, 1, torch.tensor(3), "reference")
    weights = [t.detach() for t in rest[:2]]
    backward = (torch.randn_like(y), r, x.detach())
    torch.library.opcheck(
        torch.ops.dwc.ffg_conv3d_grad_input.default, (*backward, *weights, one, one, one, 1, "reference")
    )
    torch.library.opcheck(
        torch.ops.dwc.ffg_conv3d_grad_weight.default, (*backward, weights[1], one, one, one, 1, "reference")
    )


def test_only_x_and_r_are_kept_for_the_backward():
    tensors = make(c=8, f=8, size=(8, 8, 8))
    ours = saved_bytes(lambda: ffg_conv3d(*tensors, padding=1), *tensors[1:])
    assert ours == 2 * tensors[0].numel() * 4
    assert ours <= 0.55 * saved_bytes(lambda: composition(*tensors, padding=1), *tensors[1:])


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


def test_unbatched_input_is_a_batch_of_one():
    x, *rest = make(batch=1)
    assert torch.equal(ffg_conv3d(x[0], *rest, padding=1, seed=4), ffg_conv3d(x, *rest, padding=1, seed=4)[0])


@pytest.mark.parametrize("kernel", [(3, 3, 3), (2, 4, 3)])
def test_same_padding_is_that_of_conv3d(kernel):
    x, mu, sigma, *bias = (t.detach() for t in make(kernel=kernel))
    y = ffg_conv3d(x, mu, sigma * 0, bias[0], bias[1] * 0, padding="same", dilation=(1, 1, 2))
    torch.testing.assert_close(y, F.conv3d(x, mu, bias[0], padding="same", dilation=(1, 1, 2)))
    assert ffg_conv3d(x, mu, sigma, padding="valid").shape == F.conv3d(x, mu).shape


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not():
    tensors = make(c=16, f=16)
    g = torch.randn(2, 16, 6, 7, 9)
    first, again, other = (results(ffg_conv3d, tensors, g, seed=s, padding=1) for s in (3, torch.tensor(3), 4))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0], other[0])


def test_manual_seed_governs_where_no_seed_is_given():
    tensors = make()

    def draw(seed=None):
        if seed is not None:
            torch.manual_seed(seed)
        return ffg_conv3d(*tensors, padding=1)

    first, second = draw(0), draw()
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_is_casting_by_hand(dtype):
    tensors = make(c=16, f=16)
    g = torch.randn(2, 16, 6, 7, 9)
    with torch.autocast("cpu", dtype):
        y = ffg_conv3d(*tensors, padding=1, seed=3)
        assert y.dtype == F.conv3d(*tensors[:2], padding=1).dtype == dtype
        gradients = torch.autograd.grad(y, tensors, g.to(dtype))  # even called inside
    by_hand = results(ffg_conv3d, [t.detach().to(dtype).requires_grad_() for t in tensors], g, padding=1, seed=3)
    assert torch.equal(y, by_hand[0])
    for ours, theirs in zip(gradients, by_hand[1:], strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs.float())


def test_autocast_leaves_fp64_alone_as_conv3d_does():
    with torch.autocast("cpu", torch.bfloat16):
        assert ffg_conv3d(*make(dtype=torch.float64), padding=1).dtype == torch.float64


@pytest.mark.parametrize("scale", [300.0, 1e-3])
def test_fp16_autocast_neither_overflows_nor_loses_the_noise(scale):
    x, mu, sigma = make(bias=False)
    with torch.autocast("cpu", torch.float16):
        y = ffg_conv3d(x * scale, mu * 0, torch.full_like(sigma, 1e-3), padding=1)
    assert y.isfinite().all()
    assert y.float().std() > 1e-4 * scale


def test_compile_sees_through_without_a_graph_break():
    tensors = make()
    compiled = torch.compile(
        lambda *t, s: ffg_conv3d(*t, padding=1, seed=s).relu(), fullgraph=True, backend="aot_eager"
    )
    g = torch.randn(2, 5, 6, 7, 9)
    seed = torch.tensor(9)
    for a, b in zip(
        results(lambda *t: compiled(*t, s=seed), tensors, g),
        results(lambda *t: ffg_conv3d(*t, padding=1, seed=seed).relu(), tensors, g),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    drawn = torch.compile(lambda *t: ffg_conv3d(*t, padding=1), fullgraph=True, backend="aot_eager")
    assert not torch.equal(drawn(*tensors), drawn(*tensors))


def test_compile_takes_other_shapes_and_inductor():
    compiled = torch.compile(lambda *t: ffg_conv3d(*t, padding=1, seed=3) * 2, fullgraph=True, dynamic=True)
    for size in ((6, 7, 9), (4, 5, 8)):
        tensors = make(size=size)
        g = torch.randn(2, 5, *size)
        eager = results(lambda *t: ffg_conv3d(*t, padding=1, seed=3) * 2, tensors, g)
        for a, b in zip(results(compiled, tensors, g), eager, strict=True):
            torch.testing.assert_close(a, b)


def test_an_empty_batch_and_an_expanded_one():
    x, *rest = (t.detach() for t in make(batch=1))
    assert ffg_conv3d(x[:0], *rest, padding=1).shape == (0, 5, 6, 7, 9)
    expanded = x.expand(3, -1, -1, -1, -1)
    assert torch.equal(
        ffg_conv3d(expanded, *rest, padding=1, seed=1), ffg_conv3d(expanded.clone(), *rest, padding=1, seed=1)
    )


def test_arguments_are_left_as_they_were():
    tensors = make()
    before = copy.deepcopy(tensors)
    results(ffg_conv3d, tensors, torch.ones(2, 5, 6, 7, 9), padding=1)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))


X, W, S = (2, 3, 6, 7, 9), (5, 3, 3, 3, 3), (5, 3, 3, 3, 3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3, 6, 7)), "expected input"),
        (dict(weight_sigma=torch.zeros(5, 3, 1, 1, 1)), "weight_sigma"),
        (dict(weight_mu=torch.zeros(5, 2, 3, 3, 3), weight_sigma=torch.zeros(5, 2, 3, 3, 3)), "groups=1"),
        (dict(bias_mu=torch.zeros(5)), "both"),
        (dict(bias_mu=torch.zeros(4), bias_sigma=torch.zeros(4)), "bias_mu must have shape"),
        (dict(weight_sigma=torch.zeros(W).double()), "float64"),
        (dict(x=torch.zeros(X).int(), weight_mu=torch.zeros(W).int(), weight_sigma=torch.zeros(S).int()), "int32"),
        (dict(padding="full"), "'full'"),
        (dict(padding="same", stride=2), "stride 1"),
        (dict(padding=-1), "negative"),
        (dict(dilation=9), "add padding"),
        (dict(stride=0), "positive"),
        (dict(backend="cuda"), "backend"),
        (dict(seed=torch.zeros(2, dtype=torch.int64)), "int64 scalar"),
        (dict(seed=2**63), "64-bit"),
        (dict(seed=1.5), "64-bit"),
        (dict(padding=(1, 1)), "padding must be"),
        (dict(stride=1.0), "stride must be"),
    ],
)
def test_arguments_that_do_not_fit_are_named(change, message):
    arguments = dict(x=torch.zeros(X), weight_mu=torch.zeros(W), weight_sigma=torch.zeros(S)) | change
    with pytest.raises(ValueError, match=message):
        ffg_conv3d(arguments.pop("x"), **arguments)
