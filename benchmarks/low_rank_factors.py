"""Factors with low rank plus diagonal precision in a linear model: `python -m benchmarks.low_rank_factors`.

Sites regress on correlated features with Gaussian noise, so the posterior of all their data is known. A site's answer
has the exact mean for its cavity; of the precision of its data only the largest eigenvectors are kept, and the diagonal
of the rest. Rank 0 is the diagonal factor of `dwc.site_factors`.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd

from dwc.base.tables import as_csv

WEIGHTS, SITES, SCANS = 64, 8, 20  # SCANS: observations of each site
RANKS, ROUNDS, SEEDS = (0, 1, 2, 4, 8, 16), (1, 10, 50), range(5)

Likelihood = tuple[np.ndarray, np.ndarray]  # precision [weights, weights] and shift [weights] of a site's data


def data(seed: int) -> tuple[np.ndarray, list[Likelihood]]:
    """The covariance of the features, with eigenvalues that fall as 1/sqrt(k), and each site's likelihood."""
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.standard_normal((WEIGHTS, WEIGHTS)))
    eigenvalues = np.arange(1, WEIGHTS + 1) ** -0.5
    root = axes * np.sqrt(WEIGHTS * eigenvalues / eigenvalues.sum())
    truth = rng.standard_normal(WEIGHTS)
    sites = []
    for _ in range(SITES):
        features = rng.standard_normal((SCANS, WEIGHTS)) @ root.T
        values = features @ truth + rng.standard_normal(SCANS)
        sites.append((features.T @ features, features.T @ values))
    return root @ root.T, sites


def low_rank(precision: np.ndarray, rank: int) -> np.ndarray:
    """Its largest eigenvectors, and the diagonal of the rest."""
    values, vectors = np.linalg.eigh(precision)
    kept = slice(len(values) - rank, None)
    low = (vectors[:, kept] * values[kept]) @ vectors[:, kept].T
    return low + np.diag(np.diag(precision - low))


def means(sites: list[Likelihood], rank: int, damping: float) -> Iterator[np.ndarray]:
    """The mean of the product of the standard normal prior and all factors after each round."""
    kept = [low_rank(precision, rank) for precision, _ in sites]
    factors = [(np.zeros((WEIGHTS, WEIGHTS)), np.zeros(WEIGHTS)) for _ in sites]
    while True:
        whole = np.eye(WEIGHTS) + sum(precision for precision, _ in factors), sum(shift for _, shift in factors)
        answers = []
        for (precision, shift), low, (own, own_shift) in zip(sites, kept, factors, strict=True):
            cavity, cavity_shift = whole[0] - own, whole[1] - own_shift
            mean = np.linalg.solve(cavity + precision, cavity_shift + shift)
            answers.append((low, (cavity + low) @ mean - cavity_shift))
        factors = [
            tuple(old + damping * (new - old) for old, new in zip(*pair, strict=True))
            for pair in zip(factors, answers, strict=True)
        ]
        precision = np.eye(WEIGHTS) + sum(precision for precision, _ in factors)
        yield np.linalg.solve(precision, sum(shift for _, shift in factors))


def errors(seed: int, rank: int, damping: float) -> list[float]:
    """After each of ROUNDS: squared error of predictions against the pooled posterior's, relative to the prior's."""
    covariance, sites = data(seed)
    pooled = np.linalg.solve(np.eye(WEIGHTS) + sum(p for p, _ in sites), sum(shift for _, shift in sites))
    after = dict(zip(range(1, max(ROUNDS) + 1), means(sites, rank, damping), strict=False))
    misses = [after[number] - pooled for number in ROUNDS]
    return [float(miss @ covariance @ miss / (pooled @ covariance @ pooled)) for miss in misses]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("low-rank.csv"))
    out = parser.parse_args().out
    rows = []
    for rank in RANKS:
        for damping in (1.0, 1 / SITES):
            medians = np.median([errors(seed, rank, damping) for seed in SEEDS], axis=0)
            columns = {f"round {number}": value for number, value in zip(ROUNDS, medians, strict=True)}
            rows.append({"rank": rank, "damping": damping, **columns})
    table = pd.DataFrame(rows)
    print(table.to_string(index=False, float_format="%.2g"))
    out.write_text(as_csv(table, float_format="%.3g"))


if __name__ == "__main__":
    main()
