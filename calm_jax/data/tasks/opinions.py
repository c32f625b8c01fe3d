"""A record in; what people said or think of its picture, as question and answer, out.

Captions, comments, scores, personal scores in context, suggestions, and conversations of question-answer sets. The
form of a score, one decimal and a full stop, is the paper's; so is assessing for a person by pictures that this person
has rated. The instructions and everything else are ours.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from calm_jax import config as config_lib
from calm_jax.data import attributes
from calm_jax.data.samples import Answer, BadRecord, Edit, ImageRef, Mention, Record, Turn
from calm_jax.data.scale import HIGHEST, LOWEST, level_text, mapped, score_text, soft_digits
from calm_jax.data.tasks import composed, instructions
from calm_jax.data.tasks.context import Content, Context, Parts, pick, seed
from calm_jax.errors import ConfigError

HELD_OUT = 5  # one rater in so many is never trained on, so that personal assessment can be judged on strangers


def held_out(rater: str) -> bool:
    """Whether a rater is kept from training: one in HELD_OUT, by a hash of the name (ours)."""
    return int(hashlib.sha256(rater.encode()).hexdigest(), 16) % HELD_OUT == 0


def caption(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """What the picture shows, from the thematic tokens where they are computed."""
    parts = ("thematic",) if "thematic" in context.parts else context.parts
    texts = record.captions
    if context.compose and not texts:
        texts = (composed.caption(record, rng),)
    return _said(record, rng, parts, instructions.CAPTION, texts, "caption")


def comment(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """One of the record's comments."""
    texts = record.comments
    if context.compose and not texts:
        target = None if record.score is None else mapped(record.score, record.scale)
        texts = (composed.comment(record, rng, target),)
    return _said(record, rng, context.parts, instructions.COMMENT, texts, "comment")


def _said(record: Record, rng: np.random.Generator, parts: Parts, prompts: tuple[str, ...], texts: tuple[str, ...],
          what: str) -> Content:
    if not texts:
        raise BadRecord(f"record {record.key} has no {what}s, which the task {what} needs")
    prompt = (Mention(0, _some(parts, what)), f" {pick(rng, prompts)}")
    return (record.image,), (Turn(prompt, Answer(pick(rng, texts)), what),), None


def score(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """The mean score, in words."""
    if record.score is None:
        raise BadRecord(f"record {record.key} has no score, which the task score needs")
    target = mapped(record.score, record.scale)
    prompt = (Mention(0, _some(context.parts, "score")), f" {pick(rng, instructions.SCORE)}")
    answer = Answer(score_text(target), soft=_soft(record, target, context))
    return (record.image,), (Turn(prompt, answer, f"score={target:.3f}"),), target


def level(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """The mean score as one of five words, which the reader `levels` weighs against each other (ours)."""
    if record.score is None:
        raise BadRecord(f"record {record.key} has no score, which the task level needs")
    target = mapped(record.score, record.scale)
    prompt = (Mention(0, _some(context.parts, "level")), f" {pick(rng, instructions.LEVEL)}")
    return (record.image,), (Turn(prompt, Answer(level_text(target)), f"level={target:.3f}"),), target


def _soft(record: Record, target: float, context: Context) -> Mapping[int, Mapping[str, float]]:
    spread = context.spread
    if context.raters and record.spread is not None:
        lowest, highest = record.scale
        spread = record.spread * (HIGHEST - LOWEST) / (highest - lowest)
    return soft_digits(target, spread) if spread > 0 else {}


def personal(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """One rater's own score of the picture, after some other pictures with this rater's scores (paper: in context).

    The support pictures are shown by their Q-Former tokens alone (ours: whole pictures do not fit), and their scores
    are read, not learned.
    """
    raters = sorted(rater for rater in record.ratings if not held_out(rater)
                    and len(context.rated.get(rater, ())) > context.support[0])
    if not raters:
        raise BadRecord(f"record {record.key} has no rater with {context.support[0]} other pictures, which the task "
                        "personal needs")
    rater = pick(rng, tuple(raters))
    others = context.rated[rater][context.rated[rater] != record.image.index]
    count = min(int(rng.integers(context.support[0], context.support[1], endpoint=True)), len(others))
    question = pick(rng, instructions.PERSONAL)
    rated = []
    for index in rng.choice(others, count, replace=False):
        shown = context.dataset.record(int(index))
        rated.append((shown.image, mapped(shown.ratings[rater], shown.scale)))
    target = mapped(record.ratings[rater], record.scale)
    answer = Answer(score_text(target), soft=soft_digits(target, context.spread) if context.spread > 0 else {})
    images, turns = in_context(rated, record.image, _some(context.parts, "personal"), question)
    last = dataclasses.replace(turns[-1], answer=answer, label=f"personal={target:.3f}")
    return images, (*turns[:-1], last), target


def in_context(rated: Sequence[tuple[ImageRef, float]], image: ImageRef, parts: Parts,
               question: str = instructions.PERSONAL[0]) -> tuple[tuple[ImageRef, ...], tuple[Turn, ...]]:
    """Images and turns of a conversation that shows rated pictures, score by score, and then asks about another.

    Args:
      rated: pictures with a person's scores on the scale 1-10; shown by their Q-Former tokens where there are any.
      parts: of the picture in question.
    """
    levels = tuple(part for part in parts if part in config_lib.LEVELS) or parts
    turns = [Turn((Mention(number, levels), f" {question}"), Answer(score_text(score), weight=0.0))
             for number, (_, score) in enumerate(rated)]
    turns.append(Turn((Mention(len(rated), parts), f" {question}"), Answer("")))
    return (*(shown for shown, _ in rated), image), tuple(turns)


def contexts(count: int, most: int, fits: Callable[[int], bool]) -> list[list[int]]:
    """Which of `count` rated pictures each context shows, by number; of about one size, each picture in one of them.

    Args:
      most: pictures in a context; 0 = as many as fit.
      fits: whether so many do.

    Raises:
      ConfigError: `most` of them do not fit, or not even one does.
    """
    wanted = min(most or count, count)
    room = bisect.bisect_left(range(1, wanted + 1), True, key=lambda number: not fits(number))
    if room < (wanted if most else min(count, 1)):
        raise ConfigError(f"{wanted} rated pictures do not fit into one context of this model; at most "
                          f"{room} do")
    number = -(-count // max(room, 1)) or 1
    return [list(range(first, count, number)) for first in range(number)]


def suggestion(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """The advice that undoes a flaw that was put into the picture; for a sixth of the examples there is none.

    Only flaws that one picture tells by itself. The paper's suggestions are zero-shot: its models never saw this task.
    """
    prompt = (Mention(0, _some(context.parts, "suggestion")), f" {pick(rng, instructions.SUGGEST)}")
    image = record.image
    flaws = [edit for edit in image.edits if attributes.get(edit.attribute).absolute]
    if not flaws:
        possible = [attribute for attribute in attributes.ATTRIBUTES.values()
                    if attribute.absolute and attribute.name not in record.unfit
                    and attributes.together((attribute.name, *(edit.attribute for edit in image.edits)))]
        if not possible or rng.random() < 1 / 6:
            answer = Answer(pick(rng, instructions.NOTHING_TO_IMPROVE))
            return (image,), (Turn(prompt, answer, "suggestion=none"),), None
        attribute = pick(rng, tuple(possible))
        flaws = [Edit(attribute.name, int(rng.choice(attribute.flaws)), seed(rng))]
        image = ImageRef(image.index, image.window, attributes.ordered((*image.edits, *flaws)))
    flaw = pick(rng, tuple(flaws))
    advice = pick(rng, context.bank[flaw.attribute].advice[flaw.grade])
    return (image,), (Turn(prompt, Answer(advice), f"{flaw.attribute}={flaw.grade}"),), None


def question(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """The conversation of a question-answer set as it stands, about the whole picture."""
    if not record.questions:
        raise BadRecord(f"record {record.key} has no questions, which the task question needs")
    mention = Mention(0, _some(context.parts, "question"))
    turns, shown = [], False
    for asked, said in record.questions:
        before, marker, after = asked.partition("<image>")
        pieces: tuple[str | Mention, ...] = (asked,)
        if not shown:
            pieces = (before, mention, after) if marker else (mention, f" {asked}")
            shown = True
        turns.append(Turn(tuple(piece for piece in pieces if piece != ""), Answer(said), "question"))
    return (record.image,), tuple(turns), None


def _some(parts: Parts, task: str) -> Parts:
    if not parts:
        raise ConfigError(f"the task {task} needs at least one part of the image; parts is empty")
    return parts
