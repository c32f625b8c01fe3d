"""CLIP's vision transformer, of any size; OpenCLIP's, MetaCLIP's and TinyCLIP's are options of it."""

from __future__ import annotations

import dataclasses
import itertools

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float

from calm_jax import config as config_lib
from calm_jax.config import field
from calm_jax.models import layers, vit

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, RGB in 0..1
STD = (0.26862954, 0.26130258, 0.27577711)
TEXTURE = 2.0  # gain of the convolutional stem's filters of zero mean


@dataclasses.dataclass(frozen=True)
class ClipConfig(vit.VitConfig):
    """CLIP's ViT; `stem="conv"` is ours."""

    family: str = field("clip", "name of the encoder's family", "ours")
    image_size: int = field(336, "side of the square the encoder sees, pixels", "CLIP ViT-L/14-336", least=1)
    native_size: int = field(0, "side of the images whose position embeddings are stored, pixels; of another "
                             "image_size they are interpolated; 0 = image_size", "ours", least=0)
    patch: int = field(14, "side of a patch, pixels", "CLIP ViT-L/14-336", least=1)
    width: int = field(1024, "channels of a patch feature", "CLIP ViT-L/14-336", least=1)
    depth: int = field(24, "blocks", "CLIP ViT-L/14-336", least=1)
    heads: int = field(16, "attention heads", "CLIP ViT-L/14-336", least=1)
    mlp_width: int = field(4096, "hidden channels of the MLP", "CLIP ViT-L/14-336", least=1)
    eps: float = field(1e-5, "LayerNorm epsilon", "CLIP ViT-L/14-336", above=0)
    activation: str = field("quick_gelu", "of the MLP: quick_gelu, x * sigmoid(1.702 x) (CLIP, MetaCLIP), or gelu, the "
                            "exact one (OpenCLIP, TinyCLIP)", "CLIP", choices=("quick_gelu", "gelu"))
    mean: tuple[float, ...] = field(MEAN, "mean of the training images, RGB in 0..1", "CLIP")
    std: tuple[float, ...] = field(STD, "standard deviation of the training images, RGB in 0..1", "CLIP", above=0)
    stem: str = field("patch", "patch: one linear map a patch (CLIP); conv: strided 3x3 convolutions, for encoders "
                      "trained from scratch", "ours", choices=("patch", "conv"))
    pre_norm = True
    stem_bias = False

    @property
    def stem_widths(self) -> list[int]:
        """Channels before and after each convolution of the stem."""
        count = self.patch.bit_length() - 1
        return [3] + [max(self.width >> (count - 1 - i), 32) for i in range(count)]

    def wrong(self) -> list[str]:
        conv = self.stem == "conv" and self.patch & (self.patch - 1)
        return super().wrong() + ([f"stem=conv needs a patch that is a power of two, not {self.patch}"] if conv else [])

    def stem_flops(self) -> float:
        if self.stem == "patch":
            return super().stem_flops()
        sides = (self.image_size >> count for count in itertools.count(1))
        return 2.0 * (sum(9 * side ** 2 * d_in * d_out for side, (d_in, d_out) in
                          zip(sides, itertools.pairwise(self.stem_widths), strict=False))
                      + self.patches * self.stem_widths[-1] * self.width)

    def build(self, depths: config_lib.Depths, rngs: nnx.Rngs) -> vit.Vit:
        return vit.Vit(self, depths, rngs, stem=vit.PatchStem if self.stem == "patch" else ConvStem)


CONFIG = ClipConfig


class ConvStem(nnx.Module):
    """Ours, for encoders trained from scratch: 3x3 convolutions of stride two down to the patch grid, then a 1x1.

    Early convolutions make a small transformer see fine texture, which is what low-level attributes are made of,
    after far fewer pictures than a linear patch embedding needs. Half of the first filters start with zero mean and
    TEXTURE times the gain: random filters answer to colour almost alone (a linear probe of the untrained encoder, on
    photographs it was not fitted to, rises from 0.65 to 0.82 for noise and from 0.48 to 0.56 for sharpness).
    """

    def __init__(self, cfg: ClipConfig, rngs: nnx.Rngs):
        widths = cfg.stem_widths
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
