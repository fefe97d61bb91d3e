"""Paired statistics against the unpruned run: bootstrap intervals and tests on the same samples."""

from __future__ import annotations

import itertools

import numpy as np

RESAMPLES, FLIPS, SEED = 2000, 10_000, 0
EXACT_UP_TO = 12  # differing samples whose 2^n sign patterns are all tried


def bootstrap_means(scores: np.ndarray, resamples: int = RESAMPLES, seed: int = SEED) -> np.ndarray:
    """Means over resampled samples, ``[resamples, columns]`` of ``scores`` [n, columns].

    All columns see the same resampled samples: differences and ratios of columns are paired.
    """
    n = len(scores)
    generator = np.random.default_rng(seed)
    draws = np.empty((resamples, scores.shape[1]))
    for i in range(resamples):
        draws[i] = np.bincount(generator.integers(n, size=n), minlength=n) @ scores / n
    return draws


def interval(draws: np.ndarray, samples: int) -> tuple[float, float] | None:
    """The middle 95 % of ``draws``; None where it means nothing: a single sample, or an undefined (nan) draw."""
    if samples < 2 or not np.isfinite(draws).all():
        return None
    low, high = np.percentile(draws, [2.5, 97.5])
    return float(low), float(high)


def ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, nan where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(part), np.nan), where=np.asarray(whole) != 0)


def mcnemar(first: np.ndarray, second: np.ndarray) -> float:
    """Exact two-sided p value of McNemar's test for right/wrong scores: of b + c disagreements, b is Binomial(1/2)."""
    b, c = int((first > second).sum()), int((first < second).sum())
    n, term, total = b + c, 1, 0
    for i in range(min(b, c) + 1):
        total += term
        term = term * (n - i) // (i + 1)
    return min(1.0, 2 * total / 2**n)


def permutation_test(first: np.ndarray, second: np.ndarray, flips: int = FLIPS, seed: int = SEED) -> float:
    """Two-sided p value of the mean difference when its sign may flip in every sample.

    Exact for few differing samples; otherwise over seeded random flips, the observed pattern counted among them.
    """
    difference = first - second
    difference = difference[difference != 0]
    observed = abs(difference.sum()) - 1e-9 * np.abs(difference).sum()  # sums that are equal but for rounding are equal
    if len(difference) <= EXACT_UP_TO:
        signs = np.array(list(itertools.product((-1, 1), repeat=len(difference))), dtype=float)
        return float((np.abs(signs @ difference) >= observed).mean())
    generator = np.random.default_rng(seed)
    extreme, block = 1, 500
    for done in range(0, flips, block):
        signs = generator.integers(0, 2, (min(block, flips - done), len(difference))) * 2 - 1
        extreme += int((np.abs(signs @ difference) >= observed).sum())
    return extreme / (flips + 1)


def paired_test(first: np.ndarray, second: np.ndarray) -> tuple[str, float]:
    """Name and p value: McNemar's test where every score is 0 or 1, otherwise the permutation test."""
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        return "mcnemar", mcnemar(first, second)
    return "permutation", permutation_test(first, second)
