"""Intensity schemes: how a conformed volume becomes a network's input."""

import numpy as np

from dwc.data.intensity import scaling_of


def a_volume() -> np.ndarray:
    return np.random.default_rng(0).integers(10, 200, (20, 20, 20), np.uint8)


def test_min_max_gives_zero_to_one():
    scaled = scaling_of(a_volume(), "min_max")(a_volume())
    assert (scaled.dtype, scaled.min(), scaled.max()) == (np.float32, 0, 1)
    np.testing.assert_allclose(scaled, (a_volume() - 10.0) / 189, atol=1e-6)


def test_quantile_clips_to_the_quantiles_of_the_whole_volume_and_gives_zero_to_one():
    volume = a_volume()
    low, high = np.quantile(volume, 0.05), np.quantile(volume, 0.95)
    scaled = scaling_of(volume, "quantile")(volume)
    np.testing.assert_allclose(scaled, (volume.clip(low, high) - low) / (high - low), atol=1e-6)
    assert 0.04 < (scaled == 0).mean() < 0.06
    assert 0.04 < (scaled == 1).mean() < 0.06


def test_a_part_of_a_volume_is_scaled_as_the_whole():
    volume = a_volume()
    scale = scaling_of(volume, "quantile")
    np.testing.assert_array_equal(scale(volume[3:9]), scale(volume)[3:9])


def test_where_less_than_a_twentieth_stands_out_the_maximum_is_the_upper_end():
    volume = np.zeros((20, 20, 20), np.uint8)
    volume[:2, :2, :2] = 50
    scaled = scaling_of(volume, "quantile")(volume)
    assert (scaled.min(), scaled.max()) == (0, 1)
