"""LLaMA and what differs from it by options: `models.decoders.llama` and LlamaForCausalLM, Qwen2ForCausalLM,
Qwen3ForCausalLM and MistralForCausalLM (without a sliding window, which makes it a LLaMA)."""

from __future__ import annotations

from typing import Any

from calm_jax import json_files
from calm_jax.convert import hf_config, tables
from calm_jax.convert.families import Family
from calm_jax.models.decoders.llama import LlamaConfig

# What the class of a model_type assumes where its config.json has no such field: keys (0 = as many as queries),
# positions, channels of a head (0 = width / heads).
ASSUMED = {"llama": (0, 2048, 0), "mistral": (8, 131_072, 0), "qwen2": (32, 32_768, 0), "qwen3": (32, 32_768, 128)}
WINDOW = 4096  # of a Mistral whose config.json has no sliding_window
# Fields of LlamaConfig <- those of the scaling `llama3` in a config.json.
SCALING = {"rope_factor": "factor", "rope_low_factor": "low_freq_factor", "rope_high_factor": "high_freq_factor",
           "rope_original": "original_max_position_embeddings"}


def config(found: json_files.Table) -> LlamaConfig:
    """The language model of a `llama`, `mistral`, `qwen2` or `qwen3` config, by old or new transformers."""
    kind, act = found.text("model_type"), found.text("hidden_act", "silu")
    kv_heads, positions, head = ASSUMED[kind]
    width, heads = (found.whole(name, most=hf_config.CHANNELS) for name in ("hidden_size", "num_attention_heads"))
    if "num_key_value_heads" in found.values or not kv_heads:  # null, too, is as many as queries
        kv_heads = found.whole("num_key_value_heads", heads, most=hf_config.CHANNELS)
    head = found.whole("head_dim", 0 if "head_dim" in found.values else head, least=0, most=hf_config.CHANNELS)
    rope, wrong = _rope(found)
    cfg = {"vocab": found.whole("vocab_size", most=hf_config.TOKENS), "width": width,
           "depth": found.whole("num_hidden_layers", most=hf_config.BLOCKS), "heads": heads, "kv_heads": kv_heads,
           "mlp_width": found.whole("intermediate_size", most=hf_config.CHANNELS),
           "eps": found.number("rms_norm_eps", 1e-6),
           "positions": found.whole("max_position_embeddings", positions, most=hf_config.TOKENS),
           "tied": found.flag("tie_word_embeddings", False), "head_dim": 0 if head * heads == width else head,
           "qkv_bias": kind == "qwen2", "qk_norm": kind == "qwen3", **rope}
    size = head or width // heads
    # Qwen2's class has no such field: its queries, keys and values have biases, and nothing else has.
    biased = kind != "qwen2" and any(found.flag(f"{name}_bias", False) for name in ("attention", "mlp"))
    hf_config.require(found, "language model", [
        (act == "silu", f"hidden_act is {act!r} instead of silu"), *((False, reason) for reason in wrong),
        (not biased, "its linear layers have biases, that of its attention's output or those of its MLP among them"),
        (not _slides(found, kind, cfg["positions"]), "its attention sees a sliding window alone"),
        *([] if head else [hf_config.heads(cfg)]),
        (size % 2 == 0, f"its heads have {size} channels, an odd number, which rotary positions cannot turn in pairs"),
        (heads % kv_heads == 0, f"num_attention_heads {heads} is no multiple of num_key_value_heads {kv_heads}")])
    return LlamaConfig(**cfg)


def _rope(found: json_files.Table) -> tuple[dict[str, Any], list[str]]:
    """Base and scaling of the rotary frequencies, as fields of LlamaConfig, and what about them is not computed.

    Older transformers have `rope_theta` and, where frequencies are scaled, `rope_scaling`; newer ones `rope_parameters`
    for both.
    """
    given = [found.table(name) for name in ("rope_parameters", "rope_scaling") if name in found]
    kinds = [{table.text(name) for name in ("rope_type", "type") if name in table} or {"default"} for table in given]
    other = sorted(repr(kind) for kind in set().union(*kinds) - {"default", "llama3"})
    turned = [table.number("partial_rotary_factor", 1.0) for table in (found, *given)]
    theta = next((table.number("rope_theta") for table in given if "rope_theta" in table),
                 found.number("rope_theta", 1e4))
    scalings = [{} if "llama3" not in kind else {
        field: table.whole(name, most=hf_config.TOKENS) if field == "rope_original" else table.number(name)
        for field, name in SCALING.items()} for table, kind in zip(given, kinds, strict=True)]
    scaling = scalings[0] if scalings else {}
    factor, low, high = (scaling.get(f"rope_{name}", one) for name, one in (("factor", 1.0), ("low_factor", 1.0),
                                                                            ("high_factor", 4.0)))
    wrong = [reason for holds, reason in (
        (not other, f"its rotary frequencies are scaled ({', '.join(other)}), and only 'llama3' is computed"),
        (not any(isinstance(value, dict) for table in given for value in table.values.values()),
         "its kinds of layers have rotary frequencies of their own"),
        (set(turned) == {1}, f"it turns a part of its channels alone (partial_rotary_factor {min(turned):g})"),
        (all(each == scaling for each in scalings) and all(len(kind) == 1 for kind in kinds),
         "rope_type and type, or rope_parameters and rope_scaling, scale its rotary frequencies in different ways"),
        (factor >= 1, f"the factor of its rotary scaling is {factor:g}, below 1"),
        (high > low, f"its high_freq_factor {high:g} is not above its low_freq_factor {low:g}")) if not holds]
    return {"rope_theta": theta, **scaling}, wrong


def _slides(found: json_files.Table, kind: str, positions: int) -> bool:
    """Whether any layer sees less than all tokens before."""
    if any(name != "full_attention" for name in found.names("layer_types", [])):
        return True
    if kind == "mistral":  # null is none
        window = found.whole("sliding_window", positions if "sliding_window" in found.values else WINDOW)
        return window < positions
    return kind != "llama" and found.flag("use_sliding_window", False)


def table(cfg: LlamaConfig) -> tables.Table:
    """`models.decoders.llama.Llama` and the classes of transformers, whose names are alike."""
    block = "model.layers.{layer}"
    norms = (*tables.norm("blocks/q_norm", f"{block}.self_attn.q_norm", bias=False),
             *tables.norm("blocks/k_norm", f"{block}.self_attn.k_norm", bias=False)) if cfg.qk_norm else ()
    tied = (tables.Ignored(r"lm_head\.weight", "with tie_word_embeddings it is the embedding; set that to false in its "
                           "config.json if the head was trained apart", same="model.embed_tokens.weight"),)
    return tables.Table(
        rows=(
            tables.Row("embedding", "model.embed_tokens.weight"),
            *tables.norm("blocks/attention_norm", f"{block}.input_layernorm", bias=False),
            *tables.linear("blocks/q", f"{block}.self_attn.q_proj", bias=cfg.qkv_bias),
            *tables.linear("blocks/k", f"{block}.self_attn.k_proj", bias=cfg.qkv_bias),
            *tables.linear("blocks/v", f"{block}.self_attn.v_proj", bias=cfg.qkv_bias),
            *norms,
            *tables.linear("blocks/o", f"{block}.self_attn.o_proj", bias=False),
            *tables.norm("blocks/mlp_norm", f"{block}.post_attention_layernorm", bias=False),
            *tables.linear("blocks/gate", f"{block}.mlp.gate_proj", bias=False),
            *tables.linear("blocks/up", f"{block}.mlp.up_proj", bias=False),
            *tables.linear("blocks/down", f"{block}.mlp.down_proj", bias=False),
            *tables.norm("norm", "model.norm", bias=False),
            *(() if cfg.tied else tables.linear("head", "lm_head", bias=False)),
        ),
        ignored=(tables.Ignored(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
                                "rotary frequencies, which older transformers saved and everyone computes"),
                 *(tied if cfg.tied else ())),
    )


def published(cfg: LlamaConfig, special: dict[str, int | None]) -> dict[str, Any] | None:
    """The config.json of the class that holds the options: Qwen2ForCausalLM with biases, Qwen3ForCausalLM with norms of
    queries and keys, else LlamaForCausalLM; for old and new transformers.

    No class has biases and norms at once. Of older transformers none has biases and heads of another size than width /
    heads; of newer ones LlamaForCausalLM refuses a width that is no multiple of the heads.
    """
    plain = cfg.head_size * cfg.heads == cfg.width
    if (cfg.qkv_bias and (cfg.qk_norm or not plain)) or (not cfg.qk_norm and cfg.width % cfg.heads):
        return None
    name = "Qwen3" if cfg.qk_norm else "Qwen2" if cfg.qkv_bias else "Llama"
    own = {"Llama": {"attention_bias": False, "mlp_bias": False}, "Qwen2": {"use_sliding_window": False},
           "Qwen3": {"attention_bias": False, "use_sliding_window": False, "head_dim": cfg.head_size}}[name]
    if name == "Llama" and not plain:
        own["head_dim"] = cfg.head_size
    rope: dict[str, Any] = {"rope_type": "default"}
    if cfg.rope_factor > 1:
        rope = {"rope_type": "llama3"} | {theirs: getattr(cfg, ours) for ours, theirs in SCALING.items()}
        own["rope_scaling"] = rope
    return {"architectures": [f"{name}ForCausalLM"], "model_type": name.lower(), "hidden_act": "silu",
            "vocab_size": cfg.vocab, "hidden_size": cfg.width, "num_hidden_layers": cfg.depth,
            "num_attention_heads": cfg.heads, "num_key_value_heads": cfg.kv_heads, "intermediate_size": cfg.mlp_width,
            "rms_norm_eps": cfg.eps, "max_position_embeddings": cfg.positions, "tie_word_embeddings": cfg.tied, **own,
            # Older transformers read the first, and rope_scaling; newer ones write the second and read either.
            "rope_theta": cfg.rope_theta, "rope_parameters": rope | {"rope_theta": cfg.rope_theta}, **special}


FAMILY = Family("language model", tuple(ASSUMED), config, table, published)
