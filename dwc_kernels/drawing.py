"""Drawing over a whole network: which noise it samples and when, draws of its weights, and predictions from them.

Every function takes any network that holds variational layers, converted or written so.
"""

import operator
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwc_kernels.factorized import (
    Drawn,
    FFGModule,
    Override,
    weight_key,
    whole,
)
from dwc_kernels.network import variational_layers
from dwc_kernels.noise import normal, philox

__all__ = ["Prediction", "draw_weights", "drawn_weights", "predict", "sampling", "seed_noise"]


def seed_noise(net: nn.Module, seed: int, *, rank: int | None = None) -> None:
    """Seed all noise of `net` to come, different in every layer, call and rank.

    It seeds PyTorch's default generators, from which each layer draws a seed whenever it samples, and gives the layers
    a key of the rank, so that processes whose generators are equal draw different noise. Rank 0 draws what
    `torch.manual_seed` alone would give.

    Parameters
    ----------
    rank : int, optional
        None is the rank of this process, 0 where torch.distributed is not in use.
    """
    torch.manual_seed(_integer("seed", seed))
    rank = _rank() if rank is None else _integer("rank", rank)
    for layer in variational_layers(net).values():
        layer._rank_key = _derived_seeds(0, 1, rank)[0] if rank else 0


@contextmanager
def sampling(net: nn.Module, sample: bool) -> Iterator[None]:
    """Within the context, `net` samples (True) or takes the mean (False), whatever its mode; ``sample=`` still wins.

    It holds for the network, in every thread, as its mode does.
    """
    if not isinstance(sample, bool):
        raise ValueError(f"sample must be True or False, got {sample!r}")
    with _overridden(dict.fromkeys(variational_layers(net).values(), sample)):
        yield


@contextmanager
def draw_weights(net: nn.Module, seed: int | None = None, *, rank: int | None = None) -> Iterator[None]:
    """Within the context, `net` is one deterministic network whose weights are drawn from the posterior.

    One draw serves the whole volume and every call, so sums over voxels spread as they should, which the independent
    voxels of local reparameterization do not; several volumes of a batch share the draw too. Each layer runs as one
    plain convolution. The weights are those of `drawn_weights`, with its `seed` and `rank`, drawn on entry.
    """
    layers = variational_layers(net)
    with _overridden({layers[path]: drawn for path, drawn in drawn_weights(net, seed, rank=rank).items()}):
        yield


def drawn_weights(net: nn.Module, seed: int | None = None, *, rank: int | None = None) -> dict[str, Drawn]:
    """Weight and bias of each variational layer of `net`, by its path, drawn from the posterior.

    w = mu + sigma * eps, and gradients reach mu and sigma through them. Weights that layers share are drawn once.

    Parameters
    ----------
    seed : int, optional
        eps is the noise function of the op at (layer's seed, index of the weight), and the layer's seed a function of
        (seed, position of the layer, rank): no device, layout or generator matters. None draws a seed from PyTorch's
        generator.
    rank : int, optional
        None is the rank of this process; 0 gives the same weights on all of them.
    """
    layers = variational_layers(net)
    if seed is None:
        seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
    rank = _rank() if rank is None else _integer("rank", rank)
    seeds = iter(_derived_seeds(_integer("seed", seed), 2 * len(layers), rank))
    drawn: dict[tuple[Any, ...], Tensor] = {}  # weights that layers share are drawn once

    def draw(layer: FFGModule, name: str) -> Any:
        layer_seed = next(seeds)
        if name not in layer._names:
            return None
        key = weight_key(layer, f"{name}_mu", f"{name}_rho")
        if key not in drawn:
            mu, rho = (whole(getattr(layer, f"{name}_{part}")) for part in ("mu", "rho"))
            drawn[key] = mu + F.softplus(rho) * normal(rho.detach(), layer_seed).to(rho.dtype)
        return drawn[key]

    return {path: (draw(layer, "weight"), draw(layer, "bias")) for path, layer in layers.items()}


@contextmanager
def _overridden(choices: Mapping[FFGModule, bool | Drawn | None]) -> Iterator[None]:
    """The context that was entered last wins, in all threads; contexts may end in any order."""
    opened = {layer: Override(choice) for layer, choice in choices.items()}
    try:
        for layer, override in opened.items():
            layer._overrides.append(override)
            layer._override = override.choice
        yield
    finally:
        for layer, override in opened.items():
            layer._overrides = [other for other in layer._overrides if other is not override]
            layer._override = layer._overrides[-1].choice if layer._overrides else None


def _rank() -> int:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_rank() if distributed else 0


def _integer(name: str, value: Any) -> int:
    """An integer of 64 bits, so that no two seeds of those that are taken mean the same by overflow."""
    try:
        value = operator.index(value)
    except TypeError:
        raise ValueError(f"{name} must be an integer, got {value!r}") from None
    if not -(2**63) <= value < 2**64:
        raise ValueError(f"{name} must be a 64-bit integer, got {value}")
    return value


def _derived_seeds(seed: int, n: int, rank: int) -> list[int]:
    """n independent 64-bit seeds: Philox words with the seed as key and (position, rank) as counter."""
    position = torch.arange(n)
    constant = (torch.full_like(position, value) for value in (rank, 0x5EED, 0))
    low, high, _, _ = philox((position, *constant), (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF))
    return ((high << 32) | low).tolist()


@dataclass(frozen=True)
class Prediction:
    """What a number of samples say about each voxel; C counts the classes, or the outputs of the network.

    Attributes
    ----------
    mean : Tensor
        [N, C, ...]: probabilities, or outputs without an activation.
    variance : Tensor
        [N, C, ...]: of the samples, divided by `n_samples`.
    entropy : Tensor or None
        [N, ...] in nats: of the mean probabilities, all uncertainty.
    mutual_information : Tensor or None
        [N, ...] in nats: the part of the entropy that comes from not knowing the weights.
    n_samples : int
        Number of samples.
    """

    mean: Tensor
    variance: Tensor
    entropy: Tensor | None
    mutual_information: Tensor | None
    n_samples: int


@torch.no_grad()
def predict(
    net: nn.Module,
    x: Tensor,
    n_samples: int = 10,
    *,
    activation: Literal["softmax", "sigmoid"] | None = "softmax",
    draw: Literal["weights", "voxels"] = "weights",
    seed: int | None = None,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> Prediction:
    """Mean and uncertainty of a network's output over its weights, without gradients and in eval mode.

    Samples are folded in one by one, so the memory does not grow with their number.

    Parameters
    ----------
    net : nn.Module
        A network with variational layers.
    x : Tensor
        What the network takes.
    n_samples : int
        Number of samples.
    activation : "softmax", "sigmoid" or None
        From outputs to probabilities: over dimension 1, or of each output alone, whose entropies are then summed over
        dimension 1. None leaves the outputs as they are, and there is no entropy.
    draw : "weights" or "voxels"
        One draw of the weights per sample (`draw_weights`), which sums over voxels need; or local
        reparameterization, where every voxel is drawn alone.
    seed : int, optional
        The prediction is a function of it, on every rank the same; None draws one from PyTorch's generator.
    forward : callable, optional
        Runs the network in place of ``net(x)``, as a sliding window does:
        ``forward=lambda x: sliding_window_inference(x, (96, 96, 96), 1, net)``.
    """
    if _integer("n_samples", n_samples) < 1:
        raise ValueError(f"n_samples must be at least 1, got {n_samples}")
    if draw not in ("weights", "voxels"):
        raise ValueError(f"draw must be 'weights' or 'voxels', got {draw!r}")
    if activation not in ("softmax", "sigmoid", None):
        raise ValueError(f"activation must be 'softmax', 'sigmoid' or None, got {activation!r}")
    if seed is None:
        seed = int(torch.randint(-(2**63), 2**63 - 1, (), dtype=torch.int64))
    modes = {module: module.training for module in net.modules()}
    net.eval()
    try:
        for i, sample_seed in enumerate(_derived_seeds(_integer("seed", seed), n_samples, 0)):
            output = _one_sample(net, forward or net, x, draw, sample_seed)
            if not isinstance(output, Tensor):
                kind = type(output).__name__
                raise ValueError(f"the network returned a {kind}; pick a tensor with forward=, as lambda x: net(x)[0]")
            p = output.to(torch.promote_types(output.dtype, torch.float32))
            if activation is not None:
                p = p.softmax(1) if activation == "softmax" else p.sigmoid()
            if i == 0:
                mean, squares = p.clone(), torch.zeros_like(p)
                entropies = _entropy(p, activation)
                continue
            delta = p - mean  # Welford's update: no difference of large sums
            mean += delta / (i + 1)
            squares += delta * (p - mean)
            if entropies is not None:
                entropies += (_entropy(p, activation) - entropies) / (i + 1)
    finally:
        for module, training in modes.items():
            module.training = training
    entropy = _entropy(mean, activation)
    information = None if entropy is None else (entropy - entropies).clamp_min(0.0)
    return Prediction(mean, squares / n_samples, entropy, information, n_samples)


def _one_sample(net: nn.Module, forward: Callable[[Tensor], Tensor], x: Tensor, draw: str, seed: int) -> Tensor:
    if draw == "weights":
        with draw_weights(net, seed, rank=0):
            return forward(x)
    devices = {t.device for t in (*net.parameters(), x) if isinstance(t, Tensor) and t.is_cuda}
    layers = variational_layers(net).values()
    keys = [layer._rank_key for layer in layers]
    try:
        for layer in layers:
            layer._rank_key = 0  # the same prediction on every rank
        with torch.random.fork_rng(devices), sampling(net, True):
            torch.manual_seed(seed)
            return forward(x)
    finally:
        for layer, key in zip(layers, keys, strict=True):
            layer._rank_key = key


def _entropy(p: Tensor, activation: str | None) -> Any:
    """Entropy of probabilities in nats, summed over dimension 1."""
    if activation is None:
        return None
    entropy = -torch.special.xlogy(p, p)
    if activation == "sigmoid":
        entropy = entropy - torch.special.xlogy(1 - p, 1 - p)
    return entropy.sum(1)
