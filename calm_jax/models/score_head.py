"""Hidden states behind a question in, scores with their spreads out: a small regression head (ours).

It is what the reader `head` reads, beside the words that the model would say.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from calm_jax import config as config_lib
from calm_jax.models import layers

CENTRE, REACH = 5.5, 2.25  # of the scale 1-10: what an output of zero says, and what one of one adds


class ScoreHead(nnx.Module):
    """One hidden layer with GELU, and two numbers: the score, and the logarithm of its spread."""

    def __init__(self, d_in: int, cfg: config_lib.ScoreHead, rngs: nnx.Rngs):
        self.hidden = layers.Linear(d_in, cfg.width, bias=True, rngs=rngs)
        self.out = layers.Linear(cfg.width, 2, bias=True, rngs=rngs, gain=0.1)  # starts near the centre of the scale

    def __call__(self, hidden: Float[Array, "... D"]) -> tuple[Float[Array, "..."], Float[Array, "..."]]:
        """Score and its standard deviation, float32, on the scale 1-10; not clipped to it.

        Args:
          hidden: final hidden states of the language model where an answer begins.
        """
        y = self.out(jax.nn.gelu(self.hidden(hidden.astype(jnp.float32)), approximate=False))
        return CENTRE + REACH * y[..., 0], REACH * jnp.exp(y[..., 1])

    def loss(self, hidden: Float[Array, "B T D"], asked: Int[Array, "B I"], targets: Float[Array, "B I"]
             ) -> tuple[Float[Array, ""], Float[Array, ""]]:
        """Sums over the targets: the loss, and the absolute error in points.

        Squared error in units of REACH teaches the score; the likelihood of what it misses, taken as it is, teaches
        the spread.

        Args:
          hidden: of packed rows.
          asked: position of the row where each answer begins.
          targets: true scores on 1-10; 0 = none.
        """
        known = targets > 0
        score, spread = self(jnp.take_along_axis(hidden, asked[..., None], axis=1))
        error = jnp.where(known, score - targets, 0.0) / REACH
        spread = jnp.where(known, spread, REACH) / REACH
        missed = jnp.square(jax.lax.stop_gradient(error) / spread) / 2 + jnp.log(spread)
        return (jnp.square(error) / 2 + missed).sum(), REACH * jnp.abs(error).sum()
