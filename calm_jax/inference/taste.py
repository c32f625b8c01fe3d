"""Pictures that one person has rated in; that person's scores of other pictures, in closed form, out (ours).

A person's ratings are the generic scores, moved by their mean difference, and what this person likes besides: a kernel
ridge regression of the rest on what the frozen encoder sees. Where no generic score is known, the regression is of the
ratings themselves. Nothing is trained: it takes milliseconds, and works from the first day.

The regression is kept weak. How weak, leave-one-out decides among a few strengths, of which one leaves taste out: on
OASIS (docs/experiments.md) weaker penalties than the smallest here lose to the generic score alone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from calm_jax.data.scale import HIGHEST, LOWEST
from calm_jax.inference.scorer import Score

PART = "high"  # whose class token tells most of what people differ in, of the four parts' means and class tokens
STRENGTHS = (10.0, 30.0, 100.0, math.inf)  # of the penalty, in units of the kernel's mean eigenvalue
ALONE = (1.0, 3.0, 10.0)  # without generic scores


def features(statistics: Mapping[str, Float[np.ndarray, "n N E"]]) -> Float[np.ndarray, "n E"]:
    """The class token of PART, or the mean over patches of an encoder without one, centred and of length 1.

    Args:
      statistics: as `Generator.statistics` gives them.
    """
    seen = np.asarray(statistics[PART], np.float64)
    found = seen[:, 2 if seen.shape[1] == 3 else 0]
    found = found - found.mean(1, keepdims=True)
    return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)


@dataclasses.dataclass(frozen=True)
class Taste:
    """What one person's ratings say.

    Attributes:
      rated: features of the rated pictures.
      weights: of each rated picture in the score of another.
      offset: this person's mean difference from the generic scores, or mean rating.
      strength: of the penalty, one of STRENGTHS or ALONE.
      error: root mean square of the differences that leave-one-out finds, points of 1-10; nan for a single rating.
    """

    rated: Float[np.ndarray, "n E"]
    weights: Float[np.ndarray, "n"]
    offset: float
    strength: float
    error: float

    @classmethod
    def of(cls, rated: Float[np.ndarray, "n E"], ratings: Sequence[float], generic: Sequence[float] | None) -> Taste:
        """The taste of a person.

        Args:
          rated: features of at least one picture.
          ratings: this person's, on the scale 1-10.
          generic: what the model says of the same pictures, on that scale; None: it does not score.
        """
        rest = np.asarray(ratings, float) - (0.0 if generic is None else np.asarray(generic, float))
        count, offset = len(rest), float(rest.mean())
        seen = rated - rated.mean(0)
        eigenvalues, vectors = np.linalg.eigh(seen @ seen.T)  # of the centred linear kernel
        eigenvalues[eigenvalues < 1e-9] = 0.0  # rounding, beside features of length 1
        unit, turned = eigenvalues.sum() / max(count - 1, 1), vectors.T @ (rest - offset)
        best = None
        for strength in STRENGTHS if generic is not None else ALONE:
            fixed = eigenvalues + (strength * unit if unit and math.isfinite(strength) else math.inf)
            shrunk = np.divide(eigenvalues, fixed)
            leverage = np.square(vectors) @ shrunk + 1 / count
            with np.errstate(divide="ignore", invalid="ignore"):
                left = (rest - offset - vectors @ (shrunk * turned)) / (1 - leverage)
            error = float(np.sqrt(np.mean(np.square(left)))) if count > 1 else math.nan
            if best is None or error < best.error:
                best = cls(rated, vectors @ (turned / fixed), offset, strength, error)
        return best

    def scores(self, pictures: Float[np.ndarray, "m E"], generic: Sequence[float] | None) -> list[Score]:
        """This person's scores of other pictures.

        Args:
          generic: as in `of`, of these pictures.
        """
        centre = self.rated.mean(0)
        liked = (pictures - centre) @ ((self.rated - centre).T @ self.weights)
        values = self.offset + liked + (0.0 if generic is None else np.asarray(generic, float))
        return [Score(float(value), self.error) for value in np.clip(values, LOWEST, HIGHEST)]
