"""Augmentation of training cubes, geometry first, then intensity; all randomness comes from the caller's generator.

Plain PyTorch: MONAI has these transforms too, but its import costs each loading process 1.8 s and 220 MB.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dwc.data.augmentation_settings import Augmentation

__all__ = ["Augmentation", "augment", "reach_of"]

_NODES = 4  # of the bias and elastic fields, along each axis of a cube
_TAILS = 3  # standard deviations at which displacements are clipped


def reach_of(settings: Augmentation, side: int) -> int:
    """How many voxels beyond each face of a cube the geometry may sample."""
    if not settings.warps:
        return 0
    half = side / 2
    turn = math.sqrt(2) * half * math.sin(min(math.radians(_TAILS * settings.rotation), math.pi / 2))
    return math.ceil(turn + half * math.expm1(_TAILS * settings.scale) + _TAILS * settings.elastic)


def augment(
    image: np.ndarray, labels: np.ndarray, side: int, settings: Augmentation, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    """Augment a cube; returns image and labels [side, side, side].

    Parameters
    ----------
    image, labels : ndarray
        float32 intensities 0 to 255 and classes, [n, n, n] with n = side + 2 reach_of(settings, side).
    side : int
        Size of the result.
    """
    voxels, classes = torch.from_numpy(image)[None, None], torch.from_numpy(labels.astype(np.float32))[None, None]
    if settings.warps:
        voxels, classes = _warp(voxels, classes, side, settings, rng)
    voxels = voxels.clamp(0, 255) / 255
    if settings.bias:
        voxels = voxels * (settings.bias * _smooth_field(1, voxels.shape[-1], rng)).exp()
    if settings.gamma:
        voxels = voxels.clamp_min(0) ** math.exp(settings.gamma * rng.standard_normal())
    if settings.blur:
        voxels = _blur(voxels, settings.blur * rng.uniform())
    if settings.noise:
        noise = rng.standard_normal(voxels.shape, np.float32)
        voxels = voxels + settings.noise * rng.uniform() * torch.from_numpy(noise)
    if settings.mirror and rng.uniform() < settings.mirror:
        voxels, classes = voxels.flip(2), classes.flip(2)  # the first axis runs from right to left
    return (255 * voxels)[0, 0].numpy(), classes[0, 0].numpy().astype(labels.dtype)


def _warp(
    image: Tensor, labels: Tensor, side: int, settings: Augmentation, rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Rotate, scale and deform: linear for the image, nearest for labels."""
    size = image.shape[-1]
    axis = torch.arange(side, dtype=torch.float32) - (side - 1) / 2
    place = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))  # voxels from the centre
    angles = np.radians(settings.rotation * _clipped(rng, 3))
    turn = torch.from_numpy(_rotation(angles) * math.exp(settings.scale * _clipped(rng, 1)[0])).float()
    place = torch.einsum("ij,jxyz->ixyz", turn, place)
    if settings.elastic:
        place = place + settings.elastic * _smooth_field(3, side, rng)[0]
    grid = (place.flip(0) / ((size - 1) / 2)).movedim(0, -1)[None]  # grid_sample names the last axis first
    return _sampled(image, grid, "bilinear"), _sampled(labels, grid, "nearest")


def _sampled(volume: Tensor, grid: Tensor, mode: str) -> Tensor:
    return F.grid_sample(volume, grid, mode=mode, padding_mode="border", align_corners=True)


def _rotation(angles: np.ndarray) -> np.ndarray:
    """Rotation about the three axes, one after the other."""
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        i, j = (other for other in range(3) if other != axis)
        step = np.eye(3)
        step[i, i] = step[j, j] = np.cos(angle)
        step[i, j], step[j, i] = -np.sin(angle), np.sin(angle)
        matrix = step @ matrix
    return matrix


def _clipped(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.standard_normal(n).clip(-_TAILS, _TAILS)


def _smooth_field(channels: int, side: int, rng: np.random.Generator) -> Tensor:
    """Standard normal values at a few nodes, interpolated linearly: fp32 [1, channels, side, side, side]."""
    nodes = _clipped(rng, channels * _NODES**3).reshape(1, channels, _NODES, _NODES, _NODES).astype(np.float32)
    return F.interpolate(torch.from_numpy(nodes), size=(side,) * 3, mode="trilinear", align_corners=True)


def _blur(voxels: Tensor, sigma: float) -> Tensor:
    """Gaussian blur along each axis, with replicated faces."""
    radius = math.ceil(3 * sigma)
    if radius == 0:
        return voxels
    taps = torch.exp(-0.5 * (torch.arange(-radius, radius + 1) / sigma) ** 2)
    taps = taps / taps.sum()
    for axis in range(3):
        shape, padding = [1] * 5, [0] * 6
        shape[2 + axis] = len(taps)
        padding[2 * (2 - axis)] = padding[2 * (2 - axis) + 1] = radius
        voxels = F.conv3d(F.pad(voxels, padding, mode="replicate"), taps.view(shape))
    return voxels
