"""The op as a citizen of PyTorch: autograd, fake tensors, compile, autocast, and what it refuses."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.composition import composition, saved_bytes
from dwc_kernels import ffg_conv3d, reference
from tests.dwc_kernels.problems import (
    in_layout,
    make,
    results,
)


def test_a_second_derivative_is_an_error_not_a_wrong_number():
    tensors = make()
    gradients = torch.autograd.grad(ffg_conv3d(*tensors, padding=1).square().sum(), tensors, create_graph=True)
    for gradient in gradients:
        with pytest.raises(RuntimeError):
            torch.autograd.grad(gradient.sum(), tensors, retain_graph=True, allow_unused=True)


def test_a_forward_mode_tangent_is_an_error_not_a_silent_zero():
    tensors = [t.detach() for t in make()]
    for place in range(5):
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, t) if i == place else t for i, t in enumerate(tensors)]
            with pytest.raises(RuntimeError, match="forward-mode"):
                ffg_conv3d(*duals, padding=1)
    with pytest.raises(RuntimeError, match="forward-mode"):
        torch.func.jvp(lambda x: ffg_conv3d(x, *tensors[1:], padding=1), (tensors[0],), (tensors[0],))
    with forward_ad.dual_level():  # of something else
        assert ffg_conv3d(*tensors, padding=1).isfinite().all()


def test_the_sample_is_the_same_whether_or_not_r_is_kept():
    tensors = make()
    kept = ffg_conv3d(*tensors, padding=1, seed=3)
    with torch.no_grad():
        assert torch.equal(ffg_conv3d(*tensors, padding=1, seed=3), kept)
    _, r = torch.ops.dwc.ffg_conv3d(*tensors, *[(1, 1, 1)] * 3, 1, torch.tensor(3), "reference", False)
    assert r.numel() == 0


@pytest.mark.parametrize("kept", range(5))
def test_only_what_requires_a_gradient_gets_one(kept):
    tensors = [t.detach() for t in make()]
    g = torch.randn(2, 5, 6, 7, 9)
    everything = results(ffg_conv3d, [t.clone().requires_grad_() for t in tensors], g, padding=1, seed=3)
    tensors[kept].requires_grad_()
    y = ffg_conv3d(*tensors, padding=1, seed=3)
    (gradient,) = torch.autograd.grad(y, tensors[kept], g)
    torch.testing.assert_close(gradient, everything[1 + kept])


@pytest.mark.parametrize("backend", ["reference", "triton"])
@pytest.mark.parametrize("frozen", [(1, 2), (3, 4), (0, 1, 2)])
def test_frozen_parameters_change_no_other_gradient(frozen, backend):
    tensors = [t.detach() for t in make(c=4, size=(2, 3, 4), batch=1)]
    g = torch.randn(1, 5, 2, 3, 4)
    options = dict(padding=1, seed=3, backend=backend)
    everything = results(ffg_conv3d, [t.clone().requires_grad_() for t in tensors], g, **options)[1:]
    trained = [i for i in range(5) if i not in frozen]
    for i in trained:
        tensors[i].requires_grad_()
    gradients = torch.autograd.grad(ffg_conv3d(*tensors, **options), [tensors[i] for i in trained], g)
    for i, gradient in zip(trained, gradients, strict=True):
        torch.testing.assert_close(gradient, everything[i])


def test_the_backward_is_handed_no_zeros_for_r():
    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func.name())
            return func(*args, **(kwargs or {}))

    names: list[str] = []
    tensors = make()
    y = ffg_conv3d(*tensors, padding=1)
    with Recorded():
        torch.autograd.grad(y, tensors, torch.ones_like(y))
    assert "dwc::ffg_conv3d_grad_weight" in names
    assert not [name for name in names if "zeros" in name]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    "arguments",
    [
        dict(c=16, f=16, size=(8, 8, 8)),
        dict(c=32, f=16, size=(12, 12, 12)),
        dict(c=64, f=64, size=(2, 2, 2)),
        dict(c=64, f=65, size=(12, 12, 12), batch=1),
        dict(c=1, f=16, size=(8, 8, 8)),
    ],
)
def test_the_operators_have_the_bits_of_the_backward_as_a_whole(arguments, layout):
    class Watched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            return func(*args, **(kwargs or {}))

    x, *rest = make(**arguments)
    tensors = [in_layout(x, layout), *rest]
    g = torch.randn(len(x), arguments["f"], *arguments["size"])
    whole = results(ffg_conv3d, tensors, g, padding=1, seed=3)
    with Watched():  # somebody looks on, so that the operators are called
        parts = results(ffg_conv3d, tensors, g, padding=1, seed=3)
    assert all(map(torch.equal, whole, parts))
    assert all(a.stride() == b.stride() for a, b in zip(whole, parts, strict=True))


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


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("arguments", "geometry"),
    [
        (dict(c=3, f=5), {}),
        (dict(c=1, f=1, bias=False), {}),
        (dict(c=3, f=1), {}),
        (dict(c=3, f=5), dict(stride=(2, 1, 3))),
        (dict(c=4, f=6, groups=2), dict(groups=2)),
        (dict(c=2, f=3), dict(padding=(2, 0, 2), dilation=(2, 1, 1))),
    ],
)
def test_opcheck(layout, arguments, geometry):
    x, *rest = make(**arguments, size=(4, 5, 6))
    x, parameters = in_layout(x, layout), (*rest, None, None)[:4]
    one = (1, 1, 1)
    where = dict(stride=one, padding=one, dilation=one, groups=1) | geometry
    where = tuple((v,) * 3 if isinstance(v, int) and k != "groups" else v for k, v in where.items())
    sample, forward = torch.ops.dwc.ffg_conv3d.default, (x, *parameters, *where, torch.tensor(3), "reference")
    torch.library.opcheck(sample, forward)
    with torch.no_grad():
        torch.library.opcheck(sample, (*forward, False), test_utils=("test_schema", "test_faketensor"))
    y, r = torch.ops.dwc.ffg_conv3d(x, *parameters, *where, torch.tensor(3), "reference")
    g, r, x, mu, sigma = (t.detach() for t in (torch.randn_like(y), r, x, *rest[:2]))
    for name, inputs in (("input", (g, r, x, mu, sigma)), ("weight", (g, r, x, sigma))):
        torch.library.opcheck(getattr(torch.ops.dwc, f"ffg_conv3d_grad_{name}").default, (*inputs, *where, "reference"))
    if parameters[3] is not None:
        gradients = torch.ops.dwc.ffg_conv3d_grad_weight.default
        torch.library.opcheck(gradients, (g, r, x, sigma, *where, "reference", parameters[3].detach()))
        torch.library.opcheck(torch.ops.dwc.ffg_conv3d_grad_bias.default, (g, r, parameters[3].detach(), "reference"))


def test_only_x_and_r_are_kept_for_the_backward():
    tensors = make(c=8, f=8, size=(8, 8, 8))
    ours = saved_bytes(lambda: ffg_conv3d(*tensors, padding=1), *tensors[1:])
    assert ours == 2 * tensors[0].numel() * 4
    assert ours <= 0.55 * saved_bytes(lambda: composition(*tensors, padding=1), *tensors[1:])


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
    from torch._inductor.utils import fresh_cache

    compiled = torch.compile(lambda *t: ffg_conv3d(*t, padding=1, seed=3) * 2, fullgraph=True, dynamic=True)
    with fresh_cache():  # PyTorch's does not tell versions of an operator apart
        for size in ((6, 7, 9), (4, 5, 8)):
            tensors = make(size=size)
            g = torch.randn(2, 5, *size)
            eager = results(lambda *t: ffg_conv3d(*t, padding=1, seed=3) * 2, tensors, g)
            for a, b in zip(results(compiled, tensors, g), eager, strict=True):
                torch.testing.assert_close(a, b)


def test_an_empty_batch_and_an_expanded_one():
    x, *rest = (t.detach() for t in make(batch=1))
    assert ffg_conv3d(x[:0], *rest, padding=1).shape == (0, 5, 6, 7, 9)
    empty = [x[:0].requires_grad_(), *(t.clone().requires_grad_() for t in rest)]
    assert not any(t.any() for t in results(ffg_conv3d, empty, x.new_zeros(0, 5, 6, 7, 9), padding=1))
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


def test_where_a_kernel_can_draw_the_noise_the_reference_lets_it(monkeypatch):
    from dwc_kernels.kernels import noise

    tensors, calls = [t.detach() for t in make(c=4, f=4, groups=2)], []
    expected = ffg_conv3d(*tensors, groups=2, seed=3)
    monkeypatch.setattr(reference, "_launches", lambda x: True)
    monkeypatch.setattr(noise, "normal", lambda *a, f=noise.normal: calls.append(a) or f(*a))
    torch.testing.assert_close(ffg_conv3d(*tensors, groups=2, seed=3), expected)
    assert len(calls) == 1
