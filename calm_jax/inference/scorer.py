"""How likely a model would say each possible score in; a score on the conversation's scale from 1 to 10 out.

Readers of a score: `text` (the decimal that the model says, as in the paper) needs nothing but generation. The four
here are ours: `expectation` is the mean of all decimals from 1.0 to 10.0 under the model's own probabilities of writing
them, `levels` that of the five words from bad to excellent. Both are exact, take one pass behind the prompt, and are
finer than what a model can say. `head` asks the regression head of a model that has one, and `light` the light head,
which reads the visual tokens alone: the language model is not computed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from calm_jax.data import scale
from calm_jax.inference import decoding
from calm_jax.models.parameters import Geometry, Parameters
from calm_jax.text.tokenizers import Tokenizer

# What a reader but `text` weighs against each other: what a model can say -> the score that it means.
SAID: Mapping[str, Mapping[str, float]] = {"expectation": {text: float(text) for text in scale.DECIMALS},
                                           "levels": scale.LEVELS}


@dataclasses.dataclass(frozen=True)
class Score:
    """A score.

    Attributes:
      value: on the scale 1-10; nan when the model said no score.
      spread: standard deviation under the model's own probabilities, in points; nan where the reader has none.
      text: what the model said; empty for readers that let it say nothing.
    """

    value: float
    spread: float = float("nan")
    text: str = ""

    @property
    def parsed(self) -> bool:
        """Whether there is a score."""
        return self.value == self.value

    def on(self, to: tuple[float, float]) -> Score:
        """The same score on another scale (lowest, highest)."""
        lowest, highest = to
        return Score(scale.unmapped(self.value, to),
                     self.spread * (highest - lowest) / (scale.HIGHEST - scale.LOWEST), self.text)


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """The canonical tokenisations of all texts of a reader, with what they share said once.

    Node 0 is the end of the prompt; node n > 0 is a token that follows node `parents[n - 1]`. Last tokens are no nodes.

    Attributes:
      tokens, depths: `[M]` of nodes 1 to M; depth 1 follows the prompt.
      sees: `[M, M]` whether node j + 1 is node i + 1 or one of those before it.
      nodes, labels: `[S, L]` step l of text s is token `labels[s, l]` after node `nodes[s, l]`.
      steps: `[S, L]` whether text s has a step l.
      values: `[S]` the scores.
    """

    tokens: Int[np.ndarray, "M"]
    depths: Int[np.ndarray, "M"]
    sees: Bool[np.ndarray, "M M"]
    nodes: Int[np.ndarray, "S L"]
    labels: Int[np.ndarray, "S L"]
    steps: Bool[np.ndarray, "S L"]
    values: Float[np.ndarray, "S"]

    @classmethod
    def of(cls, tokenizer: Tokenizer, said: Mapping[str, float]) -> Tree:
        spelled = [tokenizer.encode(text) for text in said]
        numbers: dict[tuple[int, ...], int] = {(): 0}  # beginning of a text -> its node
        for ids in spelled:
            for length in range(1, len(ids)):
                numbers.setdefault(ids[:length], len(numbers))
        longest = max(map(len, spelled))
        nodes, labels = np.zeros((2, len(spelled), longest), np.int32)
        steps = np.zeros((len(spelled), longest), bool)
        for row, ids in enumerate(spelled):
            for step, token in enumerate(ids):
                nodes[row, step], labels[row, step], steps[row, step] = numbers[ids[:step]], token, True
        begun = [ids for ids in numbers if ids] or [(spelled[0][0],)]  # one that nothing reads, so that none is empty
        sees = np.asarray([[a[:len(b)] == b for b in begun] for a in begun])
        return cls(np.asarray([ids[-1] for ids in begun], np.int32), np.asarray([len(ids) for ids in begun], np.int32),
                   sees, nodes, labels, steps, np.asarray(list(said.values()), np.float32))


def expectation(geometry: Geometry, parameters: Parameters, batch: dict[str, Array], *, parts: tuple[str, ...],
                tree: Tree, vocab: int, dtype: Any) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Mean and standard deviation of the score that follows each prompt, over the texts of a tree by their
    probabilities.

    Args:
      batch: prompts as `decoding` takes them, which end where the answer begins.
      vocab: tokens that can be said; those with which a vocabulary is padded share no probability.
    """
    count = len(tree.tokens)
    model, last, cache = decoding.prompted(geometry, parameters, batch, parts=parts, room=count, dtype=dtype)
    prompt, lengths = decoding.own_prompt(batch)
    rows, _, width = prompt.shape
    words = model.decoder.embed(jnp.broadcast_to(tree.tokens, (rows, count)), dtype)
    sees = jnp.concatenate([jnp.broadcast_to(prompt, (rows, count, width)),
                            jnp.broadcast_to(tree.sees, (rows, count, count))], -1)
    behind, _ = model.decoder.extend(words, lengths[:, None] + tree.depths - 1, sees, cache, width)
    logits = model.decoder.logits(jnp.concatenate([last, behind], 1))
    logits = jax.nn.log_softmax(decoding.sayable(logits, vocab))
    chances = jnp.where(tree.steps, logits[:, tree.nodes, tree.labels], 0.0).sum(-1)
    weights = jax.nn.softmax(chances)
    mean = weights @ tree.values
    return mean, jnp.sqrt((weights * jnp.square(tree.values - mean[:, None])).sum(-1))


def regression(geometry: Geometry, parameters: Parameters, batch: dict[str, Array], *, parts: tuple[str, ...],
               dtype: Any) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Score and standard deviation by the model's regression head; prompts as in `expectation`."""
    model, last, _ = decoding.prompted(geometry, parameters, batch, parts=parts, room=0, dtype=dtype)
    score, spread = model.score_head(last[:, 0])
    return jnp.clip(score, scale.LOWEST, scale.HIGHEST), spread


def light(geometry: Geometry, parameters: Parameters, batch: dict[str, Array], *, parts: tuple[str, ...],
          dtype: Any) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Score of the first image of each row by the model's light head, which knows no spread (nan)."""
    model = geometry.bind(parameters)
    seen = sum(model.cfg.visual_tokens(part) for part in parts)
    score = model.light_head.score(model.look(batch, parts, dtype=dtype)[:, :seen])
    return jnp.clip(score, scale.LOWEST, scale.HIGHEST), jnp.full_like(score, jnp.nan)
