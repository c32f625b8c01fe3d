"""A checkpoint in; an object that scores, comments on, and suggests improvements for pictures, out.

    model = calm_jax.load("runs/finetune")
    model.score(["a.jpg", "b.jpg"])         # two Scores
    model.comment("a.jpg", aspect="light")  # a sentence

Pictures are paths, bytes of a file, opened PIL pictures or uint8 arrays `[H, W, 3]`. One picture gives one answer, a
list of pictures a list; no answer depends on the other pictures.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import PIL.Image
from jaxtyping import Float

from calm_jax import config as config_lib
from calm_jax.checkpoints import lineage, restore
from calm_jax.data import attributes as attributes_lib
from calm_jax.data import pictures
from calm_jax.data.cues import bank, fingerprint
from calm_jax.data.cues.entry import Cues
from calm_jax.data.samples import Answer, ImageRef, Mention, Sample, Turn
from calm_jax.data.scale import HIGHEST, LOWEST, READERS, checked, mapped
from calm_jax.data.tasks import instructions, skills
from calm_jax.data.tasks.opinions import contexts, in_context
from calm_jax.errors import ConfigError, nearest
from calm_jax.features import keys
from calm_jax.inference import choice, taste
from calm_jax.inference.decoding import GREEDY, Sampling
from calm_jax.inference.generate import Generator, Pictures, Pixels
from calm_jax.inference.scorer import Score

Picture: TypeAlias = str | os.PathLike | bytes | PIL.Image.Image | np.ndarray
SCALE = (LOWEST, HIGHEST)
COMMENT_TOKENS = 128  # of a comment or a suggestion at most
ATTRIBUTE_TOKENS = 24
METHODS = ("ridge", "context")  # of personal scores: in closed form (ours), or in context (paper)


@dataclasses.dataclass(frozen=True)
class Judged:
    """What a model says about one attribute of a picture.

    Attributes:
      grade: the pseudo-label that its answer stands for, such as `blurred`; empty when it is none of the known ones.
      text: the answer.
    """

    grade: str
    text: str


@dataclasses.dataclass(frozen=True)
class Loaded:
    """The model of one process, ready to answer.

    Attributes:
      process: its name.
      path: its checkpoint.
      identity: what tells this checkpoint from any other: JSON values.
      parts: of an image that it computes.
      phrases: the bank in which it was asked about attributes.
      generator: asks it.
    """

    process: str
    path: os.PathLike
    identity: dict[str, Any]
    parts: tuple[str, ...]
    phrases: Mapping[str, Cues]
    generator: Generator


class Model:
    """A trained model that answers about pictures.

    Of a workdir the process answers that learned what is asked, the latest of several (`processes` tells which); each
    is loaded when it is first asked, and kept. What none of them learned is refused.

    Args:
      checkpoint: a workdir, the folder of one of its processes, or a checkpoint.
      batch: pictures at a time.
      process: of the workdir; it answers everything, also what it never learned.
      say: takes a sentence about each choice of a process. None: only where what is asked was never learned, as a
        Python warning.

    Raises:
      CheckpointError: there is none, or it is damaged.
      ConfigError: there is no such process; and everything that asks: nothing there learned what is asked.
    """

    def __init__(self, checkpoint: str | os.PathLike, *, batch: int = 16, process: str = "",
                 say: Callable[[str], None] | None = None):
        if batch < 1:
            raise ConfigError(f"batch={batch} is not positive")
        self.path, self.batch, self._process, self._say = checkpoint, batch, process, say
        self.processes = choice.processes(checkpoint, process)
        self._loaded: dict[str, Loaded] = {}
        self._answers: dict[str, Loaded] = {}

    def loaded(self, skill: str) -> Loaded:
        """The model of the process that answers for one of `skills.SKILLS`.

        Raises:
          CheckpointError: its checkpoint is damaged or gone.
          ConfigError: nothing there learned it.
        """
        if skill not in self._answers:
            chosen = choice.choose(self.path, skill, process=self._process)
            if self._say:
                self._say(chosen.line)
            elif chosen.state != skills.TAUGHT:
                warnings.warn(chosen.line, stacklevel=2)
            if chosen.process not in self._loaded:
                self._loaded[chosen.process] = _load(chosen)
            self._answers[skill] = self._loaded[chosen.process]
        return self._answers[skill]

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
                    scale: tuple[float, float] = SCALE, method: str = "ridge", shots: int = 0) -> Score | list[Score]:
        """The scores that a person would give who gave some pictures the scores in `rated`.

        Args:
          rated: pictures and that person's scores.
          scale: lowest and highest of the scores given and returned.
          method: one of `METHODS`: `ridge` goes from the generic scores, if the model learned to score, and from what
            its encoder sees (`inference.taste`); `context` shows the model the rated pictures (paper).
          shots: of `context`, see `personal`.

        Raises:
          ConfigError: as `personal`.
          BadRecord: a picture cannot be read.
        """
        return self._each(images, lambda count, pixels: self.personal(rated, count, pixels, scale=scale, method=method,
                                                                      shots=shots))

    def statistics(self, images: Picture | Sequence[Picture]) -> Float[np.ndarray, "F"] | list[Float[np.ndarray, "F"]]:
        """What the visual encoder sees of each whole picture, in a few numbers: for ridge regression, groups and
        likenesses. They are those of `Generator.statistics` in the order of PARTS, kept on disk; raises as `score`."""
        generator = self.seeing().generator

        def flat(count: int, pixels: Pixels) -> Float[np.ndarray, "n F"]:
            found = generator.statistics([ImageRef(index) for index in range(count)], pixels)
            return np.concatenate([found[part].reshape(count, -1) for part in config_lib.PARTS], 1)

        return self._each(images, flat)

    def seeing(self) -> Loaded:
        """The model whose encoder is asked: that which scores, if one does; a conversion will do; raises as
        `loaded`."""
        if skill := self._generic():
            return self.loaded(skill)
        chosen = choice.seeing(self.path, self._process)
        if chosen.process not in self._loaded:
            if self._say:
                self._say(chosen.line)
            self._loaded[chosen.process] = _load(chosen)
        return self._loaded[chosen.process]

    # ---- the same for pictures that are read one after the other -----------------------------------------------------

    def scores(self, count: int, pixels: Pixels, *, reader: str = "expectation",
               scale: tuple[float, float] = SCALE) -> Iterator[Score]:
        """`score` of `count` pictures, which `pixels(0)` to `pixels(count - 1)` read ahead of the device."""
        if reader not in READERS:
            raise ConfigError(f"there is no reader {reader!r}{nearest(reader, READERS)}")
        scale = checked(scale)
        one = self.loaded(skills.for_reader(reader))
        asked = _about(one, count, instructions.for_reader(reader))
        for score in one.generator.scores(asked, pixels, reader=reader, batch=self.batch):
            yield score if scale == SCALE else score.on(scale)

    def personal(self, rated: Sequence[tuple[Picture, float]], count: int, pixels: Pixels, *,
                 scale: tuple[float, float] = SCALE, method: str = "ridge", shots: int = 0) -> Iterator[Score]:
        """`personalise` of `count` pictures, as in `scores`. What all of them share, the rated pictures, is computed
        once.

        Args:
          shots: rated pictures in a context; 0 = as many as fit. With more rated pictures there are several contexts,
            each with its share of them, and a score is the mean over them (paper.md's 100 shots are ten times ten).

        Raises:
          ConfigError: nothing is rated, a score is off the scale, so many shots do not fit, or there is no such method.
        """
        if method not in METHODS:
            raise ConfigError(f"there is no method {method!r}{nearest(method, METHODS)}")
        if shots and method != "context":
            raise ConfigError(f"shots={shots} are pictures in a context, and the method is {method}; leave shots out, "
                              "or set the method to context")
        if not rated:
            raise ConfigError("no picture is rated; a personal score needs at least one")
        lowest, highest = scale = checked(scale)
        for place, (_, score) in enumerate(rated, 1):
            if not lowest <= score <= highest:
                raise ConfigError(f"rated picture {place} has the score {score:g}, which is not from "
                                  f"{lowest:g} to {highest:g}, the scale")
        ask = self._by_ridge if method == "ridge" else functools.partial(self._in_context, shots=shots)
        return ask(rated, count, pixels, scale)

    def _by_ridge(self, rated: Sequence[tuple[Picture, float]], count: int, pixels: Pixels,
                  scale: tuple[float, float]) -> Iterator[Score]:
        shown = Pictures(lambda index: pictures.pixels(rated[index][0]), lambda index: keys.of_source(rated[index][0]))
        known = list(self._known(len(rated), shown))
        own = taste.Taste.of(np.concatenate([seen for seen, _ in known]), [mapped(score, scale) for _, score in rated],
                             _joined(generic for _, generic in known))
        for seen, generic in self._known(count, pixels):
            yield from (score.on(scale) for score in own.scores(seen, generic))

    def _known(self, count: int, pixels: Pixels) -> Iterator[tuple[Float[np.ndarray, "n E"], list[float] | None]]:
        """What `taste` reads of pictures, and their generic scores, or None where the model has none; by batches."""
        generator = self.seeing().generator
        look = Pictures.fitted(pixels, generator.size, 4 * self.batch)
        skill = self._generic()
        generic = self.scores(count, look, reader=skills.GENERIC[skill]) if skill else None
        for start in range(0, count, self.batch):
            refs = [ImageRef(index) for index in range(start, min(start + self.batch, count))]
            scores = None if generic is None else [next(generic).value for _ in refs]
            yield taste.features(generator.statistics(refs, look)), scores

    def _generic(self) -> str:
        """The skill that gives generic scores, one of `skills.GENERIC`; empty where none was learned."""
        return next((skill for skill in skills.GENERIC if skill in self.processes), "")

    def _in_context(self, rated: Sequence[tuple[Picture, float]], count: int, pixels: Pixels,
                    scale: tuple[float, float], shots: int) -> Iterator[Score]:
        one = self.loaded("personalise")
        generator = one.generator
        shown = [pictures.fit(pictures.pixels(picture), generator.size) for picture, _ in rated]

        # Contexts go through the pictures together: each is read and made small once.
        small = Pictures.fitted(pixels, generator.size, 4 * self.batch)
        # The rated pictures come first.
        look = Pictures(lambda index: shown[index] if index < len(shown) else small(index - len(shown)),
                        lambda index: None if index < len(shown) else small.content(index - len(shown)))

        def in_a_context(places):
            support = [(ImageRef(place), mapped(rated[place][1], scale)) for place in places]
            samples = (Sample(*in_context(support, ImageRef(len(rated) + index), one.parts), name=f"picture {index}")
                       for index in range(count))
            first = next(samples)
            memory = generator.remember(first, len(support), look)
            return generator.scores(((sample, len(support)) for sample in itertools.chain([first], samples)), look,
                                    batch=self.batch, memory=memory)

        def fits(number):
            support = [(ImageRef(place), HIGHEST) for place in range(number)]
            return generator.fits(Sample(*in_context(support, ImageRef(number), one.parts)))

        found = [in_a_context(places) for places in contexts(len(rated), shots, fits) if count]
        for scores in zip(*found, strict=True):
            mean = float(np.mean([score.value for score in scores]))
            # The variance of a mixture of equal parts: the mean of theirs and the variance of their means.
            spread = np.sqrt(np.mean([score.spread ** 2 + (score.value - mean) ** 2 for score in scores]))
            yield Score(mean, float(spread)).on(scale)

    def texts(self, count: int, pixels: Pixels, question: str, *, limit: int = COMMENT_TOKENS,
              sampling: Sampling = GREEDY) -> Iterator[str]:
        """`ask` of `count` pictures, as in `scores`."""
        one = self.loaded(skills.for_question(question))
        return one.generator.answers(_about(one, count, question), pixels, limit=limit, batch=self.batch,
                                     sampling=sampling)

    def judged(self, count: int, pixels: Pixels) -> Iterator[dict[str, Judged]]:
        """`attributes` of `count` pictures, as in `scores`."""
        one = self.loaded("attributes")
        asked = [attribute for attribute in attributes_lib.ATTRIBUTES.values()
                 if attribute.absolute and attribute.level in one.parts]
        if not asked:
            raise ConfigError(f"{one.path} computes the parts {', '.join(one.parts)}, none of which "
                              "answers for an attribute")
        questions = ((_sample(index, (attribute.level,), one.phrases[attribute.name].questions[0]), 0)
                     for index in range(count) for attribute in asked)
        # The questions about a picture come one after the other: it is read and made small once.
        small = Pictures.fitted(pixels, one.generator.size, 4 * self.batch)
        answers = one.generator.answers(questions, small, limit=ATTRIBUTE_TOKENS, batch=self.batch)
        for _ in range(count):
            found = {}
            for attribute in asked:
                text = next(answers)
                grade = attributes_lib.grade_of(attribute.name, text)
                found[attribute.name] = Judged("" if grade is None else attribute.grades[grade], text)
            yield found

    def _each(self, images: Picture | Sequence[Picture], answer: Callable[[int, Pixels], Iterable[Any]]) -> Any:
        alone = isinstance(images, (str, os.PathLike, bytes, PIL.Image.Image, np.ndarray))
        many = [images] if alone else list(images)
        answers = list(answer(len(many), Pictures(lambda index: pictures.pixels(many[index]),
                                                  lambda index: keys.of_source(many[index]))))
        return answers[0] if alone else answers


def _joined(several: Iterable[list[float] | None]) -> list[float] | None:
    lists = list(several)
    return None if lists[0] is None else list(itertools.chain.from_iterable(lists))


def comment_on(aspect: str) -> str:
    """The instruction for a comment on one of `instructions.ASPECTS`, or on everything for an empty name."""
    if not aspect:
        return instructions.COMMENT[0]
    if aspect not in instructions.ASPECTS:
        raise ConfigError(f"there is no aspect {aspect!r}"
                          f"{nearest(aspect, tuple(instructions.ASPECTS))}")
    return instructions.ASPECTS[aspect]


def _load(chosen: choice.Choice) -> Loaded:
    restored = restore.model(chosen.path)
    process = restored.config.processes.get(chosen.process, config_lib.Process())  # a conversion has none
    identity = lineage.identity(restored.saved)
    if process.cues:
        identity["cues"] = fingerprint(process.cues)
    model, parameters, chat, dtype = restored.config.model, restored.parameters, restored.chat, restored.dtype
    path = restored.saved.path
    del restored  # the generator holds the weights in arrays of its own
    return Loaded(chosen.process, path, identity, process.parts, bank(process.cues, process.phrasings),
                  Generator(model, parameters, chat, process.parts, dtype, keep=True))


def _about(one: Loaded, count: int, question: str) -> Iterator[tuple[Sample, int]]:
    return ((_sample(index, one.parts, question), 0) for index in range(count))


def _sample(index: int, parts: tuple[str, ...], question: str) -> Sample:
    return Sample((ImageRef(index),), (Turn((Mention(0, parts), f" {question}"), Answer("")),), name=f"picture {index}")
