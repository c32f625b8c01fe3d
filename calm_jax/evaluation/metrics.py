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
    if len(true) < 2 or any(np.ptp(side) <= 1e-9 * max(1.0, np.abs(side).max()) for side in (predicted, true)):
        return float("nan")
    return float(function(predicted, true)[0])


def accuracy(predicted: Float[np.ndarray, "n"], true: Float[np.ndarray, "n"], threshold: float) -> float:
    """The share of pictures that are put on the right side of the threshold; above it is good."""
    right = (np.asarray(predicted) > threshold) == (np.asarray(true) > threshold)
    return float(right.mean()) if len(right) else float("nan")


def balanced_accuracy(predicted: Float[np.ndarray, "n"], true: Float[np.ndarray, "n"], threshold: float) -> float:
    """The mean of the accuracies on both sides of the threshold; nan when the truth has one side only. Always saying
    the same is worth 0.5, where plain accuracy would pay for the larger side (.709 on the AVA test)."""
    right, good = (np.asarray(predicted) > threshold) == (np.asarray(true) > threshold), np.asarray(true) > threshold
    if good.all() or not good.any():
        return float("nan")
    return float((right[good].mean() + right[~good].mean()) / 2)


def mae(predicted: Float[np.ndarray, "n"], true: Float[np.ndarray, "n"]) -> float:
    """The mean absolute error; nan of nothing."""
    return float(np.abs(np.asarray(predicted) - np.asarray(true)).mean()) if len(true) else float("nan")


def majority(answers: Sequence[str]) -> str:
    """The most frequent answer."""
    values, counts = np.unique(np.asarray(answers), return_counts=True)
    return str(values[counts.argmax()])


def interval(statistic: Callable[[Int[np.ndarray, "m"]], float], groups: Sequence[str], *,
             level: float = 0.95, seed: int = 0) -> tuple[float, float]:
    """A percentile bootstrap interval of `statistic(indices)`, resampled in two stages: groups, then their members.

    Answers about one photograph stand and fall together, so photographs (groups) are drawn first.
    """
    low, high = intervals(lambda indices: np.asarray([statistic(indices)]), groups, level=level, seed=seed)[:, 0]
    return float(low), float(high)


def intervals(statistics: Callable[[Int[np.ndarray, "m"]], Float[np.ndarray, "k"]], groups: Sequence[str], *,
              level: float = 0.95, seed: int = 0) -> Float[np.ndarray, "2 k"]:
    """`interval` of several figures of the same resamples: all lower ends, and all upper ends."""
    rng = np.random.default_rng(seed)
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    members = [np.flatnonzero(member == i) for i in range(len(names))]
    values = []
    for _ in range(RESAMPLES):
        if len(names) == len(member):  # each is a group of its own
            values.append(statistics(rng.integers(len(names), size=len(names))))
            continue
        drawn = (members[i] for i in rng.integers(len(members), size=len(members)))
        values.append(statistics(np.concatenate([rng.choice(m, size=len(m)) for m in drawn])))
    return np.nanpercentile(values, [50 * (1 - level), 50 * (1 + level)], axis=0)


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
