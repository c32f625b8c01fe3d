"""LLaMA and Vicuna: `models.decoders.llama` and LlamaForCausalLM."""

from __future__ import annotations

from typing import Any

from calm_jax import json_files
from calm_jax.convert import hf_config, tables
from calm_jax.convert.families import Family
from calm_jax.models.decoders.llama import LlamaConfig


def config(found: json_files.Table) -> LlamaConfig:
    """The language model of a `llama` config (Vicuna is one)."""
    act = found.text("hidden_act", "silu")
    rope = [found.table(name) for name in ("rope_parameters", "rope_scaling") if name in found]
    scaled = [scale for table in rope for name in ("rope_type", "type")
              if (scale := table.text(name, "default")) != "default"]
    theta = next((table.number("rope_theta") for table in rope if "rope_theta" in table),
                 found.number("rope_theta", 1e4))
    turned = found.number("partial_rotary_factor", 1.0)
    width, heads = (found.whole(name, most=hf_config.CHANNELS) for name in ("hidden_size", "num_attention_heads"))
    cfg = {"vocab": found.whole("vocab_size", most=hf_config.TOKENS), "width": width,
           "depth": found.whole("num_hidden_layers", most=hf_config.BLOCKS), "heads": heads,
           "kv_heads": found.whole("num_key_value_heads", heads, most=hf_config.CHANNELS),
           "mlp_width": found.whole("intermediate_size", most=hf_config.CHANNELS),
           "eps": found.number("rms_norm_eps", 1e-6), "rope_theta": theta,
           "positions": found.whole("max_position_embeddings", 2048, most=hf_config.TOKENS)}
    head = found.whole("head_dim", width // heads, least=0, most=hf_config.CHANNELS)
    hf_config.require(found, "language model", [
        (act == "silu", f"hidden_act is {act!r} instead of silu"),
        (not scaled, f"its rotary frequencies are scaled ({', '.join(map(repr, dict.fromkeys(scaled)))})"),
        (turned == 1, f"it turns a part of its channels alone (partial_rotary_factor {turned:g})"),
        (not any(found.flag(f"{name}_bias", False) for name in ("attention", "mlp")), "its linear layers have biases"),
        hf_config.heads(cfg),
        (head * heads == width or width % heads > 0, f"head_dim is {head}, not hidden_size / num_attention_heads"),
        (heads % cfg["kv_heads"] == 0,
         f"num_attention_heads {heads} is no multiple of num_key_value_heads {cfg['kv_heads']}")])
    return LlamaConfig(**cfg)


def table(cfg: LlamaConfig) -> tables.Table:
    """`models.decoders.llama.Llama` and LlamaForCausalLM with an untied head."""
    block = "model.layers.{layer}"
    return tables.Table(
        rows=(
            tables.Row("embedding", "model.embed_tokens.weight"),
            *tables.norm("blocks/attention_norm", f"{block}.input_layernorm", bias=False),
            *tables.linear("blocks/q", f"{block}.self_attn.q_proj", bias=False),
            *tables.linear("blocks/k", f"{block}.self_attn.k_proj", bias=False),
            *tables.linear("blocks/v", f"{block}.self_attn.v_proj", bias=False),
            *tables.linear("blocks/o", f"{block}.self_attn.o_proj", bias=False),
            *tables.norm("blocks/mlp_norm", f"{block}.post_attention_layernorm", bias=False),
            *tables.linear("blocks/gate", f"{block}.mlp.gate_proj", bias=False),
            *tables.linear("blocks/up", f"{block}.mlp.up_proj", bias=False),
            *tables.linear("blocks/down", f"{block}.mlp.down_proj", bias=False),
            *tables.norm("norm", "model.norm", bias=False),
            *tables.linear("head", "lm_head", bias=False),
        ),
        ignored=(tables.Ignored(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
                                "rotary frequencies, which older transformers saved and everyone computes"),),
    )


def published(cfg: LlamaConfig, special: dict[str, int]) -> dict[str, Any]:
    """The config.json of a LlamaForCausalLM."""
    return {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "vocab_size": cfg.vocab,
            "hidden_size": cfg.width, "num_hidden_layers": cfg.depth, "num_attention_heads": cfg.heads,
            "num_key_value_heads": cfg.kv_heads, "intermediate_size": cfg.mlp_width, "rms_norm_eps": cfg.eps,
            "max_position_embeddings": cfg.positions, "attention_bias": False, "mlp_bias": False,
            "tie_word_embeddings": False,
            # Older transformers read the first, newer ones write the second and read either.
            "rope_theta": cfg.rope_theta, "rope_parameters": {"rope_type": "default", "rope_theta": cfg.rope_theta},
            **special}


FAMILY = Family("language model", ("llama",), config, table, published)
