"""CLIP's vision transformer: images in, patch features at a few depths out."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange, repeat
from flax import nnx
from jaxtyping import Array, Float, UInt8

from calm_jax import config as config_lib
from calm_jax.config import field
from calm_jax.models import layers
from calm_jax.models.attention import Attention
from calm_jax.models.encoders import Feature

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
TEXTURE = 2.0  # gain of the convolutional stem's filters of zero mean


def normalise(images: UInt8[Array, "... H W 3"], dtype: jnp.dtype) -> Float[Array, "... H W 3"]:
    """RGB 0..255 -> zero mean and unit variance over CLIP's training pictures, in `dtype`."""
    scaled = images.astype(jnp.float32) / 255.0
    return ((scaled - jnp.asarray(MEAN)) / jnp.asarray(STD)).astype(dtype)


@dataclasses.dataclass(frozen=True)
class ClipConfig(config_lib.Encoder):
    """CLIP's ViT; `stem="conv"` is ours."""

    family: str = field("clip", "name of the encoder's family", "ours")
    image_size: int = field(336, "side of the square the encoder sees, pixels", "CLIP ViT-L/14-336", least=1)
    patch: int = field(14, "side of a patch, pixels", "CLIP ViT-L/14-336", least=1)
    width: int = field(1024, "channels of a patch feature", "CLIP ViT-L/14-336", least=1)
    depth: int = field(24, "blocks", "CLIP ViT-L/14-336", least=1)
    heads: int = field(16, "attention heads", "CLIP ViT-L/14-336", least=1)
    mlp_width: int = field(4096, "hidden channels of the MLP", "CLIP ViT-L/14-336", least=1)
    eps: float = field(1e-5, "LayerNorm epsilon", "CLIP ViT-L/14-336", above=0)
    stem: str = field("patch", "patch: one linear map a patch (CLIP); conv: strided 3x3 convolutions, for encoders "
                      "trained from scratch", "ours", choices=("patch", "conv"))

    @property
    def patches(self) -> int:
        """P: patch features of an image, CLS not counted."""
        return (self.image_size // self.patch) ** 2

    @property
    def mean(self) -> tuple[float, float, float]:
        return MEAN

    @property
    def std(self) -> tuple[float, float, float]:
        return STD

    def part(self, part: str) -> config_lib.PartFeatures:
        """The patches behind a class token, alike at every depth."""
        return config_lib.PartFeatures(self.width, self.patches + 1, prefix=1)

    def wrong(self) -> list[str]:
        checks = (
            (self.image_size % self.patch == 0, f"image_size={self.image_size} is no multiple of patch={self.patch}"),
            (self.width % self.heads == 0, f"width={self.width} is no multiple of heads={self.heads}"),
            (self.stem != "conv" or self.patch & (self.patch - 1) == 0,
             f"stem=conv needs a patch that is a power of two, not {self.patch}"))
        return [message for holds, message in checks if not holds]

    def build(self, depths: config_lib.Depths, rngs: nnx.Rngs) -> Clip:
        return Clip(self, depths, rngs)


CONFIG = ClipConfig


class Block(nnx.Module):
    """Pre-norm transformer block with CLIP's quick-GELU, x * sigmoid(1.702 x)."""

    def __init__(self, cfg: ClipConfig, rngs: nnx.Rngs):
        self.attention_norm = layers.LayerNorm(cfg.width, cfg.eps)
        self.attention = Attention(cfg.width, cfg.heads, rngs)
        self.mlp_norm = layers.LayerNorm(cfg.width, cfg.eps)
        self.up = layers.Linear(cfg.width, cfg.mlp_width, bias=True, rngs=rngs)
        self.down = layers.Linear(cfg.mlp_width, cfg.width, bias=True, rngs=rngs, gain=(2 * cfg.depth) ** -0.5)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        x = x + self.attention(self.attention_norm(x))
        y = self.up(self.mlp_norm(x))
        return x + self.down(y * jax.nn.sigmoid(1.702 * y))


class PatchStem(nnx.Module):
    """CLIP's stem: one linear map of the pixels of a patch, without bias. kernel `[patch * patch * 3, D]`."""

    def __init__(self, cfg: ClipConfig, rngs: nnx.Rngs):
        self.patch = cfg.patch
        self.embed = layers.Linear(cfg.patch * cfg.patch * 3, cfg.width, bias=False, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        return self.embed(rearrange(images, "b (h p) (w q) c -> b (h w) (p q c)", p=self.patch, q=self.patch))


class ConvStem(nnx.Module):
    """Ours, for encoders trained from scratch: 3x3 convolutions of stride two down to the patch grid, then a 1x1.

    Early convolutions make a small transformer see fine texture, which is what low-level attributes are made of,
    after far fewer pictures than a linear patch embedding needs. Half of the first filters start with zero mean and
    TEXTURE times the gain: random filters answer to colour almost alone (a linear probe of the untrained encoder, on
    photographs it was not fitted to, rises from 0.65 to 0.82 for noise and from 0.48 to 0.56 for sharpness).
    """

    def __init__(self, cfg: ClipConfig, rngs: nnx.Rngs):
        count = cfg.patch.bit_length() - 1
        widths = [3] + [max(cfg.width >> (count - 1 - i), 32) for i in range(count)]
        make = nnx.initializers.he_normal()
        kernels = [make(rngs.params(), (3, 3, d_in, d_out)) for d_in, d_out in itertools.pairwise(widths)]
        colour, texture = jnp.split(kernels[0], 2, -1)
        kernels[0] = jnp.concatenate([colour, TEXTURE * (texture - texture.mean((0, 1), keepdims=True))], -1)
        self.kernels = nnx.List([nnx.Param(kernel) for kernel in kernels])
        self.biases = nnx.List([nnx.Param(jnp.zeros(width)) for width in widths[1:]])
        self.embed = layers.Linear(widths[-1], cfg.width, bias=True, rngs=rngs)

    def __call__(self, images: Float[Array, "B H W 3"]) -> Float[Array, "B P D"]:
        x = images
        for kernel, bias in zip(self.kernels, self.biases, strict=True):
            x = jax.lax.conv_general_dilated(x, kernel[...].astype(x.dtype), (2, 2), ((0, 1), (0, 1)),
                                             dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = jax.nn.gelu(x + bias[...].astype(x.dtype))
        return self.embed(rearrange(x, "b h w c -> b (h w) c"))


class Clip(nnx.Module):
    """The encoder up to the deepest block that is read; CLIP's pooled output and its norm play no part in CALM."""

    def __init__(self, cfg: ClipConfig, depths: config_lib.Depths, rngs: nnx.Rngs):
        self.cfg, self.depths = cfg, depths
        self.stem = (PatchStem if cfg.stem == "patch" else ConvStem)(cfg, rngs)
        normal = nnx.initializers.normal(0.2)  # ours: where a patch lies should be seen from the first step on
        self.cls = nnx.Param(normal(rngs.params(), (cfg.width,)))
        self.positions = nnx.Param(normal(rngs.params(), (cfg.patches + 1, cfg.width)))
        self.pre_norm = layers.LayerNorm(cfg.width, cfg.eps)
        self.blocks = layers.stack(lambda rngs: Block(cfg, rngs), cfg.depth, rngs)

    def features(self, images: UInt8[Array, "B H W 3"], parts: tuple[str, ...], *, dtype: Any,
                 remat: str = "none") -> dict[str, Feature]:
        """See `models.encoders.Encoder`: each part reads the depth that the config's `depths` give it, CLS first."""
        blocks = {part: self.depths.block(part, self.cfg.depth) for part in parts}
        states = self.hidden_states(normalise(images, dtype), tuple(blocks.values()), remat=remat)
        return {part: Feature(states[block], 1) for part, block in blocks.items()}

    def hidden_states(self, images: Float[Array, "B H W 3"], depths: tuple[int, ...], *,
                      remat: str = "none") -> dict[int, Float[Array, "B S D"]]:
        """Hidden states after `depths` blocks (0 = before the first), CLS first: S = P + 1.

        Blocks after the deepest depth are not run. Depth d is `hidden_states[d]` of CLIPVisionModel.
        """
        patches = self.stem(images)
        cls = repeat(self.cls[...].astype(patches.dtype), "d -> b 1 d", b=patches.shape[0])
        x = jnp.concatenate([cls, patches], 1) + self.positions[...].astype(patches.dtype)
        x = self.pre_norm(x)
        taps, done = {}, 0
        for depth in sorted(set(depths)):
            if depth > done:
                x = layers.scan(self.blocks, x, lambda block, x, _: block(x), remat=remat, start=done, stop=depth)
            taps[depth], done = x, depth
        return taps
