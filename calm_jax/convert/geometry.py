"""The config.json of a Hugging Face model, or a Q-Former's tensor shapes, in; this project's config of it, out.

What this project does not compute (another activation, scaled rotary frequencies, biases) is refused, never ignored.
"""

from __future__ import annotations

import json
import pathlib
import re
from collections.abc import Mapping
from typing import Any

from calm_jax import config as config_lib

Json = Mapping[str, Any]
HEAD = 64  # channels of an attention head in BERT, from which every public Q-Former descends
BLOCK = re.compile(r"(?:(?:Qformer\.bert|qformer)\.)?encoder\.layer\.(\d+)\.(.+)")


class GeometryError(config_lib.ConfigError):
    """A model that CALM cannot be assembled from; one sentence with every reason."""


def read(folder: pathlib.Path) -> Json:
    """The config.json of a folder, or of the folder of a weight file.

    Raises:
      GeometryError: it is missing or damaged.
    """
    path = (folder if folder.is_dir() else folder.parent) / "config.json"
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise GeometryError(f"{path} is missing, which says what the weights beside it are; fetch it too") from None
    except ValueError:
        raise GeometryError(f"{path} is damaged; fetch it again") from None
    if not isinstance(found, dict) or "model_type" not in found:
        raise GeometryError(f"{path} names no model_type; it is no config of a transformers model")
    return found


def vit(found: Json) -> config_lib.Vit:
    """The encoder of a `clip` or `clip_vision_model` config."""
    inner = found.get("vision_config", found) if found["model_type"] == "clip" else found
    # transformers writes only what differs from its defaults inside older nested configs
    value = {"hidden_act": "quick_gelu", "image_size": 224, "patch_size": 32, "hidden_size": 768,
             "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072, "layer_norm_eps": 1e-5,
             "num_channels": 3} | dict(inner)
    _require("encoder", [
        (found["model_type"] in ("clip", "clip_vision_model"),
         f"model_type is {found['model_type']!r} instead of clip or clip_vision_model"),
        (value["hidden_act"] == "quick_gelu", f"hidden_act is {value['hidden_act']!r} instead of quick_gelu"),
        (value["num_channels"] == 3, f"num_channels is {value['num_channels']} instead of 3")])
    return config_lib.Vit(
        image_size=value["image_size"], patch=value["patch_size"], width=value["hidden_size"],
        depth=value["num_hidden_layers"], heads=value["num_attention_heads"], mlp_width=value["intermediate_size"],
        eps=float(value["layer_norm_eps"]))


def llama(found: Json) -> config_lib.Llama:
    """The language model of a `llama` config (Vicuna is one)."""
    value = {"num_key_value_heads": found.get("num_attention_heads"), "hidden_act": "silu", "rms_norm_eps": 1e-6,
             "max_position_embeddings": 2048} | {k: v for k, v in found.items() if v is not None}
    rope = {"rope_theta": value.get("rope_theta", 1e4), "rope_type": "default"} | dict(
        value.get("rope_parameters") or value.get("rope_scaling") or {})
    head = value.get("head_dim")
    _require("language model", [
        (value["model_type"] == "llama", f"model_type is {value['model_type']!r} instead of llama"),
        (value["hidden_act"] == "silu", f"hidden_act is {value['hidden_act']!r} instead of silu"),
        (rope.get("rope_type", rope.get("type")) == "default",
         f"its rotary frequencies are scaled ({rope.get('rope_type', rope.get('type'))!r})"),
        (not value.get("attention_bias") and not value.get("mlp_bias"), "its linear layers have biases"),
        (head is None or head * value.get("num_attention_heads", 0) == value.get("hidden_size"),
         f"head_dim is {head}, not hidden_size / num_attention_heads")])
    return config_lib.Llama(
        vocab=value["vocab_size"], width=value["hidden_size"], depth=value["num_hidden_layers"],
        heads=value["num_attention_heads"], kv_heads=value["num_key_value_heads"],
        mlp_width=value["intermediate_size"], eps=float(value["rms_norm_eps"]), rope_theta=float(rope["rope_theta"]),
        positions=value["max_position_embeddings"])


def qformer(found: Json) -> config_lib.QFormer:
    """The Q-Former of a `blip_2`, `blip_2_qformer`, `instructblip` or `instructblip_qformer` config."""
    kind = found["model_type"]
    inner = dict(found.get("qformer_config") or {}) if kind in ("blip_2", "blip-2", "instructblip") else dict(found)
    value = {"hidden_act": "gelu", "hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12,
             "intermediate_size": 3072, "cross_attention_frequency": 2, "layer_norm_eps": 1e-12} | inner
    _require("Q-Former", [
        (kind.replace("-", "_") in ("blip_2", "blip_2_qformer", "instructblip", "instructblip_qformer"),
         f"model_type is {kind!r} instead of blip-2 or instructblip"),
        (value["hidden_act"] == "gelu", f"hidden_act is {value['hidden_act']!r} instead of gelu")])
    return config_lib.QFormer(
        width=value["hidden_size"], depth=value["num_hidden_layers"], heads=value["num_attention_heads"],
        mlp_width=value["intermediate_size"], cross_every=value["cross_attention_frequency"],
        queries=found.get("num_query_tokens", 32), eps=float(value["layer_norm_eps"]))


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
    lost = sorted(set(range(max(blocks, default=-1) + 1)) - blocks.keys())
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


def _require(what: str, checks: list[tuple[bool, str]]) -> None:
    wrong = [reason for holds, reason in checks if not holds]
    if wrong:
        raise GeometryError(f"this {what} is not of a kind that CALM computes: {'; '.join(wrong)}")
