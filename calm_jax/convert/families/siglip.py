"""SigLIP's vision transformer: `models.encoders.siglip` and SiglipVisionModel, which SiglipModel contains."""

from __future__ import annotations

from typing import Any

from calm_jax import json_files
from calm_jax.convert import hf_config, tables, vit
from calm_jax.convert.families import Family
from calm_jax.models.encoders.siglip import SiglipConfig


def config(found: json_files.Table) -> SiglipConfig:
    """The encoder of a `siglip` or `siglip_vision_model` config; that of SigLIP 2, where images are squares of one
    size, has the same types.

    Of an image size that is no multiple of the patch (384 of 14, so400m) torch's patch convolution never reads the
    rest at the right and the bottom: the size is the multiple below, whose tokens are the same.
    """
    kind = found.text("model_type")
    inner = found.table("vision_config") if kind == "siglip" and "vision_config" in found else found
    cfg = vit.geometry(inner, patch=16, eps=1e-6)
    cfg["image_size"] -= cfg["image_size"] % cfg["patch"]
    _, known = vit.activation(inner, {"gelu_pytorch_tanh": "gelu_tanh"}, "gelu_pytorch_tanh")
    hf_config.require(inner, "encoder", [
        known, (cfg["image_size"] > 0, "image_size is smaller than patch_size"), *vit.checks(inner, cfg)])
    return SiglipConfig(**cfg, mlp_width=inner.whole("intermediate_size", 3072, most=hf_config.CHANNELS))


def table(cfg: SiglipConfig) -> tables.Table:
    """`models.encoders.siglip` and SiglipVisionModel; reads SiglipModel too, with and without the `vision_model.`
    level."""
    return tables.Table(
        rows=(
            *vit.stem(cfg, "embeddings.patch_embedding"),
            tables.Row("positions", "embeddings.position_embedding.weight"),
            *vit.blocks(),
        ),
        renames=((r"^vision_model\.", ""),),
        ignored=(
            tables.Ignored(r"(post_layernorm|head)\..*", "the pooled output plays no part in CALM"),
            tables.Ignored(r"embeddings\.position_ids", "a buffer that older transformers saved: 0, 1, 2, ..."),
            tables.Ignored(r"(text_model\..*|logit_scale|logit_bias)", "SigLIP's text side and contrastive head"),
        ),
        constants=(tables.Constant("post_layernorm.weight", "embeddings.patch_embedding.bias", 1.0),
                   tables.Constant("post_layernorm.bias", "embeddings.patch_embedding.bias", 0.0)),
    )


def published(cfg: SiglipConfig, special: dict[str, int | None]) -> dict[str, Any]:
    """The config.json of a SiglipVisionModel without its pooling head, which CALM does not keep."""
    return {"architectures": ["SiglipVisionModel"], "model_type": "siglip_vision_model",
            "hidden_act": "gelu_pytorch_tanh", "vision_use_head": False, "intermediate_size": cfg.mlp_width,
            **vit.published(cfg)}


# Under `vision_model.` old and new transformers find the tensors.
FAMILY = Family("encoder", ("siglip", "siglip_vision_model"), config, table, published, "vision_model.",
                "SiglipImageProcessor")
