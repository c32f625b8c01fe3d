"""Statistics of the frozen features in; what ridge regression, linear and with a kernel, makes of them, out."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float

PENALTIES = 10.0 ** np.arange(-3.0, 1.01, 0.5)  # of the kernel's, beside a diagonal of ones
RIDGE = 10.0 ** np.arange(1.0, 6.01, 0.5)  # of standardised columns


def standardised(train: Float[np.ndarray, "n F"], other: Float[np.ndarray, "m F"]
                 ) -> tuple[Float[np.ndarray, "n F"], Float[np.ndarray, "m F"]]:
    """Both by mean and standard deviation of the first."""
    mean, spread = train.mean(0, dtype=np.float64), train.std(0, dtype=np.float64) + 1e-6
    return (train - mean) / spread, (other - mean) / spread


def linear(train: Float[np.ndarray, "n F"], scores: Float[np.ndarray, "n"], other: Float[np.ndarray, "m F"]
           ) -> Float[np.ndarray, "m"]:
    """Ridge regression, its penalty chosen by leave-one-out."""
    from sklearn.linear_model import RidgeCV
    seen, asked = standardised(train, other)
    return RidgeCV(RIDGE).fit(seen, scores).predict(asked)


def kernel(train: Float[np.ndarray, "n F"], scores: Float[np.ndarray, "n"], other: Float[np.ndarray, "m F"]
           ) -> Float[np.ndarray, "m"]:
    """Kernel ridge regression with a Gaussian as wide as the median distance, its penalty chosen by leave-one-out."""
    from sklearn.metrics.pairwise import euclidean_distances
    seen, asked = standardised(train, other)
    between = euclidean_distances(seen, squared=True)
    width = np.median(between[:500])
    eigenvalues, vectors = np.linalg.eigh(np.exp(-between / width))
    mean = scores.mean()
    turned, best = vectors.T @ (scores - mean), (np.inf, None)
    for penalty in PENALTIES:
        weights = vectors @ (turned / (eigenvalues + penalty))
        left = weights / (np.square(vectors) @ (1 / (eigenvalues + penalty)))  # leave-one-out errors
        best = min(best, (float(np.mean(np.square(left))), weights), key=lambda pair: pair[0])
    return mean + np.exp(-euclidean_distances(asked, seen, squared=True) / width) @ best[1]
