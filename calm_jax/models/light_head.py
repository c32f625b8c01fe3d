"""Visual tokens of an image in, a score and the grades of its attributes out, without the language model (ours).

The MFAM learns here what there is to see at a hundredth of the cost, and to say it in what the language model reads:
each attribute has a visual token of its own, which is drawn towards the word embeddings of its name and its grade, such
as those of "sharpness" and "soft". The reader `light` asks it for scores, and for nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from einops import reduce
from flax import nnx
from jaxtyping import Array, Float, Int

from calm_jax import config as config_lib
from calm_jax.models import layers
from calm_jax.models.score_head import CENTRE, REACH

SHARPNESS = 4.0  # nats that a token loses for a squared distance as large as the squared norm of a phrase
PULL = 0.5  # weight of the squared distance to the true phrase, in the same unit: else tokens would run away from all


class LightHead(nnx.Module):
    """A score by mean of an image's visual tokens, LayerNorm and one linear layer; grades by distance to phrases."""

    def __init__(self, d_in: int, cfg: config_lib.LightHead, rngs: nnx.Rngs):
        self.grades = cfg.grades
        self.norm = layers.LayerNorm(d_in, 1e-5)
        self.out = layers.Linear(d_in, 1, bias=True, rngs=rngs, gain=0.1)

    def score(self, tokens: Float[Array, "... N D"]) -> Float[Array, "..."]:
        """The score on the scale 1-10, not clipped to it, float32."""
        y = self.out(self.norm(reduce(tokens.astype(jnp.float32), "... n d -> ... d", "mean")))
        return CENTRE + REACH * y[..., 0]

    def distances(self, tokens: Float[Array, "... N D"], phrases: Float[Array, "A G D"], places: Sequence[int]
                  ) -> Float[Array, "... A G"]:
        """Squared distances of the attributes' tokens to the phrases of their grades, in units of the phrases' mean
        squared norm; infinite beyond the grades that an attribute has.

        Args:
          phrases: as `phrase_embeddings` gives them.
          places: of each attribute's token among the N.
        """
        own = tokens.astype(jnp.float32)[..., np.asarray(places), None, :]
        has = np.arange(max(self.grades)) < np.asarray(self.grades)[:, None]
        unit = jnp.where(has, jnp.square(phrases).sum(-1), 0.0).sum() / has.sum()
        return jnp.where(has, jnp.square(own - phrases).sum(-1) / unit, jnp.inf)

    def loss(self, tokens: Float[Array, "B I N D"], phrases: Float[Array, "A G D"], places: Sequence[int],
             grades: Int[Array, "B I A"], targets: Float[Array, "B I"]) -> dict[str, Float[Array, ""]]:
        """Sums over what is known: `grades`, cross-entropy of the grades with the pull to the true phrase;
        `grades_right`; `scores`, squared error in units of REACH; `score_error`, absolute error in points.

        Args:
          phrases, places: as `distances`.
          grades: true grades, -1 = not known.
          targets: true scores on 1-10, 0 = none.
        """
        distances = self.distances(tokens, phrases, places)
        known, place = grades >= 0, jnp.maximum(grades, 0)[..., None]
        true = jnp.take_along_axis(distances, place, -1)[..., 0]
        missed = SHARPNESS * true + jax.nn.logsumexp(-SHARPNESS * distances, axis=-1)
        error = jnp.where(targets > 0, self.score(tokens) - targets, 0.0)
        return {"grades": jnp.where(known, missed + PULL * true, 0.0).sum(),
                "grades_right": (known & (distances.argmin(-1) == grades)).sum().astype(jnp.float32),
                "scores": jnp.square(error / REACH).sum(), "score_error": jnp.abs(error).sum()}


def phrase_embeddings(words: Float[Array, "A P W D"], ids: Int[Array, "A P W"]) -> Float[Array, "A G D"]:
    """Of each grade of each attribute the mean embedding of its name's tokens and that of its grade's, added up:
    what the language model reads in two words, in the place of one. No gradient flows back.

    Args:
      words: embeddings of `ids`, of which the first P of an attribute are its name's and the others its grades'.
      ids: -1 = none; P = G + 1.
    """
    there = (ids >= 0)[..., None]
    means = jnp.where(there, words.astype(jnp.float32), 0.0).sum(2) / jnp.maximum(there.sum(2), 1)
    return jax.lax.stop_gradient(means[:, :1] + means[:, 1:])
