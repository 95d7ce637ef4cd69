"""What training minimises, on one stated scale: nats per voxel.

An example is a sub-volume of V voxels and its log-likelihood the sum over its voxels. The paper maximises
N/M sum_m log p(y_m | x_m) - KL (Eqs. 6 and 7) or sum_n log p(y_n | x_n, w) + log p(w) (Eq. 2); both are divided by
-N V here, which leaves the optimum and makes the loss the mean negative log-likelihood of a voxel plus the penalty's
share. The room also keeps sigma <= sigma_0, the condition of Eq. 17. It takes no steps; `training` does.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, softplus

from dwc_kernels import FFGConv3d, inverse_softplus

__all__ = ["Objective", "SigmaProjection", "negative_log_prior"]


@dataclass(frozen=True)
class Objective:
    """The loss per voxel, -1 / (N V) times the ELBO or the log posterior.

    Parameters
    ----------
    n_sub_volumes : int
        N, the examples whose likelihood counts: all training sub-volumes, or those of one volume in fine-tuning, which
        gives the likelihood the weight of one example volume. Training cubes at random places change what is drawn, not
        this number: the scans weigh as much against the penalty as their tiling by sub-volumes does.
    voxels_per_sub_volume : int
        V, the voxels of a sub-volume.
    """

    n_sub_volumes: int
    voxels_per_sub_volume: int

    @property
    def scale(self) -> float:
        """N V: the loss times this is in nats over the whole training set."""
        return float(self.n_sub_volumes * self.voxels_per_sub_volume)

    def __call__(self, logits: Tensor, labels: Tensor, penalty: Tensor, *, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Loss and mean negative log-likelihood, each in nats per voxel.

        Parameters
        ----------
        logits : Tensor
            [M, n_classes, D, H, W], floating.
        labels : Tensor
            [M, D, H, W], int64 classes.
        penalty : Tensor
            In nats over the whole network: the KL (Eq. 5), or `negative_log_prior`.
        share : float
            Where a batch is split over ranks: the part of it that lies here, times the number of ranks. The ranks'
            mean of each result, and of its gradient, is that of the whole batch then, with the penalty in it once.

        Returns
        -------
        tuple of Tensor
            (nll + penalty / (N V), nll), fp32 scalars; nll times its share.

        Raises
        ------
        ValueError
            If the sub-volumes do not have V voxels each.
        """
        if (voxels := labels.shape[1:].numel()) != self.voxels_per_sub_volume:
            raise ValueError(f"labels have {voxels} voxels per sub-volume, not {self.voxels_per_sub_volume}")
        # reduction="none" then a mean: the reduction inside sums with atomics on GPUs, in an order of their own.
        nll = cross_entropy(logits.float(), labels, reduction="none").mean() * share
        return nll + penalty / self.scale, nll


def negative_log_prior(network: nn.Module) -> Tensor:
    """-log N(w; 0, 1) in nats over a plain network's convolutions, less the constant log(2 pi) / 2 per weight.

    Weights are the effective ones, after a weight normalization (Eq. 2's log p(w)).
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    weights = [tensor for module in convolutions for tensor in (module.weight, module.bias) if tensor is not None]
    return torch.stack([weight.square().sum() for weight in weights]).sum() / 2


class SigmaProjection:
    """Keeps every sigma at or below its prior's, call after each optimizer step.

    It clamps rho at the largest value whose softplus lies below sigma_0 by a few units in the last place (2.4e-7 of
    sigma_0), so that sigma <= sigma_0 holds exactly in fp32 on any device, whose softplus differ in the last bit.

    Parameters
    ----------
    network : nn.Module
        A network with `FFGConv3d` layers, their priors already set; a plain network has nothing to project.
    """

    def __init__(self, network: nn.Module) -> None:
        self._limits = [
            (getattr(layer, f"{name}_rho"), _rho_limit(getattr(layer, f"prior_{name}_sigma")))
            for layer in network.modules()
            if isinstance(layer, FFGConv3d)
            for name in ("weight", "bias")
            if getattr(layer, f"{name}_mu") is not None
        ]

    @torch.no_grad()
    def __call__(self) -> None:
        """Clamp in place."""
        for rho, limit in self._limits:
            rho.clamp_(max=limit)


def _rho_limit(sigma_0: Tensor) -> Tensor:
    sigma = sigma_0.double()
    rho = inverse_softplus(sigma).to(sigma_0.dtype)
    bound = (sigma * (1 - 2.0**-22)).to(sigma_0.dtype)
    while (above := softplus(rho) > bound).any():
        rho = torch.where(above, torch.nextafter(rho, torch.full_like(rho, -torch.inf)), rho)
    return rho
