"""The training objective, in nats per voxel, and the constraint sigma <= sigma_0 that Eq. 17 needs.

An example is a sub-volume of V voxels and its log-likelihood the sum over its voxels. The paper maximises
N/M sum_m log p(y_m | x_m) - KL (Eqs. 6 and 7) or sum_n log p(y_n | x_n, w) + log p(w) (Eq. 2). Both are divided by
-N V here, which does not change the optimum: the loss is a voxel's mean negative log-likelihood plus penalty / (N V).
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

__all__ = ["Objective", "negative_log_prior"]


@dataclass(frozen=True)
class Objective:
    """The loss per voxel: -1 / (N V) times the ELBO or the log posterior.

    Parameters
    ----------
    n_sub_volumes : int
        N, the number of examples: all training sub-volumes or, in fine-tuning, those of one volume. Random training
        cubes do not change N, which is that of the sub-volumes tiling the scans.
    voxels_per_sub_volume : int
        V.
    """

    n_sub_volumes: int
    voxels_per_sub_volume: int

    @property
    def scale(self) -> float:
        """N V; the loss times this is in nats over the training set."""
        return float(self.n_sub_volumes * self.voxels_per_sub_volume)

    def __call__(self, logits: Tensor, labels: Tensor, penalty: Tensor, *, share: float = 1.0) -> tuple[Tensor, Tensor]:
        """Loss and mean negative log-likelihood in nats per voxel: (nll + penalty / (N V), nll), fp32 scalars.

        Parameters
        ----------
        logits, labels : Tensor
            [M, n_classes, D, H, W] floating and [M, D, H, W] int64; ValueError unless D H W is V.
        penalty : Tensor
            In nats over the whole network: the KL (Eq. 5), or `negative_log_prior`.
        share : float
            This rank's part of the batch times the number of ranks. It scales nll, so that the mean over the ranks of
            the loss, and of its gradient, is that of the whole batch.
        """
        if (voxels := labels.shape[1:].numel()) != self.voxels_per_sub_volume:
            raise ValueError(f"labels have {voxels} voxels per sub-volume, not {self.voxels_per_sub_volume}")
        # Not reduction="mean", which on GPUs sums with atomics, in an arbitrary order.
        nll = cross_entropy(logits.float(), labels, reduction="none").mean() * share
        return nll + penalty / self.scale, nll


def negative_log_prior(network: nn.Module) -> Tensor:
    """-log N(w; 0, 1) in nats over a plain network's convolutions, without the constant log(2 pi) / 2 per weight.

    Uses the effective weights, after any weight normalization (log p(w) in Eq. 2).
    """
    convolutions = [module for module in network.modules() if isinstance(module, nn.Conv3d)]
    weights = [tensor for module in convolutions for tensor in (module.weight, module.bias) if tensor is not None]
    return torch.stack([weight.square().sum() for weight in weights]).sum() / 2
