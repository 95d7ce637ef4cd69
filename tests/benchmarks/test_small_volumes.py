"""The benchmark of small volumes checks before it times, and the op keeps a fraction of the composition's memory."""

import pytest

from benchmarks import small_volumes


def test_a_layer_is_compared_after_a_check():
    row = small_volumes.compare((8, 8, 2, 1), batch=1, seconds=0.0)
    assert row["op_ms"] > 0
    assert row["convolutions_ms"] > 0
    assert row["op_KB"] < 0.1 * row["composition_KB"]


def test_a_wrong_result_is_never_timed(monkeypatch):
    monkeypatch.setattr(
        small_volumes, "ffg_conv3d", lambda *a, seed=None, f=small_volumes.ffg_conv3d, **k: f(*a, **k) * 2
    )
    with pytest.raises(AssertionError, match="relative error"):
        small_volumes.compare((8, 8, 2, 1), batch=1, seconds=0.0)
