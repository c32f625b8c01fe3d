"""Encoder features at several depths in, the visual tokens of each part out (the multi-scale alignment module)."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from calm_jax import config as config_lib
from calm_jax.models import layers
from calm_jax.models.qformer import QFormer


class Mfam(nnx.Module):
    """One fully connected layer for the thematic features and three Q-Formers, low, middle and high (paper).

    The three have one geometry, so they are one module with a leading level axis, run side by side.
    """

    def __init__(self, cfg: config_lib.Model, rngs: nnx.Rngs):
        self.qformers = layers.stack(
            lambda rngs: QFormer(cfg.qformer, cfg.vit.width, cfg.llama.width, rngs), len(config_lib.LEVELS), rngs)
        self.thematic = layers.Linear(cfg.vit.width, cfg.llama.width, bias=True, rngs=rngs)

    def __call__(self, features: dict[str, Float[Array, "B S E"]], *, remat: str = "none") -> Float[Array, "B N D"]:
        """Tokens of the parts present in `features`, in the order low, middle, high, thematic (paper).

        Args:
          features: part -> encoder hidden states, CLS first. The Q-Formers read CLS as well; the fully connected
            layer drops it (LLaVA-1.5).
        """
        tokens = []
        levels = [part for part in config_lib.LEVELS if part in features]
        if levels:
            graphdef, state = nnx.split(self.qformers)
            if len(levels) < len(config_lib.LEVELS):
                picked = jnp.asarray([config_lib.LEVELS.index(level) for level in levels])
                state = jax.tree.map(lambda leaf: leaf[picked], state)
            run = jax.vmap(lambda state, context: nnx.merge(graphdef, state)(context, remat=remat))
            tokens.extend(run(state, jnp.stack([features[level] for level in levels])))
        if "thematic" in features:
            tokens.append(self.thematic(features["thematic"][:, 1:]))
        return jnp.concatenate(tokens, 1)
