"""Calibration: how confidence and entropy relate to errors."""

import math

import numpy as np
import pandas as pd

__all__ = ["BINS", "CalibrationCounts", "error_detection_auc", "expected_calibration_error"]

BINS = 20  # of confidence and of entropy


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
