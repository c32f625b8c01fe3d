"""Predictions and truths in, figures with intervals out."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import scipy.stats
from jaxtyping import Float, Int

RESAMPLES = 2000  # of a bootstrap interval


def plcc(predicted: Float[np.ndarray, "n"], true: Float[np.ndarray, "n"]) -> float:
    """Pearson's linear correlation coefficient; nan when one side is constant."""
    return _correlation(scipy.stats.pearsonr, predicted, true)


def srcc(predicted: Float[np.ndarray, "n"], true: Float[np.ndarray, "n"]) -> float:
    """Spearman's rank correlation coefficient; nan when one side is constant."""
    return _correlation(scipy.stats.spearmanr, predicted, true)


def _correlation(function, predicted, true) -> float:
    predicted, true = np.asarray(predicted, float), np.asarray(true, float)
    if len(true) < 2 or np.ptp(predicted) == 0 or np.ptp(true) == 0:
        return float("nan")
    return float(function(predicted, true)[0])


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer."""
    values, counts = np.unique(np.asarray(answers), return_counts=True)
    return str(values[counts.argmax()])


def interval(statistic: Callable[[Int[np.ndarray, "m"]], float], groups: Sequence[str], *,
             level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """A percentile bootstrap interval of `statistic(indices)`, resampled in two stages: groups, then their members.

    Answers about one photograph stand and fall together, so photographs (groups) are drawn first.
    """
    rng = np.random.default_rng(seed)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(member == i) for i in range(len(names))]
    values = []
    for _ in range(RESAMPLES):
        drawn = (members[i] for i in rng.integers(len(members), size=len(members)))
        values.append(statistic(np.concatenate([rng.choice(m, size=len(m)) for m in drawn])))
    low, high = np.nanpercentile(values, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)


def mean_interval(values: Float[np.ndarray, "n"], groups: Sequence[str], *, level: float = 0.95,
                  seed: int = 0) -> tuple[float, float]:
    """`interval` of the mean, in time proportional to n: what counts is how often each value is drawn."""
    rng = np.random.default_rng(seed)
    values = np.asarray(values, float)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    drawn = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    sums, sizes = np.zeros(RESAMPLES), np.zeros(RESAMPLES)
    for number in range(len(names)):
        mine = values[member == number]
        count = drawn[:, number] * len(mine)
        sums += rng.multinomial(count, np.full(len(mine), 1 / len(mine))) @ mine
        sizes += count
    low, high = np.percentile(sums / sizes, [50 * (1 - level), 50 * (1 + level)])
    return float(low), float(high)
