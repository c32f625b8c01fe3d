"""Conversations that end with a question in, answers out: prefill and greedy decoding with a cache, in one program."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, UInt8

from calm_jax import config as config_lib
from calm_jax.data import images as images_lib
from calm_jax.data.prompts import Layout, encode
from calm_jax.data.samples import Sample
from calm_jax.data.tokenizer import Tokenizer
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
        self._run = jax.jit(functools.partial(greedy, Geometry.of(model), parts=self.layout.parts, eos=tokenizer.eos,
                                              dtype=dtype), static_argnames="limit")

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
        for start in range(0, len(questions), batch):
            chunk = list(questions[start:start + batch])
            texts = self._answer(chunk + [chunk[-1]] * (batch - len(chunk)), pixels, limit)
            yield from texts[:len(chunk)]

    def _answer(self, questions, pixels, limit: int) -> list[str]:
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
        ids, _ = self._run(self.parameters, arrays, limit=limit)
        return [self.tokenizer.decode(row[row != self.tokenizer.eos]) for row in np.asarray(ids)]
