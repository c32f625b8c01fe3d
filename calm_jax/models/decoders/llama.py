"""Token and visual embeddings in, hidden states or logits out: LLaMA, and what differs from it by an option."""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Key

from calm_jax import config as config_lib
from calm_jax.config import field
from calm_jax.models import layers
from calm_jax.models.attention import attend, attend_cached
from calm_jax.models.decoders import Before, Cache
from calm_jax.models.lora import linears


@dataclasses.dataclass(frozen=True)
class LlamaConfig(config_lib.Decoder):
    """LLaMA and the families that differ from it by options: SmolLM2, TinyLlama, Llama 3, Qwen2, Qwen2.5 and Qwen3.

    The defaults are Vicuna's. `positions` is how long a conversation may be, not what one costs: a program holds rotary
    tables for the positions of the rows or the cache that it is compiled for, be it of a model of 131,072 positions.
    """

    family: str = field("llama", "name of the language model's family", "ours")
    vocab: int = field(32_000, "tokens of the vocabulary", "Vicuna-7B v1.5", least=1)
    width: int = field(4096, "channels of a token", "Vicuna-7B v1.5", least=1)
    depth: int = field(32, "blocks", "Vicuna-7B v1.5", least=1)
    heads: int = field(32, "query heads", "Vicuna-7B v1.5", least=1)
    kv_heads: int = field(32, "key and value heads; fewer than `heads` is grouped-query attention", "Vicuna-7B v1.5",
                          least=1)
    mlp_width: int = field(11_008, "hidden channels of the gated MLP", "Vicuna-7B v1.5", least=1)
    eps: float = field(1e-5, "RMSNorm epsilon", "Vicuna-7B v1.5", above=0)
    rope_theta: float = field(1e4, "rotary base", "Vicuna-7B v1.5", above=0)
    positions: int = field(4096, "longest conversation, tokens", "Vicuna-7B v1.5", least=1)
    tied: bool = field(False, "the head is the embedding: one table for the words that are read and those that are "
                       "said, and no parameter `head`", "Vicuna-7B v1.5; SmolLM2 and small Qwen and Llama 3.2: True")
    head_dim: int = field(0, "channels of an attention head; 0 = width / heads", "Vicuna-7B v1.5; Qwen3: 128", least=0)
    qkv_bias: bool = field(False, "queries, keys and values have biases", "Vicuna-7B v1.5; Qwen2, Qwen2.5: True")
    qk_norm: bool = field(False, "RMSNorm over the channels of each head of queries and keys, before they are rotated",
                          "Vicuna-7B v1.5; Qwen3: True")
    rope_factor: float = field(1.0, "the slowest rotary frequencies are divided by it (the scaling `llama3`); 1 = no "
                               "scaling", "Vicuna-7B v1.5; Llama 3.1: 8, Llama 3.2: 32", least=1)
    rope_low_factor: float = field(1.0, "with rope_factor > 1: slowest are frequencies with at most so many turns in "
                                   "rope_original positions", "Llama 3.1", above=0)
    rope_high_factor: float = field(4.0, "with rope_factor > 1: frequencies with at least so many turns in "
                                    "rope_original positions stay; those between the two are blended", "Llama 3.1",
                                    above=0)
    rope_original: int = field(8192, "with rope_factor > 1: positions of the training before the scaling", "Llama 3.1",
                               least=1)

    @property
    def head_size(self) -> int:
        return self.head_dim or self.width // self.heads

    def wrong(self) -> list[str]:
        checks = (
            (self.head_dim > 0 or self.width % self.heads == 0,
             f"width={self.width} is no multiple of heads={self.heads}, nor is head_dim set"),
            (self.head_size % 2 == 0, f"a head has {self.head_size} channels, an odd number, which rotary positions "
             "cannot turn in pairs"),
            (self.heads % self.kv_heads == 0, f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}"),
            (self.rope_factor == 1 or self.rope_high_factor > self.rope_low_factor,
             f"rope_high_factor={self.rope_high_factor:g} is not above rope_low_factor={self.rope_low_factor:g}"))
        return [message for holds, message in checks if not holds]

    def build(self, rngs: nnx.Rngs) -> Llama:
        return Llama(self, rngs)


CONFIG = LlamaConfig


class Rotary(NamedTuple):
    """Cosines and sines of the angles by which the channels of tokens are turned, for all heads and blocks alike."""

    cos: Float[Array, "B T 1 E"]
    sin: Float[Array, "B T 1 E"]


def frequencies(cfg: LlamaConfig) -> Float[np.ndarray, "E"]:
    """Rotary frequencies, radians a position, float32, the fastest first; E = H / 2.

    With the scaling `llama3`, those that turn at most `rope_low_factor` times in `rope_original` positions are divided
    by `rope_factor`, those that turn at least `rope_high_factor` times stay, and those between are a blend of both.
    """
    half = cfg.head_size // 2
    found = np.float32(cfg.rope_theta) ** (-np.arange(half, dtype=np.float32) / half)
    if cfg.rope_factor == 1:
        return found
    turns = cfg.rope_original * found / (2 * np.pi)
    kept = np.clip((turns - cfg.rope_low_factor) / (cfg.rope_high_factor - cfg.rope_low_factor), 0, 1)
    return (found * (kept + (1 - kept) / cfg.rope_factor)).astype(np.float32)


def rotary(positions: Int[Array, "B T"], cfg: LlamaConfig, length: int) -> Rotary:
    """The angles of tokens at `positions`; E = H / 2.

    Looked up in tables: XLA would compute a cosine anew in every block, head and pass that reads it (a prompt's
    rotation took 5.3 ms so, and takes 0.3).

    Args:
      length: of the row or the cache; all positions are below it, and one that is not gives NaN. Tables of
        `cfg.positions` rows would be constants of every program: 67 MB in Llama 3.2 3B.
    """
    angles = np.arange(length, dtype=np.float32)[:, None] * frequencies(cfg)
    tables = jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
    return Rotary(*(layers.by_rows(table.at[positions].get(mode="fill", fill_value=jnp.nan)[:, :, None])
                    for table in tables))


def rotate(x: Float[Array, "B T N H"], by: Rotary) -> Float[Array, "B T N H"]:
    """Rotary position embedding, half-split layout: channel i is paired with channel i + H / 2 (Hugging Face's)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * by.cos - b * by.sin, b * by.cos + a * by.sin], -1).astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm block: rotary (grouped-query) attention and a SiLU-gated MLP; queries, keys and values may have biases,
    and queries and keys a norm of their own."""

    def __init__(self, cfg: LlamaConfig, rngs: nnx.Rngs):
        self.heads, self.kv_heads = cfg.heads, cfg.kv_heads
        q_width, kv_width = cfg.head_size * cfg.heads, cfg.head_size * cfg.kv_heads
        gain = (2 * cfg.depth) ** -0.5
        self.attention_norm = layers.RMSNorm(cfg.width, cfg.eps)
        self.q = layers.Linear(cfg.width, q_width, bias=cfg.qkv_bias, rngs=rngs)
        self.k = layers.Linear(cfg.width, kv_width, bias=cfg.qkv_bias, rngs=rngs)
        self.v = layers.Linear(cfg.width, kv_width, bias=cfg.qkv_bias, rngs=rngs)
        self.q_norm = layers.RMSNorm(cfg.head_size, cfg.eps, whole=False) if cfg.qk_norm else None
        self.k_norm = layers.RMSNorm(cfg.head_size, cfg.eps, whole=False) if cfg.qk_norm else None
        self.o = layers.Linear(q_width, cfg.width, bias=False, rngs=rngs, gain=gain)
        self.mlp_norm = layers.RMSNorm(cfg.width, cfg.eps)
        self.gate = layers.Linear(cfg.width, cfg.mlp_width, bias=False, rngs=rngs)
        self.up = layers.Linear(cfg.width, cfg.mlp_width, bias=False, rngs=rngs)
        self.down = layers.Linear(cfg.mlp_width, cfg.width, bias=False, rngs=rngs, gain=gain)

    def queries(self, y, by, key=None):
        """Rotated queries `[B, T, N, H]` of the normed input."""
        q = rearrange(self.q(y, key), "b t (n h) -> b t n h", n=self.heads)
        return rotate(q if self.q_norm is None else self.q_norm(q), by)

    def keys_values(self, y, by, keys=(None, None)):
        """Rotated keys and values `[B, T, K, H]` of the normed input."""
        k, v = (rearrange(linear(y, key), "b t (n h) -> b t n h", n=self.kv_heads)
                for linear, key in zip((self.k, self.v), keys, strict=True))
        return rotate(k if self.k_norm is None else self.k_norm(k), by), v

    def finish(self, x, mixed, keys=(None,) * 4):
        """Adds the attention output and the MLP to the residual stream."""
        x = x + self.o(rearrange(mixed, "b t n h -> b t (n h)"), keys[0])
        y = self.mlp_norm(x)
        return x + self.down(jax.nn.silu(self.gate(y, keys[1])) * self.up(y, keys[2]), keys[3])

    def __call__(self, x: Float[Array, "B T D"], by: Rotary, segments: Int[Array, "B T"],
                 key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        keys = [None] * 7 if key is None else jax.random.split(key, 7)
        y = self.attention_norm(x)
        q, (k, v) = self.queries(y, by, keys[0]), self.keys_values(y, by, keys[1:3])
        return self.finish(x, attend(q, k, v, causal=True, q_segments=segments, kv_segments=segments), keys[3:])


class Llama(nnx.Module):
    """Embedding table `[V, D]`, blocks, final norm, and a head `[D, V]` unless the embedding is it (`cfg.tied`)."""

    def __init__(self, cfg: LlamaConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        # Unit variance (ours), as the other layers' outputs: a word must not drown in what attention adds to it. A tied
        # one has the variance of a head's kernel instead: logits of unit variance matter more, and norms scale words.
        scale = cfg.width ** -0.5 if cfg.tied else 1.0
        self.embedding = nnx.Param(nnx.initializers.normal(scale)(rngs.params(), (cfg.vocab, cfg.width)))
        self.blocks = layers.stack(lambda rngs: Block(cfg, rngs), cfg.depth, rngs)
        self.norm = layers.RMSNorm(cfg.width, cfg.eps)
        self.head = None if cfg.tied else layers.Linear(cfg.width, cfg.vocab, bias=False, rngs=rngs)

    def unroll(self, *, transposed: bool) -> None:
        """From here on `blocks` is a list of blocks that share nothing: `prefill` and `extend` slice no weights.

        Args:
          transposed: and all kernels are, which is for CPUs; a tied embedding is stored `[V, D]` in any case.
        """
        self.blocks = nnx.List([layers.unstack(self.blocks, index) for index in range(self.cfg.depth)])
        if transposed:
            for linear in linears(self).values():
                linear.transpose()

    def embed(self, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        return layers.by_rows(self._table(dtype)[tokens])

    def _table(self, dtype: Any) -> Float[Array, "V D"]:
        return layers.by_vocabulary(self.embedding[...].astype(dtype))

    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"], *,
                 remat: str = "none", key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        """Hidden states after the final norm. Attention is causal and stays inside a segment (0 = padding).

        Args:
          positions: of each token in its own conversation, which the row holds in full: all are below T.
        """
        keys = None if key is None else jax.random.split(key, self.cfg.depth)
        by = rotary(positions, self.cfg, x.shape[1])
        x = layers.scan(self.blocks, x, lambda block, x, key: block(x, by, segments, key),
                        remat=remat, keys=keys)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "B K D"]) -> Float[Array, "B K V"]:
        """float32 logits; give only the positions where something is asked.

        A tied embedding is read as it is stored, without a copy `[D, V]`. SmolLM2-135M's has 113 MB of the model's 538;
        on two cores of a Xeon, one token takes 8.6 ms (6.7 with a copy), eight take 18 (23), sixteen 23 (26).
        """
        if self.head is not None:
            return self.head(hidden).astype(jnp.float32)
        logits = layers.times_transposed(hidden, self._table(hidden.dtype))
        return layers.by_rows(logits, whole=False).astype(jnp.float32)

    def prefill(self, x: Float[Array, "B T D"], lengths: Int[Array, "B"], room: int,
                before: Before | None = None) -> tuple[Float[Array, "B 1 D"], Cache]:
        """The hidden state of the last token of each left-aligned prompt, and the prompts' cache with `room` free slots
        behind its last.

        Args:
          before: the beginning that all prompts have in common; its P slots come first in the cache: P + T + room.
        """
        batch, length = x.shape[:2]
        places = jnp.broadcast_to(jnp.arange(length), (batch, length))
        segments = seen = (places < lengths[:, None]).astype(jnp.int32)
        positions, slots = places, 0
        if before is not None:
            slots, positions = before.cache[0][0].shape[2], before.length + places
            known = jnp.broadcast_to((jnp.arange(slots) < before.length).astype(jnp.int32), (batch, slots))
            seen = jnp.concatenate([known, segments], 1)
        by = rotary(positions, self.cfg, slots + length)
        cache: Cache = []
        for index in range(self.cfg.depth):
            block = layers.unstack(self.blocks, index)
            y = block.attention_norm(x)
            k, v = block.keys_values(y, by)
            if before is not None:
                k, v = (jnp.concatenate([jnp.broadcast_to(rearrange(old, "1 k p h -> 1 p k h"),
                                                          (batch, slots, *new.shape[2:])), new], 1)
                        for old, new in zip(before.cache[index], (k, v), strict=True))
            slotted = [rearrange(new, "b s k h -> b k s h") for new in (k, v)]
            if index < self.cfg.depth - 1:
                q = block.queries(y, by)
                mixed = attend(q, k, v, causal=True, q_segments=segments, kv_segments=seen, behind=slots)
            else:  # nothing but the last token's hidden state is read behind the last block
                x, y, *by = (jnp.take_along_axis(each, (lengths - 1).reshape(-1, *[1] * (each.ndim - 1)), 1)
                             for each in (x, y, *by))
                mixed = attend_cached(block.queries(y, Rotary(*by)), *slotted, seen[:, None] > 0)
            x = block.finish(x, mixed)
            cache.append(tuple(jnp.pad(new, ((0, 0), (0, 0), (0, room), (0, 0))) for new in slotted))
        return self.norm(x), cache

    def extend(self, x: Float[Array, "B M D"], positions: Int[Array, "B M"], sees: Bool[Array, "B M S"], cache: Cache,
               slot: int | Int[Array, ""]) -> tuple[Array, Cache]:
        """M more tokens a row into slots `slot` to `slot + M` of the cache, whatever they continue.

        Blocks are unrolled: each owns its keys and values, which a loop updates in place. A slot is the same for all
        rows, although their prompts differ in length: `positions` says where in its text a token stands.

        Args:
          positions: below the S slots of the cache, for each of a token's predecessors has one.
          sees: the slots that each token looks at, its own among them.

        Returns:
          Hidden states `[B, M, D]` and the new cache.
        """
        by = rotary(positions, self.cfg, cache[0][0].shape[2])
        updated: Cache = []
        for index in range(self.cfg.depth):
            block = layers.unstack(self.blocks, index)
            y = block.attention_norm(x)
            q, new = block.queries(y, by), block.keys_values(y, by)
            k, v = (jax.lax.dynamic_update_slice_in_dim(old, rearrange(y, "b m k h -> b k m h"), slot, axis=2)
                    for old, y in zip(cache[index], new, strict=True))
            x = block.finish(x, attend_cached(q, k, v, sees))
            updated.append((k, v))
        return self.norm(x), updated
