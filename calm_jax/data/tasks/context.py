"""What a task may know besides the record it is asked about: one value, the same for all examples of a process."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm_jax import config as config_lib
from calm_jax.data.cues import CUES, Cues
from calm_jax.data.samples import Dataset, ImageRef, Turn
from calm_jax.errors import ConfigError

Parts = tuple[str, ...]
Content = tuple[tuple[ImageRef, ...], tuple[Turn, ...], float | None]  # images, turns and target of a Sample


@dataclasses.dataclass(frozen=True)
class Context:
    """Attributes:
      parts: of an image that the model computes; no others are mentioned.
      bank: the phrases about each attribute, as `cues.bank` gives them.
      phrasings: of each written question so many are used, the first; 0 = all. The bank is cut already.
      dataset, indices: where the records lie, and which of them are in the split in use.
      rated: rater -> numbers of the records that this person rated, in the split in use; for the task `personal`.
      support: fewest and most rated pictures that a personal question shows first.
      spread: standard deviation of the Gaussian that replaces one right digit of a score, on the scale 1-10; 0 = none.
      raters: take the spread of a record's own raters where it is known.
      compose: captions and comments are composed of what is known where nobody wrote any (`composed`).
      terse: share of the questions about an attribute that are its name alone.
    """

    parts: Parts
    bank: Mapping[str, Cues] = dataclasses.field(default_factory=lambda: CUES)
    phrasings: int = 0
    dataset: Dataset | None = None
    indices: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.int64))
    rated: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    support: tuple[int, int] = (2, 8)
    spread: float = 0.0
    raters: bool = False
    compose: bool = False
    terse: float = 0.0

    def first(self, choices: tuple) -> tuple:
        """Those of some phrasings that are used."""
        return choices[:self.phrasings or None]

    def __post_init__(self):
        object.__setattr__(self, "parts", tuple(part for part in config_lib.PARTS if part in self.parts))


def levels(parts: Parts) -> Parts:
    """The levels among the parts that are computed. Raises ConfigError when there is none."""
    found = tuple(level for level in config_lib.LEVELS if level in parts)
    if not found:
        raise ConfigError("attributes and measurements are asked at the levels "
                          f"{', '.join(config_lib.LEVELS)}, but parts={parts}; add one to the process")
    return found


def pick(rng: np.random.Generator, choices: tuple) -> Any:
    """One of them, all equally likely."""
    return choices[rng.integers(len(choices))]


def seed(rng: np.random.Generator) -> int:
    """Of an Edit."""
    return int(rng.integers(2**31))
