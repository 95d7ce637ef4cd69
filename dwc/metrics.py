"""Measures of a segmentation: the confusion matrix, Dice, volumes, calibration, and the paired test of two networks.

All of it follows from counts and scores and needs no network, file or picture. What is scored, and how scores are
averaged over scans and sites, is the work of `evaluation` and of the trainer's `validation`.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from scipy import stats
from torch import Tensor

__all__ = [
    "CalibrationCounts", "PairedTest", "confusion_matrix", "dice", "error_detection_auc", "expected_calibration_error",
    "mean_dice", "paired_test", "volumes",
]  # fmt: skip

BINS = 20  # of confidence and of entropy


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


@dataclass(frozen=True)
class PairedTest:
    """What a two-tailed paired t-test found about the differences a - b.

    Attributes
    ----------
    n : int
        Pairs.
    mean_difference, ci_low, ci_high : float
        Mean of a - b and its 95 % confidence interval, in the unit of the scores.
    t, p : float
        The statistic and its two-tailed p-value.
    effect_size : float
        Cohen's d_z, the mean difference in standard deviations of the differences.
    """

    n: int
    mean_difference: float
    ci_low: float
    ci_high: float
    t: float
    p: float
    effect_size: float


def paired_test(a: Sequence[float] | np.ndarray, b: Sequence[float] | np.ndarray) -> PairedTest:
    """Two-tailed paired t-test of scores of the same volumes under two networks.

    Parameters
    ----------
    a, b : sequence of float
        Scores, one per volume, in the same order; a volume that either lacks (NaN or None) is left out.

    Returns
    -------
    PairedTest
        With NaN for what does not exist: all but n and the mean difference where there are fewer than two pairs or
        every difference is the same.

    Raises
    ------
    ValueError
        If the lengths differ.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"paired scores are two lists of one length, not of shapes {a.shape} and {b.shape}")
    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    difference = a - b
    n, mean = len(difference), float(difference.mean()) if len(difference) else math.nan
    if n < 2 or np.ptp(difference) <= 1e-12 * np.abs(difference).max():  # no spread but that of rounding
        return PairedTest(n, mean, *[math.nan] * 5)
    test = stats.ttest_rel(a, b)
    effect_size = mean / difference.std(ddof=1)
    values = (*test.confidence_interval(0.95), test.statistic, test.pvalue, effect_size)
    return PairedTest(n, mean, *map(float, values))


class CalibrationCounts:
    """Voxels counted by the confidence and by the entropy of their prediction, and how many of them are right.

    Both axes are cut into `BINS` bins of one width, confidence from 0 to 1 and entropy from 0 to ln n_classes nats.
    Counts are all that reliability diagrams, calibration errors and error rates need, and those of volumes add up.

    Parameters
    ----------
    n_classes : int
        Number of classes, background included, >= 2.
    """

    def __init__(self, n_classes: int) -> None:
        self._highest = {"confidence": 1.0, "entropy": math.log(n_classes)}
        self._counts = {kind: np.zeros((3, BINS)) for kind in self._highest}

    def add(self, confidence: np.ndarray, entropy: np.ndarray, correct: np.ndarray) -> None:
        """Count the voxels of a volume.

        Parameters
        ----------
        confidence, entropy : ndarray
            Probability of the chosen class, and the predictive distribution's entropy in nats.
        correct : ndarray
            Whether the chosen class is the true one, bool; all three of one shape.

        Raises
        ------
        ValueError
            If the shapes differ.
        """
        if not confidence.shape == entropy.shape == correct.shape:
            raise ValueError(f"shapes {confidence.shape}, {entropy.shape} and {correct.shape} are not one")
        for kind, values in (("confidence", confidence), ("entropy", entropy)):
            values = values.ravel()
            places = np.clip(values * (BINS / self._highest[kind]), 0, BINS - 1).astype(np.intp)
            for row, weights in enumerate((None, correct.ravel(), values)):
                self._counts[kind][row] += np.bincount(places, weights, minlength=BINS)

    def frame(self) -> pd.DataFrame:
        """A row per kind ("confidence", "entropy") and bin: kind, bin, low, high, n, correct, sum.

        ``sum`` is that of the confidences, or entropies, of the n voxels in the bin.
        """
        parts = []
        for kind, highest in self._highest.items():
            n, correct, total = self._counts[kind]
            edges = np.linspace(0, highest, BINS + 1)
            part = {"kind": kind, "bin": range(BINS), "low": edges[:-1], "high": edges[1:]}
            part |= {"n": n.astype(np.int64), "correct": correct.astype(np.int64), "sum": total}
            parts.append(pd.DataFrame(part))
        return pd.concat(parts, ignore_index=True)


def expected_calibration_error(frame: pd.DataFrame) -> float:
    """Mean over voxels of their bin's |accuracy - mean confidence|, in 0..1.

    Parameters
    ----------
    frame : DataFrame
        Rows of `CalibrationCounts.frame`; those of one bin, as of several sites, are added up first.

    Returns
    -------
    float
        NaN where no voxel was counted.
    """
    bins = _bins(frame, "confidence")
    n = bins["n"].sum()
    return float((bins["correct"] - bins["sum"]).abs().sum() / n) if n else math.nan


def error_detection_auc(frame: pd.DataFrame) -> float:
    """Probability that a wrong voxel has more entropy than a right one (area under the ROC curve).

    Voxels of one bin count as ties, half. 0.5: entropy tells nothing about errors, 1: it finds every one.

    Parameters
    ----------
    frame : DataFrame
        As `expected_calibration_error` takes it.

    Returns
    -------
    float
        NaN where all voxels are right, or all wrong.
    """
    bins = _bins(frame, "entropy")
    right = bins["correct"].to_numpy(np.float64)
    wrong = bins["n"].to_numpy(np.float64) - right
    if not right.sum() or not wrong.sum():
        return math.nan
    below = np.cumsum(right) - right
    return float((wrong * (below + right / 2)).sum() / (wrong.sum() * right.sum()))


def _bins(frame: pd.DataFrame, kind: str) -> pd.DataFrame:
    return frame[frame["kind"] == kind].groupby("bin", sort=True)[["n", "correct", "sum"]].sum()


def _tensor(labels: Tensor | np.ndarray) -> Tensor:
    """Arrays as tensors of the same memory, or a copy where it may not be written, as a memory map's."""
    return labels if isinstance(labels, Tensor) else torch.from_numpy(np.require(labels, requirements="W"))
