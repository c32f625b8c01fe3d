"""SigLIP's vision transformers, and those of SigLIP 2 that see squares of one size."""

from __future__ import annotations

import dataclasses

from calm_jax.config import field
from calm_jax.models import vit


@dataclasses.dataclass(frozen=True)
class SiglipConfig(vit.VitConfig):
    """SigLIP's ViT: no class token; its pooling head plays no part in CALM."""

    family: str = field("siglip", "name of the encoder's family", "ours")
    image_size: int = field(224, "side of the square the encoder sees, pixels", "SigLIP ViT-B/16-224", least=1)
    native_size: int = field(0, "side of the images whose position embeddings are stored, pixels; of another "
                             "image_size they are interpolated; 0 = image_size", "ours", least=0)
    patch: int = field(16, "side of a patch, pixels", "SigLIP ViT-B/16-224", least=1)
    width: int = field(768, "channels of a patch feature", "SigLIP ViT-B/16-224", least=1)
    depth: int = field(12, "blocks", "SigLIP ViT-B/16-224", least=1)
    heads: int = field(12, "attention heads", "SigLIP ViT-B/16-224", least=1)
    mlp_width: int = field(3072, "hidden channels of the MLP", "SigLIP ViT-B/16-224", least=1)
    eps: float = field(1e-6, "LayerNorm epsilon", "SigLIP ViT-B/16-224", above=0)
    mean: tuple[float, ...] = field((0.5, 0.5, 0.5), "mean that images are normalised by, RGB in 0..1", "SigLIP")
    std: tuple[float, ...] = field((0.5, 0.5, 0.5), "standard deviation that images are normalised by, RGB in 0..1",
                                   "SigLIP", above=0)
    activation = "gelu_tanh"
    cls = False


CONFIG = SiglipConfig
