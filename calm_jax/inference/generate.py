"""Conversations that end with a question in, answers out: prefill and greedy decoding with a cache, in one program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from calm_jax import config as config_lib
from calm_jax.data import images as images_lib
from calm_jax.data.prompts import Layout, encode
from calm_jax.data.samples import Sample
from calm_jax.data.tokenizer import Tokenizer
from calm_jax.inference import scorer
from calm_jax.models.parameters import Geometry, Parameters

BUCKET = 64  # prompt lengths are padded to multiples of this, so that a run compiles a few programs only


def greedy(geometry: Geometry, parameters: Parameters, batch: dict[str, Array], *, parts: tuple[str, ...], limit: int,
           eos: int, dtype: Any) -> tuple[Int[Array, "B L"], Bool[Array, "B"]]:
    """The most probable next token, again and again.

    Args:
      batch: images uint8 [B, I, H, W, 3], tokens and visual int32 [B, T] (left-aligned), lengths int32 [B].
      parts: visual parts that the prompts use.
      limit: L, the most tokens of an answer.
      eos: the id that ends an answer.

    Returns:
      Ids, `eos` behind the end of an answer; and whether each answer ended by itself.
    """
    model = geometry.bind(parameters)
    pool = model.encode(batch["images"], parts, dtype=dtype)
    x = model.embed(batch["tokens"], batch["visual"], pool)
    lengths = batch["lengths"]
    hidden, cache = model.llama.prefill(x, lengths, x.shape[1] + limit)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    first = model.llama.logits(last)[:, 0].argmax(-1)
    answers = jnp.full((x.shape[0], limit), eos, jnp.int32).at[:, 0].set(first)

    def unfinished(carry):
        count, _, _, ended = carry
        return (count < limit) & ~ended.all()

    def extend(carry):
        count, answers, cache, ended = carry
        token = jax.lax.dynamic_slice_in_dim(answers, count - 1, 1, axis=1)
        hidden, cache = model.llama.decode(model.llama.embed(token, dtype), lengths + count - 1, cache)
        token = jnp.where(ended, eos, model.llama.logits(hidden)[:, 0].argmax(-1)).astype(jnp.int32)
        answers = jax.lax.dynamic_update_slice_in_dim(answers, token[:, None], count, axis=1)
        return count + 1, answers, cache, ended | (token == eos)

    _, answers, _, ended = jax.lax.while_loop(unfinished, extend, (1, answers, cache, first == eos))
    return answers, ended


def expected(geometry: Geometry, parameters: Parameters, batch: dict[str, Array], *, parts: tuple[str, ...],
             tree: scorer.Tree, dtype: Any) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """`scorer.expectation` of a batch as `greedy` takes it."""
    model = geometry.bind(parameters)
    x = model.embed(batch["tokens"], batch["visual"], model.encode(batch["images"], parts, dtype=dtype))
    return scorer.expectation(model, tree, x, batch["lengths"], dtype)


class Generator:
    """A model ready to answer. Programs are compiled once per (batch, prompt length bucket, images).

    Args:
      model: its geometry and numerics.
      parameters: path -> array, of `Geometry.of(model)`.
      parts: visual parts its prompts may mention.
      dtype: of the computation.
    """

    def __init__(self, model: config_lib.Model, parameters: Parameters, tokenizer: Tokenizer,
                 parts: tuple[str, ...] = config_lib.PARTS, dtype: Any = jnp.float32):
        self.tokenizer, self.parameters = tokenizer, parameters
        self.layout, self.size, self.longest = Layout.of(model, parts), model.vit.image_size, model.llama.positions
        shared = {"parts": self.layout.parts, "dtype": dtype}
        self._greedy = jax.jit(functools.partial(greedy, Geometry.of(model), eos=tokenizer.eos, **shared),
                               static_argnames="limit")
        self._expected = jax.jit(functools.partial(expected, Geometry.of(model), tree=scorer.Tree.of(tokenizer),
                                                   **shared))

    def answers(self, questions: Sequence[tuple[Sample, int]], pixels: Callable[[int], UInt8[np.ndarray, "H W 3"]], *,
                limit: int = 48, batch: int = 16) -> Iterator[str]:
        """The answer to turn i of each (sample, i), in order; the turns before it are taken as said.

        Args:
          pixels: reads the picture of an `ImageRef.index`.
          limit: most tokens of an answer.
          batch: conversations at a time; the last batch is filled up with copies, which are dropped.

        Raises:
          ConfigError: a prompt and its answer do not fit the model's positions.
        """
        for chunk, wanted in _chunks(questions, batch):
            for ids in self.greedy(self.arrays(chunk, pixels, limit), limit)[:wanted]:
                yield self.tokenizer.decode(ids[ids != self.tokenizer.eos])

    def greedy(self, arrays: dict[str, np.ndarray], limit: int) -> Int[np.ndarray, "B L"]:
        """Ids of the answers to prompts that `arrays` has made; the end-of-sequence id stands behind the shorter."""
        return np.asarray(self._greedy(self.parameters, arrays, limit=limit)[0])

    def scores(self, questions: Sequence[tuple[Sample, int]], pixels: Callable[[int], UInt8[np.ndarray, "H W 3"]], *,
               batch: int = 16) -> Iterator[tuple[float, float]]:
        """Expected score and its standard deviation, both on the scale 1-10, in place of each answer; as `answers`."""
        for chunk, wanted in _chunks(questions, batch):
            mean, spread = jax.device_get(self._expected(self.parameters, self.arrays(chunk, pixels, 4)))
            yield from zip(mean[:wanted].tolist(), spread[:wanted].tolist(), strict=True)

    def arrays(self, questions: Sequence[tuple[Sample, int]], pixels: Callable[[int], UInt8[np.ndarray, "H W 3"]],
               limit: int) -> dict[str, np.ndarray]:
        """The prompts as `greedy` takes them, with room for `limit` more tokens each."""
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
                  "lengths": np.asarray([len(item.tokens) for item in encoded], np.int32)}
        for row, item in enumerate(encoded):
            arrays["tokens"][row, :len(item.tokens)] = item.tokens
            arrays["visual"][row, :len(item.visual)] = item.visual
            for slot, ref in enumerate(item.images):
                arrays["images"][row, slot] = images_lib.render(pixels(ref.index), ref, self.size)
        return arrays


def _chunks(questions: Sequence, size: int) -> Iterator[tuple[list, int]]:
    """`size` questions at a time and how many of them count: the last are filled up with copies."""
    for start in range(0, len(questions), size):
        chunk = list(questions[start:start + size])
        yield chunk + [chunk[-1]] * (size - len(chunk)), len(chunk)
