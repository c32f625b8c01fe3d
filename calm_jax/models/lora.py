"""A model in; the same model with low-rank updates on chosen linear layers, or with those updates merged, out."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
from flax import nnx

from calm_jax import config as config_lib
from calm_jax.models.layers import Linear, Lora


def linears(model: nnx.Module) -> dict[str, Linear]:
    """Every linear layer of a model by its path, such as `llama/blocks/q`; stacked ones appear once."""
    return {"/".join(map(str, path)): module for path, module in nnx.iter_modules(model) if isinstance(module, Linear)}


def add(model: nnx.Module, cfg: config_lib.Lora, rngs: nnx.Rngs) -> None:
    """Puts an update of rank `cfg.rank` on every linear layer whose path `cfg.targets` matches in full.

    Raises:
      ConfigError: the pattern matches no linear layer.
    """
    chosen = {path: linear for path, linear in linears(model).items() if re.fullmatch(cfg.targets, path)}
    if not chosen:
        raise config_lib.ConfigError(f"model.lora.targets={cfg.targets!r} matches no linear layer; "
                                     f"there are {', '.join(linears(model))}")
    for linear in chosen.values():
        *stacked, d_in, d_out = linear.kernel.shape
        a = jax.random.normal(rngs.params(), (*stacked, d_in, cfg.rank)) * d_in ** -0.5
        linear.lora = Lora(a, jnp.zeros((*stacked, cfg.rank, d_out)), alpha=cfg.alpha, dropout=cfg.dropout)


def merge(model: nnx.Module) -> None:
    """Adds every update to its kernel, in float32, and removes it: the same outputs without LoRA."""
    for linear in linears(model).values():
        if linear.lora is not None:
            a, b = linear.lora.a[...].astype(jnp.float32), linear.lora.b[...].astype(jnp.float32)
            update = (a @ b) * (linear.lora.alpha / a.shape[-1])
            linear.kernel[...] = (linear.kernel[...].astype(jnp.float32) + update).astype(linear.kernel.dtype)
            linear.lora = nnx.data(None)
