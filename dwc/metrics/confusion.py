"""Confusion matrix, Dice and volumes of a segmentation."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["confusion_matrix", "dice", "mean_dice", "volumes"]


def confusion_matrix(truth: Tensor | np.ndarray, predicted: Tensor | np.ndarray, n_classes: int) -> Tensor:
    """Count voxels by true class (row) and predicted class (column): int64 [n_classes, n_classes], on the CPU.

    Takes integers in 0..n_classes-1, both of one shape; anything else is a ValueError. Matrices of parts can be added.
    """
    truth, predicted = _tensor(truth), _tensor(predicted)
    if truth.shape != predicted.shape:
        raise ValueError(f"truth has shape {tuple(truth.shape)}, the prediction {tuple(predicted.shape)}")
    for name, classes in (("true", truth), ("predicted", predicted)):
        if classes.numel() and not 0 <= int(classes.min()) <= int(classes.max()) < n_classes:
            raise ValueError(f"{name} classes {int(classes.min())}..{int(classes.max())} are not in 0..{n_classes - 1}")
    pairs = truth.flatten().to(torch.int64) * n_classes + predicted.flatten()
    return torch.bincount(pairs, minlength=n_classes * n_classes).view(n_classes, n_classes).cpu()


def dice(confusion: Tensor) -> Tensor:
    """Dice of each class, 2 TP / (2 TP + FN + FP) (McClure et al. 2018, Eq. 18), from counts [n, n].

    fp64 [n]; NaN where the truth has no voxel of the class, for there is nothing to find or miss.
    """
    confusion = confusion.double()
    truth, predicted = confusion.sum(dim=1), confusion.sum(dim=0)
    return (2 * confusion.diagonal() / (truth + predicted)).masked_fill(truth == 0, torch.nan)


def mean_dice(confusion: Tensor, *, with_background: bool = False) -> float | None:
    """Mean of `dice` over the classes present in the truth, without class 0 by default; None if there is none."""
    per_class = dice(confusion)[0 if with_background else 1 :]
    present = per_class[~per_class.isnan()]
    return present.mean().item() if len(present) else None


def volumes(labels: Tensor | np.ndarray, n_classes: int, voxel_volume: float) -> Tensor:
    """Volume of each class in mm^3, fp64 [n_classes]; `voxel_volume` is |det| of the affine."""
    counts = torch.bincount(_tensor(labels).flatten(), minlength=n_classes)
    return counts.cpu().double() * voxel_volume


def _tensor(labels: Tensor | np.ndarray) -> Tensor:
    """Arrays as tensors that share their memory, or a copy if it is read-only, as a memory map is."""
    return labels if isinstance(labels, Tensor) else torch.from_numpy(np.require(labels, requirements="W"))
