"""What a call packs, plans and launches, how long it keeps that, and what it refuses."""

import gc
import re
import sys
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dwc_kernels import ffg_conv3d, kernels, reference
from dwc_kernels.backends import choose_backend, why_not_triton
from dwc_kernels.kernels import launch, noise, weights
from dwc_kernels.noise import normal
from tests.dwc_kernels import problems
from tests.dwc_kernels.problems import DEVICE

ONE = (1, 1, 1)

make = partial(problems.make, size=(4, 5, 6), batch=1)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize("shape", [(2, 5, 4, 2, 3), (3, 7, 3, 3, 5), (1, 1, 1, 1, 1), (1001,), (0, 3)])
def test_noise_alone_is_one_launch_with_the_reference_s_numbers_in_every_layout(shape, monkeypatch):
    launches = []
    monkeypatch.setattr(noise, "run_on", lambda *a, f=noise.run_on: launches.append(a) or f(*a))
    like, seed = torch.empty(shape), torch.tensor(2**40 + 3)
    layouts = [like, torch.empty(shape[::-1]).permute(*range(len(shape) - 1, -1, -1))]
    layouts += [like.to(memory_format=torch.channels_last_3d)] if len(shape) == 5 else []
    for other in layouts:
        eps = noise.normal(other, seed)
        torch.testing.assert_close(eps, normal(other, int(seed)), rtol=0, atol=2e-6)
        assert eps.stride() == normal(other, int(seed)).stride()
    assert len(launches) == len(layouts) * (like.numel() > 0)


def test_weights_are_packed_once_for_a_forward_and_its_own_backward(monkeypatch):
    calls = []
    monkeypatch.setattr(weights, "pack", lambda *a, f=weights.pack: calls.append(a[2]) or f(*a))
    tensors = make(c=8)
    y = ffg_conv3d(*tensors, padding=1, seed=1, backend="triton")
    first = torch.autograd.grad(y, tensors, torch.ones_like(y), retain_graph=True)
    assert calls == [{"forward", "adjoint"}]
    again = torch.autograd.grad(y, tensors, torch.ones_like(y))  # a second backward finds no adjoint
    assert calls[1:] == [{"adjoint"}]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    ffg_conv3d(*tensors, padding=1, seed=1, backend="triton")  # the same weights are packed again
    assert calls[2:] == [{"forward", "adjoint"}]
    with torch.no_grad():
        ffg_conv3d(*tensors, padding=1, seed=1, backend="triton")
    assert calls[3:] == [{"forward"}]


@pytest.mark.parametrize("frozen_sigma", [False, True])
def test_steps_of_a_fused_optimizer_are_seen(frozen_sigma):
    x, mu, sigma, *_ = make(c=8, bias=False)
    sigma.requires_grad_(not frozen_sigma)
    optimizer = torch.optim.Adam([t for t in (mu, sigma) if t.requires_grad], 0.1, fused=True)
    for _ in range(3):
        version, found = mu._version, []
        for backend in ("triton", "reference"):
            y = ffg_conv3d(x, mu, sigma, padding=1, seed=1, backend=backend)
            found.append([y, *torch.autograd.grad(y, [x, mu], torch.ones_like(y))])
        for ours, theirs in zip(*found, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)
        for t in (mu, sigma):
            t.grad = torch.ones_like(t) if t.requires_grad else None
        before = mu.detach().clone()
        optimizer.step()
        assert not torch.equal(mu, before)
    assert mu._version == version  # which is why versions cannot be trusted


def test_writes_through_other_views_of_the_weights_memory_are_seen():
    x, mu, sigma = (t.detach() for t in make(c=8, bias=False))
    writes = [
        lambda: torch.from_dlpack(mu).mul_(2),
        lambda: mu.data.mul_(2),
        *(lambda t=t: t.numpy().__imul__(2) for t in (mu, sigma) if DEVICE == "cpu"),
    ]
    for write in writes:
        ffg_conv3d(x, mu, sigma, padding=1, seed=1, backend="triton")
        write()
        ours, theirs = (ffg_conv3d(x, mu, sigma, padding=1, seed=1, backend=b) for b in ("triton", "reference"))
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-3)


def test_an_input_gradient_with_other_weights_than_its_forward_s_is_that_of_the_other_weights():
    x, mu, sigma = (t.detach() for t in make(c=8, bias=False))
    for change in (lambda: mu.mul_(2), lambda: sigma.mul_(2), lambda: mu.set_(torch.randn(mu.shape))):
        y, r = kernels.forward(x, mu, sigma, None, None, ONE, ONE, ONE, 1, torch.tensor(1))
        change()
        arguments = (y, r, x, mu, sigma, ONE, ONE, ONE, 1)
        ours, theirs = kernels.grad_input(*arguments), reference.grad_input(*arguments)
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-2)


class Counted(TorchDispatchMode):
    """Counts the operators that would launch a kernel of their own."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            self.names.append(func.name())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("c", [96, 21])
def test_a_step_launches_its_kernels_and_nothing_else(c, dtype, monkeypatch):
    launches = []
    for module in (launch, weights, sys.modules["dwc_kernels.kernels.grad_weight"]):
        monkeypatch.setattr(module, "run_on", lambda _, kernel, *__, **___: launches.append(kernel.fn.__name__))
    x = torch.zeros(2, 96, 4, 4, 8, dtype=dtype).to(memory_format=torch.channels_last_3d)
    mu, b = torch.zeros(c // 3 * 8, 96, 3, 3, 3, dtype=dtype), torch.zeros(c // 3 * 8, dtype=dtype)
    arguments = (ONE, ONE, ONE, 1)
    with Counted() as counted:
        y, r = kernels.forward(x, mu, mu, b, b, *arguments, torch.tensor(0))
        kernels.grad_input(y, r, x, mu, mu, *arguments)
        kernels.grad_weight(y, r, x, mu, *arguments, bias_sigma=b)
    assert launches == ["pack_kernel", "forward_kernel", "grad_input_kernel", "grad_weight_kernel", "sum_kernel"]
    assert counted.names == []


def test_a_step_with_one_channel_adds_its_folded_input_and_weights_and_nothing_else(monkeypatch):
    launches = []
    for module in (launch, weights, sys.modules["dwc_kernels.kernels.grad_weight"]):
        monkeypatch.setattr(module, "run_on", lambda *_, **__: launches.append(1))
    x, mu, b = torch.zeros(2, 1, 4, 4, 8), torch.zeros(16, 1, 3, 3, 3), torch.zeros(16)
    x = x.to(memory_format=torch.channels_last_3d)  # as `contiguous` would not say it of one channel
    arguments = (ONE, ONE, ONE, 1)
    with Counted() as counted:
        y, r = kernels.forward(x, mu, mu, b, b, *arguments, torch.tensor(0))
        kernels.grad_input(y, r, x, mu, mu, *arguments)
        kernels.grad_weight(y, r, x, mu, *arguments, bias_sigma=b)
    assert len(launches) == 5
    folded = ["aten::constant_pad_nd", "aten::copy_", "aten::fill_.Tensor"]
    assert sorted(counted.names) == sorted([*2 * folded, *2 * ["aten::new_zeros"]])


def test_a_plan_is_made_once_for_a_shape_dtype_and_device(monkeypatch):
    planned = []
    monkeypatch.setattr(launch, "tile_for", lambda *a, f=launch.tile_for: planned.append(a) or f(*a))
    launch.forget_plans()
    for size in ((4, 5, 6), (4, 5, 6), (4, 5, 7)):
        x, mu = torch.zeros(1, 8, *size), torch.zeros(8, 8, 1, 1, 1)  # other memory every time
        launch.Plan.of("forward", x, size, mu, ONE, 1, None)
    assert len(planned) == 2
    launch.forget_plans()


def test_a_packed_adjoint_goes_when_its_forward_s_r_goes():
    tensors = make(c=8, bias=False)
    gc.collect()  # what earlier tests left
    before = len(weights._waiting)
    y = ffg_conv3d(*tensors, padding=1, backend="triton")
    assert len(weights._waiting) == before + 1
    del y
    gc.collect()  # the interpreter keeps a kernel's arguments in a cycle
    assert len(weights._waiting) == before
    ffg_conv3d(*tensors, padding=1, stride=2, backend="triton")  # whose gradients the reference computes
    assert len(weights._waiting) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (dict(dtype=torch.float64), "float64"),
        (dict(groups=2), "groups"),
        (dict(kernel=9), "larger than 7"),
        (dict(size=(2, 20000, 20000)), "2\\^31"),
        (dict(size=(2, 4, 4), output=(2, 20000, 20000)), "2\\^31"),
    ],
)
def test_what_the_kernels_cannot_do_is_said(change, reason, monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = dict(dtype=torch.float32, stride=ONE, groups=1, kernel=3, size=(4, 4, 4)) | change
    x = torch.empty(1, 4, *options["size"], dtype=options["dtype"], device="meta")
    weight = torch.empty(4, 4, *(options["kernel"],) * 3, device="meta")

    class OnCpu:  # a tensor's description, without its memory
        device = torch.device("cpu")
        dtype, shape, is_cuda = x.dtype, x.shape, False
        numel = staticmethod(x.numel)

    said = why_not_triton(OnCpu, weight, options.get("output", options["size"]), options["stride"], options["groups"])
    assert re.search(reason, said)
    with pytest.raises(ValueError, match=reason):
        choose_backend(
            "triton", OnCpu, weight, options.get("output", options["size"]), options["stride"], options["groups"]
        )


def test_cpu_tensors_need_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    x, weight = torch.zeros(1, 4, 4, 4, 4, device="cpu"), torch.zeros(4, 4, 3, 3, 3)
    assert "not on a GPU" in why_not_triton(x, weight, (2, 2, 2))
    assert choose_backend("auto", x, weight, (2, 2, 2)) == "reference"
