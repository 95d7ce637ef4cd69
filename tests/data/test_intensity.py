"""Intensity schemes: how a conformed volume becomes a network's input."""

import numpy as np
import pytest

from dwc.data.intensity import scaling_of


def a_volume() -> np.ndarray:
    return np.random.default_rng(0).integers(10, 200, (20, 20, 20), np.uint8)


def a_head(fat: int = 115, n_empty: int = 0) -> np.ndarray:
    """A layer of fat (a 14th of the volume) around 73 % cortex and 27 % white matter of 110, in air with noise."""
    distance = np.sqrt(sum((axis - 32.0) ** 2 for axis in np.ogrid[:64, :64, :64]))
    rng = np.random.default_rng(0)
    head = np.where(distance < 20, np.where(distance < 13, 110, 70), fat) + rng.integers(-5, 6, (64, 64, 64))
    volume = np.where(distance < 24, head, rng.integers(0, 10, (64, 64, 64))).astype(np.uint8)
    volume[:, 64 - n_empty :] = 0
    return volume


def test_min_max_gives_zero_to_one():
    scaled = scaling_of(a_volume(), "min_max")(a_volume())
    assert (scaled.dtype, scaled.min(), scaled.max()) == (np.float32, 0, 1)
    np.testing.assert_allclose(scaled, (a_volume() - 10.0) / 189, atol=1e-6)


def test_quantile_clips_to_the_quantiles_of_the_whole_volume_and_gives_zero_to_one():
    volume = a_head(fat=105)
    low, high = np.quantile(volume, 0.05), np.quantile(volume, 0.95)
    scaled = scaling_of(volume, "quantile")(volume)
    np.testing.assert_allclose(scaled, (volume.clip(low, high) - low) / (high - low), atol=1e-6)
    assert 0.04 < (scaled == 1).mean() < 0.06


@pytest.mark.parametrize("fat", [115, 200, 255])
def test_bright_fat_leaves_white_matter_the_brightest(fat):
    volume = a_head(min(fat, 250))
    assert fat == 115 or np.quantile(volume, 0.95) > 150
    assert 105 <= scaling_of(volume, "quantile").high <= 115


@pytest.mark.parametrize("n_empty", [24, 32])
def test_a_field_of_view_that_ends_within_the_head_leaves_tissues_apart(n_empty):
    volume = a_head(fat=40, n_empty=n_empty)
    assert np.quantile(volume, 0.95) < 80
    assert 95 <= scaling_of(volume, "quantile").high <= 115


def test_the_brightness_of_white_matter_does_not_depend_on_the_voxel_size():
    volume = a_head(fat=250)
    assert abs(scaling_of(volume[::2, ::2, ::2], "quantile").high - scaling_of(volume, "quantile").high) < 3


def test_a_part_of_a_volume_is_scaled_as_the_whole():
    volume = a_volume()
    scale = scaling_of(volume, "quantile")
    np.testing.assert_array_equal(scale(volume[3:9]), scale(volume)[3:9])


def test_where_less_than_a_twentieth_stands_out_the_maximum_is_the_upper_end():
    volume = np.zeros((20, 20, 20), np.uint8)
    volume[:2, :2, :2] = 50
    scaled = scaling_of(volume, "quantile")(volume)
    assert (scaled.min(), scaled.max()) == (0, 1)
