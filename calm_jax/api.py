"""A checkpoint in; an object that scores, comments on, and suggests improvements for pictures, out.

    model = calm_jax.load("runs/finetune")
    model.score(["a.jpg", "b.jpg"])         # two Scores
    model.comment("a.jpg", aspect="light")  # a sentence

Pictures are paths, bytes of a file, opened PIL pictures or uint8 arrays `[H, W, 3]`. One picture gives one answer, a
list of pictures a list; no answer depends on the other pictures.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import PIL.Image

from calm_jax import config as config_lib
from calm_jax.data import attributes as attributes_lib
from calm_jax.data import pictures
from calm_jax.data.cues import bank, fingerprint
from calm_jax.data.samples import Answer, ImageRef, Mention, Sample, Turn
from calm_jax.data.scale import HIGHEST, LOWEST, READERS, checked, mapped
from calm_jax.data.tasks import instructions
from calm_jax.data.tasks.opinions import contexts, in_context
from calm_jax.inference.decoding import GREEDY, Sampling
from calm_jax.inference.generate import Generator, Pixels
from calm_jax.inference.once import once
from calm_jax.inference.scorer import Score
from calm_jax.training import restore

Picture: TypeAlias = str | os.PathLike | bytes | PIL.Image.Image | np.ndarray
SCALE = (LOWEST, HIGHEST)
COMMENT_TOKENS = 128  # of a comment or a suggestion at most
ATTRIBUTE_TOKENS = 24


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a model says about one attribute of a picture.

    Attributes:
      grade: the pseudo-label that its answer stands for, such as `blurred`; empty when it is none of the known ones.
      text: the answer.
    """

    grade: str
    text: str


class Model:
    """A trained model that answers about pictures.

    Args:
      checkpoint: a workdir, the folder of one of its processes, or a checkpoint.
      batch: pictures at a time.

    Raises:
      CheckpointError: there is none, or it is damaged.
    """

    def __init__(self, checkpoint: str | os.PathLike, *, batch: int = 16):
        if batch < 1:
            raise config_lib.ConfigError(f"batch={batch} is not positive")
        restored = restore.model(checkpoint)
        process = restored.config.processes.get(restored.saved.meta["process"])
        self.path, self.identity, self.batch = restored.saved.path, restored.saved.identity, batch
        if process and process.cues:
            self.identity["cues"] = fingerprint(process.cues)
        self.parts = process.parts if process else config_lib.PARTS
        self.phrases = bank(process.cues, process.phrasings) if process else bank()
        model, parameters, tokenizer, dtype = (restored.config.model, restored.parameters, restored.tokenizer,
                                               restored.dtype)
        del restored  # the generator holds the weights in arrays of its own
        self.generator = Generator(model, parameters, tokenizer, self.parts, dtype)

    def score(self, images: Picture | Sequence[Picture], *, reader: str = "expectation",
              scale: tuple[float, float] = SCALE) -> Score | list[Score]:
        """Aesthetic scores.

        Args:
          reader: how the score is read from the model, one of `READERS`: `expectation` is the finest, `text` is
            the paper's.
          scale: lowest and highest score of what is returned.

        Raises:
          BadRecord: a picture cannot be read.
        """
        return self._each(images, lambda count, pixels: self.scores(count, pixels, reader=reader, scale=scale))

    def comment(self, images: Picture | Sequence[Picture], *, aspect: str = "", limit: int = COMMENT_TOKENS,
                sampling: Sampling = GREEDY) -> str | list[str]:
        """Comments, on everything or on one of `instructions.ASPECTS`; raises as `score`."""
        return self._each(images, lambda count, pixels: self.texts(
            count, pixels, comment_on(aspect), limit=limit, sampling=sampling))

    def suggest(self, images: Picture | Sequence[Picture], *, limit: int = COMMENT_TOKENS,
                sampling: Sampling = GREEDY) -> str | list[str]:
        """Suggestions for improvement (paper: zero-shot); raises as `score`."""
        return self.ask(images, instructions.SUGGEST[0], limit=limit, sampling=sampling)

    def ask(self, images: Picture | Sequence[Picture], question: str, *, limit: int = COMMENT_TOKENS,
            sampling: Sampling = GREEDY) -> str | list[str]:
        """Answers to any question about each picture; raises as `score`."""
        return self._each(images, lambda count, pixels: self.texts(
            count, pixels, question, limit=limit, sampling=sampling))

    def attributes(self, images: Picture | Sequence[Picture]) -> dict[str, Judged] | list[dict[str, Judged]]:
        """What the model says about every attribute that one picture tells by itself; raises as `score`."""
        return self._each(images, self.judged)

    def personalise(self, rated: Sequence[tuple[Picture, float]], images: Picture | Sequence[Picture], *,
                    scale: tuple[float, float] = SCALE, shots: int = 0) -> Score | list[Score]:
        """The scores that a person would give who gave some pictures the scores in `rated` (paper: in context).

        Args:
          rated: pictures and that person's scores.
          scale: lowest and highest of the scores given and returned.
          shots: rated pictures in a context, see `personal`.

        Raises:
          ConfigError: as `personal`.
          BadRecord: a picture cannot be read.
        """
        return self._each(images, lambda count, pixels: self.personal(rated, count, pixels, scale=scale, shots=shots))

    # ---- the same for pictures that are read one after the other -----------------------------------------------------

    def scores(self, count: int, pixels: Pixels, *, reader: str = "expectation",
               scale: tuple[float, float] = SCALE) -> Iterator[Score]:
        """`score` of `count` pictures, which `pixels(0)` to `pixels(count - 1)` read ahead of the device."""
        if reader not in READERS:
            raise config_lib.ConfigError(f"there is no reader {reader!r}{config_lib.nearest(reader, READERS)}")
        scale = checked(scale)
        asked = self._about(count, instructions.for_reader(reader))
        for score in self.generator.scores(asked, pixels, reader=reader, batch=self.batch):
            yield score if scale == SCALE else score.on(scale)

    def personal(self, rated: Sequence[tuple[Picture, float]], count: int, pixels: Pixels, *,
                 scale: tuple[float, float] = SCALE, shots: int = 0) -> Iterator[Score]:
        """`personalise` of `count` pictures, as in `scores`. What all of them share, the rated pictures, is computed
        once.

        Args:
          shots: rated pictures in a context; 0 = as many as fit. With more rated pictures there are several contexts,
            each with its share of them, and a score is the mean over them (paper.md's 100 shots are ten times ten).

        Raises:
          ConfigError: nothing is rated, a score is off the scale, or so many shots do not fit.
        """
        if not rated:
            raise config_lib.ConfigError("no picture is rated; a personal score needs at least one")
        lowest, highest = scale = checked(scale)
        for place, (_, score) in enumerate(rated, 1):
            if not lowest <= score <= highest:
                raise config_lib.ConfigError(f"rated picture {place} has the score {score:g}, which is not from "
                                             f"{lowest:g} to {highest:g}, the scale")
        shown = [pictures.fit(pictures.pixels(picture), self.generator.size) for picture, _ in rated]

        # Contexts go through the pictures together: each is read and made small once.
        small = once(lambda index: pictures.fit(pixels(index), self.generator.size), 4 * self.batch)

        def look(index):  # the rated pictures come first
            return shown[index] if index < len(shown) else small(index - len(shown))

        def in_a_context(places):
            support = [(ImageRef(place), mapped(rated[place][1], scale)) for place in places]
            samples = (Sample(*in_context(support, ImageRef(len(rated) + index), self.parts), name=f"picture {index}")
                       for index in range(count))
            first = next(samples)
            memory = self.generator.remember(first, len(support), look)
            return self.generator.scores(((sample, len(support)) for sample in itertools.chain([first], samples)), look,
                                         batch=self.batch, memory=memory)

        def fits(number):
            support = [(ImageRef(place), HIGHEST) for place in range(number)]
            return self.generator.fits(Sample(*in_context(support, ImageRef(number), self.parts)))

        found = [in_a_context(places) for places in contexts(len(rated), shots, fits) if count]
        for scores in zip(*found, strict=True):
            mean = float(np.mean([score.value for score in scores]))
            # The variance of a mixture of equal parts: the mean of theirs and the variance of their means.
            spread = np.sqrt(np.mean([score.spread ** 2 + (score.value - mean) ** 2 for score in scores]))
            yield Score(mean, float(spread)).on(scale)

    def texts(self, count: int, pixels: Pixels, question: str, *, limit: int = COMMENT_TOKENS,
              sampling: Sampling = GREEDY) -> Iterator[str]:
        """`ask` of `count` pictures, as in `scores`."""
        return self.generator.answers(self._about(count, question), pixels, limit=limit, batch=self.batch,
                                      sampling=sampling)

    def judged(self, count: int, pixels: Pixels) -> Iterator[dict[str, Judged]]:
        """`attributes` of `count` pictures, as in `scores`."""
        asked = [attribute for attribute in attributes_lib.ATTRIBUTES.values()
                 if attribute.absolute and attribute.level in self.parts]
        if not asked:
            raise config_lib.ConfigError(f"{self.path} computes the parts {', '.join(self.parts)}, none of which "
                                         "answers for an attribute")
        questions = ((_sample(index, (attribute.level,), self.phrases[attribute.name].questions[0]), 0)
                     for index in range(count) for attribute in asked)
        # The questions about a picture come one after the other: it is read and made small once.
        small = once(lambda index: pictures.fit(pixels(index), self.generator.size), 4 * self.batch)
        answers = self.generator.answers(questions, small, limit=ATTRIBUTE_TOKENS, batch=self.batch)
        for _ in range(count):
            found = {}
            for attribute in asked:
                text = next(answers)
                grade = attributes_lib.grade_of(attribute.name, text)
                found[attribute.name] = Judged("" if grade is None else attribute.grades[grade], text)
            yield found

    def _about(self, count: int, question: str) -> Iterator[tuple[Sample, int]]:
        return ((_sample(index, self.parts, question), 0) for index in range(count))

    def _each(self, images: Picture | Sequence[Picture], answer: Callable[[int, Pixels], Iterable[Any]]) -> Any:
        alone = isinstance(images, (str, os.PathLike, bytes, PIL.Image.Image, np.ndarray))
        many = [images] if alone else list(images)
        answers = list(answer(len(many), lambda index: pictures.pixels(many[index])))
        return answers[0] if alone else answers


def comment_on(aspect: str) -> str:
    """The instruction for a comment on one of `instructions.ASPECTS`, or on everything for an empty name."""
    if not aspect:
        return instructions.COMMENT[0]
    if aspect not in instructions.ASPECTS:
        raise config_lib.ConfigError(f"there is no aspect {aspect!r}"
                                     f"{config_lib.nearest(aspect, tuple(instructions.ASPECTS))}")
    return instructions.ASPECTS[aspect]


def _sample(index: int, parts: tuple[str, ...], question: str) -> Sample:
    return Sample((ImageRef(index),), (Turn((Mention(0, parts), f" {question}"), Answer("")),), name=f"picture {index}")
