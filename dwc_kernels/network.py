"""Over a whole network: its KL divergence, its prior, and what training does with its standard deviations.

Every function takes any network that holds variational layers, converted or written so.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dwc_kernels.factorized import (
    MOMENTS,
    FFGModule,
    assign,
    inverse_softplus,
    leaves,
    sharded_like,
    weight_key,
    whole,
)

__all__ = [
    "SigmaProjection",
    "kl_loss",
    "parameter_groups",
    "set_prior",
    "set_sigma_fraction",
    "variational_layers",
]


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module")  # of torch.compile and activation checkpointing
# The only children of DataParallel and AveragedModel, and of a compiled network.
_WHOLE_WRAPPERS = (["module"], ["_orig_mod"])


def variational_layers(net: nn.Module) -> dict[str, FFGModule]:
    """The network's variational layers by path; ValueError if there is none."""
    layers = {path: module for path, module in net.named_modules() if isinstance(module, FFGModule)}
    if not layers:
        raise ValueError(f"{type(net).__name__} has no variational layer; convert it first")
    return layers


def _unwrapped_layers(net: nn.Module) -> dict[str, FFGModule]:
    """By the paths that they have without the wrappers of torch."""
    while list(net._modules) in _WHOLE_WRAPPERS:
        net = next(net.children())
    return {
        ".".join(part for part in path.split(".") if part not in _WRAPPERS): layer
        for path, layer in variational_layers(net).items()
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
    for path, layer in variational_layers(net).items():
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
    rhos = {
        id(t)
        for layer in variational_layers(net).values()
        for name in layer._names
        for t in leaves(layer, f"{name}_rho")
    }
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
    for path, layer in variational_layers(net).items():
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
