"""Layers with many weights and few voxels: the matrix products' sums and gradients are those of the composition."""

import pytest
import torch

from dwc_kernels import ffg_conv3d, unfolded
from tests.dwc_kernels.problems import assert_as_accurate_as_composition, in_layout, make


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize(
    ("arguments", "geometry"),
    [
        (dict(c=24, f=20, size=(2, 2, 2)), dict(padding=1)),
        (dict(c=24, f=20, size=(4, 3, 5)), dict(padding=(1, 0, 2), stride=(2, 1, 3))),
        (dict(c=30, f=40, size=(2, 1, 3), kernel=1), {}),
        (dict(c=30, f=40, size=(4, 3, 4), kernel=(1, 2, 3)), dict(stride=2)),
    ],
)
def test_few_voxels_are_as_accurate_as_the_composition(arguments, geometry, layout, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    answers = []
    monkeypatch.setattr(unfolded, "suits", lambda *a, f=unfolded.suits: answers.append(f(*a)) or answers[-1])
    x, *rest = make(**arguments)
    assert_as_accurate_as_composition([in_layout(x, layout), *rest], **geometry)
    assert answers == [True] * 4  # forward, backward as a whole, and to the input and to the weights


def test_blocks_of_weights_make_up_the_whole(monkeypatch):
    tensors = make(c=24, f=40, size=(2, 2, 2))
    run = lambda: torch.autograd.grad(ffg_conv3d(*tensors, padding=1, seed=3).square().sum(), tensors)  # noqa: E731
    expected = run()
    monkeypatch.setattr(unfolded, "_BLOCK", 1)
    for ours, theirs in zip(run(), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("channels", "batch", "dtype", "suits"),
    [
        (256, 1, torch.float32, True),  # 8 rows
        (256, 2, torch.float32, False),
        (256, 2, torch.float64, True),  # not by oneDNN
        (512, 2, torch.float32, True),  # weights that leave the cache
        (512, 5, torch.float32, False),  # 40 rows
    ],
)
def test_batches_go_to_onednn_with_avx512_as_long_as_the_weights_stay_in_the_cache(
    channels, batch, dtype, suits, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    x, weight = (torch.empty(s, dtype=dtype) for s in ((batch, channels, 2, 2, 2), (channels, channels, 3, 3, 3)))
    assert unfolded.suits(x, weight, (1, 1, 1), 1, 8 * batch) == suits
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    assert unfolded.suits(x, weight, (1, 1, 1), 1, 8 * batch) == (8 * batch <= 32)
