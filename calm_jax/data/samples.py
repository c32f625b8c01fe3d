"""The one currency of the data pipeline: a record of a picture in a dataset, and the Sample a task makes of records."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
from jaxtyping import UInt8

from calm_jax import config as config_lib
from calm_jax.data.pictures import BadRecord as BadRecord  # one kind of bad record, with a picture or without


@dataclasses.dataclass(frozen=True)
class Edit:
    """One augmentation of a picture: the name of an attribute of `data.attributes`, a grade of it, and a seed."""

    attribute: str
    grade: int
    seed: int = 0


@dataclasses.dataclass(frozen=True)
class ImageRef:
    """A picture to be read later: record `index` of a dataset, cut to `window`, then edited in order.

    `window` is (left, top, right, bottom) in fractions of the picture; None is the whole picture.
    """

    index: int
    window: tuple[float, float, float, float] | None = None
    edits: tuple[Edit, ...] = ()


@dataclasses.dataclass(frozen=True)
class Mention:
    """Puts the visual tokens of some parts of an image of the Sample into the text, in the order of PARTS."""

    image: int
    parts: tuple[str, ...] = config_lib.PARTS


@dataclasses.dataclass(frozen=True)
class Answer:
    """Text that the model learns to say.

    Attributes:
      text: without the end-of-sequence token, which is appended.
      weight: factor of this answer's token losses; 0 = context only, such as a support picture's rating.
      soft: character offset in `text` -> {character: probability}: soft targets that replace the hard one at that
        character, which the tokenizer must encode as a token of its own (digits are, in both tokenizers).
    """

    text: str
    weight: float = 1.0
    soft: Mapping[int, Mapping[str, float]] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Turn:
    """One exchange. `label` says what is asked and what is true, such as `noise=2` or `noise:first`: evaluation reads
    it, and the pipeline masks a turn whose subject turns out to be doubtful on the picture; the model never sees it."""

    prompt: tuple[str | Mention, ...]
    answer: Answer
    label: str = ""

    @property
    def subject(self) -> str:
        """What is asked about, such as `noise`."""
        return re.split("[=:]", self.label)[0]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A conversation about n >= 0 images, whatever the task.

    Attributes:
      images: each is encoded once, however often it is mentioned.
      turns: the conversation.
      target: numeric target on the 1-10 scale of the conversation (regression head, evaluation), or None.
      name: dataset, task and record, for messages and reports.
    """

    images: tuple[ImageRef, ...]
    turns: tuple[Turn, ...]
    target: float | None = None
    name: str = ""


@dataclasses.dataclass(frozen=True)
class Record:
    """What a dataset knows of one picture.

    Attributes:
      key: its name in the dataset, unique there.
      image: where its pixels are.
      captions, comments: texts about what it shows, and about how good it is; one of them is said at a time.
      score: mean aesthetic score on the dataset's own `scale` (lowest, highest), with `spread`, the standard
        deviation over its raters, where it is known.
      ratings: rater -> the score of that person alone, on the same scale.
      questions: conversations of a question-answer set: question and answer in turn; `<image>` in a question says
        where the picture stands (LLaVA's convention), else it comes first.
      facts: what else is known, by name: the scene, emotion counts, tags.
      deciles: statistic measured on the untouched picture -> 0 (lowest tenth of its data set) to 9.
      unfit: attributes whose absolute question has no true answer on this picture, such as the horizon of a picture
        of the sky.
      group: records of one group show the same photograph and are not independent; empty = a group of its own.
    """

    key: str
    image: ImageRef
    captions: tuple[str, ...] = ()
    comments: tuple[str, ...] = ()
    score: float | None = None
    scale: tuple[float, float] = (1.0, 10.0)
    unfit: tuple[str, ...] = ()
    group: str = ""
    spread: float | None = None
    ratings: Mapping[str, float] = dataclasses.field(default_factory=dict)
    questions: tuple[tuple[str, str], ...] = ()
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    deciles: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raises ValueError where a field is not of its kind, or a score is off the scale."""
        texts = (self.key, self.group, *self.captions, *self.comments, *self.unfit, *itertools.chain(*self.questions),
                 *self.ratings, *self.deciles)
        if not all(isinstance(text, str) for text in texts):
            raise ValueError("something that is no text stands where text should")
        if not isinstance(self.facts, Mapping):
            raise ValueError("the facts have no names")
        scores = (*([] if self.score is None else [self.score]), *self.ratings.values())
        if not all(self.scale[0] <= score <= self.scale[1] for score in scores):
            raise ValueError("a score is off the scale")
        if self.spread is not None and not 0 <= self.spread < math.inf:
            raise ValueError("the standard deviation is none")
        if not all(type(decile) is int and 0 <= decile <= 9 for decile in self.deciles.values()):
            raise ValueError("a decile is not from 0 to 9")


class Dataset(Protocol):
    """Random access to records without reading pixels, and to pixels. Splits are train, validation and test.

    One that can tell pictures apart without decoding them also has `content(index)`, a digest of the bytes of picture
    `index`: what has been computed of pictures is then found by it. Where it raises BadRecord, so would `pixels`.
    """

    name: str

    @property
    def fingerprint(self) -> str:
        """Of the whole content: splits, keys, labels and pictures. It changes when any of them does, and only then."""

    def indices(self, split: str) -> np.ndarray:
        """Record numbers of a split, int64 `[n]`, in a fixed order."""

    def record(self, index: int) -> Record:
        """What is known of record `index`. Raises BadRecord when that is damaged."""

    def pixels(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """The stored picture, RGB 0..255, before window and edits. Raises BadRecord when it cannot be read."""
