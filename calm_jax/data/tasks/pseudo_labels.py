"""A record in; questions about a known edit of its picture, with their true answers, out.

The text-guided self-supervision of the paper (unlabeled pictures, augmentations, textual pseudo-labels): questions
about one edited picture, and about two versions of a picture.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

import numpy as np

from calm_jax.data import attributes
from calm_jax.data.cues import CHOICES, variations
from calm_jax.data.samples import Answer, Edit, ImageRef, Mention, Record, Turn
from calm_jax.data.tasks.context import Content, Context, Parts, levels, pick, seed

_MENTION_PAIR = (
    ("First picture: ", " second picture: "),
    ("Here is the first picture: ", " and here is the second: "),
    ("Compare the first picture ", " with the second one "),
    ("First: ", " Second: "),
)

_BRIEFLY = ("Answer in a word.", "In a word?", "Be brief.")

SHORT_SHARE = 0.8  # of the absolute questions asked for the bare grade: its word carries the whole label (ours)
# Fewest and most questions asked about a level of one picture, where its attributes allow so many.
QUESTIONS: Mapping[str, tuple[int, int]] = types.MappingProxyType({"low": (3, 5), "middle": (3, 3), "high": (2, 3)})
MOST_EDITS = 2  # of one level
# Share of the neutral draws that are asked. Exclusions reject edits of some attributes and neutral grades of others;
# these shares were tuned until the grades of every attribute come about equally often.
NEUTRAL_SHARE: Mapping[str, float] = types.MappingProxyType({
    "orientation": 0.9, "tilt": 0.7, "occlusion": 0.6, "sharpness": 0.9, "exposure": 1.0, "contrast": 0.33,
    "saturation": 0.9, "tint": 0.65, "vignetting": 0.7, "noise": 0.35, "compression": 0.28})


def attributes_of(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """Absolute questions about one edited picture; a level's visual tokens come once, with its first question."""
    drawn = _draw_grades(record, rng, levels(context.parts))
    edits = attributes.ordered(
        Edit(name, grade, seed(rng)) for asked in drawn.values() for name, grade in asked.items()
        if grade != attributes.get(name).neutral)
    turns: list[Turn] = []
    for level, asked in drawn.items():
        for place, (name, grade) in enumerate(asked.items()):
            attribute, cues = attributes.get(name), context.bank[name]
            question, answer = pick(rng, cues.questions), pick(rng, cues.answers[grade])
            if context.terse and rng.random() < context.terse:
                question, answer = f"{name.capitalize()}?", _word(attribute, grade)
            elif rng.random() < SHORT_SHARE:
                question, answer = f"{question} {pick(rng, _BRIEFLY)}", _word(attribute, grade)
            prompt = (question,) if place else (Mention(0, (level,)), f" {question}")
            turns.append(Turn(prompt, Answer(answer), f"{name}={grade}"))
    if not turns:  # every question of these levels is unfit for this picture; comparisons never are
        return comparisons(record, rng, context)
    return (ImageRef(record.image.index, record.image.window, edits),), tuple(turns), None


def _word(attribute: attributes.Attribute, grade: int) -> str:
    """The bare grade as an answer."""
    return f"{attribute.grades[grade].capitalize()}."


def _draw_grades(record: Record, rng: np.random.Generator, levels: Parts) -> dict[str, dict[str, int]]:
    """level -> attribute -> grade of the questions of a picture: grades about equally often, no label in doubt."""
    drawn: dict[str, dict[str, int]] = {}
    grades: dict[str, int] = {}
    for level in map(str, rng.permutation(levels)):
        names = [attribute.name for attribute in attributes.of_level(level)
                 if attribute.absolute and attribute.name not in record.unfit]
        wanted, room = rng.integers(*QUESTIONS[level], endpoint=True), MOST_EDITS
        asked: dict[str, int] = {}
        # What many others exclude comes early more often, or it would hardly ever be asked.
        urgency = rng.random(len(names)) / [attributes.exclusions(name) for name in names]
        for name in (names[place] for place in np.argsort(urgency)):
            attribute = attributes.get(name)
            grade = int(rng.integers(len(attribute.grades)))
            edited = grade != attribute.neutral
            kept = room if edited else rng.random() < NEUTRAL_SHARE[name]
            if len(asked) == wanted or not kept or not attributes.consistent({**grades, name: grade}):
                continue
            room -= edited
            asked[name] = grades[name] = grade
        if asked:
            drawn[level] = asked
    return drawn


def comparisons(record: Record, rng: np.random.Generator, context: Context) -> Content:
    """One or two questions about two versions that differ in one grade; right whatever the picture itself is like."""
    attribute = pick(rng, tuple(attribute for attribute in attributes.of_level(pick(rng, levels(context.parts)))
                                 if attribute.relative or attribute.name not in record.unfit))
    grades = rng.choice(len(attribute.grades), size=2, replace=False)
    images = tuple(
        ImageRef(record.image.index, record.image.window,
                 () if grade == attribute.neutral else (Edit(attribute.name, int(grade), seed(rng)),))
        for grade in grades)
    cues = context.bank[attribute.name]
    kinds = [(cues.more, cues.more_answers, int(np.argmax(grades))),
             (cues.less, cues.less_answers, int(np.argmin(grades)))]
    kinds = [kinds[i] for i in rng.permutation(2)][:rng.integers(1, 3)]
    before, between = pick(rng, _MENTION_PAIR)
    turns = []
    for questions, answers, right in kinds:
        question = pick(rng, questions)
        prompt: tuple[str | Mention, ...] = (question,) if turns else (
            before, Mention(0, (attribute.level,)), between, Mention(1, (attribute.level,)), f" {question}")
        answer = Answer(variations(pick(rng, answers))[right])
        turns.append(Turn(prompt, answer, f"{attribute.name}:{CHOICES[right]}"))
    return images, tuple(turns), None
