"""Measures of a segmentation: the confusion matrix, Dice, volumes, calibration, and the paired test of two networks.

All of it follows from counts and scores and needs no network, file or picture. What is scored, and how scores are
averaged over scans and sites, is the work of `evaluation` and of the trainer's `validation`.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = [
    "confusion_matrix", "dice",
    "mean_dice", "volumes",
]  # fmt: skip


def confusion_matrix(truth: Tensor | np.ndarray, predicted: Tensor | np.ndarray, n_classes: int) -> Tensor:
    """Count voxels by true and predicted class.

    Parameters
    ----------
    truth, predicted : Tensor or ndarray
        Classes, integers in 0..n_classes-1, of one shape.
    n_classes : int
        Number of classes n, background included.

    Returns
    -------
    Tensor
        int64 [n, n] on the CPU; row: true class, column: predicted class. Matrices of parts add up to the whole's.

    Raises
    ------
    ValueError
        If the shapes differ or a class is outside 0..n_classes-1.
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
    """Dice of each class, 2 TP / (2 TP + FN + FP) (McClure et al. 2018, Eq. 18).

    Parameters
    ----------
    confusion : Tensor
        Counts [n, n] of `confusion_matrix`.

    Returns
    -------
    Tensor
        fp64 [n], in [0, 1]; NaN where the truth has no voxel of the class, since nothing there can be found or missed.
    """
    confusion = confusion.double()
    truth, predicted = confusion.sum(dim=1), confusion.sum(dim=0)
    return (2 * confusion.diagonal() / (truth + predicted)).masked_fill(truth == 0, torch.nan)


def mean_dice(confusion: Tensor, *, with_background: bool = False) -> float | None:
    """Mean of `dice` over the classes present in the truth, class 0 among them or not; None if there is none."""
    per_class = dice(confusion)[0 if with_background else 1 :]
    present = per_class[~per_class.isnan()]
    return present.mean().item() if len(present) else None


def volumes(labels: Tensor | np.ndarray, n_classes: int, voxel_volume: float) -> Tensor:
    """Volume of each class in mm^3, fp64 [n_classes].

    Parameters
    ----------
    labels : Tensor or ndarray
        Classes, integers in 0..n_classes-1.
    n_classes : int
        Number of classes, background included.
    voxel_volume : float
        mm^3 of one voxel, |det| of the affine.
    """
    counts = torch.bincount(_tensor(labels).flatten(), minlength=n_classes)
    return counts.cpu().double() * voxel_volume


def _tensor(labels: Tensor | np.ndarray) -> Tensor:
    """Arrays as tensors of the same memory, or a copy where it may not be written, as a memory map's."""
    return labels if isinstance(labels, Tensor) else torch.from_numpy(np.require(labels, requirements="W"))
