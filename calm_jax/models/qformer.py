"""Features of a picture in, a few tokens for the language model out: a Q-Former of BLIP-2's geometry."""

from __future__ import annotations

import jax
from einops import repeat
from flax import nnx
from jaxtyping import Array, Float

from calm_jax import config as config_lib
from calm_jax.models import layers
from calm_jax.models.attention import Attention


class Block(nnx.Module):
    """BERT block, post-norm: self-attention of the queries, cross-attention to the picture (if any), MLP."""

    def __init__(self, cfg: config_lib.QFormer, context_width: int | None, rngs: nnx.Rngs):
        self.attention = Attention(cfg.width, cfg.heads, rngs)
        self.attention_norm = layers.LayerNorm(cfg.width, cfg.eps)
        if context_width is None:
            self.cross = self.cross_norm = None
        else:
            self.cross = Attention(cfg.width, cfg.heads, rngs, context_width)
            self.cross_norm = layers.LayerNorm(cfg.width, cfg.eps)
        self.up = layers.Linear(cfg.width, cfg.mlp_width, bias=True, rngs=rngs)
        self.down = layers.Linear(cfg.mlp_width, cfg.width, bias=True, rngs=rngs)
        self.mlp_norm = layers.LayerNorm(cfg.width, cfg.eps)

    def __call__(self, x: Float[Array, "B Q D"], context: Float[Array, "B S E"]) -> Float[Array, "B Q D"]:
        x = self.attention_norm(x + self.attention(x))
        if self.cross is not None:
            x = self.cross_norm(x + self.cross(x, context))
        return self.mlp_norm(x + self.down(jax.nn.gelu(self.up(x), approximate=False)))


class Group(nnx.Module):
    """`cross_every` blocks, the first with cross-attention: the unit that repeats and is scanned."""

    def __init__(self, cfg: config_lib.QFormer, context_width: int, rngs: nnx.Rngs):
        self.blocks = nnx.List([Block(cfg, context_width if i == 0 else None, rngs) for i in range(cfg.cross_every)])

    def __call__(self, x: Float[Array, "B Q D"], context: Float[Array, "B S E"]) -> Float[Array, "B Q D"]:
        for block in self.blocks:
            x = block(x, context)
        return x


class QFormer(nnx.Module):
    """Learned queries, a norm of the features they read (ours: depths differ in scale; LAVIS: ln_vision), the
    blocks, and the linear layer to the language model's width.

    Args:
      gain: RMS of the tokens at random parameters.
    """

    def __init__(self, cfg: config_lib.QFormer, context_width: int, out_width: int, rngs: nnx.Rngs,
                 gain: float = 1.0):
        self.context_norm = layers.LayerNorm(context_width, 1e-5)
        self.queries = nnx.Param(nnx.initializers.normal(0.02)(rngs.params(), (cfg.queries, cfg.width)))
        self.norm = layers.LayerNorm(cfg.width, cfg.eps)
        self.groups = layers.stack(lambda rngs: Group(cfg, context_width, rngs), cfg.depth // cfg.cross_every, rngs)
        self.project = layers.Linear(cfg.width, out_width, bias=True, rngs=rngs, gain=gain)

    def __call__(self, context: Float[Array, "B S E"], *, remat: str = "none") -> Float[Array, "B Q D"]:
        return self.project(self.hidden(self.context_norm(context), remat=remat))

    def hidden(self, context: Float[Array, "B S E"], *, remat: str = "none") -> Float[Array, "B Q W"]:
        """The queries after the last block; `context` is already normed (Blip2QFormerModel's last_hidden_state)."""
        x = repeat(self.queries[...].astype(context.dtype), "q d -> b q d", b=context.shape[0])
        return layers.scan(self.groups, self.norm(x), lambda group, x, _: group(x, context), remat=remat)
