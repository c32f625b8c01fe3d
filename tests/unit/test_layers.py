"""Products with transposed kernels, and gradients of products; dropout of LoRA adapters on each platform: how much,
which, and that nothing is lost on average."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from calm_jax.models import flops, layers
from calm_jax.models.layers import dropout


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (layers.FEW + 1, 1)])
def test_a_transposed_kernel_gives_the_same(shape):
    rngs = nnx.Rngs(0)
    linear = layers.Linear(12, 20, bias=True, rngs=rngs)
    linear.bias[...] = jnp.arange(20.0)
    linear.lora = layers.Lora(jax.random.normal(rngs.params(), (12, 2)), jnp.ones((2, 20)), alpha=1.0, dropout=0.0)
    x = jax.random.normal(jax.random.key(1), (*shape, 12))
    plain = linear(x)
    linear.transpose()
    assert linear.kernel.shape == (20, 12)
    np.testing.assert_allclose(linear(x), plain, rtol=1e-5, atol=1e-5)


@pytest.fixture(params=["cpu", "gpu"])
def platform(request, monkeypatch):
    monkeypatch.setattr(layers, "platform", lambda: request.param)


@pytest.mark.usefixtures("platform")
@pytest.mark.parametrize("rate", [0.05, 0.5, 0.999])
def test_dropout_drops_its_share_and_keeps_the_mean(rate):
    x = jnp.ones((700, 513))  # no multiple of the four bytes of a word
    y = np.asarray(dropout(x, rate, jax.random.key(0)))
    assert abs((y == 0).mean() - rate) < 1 / 256
    assert len(np.unique(y)) == 2
    np.testing.assert_allclose(y.max(), 1 / (1 - min(round(256 * rate), 255) / 256), rtol=1e-6)
    share, given = (y == 0).mean(0), min(round(256 * rate), 255) / 256  # of every channel, also in the last word
    assert abs(share - given).max() < 6 * (given * (1 - given) / 700) ** 0.5


@pytest.mark.usefixtures("platform")
def test_dropout_is_drawn_from_its_key_alone():
    x = jax.random.normal(jax.random.key(1), (64, 32), jnp.bfloat16)
    one, again, other = (dropout(x, 0.3, jax.random.key(seed)) for seed in (0, 0, 1))
    assert one.dtype == x.dtype
    np.testing.assert_array_equal(one, again)
    assert (np.asarray(one == 0) != np.asarray(other == 0)).any()
    np.testing.assert_array_equal(dropout(x, 0.0, jax.random.key(0)), x)
    # A gradient goes where the value went.
    grads = jax.grad(lambda x: dropout(x, 0.3, jax.random.key(0)).astype(jnp.float32).sum())(x)
    np.testing.assert_array_equal(np.asarray(grads == 0), np.asarray(one == 0))


# ---- products on CPU ----------------------------------------------------------------------------------------------


def loss(multiply, x, kernels):
    """Two layers over a scan, checkpointed, as blocks are."""
    @jax.checkpoint
    def block(hidden, kernel):
        return hidden + jnp.tanh(multiply(hidden, kernel)), None

    return jnp.square(jax.lax.scan(block, x, kernels)[0]).sum()


@pytest.mark.parametrize("stacked", [False, True], ids=["alone", "mapped"])
@pytest.mark.parametrize("taught", [0, 1, (0, 1)], ids=["inputs", "kernels", "both"])
def test_a_product_has_the_gradients_of_the_plain_one(taught, stacked):
    rng = np.random.default_rng(0)
    x, kernels = rng.normal(size=(2, 3, 4, 5)).astype(np.float32), rng.normal(size=(2, 2, 5, 5)).astype(np.float32)

    def whole(multiply, x, kernels):
        one = functools.partial(loss, multiply)
        return jax.vmap(one)(x, kernels).sum() if stacked else one(x[0], kernels[0])

    found, expected = (jax.tree.leaves(jax.jit(jax.grad(functools.partial(whole, multiply), taught))(x, kernels))
                       for multiply in (layers.product, jnp.matmul))
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_what_is_frozen_costs_no_product():
    x, kernels = jnp.ones((3, 4, 5)), jnp.ones((2, 5, 5))

    def products(taught):
        return flops.traced(jax.make_jaxpr(jax.grad(functools.partial(loss, layers.product), taught))(
            x, kernels).jaxpr) / (2 * 12 * 25 * 2)

    assert products((0, 1)) == products(0) + 1 and products(0) <= 3  # forwards, again, and backwards


def test_scores_that_are_kept_apart_are_the_same_with_the_same_gradients():
    x = jnp.linspace(-1, 1, 7)
    value, slope = jax.value_and_grad(lambda x: jnp.square(layers.kept_apart(x)).sum())(x)
    assert float(value) == pytest.approx(float(jnp.square(x).sum()))
    np.testing.assert_allclose(slope, 2 * x)
