"""An encoder whose three levels differ in width and in the number of their tokens, some with a token of their own."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx

from calm_jax import config, sharding
from calm_jax.models import layers
from calm_jax.models.encoders import Feature

# part -> (side of a cell in pixels, width, tokens before the cells')
PARTS = {"low": (4, 16, 0), "middle": (8, 24, 1), "high": (16, 40, 2), "thematic": (16, 40, 0)}
sharding.add("small", "encoder/(low|middle|high|thematic)/first")


@dataclasses.dataclass(frozen=True)
class EyeConfig(config.Encoder):
    """An eye of cells."""

    family: str = config.field("retina", "name of the family", "retina")
    image_size: int = config.field(32, "side of the square, pixels", "retina", least=16)

    @property
    def mean(self):
        return 0.5, 0.25, 0.75

    @property
    def std(self):
        return 0.5, 0.5, 0.5

    def part(self, part):
        side, width, prefix = PARTS[part]
        return config.PartFeatures(width, (self.image_size // side) ** 2 + prefix, prefix)

    def wrong(self):
        return [] if self.image_size % 16 == 0 else [f"image_size={self.image_size} is no multiple of 16"]

    def build(self, depths, rngs):
        return Eye(self, rngs)


class Cells(nnx.Module):
    def __init__(self, part, rngs):
        self.side, width, self.prefix = PARTS[part]
        self.embed = layers.Linear(3 * self.side ** 2, width, bias=True, rngs=rngs)
        self.first = nnx.Param(jnp.zeros((self.prefix, width))) if self.prefix else None

    def __call__(self, images):
        tokens = self.embed(rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=self.side, q=self.side))
        tokens = jax.nn.gelu(tokens)
        if self.first is None:
            return tokens
        first = repeat(self.first[...].astype(tokens.dtype), "n d -> b n d", b=len(tokens))
        return jnp.concatenate([first, tokens], 1)


class Eye(nnx.Module):
    def __init__(self, cfg, rngs):
        self.cfg = cfg
        self.low, self.middle, self.high, self.thematic = (Cells(part, rngs) for part in PARTS)

    def features(self, images, parts, *, dtype, remat="none"):
        scaled = (images.astype(jnp.float32) / 255 - jnp.asarray(self.cfg.mean)) / jnp.asarray(self.cfg.std)
        return {part: Feature(getattr(self, part)(scaled.astype(dtype)), PARTS[part][2]) for part in parts}
