"""The kinds of phrases that exist about one attribute in, one value that holds them all out."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Cues:
    """Phrases about one attribute.

    Attributes:
      questions: ask for the grade of one picture; empty where that has no true answer.
      answers: the phrasings of each grade, in the order of the grades; no phrase serves two grades.
      more: ask which of two pictures has the higher grade, and `more_answers` answers, with `{which}`.
      less: ask which of two pictures has the lower grade, and `less_answers` answers, with `{which}`.
      advice: grade -> suggestions that undo it, one sentence each; the neutral grade has none.
    """

    questions: tuple[str, ...]
    answers: tuple[tuple[str, ...], ...]
    more: tuple[str, ...]
    more_answers: tuple[str, ...]
    less: tuple[str, ...]
    less_answers: tuple[str, ...]
    advice: Mapping[int, tuple[str, ...]]
