"""The score a trainer watches: Dice of the network at its means on a fixed draw of held-out sub-volumes.

Its cost is bounded and it draws no noise, so that epochs compare. Scoring whole volumes, sites and uncertainty is the
work of `prediction` and `metrics`.
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
    """Indices of the sub-volumes to score: all, or `at_most` drawn without replacement, in order."""
    if n_sub_volumes <= at_most:
        return list(range(n_sub_volumes))
    drawn = np.random.default_rng([seed, 2]).choice(n_sub_volumes, at_most, replace=False)
    return sorted(drawn.tolist())


def validation_cubes(
    held_out: SubVolumes, settings: ComputeSettings, network: MeshNet
) -> Dataset[tuple[Tensor, Tensor]]:
    """The held-out sub-volumes as the network sees them: the paper's alone, others with all their neighbours."""
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
    """Count voxels by true class (row) and predicted class (column).

    Parameters
    ----------
    logits_of : callable
        Logits [N, n_classes, D, H, W] of images [N, 1, D, H, W].
    dataset : Dataset
        Of (image [1, D, H, W], labels int64 [D, H, W]); images may have a margin around the voxels that have labels.
    indices : list of int
        The items to score.
    n_classes, batch_size, device
        Of the network and where it runs.
    keep_going : callable
        Asked before each batch.

    Returns
    -------
    Tensor or None
        int64 [n_classes, n_classes]; None if told to stop.
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
    """Dice without background that training logs for a network: at its means, on its draw of held-out sub-volumes."""
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
