"""What a model says, or how likely it would say each score, in; a score on the conversation's 1-10 scale out.

Two readers (paper.md's scale; ours but the first): `read_score` reads the decimal out of an answer in words, as the
paper does. `expectation` is the mean of all scores from 1.0 to 10.0 under the model's own probabilities of writing
them: exact, in one pass behind the prompt, and finer than the tenth that a model can say.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from calm_jax.data.tokenizer import Tokenizer
from calm_jax.models.calm import Calm

LOWEST, HIGHEST = 1.0, 10.0
DECIMALS = tuple(f"{tenth / 10:.1f}" for tenth in range(10, 101))  # what a model can say, before the full stop
_DECIMAL = re.compile(r"(?<![\d.])\d{1,2}(?:\.\d+)?(?!\d)")


def read_score(text: str) -> float | None:
    """The first decimal from 1 to 10 in an answer such as "6.5."; None when there is none (a parse failure)."""
    for found in _DECIMAL.findall(text):
        if LOWEST <= float(found) <= HIGHEST:
            return float(found)
    return None


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """The canonical tokenisations of all DECIMALS, with what they share said once.

    Node 0 is the end of the prompt; node n > 0 is a token that follows node `parents[n - 1]`. Last tokens are no nodes.

    Attributes:
      tokens, depths: `[M]` of nodes 1 to M; depth 1 follows the prompt.
      sees: `[M, M]` whether node j + 1 is node i + 1 or one of those before it.
      nodes, labels: `[S, L]` step l of decimal s is token `labels[s, l]` after node `nodes[s, l]`.
      steps: `[S, L]` whether decimal s has a step l.
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
    def of(cls, tokenizer: Tokenizer) -> Tree:
        spelled = [tokenizer.encode(text) for text in DECIMALS]
        numbers: dict[tuple[int, ...], int] = {(): 0}  # beginning of a decimal -> its node
        for ids in spelled:
            for length in range(1, len(ids)):
                numbers.setdefault(ids[:length], len(numbers))
        longest = max(map(len, spelled))
        nodes, labels = np.zeros((2, len(spelled), longest), np.int32)
        steps = np.zeros((len(spelled), longest), bool)
        for row, ids in enumerate(spelled):
            for step, token in enumerate(ids):
                nodes[row, step], labels[row, step], steps[row, step] = numbers[ids[:step]], token, True
        begun = [ids for ids in numbers if ids]
        sees = np.asarray([[a[:len(b)] == b for b in begun] for a in begun])
        return cls(np.asarray([ids[-1] for ids in begun], np.int32), np.asarray([len(ids) for ids in begun], np.int32),
                   sees, nodes, labels, steps, np.asarray([float(text) for text in DECIMALS], np.float32))


def expectation(model: Calm, tree: Tree, x: Float[Array, "B T D"], lengths: Int[Array, "B"],
                dtype: Any) -> tuple[Float[Array, "B"], Float[Array, "B"]]:
    """Mean and standard deviation of the score that follows each prompt, over DECIMALS by their probabilities.

    Args:
      x: embedded prompts, left-aligned, which end where the answer begins.
      lengths: of the prompts, tokens.
    """
    hidden, cache = model.llama.prefill(x, lengths, x.shape[1])
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    words = model.llama.embed(jnp.broadcast_to(tree.tokens, (x.shape[0], len(tree.tokens))), dtype)
    positions = lengths[:, None] + tree.depths - 1
    behind = model.llama.branch(words, positions, lengths, jnp.asarray(tree.sees), cache)
    logits = jax.nn.log_softmax(model.llama.logits(jnp.concatenate([last, behind], 1)))
    chances = jnp.where(tree.steps, logits[:, tree.nodes, tree.labels], 0.0).sum(-1)
    weights = jax.nn.softmax(chances)
    mean = weights @ tree.values
    return mean, jnp.sqrt((weights * jnp.square(tree.values - mean[:, None])).sum(-1))
