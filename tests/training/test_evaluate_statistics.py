"""Paired statistics: hand-computed values, degenerate cases, seeds, and that pairing is what makes them sharp."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from training.evaluation.statistics import (
    EXACT_UP_TO,
    bootstrap_means,
    interval,
    mcnemar,
    paired_test,
    permutation_test,
    ratio,
)


def binary(*counts: int) -> tuple[np.ndarray, np.ndarray]:
    """Two columns of right and wrong: both right, only the first, only the second, neither."""
    pairs = ((1, 1), (1, 0), (0, 1), (0, 0))
    rows = np.array([pair for pair, count in zip(pairs, counts, strict=True) for _ in range(count)], dtype=float)
    return rows[:, 0], rows[:, 1]


def test_bootstrap_against_all_resamples():
    """Three samples have 27 resamples: shares of the means must approach theirs."""
    scores = np.array([0.0, 0.0, 1.0])
    exact = [np.mean(draw) for draw in itertools.product(scores, repeat=3)]
    draws = bootstrap_means(scores[:, None], resamples=20_000)[:, 0]
    for value in (0, 1 / 3, 2 / 3, 1):
        share = np.isclose(exact, value).mean()
        assert np.isclose(draws, value).mean() == pytest.approx(share, abs=0.012)  # 3.5 standard errors
    assert draws.mean() == pytest.approx(1 / 3, abs=0.01)


def test_bootstrap_is_paired_and_seeded():
    generator = np.random.default_rng(0)
    first = generator.random(200)
    scores = np.stack([first, first - 0.1, generator.permutation(first)], 1)
    draws = bootstrap_means(scores)
    assert np.ptp(draws[:, 0] - draws[:, 1]) < 1e-12  # a constant difference has no spread when pairs stay together
    assert (draws[:, 0] - draws[:, 2]).std() > 0.02
    assert np.array_equal(draws, bootstrap_means(scores))
    assert not np.array_equal(draws, bootstrap_means(scores, seed=1))


def test_interval_width_is_that_of_the_normal_approximation():
    scores = (np.arange(400) % 2).astype(float)
    low, high = interval(bootstrap_means(scores[:, None])[:, 0], 400)
    half = 1.96 * 0.5 / math.sqrt(400)
    assert low == pytest.approx(0.5 - half, abs=0.006)
    assert high == pytest.approx(0.5 + half, abs=0.006)


def test_degenerate_intervals():
    assert interval(np.full(50, 0.7), 8) == (0.7, 0.7)  # every sample alike
    assert interval(np.full(50, 0.7), 1) is None  # one sample tells nothing of its spread
    whole = np.array([0.0, 0.5])
    assert np.array_equal(ratio(np.array([0.3, 0.25]), whole), [np.nan, 0.5], equal_nan=True)
    assert interval(ratio(np.array([0.3, 0.25]), whole), 8) is None


def test_mcnemar_by_hand():
    assert mcnemar(*binary(5, 0, 0, 5)) == 1  # no disagreement
    assert mcnemar(*binary(0, 3, 3, 0)) == 1
    assert mcnemar(*binary(7, 5, 0, 1)) == 2 / 2**5
    assert mcnemar(*binary(7, 0, 5, 1)) == 2 / 2**5
    assert mcnemar(*binary(2, 8, 2, 3)) == 2 * (1 + 10 + 45) / 2**10
    assert 0 < mcnemar(*binary(0, 600, 400, 0)) < 1e-9
    assert mcnemar(*binary(0, 5000, 5000, 0)) == 1  # 2^10000 is no float


def test_permutation_test_by_hand():
    assert permutation_test(np.array([0.5, 0.5]), np.array([0.5, 0.5])) == 1
    # differences .1, .2, .3: |sum| reaches .6 in 2 of 8 sign patterns
    assert permutation_test(np.array([0.1, 0.2, 0.3]), np.zeros(3)) == 2 / 8
    # .3, .2, -.1: 0.4 is reached by 4 of 8
    assert permutation_test(np.array([0.3, 0.2, 0.0]), np.array([0.0, 0.0, 0.1])) == 4 / 8


@pytest.mark.parametrize("only_first", [9, 25, 40])
def test_random_flips_agree_with_mcnemar(only_first):
    """On right/wrong scores the sign-flip test is McNemar's."""
    first, second = binary(10, only_first, 20, 10)
    assert only_first + 20 > EXACT_UP_TO
    assert permutation_test(first, second) == pytest.approx(mcnemar(first, second), abs=0.02)
    assert permutation_test(first, second) == permutation_test(first, second)


def test_p_values_of_equal_methods_are_uniform():
    generator = np.random.default_rng(0)
    values = [permutation_test(*generator.random((2, 30)), flips=199) for _ in range(400)]
    assert np.mean(np.array(values) <= 0.1) == pytest.approx(0.1, abs=0.045)  # 3 standard errors


def test_the_test_follows_the_scores():
    first, second = binary(7, 5, 0, 1)
    assert paired_test(first, second) == ("mcnemar", 2 / 2**5)
    name, p = paired_test(first * 0.9, second)
    assert name == "permutation" and 0 < p < 0.1
    # means of several seeds are not right or wrong
    assert paired_test(np.array([0.5, 1.0]), np.array([1.0, 1.0])) == ("permutation", 1.0)
