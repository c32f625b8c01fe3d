"""Vision transformers: what the encoder families that are ViTs have in common."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, UInt8

from calm_jax import config as config_lib
from calm_jax.models import layers
from calm_jax.models.attention import Attention
from calm_jax.models.encoders import Feature

ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
    "quick_gelu": lambda x: x * jax.nn.sigmoid(1.702 * x),  # CLIP
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
}


class VitConfig(config_lib.Encoder):
    """Base of the configs of ViTs: a family declares the fields annotated here, with its own defaults.

    Attributes:
      image_size: side of the square the encoder sees, pixels.
      native_size: side of the images whose position embeddings are stored, pixels; 0 = image_size.
      patch: side of a patch, pixels.
      width: channels of a token.
      depth: blocks.
      heads: attention heads.
      mlp_width: hidden channels of the MLP.
      eps: LayerNorm epsilon.
      mean, std: of the training images, RGB in 0..1.
      activation: of the MLP: one of ACTIVATIONS, or swiglu.
      cls: whether a class token comes first.
      registers: tokens that stand after the class token and have no position.
      pre_norm: whether a LayerNorm stands before the first block.
      stem_bias: whether the patch embedding has a bias.
      layer_scale: whether each branch of a block is multiplied by a learned vector.
      antialias: whether position embeddings are low-pass filtered where the grid shrinks.
    """

    image_size: int
    native_size: int
    patch: int
    width: int
    depth: int
    heads: int
    mlp_width: int
    eps: float
    activation = "gelu"
    cls = True
    registers = 0
    pre_norm = False
    stem_bias = True
    layer_scale = False
    antialias = False

    @property
    def native(self) -> int:
        """Side of the images whose position embeddings are stored, pixels."""
        return self.native_size or self.image_size

    @property
    def patches(self) -> int:
        """P: patches of an image."""
        return (self.image_size // self.patch) ** 2

    @property
    def prefix(self) -> int:
        """Tokens that stand for no place in the image: class token and registers."""
        return self.cls + self.registers

    def part(self, part: str) -> config_lib.PartFeatures:
        """The patches after class token and registers, alike at every depth."""
        return config_lib.PartFeatures(self.width, self.patches + self.prefix, prefix=self.prefix)

    def resized(self, image_size: int) -> VitConfig:
        return dataclasses.replace(self, image_size=image_size,
                                   native_size=0 if image_size == self.native else self.native)

    def wrong(self) -> list[str]:
        checks = (
            *((size % self.patch == 0, f"{name}={size} is no multiple of patch={self.patch}")
              for name, size in (("image_size", self.image_size), ("native_size", self.native_size))),
            (self.width % self.heads == 0, f"width={self.width} is no multiple of heads={self.heads}"),
            *((len(values) == 3, f"{name}={values} is not three numbers, for red, green and blue")
              for name, values in (("mean", self.mean), ("std", self.std))))
        return [message for holds, message in checks if not holds]

    def flops(self, parts: tuple[str, ...], depths: config_lib.Depths) -> tuple[float, float]:
        """As `Encoder.flops`. Interpolating the position embeddings is left out: it is done once for a batch."""
        blocks = max(depths.block(part, self.depth) for part in parts)
        tokens, matrices = self.patches + self.prefix, 3 if self.activation == "swiglu" else 2
        products = tokens * blocks * self.width * (4 * self.width + matrices * self.mlp_width)
        return 2.0 * products + self.stem_flops(), 4.0 * blocks * tokens ** 2 * self.width

    def stem_flops(self) -> float:
        """FLOPs of the stem on one image."""
        return 2.0 * self.patches * 3 * self.patch ** 2 * self.width

    def build(self, depths: config_lib.Depths, rngs: nnx.Rngs) -> Vit:
        return Vit(self, depths, rngs)


def normalise(images: UInt8[Array, "... H W 3"], cfg: config_lib.Encoder, dtype: Any) -> Float[Array, "... H W 3"]:
    """RGB 0..255 -> zero mean and unit variance over the encoder's training images, in `dtype`."""
    scaled = images.astype(jnp.float32) / 255.0
    return ((scaled - jnp.asarray(cfg.mean)) / jnp.asarray(cfg.std)).astype(dtype)


# ---- position embeddings of another grid --------------------------------------------------------------------------


@functools.lru_cache(maxsize=8)
def resampling(stored: int, wanted: int, antialias: bool) -> Float[np.ndarray, "wanted stored"]:
    """The matrix that resamples `stored` places of one axis to `wanted`, float32: bicubic as torch's `interpolate` has
    it, without aligned corners.

    Without antialiasing the kernel has a = -0.75 and four taps, and places beyond an edge are those at the edge. With
    it the kernel has a = -0.5, is as much wider as the grid shrinks, and is renormalised at the edges.
    """
    centres = (np.arange(wanted) + 0.5) * (stored / wanted) - 0.5
    places = np.arange(stored)
    if antialias:
        matrix = _cubic((places - centres[:, None]) / max(stored / wanted, 1.0), -0.5)
        return (matrix / matrix.sum(1, keepdims=True)).astype(np.float32)
    matrix = np.zeros((wanted, stored))
    for offset in range(-1, 3):
        taps = np.floor(centres) + offset
        np.add.at(matrix, (np.arange(wanted), np.clip(taps, 0, stored - 1).astype(int)), _cubic(taps - centres, -0.75))
    return matrix.astype(np.float32)


def _cubic(x: np.ndarray, a: float) -> np.ndarray:
    """Keys' cubic convolution kernel."""
    x = np.abs(x)
    near, far = ((a + 2) * x - (a + 3)) * x ** 2 + 1, a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))


# ---- modules ------------------------------------------------------------------------------------------------------


class LayerScale(nnx.Module):
    """A branch times a learned vector; scale `[D]`."""

    def __init__(self, width: int):
        self.scale = nnx.Param(jnp.ones(width))

    def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
        return x * self.scale[...].astype(x.dtype)


class Block(nnx.Module):
    """Pre-norm transformer block. Under swiglu `up` holds two layers, the gate's and the other: kernel `[2, D, M]`."""

    def __init__(self, cfg: VitConfig, rngs: nnx.Rngs):
        self.activation = cfg.activation
        self.attention_norm = layers.LayerNorm(cfg.width, cfg.eps)
        self.attention = Attention(cfg.width, cfg.heads, rngs)
        self.mlp_norm = layers.LayerNorm(cfg.width, cfg.eps)

        def up(rngs):
            return layers.Linear(cfg.width, cfg.mlp_width, bias=True, rngs=rngs)

        self.up = layers.stack(up, 2, rngs) if cfg.activation == "swiglu" else up(rngs)
        self.down = layers.Linear(cfg.mlp_width, cfg.width, bias=True, rngs=rngs, gain=(2 * cfg.depth) ** -0.5)
        self.attention_scale = LayerScale(cfg.width) if cfg.layer_scale else None
        self.mlp_scale = LayerScale(cfg.width) if cfg.layer_scale else None

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        y = self.attention(self.attention_norm(x))
        x = x + (y if self.attention_scale is None else self.attention_scale(y))
        y = self.mlp_norm(x)
        if self.activation == "swiglu":
            gate, y = (layers.unstack(self.up, index)(y) for index in range(2))
            y = jax.nn.silu(gate) * y
        else:
            y = ACTIVATIONS[self.activation](self.up(y))
        y = self.down(y)
        return x + (y if self.mlp_scale is None else self.mlp_scale(y))


class PatchStem(nnx.Module):
    """One linear map of the pixels of a patch. kernel `[patch * patch * 3, D]`."""

    def __init__(self, cfg: VitConfig, rngs: nnx.Rngs):
        self.patch = cfg.patch
        self.embed = layers.Linear(cfg.patch * cfg.patch * 3, cfg.width, bias=cfg.stem_bias, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        return self.embed(rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch))


class Vit(nnx.Module):
    """The encoder up to the deepest block that is read; the pooled output and its norm play no part in CALM."""

    def __init__(self, cfg: VitConfig, depths: config_lib.Depths, rngs: nnx.Rngs, *,
                 stem: Callable[[Any, nnx.Rngs], nnx.Module] = PatchStem):
        self.cfg, self.depths = cfg, depths
        self.stem = stem(cfg, rngs)
        normal = nnx.initializers.normal(0.2)  # ours: where a patch lies should be seen from the first step on
        self.cls = nnx.Param(normal(rngs.params(), (cfg.width,))) if cfg.cls else None
        stored = (cfg.native // cfg.patch) ** 2
        self.positions = nnx.Param(normal(rngs.params(), (stored + cfg.cls, cfg.width)))
        self.registers = nnx.Param(normal(rngs.params(), (cfg.registers, cfg.width))) if cfg.registers else None
        self.pre_norm = layers.LayerNorm(cfg.width, cfg.eps) if cfg.pre_norm else None
        self.blocks = layers.stack(lambda rngs: Block(cfg, rngs), cfg.depth, rngs)

    def features(self, images: UInt8[Array, "B H W 3"], parts: tuple[str, ...], *, dtype: Any,
                 remat: str = "none") -> dict[str, Feature]:
        """See `models.encoders.Encoder`: each part reads the depth that the config's `depths` give it."""
        blocks = {part: self.depths.block(part, self.cfg.depth) for part in parts}
        states = self.hidden_states(normalise(images, self.cfg, dtype), tuple(blocks.values()), remat=remat)
        return {part: Feature(states[block], self.cfg.prefix) for part, block in blocks.items()}

    def hidden_states(self, images: Float[Array, "B H W 3"], depths: tuple[int, ...], *,
                      remat: str = "none") -> dict[int, Float[Array, "B S D"]]:
        """Hidden states after `depths` blocks (0 = before the first), class token and registers first: S = prefix + P.

        Blocks after the deepest depth are not run. Depth d is `hidden_states[d]` of the transformers class.
        """
        x = self.stem(images)
        positions = self.placed()
        x = x + positions[int(self.cfg.cls):].astype(x.dtype)
        first = [] if self.cls is None else [self.cls[...].astype(x.dtype)[None] + positions[:1].astype(x.dtype)]
        first += [] if self.registers is None else [self.registers[...].astype(x.dtype)]
        x = jnp.concatenate([*(repeat(tokens, "n d -> b n d", b=x.shape[0]) for tokens in first), x], 1)
        x = x if self.pre_norm is None else self.pre_norm(x)
        taps, done = {}, 0
        for depth in sorted(set(depths)):
            if depth > done:
                x = layers.scan(self.blocks, x, lambda block, x, _: block(x), remat=remat, start=done, stop=depth)
            taps[depth], done = x, depth
        return taps

    def placed(self) -> Float[Array, "T D"]:
        """Position embeddings of class token, if any, and patches of the grid in use, interpolated in float32 if those
        of another grid are stored: T = P, or P + 1."""
        cfg, first, stored = self.cfg, int(self.cfg.cls), self.positions[...]
        if cfg.native == cfg.image_size:
            return stored
        matrix = jnp.asarray(resampling(cfg.native // cfg.patch, cfg.image_size // cfg.patch, cfg.antialias))
        stored = stored.astype(jnp.float32)
        side, product = math.isqrt(stored.shape[0]), functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
        grid = rearrange(stored[first:], "(h w) d -> h w d", h=side)
        grid = product("jw,iwd->ijd", matrix, product("ih,hwd->iwd", matrix, grid))
        return jnp.concatenate([stored[:first], rearrange(grid, "h w d -> (h w) d")])
