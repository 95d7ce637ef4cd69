"""The three kernels through their real launchers, against the fp64 definition and the reference.

The interpreter multiplies bf16 wrongly, so bf16 is left to a GPU (`test_on_gpu`); the fp16 and fp32 paths run here.
"""

import sys
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch.utils.checkpoint import checkpoint

from dwc_kernels import FFGConv3d, ffg_conv3d, kernels, reference
from dwc_kernels.kernels import launch, products, weights
from dwc_kernels.kernels.forward import finish as forward_finish
from dwc_kernels.kernels.grad_input import finish as grad_input_finish
from dwc_kernels.kernels.noise import four_normals
from dwc_kernels.kernels.tiles import Tile
from dwc_kernels.noise import _four_normals, normal
from tests.dwc_kernels import problems
from tests.dwc_kernels.problems import DEVICE, NAMES, in_layout, results

ONE = (1, 1, 1)
NOISE = 5e-7  # how far sine and cosine of an fp32 angle may differ between two good implementations

make = partial(problems.make, size=(4, 5, 6), batch=1)
assert_as_accurate_as_composition = partial(problems.assert_as_accurate_as_composition, backend="triton", slack=NOISE)

pytestmark = pytest.mark.filterwarnings("ignore:divide by zero:RuntimeWarning")  # 1 / sqrt(0), not taken


GEOMETRIES = {
    "channels 1 -> 16": (dict(c=1, f=16), dict(padding=1)),
    "channels 3 -> 21": (dict(c=3, f=21), dict(padding=1)),
    "channels 21 -> 3": (dict(c=21, f=3), dict(padding=1)),
    "channels 96 -> 96": (dict(c=96, f=96, size=(2, 4, 4)), dict(padding=1)),
    "channels 96 -> 50, 1x1x1": (dict(c=96, f=50, kernel=1), {}),
    "kernel 2": (dict(c=6, kernel=2), dict(padding=1)),  # no tap is left over for the bias
    "kernel 5": (dict(kernel=5), dict(padding=2)),
    "kernel 7": (dict(c=5, kernel=(1, 7, 2), size=(2, 8, 4)), dict(padding=(0, 3, 1))),
    "lopsided kernel": (dict(c=8, kernel=(1, 2, 3)), dict(padding=(0, 1, 2), dilation=(1, 2, 1))),
    "6x7x9": (dict(c=5, size=(6, 7, 9)), dict(padding=1)),
    "one voxel": (dict(c=6, size=(1, 1, 1)), dict(padding=1)),
    "33x5x2": (dict(c=6, size=(33, 5, 2)), dict(padding=2, dilation=2)),
    "dilation 8": (dict(c=6), dict(padding=8, dilation=8)),
    "dilation beyond the volume": (dict(c=6, size=(3, 4, 5)), dict(padding=11, dilation=11)),
    "no padding": (dict(c=6), {}),
    "padding beyond the kernel": (dict(c=6, size=(3, 2, 4)), dict(padding=4)),
    "no bias, batch 3": (dict(c=6, bias=False, batch=3), dict(padding=1)),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", GEOMETRIES)
def test_fp32_is_as_accurate_as_the_composition(case):
    arguments, geometry = GEOMETRIES[case]
    assert_as_accurate_as_composition(make(**arguments), **geometry)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", ["channels_last", "sliced"])
def test_every_layout_gives_the_same(layout):
    x, *rest = make(c=8, size=(4, 5, 8))
    other = in_layout(x, layout)
    g = torch.randn(1, 5, 4, 5, 8)
    options = dict(seed=3, padding=1, backend="triton")
    for a, b in zip(
        results(ffg_conv3d, [x, *rest], g, **options), results(ffg_conv3d, [other, *rest], g, **options), strict=True
    ):
        assert torch.equal(a, b)
    y = ffg_conv3d(other, *rest, **options)
    assert y.is_contiguous(memory_format=reference.output_layout(other))


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", ["channels 3 -> 21", "dilation 8"])
def test_fp16_is_as_accurate_as_the_composition(case):
    arguments, geometry = GEOMETRIES[case]
    assert_as_accurate_as_composition(make(**arguments, dtype=torch.float16), **geometry)


def test_fp16_squares_neither_overflow_nor_vanish():
    problems.assert_fp16_squares_neither_overflow_nor_vanish((2, 5, 6), backend="triton")


@pytest.mark.usefixtures("poisoned_memory")
def test_all_zero_input_has_zero_gradient_not_nan():
    problems.assert_background_has_zero_gradient((2, 5, 6), backend="triton")


def test_biases_of_any_stride_are_read_as_they_are():
    x, mu, sigma, *_ = (t.detach() for t in make(c=8, f=5, kernel=1))
    biases = torch.randn(2, 10).abs()[:, ::2]
    ours, theirs = (ffg_conv3d(x, mu, sigma, *biases, seed=1, backend=b) for b in ("triton", "reference"))
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def test_the_sample_is_the_same_whether_or_not_r_is_kept():
    tensors = [t.detach() for t in make(c=8)]
    arguments = (*tensors, ONE, ONE, ONE, 1, torch.tensor(3))
    y, r = kernels.forward(*arguments)
    alone, nothing = kernels.forward(*arguments, keep_r=False)
    assert torch.equal(alone, y)
    assert r.shape == y.shape
    assert nothing.numel() == 0


def test_zero_sigma_is_conv3d():
    x, mu, sigma, b_mu, b_sigma = make(c=8)
    y = ffg_conv3d(x, mu, 0 * sigma, b_mu, 0 * b_sigma, padding=1, backend="triton")
    torch.testing.assert_close(y, F.conv3d(x, mu, b_mu, padding=1), rtol=1e-5, atol=1e-5)


# Tiles with other boxes, channel blocks, columns and chunks than the model's choice.
FORWARD_TILES = [
    Tile((4, 8, 8), 16, 32, 16, 16, 8, 3),
    Tile((1, 4, 4), 32, 16, 0, 16, 1, 2),
    Tile((2, 4, 8), 16, 64, 0, 8, 2, 2),
]


@pytest.mark.parametrize("width", [8, 7])
def test_noise_is_the_reference_s_whatever_the_tile(width):
    x, _, _, b_mu, b_sigma = (t.detach() for t in make(c=33, f=40, kernel=1, size=(1, 6, width), batch=2))
    zero = torch.zeros(40, 33, 1, 1, 1)  # mean 0 and standard deviation 1: y is the noise
    seed = torch.tensor(-(2**60) + 12345)
    drawn = [
        kernels.forward(x, zero, zero, 0 * b_mu, 1 + 0 * b_sigma, ONE, (0,) * 3, ONE, 1, seed, tile=tile)[0]
        for tile in FORWARD_TILES
    ]
    assert all(torch.equal(n, drawn[0]) for n in drawn)
    expected = normal(torch.empty(2, 40, 1, 6, width), int(seed))
    torch.testing.assert_close(drawn[0], expected, rtol=0, atol=2e-6)


@triton.jit
def draw(out, group, seed):
    lane = tl.arange(0, 1)
    z = four_normals(seed, group + lane)
    for i in tl.static_range(4):
        tl.store(out + i + lane, z[i])


def test_noise_of_elements_beyond_2_to_the_32_groups_is_the_reference_s():
    group, seed, out = 2**40 + 12345, 2**62 + 77, torch.empty(4)
    draw[(1,)](out, group, seed)
    expected = torch.empty(4, 1)
    _four_normals(torch.tensor([group]), seed, expected)
    torch.testing.assert_close(out, expected[:, 0], rtol=0, atol=2e-6)


def test_every_tile_gives_the_same_to_rounding_and_one_tile_the_same_bits():
    x, mu, sigma, b_mu, b_sigma = (t.detach() for t in make(c=33, f=40, kernel=(1, 3, 2), size=(3, 4, 6)))
    geometry = (ONE, (0, 1, 1), ONE, 1)
    seed = torch.tensor(5)
    y, r = reference.forward(x, mu, sigma, b_mu, b_sigma, *geometry, seed)
    g = torch.randn(y.shape)
    dx = reference.grad_input(g, r, x, mu, sigma, *geometry)
    for tile in FORWARD_TILES[1:]:
        out = kernels.forward(x, mu, sigma, b_mu, b_sigma, *geometry, seed, tile=tile)
        again = kernels.forward(x, mu, sigma, b_mu, b_sigma, *geometry, seed, tile=tile)
        assert all(torch.equal(a, b) for a, b in zip(out, again, strict=True))
        torch.testing.assert_close(out[0], y, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(out[1], r, rtol=1e-4, atol=1e-4)
        ours = kernels.grad_input(g, r, x, mu, sigma, *geometry, tile=tile)
        torch.testing.assert_close(ours, dx, rtol=1e-4, atol=1e-3)
    gradients = reference.grad_weight(g, r, x, sigma, *geometry)
    for tile in (Tile((1, 4, 8), 32, 32, 16, 16, 4, 2), Tile((1, 2, 8), 32, 64, 0, 16, 4, 2)):
        ours = kernels.grad_weight(g, r, x, sigma, *geometry, tile=tile)
        again = kernels.grad_weight(g, r, x, sigma, *geometry, tile=tile)
        for a, b, e in zip(ours, again, gradients, strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n_splits", [3, 20])
def test_weight_sums_split_over_programs_add_up(monkeypatch, n_splits):
    module = sys.modules["dwc_kernels.kernels.grad_weight"]
    monkeypatch.setattr(module, "INTERPRETED_SUMS", module.SUMS)
    x, _, sigma = (t.detach() for t in make(c=5, f=6, kernel=(1, 3, 1), size=(5, 6, 9), batch=2, bias=False))
    g, r = torch.randn(2, 6, 5, 6, 9), torch.randn(2, 6, 5, 6, 9)
    geometry = (ONE, (0, 1, 0), ONE, 1)
    monkeypatch.setattr(module, "splits", lambda *_: n_splits)
    bias_sigma = torch.rand(6)
    ours = kernels.grad_weight(g, r, x, sigma, *geometry, bias_sigma=bias_sigma)
    for o, e in zip(ours, reference.grad_weight(g, r, x, sigma, *geometry, bias_sigma=bias_sigma), strict=True):
        torch.testing.assert_close(o, e, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("size", "f"), [((5, 9, 17), 37), ((4, 8, 8), 32), ((1, 1, 1), 1)])
def test_bias_gradients_alone_are_the_reference_s(size, f, dtype):
    g, r = (torch.randn(2, f, *size).to(dtype) for _ in range(2))
    sigma = torch.rand(f).to(dtype)
    ours = kernels.grad_bias(g, r, sigma)
    for o, e in zip(ours, reference.grad_bias(g.double(), r.double(), sigma.double()), strict=True):
        assert o.dtype == dtype
        torch.testing.assert_close(o.double(), e, rtol=torch.finfo(dtype).eps, atol=1e-4)
    again = kernels.grad_bias(g, r, sigma)
    assert all(torch.equal(a, o) for a, o in zip(again, ours, strict=True))


def test_tf32_rounds_to_nearest_instead_of_truncating():
    _, w, _ = (t.detach() for t in make(c=8, f=16, kernel=1, bias=False))
    for orientation, order in (("forward", w[..., 0, 0, 0]), ("adjoint", w[..., 0, 0, 0].T)):
        packed, squares = (t[0] for t in weights.pack(w, w, {orientation}, "tf32")[orientation])
        for t, exact in ((packed, order), (squares, order.square())):
            assert ((t[:, : exact.shape[1]] - exact).abs() <= exact.abs() * 2.0**-11).all()
            assert not (t.view(torch.int32) & 0x1FFF).any()


@triton.jit
def round_all(x, out, N: tl.constexpr):
    at = tl.arange(0, N)
    tl.store(out + at, products.to_tf32(tl.load(x + at)))


def test_tf32_rounding_keeps_nan_and_infinity():
    bits = [0x7FFFFFFF, 0x7F800001, 0x7FC00000, -1, -0x7FFFFF]  # NaN: NVIDIA's own, signaling, quiet, and negative ones
    nan = torch.tensor(bits, dtype=torch.int32).view(torch.float32)
    other = torch.tensor(
        [torch.inf, -torch.inf, 0.0, -0.0, 1.0, 1 + 2.0**-11, 1 + 2.0**-12, 2.0**-130, -2.5, 3e38, 0.1]
    )
    x = torch.cat([nan, other])
    out = torch.empty_like(x)
    round_all[(1,)](x, out, 16)
    assert out[: len(nan)].isnan().all()
    exact = other.clone()
    exact[5], exact[6] = 1 + 2.0**-10, 1.0  # a tie goes away from zero
    torch.testing.assert_close(out[len(nan) :], exact, rtol=2.0**-11, atol=0)
    assert torch.equal(out[len(nan) : -2], exact[:-2])


@pytest.fixture(params=["ieee", "tf32"])
def precision(request, monkeypatch):
    """Both ways in which fp32 is multiplied; the interpreter rounds operands as the instruction does."""
    monkeypatch.setattr(launch.Plan, "precision", request.param)
    return request.param


def special_values():
    """What breaks arithmetic: (where, value)."""
    return [("x", torch.nan), ("x", torch.inf), ("x", 3e19), ("weight_mu", torch.nan), ("weight_sigma", torch.nan),
            ("weight_sigma", torch.inf), ("bias_mu", -torch.inf), ("bias_sigma", torch.nan), ("g", torch.nan),
            ("g", torch.inf)]  # fmt: skip


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("place", "value"), special_values())
def test_nan_and_infinity_come_out_where_the_reference_has_them(place, value, dtype, precision):
    # No padding: a product of infinity and the zeros outside the volume is left out by some backends and NaN in others.
    names = ("x", "weight_mu", "weight_sigma", "bias_mu", "bias_sigma")
    tensors = [t.detach().to(dtype) for t in make(c=6, f=5, size=(5, 5, 6))]
    g = torch.randn(1, 5, 3, 3, 4, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)
    where = g if place == "g" else tensors[names.index(place)]
    where.view(-1)[where.numel() // 2] = value
    found = []
    for backend in ("triton", "reference"):
        inputs = [t.clone().requires_grad_() for t in tensors]
        found.append(results(ffg_conv3d, inputs, g, seed=3, backend=backend))
    for name, ours, theirs in zip(("y", *names), *found, strict=True):
        if name == "x" and place.startswith("weight"):  # the adjoint is padded: only voxels that all taps reach
            ours, theirs = (t[..., 2:3, 2:3, 2:4] for t in (ours, theirs))
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        assert torch.equal(ours.isinf(), theirs.isinf()), name
        finite = ours.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=5e-3, atol=5e-3)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("corner", [0, -1])
@pytest.mark.parametrize("padding", [0, 1])
def test_a_special_value_at_a_corner_stays_in_its_channel_and_is_never_hidden(corner, value, padding, dtype):
    tensors = [t.detach().to(dtype) for t in make(c=6, f=5, size=(5, 5, 6))]
    tensors[0][0, 2, corner, corner, corner] = value
    size = (n - 2 + 2 * padding for n in (5, 5, 6))
    g = torch.randn(1, 5, *size, generator=torch.Generator(DEVICE).manual_seed(1)).to(dtype)
    found = []
    for backend in ("triton", "reference"):
        inputs = [t.clone().requires_grad_() for t in tensors]
        found.append(results(ffg_conv3d, inputs, g, seed=3, padding=padding, backend=backend))
    for name, ours, theirs in zip(NAMES, *found, strict=True):
        if name.startswith("weight"):
            # A box of outputs that ends beyond the volume multiplies x there with zero: NaN at more taps.
            assert (ours.isnan() | ~theirs.isnan()).all(), name
            assert (ours.isfinite() <= theirs.isfinite()).all(), name
            others = [0, 1, 3, 4, 5]
            ours, theirs = ours[:, others], theirs[:, others]
        assert torch.equal(ours.isnan(), theirs.isnan()), name
        assert torch.equal(ours.isinf(), theirs.isinf()), name
        finite = ours.isfinite()
        torch.testing.assert_close(ours[finite], theirs[finite], rtol=5e-3, atol=1e-2)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_the_gradient_at_a_value_near_the_end_of_fp32_is_finite():
    tensors = [t.detach() for t in make(c=6, f=5, size=(5, 5, 6))]
    tensors[0][0, 2, 4, 4, 5] = 3e38
    inputs = [t.requires_grad_() for t in tensors]
    found = [results(ffg_conv3d, inputs, torch.ones(1, 5, 5, 5, 6), seed=3, padding=1, backend=b)[1]
             for b in ("triton", "reference")]  # fmt: skip
    assert found[0].isfinite().all()
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("poison", [0x7FFFFFFF, 0x7FC00000, 0x7F800001])
def test_weights_that_are_all_nan_give_nan(poison, precision):
    x, mu, sigma, *biases = (t.detach() for t in make(c=8))
    nan = torch.full_like(mu, poison, dtype=torch.int32).view(torch.float32)
    assert ffg_conv3d(x, nan, sigma, *biases, padding=1, backend="triton").isnan().all()
    assert ffg_conv3d(x, mu, nan, *biases, padding=1, backend="triton").isnan().all()


@pytest.mark.parametrize("sigma", [1e-18, 1e-19, 1e-20, 1e-22, 0.0])
def test_a_tiny_standard_deviation_is_as_the_reference_has_it(sigma):
    x, mu, *_ = (t.detach() for t in make(c=8, bias=False))
    x += 1.0
    arguments = (x, 0 * mu, torch.full_like(mu, sigma), None, None, ONE, ONE, ONE, 1, torch.tensor(3))
    for ours, theirs in zip(kernels.forward(*arguments), reference.forward(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if sigma < 1e-21 else 1e-4, atol=0)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "odd strides"])
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 1, 4), (4, 1, 1), (1, 4, 1)])
@pytest.mark.parametrize(("n", "c", "f"), [(1, 8, 8), (1, 1, 1), (2, 4, 1), (1, 8, 3), (3, 1, 8)])
def test_dimensions_of_one_run_in_every_layout(n, c, f, size, layout):
    x, mu, sigma, *biases = (t.detach() for t in make(c=c, f=f, size=size, batch=n))
    if layout == "odd strides":  # of dimensions of 1, which PyTorch allows
        strides = [7 if length == 1 else stride for length, stride in zip(x.shape, x.stride(), strict=True)]
        x = x.as_strided(x.shape, strides)
        mu, sigma = mu[..., 1:2, 1:2, 1:2], sigma[..., 1:2, 1:2, 1:2]
    elif layout == "channels_last":
        x, mu, sigma = (t.contiguous(memory_format=torch.channels_last_3d) for t in (x, mu, sigma))
    g = torch.randn(n, f, *size)
    ours, theirs = (
        results(
            ffg_conv3d, [t.detach().requires_grad_() for t in (x, mu, sigma, *biases)], g,
            seed=1, padding="same", backend=backend,
        )
        for backend in ("triton", "reference")
    )  # fmt: skip
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_a_net_that_ends_in_one_voxel_trains():
    torch.manual_seed(0)
    net = torch.nn.Sequential(*(FFGConv3d(8, 8, 3, backend="triton") for _ in range(2)))
    x = torch.randn(1, 8, 5, 5, 5).requires_grad_()
    net(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())


STRIDED = {
    "2": (dict(c=6, size=(5, 6, 7)), dict(stride=2, padding=1)),
    "2, even volume": (dict(c=8, size=(4, 4, 8)), dict(stride=2, padding=1)),
    "per dimension": (dict(c=5, kernel=(2, 3, 1), size=(5, 6, 9)), dict(stride=(1, 2, 3), padding=(1, 2, 0))),
    "with dilation": (dict(c=6, size=(6, 7, 9)), dict(stride=2, padding=3, dilation=(2, 3, 1))),
    "larger than the kernel": (dict(c=6, kernel=2, size=(7, 6, 6)), dict(stride=3)),
    "1x1x1": (dict(c=6, kernel=1, size=(5, 4, 6)), dict(stride=2)),
    "folded": (dict(c=1, f=8, size=(6, 5, 7)), dict(stride=2, padding=1)),
    "batch 3": (dict(c=6, batch=3), dict(stride=2, padding=1)),
}


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("case", STRIDED)
def test_a_strided_forward_is_as_accurate_as_the_composition(case):
    arguments, geometry = STRIDED[case]
    assert_as_accurate_as_composition(make(**arguments), **geometry)


def test_compile_sees_through_to_the_kernels():
    tensors = make(c=8, kernel=1, size=(2, 4, 4))
    compiled = torch.compile(
        lambda *t: ffg_conv3d(*t, seed=3, backend="triton").relu(), fullgraph=True, backend="aot_eager"
    )
    torch.testing.assert_close(compiled(*tensors), ffg_conv3d(*tensors, seed=3, backend="triton").relu())


def gradients(layer, call, x):
    """Of the parameters, for one forward and backward under one seed."""
    layer.zero_grad()
    torch.manual_seed(5)
    call(x).float().square().sum().backward()
    return [p.grad.clone() for p in layer.parameters()]


@pytest.mark.parametrize("how", ["plain", "checkpoint", "reentrant", "compile", "functional_call", "autocast"])
def test_the_module_trains_through_the_kernels_as_through_the_reference(how):
    torch.manual_seed(0)
    layer = FFGConv3d(3, 5, 3, padding=1, sigma_init=0.1, backend="reference")
    x = torch.randn(1, 3, 2, 4, 4).requires_grad_()
    expected = gradients(layer, layer, x)
    layer.backend = "triton"
    call = {
        "checkpoint": lambda t: checkpoint(layer, t, use_reentrant=False),
        "reentrant": lambda t: checkpoint(layer, t, use_reentrant=True),
        "compile": torch.compile(layer, fullgraph=True, backend="aot_eager"),
        "functional_call": lambda t: torch.func.functional_call(layer, dict(layer.named_parameters()), (t,)),
    }.get(how, layer)
    with torch.autocast(DEVICE, torch.float16, enabled=how == "autocast"):
        ours = gradients(layer, call, x)
    tolerance = 2e-3 if how == "autocast" else 2e-6
    for o, e in zip(ours, expected, strict=True):
        assert problems.relative_error(o, e.double()) < tolerance


# The last tile of a volume of more elements than 32 bits count. Its memory is reserved, and a tile's worth touched.
FAR_SIZES = ["sample", "d0", "h0", "w0", "F", "D", "H", "W"]
FAR = dict(sample=1, d0=4, h0=8190, w0=8188, F=3, D=6, H=8192, W=8192)


@triton.jit(do_not_specialize=FAR_SIZES)
def far_forward(y, seed, sample, d0, h0, w0, F, D, H, W):
    zero = tl.zeros([16, 4], tl.float32)
    forward_finish(zero, zero + 1.0, None, None, y, None, seed, sample, 0, d0, h0, w0, F, D, H, W, 2, 2, 4, 4, 16, True)


@triton.jit(do_not_specialize=FAR_SIZES)
def far_grad_input(x, sample, d0, h0, w0, F, D, H, W):
    zero = tl.zeros([16, 4], tl.float32)
    grad_input_finish(zero + 1.0, zero + 2.0, x, x, sample, 0, d0, h0, w0, F, D, H, W, 2, 2, 4, 4, 16)


def test_volumes_beyond_2_to_the_31_elements_index_rightly():
    n_voxels = 6 * 8192 * 8192
    volume = torch.empty((2, 6, 8192, 8192, 3), dtype=torch.float16)
    assert volume.numel() > 2**31
    corner = volume[1, 4:, 8190:, 8188:]
    far_forward[(1,)](volume, 7, **FAR)
    voxels = torch.arange(n_voxels - 2 * 8192**2, n_voxels).view(2, 8192, 8192)[:, 8190:, 8188:, None]
    index = (3 + torch.arange(3)) * n_voxels + voxels  # of sample 1, in NCDHW order
    lanes = torch.empty(4, *index.shape)
    _four_normals(index // 4, 7, lanes)
    torch.testing.assert_close(corner.float(), lanes.gather(0, (index % 4)[None])[0], rtol=1e-3, atol=1e-4)
    corner.fill_(3)
    far_grad_input[(1,)](volume, **FAR)
    assert (corner == 1 + 2 * 3 * 2).all()
