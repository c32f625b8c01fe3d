"""A config, what learns, and a batch in; a training step of the same geometry in transformers and torch out.

It is what its users would write: CLIPVisionModel or Dinov2Model, three Blip2QFormerModels, LlamaForCausalLM with SDPA,
PEFT for LoRA adapters, logits at the supervised positions only, a block-diagonal causal mask for the packed
conversations. On a GPU frozen parts are bfloat16 and what learns is float32 under bfloat16 autocast, with fused Adam;
on CPU all is float32. A frozen encoder runs without gradients, parts that the process does not read are not there, and
gradients are checkpointed where the config says `remat=full`. Nothing here imports JAX: its memory would count.
"""

from __future__ import annotations

import itertools
import math
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import transformers
from torch import nn

from calm_jax import config as config_lib

TARGETS = {"q": "q_proj", "k": "k_proj", "v": "v_proj", "o": "o_proj", "gate": "gate_proj", "up": "up_proj",
           "down": "down_proj"}  # a linear layer of our blocks -> of LlamaForCausalLM's


class Level(nn.Module):
    """A Q-Former with its queries, the norm of what it reads, and the layer to the language model's width."""

    def __init__(self, cfg: config_lib.Model):
        super().__init__()
        q = cfg.qformer
        self.norm = nn.LayerNorm(cfg.encoder.width)
        self.queries = nn.Parameter(torch.randn(1, q.queries, q.width) * 0.02)
        self.qformer = transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(
            hidden_size=q.width, num_hidden_layers=q.depth, num_attention_heads=q.heads,
            intermediate_size=q.mlp_width, cross_attention_frequency=q.cross_every,
            encoder_hidden_size=cfg.encoder.width, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))
        self.project = nn.Linear(q.width, cfg.decoder.width)

    def forward(self, features):
        return self.project(self.qformer(query_embeds=self.queries.expand(len(features), -1, -1),
                                         encoder_hidden_states=self.norm(features)).last_hidden_state)


class Thematic(nn.Module):
    """Squares of patches averaged, a norm if the config asks for one, and a layer to the language model's width."""

    def __init__(self, cfg: config_lib.Model):
        super().__init__()
        self.prefix, self.pool = cfg.encoder.prefix, cfg.thematic.pool
        self.norm = nn.LayerNorm(cfg.encoder.width) if cfg.thematic.norm else nn.Identity()
        self.project = nn.Linear(cfg.encoder.width, cfg.decoder.width)

    def forward(self, features):
        patches = features[:, self.prefix:]
        if self.pool > 1:
            side = math.isqrt(patches.shape[1])
            grid = patches.transpose(1, 2).unflatten(2, (side, side))
            patches = nn.functional.avg_pool2d(grid, self.pool).flatten(2).transpose(1, 2)
        return self.project(self.norm(patches))


class Reference(nn.Module):
    """The parts that a process computes, with what it teaches and freezes.

    Args:
      taught: encoder, qformers, thematic, decoder, lora -> whether it learns.
    """

    def __init__(self, config: config_lib.Config, taught: Mapping[str, bool], device: torch.device):
        super().__init__()
        cfg, process = config.model, config.processes[config.run[0]]
        self.depths = {part: cfg.depths.block(part, cfg.encoder.depth) for part in process.parts}
        self.frozen_encoder, self.device = not taught["encoder"], device
        with device:
            self.encoder = _encoder(cfg.encoder, max(self.depths.values()))
            self.qformers = nn.ModuleDict({part: Level(cfg) for part in process.parts if part in config_lib.LEVELS})
            self.thematic = Thematic(cfg) if "thematic" in process.parts else None
            self.decoder = transformers.LlamaForCausalLM(transformers.LlamaConfig(
                vocab_size=cfg.decoder.vocab, hidden_size=cfg.decoder.width, intermediate_size=cfg.decoder.mlp_width,
                num_hidden_layers=cfg.decoder.depth, num_attention_heads=cfg.decoder.heads,
                num_key_value_heads=cfg.decoder.kv_heads, max_position_embeddings=cfg.decoder.positions,
                head_dim=cfg.decoder.head_size, tie_word_embeddings=cfg.decoder.tied,
                rope_parameters={"rope_type": "default", "rope_theta": cfg.decoder.rope_theta},
                rms_norm_eps=cfg.decoder.eps, attn_implementation="sdpa", use_cache=False))
        for name in ("encoder", "qformers", "thematic", "decoder"):
            part = getattr(self, name)
            if part is not None and not taught[name]:
                part.requires_grad_(False).to(_compute(device))
        if cfg.lora.rank:
            self._add_updates(cfg.lora, taught["lora"])
        if cfg.remat == "full":
            for part in [self.decoder, *([self.encoder] if taught["encoder"] else []),
                         *[level.qformer for level in self.qformers.values()]]:
                part.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.train()
        if self.frozen_encoder:
            self.encoder.eval()

    def _add_updates(self, lora: config_lib.Lora, learn: bool) -> None:
        import peft
        names = [theirs for ours, theirs in TARGETS.items() if re.fullmatch(lora.targets, f"decoder/blocks/{ours}")]
        whole = all(p.requires_grad for p in self.decoder.parameters())
        peft.get_peft_model(self.decoder, peft.LoraConfig(  # in place; new weights are float32
            r=lora.rank, lora_alpha=lora.alpha, lora_dropout=lora.dropout, target_modules=names, bias="none"))
        for name, parameter in self.decoder.named_parameters():
            parameter.requires_grad_(learn if "lora_" in name else whole)

    def forward(self, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The mean loss of a batch (`arrays` made it)."""
        rows, images = batch["pixels"].shape[:2]
        with torch.set_grad_enabled(not self.frozen_encoder):
            pixels = batch["pixels"].flatten(0, 1).to(self.encoder.dtype)
            hidden = self.encoder(pixel_values=pixels, output_hidden_states=True).hidden_states
        parts = [level(hidden[self.depths[name]]) for name, level in self.qformers.items()]
        if self.thematic is not None:
            parts.append(self.thematic(hidden[self.depths["thematic"]]))
        pool = torch.cat(parts, 1).to(_compute(self.device)).unflatten(0, (rows, images)).flatten(1, 2)
        words = self.decoder.model.embed_tokens(batch["tokens"]).to(pool.dtype)
        width = words.shape[-1]
        seen = pool.gather(1, batch["visual"].clamp(min=0)[..., None].expand(-1, -1, width))
        x = torch.where((batch["visual"] >= 0)[..., None], seen, words)
        hidden = self.decoder.model(inputs_embeds=x, attention_mask=batch["mask"],
                                  position_ids=batch["positions"]).last_hidden_state
        logits = self.decoder.lm_head(hidden.gather(1, batch["places"][..., None].expand(-1, -1, width)))
        likelihood = logits.float().log_softmax(-1).gather(-1, batch["labels"])
        return -(batch["weights"] * likelihood).sum() / batch["weights"].sum()


def _encoder(cfg: config_lib.Encoder, depth: int) -> nn.Module:
    """The family's own class with so many of its blocks, for CLIP our stem, and without the norm of an output that
    nothing reads."""
    if cfg.family == "dinov2":
        vit = transformers.Dinov2Model(transformers.Dinov2Config(
            hidden_size=cfg.width, mlp_ratio=cfg.mlp_width // cfg.width, num_hidden_layers=depth,
            num_attention_heads=cfg.heads, image_size=cfg.native, patch_size=cfg.patch, attn_implementation="sdpa"))
        vit.layernorm = nn.Identity()
        vit.embeddings.mask_token.requires_grad_(False)
        return vit
    vit = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=cfg.width, intermediate_size=cfg.mlp_width, num_hidden_layers=depth, num_attention_heads=cfg.heads,
        image_size=cfg.image_size, patch_size=cfg.patch, attn_implementation="sdpa"))
    core = getattr(vit, "vision_model", vit)
    core.post_layernorm = nn.Identity()
    if cfg.stem == "conv":
        count = cfg.patch.bit_length() - 1
        widths = [3] + [max(cfg.width >> (count - 1 - i), 32) for i in range(count)]
        convolutions = [layer for a, b in itertools.pairwise(widths)
                        for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.GELU(approximate="tanh"))]
        stem = nn.Sequential(*convolutions, nn.Conv2d(widths[-1], cfg.width, 1))
        stem.weight = stem[-1].weight  # its dtype is asked for
        core.embeddings.patch_embedding = stem
    return vit


def _compute(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def arrays(batch: Mapping[str, np.ndarray], device: torch.device, encoder: config_lib.Encoder
           ) -> dict[str, torch.Tensor]:
    """A batch of `data.pipeline` as the reference takes it, on its device."""
    found = {name: torch.from_numpy(np.ascontiguousarray(batch[name])).to(device)
             for name in ("images", "tokens", "visual", "segments", "positions", "places", "labels", "weights")}
    found = {name: value.long() if value.dtype == torch.int32 else value for name, value in found.items()}
    mean, std = (torch.tensor(values, device=device) for values in (encoder.mean, encoder.std))
    pixels = (found.pop("images").float() / 255 - mean) / std
    segments, length = found.pop("segments"), found["tokens"].shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    mask = (segments[:, :, None] == segments[:, None, :]) & causal
    return found | {"pixels": pixels.permute(0, 1, 4, 2, 3).contiguous(), "mask": mask[:, None]}


def torch_step(config: config_lib.Config, taught: Mapping[str, bool],
               batch: Mapping[str, np.ndarray]) -> tuple[Callable[[], float], dict[str, Any]]:
    """A training step, which returns the loss of each call; and facts about it."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(os.cpu_count() or 1)
    model, tensors = Reference(config, taught, device), arrays(batch, device, config.model.encoder)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    cfg = config.processes[config.run[0]].optimizer
    kind = torch.optim.AdamW if cfg.weight_decay else torch.optim.Adam
    optimizer = kind(trained, lr=cfg.peak_lr, betas=(cfg.b1, cfg.b2), eps=cfg.eps, weight_decay=cfg.weight_decay,
                     fused=device.type == "cuda")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()  # what building took is none of the step's

    def call() -> float:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(tensors)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if cfg.clip:
            torch.nn.utils.clip_grad_norm_(trained, cfg.clip)
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return float(loss.detach())

    return call, {"trained": sum(parameter.numel() for parameter in trained)}
