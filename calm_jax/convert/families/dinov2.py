"""DINOv2's vision transformers: `models.encoders.dinov2`, and Dinov2Model and Dinov2WithRegistersModel."""

from __future__ import annotations

from typing import Any

from calm_jax import json_files
from calm_jax.convert import hf_config, tables, vit
from calm_jax.convert.families import Family
from calm_jax.models.encoders.dinov2 import Dinov2Config

RATIOS = range(1, 65)  # of the MLP's hidden channels to the others; published models have 4


def config(found: json_files.Table) -> Dinov2Config:
    """The encoder of a `dinov2` or `dinov2_with_registers` config."""
    registers = found.text("model_type") == "dinov2_with_registers"
    gated = found.flag("use_swiglu_ffn", False)
    cfg = vit.geometry(found, patch=16 if registers else 14, eps=1e-6)
    activation, known = ("swiglu", (True, "")) if gated else vit.activation(found, {"gelu": "gelu"}, "gelu")
    ratio = found.number("mlp_ratio", 4)
    hf_config.require(found, "encoder", [
        known, (found.flag("qkv_bias", True), "its queries, keys and values have no bias"),
        (1 <= cfg["width"] * ratio <= hf_config.CHANNELS, f"mlp_ratio is {ratio:g}"), *vit.checks(found, cfg)])
    return Dinov2Config(**cfg, mlp_width=_mlp_width(cfg["width"], ratio, gated), activation=activation,
                        registers=found.whole("num_register_tokens", 4, most=hf_config.CHANNELS) if registers else 0)


def _mlp_width(width: int, ratio: float, gated: bool) -> int:
    """Hidden channels of the MLP; a gated one has two thirds of them, rounded up to a multiple of eight."""
    hidden = int(width * ratio)
    return (int(hidden * 2 / 3) + 7) // 8 * 8 if gated else hidden


def table(cfg: Dinov2Config) -> tables.Table:
    """`models.encoders.dinov2` and Dinov2Model or Dinov2WithRegistersModel, by the names in published files; reads the
    models that contain them, too."""
    block, registers = "encoder.layer.{layer}", ()
    if cfg.registers:
        registers = (tables.Row("registers", "embeddings.register_tokens", tables.Rearrange("1 n d", "n d")),)
    if cfg.activation == "swiglu":
        mlp = (tables.Row("blocks/up/kernel", f"{block}.mlp.weights_in.weight",
                          tables.Rearrange("(g m) d", "g d m", (("g", 2),))),
               tables.Row("blocks/up/bias", f"{block}.mlp.weights_in.bias",
                          tables.Rearrange("(g m)", "g m", (("g", 2),))),
               *tables.linear("blocks/down", f"{block}.mlp.weights_out"))
    else:
        mlp = (*tables.linear("blocks/up", f"{block}.mlp.fc1"), *tables.linear("blocks/down", f"{block}.mlp.fc2"))
    return tables.Table(
        rows=(
            *vit.stem(cfg, "embeddings.patch_embeddings.projection"),
            tables.Row("cls", "embeddings.cls_token", tables.Rearrange("1 1 d", "d")),
            *registers,
            tables.Row("positions", "embeddings.position_embeddings", tables.Rearrange("1 n d", "n d")),
            *tables.norm("blocks/attention_norm", f"{block}.norm1"),
            *tables.linear("blocks/attention/q", f"{block}.attention.attention.query"),
            *tables.linear("blocks/attention/k", f"{block}.attention.attention.key"),
            *tables.linear("blocks/attention/v", f"{block}.attention.attention.value"),
            *tables.linear("blocks/attention/o", f"{block}.attention.output.dense"),
            tables.Row("blocks/attention_scale/scale", f"{block}.layer_scale1.lambda1"),
            *tables.norm("blocks/mlp_norm", f"{block}.norm2"),
            *mlp,
            tables.Row("blocks/mlp_scale/scale", f"{block}.layer_scale2.lambda1"),
        ),
        renames=((r"^(dinov2|dinov2_with_registers|backbone)\.", ""),),
        ignored=(
            tables.Ignored(r"layernorm\.(weight|bias)", "no depth that CALM reads has the last norm"),
            tables.Ignored(r"embeddings\.mask_token", "stands for hidden patches, in DINOv2's own training alone"),
            tables.Ignored(r"classifier\.(weight|bias)", "the head of an image classifier"),
        ),
        constants=(tables.Constant("embeddings.mask_token", "embeddings.patch_embeddings.projection.bias", 0.0, lead=1),
                   tables.Constant("layernorm.weight", "embeddings.patch_embeddings.projection.bias", 1.0),
                   tables.Constant("layernorm.bias", "embeddings.patch_embeddings.projection.bias", 0.0)),
    )


def published(cfg: Dinov2Config, special: dict[str, int | None]) -> dict[str, Any] | None:
    """The published classes name the MLP's width by its whole ratio to the others, and have no other widths."""
    gated = cfg.activation == "swiglu"
    ratio = next((ratio for ratio in RATIOS if _mlp_width(cfg.width, ratio, gated) == cfg.mlp_width), None)
    if ratio is None:
        return None
    kind = {"architectures": ["Dinov2Model"], "model_type": "dinov2"}
    if cfg.registers:
        kind = {"architectures": ["Dinov2WithRegistersModel"], "model_type": "dinov2_with_registers",
                "num_register_tokens": cfg.registers}
    return {**kind, "hidden_act": "gelu", "use_swiglu_ffn": gated, "mlp_ratio": ratio, "qkv_bias": True,
            **vit.published(cfg)}


FAMILY = Family("encoder", ("dinov2", "dinov2_with_registers"), config, table, published,
                image_processor="BitImageProcessor")
