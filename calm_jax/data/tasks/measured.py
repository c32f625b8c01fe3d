"""A record with measured deciles in, questions about its untouched picture out; two such records in, a comparison out.

Dense supervision: several short answers share one encoding. Edits and windows change what was measured, so the picture
is shown whole and as it is stored.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

import numpy as np

from calm_jax.data import statistics, statistics_cues
from calm_jax.data.samples import Answer, BadRecord, ImageRef, Mention, Record, Turn
from calm_jax.data.tasks.context import Content, Context, levels, pick

# Fewest and most questions about a level of one picture, where it has so many answers (ours).
QUESTIONS: Mapping[str, tuple[int, int]] = types.MappingProxyType({"low": (2, 4), "middle": (2, 3), "high": (2, 3)})
TENTH_SHARE = 0.5  # of the questions asked for the tenth; the others ask for a word (ours)
SHORT_SHARE = 0.8  # of the latter answered with the bare word: it carries the whole label (ours)
TOPIC_SHARE = 0.8  # of the questions behind the first of a level that only name their topic: rows are short (ours)
APART = 2  # tenths between two pictures from which on they are compared (ours)
OTHERS = 8  # pictures tried until one lies far enough from the first to be compared with it (ours)
_PAIRS = (
    ("First picture: ", " second picture: "),
    ("Here is the first picture: ", " and here is the second: "),
    ("Compare the first picture ", " with the second one "),
)


def measured(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """Questions about an untouched picture; a level's visual tokens come once.

    A turn's label is `NAME=7` for a tenth (0 to 9) or a sector of the hue, and `NAME=level3` for a pair of tenths.

    Raises:
      BadRecord: the record has no deciles, or none at these levels.
      ConfigError: none of the parts is a level.
    """
    turns: list[Turn] = []
    for level in map(str, rng.permutation(levels(context.parts))):
        known = [statistic for statistic in statistics.of_level(level) if statistic.name in _deciles(record)]
        wanted = rng.integers(*QUESTIONS[level], endpoint=True)
        for place, which in enumerate(rng.permutation(len(known))[:wanted]):
            question, answer, label = _question(known[which], record.deciles[known[which].name], place, rng, context)
            turns.append(Turn((question,) if place else (Mention(0, (level,)), f" {question}"), Answer(answer), label))
    if not turns:
        raise BadRecord(f"record {record.key} has no deciles at the levels {', '.join(levels(context.parts))}")
    return (ImageRef(record.image.index),), tuple(turns), None


def measured_pair(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """The picture beside another one of its split.

    Raises:
      BadRecord: as `compared`, of the last of OTHERS pictures that were tried.
    """
    reason = BadRecord(f"record {record.key} has no other picture beside it, which the task measured_pair needs")
    for _ in range(OTHERS if len(context.indices) else 0):
        try:
            return compared(record, context.dataset.record(int(rng.choice(context.indices))), rng, context)
        except BadRecord as error:
            reason = error
    raise reason


def compared(one: Record, other: Record, rng: np.random.Generator, context: Context) -> Content:
    """One or two questions about two untouched pictures that lie at least APART tenths apart; label `NAME:first`.

    Raises:
      BadRecord: a record has no deciles, or the two lie too close in everything.
      ConfigError: none of the parts is a level.
    """
    both = [_deciles(record) for record in (one, other)]
    known = [statistic for level in levels(context.parts) for statistic in statistics.of_level(level)
             if not statistic.circular and all(statistic.name in deciles for deciles in both)
             and abs(both[0][statistic.name] - both[1][statistic.name]) >= APART]
    if not known:
        raise BadRecord(f"records {one.key} and {other.key} lie less than {APART} tenths apart in everything measured")
    statistic = known[rng.integers(len(known))]
    cues, higher = statistic.cues, int(both[1][statistic.name] > both[0][statistic.name])
    kinds = [(cues.more, cues.more_answers, higher), (cues.less, cues.less_answers, 1 - higher)]
    before, between = pick(rng, context.first(_PAIRS))
    turns: list[Turn] = []
    for questions, answers, right in [kinds[i] for i in rng.permutation(2)][:rng.integers(1, 3)]:
        question = pick(rng, context.first(questions))
        prompt: tuple[str | Mention, ...] = (question,) if turns else (
            before, Mention(0, (statistic.level,)), between, Mention(1, (statistic.level,)), f" {question}")
        answer = statistics_cues.variations(pick(rng, context.first(answers)))[right]
        turns.append(Turn(prompt, Answer(answer), f"{statistic.name}:{statistics_cues.CHOICES[right]}"))
    return tuple(ImageRef(record.image.index) for record in (one, other)), tuple(turns), None


def _question(statistic: statistics.Statistic, decile: int, place: int, rng: np.random.Generator,
              context: Context) -> tuple[str, str, str]:
    """(question, answer, label); `place` counts the questions of its level."""
    cues = statistic.cues
    question, brief = pick(rng, context.first(cues.questions)), bool(place) and rng.random() < TOPIC_SHARE
    if not statistic.circular and rng.random() < TENTH_SHARE:
        question = (f"{cues.topic.capitalize()}, {statistics_cues.SHORT_AS_TENTH}" if brief else
                    f"{question} {pick(rng, context.first(statistics_cues.AS_TENTH))}")
        return question, statistics_cues.tenth(decile), f"{statistic.name}={decile}"
    level = decile if statistic.circular else decile // 2
    word, sentence = cues.answers(level)
    label = f"{statistic.name}={decile}" if statistic.circular else f"{statistic.name}=level{level}"
    if brief:
        return f"{cues.topic.capitalize()}, {statistics_cues.SHORT_AS_WORD}", word, label
    if rng.random() < SHORT_SHARE:
        return f"{question} {pick(rng, context.first(statistics_cues.AS_WORD))}", word, label
    return question, sentence, label


def _deciles(record: Record) -> Mapping[str, int]:
    if not record.deciles:
        raise BadRecord(f"record {record.key} has no deciles, which the task measured needs; run calm prepare "
                        "on the data set: it measures")
    return record.deciles
