"""The trainer's validation score: Dice of the network at its means on a fixed draw of held-out sub-volumes.

It draws no noise, so that epochs can be compared.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dwc.data.dataset import SubVolumes
from dwc.data.sampling import SurroundedCubes
from dwc.meshnet import MeshNet
from dwc.metrics.confusion import confusion_matrix, mean_dice
from dwc.training.settings import ComputeSettings
from dwc.training.step import inner, logits_of

__all__ = ["draw_sub_volumes", "validation_confusion", "validation_cubes", "validation_dice"]


def draw_sub_volumes(n_sub_volumes: int, at_most: int, seed: int) -> list[int]:
    """Indices of the sub-volumes to score, sorted: all, or `at_most` drawn without replacement."""
    if n_sub_volumes <= at_most:
        return list(range(n_sub_volumes))
    drawn = np.random.default_rng([seed, 2]).choice(n_sub_volumes, at_most, replace=False)
    return sorted(drawn.tolist())


def validation_cubes(
    held_out: SubVolumes, settings: ComputeSettings, network: MeshNet
) -> Dataset[tuple[Tensor, Tensor]]:
    """The held-out sub-volumes as the network should see them: the paper's without neighbours, others with them."""
    if settings.cubes == "paper":
        return held_out
    return SurroundedCubes(held_out, sum(network.architecture["dilations"]))


@torch.inference_mode()
def validation_confusion(
    logits_of: Callable[[Tensor], Tensor],
    dataset: Dataset,
    indices: list[int],
    *,
    n_classes: int,
    batch_size: int,
    device: torch.device,
    keep_going: Callable[[], bool] = lambda: True,
) -> Tensor | None:
    """Count voxels by true class (row) and predicted class (column): int64 [n_classes, n_classes].

    Parameters
    ----------
    logits_of
        Logits [N, n_classes, D, H, W] of images [N, 1, D, H, W].
    dataset, indices
        Items (image [1, D, H, W], labels int64 [D, H, W]), and which to score; images may have a margin.
    keep_going
        Called before each batch; if it returns False, the result is None.
    """
    confusion = torch.zeros(n_classes, n_classes, dtype=torch.int64)
    for start in range(0, len(indices), batch_size):
        if not keep_going():
            return None
        images, labels = zip(*(dataset[index] for index in indices[start : start + batch_size]), strict=True)
        truth = torch.stack(labels)
        predicted = inner(logits_of(torch.stack(images).to(device)), truth).argmax(dim=1).cpu()
        confusion += confusion_matrix(truth, predicted, n_classes)
    return confusion


def validation_dice(
    network: MeshNet, data: SubVolumes, settings: ComputeSettings, device: torch.device
) -> float | None:
    """The Dice without background that training logs: network at its means, on its draw of held-out sub-volumes."""
    network = network.to(device).eval()
    confusion = validation_confusion(
        lambda images: logits_of(network, images, settings.precision, sample=False),
        validation_cubes(data, settings, network),
        draw_sub_volumes(len(data), settings.validation_sub_volumes, settings.seed),
        n_classes=data.label_map.n_classes,
        batch_size=settings.batch_size,
        device=device,
    )
    return None if confusion is None else mean_dice(confusion)
