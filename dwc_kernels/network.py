"""Over a whole network: its KL divergence, when and with which noise it samples, its prior, and its predictions.

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
    MOMENTS,
    Drawn,
    FFGModule,
    assign,
    inverse_softplus,
    leaves,
    sharded_like,
    weight_key,
    whole,
)
from dwc_kernels.noise import normal, philox

__all__ = [
    "Prediction",
    "SigmaProjection",
    "draw_weights",
    "drawn_weights",
    "kl_loss",
    "parameter_groups",
    "predict",
    "sampling",
    "seed_noise",
    "set_prior",
    "set_sigma_fraction",
]


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # of torch.compile and activation checkpointing


def _layers(net: nn.Module) -> dict[str, FFGModule]:
    layers = {path: module for path, module in net.named_modules() if isinstance(module, FFGModule)}
    if not layers:
        raise ValueError(f"{type(net).__name__} has no variational layer; convert it first")
    return layers


def _unwrapped_layers(net: nn.Module) -> dict[str, FFGModule]:
    """By the paths that they have without the wrappers of torch."""
    while isinstance(net, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or "_orig_mod" in net._modules:
        net = next(net.children())
    return {
        ".".join(part for part in path.split(".") if part not in _WRAPPERS): layer
        for path, layer in _layers(net).items()
    }


def kl_loss(net: nn.Module) -> Tensor:
    """KL[q || prior] of all variational layers of `net`, a scalar in nats; a weight that layers share counts once.

    Raises
    ------
    ValueError
        If `net` has no variational layer, or layers share a weight but not its prior.
    """
    parts: dict[tuple[Any, ...], tuple[str, FFGModule]] = {}
    terms = []
    for path, layer in _layers(net).items():
        for name in layer._names:
            first, owner = parts.setdefault(weight_key(layer, f"{name}_mu", f"{name}_rho"), (path, layer))
            if owner is layer:
                terms.append(layer.kl_of(name))
            elif not _same_prior(owner, layer, name):
                raise ValueError(f"{first} and {path} share their {name} but not its prior; call set_prior on both")
    return torch.stack(terms).sum()


def _same_prior(a: FFGModule, b: FFGModule, name: str) -> bool:
    """Compared as numbers where they are numbers, which waits for no device."""
    for part in (f"{name}_{moment}" for moment in MOMENTS):
        ours, theirs = a._prior_numbers.get(part), b._prior_numbers.get(part)
        tensors = whole(getattr(a, f"prior_{part}")), whole(getattr(b, f"prior_{part}"))
        if ours != theirs or (ours is None and not torch.equal(*tensors)):
            return False
    return True


def parameter_groups(
    net: nn.Module, *, lr: float | None = None, rho_lr: float | None = None, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Parameters for an optimizer of torch.optim in two groups: the rhos, without decay, after all the others.

    Weight decay pulls rho towards 0 and sigma towards ln 2, far above what a trained network holds.

    Parameters
    ----------
    net : nn.Module
        A network with variational layers.
    lr : float, optional
        Learning rate of all but the rhos; None leaves it to the optimizer.
    rho_lr : float, optional
        Learning rate of the rhos; None is `lr`.
    weight_decay : float
        Of everything but the rhos. The prior already decays the means by way of the KL divergence.
    """
    rhos = {id(t) for layer in _layers(net).values() for name in layer._names for t in leaves(layer, f"{name}_rho")}
    others = [p for p in net.parameters() if id(p) not in rhos]
    sigmas = [p for p in net.parameters() if id(p) in rhos]
    groups = [
        {"params": others, "lr": lr, "weight_decay": weight_decay},
        {"params": sigmas, "lr": lr if rho_lr is None else rho_lr, "weight_decay": 0.0},
    ]
    return [{k: v for k, v in group.items() if v is not None} for group in groups if group["params"]]


def set_prior(net: nn.Module, from_net: nn.Module) -> None:
    """Make the posterior of `from_net` the prior of `net`, layer by layer of the same name; all of them or none.

    Raises
    ------
    ValueError
        If their variational layers differ in name or shape. No prior is changed then.
    """
    ours, theirs = _unwrapped_layers(net), _unwrapped_layers(from_net)
    if odd := sorted(ours.keys() ^ theirs.keys()):
        raise ValueError(f"only one of the two networks has a variational layer {odd[0]!r}")
    checked = []
    for path, layer in ours.items():
        try:
            checked.append((layer, layer._checked_posterior(theirs[path])))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    for layer, prior in checked:
        layer._write_prior(prior)


def set_sigma_fraction(net: nn.Module, fraction: float, *, minimum: float = 1e-6) -> None:
    """Set every sigma of `net` to a fraction of its mean's size (MOPED, Krishnan et al. 2020), at least ``minimum``."""
    if not (fraction > 0 and minimum > 0):
        raise ValueError(f"fraction and minimum must be positive, got {fraction} and {minimum}")
    rhos = []
    for path, layer in _layers(net).items():
        for name in layer._names:
            mu = getattr(layer, f"{name}_mu").detach()
            rho = inverse_softplus((fraction * mu.abs()).clamp_min(minimum))
            if not whole(rho).isfinite().all():
                raise ValueError(
                    f"{path}: fraction {fraction} with minimum {minimum} gives sigmas that {rho.dtype} cannot hold"
                )
            rhos.append((layer, f"{name}_rho", rho))
    for layer, name, rho in rhos:
        assign(layer, name, rho)


class SigmaProjection:
    """Keeps every sigma at or below its prior's: call it after each optimizer step.

    It clamps rho at the largest value whose softplus lies below sigma_0 by a few units in the last place (2.4e-7 of
    sigma_0), so that sigma <= sigma_0 holds exactly in fp32 on any device, whose softplus differ in the last bit.

    Parameters
    ----------
    net : nn.Module
        A network whose priors are already set; a network without variational layers has nothing to project.
    """

    def __init__(self, net: nn.Module) -> None:
        self._limits = []
        for path, layer in net.named_modules():
            for name in layer._names if isinstance(layer, FFGModule) else ():
                rho = layer._parameters.get(f"{name}_rho")
                if rho is None:
                    raise ValueError(f"{path}: remove the parametrization of {name}_rho, which cannot be clamped")
                limit = _rho_limit(getattr(layer, f"prior_{name}_sigma"))
                self._limits.append((rho, limit if limit.dim() == 0 else sharded_like(limit, rho)))

    @torch.no_grad()
    def __call__(self) -> None:
        """Clamp in place."""
        for rho, limit in self._limits:
            rho.clamp_(max=limit)


def _rho_limit(sigma_0: Tensor) -> Tensor:
    """The largest rho whose softplus is not above the bound, searched for around the inverse in fp64."""
    sigma = whole(sigma_0).double() * (1 - 2.0**-22)
    rho, bound = inverse_softplus(sigma).to(sigma_0.dtype), sigma.to(sigma_0.dtype)
    up, down = (torch.full_like(rho, end) for end in (torch.inf, -torch.inf))
    for _ in range(16):
        rho = torch.nextafter(rho, up)
    for _ in range(64):
        rho = torch.where(F.softplus(rho) > bound, torch.nextafter(rho, down), rho)
    return rho


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
    for layer in _layers(net).values():
        layer._rank_key = _derived_seeds(0, 1, rank)[0] if rank else 0


@contextmanager
def sampling(net: nn.Module, sample: bool) -> Iterator[None]:
    """Within the context, `net` samples (True) or takes the mean (False), whatever its mode; ``sample=`` still wins."""
    with _overridden(dict.fromkeys(_layers(net).values(), sample)):
        yield


@contextmanager
def draw_weights(net: nn.Module, seed: int | None = None, *, rank: int | None = None) -> Iterator[None]:
    """Within the context, `net` is one deterministic network whose weights are drawn from the posterior.

    One draw serves the whole volume and every call, so sums over voxels spread as they should, which the independent
    voxels of local reparameterization do not; several volumes of a batch share the draw too. Each layer runs as one
    plain convolution. The weights are those of `drawn_weights`, with its `seed` and `rank`, drawn on entry.
    """
    layers = _layers(net)
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
    layers = _layers(net)
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
    before = {layer: layer._override for layer in choices}
    try:
        for layer, choice in choices.items():
            layer._override = choice
        yield
    finally:
        for layer, choice in before.items():
            layer._override = choice


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
    layers = _layers(net).values()
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
