"""One optimizer step, shared by the trainer and the study's measurements."""

import torch
from torch import Tensor, nn

from dwc.meshnet import MeshNet
from dwc.training.objective import Objective, negative_log_prior
from dwc.training.settings import OptimizerSettings
from dwc_kernels import SigmaProjection

__all__ = ["Optimization", "inner", "logits_of", "penalty_of"]


def logits_of(network: nn.Module, images: Tensor, precision: str, *, sample: bool | None = None) -> Tensor:
    """Logits [N, n_classes, D, H, W] of images [N, 1, D, H, W], with autocast if the precision is bf16."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return network(images, sample=sample)


def inner(logits: Tensor, labels: Tensor) -> Tensor:
    """The logits of the labelled voxels, without the images' margin."""
    margin = (logits.shape[-1] - labels.shape[-1]) // 2
    for axis in (2, 3, 4):
        logits = logits.narrow(axis, margin, labels.shape[axis - 1])
    return logits


def penalty_of(network: MeshNet) -> Tensor:
    """The KL from the prior (Eq. 5), or -log p(w) of a plain network (Eq. 2), in nats over the network."""
    return network.kl_loss() if network.bayesian else negative_log_prior(network)


class Optimization:
    """Adam with one learning rate for the means and one for rho; keeps sigma at or below the prior's.

    The network must be on its device, with its prior set.
    """

    def __init__(self, network: MeshNet, settings: OptimizerSettings, objective: Objective, precision: str) -> None:
        self.network, self.objective, self.precision = network, objective, precision
        rho = [parameter for name, parameter in network.named_parameters() if name.endswith("_rho")]
        means = [parameter for name, parameter in network.named_parameters() if not name.endswith("_rho")]
        rho_lr = settings.lr if settings.rho_lr is None else settings.rho_lr
        groups = [{"params": means, "lr": settings.lr}, {"params": rho, "lr": rho_lr}]
        self.adam = torch.optim.Adam([group for group in groups if group["params"]])
        self._rates = [group["lr"] for group in self.adam.param_groups]
        self._project = SigmaProjection(network)
        self._project()

    def step(
        self, network: nn.Module, images: Tensor, labels: Tensor, *, factor: float = 1.0, share: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Take a step; returns loss and mean negative log-likelihood before it, scalars in nats per voxel.

        `network` computes the logits: the network itself, or its replica if there are several ranks. The images may
        have a margin around the labelled voxels. `factor` scales the learning rates; for `share` see `Objective`.
        """
        for group, rate in zip(self.adam.param_groups, self._rates, strict=True):
            group["lr"] = rate * factor
        self.network.train()
        self.adam.zero_grad(set_to_none=True)
        logits = inner(logits_of(network, images, self.precision), labels)
        loss, nll = self.objective(logits, labels, penalty_of(self.network), share=share)
        loss.backward()
        self.adam.step()
        self._project()
        return loss.detach(), nll.detach()
