"""A generator and a file in; the same generator, which asks no question a second time after an interruption, out.

Protocols ask the same questions in the same order each time, so that a reply is known by its number.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from calm_jax import files
from calm_jax.data.samples import ImageRef, Sample
from calm_jax.inference.generate import Generator, Memory, Pixels, Question
from calm_jax.inference.scorer import Score


class Replies:
    """Stands where a `Generator` does. Every reply is in the file before it is given to the protocol.

    Args:
      path: of the file; one that answers something else is begun anew.
      asked: what the replies are answers to, model and options, as JSON values.
    """

    def __init__(self, generator: Generator, path: pathlib.Path, asked: Mapping[str, Any]):
        self._generator, self._path, self._place = generator, path, 0
        self.layout, self.size, self.longest, self.fits = (generator.layout, generator.size, generator.longest,
                                                           generator.fits)
        # The last line has no end where a program was killed while it wrote.
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        begun = bool(lines) and lines[0] == json.dumps(asked)
        self._known = [json.loads(line) for line in lines[1:]] if begun else []
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write(path, "".join(line + "\n" for line in (lines if begun else [json.dumps(asked)])))

    def answers(self, questions: Iterable[Question], pixels: Pixels, **options) -> Iterator[str]:
        """As `Generator.answers`."""
        yield from self._each(questions, lambda rest: self._generator.answers(rest, pixels, **options))

    def scores(self, questions: Iterable[Question], pixels: Pixels, *, memory: Callable[[], Memory] | None = None,
               **options) -> Iterator[Score]:
        """As `Generator.scores`; `memory` is what `remember` gave."""
        def ask(rest):
            return (dataclasses.astuple(score) for score in self._generator.scores(
                rest, pixels, memory=memory and memory(), **options))

        for reply in self._each(questions, ask):
            yield Score(*reply)

    def remember(self, sample: Sample, turns: int, pixels: Pixels) -> Callable[[], Memory]:
        """As `Generator.remember`, once somebody asks behind it."""
        return lambda: self._generator.remember(sample, turns, pixels)

    def statistics(self, refs: Sequence[ImageRef], pixels: Pixels) -> dict[str, Float[np.ndarray, "n N E"]]:
        """As `Generator.statistics`, which are kept on disk as it is."""
        return self._generator.statistics(refs, pixels)

    def _each(self, questions: Iterable[Question], ask: Callable[[Iterator[Question]], Iterable[Any]]) -> Iterator[Any]:
        rest = iter(questions)
        while self._place < len(self._known):
            if next(rest, None) is None:
                return
            self._place += 1
            yield self._known[self._place - 1]
        first = next(rest, None)
        if first is None:
            return
        with self._path.open("a") as file:
            for reply in ask(itertools.chain([first], rest)):
                file.write(json.dumps(reply) + "\n")
                file.flush()
                self._place += 1
                yield reply
