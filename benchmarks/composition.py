"""What the op is measured against: the same layer composed of PyTorch's own operators under autograd."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["composition", "saved_bytes"]


def composition(
    x: Tensor,
    weight_mu: Tensor,
    weight_sigma: Tensor,
    bias_mu: Tensor | None = None,
    bias_sigma: Tensor | None = None,
    *,
    eps: Tensor | None = None,
    **geometry: Any,
) -> Tensor:
    """Two convolutions, a square, a square root and noise: `torch.randn_like`, or the noise that is given."""
    mean = F.conv3d(x, weight_mu, bias_mu, **geometry)
    var = F.conv3d(x.square(), weight_sigma.square(), None if bias_sigma is None else bias_sigma.square(), **geometry)
    return mean + var.sqrt() * (torch.randn_like(mean) if eps is None else eps)


def saved_bytes(forward: Callable[[], Tensor], *parameters: Tensor) -> int:
    """Bytes of distinct storage that a forward keeps for its backward, its parameters left out."""
    known = {p.untyped_storage().data_ptr() for p in parameters}
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = forward()
    total = sum(kept.values())
    del output  # alive until here, so that no storage was reused and counted once for two
    return total
