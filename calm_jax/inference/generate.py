"""Conversations that end with a question in, answers or scores out, in batches that the device need not wait for."""

from __future__ import annotations

import collections
import concurrent.futures
import functools
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int, UInt8

from calm_jax import config as config_lib
from calm_jax.data import images as images_lib
from calm_jax.data import scale
from calm_jax.data.prompts import Layout, encode
from calm_jax.data.samples import Sample
from calm_jax.data.tokenizer import Tokenizer
from calm_jax.inference import decoding, scorer
from calm_jax.inference.decoding import GREEDY, Sampling
from calm_jax.inference.scorer import Score
from calm_jax.models.parameters import Geometry, Parameters, unroll

BUCKET = 64  # prompt lengths are padded to multiples of this, so that a run compiles a few programs only
AHEAD = 2  # batches that are prepared while the device computes
SCORE_TOKENS = 12  # of a score as text: the longest, " 10.0.", with room for a model that says more
Question = tuple[Sample, int]  # a conversation and the turn that is asked
Pixels = Callable[[int], UInt8[np.ndarray, "H W 3"]]  # the picture of an `ImageRef.index`


class Generator:
    """A model ready to answer. Programs are compiled once per (batch, prompt length bucket, images).

    It computes where its parameters are: those of `restore.model` are spread over all devices, and so are the rows of
    a batch. The blocks of the language model become arrays of their own; a caller that drops `parameters` holds no
    weight twice.

    Args:
      model: its geometry and numerics.
      parameters: path -> array, of `Geometry.of(model)`.
      parts: visual parts its prompts may mention.
      dtype: of the computation.
    """

    def __init__(self, model: config_lib.Model, parameters: Parameters, tokenizer: Tokenizer,
                 parts: tuple[str, ...] = config_lib.PARTS, dtype: Any = jnp.float32):
        self.tokenizer, self.parameters, self.dtype = tokenizer, unroll(parameters), dtype
        self.layout, self.size, self.longest = Layout.of(model, parts), model.vit.image_size, model.llama.positions
        self.geometry = Geometry.of(model, unrolled=True)
        places = [leaf.sharding for leaf in self.parameters.values() if isinstance(leaf.sharding, NamedSharding)]
        self.mesh = places[0].mesh if places and places[0].mesh.size > 1 else None
        self._programs: dict[Any, Callable] = {}
        self._readers = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "pictures")

    def answers(self, questions: Iterable[Question], pixels: Pixels, *, limit: int = 48, batch: int = 16,
                sampling: Sampling = GREEDY) -> Iterator[str]:
        """The answer to turn i of each (sample, i), in order; the turns before it are taken as said.

        Args:
          pixels: reads a picture; called from several threads, ahead of the device.
          limit: most tokens of an answer.
          batch: conversations at a time; the last batch is filled up with copies, which are dropped.

        Raises:
          ConfigError: a prompt and its answer do not fit the model's positions.
        """
        for arrays, wanted in self._batches(questions, pixels, limit, batch):
            for ids in self.ids(arrays, limit, sampling)[:wanted]:
                yield self.tokenizer.decode(ids[ids != self.tokenizer.eos])

    def scores(self, questions: Iterable[Question], pixels: Pixels, *, reader: str = "expectation",
               batch: int = 16) -> Iterator[Score]:
        """The score that answers each question, as one of `scale.READERS` finds it; else as `answers`."""
        if reader == "text":
            for text in self.answers(questions, pixels, limit=SCORE_TOKENS, batch=batch):
                value = scale.read_score(text)
                yield Score(float("nan") if value is None else value, text=text)
            return
        program = self._program(scorer.expectation, tree=self._tree(reader))
        for arrays, wanted in self._batches(questions, pixels, 0, batch):
            mean, spread = jax.device_get(program(self.parameters, self._put(arrays)))
            yield from (Score(*pair) for pair in zip(mean[:wanted].tolist(), spread[:wanted].tolist(), strict=True))

    def ids(self, arrays: dict[str, np.ndarray], limit: int, sampling: Sampling = GREEDY
            ) -> Int[np.ndarray, "B L"]:
        """Ids of the answers to prompts that `arrays` has made; the end-of-sequence id stands behind the shorter."""
        shared, inputs = {"limit": limit, "eos": self.tokenizer.eos}, (self.parameters, self._put(arrays))
        if sampling.beams > 1:
            program = self._program(decoding.search, beams=sampling.beams, **shared)
            return np.asarray(program(*inputs, np.float32(sampling.length_penalty)))
        program = self._program(decoding.sample, drawn=sampling.temperature > 0, **shared)
        return np.asarray(program(*inputs, np.float32(sampling.temperature), np.float32(sampling.top_p),
                                  np.uint32(sampling.seed)))

    def arrays(self, questions: Sequence[Question], pixels: Pixels, limit: int) -> dict[str, np.ndarray]:
        """The prompts as `decoding` takes them; each with `limit` more tokens must fit the model's positions."""
        encoded = [encode(sample, self.tokenizer, self.layout, ask=turn) for sample, turn in questions]
        longest = max(len(item.tokens) for item in encoded)
        width = -(-longest // BUCKET) * BUCKET
        if longest + limit > self.longest:
            raise config_lib.ConfigError(f"a prompt of {longest} tokens and an answer of {limit} exceed the model's "
                                         f"{self.longest} positions; mention fewer images or parts")
        slots = max(1, max(len(item.images) for item in encoded))
        arrays = {"images": np.zeros((len(encoded), slots, self.size, self.size, 3), np.uint8),
                  "tokens": np.full((len(encoded), width), self.tokenizer.pad, np.int32),
                  "visual": np.full((len(encoded), width), -1, np.int32),
                  "lengths": np.asarray([len(item.tokens) for item in encoded], np.int32),
                  "digests": np.zeros(len(encoded), np.uint32)}
        shown = [(row, slot, ref) for row, item in enumerate(encoded) for slot, ref in enumerate(item.images)]
        squares = self._readers.map(lambda place: images_lib.render(pixels(place[2].index), place[2], self.size), shown)
        for (row, slot, _), square in zip(shown, squares, strict=True):
            arrays["images"][row, slot] = square
        for row, item in enumerate(encoded):
            arrays["tokens"][row, :len(item.tokens)] = item.tokens
            arrays["visual"][row, :len(item.visual)] = item.visual
            digest = zlib.crc32(item.visual.tobytes(), zlib.crc32(item.tokens.tobytes()))
            arrays["digests"][row] = zlib.crc32(arrays["images"][row, :len(item.images)].tobytes(), digest)
        return arrays

    def _batches(self, questions, pixels, limit, size) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        """Arrays of `size` questions at a time and how many of them count, made in a thread, AHEAD of their use."""
        if self.mesh is not None:  # rows divide among the devices that split them
            parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            size = -(-size // parts) * parts
        pending: collections.deque = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            try:
                for chunk in _chunks(questions, size):
                    filled = chunk + [chunk[-1]] * (size - len(chunk))
                    pending.append((pool.submit(self.arrays, filled, pixels, limit), len(chunk)))
                    if len(pending) > AHEAD:
                        made, wanted = pending.popleft()
                        yield made.result(), wanted
                while pending:
                    made, wanted = pending.popleft()
                    yield made.result(), wanted
            finally:
                for made, _ in pending:
                    made.cancel()

    def _put(self, arrays):
        if self.mesh is None:
            return arrays
        rows = NamedSharding(self.mesh, PartitionSpec(("data", "fsdp")))
        return jax.device_put(arrays, rows)

    def _tree(self, reader: str) -> scorer.Tree:
        if reader not in self._programs:
            self._programs[reader] = scorer.Tree.of(self.tokenizer, scorer.SAID[reader])
        return self._programs[reader]

    def _program(self, function: Callable, **options) -> Callable:
        """`function` of this model with these options, compiled; the same one for the same options."""
        place = function, tuple(options.items())
        if place not in self._programs:
            self._programs[place] = jax.jit(functools.partial(
                _placed, self.mesh, functools.partial(function, self.geometry, parts=self.layout.parts,
                                                      dtype=self.dtype, **options)))
        return self._programs[place]


def _placed(mesh: jax.sharding.Mesh | None, function: Callable, *arguments):
    """The function where the models put their rows on the devices of the mesh."""
    if mesh is None:
        return function(*arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function(*arguments)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
