"""Does a claim hold? Decided by intervals, never by hand.

An interval is the middle 95 % of a bootstrap over test samples and, where a method was trained or drawn several times,
over these runs as well. Columns that answered the same samples are resampled together, so differences are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
HOLDS, FAILS, OPEN = "holds", "does not hold", "cannot be told"
Interval = tuple[float, float]


class Verdict(NamedTuple):
    """Whether a claim holds, the numbers that decided, and what would be said without the task it hangs on most."""

    claim: str
    outcome: str
    evidence: str
    without: str = ""


class Estimate(NamedTuple):
    """A number with its 95 % interval."""

    value: float
    low: float
    high: float

    def percent(self, signed: bool = False) -> str:
        """In percent or points: "+3.1 [+1.0, +5.2]"."""
        sign = "+" if signed else ""
        return f"{100 * self.value:{sign}.1f} [{100 * self.low:{sign}.1f}, {100 * self.high:{sign}.1f}]"

    def text(self, signed: bool = False) -> str:
        sign = "+" if signed else ""
        return f"{self.value:{sign}.2f} [{self.low:{sign}.2f}, {self.high:{sign}.2f}]"


def judge(estimate: Estimate, above: float = 0.0) -> str:
    """Holds where the whole interval lies above ``above``, does not where it lies below, cannot be told otherwise."""
    if estimate.low > above:
        return HOLDS
    return FAILS if estimate.high < above else OPEN


Spared = tuple[str, "Estimate"] | None  # a task, and what is left of a difference without it


def changed(outcome: str, spared: Spared, above: float = 0.0) -> str:
    """In words, what is judged without a task, where that is something else; else nothing."""
    if spared is None or judge(spared[1], above) == outcome:
        return ""
    return f"without {spared[0]} it {judge(spared[1], above)}"


def all_of(outcomes: Sequence[str]) -> str:
    """Holds where every part holds, does not hold where one does not, otherwise it cannot be told."""
    if FAILS in outcomes:
        return FAILS
    return HOLDS if all(outcome == HOLDS for outcome in outcomes) else OPEN


def runs(scores: Sequence[Sequence[float]] | Sequence[float]) -> np.ndarray:
    """Scores of one run [n] or several [R, n] as float64 ``[R, n]``."""
    return np.atleast_2d(np.asarray(scores, dtype=float))


def bootstrap(columns: Mapping[str, np.ndarray], seed: int = 0, resamples: int = RESAMPLES) -> dict[str, np.ndarray]:
    """Draws ``[resamples]`` of the mean score of each column.

    Args:
        columns: by name, ``[R, n]``: R runs (trainings, draws) over the same n samples.

    All columns see the same resampled samples. Of R > 1 runs, R - 1 are resampled, which makes the variance of their
    mean unbiased (of so few, R would be too little).
    """
    generator = np.random.default_rng(seed)
    n = next(iter(columns.values())).shape[1]
    weights = generator.multinomial(n, np.full(n, 1 / n), size=resamples) / n  # [resamples, n]
    found = {}
    for name, scores in columns.items():
        means = scores @ weights.T  # [R, resamples]
        if len(means) > 1:
            chosen = generator.integers(len(means), size=(len(means) - 1, resamples))
            means = np.take_along_axis(means, chosen, axis=0)
        found[name] = means.mean(0)
    return found


def estimate(value: float, draws: np.ndarray) -> Estimate:
    """``value`` with the middle 95 % of ``draws``."""
    low, high = np.percentile(draws, [2.5, 97.5])
    return Estimate(float(value), float(low), float(high))


Known = Mapping[str, tuple[float, np.ndarray]]  # by task: a number and its draws


def gap(found: Known, first: Sequence[str], second: Sequence[str]) -> Estimate:
    """Mean over the tasks ``first`` minus mean over the tasks ``second``."""
    values = [float(np.mean([found[task][0] for task in tasks])) for tasks in (first, second)]
    draws = [np.mean([found[task][1] for task in tasks], axis=0) for tasks in (first, second)]
    return estimate(values[0] - values[1], draws[0] - draws[1])


def without_one(found: Known, first: Sequence[str], second: Sequence[str]) -> Spared:
    """The task without which ``gap`` is smallest, and that gap; None where no task can be spared."""
    smaller = {}
    for mine in (first, second):
        for task in mine if len(mine) > 1 else ():
            smaller[task] = gap(found, *([one for one in tasks if one != task] for tasks in (first, second)))
    return min(smaller.items(), key=lambda item: item[1].value) if smaller else None


def standard_error(scores: np.ndarray) -> float:
    """Of the mean of ``[R, n]``, from samples and, with several runs, between them (0 for a single score)."""
    over_samples = scores.mean(0)
    variance = over_samples.var(ddof=1) / len(over_samples) if len(over_samples) > 1 else 0.0
    if len(scores) > 1:
        variance += scores.mean(1).var(ddof=1) / len(scores)
    return float(np.sqrt(variance))


def shown(scores: np.ndarray) -> str:
    """Mean and standard error in percent."""
    return f"{100 * scores.mean():.1f} ± {100 * standard_error(scores):.1f}"
