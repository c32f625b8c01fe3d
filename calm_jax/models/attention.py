"""Queries, keys and values in, mixed values out: the one place where an attention algorithm is chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from calm_jax.models import layers

TILE = 256  # queries a tile at most: the widest array of scores is [B, N, TILE, S]
LANES = 128  # kernels take rows of a multiple of this
CHUNKS = 4  # causal: queries of a chunk read the same keys; 4 compute 5/8 of the square, 8 would 9/16


def attend(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], *, causal: bool = False,
           q_segments: Int[Array, "B T"] | None = None, kv_segments: Int[Array, "B S"] | None = None,
           behind: int = 0) -> Float[Array, "B T N H"]:
    """Softmax attention scaled by H ** -0.5; scores and softmax in float32, the result in the dtype of q.

    Args:
      q: N query heads.
      k, v: K key and value heads, K a divisor of N (grouped-query attention: head n reads key head n // (N / K)).
      causal: query t sees keys 0..behind + t; needs T + behind == S.
      behind: so many keys come before that of the first query.
      q_segments, kv_segments: a query sees only the keys of its own segment. Queries of a segment without keys
        (padding) get the mean of what they may not see, which nothing reads.

    Packed rows go to a kernel of the platform where there is one, which never holds the scores, if rows and heads
    divide among the devices; everything else, and every CPU, to `tiled`.
    """
    kernel = KERNELS.get(layers.platform())
    packed = causal and not behind and q_segments is not None and q_segments is kv_segments and not q.shape[1] % LANES
    divides = not q.shape[0] % (_split("data") * _split("fsdp")) and not k.shape[2] % _split("tensor")
    if kernel is None or not packed or not divides:
        return tiled(q, k, v, q_segments, kv_segments, causal=causal, behind=behind)
    return _on_each_device(kernel, q, k, v, q_segments)


def _split(axis: str) -> int:
    """Devices along an axis of the mesh in use."""
    return dict(jax.sharding.get_abstract_mesh().shape).get(axis, 1)


def _on_each_device(kernel: Callable[..., Array], q, k, v, segments):
    """A kernel sees the rows and heads of its device alone: XLA does not know how to split it."""
    mesh = jax.sharding.get_abstract_mesh()
    if "fsdp" not in mesh.axis_names:
        return kernel(q, k, v, segments)
    heads, row = P(("data", "fsdp"), None, "tensor", None), P(("data", "fsdp"), None)
    return jax.shard_map(kernel, mesh=mesh, in_specs=(heads, heads, heads, row), out_specs=heads, check_vma=False)(
        q, k, v, segments)


def splash(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"],
           segments: Int[Array, "B T"], *, interpret: bool = False) -> Float[Array, "B T N H"]:
    """Causal `attend` inside segments by JAX's splash kernel for TPUs, which skips the blocks above the diagonal.

    Args:
      interpret: run it on any platform, slowly; for tests.
    """
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
    from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks
    length, heads = q.shape[1:3]
    block = next(size for size in (512, 256, LANES) if length % size == 0)
    sizes = kernels.BlockSizes(**dict.fromkeys((
        "block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute", "block_q_dq",
        "block_kv_dq"), block))
    mask = masks.MultiHeadMask([masks.CausalMask((length, length))] * heads)
    kernel = kernels.make_splash_mha(mask, head_shards=1, q_seq_shards=1, block_sizes=sizes, interpret=interpret)
    q, k, v = (rearrange(x, "b t n h -> b n t h") for x in (q * q.shape[-1] ** -0.5, k, v))
    mixed = jax.vmap(kernel)(q, k, v, kernels.SegmentIds(segments, segments))
    return rearrange(mixed, "b n t h -> b t n h").astype(q.dtype)


def flash(q: Float[Array, "B T N H"], k: Float[Array, "B T K H"], v: Float[Array, "B T K H"],
          segments: Int[Array, "B T"], *, interpret: bool = False) -> Float[Array, "B T N H"]:
    """Causal `attend` inside segments by JAX's Pallas kernel for GPUs, after FlashAttention-2; else as `splash`."""
    from jax.experimental.pallas.ops.gpu import attention as kernels
    block = 64 if q.shape[-1] > 64 else LANES
    sizes = kernels.BlockSizes(**dict.fromkeys((
        "block_q", "block_k", "block_q_dkv", "block_kv_dkv", "block_q_dq", "block_kv_dq"), block))
    k, v = (repeat(x, "b t k h -> b t (k g) h", g=q.shape[2] // x.shape[2]) for x in (k, v))
    # On an H200 four warps and three stages were the fastest of eight ways: 0.49 ms, and 0.79 for the kernel's own
    # choice (4 rows of 2048 tokens). Wider numbers would not fit the shared memory of an A100 so.
    tuned = {"num_warps": 4, "num_stages": 3} if q.dtype.itemsize == 2 else {}
    return kernels.mha(q, k, v, segments, sm_scale=q.shape[-1] ** -0.5, causal=True, block_sizes=sizes,
                       interpret=interpret, **tuned)


KERNELS: Mapping[str, Callable[..., Array]] = {"tpu": splash, "gpu": flash}


def attend_cached(q: Float[Array, "B M N H"], k: Float[Array, "B K S H"], v: Float[Array, "B K S H"],
                  mask: Bool[Array, "B M S"]) -> Float[Array, "B M N H"]:
    """`attend` of a few queries that look at any slots of a cache, whose heads already come first."""
    q = rearrange(q, "b m (k g) h -> b k g m h", k=k.shape[1])
    return rearrange(_weighed(q, k, v, mask), "b k g m h -> b m (k g) h")


def tiled(q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"],
          q_segments: Int[Array, "B T"] | None, kv_segments: Int[Array, "B S"] | None, *,
          causal: bool, behind: int = 0) -> Float[Array, "B T N H"]:
    """`attend` in plain XLA, for any backend: one tile of queries at a time against the keys it may see.

    Up to TILE queries (pictures, Q-Formers, decoding) are one tile, whose weights `[B, N, T, S]` are kept for the
    backward pass. More are several tiles, recomputed there: kept are q, k and v, and memory is linear in T. Causal
    queries form up to CHUNKS chunks; the tiles of a chunk see the keys up to its end, and are a loop because XLA
    CPU orders unrolled tiles for concurrency and then holds the scores of all of them at once.
    """
    length, seen = q.shape[1], k.shape[1]
    q, k, v = _heads_first(q, k, v)
    if length <= TILE:
        return rearrange(_tile(q, k, v, q_segments, kv_segments, behind, causal), "b k g t h -> b t (k g) h")
    span = -(-length // min(CHUNKS, -(-length // TILE))) if causal else length
    out = []
    for start in range(0, length, span):
        stop = min(start + span, length)
        seen = behind + stop if causal else seen
        ids = (None, None) if q_segments is None else (q_segments[:, start:stop], kv_segments[:, :seen])
        out.append(_chunk(q[:, :, :, start:stop], k[:, :, :seen], v[:, :, :seen], *ids, behind + start, causal))
    return rearrange(jnp.concatenate(out, 3), "b k g t h -> b t (k g) h")


def _heads_first(q, k, v):
    """q `[B, K, G, T, H]`, k and v `[B, K, S, H]`: heads become a batch dimension of every product; B and K stay two
    dimensions, each sharded on its own mesh axis."""
    return (rearrange(q, "b t (k g) h -> b k g t h", k=k.shape[2]),
            *(rearrange(x, "b s k h -> b k s h") for x in (k, v)))


def _chunk(q, k, v, q_segments, kv_segments, start, causal):
    """Queries q `[B, K, G, T, H]`, the first at position `start`, tile after tile against k, v `[B, K, S, H]`."""
    length = q.shape[3]
    count = -(-length // TILE)
    size = -(-length // count)  # equal tiles: 577 queries are three of 193, the last with two rows of padding
    room = count * size - length
    tiles = rearrange(jnp.pad(q, ((0, 0),) * 3 + ((0, room), (0, 0))), "b k g (c t) h -> c b k g t h", c=count)
    if q_segments is not None:
        q_segments = rearrange(jnp.pad(q_segments, ((0, 0), (0, room))), "b (c t) -> c b t", c=count)

    @jax.checkpoint
    def body(start, tile):
        # Tied to the queries, masks belong to a block: JAX would make those of all tiles, [T, T], once for all blocks.
        queries, segments, first = jax.lax.optimization_barrier((*tile, start))
        return start + size, _tile(queries, k, v, segments, kv_segments, first, causal)

    out = jax.lax.scan(body, jnp.int32(start), (tiles, q_segments))[1]
    return rearrange(out, "c b k g t h -> b k g (c t) h")[:, :, :, :length]


def _tile(q, k, v, q_segments, kv_segments, start, causal):
    """Queries q `[B, K, G, t, H]`, the first at position `start`, against all of k, v `[B, K, S, H]` at once."""
    mask = None
    if causal:
        mask = (start + jnp.arange(q.shape[3])[:, None] >= jnp.arange(k.shape[2]))[None]
    if q_segments is not None:
        same = q_segments[:, :, None] == kv_segments[:, None, :]
        mask = same if mask is None else mask & same
    return _weighed(q, k, v, mask)


def _weighed(q, k, v, mask):
    """The means of v under the softmax of the scores where `mask` `[B or 1, t, S]`, if any, holds."""
    scores = jnp.einsum("bkgth,bksh->bkgts", q, k, preferred_element_type=jnp.float32)
    if layers.platform() == "cpu":
        scores = layers.kept_apart(scores)
    scores = scores * q.shape[-1] ** -0.5
    if mask is not None:
        # The barrier keeps the bias [B, t, S] an array: fused, XLA compares again for every head and every pass.
        bias = jax.lax.optimization_barrier(jnp.where(mask, 0.0, -1e30).astype(jnp.float32))
        scores = scores + bias[:, None, None]
    weights = jnp.exp(scores - jax.lax.stop_gradient(scores.max(-1, keepdims=True)))
    # Divided after the product: H columns instead of S.
    mixed = jnp.einsum("bkgts,bksh->bkgth", weights.astype(v.dtype), v, preferred_element_type=jnp.float32)
    return (mixed / weights.sum(-1, keepdims=True)).astype(q.dtype)


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
