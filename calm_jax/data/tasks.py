"""A task's name and a record in, a Sample out. Draws come from the given generator only; no pixel is read.

`attributes` and `comparisons` are the text-guided self-supervision of the paper (unlabeled pictures, augmentations,
pseudo-labels): questions about one edited picture, and about two versions of a picture. `caption`, `comment` and
`score` turn what a dataset knows of a picture into instruction and answer. The instructions are ours; the form of the
score, one decimal and a full stop, is the paper's.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping

import numpy as np

from calm_jax import config as config_lib
from calm_jax.data import attributes
from calm_jax.data.cues import CHOICES, CUES, Cues, variations
from calm_jax.data.samples import Answer, BadRecord, Dataset, Edit, ImageRef, Mention, Record, Sample, Turn

Parts = tuple[str, ...]
Bank = Mapping[str, Cues]

CAPTION_PROMPTS = (
    "Describe the picture in one sentence.",
    "What does the picture show?",
    "What is in this photograph?",
    "Give a short caption for this picture.",
    "Write one sentence about the content of the image.",
    "What can be seen here?",
    "Summarise the scene briefly.",
    "Describe what you see.",
    "Tell me in a few words what the photograph shows.",
)
COMMENT_PROMPTS = (
    "Comment on this photograph.",
    "What do you think of the picture?",
    "Please write a short critique of this image.",
    "Give your aesthetic opinion of the photograph.",
    "How would you review this picture?",
    "What works in this photograph, and what does not?",
    "Tell the photographer what you think.",
    "Write a comment on the aesthetics of the image.",
    "Assess this photograph in words.",
)
SCORE_PROMPTS = (
    "Can you give me the aesthetic score?",  # the paper's example
    "Rate the aesthetics of this picture from 1 to 10.",
    "What is the aesthetic score of the photograph?",
    "How beautiful is the picture on a scale of 1 to 10?",
    "Give the picture a score between 1 and 10.",
    "How would you rate this photograph?",
    "Please score the image for its aesthetics.",
    "Which score does this picture deserve?",
    "Assess the photograph with a number from 1 to 10.",
)
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


def make(task: str, dataset: Dataset, index: int, rng: np.random.Generator, parts: Parts, bank: Bank = CUES) -> Sample:
    """The Sample that a task makes of a record.

    Args:
      task: one of TASKS.
      dataset: where record `index` lies; the images of the Sample point into it.
      index: record number.
      rng: decides everything that is drawn: edits, order and phrasing.
      parts: the parts of an image that the model computes; no others are mentioned.
      bank: the phrases about each attribute, as `cues.bank` gives them.
    Raises:
      ConfigError: there is no such task, or it has no use for these parts.
      BadRecord: the record lacks what the task needs.
    """
    if task not in TASKS:
        raise config_lib.ConfigError(f"there is no task {task!r}{config_lib.nearest(task, TASKS)}")
    record = dataset.record(index)
    parts = tuple(part for part in config_lib.PARTS if part in parts)
    images, turns, target = TASKS[task](record, rng, parts, bank)
    return Sample(images, turns, target, f"{dataset.name}/{task}/{record.key}")


def mapped(score: float, scale: tuple[float, float]) -> float:
    """A score on a dataset's scale (lowest, highest), as a number on the conversation's scale 1-10."""
    lowest, highest = scale
    return 1.0 + 9.0 * (score - lowest) / (highest - lowest)


def score_text(target: float) -> str:
    """A score on the scale 1-10 as the model says it: `6.5.` (paper)."""
    return f"{target:.1f}."


def _pick(rng: np.random.Generator, choices: tuple):
    return choices[rng.integers(len(choices))]


def _seed(rng: np.random.Generator) -> int:
    return int(rng.integers(2**31))


def _levels(parts: Parts) -> Parts:
    levels = tuple(level for level in config_lib.LEVELS if level in parts)
    if not levels:
        raise config_lib.ConfigError(f"attributes are asked at the levels {', '.join(config_lib.LEVELS)}, but "
                                     f"parts={parts}; add one of them to the process")
    return levels


def _attributes(record: Record, rng: np.random.Generator, parts: Parts, bank: Bank):
    """Absolute questions about one edited picture; a level's visual tokens come once, with its first question."""
    drawn = _draw_grades(record, rng, _levels(parts))
    edits = attributes.ordered(
        Edit(name, grade, _seed(rng)) for asked in drawn.values() for name, grade in asked.items()
        if grade != attributes.get(name).neutral)
    turns: list[Turn] = []
    for level, asked in drawn.items():
        for place, (name, grade) in enumerate(asked.items()):
            attribute, cues = attributes.get(name), bank[name]
            question, answer = _pick(rng, cues.questions), _pick(rng, cues.answers[grade])
            if rng.random() < SHORT_SHARE:
                question, answer = f"{question} {_pick(rng, _BRIEFLY)}", f"{attribute.grades[grade].capitalize()}."
            prompt = (question,) if place else (Mention(0, (level,)), f" {question}")
            turns.append(Turn(prompt, Answer(answer), f"{name}={grade}"))
    if not turns:  # every question of these levels is unfit for this picture; comparisons never are
        return _comparisons(record, rng, parts, bank)
    return (ImageRef(record.image.index, record.image.window, edits),), tuple(turns), None


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


def _comparisons(record: Record, rng: np.random.Generator, parts: Parts, bank: Bank):
    """One or two questions about two versions that differ in one grade; right whatever the picture itself is like."""
    attribute = _pick(rng, tuple(attribute for attribute in attributes.of_level(_pick(rng, _levels(parts)))
                                 if attribute.relative or attribute.name not in record.unfit))
    grades = rng.choice(len(attribute.grades), size=2, replace=False)
    images = tuple(
        ImageRef(record.image.index, record.image.window,
                 () if grade == attribute.neutral else (Edit(attribute.name, int(grade), _seed(rng)),))
        for grade in grades)
    cues = bank[attribute.name]
    kinds = [(cues.more, cues.more_answers, int(np.argmax(grades))),
             (cues.less, cues.less_answers, int(np.argmin(grades)))]
    kinds = [kinds[i] for i in rng.permutation(2)][:rng.integers(1, 3)]
    before, between = _pick(rng, _MENTION_PAIR)
    turns = []
    for questions, answers, right in kinds:
        question = _pick(rng, questions)
        prompt: tuple[str | Mention, ...] = (question,) if turns else (
            before, Mention(0, (attribute.level,)), between, Mention(1, (attribute.level,)), f" {question}")
        answer = Answer(variations(_pick(rng, answers))[right])
        turns.append(Turn(prompt, answer, f"{attribute.name}:{CHOICES[right]}"))
    return images, tuple(turns), None


def _caption(record: Record, rng: np.random.Generator, parts: Parts, bank: Bank):
    parts = ("thematic",) if "thematic" in parts else parts
    return _said(record, rng, parts, CAPTION_PROMPTS, record.captions, "caption")


def _comment(record: Record, rng: np.random.Generator, parts: Parts, bank: Bank):
    return _said(record, rng, parts, COMMENT_PROMPTS, record.comments, "comment")


def _said(record: Record, rng: np.random.Generator, parts: Parts, prompts: tuple[str, ...], texts: tuple[str, ...],
          what: str):
    if not texts:
        raise BadRecord(f"record {record.key} has no {what}s, which the task {what} needs")
    prompt = (Mention(0, _some(parts, what)), f" {_pick(rng, prompts)}")
    return (record.image,), (Turn(prompt, Answer(_pick(rng, texts)), what),), None


def _score(record: Record, rng: np.random.Generator, parts: Parts, bank: Bank):
    if record.score is None:
        raise BadRecord(f"record {record.key} has no score, which the task score needs")
    target = mapped(record.score, record.scale)
    prompt = (Mention(0, _some(parts, "score")), f" {_pick(rng, SCORE_PROMPTS)}")
    return (record.image,), (Turn(prompt, Answer(score_text(target)), f"score={target:.3f}"),), target


def _some(parts: Parts, task: str) -> Parts:
    if not parts:
        raise config_lib.ConfigError(f"the task {task} needs at least one part of the image; parts is empty")
    return parts


TASKS: Mapping[str, Callable] = types.MappingProxyType({
    "attributes": _attributes,
    "comparisons": _comparisons,
    "caption": _caption,
    "comment": _comment,
    "score": _score,
})
