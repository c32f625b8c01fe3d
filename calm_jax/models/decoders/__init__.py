"""Language models, one family a file. A family is found by the name of its file (`registry.DECODERS`).

To add one: a file here with a config, a subclass of `config.Decoder` assigned to CONFIG, whose `build` makes a module
with the methods of `Decoder`. Parameters named as in the other families need no sharding rule of their own.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from jaxtyping import Array, Bool, Float, Int, Key

Cache = list[tuple[Array, Array]]  # a layer's keys and values, each [B, K, S, H]: S slots


class Before(NamedTuple):
    """A beginning that prompts have in common: its cache, of one row and P slots, of which `length` are in use."""

    cache: Cache
    length: Int[Array, ""]


class Decoder(Protocol):
    """A language model: an `nnx.Module` with these methods, and `blocks`, a stack made by `models.layers.stack`."""

    def embed(self, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        """Word embeddings."""
        ...

    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"], *,
                 remat: str = "none", key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        """Hidden states after the final norm. Attention is causal and stays inside a segment (0 = padding).

        Args:
          positions: of each token in its own conversation, which a row holds in full: below T.
          remat: what a block keeps for its backward pass (`config.Model.remat`).
          key: of dropout; None = none.
        """
        ...

    def logits(self, hidden: Float[Array, "B K D"]) -> Float[Array, "B K V"]:
        """float32 logits of the next token."""
        ...

    def unroll(self, *, transposed: bool) -> None:
        """From here on `blocks` is a list, so that `prefill` and `extend` slice no weights.

        Args:
          transposed: kernels are stored `[O, I]`, which is for CPUs.
        """
        ...

    def prefill(self, x: Float[Array, "B T D"], lengths: Int[Array, "B"], room: int,
                before: Before | None = None) -> tuple[Float[Array, "B 1 D"], Cache]:
        """The hidden state of the last token of each left-aligned prompt, and the prompts' cache with `room` free slots
        after its last.

        Args:
          before: the beginning that all prompts have in common; its P slots come first in the cache: P + T + room.
        """
        ...

    def extend(self, x: Float[Array, "B M D"], positions: Int[Array, "B M"], sees: Bool[Array, "B M S"], cache: Cache,
               slot: int | Int[Array, ""]) -> tuple[Float[Array, "B M D"], Cache]:
        """M more tokens a row into slots `slot` to `slot + M` of the cache; returns their hidden states and the cache.

        Args:
          positions: of each token in its own conversation, below S: all tokens before it are in the cache.
          sees: the slots that each token looks at, its own among them.
        """
        ...
