"""The multi-scale alignment module: its weights beside BLIP-2's, and the geometry of published Q-Formers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from calm_jax import config as config_lib
from calm_jax import json_files
from calm_jax.convert import hf_config, tables

HEAD = 64  # channels of an attention head in BERT, from which every public Q-Former descends
BLOCK = re.compile(r"(?:(?:Qformer\.bert|qformer)\.)?encoder\.layer\.([0-9]{1,4})\.(.+)")
WHOLE_QFORMERS = ("blip_2", "instructblip")  # models that keep their Q-Former's config inside of their own


def qformer(found: json_files.Table) -> config_lib.QFormer:
    """The Q-Former of a `blip_2`, `blip_2_qformer`, `instructblip` or `instructblip_qformer` config."""
    kind = found.text("model_type").replace("-", "_")
    inner = found.table("qformer_config", {}) if kind in WHOLE_QFORMERS else found
    act = inner.text("hidden_act", "gelu")
    cfg = {"width": inner.whole("hidden_size", 768, most=hf_config.CHANNELS),
           "depth": inner.whole("num_hidden_layers", 12, most=hf_config.BLOCKS),
           "heads": inner.whole("num_attention_heads", 12, most=hf_config.CHANNELS),
           "mlp_width": inner.whole("intermediate_size", 3072, most=hf_config.CHANNELS),
           "cross_every": inner.whole("cross_attention_frequency", 2, most=hf_config.BLOCKS),
           "queries": found.whole("num_query_tokens", 32, most=hf_config.CHANNELS),
           "eps": inner.number("layer_norm_eps", 1e-12)}
    hf_config.require(inner, "Q-Former", [
        (kind in (*WHOLE_QFORMERS, *(f"{name}_qformer" for name in WHOLE_QFORMERS)),
         f"model_type is {found.text('model_type')!r} instead of blip-2 or instructblip"),
        (act == "gelu", f"hidden_act is {act!r} instead of gelu"),
        (cfg["depth"] % cfg["cross_every"] == 0, f"num_hidden_layers {cfg['depth']} is no multiple of "
         f"cross_attention_frequency {cfg['cross_every']}"),
        hf_config.heads(cfg)])
    return config_lib.QFormer(**cfg)


def qformer_of(found: Mapping[str, tuple[int, ...]]) -> config_lib.QFormer:
    """The Q-Former whose tensors have these names and shapes, for files that come without a config, such as LAVIS's.

    Width and queries are those of `query_tokens`; depth, MLP and cross-attention are read off the blocks. Tensors do
    not tell the head size and the LayerNorm epsilon: they are BERT's, 64 and 1e-12, as in BLIP-2 and InstructBLIP.

    Args:
      found: name -> shape, in LAVIS's names or those of transformers; what is no part of a Q-Former is passed over.

    Raises:
      hf_config.GeometryError: something does not follow from the tensors; one sentence with every reason.
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
        raise hf_config.GeometryError("there is no config.json beside these tensors, and no Q-Former's geometry "
                                      f"follows from them: {'; '.join(wrong)}; give a whole Q-Former, or its folder "
                                      "with a config.json")
    return config_lib.QFormer(width=tokens[2], depth=len(blocks), heads=tokens[2] // HEAD, mlp_width=mlp[0],
                              cross_every=every, queries=tokens[1], eps=1e-12)


def qformer_table(cfg: config_lib.QFormer) -> tables.Table:
    """One `models.qformer.QFormer` and Blip2ForConditionalGeneration's query_tokens, qformer.*, language_projection.*.

    The norm of the features read is `ln_vision.*` (LAVIS), which Blip2ForConditionalGeneration keeps as
    `vision_model.post_layernorm.*`. Also reads a bare Blip2QFormerModel, InstructBLIP and LAVIS files.
    """
    rows = [
        *tables.norm("context_norm", "ln_vision"),
        tables.Row("queries", "query_tokens", tables.Rearrange("1 q d", "q d")),
        *tables.norm("norm", "qformer.layernorm"),
        *tables.linear("project", "language_projection"),
    ]
    key = "qformer.encoder.layer.{layer}"
    for j in range(cfg.cross_every):
        path, number = f"groups/blocks/{j}", {"stride": cfg.cross_every, "offset": j}
        for ours, theirs in (("attention", "attention"), ("cross", "crossattention"))[: 1 if j else 2]:
            rows += [
                *tables.linear(f"{path}/{ours}/q", f"{key}.{theirs}.attention.query", **number),
                *tables.linear(f"{path}/{ours}/k", f"{key}.{theirs}.attention.key", **number),
                *tables.linear(f"{path}/{ours}/v", f"{key}.{theirs}.attention.value", **number),
                *tables.linear(f"{path}/{ours}/o", f"{key}.{theirs}.output.dense", **number),
                *tables.norm(f"{path}/{ours}_norm", f"{key}.{theirs}.output.LayerNorm", **number),
            ]
        rows += [
            *tables.linear(f"{path}/up", f"{key}.intermediate_query.dense", **number),
            *tables.linear(f"{path}/down", f"{key}.output_query.dense", **number),
            *tables.norm(f"{path}/mlp_norm", f"{key}.output_query.LayerNorm", **number),
        ]
    return tables.Table(
        rows=tuple(rows),
        renames=(
            (r"^Qformer\.bert\.", "qformer."),  # LAVIS
            (r"^(encoder|layernorm|embeddings)\.", r"qformer.\1."),  # a bare Blip2QFormerModel
            (r"^qformer\.embeddings\.(LayerNorm|layernorm)\.", "qformer.layernorm."),  # LAVIS, InstructBLIP
            (r"^(qformer\.encoder\.layer\.\d+\.\w+)\.self\.", r"\1.attention."),  # LAVIS
            (r"^(opt_proj|t5_proj|llm_proj)\.", "language_projection."),  # LAVIS
            (r"^vision_model\.post_layernorm\.", "ln_vision."),  # Blip2ForConditionalGeneration
        ),
        ignored=(
            tables.Ignored(r"qformer\.embeddings\..*|qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*",
                    "the text branch: only queries pass through CALM's Q-Formers"),
            tables.Ignored(r"Qformer\.cls\..*|(vision_proj|text_proj|vision_projection|text_projection|itm_head)\..*|temp",
                    "heads of BLIP-2's first stage"),
            tables.Ignored(r"(vision_model|visual_encoder)\..*", "BLIP-2's own visual encoder"),
            tables.Ignored(r"(language_model|opt_model|t5_model|llm_model)\..*", "BLIP-2's own language model"),
        ),
    )


def thematic_table(cfg: config_lib.Thematic) -> tables.Table:
    """`models.mfam.Thematic`, whose layer is LLaVA's `mm_projector` of a single linear layer, and its norm, if any."""
    return tables.Table(rows=(*(tables.norm("norm", "norm") if cfg.norm else ()),
                              *tables.linear("project", "project")))


def table(cfg: config_lib.Model) -> tables.Table:
    """`models.mfam.Mfam`: three times `qformer`, as `qformers.0` (low) to `qformers.2` (high), and `thematic`."""
    return tables.Table(rows=(*qformer_table(cfg.qformer).within("qformers/", "qformers.{level}."),
                              *thematic_table(cfg.thematic).within("thematic/", "thematic.")))


def published(model: config_lib.Model, level: str) -> dict[str, Any]:
    """The config.json of one level's Q-Former alone."""
    cfg = model.qformer
    return {"architectures": ["Blip2QFormerModel"], "model_type": "blip_2_qformer", "hidden_act": "gelu",
            "hidden_size": cfg.width, "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.heads,
            "intermediate_size": cfg.mlp_width, "cross_attention_frequency": cfg.cross_every,
            "layer_norm_eps": cfg.eps, "encoder_hidden_size": model.encoder.part(level).width,
            "num_query_tokens": cfg.queries, "use_qformer_text_input": False}
