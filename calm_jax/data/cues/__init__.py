"""The name of an attribute in, everything that is ever said about it out: questions, answers, comparisons, advice.

The paper has the textual cues of its pseudo-labels written by GPT-3.5; these are written by hand, so that training
needs no language-model service. `tools.make_cues` asks one for more, into a file that `bank` reads. An answer stands
alone, because comments are composed of them too. Its key word comes early in some phrasings and late in others, so
that a model cannot live on one position.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Mapping

from calm_jax import config as config_lib
from calm_jax.data.cues import high, low, middle
from calm_jax.data.cues.entry import Cues

CHOICES = ("first", "second")  # fills `{which}`
CUES: Mapping[str, Cues] = types.MappingProxyType({**low.CUES, **middle.CUES, **high.CUES})


@functools.cache
def bank(path: str = "", phrasings: int = 0) -> Mapping[str, Cues]:
    """The written phrases and those of a file.

    Args:
      path: a file of `tools.make_cues`, "" = none.
      phrasings: of each question, answer and advice so many of the written ones, the first; 0 = all.
    Raises:
      ConfigError: the file cannot be used.
    """
    if phrasings < 0:
        raise config_lib.ConfigError(f"phrasings={phrasings} is negative; 0 takes all")
    if path:
        raise config_lib.ConfigError("files of phrases cannot be read yet")
    kept = slice(phrasings or None)
    return {  # a dict, because worker processes need to pickle it
        name: dataclasses.replace(
            cues, answers=tuple(texts[kept] for texts in cues.answers),
            advice={grade: texts[kept] for grade, texts in cues.advice.items()},
            **{kind: getattr(cues, kind)[kept]
               for kind in ("questions", "more", "more_answers", "less", "less_answers")})
        for name, cues in CUES.items()}


def normal(text: str) -> str:
    """`text` without case, surplus white space and its full stop: the form in which phrases are compared."""
    return " ".join(text.lower().split()).rstrip(". ")


def variations(text: str) -> tuple[str, ...]:
    """A comparison answer with `{which}` filled in, in the order of CHOICES."""
    return tuple(text.format(which=which) for which in CHOICES)
