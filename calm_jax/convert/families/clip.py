"""CLIP's vision transformer: `models.encoders.clip` and CLIPVisionModel, which CLIPModel contains."""

from __future__ import annotations

from typing import Any

from calm_jax import json_files
from calm_jax.convert import hf_config, tables
from calm_jax.convert.families import Family
from calm_jax.models.encoders.clip import ClipConfig


def config(found: json_files.Table) -> ClipConfig:
    """The encoder of a `clip` or `clip_vision_model` config."""
    kind = found.text("model_type")
    inner = found.table("vision_config") if kind == "clip" and "vision_config" in found else found
    # transformers writes only what differs from its defaults inside older nested configs
    act, colours = inner.text("hidden_act", "quick_gelu"), inner.whole("num_channels", 3)
    cfg = {"image_size": inner.whole("image_size", 224, most=hf_config.PIXELS),
           "patch": inner.whole("patch_size", 32, most=hf_config.PIXELS),
           "width": inner.whole("hidden_size", 768, most=hf_config.CHANNELS),
           "depth": inner.whole("num_hidden_layers", 12, most=hf_config.BLOCKS),
           "heads": inner.whole("num_attention_heads", 12, most=hf_config.CHANNELS),
           "mlp_width": inner.whole("intermediate_size", 3072, most=hf_config.CHANNELS),
           "eps": inner.number("layer_norm_eps", 1e-5)}
    hf_config.require(inner, "encoder", [
        (act == "quick_gelu", f"hidden_act is {act!r} instead of quick_gelu"),
        (colours == 3, f"num_channels is {colours} instead of 3"),
        (cfg["image_size"] % cfg["patch"] == 0,
         f"image_size {cfg['image_size']} is no multiple of patch_size {cfg['patch']}"),
        hf_config.heads(cfg)])
    return ClipConfig(**cfg)


def table(cfg: ClipConfig) -> tables.Table:
    """`models.encoders.clip.Clip` and CLIPVisionModel; reads CLIPModel too, with and without the `vision_model.` level.

    The convolutional stem is ours; its torch names are `embeddings.stem.N`, an `nn.Conv2d` each but the last, linear.
    """
    if cfg.stem == "patch":
        sizes = (("c", 3), ("p", cfg.patch), ("q", cfg.patch))
        stem = (tables.Row("stem/embed/kernel", "embeddings.patch_embedding.weight",
                           tables.Rearrange("d c p q", "(p q c) d", sizes)),)
    else:
        count = cfg.patch.bit_length() - 1
        stem = (*(row for n in range(count) for row in (
                    tables.Row(f"stem/kernels/{n}", f"embeddings.stem.{n}.weight", tables.CONV),
                    tables.Row(f"stem/biases/{n}", f"embeddings.stem.{n}.bias"))),
                *tables.linear("stem/embed", f"embeddings.stem.{count}"))
    block = "encoder.layers.{layer}"
    return tables.Table(
        rows=(
            *stem,
            tables.Row("cls", "embeddings.class_embedding"),
            tables.Row("positions", "embeddings.position_embedding.weight"),
            *tables.norm("pre_norm", "pre_layrnorm"),  # the misspelling is CLIP's
            *tables.norm("blocks/attention_norm", f"{block}.layer_norm1"),
            *tables.linear("blocks/attention/q", f"{block}.self_attn.q_proj"),
            *tables.linear("blocks/attention/k", f"{block}.self_attn.k_proj"),
            *tables.linear("blocks/attention/v", f"{block}.self_attn.v_proj"),
            *tables.linear("blocks/attention/o", f"{block}.self_attn.out_proj"),
            *tables.norm("blocks/mlp_norm", f"{block}.layer_norm2"),
            *tables.linear("blocks/up", f"{block}.mlp.fc1"),
            *tables.linear("blocks/down", f"{block}.mlp.fc2"),
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


def published(cfg: ClipConfig, special: dict[str, int]) -> dict[str, Any] | None:
    """The convolutional stem is in no published class."""
    if cfg.stem != "patch":
        return None
    return {"architectures": ["CLIPVisionModel"], "model_type": "clip_vision_model", "hidden_act": "quick_gelu",
            "image_size": cfg.image_size, "patch_size": cfg.patch, "hidden_size": cfg.width,
            "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.heads, "intermediate_size": cfg.mlp_width,
            "layer_norm_eps": cfg.eps}


# Under `vision_model.` old and new transformers find the tensors.
FAMILY = Family("encoder", ("clip", "clip_vision_model"), config, table, published, "vision_model.")
