"""A model in; the same model with low-rank updates on chosen linear layers, or with those updates merged, out."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from calm_jax import config as config_lib
from calm_jax.errors import ConfigError
from calm_jax.models.layers import Linear, Lora


def linears(model: nnx.Module) -> dict[str, Linear]:
    """Every linear layer of a model by its path, such as `decoder/blocks/q`; stacked ones appear once."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}


def add(model: nnx.Module, cfg: config_lib.Lora, rngs: nnx.Rngs) -> None:
    """Puts an update of rank `cfg.rank` on every linear layer whose path `cfg.targets` matches in full.

    Raises:
      ConfigError: the pattern matches no linear layer.
    """
    chosen = {path: linear for path, linear in linears(model).items() if re.fullmatch(cfg.targets, path)}
    if not chosen:
        raise ConfigError(f"model.lora.targets={cfg.targets!r} matches no linear layer; "
                          f"there are {', '.join(linears(model))}")
    for linear in chosen.values():
        *stacked, d_in, d_out = linear.kernel.shape
        a = jax.random.normal(rngs.params(), (*stacked, d_in, cfg.rank)) * d_in ** -0.5
        linear.lora = Lora(a, jnp.zeros((*stacked, cfg.rank, d_out)), alpha=cfg.alpha, dropout=cfg.dropout)


def merge(model: nnx.Module) -> None:
    """Adds every update to its kernel, in float32, and removes it: the same outputs without LoRA."""
    for linear in linears(model).values():
        if linear.lora is not None:
            a, b, scale = linear.lora.a[...], linear.lora.b[...], linear.lora.alpha / linear.lora.a.shape[-1]
            linear.kernel[...] = merged(linear.kernel[...], a, b, scale, linear.kernel.dtype)
            linear.lora = nnx.data(None)


def merged(kernel: Float[Array, "*s I O"], a: Float[Array, "*s I R"], b: Float[Array, "*s R O"], scale: float,
           dtype: jnp.dtype) -> Float[Array, "*s I O"]:
    """`kernel + scale * a @ b`, computed in float32 and then rounded to `dtype`; of a stack one matrix at a time, so
    that no second one of its size is needed."""
    def one(matrices):
        kernel, a, b = (matrix.astype(jnp.float32) for matrix in matrices)
        return (kernel + scale * jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST)).astype(dtype)

    if kernel.ndim == 2:
        return one((kernel, a, b))
    stacked = tuple(leaf.reshape(-1, *leaf.shape[-2:]) for leaf in (kernel, a, b))
    return jax.lax.map(one, stacked).reshape(kernel.shape)


def factors(kernel: str) -> tuple[str, str]:
    """The paths of the two factors that update the kernel at a path, such as `decoder/blocks/q/kernel`."""
    above = kernel.removesuffix("/kernel")
    return f"{above}/lora/a", f"{above}/lora/b"
