"""Token and visual embeddings in, hidden states or logits out: the LLaMA / Vicuna port."""

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
    """LLaMA and Vicuna."""

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

    def wrong(self) -> list[str]:
        checks = (
            (self.width % self.heads == 0, f"width={self.width} is no multiple of heads={self.heads}"),
            (self.heads % self.kv_heads == 0, f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}"))
        return [message for holds, message in checks if not holds]

    def build(self, rngs: nnx.Rngs) -> Llama:
        return Llama(self, rngs)


CONFIG = LlamaConfig


class Rotary(NamedTuple):
    """Cosines and sines of the angles by which the channels of tokens are turned, for all heads and blocks alike."""

    cos: Float[Array, "B T 1 E"]
    sin: Float[Array, "B T 1 E"]


def rotary(positions: Int[Array, "B T"], cfg: LlamaConfig) -> Rotary:
    """The angles of tokens at `positions` below `cfg.positions`; E = H / 2.

    Looked up in tables: XLA would compute a cosine anew in every block, head and pass that reads it (a prompt's
    rotation took 5.3 ms so, and takes 0.3).
    """
    half = cfg.width // cfg.heads // 2
    frequencies = np.float32(cfg.rope_theta) ** (-np.arange(half, dtype=np.float32) / half)
    angles = np.arange(cfg.positions, dtype=np.float32)[:, None] * frequencies
    tables = jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))
    return Rotary(*(layers.by_rows(table[positions][:, :, None]) for table in tables))


def rotate(x: Float[Array, "B T N H"], by: Rotary) -> Float[Array, "B T N H"]:
    """Rotary position embedding, half-split layout: channel i is paired with channel i + H / 2 (Hugging Face's)."""
    a, b = jnp.split(x.astype(jnp.float32), 2, -1)
    return jnp.concatenate([a * by.cos - b * by.sin, b * by.cos + a * by.sin], -1).astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm block: rotary (grouped-query) attention and a SiLU-gated MLP, no biases."""

    def __init__(self, cfg: LlamaConfig, rngs: nnx.Rngs):
        self.heads, self.kv_heads = cfg.heads, cfg.kv_heads
        kv_width = cfg.width // cfg.heads * cfg.kv_heads
        gain = (2 * cfg.depth) ** -0.5
        self.attention_norm = layers.RMSNorm(cfg.width, cfg.eps)
        self.q = layers.Linear(cfg.width, cfg.width, bias=False, rngs=rngs)
        self.k = layers.Linear(cfg.width, kv_width, bias=False, rngs=rngs)
        self.v = layers.Linear(cfg.width, kv_width, bias=False, rngs=rngs)
        self.o = layers.Linear(cfg.width, cfg.width, bias=False, rngs=rngs, gain=gain)
        self.mlp_norm = layers.RMSNorm(cfg.width, cfg.eps)
        self.gate = layers.Linear(cfg.width, cfg.mlp_width, bias=False, rngs=rngs)
        self.up = layers.Linear(cfg.width, cfg.mlp_width, bias=False, rngs=rngs)
        self.down = layers.Linear(cfg.mlp_width, cfg.width, bias=False, rngs=rngs, gain=gain)

    def queries(self, y, by, key=None):
        """Rotated queries `[B, T, N, H]` of the normed input."""
        return rotate(rearrange(self.q(y, key), "b t (n h) -> b t n h", n=self.heads), by)

    def keys_values(self, y, by, keys=(None, None)):
        """Rotated keys and values `[B, T, K, H]` of the normed input."""
        k, v = (rearrange(linear(y, key), "b t (n h) -> b t n h", n=self.kv_heads)
                for linear, key in zip((self.k, self.v), keys, strict=True))
        return rotate(k, by), v

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
    """Embedding table `[V, D]`, blocks, final norm, untied head `[D, V]`."""

    def __init__(self, cfg: LlamaConfig, rngs: nnx.Rngs):
        self.cfg = cfg
        # Unit variance (ours), as the other layers' outputs: a word must not drown in what attention adds to it.
        self.embedding = nnx.Param(nnx.initializers.normal(1.0)(rngs.params(), (cfg.vocab, cfg.width)))
        self.blocks = layers.stack(lambda rngs: Block(cfg, rngs), cfg.depth, rngs)
        self.norm = layers.RMSNorm(cfg.width, cfg.eps)
        self.head = layers.Linear(cfg.width, cfg.vocab, bias=False, rngs=rngs)

    def unroll(self, *, transposed: bool) -> None:
        """From here on `blocks` is a list of blocks that share nothing: `prefill` and `extend` slice no weights.

        Args:
          transposed: and all kernels are, which is for CPUs.
        """
        self.blocks = nnx.List([layers.unstack(self.blocks, index) for index in range(self.cfg.depth)])
        if transposed:
            for linear in linears(self).values():
                linear.transpose()

    def embed(self, tokens: Int[Array, "B T"], dtype: Any) -> Float[Array, "B T D"]:
        return layers.by_rows(layers.by_vocabulary(self.embedding[...].astype(dtype))[tokens])

    def __call__(self, x: Float[Array, "B T D"], positions: Int[Array, "B T"], segments: Int[Array, "B T"], *,
                 remat: str = "none", key: Key[Array, ""] | None = None) -> Float[Array, "B T D"]:
        """Hidden states after the final norm. Attention is causal and stays inside a segment (0 = padding)."""
        keys = None if key is None else jax.random.split(key, self.cfg.depth)
        by = rotary(positions, self.cfg)
        x = layers.scan(self.blocks, x, lambda block, x, key: block(x, by, segments, key),
                        remat=remat, keys=keys)
        return self.norm(x)

    def logits(self, hidden: Float[Array, "B K D"]) -> Float[Array, "B K V"]:
        """float32 logits; give only the positions where something is asked."""
        return self.head(hidden).astype(jnp.float32)

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
        by = rotary(positions, self.cfg)
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
          sees: the slots that each token looks at, its own among them.

        Returns:
          Hidden states `[B, M, D]` and the new cache.
        """
        by = rotary(positions, self.cfg)
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
