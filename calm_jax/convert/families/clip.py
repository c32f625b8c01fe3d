"""CLIP's vision transformer: `models.encoders.clip` and CLIPVisionModel, which CLIPModel contains."""

from __future__ import annotations

from typing import Any

from calm_jax import json_files
from calm_jax.convert import hf_config, tables, vit
from calm_jax.convert.families import Family
from calm_jax.models.encoders.clip import ClipConfig


def config(found: json_files.Table) -> ClipConfig:
    """The encoder of a `clip` or `clip_vision_model` config."""
    kind = found.text("model_type")
    inner = found.table("vision_config") if kind == "clip" and "vision_config" in found else found
    cfg = vit.geometry(inner, patch=32, eps=1e-5)
    activation, known = vit.activation(inner, {"quick_gelu": "quick_gelu", "gelu": "gelu"}, "quick_gelu")
    hf_config.require(inner, "encoder", [known, *vit.checks(inner, cfg)])
    return ClipConfig(**cfg, mlp_width=inner.whole("intermediate_size", 3072, most=hf_config.CHANNELS),
                      activation=activation)


def table(cfg: ClipConfig) -> tables.Table:
    """`models.encoders.clip` and CLIPVisionModel; reads CLIPModel too, with and without the `vision_model.` level.

    The convolutional stem is ours; its torch names are `embeddings.stem.N`, an `nn.Conv2d` each but the last, linear.
    """
    if cfg.stem == "patch":
        stem = vit.stem(cfg, "embeddings.patch_embedding")
    else:
        count = cfg.patch.bit_length() - 1
        stem = (*(row for n in range(count) for row in (
                    tables.Row(f"stem/kernels/{n}", f"embeddings.stem.{n}.weight", tables.CONV),
                    tables.Row(f"stem/biases/{n}", f"embeddings.stem.{n}.bias"))),
                *tables.linear("stem/embed", f"embeddings.stem.{count}"))
    return tables.Table(
        rows=(
            *stem,
            tables.Row("cls", "embeddings.class_embedding"),
            tables.Row("positions", "embeddings.position_embedding.weight"),
            *tables.norm("pre_norm", "pre_layrnorm"),  # the misspelling is CLIP's
            *vit.blocks(),
        ),
        renames=((r"^vision_model\.", ""),),
        ignored=(
            tables.Ignored(r"post_layernorm\.(weight|bias)", "the pooled output plays no part in CALM"),
            tables.Ignored(r"embeddings\.position_ids", "a buffer that older transformers saved: 0, 1, 2, ..."),
            tables.Ignored(r"(text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)",
                           "CLIP's text side and contrastive head"),
        ),
        constants=(tables.Constant("post_layernorm.weight", "pre_layrnorm.weight", 1.0),
                   tables.Constant("post_layernorm.bias", "pre_layrnorm.bias", 0.0)),
    )


def published(cfg: ClipConfig, special: dict[str, int | None]) -> dict[str, Any] | None:
    """The convolutional stem is in no published class."""
    if cfg.stem != "patch":
        return None
    return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": cfg.activation,
            "intermediate_size": cfg.mlp_width, **vit.published(cfg)}


# Under `vision_model.` old and new transformers find the tensors.
FAMILY = Family("encoder", ("clip", "clip_vision_model"), config, table, published, "vision_model.",
                "CLIPImageProcessor")
