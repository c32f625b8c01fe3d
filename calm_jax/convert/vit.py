"""What the weight tables and configs of ViTs have in common."""

from __future__ import annotations

from typing import Any

from calm_jax import json_files
from calm_jax.convert import hf_config, tables
from calm_jax.models.vit import VitConfig


def geometry(found: json_files.Table, *, patch: int, eps: float) -> dict[str, Any]:
    """The fields of a `VitConfig`, less `mlp_width`, of a config.json, and with these defaults and those of ViT-B that
    transformers has for all families: in nested configs it writes only what differs."""
    return {"image_size": found.whole("image_size", 224, most=hf_config.PIXELS),
            "patch": found.whole("patch_size", patch, most=hf_config.PIXELS),
            "width": found.whole("hidden_size", 768, most=hf_config.CHANNELS),
            "depth": found.whole("num_hidden_layers", 12, most=hf_config.BLOCKS),
            "heads": found.whole("num_attention_heads", 12, most=hf_config.CHANNELS),
            "eps": found.number("layer_norm_eps", eps)}


def checks(found: json_files.Table, cfg: dict[str, Any]) -> list[tuple[bool, str]]:
    """For `hf_config.require`: what every ViT needs."""
    colours = found.whole("num_channels", 3)
    return [(colours == 3, f"num_channels is {colours} instead of 3"),
            (cfg["image_size"] % cfg["patch"] == 0,
             f"image_size {cfg['image_size']} is no multiple of patch_size {cfg['patch']}"),
            hf_config.heads(cfg)]


def activation(found: json_files.Table, known: dict[str, str], default: str) -> tuple[str, tuple[bool, str]]:
    """The activation of the MLP under our name, and the check that it has one; `known`: transformers' name -> ours."""
    act = found.text("hidden_act", default)
    return known.get(act, ""), (act in known, f"hidden_act is {act!r} instead of {' or '.join(known)}")


def published(cfg: VitConfig) -> dict[str, Any]:
    """The fields of a config.json that `geometry` reads. The image size is that of the position embeddings, which the
    published class interpolates when it is given images of another size."""
    return {"image_size": cfg.native, "patch_size": cfg.patch, "hidden_size": cfg.width,
            "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.heads, "layer_norm_eps": cfg.eps}


def stem(cfg: VitConfig, key: str) -> tuple[tables.Row, ...]:
    """The patch embedding, in torch a strided convolution."""
    sizes = (("c", 3), ("p", cfg.patch), ("q", cfg.patch))
    kernel = tables.Row("stem/embed/kernel", f"{key}.weight", tables.Rearrange("d c p q", "(p q c) d", sizes))
    return (kernel, tables.Row("stem/embed/bias", f"{key}.bias")) if cfg.stem_bias else (kernel,)


def blocks() -> tuple[tables.Row, ...]:
    """The blocks of CLIP and of SigLIP, which has CLIP's names."""
    block = "encoder.layers.{layer}"
    return (*tables.norm("blocks/attention_norm", f"{block}.layer_norm1"),
            *tables.linear("blocks/attention/q", f"{block}.self_attn.q_proj"),
            *tables.linear("blocks/attention/k", f"{block}.self_attn.k_proj"),
            *tables.linear("blocks/attention/v", f"{block}.self_attn.v_proj"),
            *tables.linear("blocks/attention/o", f"{block}.self_attn.out_proj"),
            *tables.norm("blocks/mlp_norm", f"{block}.layer_norm2"),
            *tables.linear("blocks/up", f"{block}.mlp.fc1"),
            *tables.linear("blocks/down", f"{block}.mlp.fc2"))
