"""The config.json of a Hugging Face model, or a Q-Former's tensor shapes, in; this project's config of it, out.

What this project does not compute (another activation, scaled rotary frequencies, biases) is refused, never ignored.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Mapping

from calm_jax import config as config_lib
from calm_jax import json_files
from calm_jax.errors import ConfigError

HEAD = 64  # channels of an attention head in BERT, from which every public Q-Former descends
BLOCK = re.compile(r"(?:(?:Qformer\.bert|qformer)\.)?encoder\.layer\.([0-9]{1,4})\.(.+)")
# No model comes near these; what is beyond them is damaged, and would take for ever.
CHANNELS, BLOCKS, PIXELS, TOKENS = 1 << 18, 1 << 10, 1 << 14, 1 << 26
WHOLE_QFORMERS = ("blip_2", "instructblip")  # models that keep their Q-Former's config inside of their own


class GeometryError(ConfigError):
    """A model that CALM cannot be assembled from; one sentence with every reason."""


def read(folder: pathlib.Path) -> json_files.Table:
    """The config.json of a folder, or of the folder of a weight file.

    Raises:
      GeometryError: it is missing or damaged, or is of weights that were quantised.
    """
    path = (folder if folder.is_dir() else folder.parent) / "config.json"
    found = json_files.table(path, error=GeometryError, remedy="it says what the weights beside it are: fetch it again")
    if "model_type" not in found:
        raise GeometryError(f"{path} names no model_type; it is no config of a transformers model")
    found.text("model_type")
    if "quantization_config" in found:
        raise GeometryError(f"{path} has a quantization_config: these weights were rounded to few bits; give the model "
                            "as it was before that, in float32, float16 or bfloat16")
    return found


def vit(found: json_files.Table) -> config_lib.Vit:
    """The encoder of a `clip` or `clip_vision_model` config."""
    kind = found.text("model_type")
    inner = found.table("vision_config") if kind == "clip" and "vision_config" in found else found
    # transformers writes only what differs from its defaults inside older nested configs
    act, colours = inner.text("hidden_act", "quick_gelu"), inner.whole("num_channels", 3)
    cfg = {"image_size": inner.whole("image_size", 224, most=PIXELS),
           "patch": inner.whole("patch_size", 32, most=PIXELS),
           "width": inner.whole("hidden_size", 768, most=CHANNELS),
           "depth": inner.whole("num_hidden_layers", 12, most=BLOCKS),
           "heads": inner.whole("num_attention_heads", 12, most=CHANNELS),
           "mlp_width": inner.whole("intermediate_size", 3072, most=CHANNELS),
           "eps": inner.number("layer_norm_eps", 1e-5)}
    _require(inner, "encoder", [
        (kind in ("clip", "clip_vision_model"), f"model_type is {kind!r} instead of clip or clip_vision_model"),
        (act == "quick_gelu", f"hidden_act is {act!r} instead of quick_gelu"),
        (colours == 3, f"num_channels is {colours} instead of 3"),
        (cfg["image_size"] % cfg["patch"] == 0,
         f"image_size {cfg['image_size']} is no multiple of patch_size {cfg['patch']}"),
        _heads(cfg)])
    return config_lib.Vit(**cfg)


def llama(found: json_files.Table) -> config_lib.Llama:
    """The language model of a `llama` config (Vicuna is one)."""
    kind, act = found.text("model_type"), found.text("hidden_act", "silu")
    if kind != "llama":  # its fields have other names then
        _require(found, "language model", [(False, f"model_type is {kind!r} instead of llama")])
    rope = [found.table(name) for name in ("rope_parameters", "rope_scaling") if name in found]
    scaled = [scale for table in rope for name in ("rope_type", "type")
              if (scale := table.text(name, "default")) != "default"]
    theta = next((table.number("rope_theta") for table in rope if "rope_theta" in table),
                 found.number("rope_theta", 1e4))
    turned = found.number("partial_rotary_factor", 1.0)
    width, heads = (found.whole(name, most=CHANNELS) for name in ("hidden_size", "num_attention_heads"))
    cfg = {"vocab": found.whole("vocab_size", most=TOKENS), "width": width,
           "depth": found.whole("num_hidden_layers", most=BLOCKS), "heads": heads,
           "kv_heads": found.whole("num_key_value_heads", heads, most=CHANNELS),
           "mlp_width": found.whole("intermediate_size", most=CHANNELS), "eps": found.number("rms_norm_eps", 1e-6),
           "rope_theta": theta, "positions": found.whole("max_position_embeddings", 2048, most=TOKENS)}
    head = found.whole("head_dim", width // heads, least=0, most=CHANNELS)
    _require(found, "language model", [
        (act == "silu", f"hidden_act is {act!r} instead of silu"),
        (not scaled, f"its rotary frequencies are scaled ({', '.join(map(repr, dict.fromkeys(scaled)))})"),
        (turned == 1, f"it turns a part of its channels alone (partial_rotary_factor {turned:g})"),
        (not any(found.flag(f"{name}_bias", False) for name in ("attention", "mlp")), "its linear layers have biases"),
        _heads(cfg),
        (head * heads == width or width % heads > 0, f"head_dim is {head}, not hidden_size / num_attention_heads"),
        (heads % cfg["kv_heads"] == 0,
         f"num_attention_heads {heads} is no multiple of num_key_value_heads {cfg['kv_heads']}")])
    return config_lib.Llama(**cfg)


def qformer(found: json_files.Table) -> config_lib.QFormer:
    """The Q-Former of a `blip_2`, `blip_2_qformer`, `instructblip` or `instructblip_qformer` config."""
    kind = found.text("model_type").replace("-", "_")
    inner = found.table("qformer_config", {}) if kind in WHOLE_QFORMERS else found
    act = inner.text("hidden_act", "gelu")
    cfg = {"width": inner.whole("hidden_size", 768, most=CHANNELS),
           "depth": inner.whole("num_hidden_layers", 12, most=BLOCKS),
           "heads": inner.whole("num_attention_heads", 12, most=CHANNELS),
           "mlp_width": inner.whole("intermediate_size", 3072, most=CHANNELS),
           "cross_every": inner.whole("cross_attention_frequency", 2, most=BLOCKS),
           "queries": found.whole("num_query_tokens", 32, most=CHANNELS), "eps": inner.number("layer_norm_eps", 1e-12)}
    _require(inner, "Q-Former", [
        (kind in (*WHOLE_QFORMERS, *(f"{name}_qformer" for name in WHOLE_QFORMERS)),
         f"model_type is {found.text('model_type')!r} instead of blip-2 or instructblip"),
        (act == "gelu", f"hidden_act is {act!r} instead of gelu"),
        (cfg["depth"] % cfg["cross_every"] == 0, f"num_hidden_layers {cfg['depth']} is no multiple of "
         f"cross_attention_frequency {cfg['cross_every']}"),
        _heads(cfg)])
    return config_lib.QFormer(**cfg)


def _heads(cfg: Mapping[str, int]) -> tuple[bool, str]:
    return (cfg["width"] % cfg["heads"] == 0,
            f"hidden_size {cfg['width']} is no multiple of num_attention_heads {cfg['heads']}")


def qformer_of(found: Mapping[str, tuple[int, ...]]) -> config_lib.QFormer:
    """The Q-Former whose tensors have these names and shapes, for files that come without a config, such as LAVIS's.

    Width and queries are those of `query_tokens`; depth, MLP and cross-attention are read off the blocks. Tensors do
    not tell the head size and the LayerNorm epsilon: they are BERT's, 64 and 1e-12, as in BLIP-2 and InstructBLIP.

    Args:
      found: name -> shape, in LAVIS's names or those of transformers; what is no part of a Q-Former is passed over.

    Raises:
      GeometryError: something does not follow from the tensors; one sentence with every reason.
    """
    blocks: dict[int, dict[str, tuple[int, ...]]] = {}
    for name, shape in found.items():
        if match := BLOCK.fullmatch(name):
            blocks.setdefault(int(match[1]), {})[match[2]] = tuple(shape)
    tokens = tuple(found.get("query_tokens", ()))
    known = len(tokens) == 3 and tokens[0] == 1
    lost = sorted(set(range(max(blocks, default=-1) + 1)) - blocks.keys())[:10]
    mlp = blocks.get(0, {}).get("intermediate_query.dense.weight", ())
    crossed = [n for n in sorted(blocks) if any(name.startswith("crossattention.") for name in blocks[n])]
    every = crossed[1] - crossed[0] if len(crossed) > 1 else max(len(blocks), 1)
    regular = len(blocks) % every == 0 and crossed == list(range(0, len(blocks), every))
    wrong = [reason for holds, reason in [
        (known, f"query_tokens is {tokens}, not (1, queries, width)" if tokens else "it holds no query_tokens"),
        (not known or tokens[2] % HEAD == 0, f"its width {tokens[-1] if tokens else 0} is no multiple of {HEAD}, the "
         "channels of BERT's attention heads"),
        (bool(blocks), "it holds no blocks encoder.layer.N"),
        (not lost, f"of its {max(blocks, default=0) + 1} blocks {', '.join(map(str, lost))} are not there"),
        (not blocks or len(mlp) == 2, "its first block has no intermediate_query.dense.weight, the MLP of the queries"),
        (bool(lost) or regular,
         f"cross-attention stands in the blocks {crossed} of {len(blocks)}, not in the first of every so many"),
    ] if not holds]
    if wrong:
        raise GeometryError(f"there is no config.json beside these tensors, and no Q-Former's geometry follows from "
                            f"them: {'; '.join(wrong)}; give a whole Q-Former, or its folder with a config.json")
    return config_lib.QFormer(width=tokens[2], depth=len(blocks), heads=tokens[2] // HEAD, mlp_width=mlp[0],
                              cross_every=every, queries=tokens[1], eps=1e-12)


def _require(found: json_files.Table, what: str, checks: list[tuple[bool, str]]) -> None:
    wrong = [reason for holds, reason in checks if not holds]
    if wrong:
        raise GeometryError(f"{found.name}: this {what} is not of a kind that CALM computes: {'; '.join(wrong)}; give "
                            "another model")
