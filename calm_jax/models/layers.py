"""Activations in, activations out: the linear layer, the norms, and the stacking and scanning of equal blocks.

Modules keep float32 parameters of their own and compute in the dtype of the activations they are given.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jax.sharding import PartitionSpec
from jaxtyping import Array, Float, Key

FEW = 128  # rows of a product at most, with which it is better to begin with the kernel
_ROWS: contextvars.ContextVar[tuple[str, ...]] = contextvars.ContextVar("rows", default=("data", "fsdp"))


def platform() -> str:
    """Where this is going to run: on the devices of the mesh in use, which need not be there, or where JAX runs."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return jax.default_backend() if device is None else device.platform


@contextlib.contextmanager
def rows_over_all(count: int) -> Iterator[None]:
    """Inside, rows are split over all devices, those along tensor too, and weights are gathered; where `count` rows
    divide among them.

    For prompts: many tokens a row make gathering cheap, and no activation travels. Decoding splits heads instead, so
    that a token reads each weight once.
    """
    sizes = dict(jax.sharding.get_abstract_mesh().shape)
    many = sizes.get("tensor", 1) > 1 and count % math.prod(sizes.values()) == 0
    token = _ROWS.set(("data", "fsdp", "tensor") if many else _ROWS.get())
    try:
        yield
    finally:
        _ROWS.reset(token)


def by_rows(x: Float[Array, "B ..."], *, whole: bool = True) -> Float[Array, "B ..."]:
    """x with its rows split over the data and fsdp axes of the mesh in use; without a mesh, x as it is.

    Weights are split along fsdp too: where the two meet, XLA would rather split channels and hold every row of the
    batch on every device than gather the weights.

    Args:
      whole: the other axes are split over nothing, as in the residual stream; else XLA may split channels over tensor.
    """
    return _placed(x, _ROWS.get(), *[None if whole else PartitionSpec.UNCONSTRAINED] * (x.ndim - 1))


def by_heads(x: Float[Array, "B K ..."]) -> Float[Array, "B K ..."]:
    """Keys or values of a cache with their heads split over tensor, as decoding reads them."""
    return _placed(x, ("data", "fsdp"), "tensor", *[None] * (x.ndim - 2))


def by_vocabulary(table: Float[Array, "V D"]) -> Float[Array, "V D"]:
    """An embedding table gathered along fsdp, so that every row looks its words up where it is."""
    return _placed(table, None if "tensor" in _ROWS.get() else "tensor", None)


def _gathered(kernel: Float[Array, "I O"]) -> Float[Array, "I O"]:
    """A matrix as rows need it that are split over tensor themselves; else as it is stored."""
    return _placed(kernel, None, None) if "tensor" in _ROWS.get() else kernel


def _placed(x: Array, *axes: Any) -> Array:
    mesh = jax.sharding.get_abstract_mesh()
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes)) if "fsdp" in mesh.axis_names else x


def times_transposed(x: Float[Array, "... I"], kernel: Float[Array, "O I"]) -> Float[Array, "... O"]:
    """`x @ kernel.T`. On CPU a few rows are multiplied up to twice as fast as `x @ kernel` of a kernel stored `[I, O]`,
    if the kernel comes first: 512 x 512, eight rows, on two cores of an AMD EPYC: 12.0 GB/s, and 6.7."""
    last = x.ndim - 1
    if platform() != "cpu" or math.prod(x.shape[:-1]) > FEW:  # its result would have to be transposed
        return jax.lax.dot_general(x, kernel, (((last,), (1,)), ((), ())))
    return jnp.moveaxis(jax.lax.dot_general(kernel, x, (((1,), (last,)), ((), ()))), 0, -1)


@jax.custom_vjp
def product(x: Float[Array, "... I"], kernel: Float[Array, "I O"]) -> Float[Array, "... O"]:
    """`x @ kernel`, whose gradients XLA computes faster on CPU than those of the plain product.

    There it fuses what the gradient of y is computed with into both products that read it, and writes it transposed for
    the kernel's, element by element. Here that gradient is an array, and the kernel's product reads both as they lie:
    an MLP of `laptop`, forwards and backwards, took 0.40 of the time on two cores of an AMD EPYC.
    """
    return x @ kernel


def _product_forward(x, kernel):
    """Keeps what a gradient that is asked for needs: what is frozen costs none."""
    return x.value @ kernel.value, (x.value if kernel.perturbed else None, kernel.value if x.perturbed else None)


def _product_backward(kept, dy):
    x, kernel = kept
    if isinstance(dy, jax.custom_derivatives.SymbolicZero):
        dy = jnp.zeros(dy.shape, dy.dtype)
    dy, last = jax.lax.optimization_barrier(dy), dy.ndim - 1
    rows = tuple(range(last))
    return (None if kernel is None else jax.lax.dot_general(dy, kernel, (((last,), (1,)), ((), ()))),
            None if x is None else jax.lax.dot_general(x, dy, ((rows, rows), ((), ()))))


product.defvjp(_product_forward, _product_backward, symbolic_zeros=True)


@jax.custom_vjp
def kept_apart(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """x, whose gradient is an array that XLA fuses into nothing which reads it, see `product`."""
    return x


kept_apart.defvjp(lambda x: (x, None), lambda _, dx: (jax.lax.optimization_barrier(dx),))


class Linear(nnx.Module):
    """`y = x @ kernel + bias`, plus a low-rank update where `models.lora.add` has put one.

    Shapes: x `[..., I]`, kernel `[I, O]` (`[O, I]` after `transpose`), bias `[O]`, y `[..., O]` in the dtype of x.
    Random kernels keep the variance of their input, times `gain` squared: layers that add to a residual stream of many
    blocks start smaller.
    """

    def __init__(self, d_in: int, d_out: int, *, bias: bool, rngs: nnx.Rngs, gain: float = 1.0):
        self.kernel = nnx.Param(gain * nnx.initializers.lecun_normal()(rngs.params(), (d_in, d_out)))
        self.bias = nnx.Param(jnp.zeros(d_out)) if bias else None
        self.lora: Lora | None = nnx.data(None)
        self.transposed = False

    def transpose(self) -> None:
        """From here on the kernel is stored as `[O, I]`, see `times_transposed`."""
        self.kernel, self.transposed = nnx.Param(self.kernel[...].T), True

    def __call__(self, x: Float[Array, "... I"], key: Key[Array, ""] | None = None) -> Float[Array, "... O"]:
        kernel = _gathered(self.kernel[...].astype(x.dtype))
        multiply = times_transposed if self.transposed else product if platform() == "cpu" else jnp.matmul
        y = multiply(x, kernel)
        if self.bias is not None:
            y = y + self.bias[...].astype(x.dtype)
        if self.lora is not None:
            y = y + self.lora(x, key)
        return by_rows(y, whole=False)


class Lora(nnx.Module):
    """The update `alpha / rank * dropout(x) @ a @ b`; b starts at zero, so that the start is the base model."""

    def __init__(self, a: Array, b: Array, *, alpha: float, dropout: float):
        self.a, self.b = nnx.Param(a), nnx.Param(b)
        self.alpha, self.dropout = alpha, dropout

    def __call__(self, x: Float[Array, "... I"], key: Key[Array, ""] | None) -> Float[Array, "... O"]:
        if key is not None and self.dropout > 0:
            x = dropout(x, self.dropout, key)
        rank = self.a.shape[-1]
        a, b = (_gathered(factor[...].astype(x.dtype)) for factor in (self.a, self.b))
        return (x @ a) @ b * (self.alpha / rank)


def dropout(x: Float[Array, "... I"], rate: float, key: Key[Array, ""]) -> Float[Array, "... I"]:
    """x with elements set to zero, with a probability of `rate` to the nearest 1/256; the others make up for them.

    A byte decides. On a GPU each random word gives four, for hashing is what costs there: a step of 7b with low-rank
    updates took 0.60 s on an H200 instead of 0.635. Elsewhere each element has a word of its own: XLA then draws inside
    the product that reads them, and on a TPU four from a word would be written to memory and read again.
    """
    width = x.shape[-1]
    dropped = min(round(256 * rate), 255)
    if platform() == "gpu":
        words = jax.random.bits(key, (*x.shape[:-1], -(-width // 4)), jnp.uint32)
        drawn = rearrange(jax.lax.bitcast_convert_type(words, jnp.uint8), "... w b -> ... (w b)")[..., :width]
    else:
        drawn = jax.random.bits(key, x.shape, jnp.uint32) >> 24
    return jnp.where(drawn >= dropped, x * (256 / (256 - dropped)), 0)


class LayerNorm(nnx.Module):
    """LayerNorm over the last axis, computed in float32; scale and bias `[D]`."""

    def __init__(self, width: int, eps: float):
        self.scale, self.bias, self.eps = nnx.Param(jnp.ones(width)), nnx.Param(jnp.zeros(width)), eps

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        mean = x32.mean(-1, keepdims=True)
        centred = x32 - mean
        y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + self.eps)
        return by_rows((y * self.scale[...] + self.bias[...]).astype(x.dtype))


class RMSNorm(nnx.Module):
    """Root-mean-square norm over the last axis, computed in float32; scale `[D]`.

    Args:
      whole: as in `by_rows`; False of what may be split over tensor, such as the heads of queries and keys.
    """

    def __init__(self, width: int, eps: float, *, whole: bool = True):
        self.scale, self.eps, self.whole = nnx.Param(jnp.ones(width)), eps, whole

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        x32 = x.astype(jnp.float32)
        y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + self.eps)
        return by_rows((y * self.scale[...]).astype(x.dtype), whole=self.whole)


def stack(make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> Any:
    """`count` modules of one shape as a single module whose parameters have a leading axis of that size."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def build(rngs):
        return make(rngs)

    return build(rngs)


def unstack(blocks: nnx.Module | nnx.List, index: int) -> Any:
    """Block `index` of a stack, as a module of its own that shares nothing with the stack, or of a list of blocks."""
    if isinstance(blocks, nnx.List):
        return blocks[index]
    graphdef, state = nnx.split(blocks)
    return nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf[index], state))


def scan(blocks: nnx.Module, x: Any, apply: Callable[[Any, Any, Any], Any], *, remat: str, keys: Any = None,
         start: int = 0, stop: int | None = None) -> Any:
    """Runs `x = apply(block, x, key)` for blocks `start` to `stop` of a stack with one compiled body.

    Args:
      blocks: a module made by `stack`.
      x: the carry, a pytree whose shapes and dtypes every block keeps.
      apply: called with one block, the carry and that block's slice of `keys`.
      remat: what a block keeps for its backward pass (`config.Model.remat`).
      keys: a pytree with one leading entry a block, or None.
    """
    graphdef, state = nnx.split(blocks)
    count = jax.tree.leaves(state)[0].shape[0]
    stop = count if stop is None else stop
    if (start, stop) != (0, count):
        state, keys = jax.tree.map(lambda leaf: leaf[start:stop], (state, keys))

    def body(carry, layer):
        layer_state, key = layer
        return apply(nnx.merge(graphdef, layer_state), carry, key), None

    if remat == "full":
        body = jax.checkpoint(body, prevent_cse=False, policy=jax.checkpoint_policies.nothing_saveable)
    elif remat == "dots":
        body = jax.checkpoint(body, prevent_cse=False, policy=_products)
    return jax.lax.scan(body, x, (state, keys))[0]


def _products(primitive: Any, *inputs: Any, **parameters: Any) -> bool:
    """Keep the results of products with weights, and of attention where a kernel with its own gradient computes it."""
    return primitive.name == "custom_vjp_call" or jax.checkpoint_policies.dots_with_no_batch_dims_saveable(
        primitive, *inputs, **parameters)
