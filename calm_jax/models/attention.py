"""Queries, keys and values in, mixed values out: the one place where an attention algorithm is chosen."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, Int

from calm_jax.models import layers

TILE = 128  # queries a tile: the widest score array is [B, N, TILE, S]


def attend(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], *, causal: bool = False,
           q_segments: Int[Array, "B T"] | None = None,
           kv_segments: Int[Array, "B S"] | None = None) -> Float[Array, "B T N H"]:
    """Softmax attention scaled by H ** -0.5; scores and softmax in float32, the result in the dtype of q.

    Args:
      q: N query heads.
      k, v: K key and value heads, K a divisor of N (grouped-query attention: head n reads key head n // (N / K)).
      causal: query t sees keys 0..t; needs T == S.
      q_segments, kv_segments: a query sees only the keys of its own segment. Queries of a segment without keys
        (padding) get the mean of what they may not see, which nothing reads.
    """
    length, groups = q.shape[1], q.shape[2] // k.shape[2]
    q = rearrange(q, "b t (k g) h -> b t k g h", g=groups)
    out = []
    step = TILE if causal else length
    for start in range(0, length, step):
        stop = min(start + step, length)
        seen = stop if causal else k.shape[1]
        mask = None
        if causal:
            mask = (jnp.arange(start, stop)[:, None] >= jnp.arange(seen))[None]
        if q_segments is not None:
            same = q_segments[:, start:stop, None] == kv_segments[:, None, :seen]
            mask = same if mask is None else mask & same
        out.append(_tile(q[:, start:stop], k[:, :seen], v[:, :seen], mask))
    return rearrange(jnp.concatenate(out, 1), "b t k g h -> b t (k g) h")


def _tile(q, k, v, mask):
    scores = jnp.einsum("btkgh,bskh->bkgts", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    if mask is not None:
        scores = jnp.where(mask[:, None, None], scores, -1e30)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgts,bskh->btkgh", weights, v)


class Attention(nnx.Module):
    """Multi-head attention with biases; keys and values may come from another, `kv_width` wide, sequence."""

    def __init__(self, width: int, heads: int, rngs: nnx.Rngs, kv_width: int | None = None):
        self.heads = heads
        self.q = layers.Linear(width, width, bias=True, rngs=rngs)
        self.k = layers.Linear(kv_width or width, width, bias=True, rngs=rngs)
        self.v = layers.Linear(kv_width or width, width, bias=True, rngs=rngs)
        self.o = layers.Linear(width, width, bias=True, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"], context: Float[Array, "B S E"] | None = None) -> Float[Array, "B T D"]:
        context = x if context is None else context
        q, k, v = (rearrange(y, "b t (n h) -> b t n h", n=self.heads)
                   for y in (self.q(x), self.k(context), self.v(context)))
        return self.o(rearrange(attend(q, k, v), "b t n h -> b t (n h)"))
