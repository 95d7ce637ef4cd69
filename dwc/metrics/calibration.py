"""Calibration: how confidence and entropy relate to errors."""

import math

import numpy as np
import pandas as pd

__all__ = ["BINS", "CalibrationCounts", "error_detection_auc", "expected_calibration_error"]

BINS = 20  # of confidence, and of entropy


class CalibrationCounts:
    """Voxel counts by confidence and by entropy of the prediction, with the number of correct voxels in each bin.

    Both axes have `BINS` bins of equal width: confidence from 0 to 1, entropy from 0 to ln n_classes nats. Counts of
    several volumes can be added.
    """

    def __init__(self, n_classes: int) -> None:
        self._highest = {"confidence": 1.0, "entropy": math.log(n_classes)}
        self._counts = {kind: np.zeros((3, BINS)) for kind in self._highest}

    def add(self, confidence: np.ndarray, entropy: np.ndarray, correct: np.ndarray) -> None:
        """Count the voxels of a volume; all arrays have the same shape, else ValueError.

        `confidence` is the probability of the predicted class, `entropy` that of the predictive distribution in nats,
        and `correct` (bool) whether the prediction is right.
        """
        if not confidence.shape == entropy.shape == correct.shape:
            raise ValueError(f"shapes {confidence.shape}, {entropy.shape} and {correct.shape} differ")
        for kind, values in (("confidence", confidence), ("entropy", entropy)):
            values = values.ravel()
            places = np.clip(values * (BINS / self._highest[kind]), 0, BINS - 1).astype(np.intp)
            for row, weights in enumerate((None, correct.ravel(), values)):
                self._counts[kind][row] += np.bincount(places, weights, minlength=BINS)

    def frame(self) -> pd.DataFrame:
        """One row per kind ("confidence", "entropy") and bin: kind, bin, low, high, n, correct, sum.

        ``sum`` is the sum of the confidences, or entropies, of the n voxels in the bin.
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
    """Mean over voxels of their bin's |accuracy - mean confidence|, in 0..1; NaN if no voxel was counted.

    `frame` has rows of `CalibrationCounts.frame`; rows of the same bin, for example of several sites, are added first.
    """
    bins = _bins(frame, "confidence")
    n = bins["n"].sum()
    return float((bins["correct"] - bins["sum"]).abs().sum() / n) if n else math.nan


def error_detection_auc(frame: pd.DataFrame) -> float:
    """Probability that a wrong voxel has higher entropy than a correct one (area under the ROC curve).

    Voxels in the same bin count as ties. 0.5: entropy is unrelated to errors, 1: it separates them perfectly, NaN: all
    voxels are correct, or all are wrong. `frame` is as in `expected_calibration_error`.
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
