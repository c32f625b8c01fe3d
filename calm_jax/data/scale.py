"""A score on any scale in; on the conversation's from 1 to 10, as a number or as the model says it, and back, out.

The form, one decimal and a full stop as in `6.5.`, is the paper's; the scale, soft targets and the five words are ours.
"""

from __future__ import annotations

import math
import re
import types
from collections.abc import Mapping, Sequence

import numpy as np

from calm_jax.errors import ConfigError

LOWEST, HIGHEST = 1.0, 10.0  # of the conversation's scale
TENTHS = np.arange(10, 101)  # every score that can be said, in tenths
DECIMALS = tuple(f"{tenth / 10:.1f}" for tenth in TENTHS)  # as it is said, before the full stop
READERS = ("expectation", "text", "levels", "head", "light")  # ways to read a score, see `inference.scorer`
# The five words of opinion studies (ITU-T P.800), at even distances on the scale.
LEVELS: Mapping[str, float] = types.MappingProxyType({"Bad": 1.0, "Poor": 3.25, "Fair": 5.5, "Good": 7.75,
                                                      "Excellent": 10.0})
# A number on its own: no part of a longer one, of a word (3rd, f2.8), of a fraction's end, and not negative.
_DECIMAL = re.compile(r"(?<![\w.,/\-\u2212])\d{1,2}(?:\.\d+|,\d{1,2})?(?!\w|[.,]\d)")


def checked(values: Sequence[object], name: str = "scale") -> tuple[float, float]:
    """Lowest and highest score of a scale, from numbers or their texts.

    Raises:
      ConfigError: they are not two finite numbers that go upwards; `name` is what the sentence calls them.
    """
    try:
        lowest, highest = (float(value) for value in values)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        lowest = highest = math.nan
    if not (lowest < highest and math.isfinite(highest - lowest)):
        said = ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        raise ConfigError(f"{name}={said} is no scale; give its lowest and its highest score, two finite "
                          "numbers that go upwards, such as 1,10")
    return lowest, highest


def mapped(score: float, scale: tuple[float, float]) -> float:
    """A score on a dataset's scale (lowest, highest), as a number on the conversation's scale 1-10."""
    lowest, highest = scale
    return LOWEST + (HIGHEST - LOWEST) * (score - lowest) / (highest - lowest)


def unmapped(score: float, scale: tuple[float, float]) -> float:
    """A score on the conversation's scale, on another scale (lowest, highest): what `mapped` undoes."""
    lowest, highest = scale
    return lowest + (highest - lowest) * (score - LOWEST) / (HIGHEST - LOWEST)


def score_text(target: float) -> str:
    """A score on the scale 1-10 as the model says it: `6.5.` (paper)."""
    return f"{target:.1f}."


def read_score(text: str) -> float | None:
    """The first decimal from 1 to 10 in an answer such as "6.5." or "6,5"; None when there is none (a parse failure):
    neither "-3.5" nor "the 3rd" nor "1,000" holds one."""
    for found in _DECIMAL.findall(text):
        value = float(found.replace(",", "."))
        if LOWEST <= value <= HIGHEST:
            return value
    return None


def level_text(target: float) -> str:
    """The word of LEVELS nearest to a score on the scale 1-10, as the model says it: `Good.`"""
    return min(LEVELS, key=lambda word: abs(LEVELS[word] - target)) + "."


def soft_digits(target: float, spread: float) -> dict[int, dict[str, float]]:
    """Soft targets of the two digits of `score_text(target)`: a Gaussian about the target, on the tenths from 1 to 10.

    The first digit's are its marginal probabilities, the second's those among the tenths that begin with the first
    digit as written, which is what the model has said when it comes to the second. Probabilities below a thousandth
    are left out. 10.0 stays hard: its digits stand elsewhere.

    Returns:
      Character offset in the text -> {digit: probability}, as `Answer.soft`.
    """
    text = score_text(target)
    if len(text) != len("6.5."):
        return {}
    weights = np.exp(-0.5 * np.square((TENTHS / 10 - target) / spread))
    weights /= weights.sum()
    first: dict[str, float] = {}
    second: dict[str, float] = {}
    for said, weight in zip(DECIMALS, weights, strict=True):
        first[said[0]] = first.get(said[0], 0.0) + weight
        if len(said) == 3 and said[0] == text[0]:
            second[said[2]] = second.get(said[2], 0.0) + weight
    return {0: _likely(first), 2: _likely(second)}


def _likely(weights: Mapping[str, float]) -> dict[str, float]:
    total = sum(weights.values())
    kept = {digit: weight / total for digit, weight in weights.items() if weight >= 1e-3 * total}
    return {digit: weight / math.fsum(kept.values()) for digit, weight in kept.items()}
