"""Made-up scans for the examples: bright balls of two sizes of tissue in noise, and their labels."""

import torch
from torch import Tensor

__all__ = ["made_scans"]


def made_scans(n: int, size: int = 24, contrast: float = 1.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images [n, 1, size, size, size] and labels [n, size, size, size]: 0 outside, 1 in the ball, 2 in its core."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(-1, 1, size)
    grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
    centre = torch.rand(n, 3, 1, 1, 1, generator=generator) * 0.6 - 0.3
    distance = (grid - centre).norm(dim=1)
    radius = 0.35 + 0.25 * torch.rand(n, 1, 1, 1, generator=generator)
    labels = (distance < radius).long() + (distance < 0.5 * radius).long()
    noise = torch.randn(n, size, size, size, generator=generator)
    return (contrast * labels + 0.5 * noise).unsqueeze(1), labels
