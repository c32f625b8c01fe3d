"""Visual tokens of an image in, a score and the grades of its attributes out: a linear head on the MFAM (ours).

It stands where the language model does, so that the MFAM can learn what there is to see at a hundredth of the cost,
before it learns to say it. Nothing is read from it afterwards.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, Float, Int

from calm_jax import config as config_lib
from calm_jax.models import layers
from calm_jax.models.score_head import CENTRE, REACH


class LightHead(nnx.Module):
    """Mean of an image's visual tokens, LayerNorm, one linear layer: first the score, then the logits of all grades of
    the first attribute, of the second, and so on."""

    def __init__(self, d_in: int, cfg: config_lib.LightHead, rngs: nnx.Rngs):
        self.grades = cfg.grades
        self.norm = layers.LayerNorm(d_in, 1e-5)
        self.out = layers.Linear(d_in, 1 + sum(cfg.grades), bias=True, rngs=rngs, gain=0.1)

    def __call__(self, tokens: Float[Array, "... N D"]) -> tuple[Float[Array, "..."], Float[Array, "... A G"]]:
        """Score on the scale 1-10, not clipped to it, and logits of the A attributes' grades, float32; -inf beyond
        those that an attribute has."""
        y = self.out(self.norm(reduce(tokens.astype(jnp.float32), "... n d -> ... d", "mean")))
        begins = 1 + np.cumsum((0, *self.grades[:-1]))[:, None] + np.arange(max(self.grades))
        has = np.arange(max(self.grades)) < np.asarray(self.grades)[:, None]
        logits = jnp.where(has, y[..., np.where(has, begins, 0)], -jnp.inf)
        return CENTRE + REACH * y[..., 0], logits

    def loss(self, tokens: Float[Array, "B I N D"], grades: Int[Array, "B I A"], targets: Float[Array, "B I"]
             ) -> dict[str, Float[Array, ""]]:
        """Sums over what is known: `grades`, cross-entropy; `grades_right`; `scores`, squared error in units of REACH;
        `score_error`, absolute error in points.

        Args:
          grades: true grades, -1 = not known.
          targets: true scores on 1-10, 0 = none.
        """
        score, logits = self(tokens)
        known, place = grades >= 0, jnp.maximum(grades, 0)[..., None]
        log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits), place, -1)[..., 0]
        error = jnp.where(targets > 0, score - targets, 0.0)
        return {"grades": -jnp.where(known, log_likelihood, 0.0).sum(),
                "grades_right": (known & (logits.argmax(-1) == grades)).sum().astype(jnp.float32),
                "scores": jnp.square(error / REACH).sum(), "score_error": jnp.abs(error).sum()}
