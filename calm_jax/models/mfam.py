"""Encoder features at several depths in, the visual tokens of each part out (the multi-scale alignment module)."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
from einops import reduce
from flax import nnx
from jaxtyping import Array, Float

from calm_jax import config as config_lib
from calm_jax.models import layers
from calm_jax.models.encoders import Feature
from calm_jax.models.qformer import QFormer


class Thematic(nnx.Module):
    """Patch features -> thematic tokens: squares of patches are averaged (`model.thematic.pool`), a norm if the config
    asks for one, and one fully connected layer to the language model's width."""

    def __init__(self, cfg: config_lib.Model, rngs: nnx.Rngs):
        width, self.pool = cfg.encoder.part("thematic").width, cfg.thematic.pool
        self.norm = layers.LayerNorm(width, 1e-5) if cfg.thematic.norm else None
        self.project = layers.Linear(width, cfg.decoder.width, bias=True, rngs=rngs, gain=cfg.visual_gain)

    def __call__(self, patches: Float[Array, "B P E"]) -> Float[Array, "B N D"]:
        """N = P / pool^2; the P patches are a square grid, row by row, where they are pooled."""
        if self.pool > 1:
            side = math.isqrt(patches.shape[1]) // self.pool
            patches = reduce(patches, "b (h i w j) e -> b (h w) e", "mean", h=side, w=side, i=self.pool, j=self.pool)
        return self.project(patches if self.norm is None else self.norm(patches))


class Mfam(nnx.Module):
    """One fully connected layer for the thematic features and three Q-Formers, low, middle and high (paper).

    Where the encoder's three levels have one geometry, the Q-Formers are one module with a leading level axis, run side
    by side; else they are a list of three.
    """

    def __init__(self, cfg: config_lib.Model, rngs: nnx.Rngs):
        width, levels = cfg.decoder.width, [cfg.encoder.part(level) for level in config_lib.LEVELS]
        self.stacked = len(set(levels)) == 1
        if self.stacked:
            self.qformers = layers.stack(
                lambda rngs: QFormer(cfg.qformer, levels[0].width, width, rngs, cfg.visual_gain), len(levels), rngs)
        else:
            self.qformers = nnx.List([QFormer(cfg.qformer, level.width, width, rngs, cfg.visual_gain)
                                      for level in levels])
        self.thematic = Thematic(cfg, rngs)

    def __call__(self, features: Mapping[str, Feature], *, remat: str = "none") -> Float[Array, "B N D"]:
        """Tokens of the parts present in `features`, in the order low, middle, high, thematic (paper).

        The Q-Formers read all tokens of their features; the fully connected layer leaves out those that stand for no
        place in the image, such as CLIP's class token (LLaVA-1.5).
        """
        tokens = []
        levels = [part for part in config_lib.LEVELS if part in features]
        if levels and self.stacked:
            graphdef, state = nnx.split(self.qformers)
            if len(levels) < len(config_lib.LEVELS):
                picked = jnp.asarray([config_lib.LEVELS.index(level) for level in levels])
                state = jax.tree.map(lambda leaf: leaf[picked], state)
            run = jax.vmap(lambda state, context: nnx.merge(graphdef, state)(context, remat=remat))
            tokens.extend(run(state, jnp.stack([features[level].tokens for level in levels])))
        elif levels:
            tokens.extend(self.qformers[config_lib.LEVELS.index(level)](features[level].tokens, remat=remat)
                          for level in levels)
        if "thematic" in features:
            tokens.append(self.thematic(features["thematic"].tokens[:, features["thematic"].prefix:]))
        return jnp.concatenate(tokens, 1)
