"""Hyper-parameters in, an optax transformation and its learning-rate schedule out."""

from __future__ import annotations

import re

import jax
import optax

from calm_jax import config as config_lib


def make(cfg: config_lib.Optimizer, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Adam with linear warm-up and cosine annealing (paper), global-norm clipping and decoupled weight decay (ours)."""
    warmup = min(max(1, round(cfg.warmup * steps)), max(steps - 1, 1))
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, cfg.peak_lr, warmup, decay_steps=max(steps, warmup + 1), end_value=cfg.final * cfg.peak_lr)
    chain = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip > 0 else []
    chain.append(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps))
    if cfg.weight_decay > 0:
        matrices = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
        chain.append(optax.add_decayed_weights(cfg.weight_decay, mask=matrices))
    chain.append(optax.scale_by_learning_rate(schedule))
    if cfg.scale:
        chain.append(optax.stateless(lambda updates, _: {path: factor(cfg, path) * leaf
                                                         for path, leaf in updates.items()}))
    return optax.chain(*chain), schedule


def factor(cfg: config_lib.Optimizer, path: str) -> float:
    """What the learning rate of a parameter is multiplied by."""
    for regex, _, value in (entry.rpartition("=") for entry in cfg.scale):
        if re.fullmatch(regex, path):
            return float(value)
    return 1.0
