"""The name of an attribute in, everything that is ever said about it out: questions, answers, comparisons, advice.

The paper has the textual cues of its pseudo-labels written by GPT-3.5; these are written by hand, so that training
needs no language-model service. `calm cues` asks one for more, into a file that `bank` reads. An answer stands
alone, because comments are composed of them too. Its key word comes early in some phrasings and late in others, so
that a model cannot live on one position.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Mapping

from calm_jax.data.cues import high, low, middle, stored
from calm_jax.data.cues.entry import Cues
from calm_jax.data.cues.stored import normal as normal
from calm_jax.errors import ConfigError

CHOICES = ("first", "second")  # fills `{which}`
CUES: Mapping[str, Cues] = types.MappingProxyType({**low.CUES, **middle.CUES, **high.CUES})


@functools.cache
def bank(path: str = "", phrasings: int = 0) -> Mapping[str, Cues]:
    """The written phrases and those of a file.

    Args:
      path: a file of `calm cues`, "" = none.
      phrasings: of each question, answer and advice so many of the written ones, the first; 0 = all.
    Raises:
      ConfigError: the file cannot be used.
    """
    if phrasings < 0:
        raise ConfigError(f"phrasings={phrasings} is negative; 0 takes all")
    kept = slice(phrasings or None)
    new = stored.read(path, CUES) if path else {}

    def more(name: str, kind: str, grade: int | None = None) -> tuple[str, ...]:
        return new.get((name, kind, grade), ())

    return {  # a dict, because worker processes need to pickle it
        name: Cues(
            questions=cues.questions[kept] + more(name, "question"),
            answers=tuple(texts[kept] + more(name, "answer", grade) for grade, texts in enumerate(cues.answers)),
            more=cues.more[kept] + more(name, "more"), more_answers=cues.more_answers[kept] + more(name, "more_answer"),
            less=cues.less[kept] + more(name, "less"), less_answers=cues.less_answers[kept] + more(name, "less_answer"),
            advice={grade: texts[kept] + more(name, "advice", grade) for grade, texts in cues.advice.items()})
        for name, cues in CUES.items()}


def fingerprint(path: str) -> str:
    """Of the phrases in a file of `calm cues`; empty for none. Raises as `bank`."""
    return stored.fingerprint(path, CUES) if path else ""


def variations(text: str) -> tuple[str, ...]:
    """A comparison answer with `{which}` filled in, in the order of CHOICES."""
    return tuple(text.format(which=which) for which in CHOICES)
