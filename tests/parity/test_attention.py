"""`attend` against float64 numpy: grouped heads, masks, tiles, gradients, transformations, sharding, memory."""

from __future__ import annotations

import functools
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest
from flax import nnx

from calm_jax import config as config_lib
from calm_jax.models import attention
from calm_jax.models.attention import attend
from calm_jax.models.decoders.llama import Llama

TILE = 32


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "TILE", TILE)


def reference(q, k, v, do, *, causal=False, q_segments=None, kv_segments=None):
    """Output and gradients (dq, dk, dv) for cotangent do, in float64 numpy; q `[B, T, N, H]`, k, v `[B, S, K, H]`."""
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    groups = q.shape[2] // k.shape[2]
    wide_k, wide_v = np.repeat(k, groups, 2), np.repeat(v, groups, 2)
    scale = q.shape[-1] ** -0.5
    scores = np.einsum("btnh,bsnh->bnts", q, wide_k) * scale
    if causal:
        scores = np.where(np.tri(q.shape[1], k.shape[1], dtype=bool), scores, -np.inf)
    if q_segments is not None:
        same = np.asarray(q_segments)[:, None, :, None] == np.asarray(kv_segments)[:, None, None]
        scores = np.where(same, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bnts,bsnh->btnh", weights, wide_v)
    d_weights = np.einsum("btnh,bsnh->bnts", do, wide_v)
    d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdims=True)) * scale
    fold = lambda x: x.reshape(*k.shape[:3], groups, -1).sum(3)  # noqa: E731
    return (out, np.einsum("bnts,bsnh->btnh", d_scores, wide_k), fold(np.einsum("bnts,btnh->bsnh", d_scores, q)),
            fold(np.einsum("bnts,btnh->bsnh", weights, do)))


def ours(q, k, v, do, **options):
    @jax.jit
    def run(q, k, v, do):
        out, pull = jax.vjp(lambda q, k, v: attend(q, k, v, **options), q, k, v)
        return out, *pull(do)

    return run(q, k, v, do)


def inputs(batch, queries, keys, heads, kv_heads, width, dtype=jnp.float32):
    shapes = [(batch, queries, heads, width), *[(batch, keys, kv_heads, width)] * 2, (batch, queries, heads, width)]
    return [jax.random.normal(key, shape).astype(dtype)
            for key, shape in zip(jax.random.split(jax.random.key(0), 4), shapes, strict=True)]


def segments(batch, length):
    """Rows of three segments, cut at different places; the last one is padding (0)."""
    cuts = np.stack([np.linspace(0, length, 4)[1:3].astype(int) + row for row in range(batch)])
    positions = np.arange(length)
    ids = np.where(positions < cuts[:, :1], 1, np.where(positions < cuts[:, 1:], 2, 0))
    return jnp.asarray(ids, jnp.int32)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(("length", "heads", "kv_heads"), [
    (TILE, 2, 1), (TILE + 1, 4, 4), (203, 6, 2)])  # one tile; two chunks of one; four chunks of two, the last padded
def test_self_attention_and_gradients(length, heads, kv_heads, causal, packed):
    args = inputs(2, length, length, heads, kv_heads, 16)
    ids = segments(2, length) if packed else None
    options = {"causal": causal, "q_segments": ids, "kv_segments": ids}
    for got, want in zip(ours(*args, **options), reference(*args, **options), strict=True):
        np.testing.assert_allclose(got, want, atol=2e-5)


@pytest.mark.parametrize(("queries", "keys"), [(1, 300), (16, 197), (2 * TILE + 9, 50)])
def test_cross_attention_and_decoding(queries, keys):
    args = inputs(3, queries, keys, 4, 2, 8)
    seen = jnp.asarray(np.arange(keys) <= np.array([[4], [20], [keys]]), jnp.int32)
    for options in ({}, {"q_segments": jnp.ones((3, queries), jnp.int32), "kv_segments": seen}):
        for got, want in zip(ours(*args, **options), reference(*args, **options), strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)


def test_large_scores_do_not_overflow():
    q, k, v, do = inputs(1, TILE + 3, TILE + 3, 2, 2, 8)
    args = (q * 100, k * 100, v, do)
    for got, want in zip(ours(*args, causal=True), reference(*args, causal=True), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-2)


def test_bfloat16():
    args = inputs(2, 201, 201, 4, 2, 32, jnp.bfloat16)
    ids = segments(2, 201)
    options = {"causal": True, "q_segments": ids, "kv_segments": ids}
    for got, want in zip(ours(*args, **options), reference(*args, **options), strict=True):
        assert got.dtype == jnp.bfloat16
        error = np.abs(np.asarray(got, np.float64) - want)
        # bfloat16 has 8 bits: half a unit in the last place is 0.4 %, and a few such steps follow one another.
        assert error.max() < 0.03 * np.abs(want).max()
        assert error.mean() < 0.004 * np.abs(want).max()


def test_vmap_scan_and_remat_agree_with_a_loop():
    args = [jnp.stack([x, x + 0.5, x * 2]) for x in inputs(2, 150, 150, 2, 2, 8)]
    ids = segments(2, 150)
    run = lambda q, k, v, do: ours(q, k, v, do, causal=True, q_segments=ids, kv_segments=ids)  # noqa: E731
    wanted = [jnp.stack(x) for x in zip(*[run(*level) for level in zip(*args, strict=True)], strict=True)]

    def scanned(q, k, v, do):
        body = jax.checkpoint(lambda carry, x: (carry, attend(*x, causal=True, q_segments=ids, kv_segments=ids)),
                              prevent_cse=False)
        out, pull = jax.vjp(lambda *x: jax.lax.scan(body, 0, x)[1], q, k, v)
        return out, *pull(do)

    for transformed in (jax.vmap(run), scanned):
        for got, want in zip(jax.jit(transformed)(*args), wanted, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5)


def test_a_query_without_keys_stays_finite():
    args = inputs(2, TILE + 20, 30, 2, 2, 8)
    q_ids = jnp.ones((2, TILE + 20), jnp.int32).at[:, -7:].set(0)
    options = {"q_segments": q_ids, "kv_segments": jnp.ones((2, 30), jnp.int32)}
    for got in ours(*args, **options):
        assert np.isfinite(got).all()
    # Where nothing reads such a query (no cotangent), it sends nothing to keys and values either.
    q, k, v, do = args
    do = do.at[:, -7:].set(0)
    want = reference(q[:, :-7], k, v, do[:, :-7])
    for got, expected in zip(ours(q, k, v, do, **options), want, strict=True):
        np.testing.assert_allclose(got[:, :expected.shape[1]], expected, atol=2e-5)


def temporaries(length):
    """Bytes a compiled gradient needs beside its arguments and results."""
    shape = jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)
    ids = jax.ShapeDtypeStruct((1, length), jnp.int32)
    gradient = lambda q, k, v, do, ids: ours(q, k, v, do, causal=True, q_segments=ids, kv_segments=ids)  # noqa: E731
    return jax.jit(gradient).lower(shape, shape, shape, shape, ids).compile().memory_analysis().temp_size_in_bytes


def test_training_memory_is_linear_in_the_length():
    short, long = temporaries(512), temporaries(2048)
    assert long < 5 * short
    assert long < 0.25 * 2 * 2048 * 2048 * 4  # a quarter of one array of scores [N, T, T]


SHARDED = """
    import jax, jax.numpy as jnp, numpy as np, re
    from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
    from calm_jax.models import attention
    from calm_jax.models.attention import attend

    attention.TILE = 32
    mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Auto,) * 3)
    place = NamedSharding(mesh, P(("data", "fsdp"), None, "tensor", None))
    rows = NamedSharding(mesh, P(("data", "fsdp"), None))
    for kv_heads in (4, 2):
        shapes = [(8, 300, 4, 16), (8, 300, kv_heads, 16), (8, 300, kv_heads, 16), (8, 300, 4, 16)]
        args = [jax.random.normal(key, s) for key, s in zip(jax.random.split(jax.random.key(0), 4), shapes)]
        ids = jnp.asarray(np.arange(300) // 70 * np.ones((8, 1)), jnp.int32)

        def gradient(q, k, v, do, ids):
            out, pull = jax.vjp(lambda *x: attend(*x, causal=True, q_segments=ids, kv_segments=ids), q, k, v)
            return out, *pull(do)

        want = jax.jit(gradient)(*args, ids)
        compiled = jax.jit(gradient, in_shardings=(place,) * 4 + (rows,), out_shardings=(place,) * 4).lower(
            *args, ids).compile()
        moved = re.findall(r"all-gather|all-to-all|all-reduce|collective-permute|reduce-scatter", compiled.as_text())
        assert not moved, set(moved)
        got = compiled(*[jax.device_put(x, place) for x in args], jax.device_put(ids, rows))
        for a, b in zip(got, want):
            np.testing.assert_allclose(a, b, atol=1e-5)
    print("equal on", jax.device_count())
"""


def test_sharded_over_eight_devices_moves_nothing():
    environment = miniature.environment(devices=8)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(SHARDED)], env=environment, capture_output=True,
                          text=True, check=False)
    assert done.stdout.strip() == "equal on 8", done.stderr[-3000:]


# ---- kernels of accelerators, interpreted ------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [attention.splash, attention.flash])
@pytest.mark.parametrize(("length", "heads", "kv_heads", "width"), [(256, 4, 2, 64), (128, 2, 2, 128)])
def test_the_kernels_of_accelerators_compute_what_tiles_compute(kernel, length, heads, kv_heads, width):
    """Outputs and gradients of packed rows with padding; what padding gets is nobody's business."""
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.standard_normal((2, length, count, width)), jnp.float32)
               for count in (heads, kv_heads, kv_heads))
    segments = np.ones((2, length), np.int32)
    segments[0, length // 3:], segments[0, -20:], segments[1, 30:] = 2, 0, 2
    real = jnp.asarray(segments > 0)[..., None, None]
    segments = jnp.asarray(segments)

    def loss(function):
        return lambda q, k, v: jnp.where(real, jnp.sin(function(q, k, v)), 0).sum()

    def ours(q, k, v):
        return attention.tiled(q, k, v, segments, segments, causal=True)

    def theirs(q, k, v):
        return kernel(q, k, v, segments, interpret=True)

    np.testing.assert_allclose(jnp.where(real, theirs(q, k, v), 0), jnp.where(real, ours(q, k, v), 0), atol=1e-5)
    for a, b in zip(jax.grad(loss(theirs), (0, 1, 2))(q, k, v), jax.grad(loss(ours), (0, 1, 2))(q, k, v), strict=True):
        np.testing.assert_allclose(a, b, atol=5e-5)


def test_what_a_kernel_computed_is_kept_with_the_products(monkeypatch):
    """Of the three ways to keep, only `full` computes attention again."""
    monkeypatch.setattr(attention, "KERNELS", {"cpu": functools.partial(attention.flash, interpret=True)})
    cfg = config_lib.decoder("llama", vocab=8, width=128, depth=2, heads=2, kv_heads=2, mlp_width=128, positions=128)
    graph, state = nnx.split(nnx.eval_shape(lambda: Llama(cfg, nnx.Rngs(0))))
    x, ids = jax.ShapeDtypeStruct((1, 128, 128), jnp.bfloat16), jax.ShapeDtypeStruct((1, 128), jnp.int32)

    def loss(state, x, ids, remat):
        return nnx.merge(graph, state)(x, ids, ids, remat=remat).astype(jnp.float32).sum()

    calls = {}
    for remat in ("none", "dots", "full"):
        program = jax.make_jaxpr(jax.grad(functools.partial(loss, remat=remat)))(state, x, ids)
        calls[remat] = str(program).count("name=mha_forward")
    assert 0 < calls["none"] == calls["dots"] < calls["full"], calls


def test_the_platform_of_the_mesh_decides(monkeypatch):
    """Also of a mesh that is not there; and only packed rows of full blocks go to a kernel."""
    called = []
    monkeypatch.setattr(attention, "KERNELS", {"cpu": lambda q, k, v, segments: called.append(q.shape) or q})
    q, segments = jnp.ones((1, 128, 2, 8)), jnp.ones((1, 128), jnp.int32)
    attend(q, q, q, causal=True, q_segments=segments, kv_segments=segments)
    assert called == [(1, 128, 2, 8)]
    attend(q, q, q)  # a picture
    attend(q[:, :100], q[:, :100], q[:, :100], causal=True, q_segments=segments[:, :100], kv_segments=segments[:, :100])
    assert len(called) == 1
