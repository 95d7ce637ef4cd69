"""Intensities: from the scanner's values to 8 bits, and from those to a network's input."""

import hashlib
from dataclasses import dataclass
from typing import Literal

import numpy as np

from dwc.data.head import head_box

__all__ = ["IN_HEADERS", "QUANTILES", "SIGNAL", "Scaling", "Scheme", "content_of", "moments", "scaling_of", "to_uint8"]

Scheme = Literal["z_score", "min_max", "quantile"]
IN_HEADERS: dict[Scheme, str] = {  # how the header of a posterior names each scheme
    "z_score": "z-score per volume",
    "min_max": "min-max per volume",
    "quantile": "quantiles 0.05 to 0.95 per volume, the upper near white matter",
}

QUANTILES = (0.05, 0.95)  # of the scheme `quantile`
SIGNAL = 25  # of 255: brighter voxels are not air; a tenth of the range, as in FSL's BET

_RARE = 0.001  # share of the voxels that may be darker than the rest without setting the scale
_LIFTED = 8  # grey levels; rare voxels that would lift everything else by more are ignored
_HEAD_LEVELS = 32  # fewer occupied grey levels are no head with the air around it
_AIR = 0.25  # least share of air in a head's field of view
_FEW_BINS = 64  # of the histogram; a head in fewer is looked at more closely
_BALL = (0.43, 0.3)  # depth of its centre below the head's top, and radius, in widths of the head
_WHITE = 0.9  # share of the ball's voxels that are no brighter than white matter
_NEAR = 0.9  # of white matter's brightness, at which a scan is clipped at least
_PLAIN = (1e-30, 1e30)  # spans that float32 arithmetic holds


def to_uint8(data: np.ndarray, n_bins: int = 1000, clipped: float = 0.001) -> np.ndarray:
    """Scale to 0..255 as `mri_convert` does; uint8 is returned unchanged.

    0 is the minimum, 255 the value that a share `clipped` of the non-zero voxels exceeds, in a histogram of `n_bins`.
    Unlike in `mri_convert`, a few extreme voxels do not set the scale: the darkest 0.1 % are clipped if they would
    raise all others by more than 8 grey levels, and if the brightest leave the others fewer than 64 bins, the histogram
    is taken again without them. A dark value that no others are near, such as a padding of -1000, is clipped to the air
    above it, however many voxels have it.
    """
    if data.dtype == np.uint8:
        return data
    low, high = float(data.min()), float(data.max())
    if not _is_plain(low, high, n_bins):
        data = _normalized(data)
        low, high = 0.0, 1.0
    n_clipped = int(clipped * np.count_nonzero(data))
    top = _brightest(data, low, high, n_bins, n_clipped)
    if np.count_nonzero(data <= low + _LIFTED * (top - low) / 255) <= int(_RARE * data.size):
        low = _ranked(data, _RARE)
        top = _brightest(data, low, high, n_bins, n_clipped)
    result = _scaled(data, low, top)
    while (end := _end_of_gap(result)) is not None:
        low = float(data[result >= end].min())
        if not _is_plain(low, high, n_bins):
            break
        top = _brightest(data, low, high, n_bins, n_clipped)
        closer = _scaled(data, low, top)
        if not _is_head_in_air(closer[result >= end]):
            break
        result = closer
    return result


def _scaled(data: np.ndarray, low: float, top: float) -> np.ndarray:
    scaled = np.empty(data.shape, np.float32)
    np.clip(data, low, top, out=scaled, casting="unsafe")
    scaled -= low
    scaled *= 255 / (top - low)
    return np.clip(scaled, 0, 255, out=scaled).round(out=scaled).astype(np.uint8)


def _end_of_gap(image: np.ndarray) -> int | None:
    """The first grey level above the darkest, if more than a few empty ones lie between."""
    darkest, *others = np.flatnonzero(np.bincount(image.ravel(), minlength=256)).tolist()
    return others[0] if others and others[0] - darkest > _LIFTED else None


def _is_head_in_air(voxels: np.ndarray) -> bool:
    """Whether grey levels are a head's with the air around it, rather than tissue in an empty background."""
    counts = np.bincount(voxels, minlength=256)
    n_air = int(counts[: SIGNAL + 1].sum())
    return int(np.count_nonzero(counts)) >= _HEAD_LEVELS and n_air >= _AIR * int(counts.sum())


def _brightest(data: np.ndarray, low: float, high: float, n_bins: int, n_clipped: int) -> float:
    """The upper edge of the brightest bin above `low` once `n_clipped` voxels are left out."""
    is_flat = np.count_nonzero(data > low) <= n_clipped
    while True:
        counts, _ = np.histogram(data, n_bins, (low, high))
        counts[-1] += np.count_nonzero(data > high)
        in_last = np.cumsum([0, *counts[::-1]])  # voxels in the last 0, 1, 2, ... bins
        bins = max(n_bins - 1 - int(np.searchsorted(in_last, n_clipped)), 1)
        closer = low + (bins + 1) * (high - low) / n_bins
        if bins >= _FEW_BINS or n_clipped == 0 or is_flat or not _is_plain(low, closer, n_bins):
            return low + bins * (high - low) / n_bins
        high = closer


def _is_plain(low: float, high: float, n_bins: int) -> bool:
    """Whether a range can be binned and scaled in float32."""
    return _PLAIN[0] < high - low < _PLAIN[1] and (high - low) / n_bins > np.spacing(max(abs(low), abs(high)))


def _normalized(data: np.ndarray) -> np.ndarray:
    """Scale to 0..1 in float64, with rare extremes clipped unless all other voxels are equal."""
    low, high = _ranked(data, _RARE), _ranked(data, 1 - _RARE)
    if low == high:
        low, high = data.min(), data.max()
    wide = np.clip(data, low, high).astype(np.longdouble)
    wide -= np.longdouble(low)
    return (wide / wide.max()).astype(np.float64)


def _ranked(data: np.ndarray, share: float) -> float:
    """The value below which this share of the voxels falls."""
    rank = min(int(share * data.size), data.size - 1)
    return float(np.partition(data, rank, axis=None)[rank])


def content_of(image: np.ndarray) -> str:
    """SHA-256, hex, of an image's voxels: equal for one scan in any file format, type, scale or storage order."""
    return hashlib.sha256(np.ascontiguousarray(image).data).hexdigest()


def moments(image: np.ndarray) -> tuple[np.float32, np.float32]:
    """Mean and standard deviation over all voxels, summed in float64."""
    return np.float32(image.mean(dtype=np.float64)), np.float32(image.std(dtype=np.float64))


@dataclass(frozen=True)
class Scaling:
    """A network's input from a volume's grey levels: (clip(voxels, low, high) - zero) / unit, in float32."""

    zero: np.float32
    unit: np.float32
    low: float = -np.inf
    high: float = np.inf

    def __call__(self, voxels: np.ndarray) -> np.ndarray:
        scaled = voxels.astype(np.float32)
        np.clip(scaled, self.low, self.high, out=scaled)
        scaled -= self.zero
        scaled /= self.unit
        return scaled


def scaling_of(image: np.ndarray, scheme: Scheme) -> Scaling:
    """How a scheme scales a conformed volume [D, H, W], from all its voxels, air included.

    `z_score` gives mean 0 and variance 1, `min_max` 0..1. `quantile` clips to the quantiles 0.05 and 0.95 and gives
    0..1. The upper one is kept within 0.9 to 1 of white matter's brightness, since bright fat would raise it and a
    small field of view or a stripped skull lower it. Where it is not above the lower one, the maximum takes its place.
    """
    if scheme == "z_score":
        return Scaling(*moments(image))
    if scheme == "min_max":
        low, high = np.float32(image.min()), np.float32(image.max())
        return Scaling(low, high - low)
    low, high = np.quantile(image, QUANTILES).astype(np.float32)
    if white := _white_matter(image):
        high = np.float32(np.clip(high, _NEAR * white, white))
    high = high if high > low else np.float32(image.max())
    return Scaling(low, high - low, float(low), float(high))


def _white_matter(image: np.ndarray) -> float:
    """White matter's brightness in a T1 scan: a high quantile in a ball with little but brain; 0 without a ball."""
    box = head_box(image)
    width = box[0].stop - box[0].start
    centre = [(side.start + side.stop - 1) / 2 for side in box]
    centre[1] = box[1].start + _BALL[0] * width  # the second axis runs from superior to inferior
    axes = np.ogrid[box]
    distance = sum((axis - middle) ** 2 for axis, middle in zip(axes, centre, strict=True))
    ball = image[box][distance < (_BALL[1] * width) ** 2]
    return float(np.quantile(ball, _WHITE)) if ball.size else 0.0
