"""DINOv2's vision transformers, with and without registers."""

from __future__ import annotations

import dataclasses

from calm_jax.config import field
from calm_jax.models import vit


@dataclasses.dataclass(frozen=True)
class Dinov2Config(vit.VitConfig):
    """DINOv2's ViT: its blocks multiply their branches by learned vectors (LayerScale)."""

    family: str = field("dinov2", "name of the encoder's family", "ours")
    image_size: int = field(518, "side of the square the encoder sees, pixels", "DINOv2 ViT-S/14", least=1)
    native_size: int = field(0, "side of the images whose position embeddings are stored, pixels; of another "
                             "image_size they are interpolated; 0 = image_size", "ours", least=0)
    patch: int = field(14, "side of a patch, pixels", "DINOv2 ViT-S/14", least=1)
    width: int = field(384, "channels of a patch feature", "DINOv2 ViT-S/14", least=1)
    depth: int = field(12, "blocks", "DINOv2 ViT-S/14", least=1)
    heads: int = field(6, "attention heads", "DINOv2 ViT-S/14", least=1)
    mlp_width: int = field(1536, "hidden channels of the MLP", "DINOv2 ViT-S/14", least=1)
    eps: float = field(1e-6, "LayerNorm epsilon", "DINOv2 ViT-S/14", above=0)
    activation: str = field("gelu", "of the MLP: gelu, the exact one, or swiglu, a gated MLP (DINOv2 ViT-g/14)",
                            "DINOv2 ViT-S/14", choices=("gelu", "swiglu"))
    registers: int = field(0, "tokens after the class token that stand for no place in the image; 4 with registers",
                           "DINOv2 ViT-S/14", least=0)
    mean: tuple[float, ...] = field((0.485, 0.456, 0.406), "mean of the training images, RGB in 0..1", "ImageNet")
    std: tuple[float, ...] = field((0.229, 0.224, 0.225), "standard deviation of the training images, RGB in 0..1",
                                   "ImageNet", above=0)
    layer_scale = True

    @property
    def antialias(self) -> bool:
        """The models with registers were trained with antialiased position embeddings."""
        return self.registers > 0


CONFIG = Dinov2Config
