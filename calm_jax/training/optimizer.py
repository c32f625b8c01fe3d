"""Hyper-parameters in, an optax transformation and its learning-rate schedule out."""

from __future__ import annotations

import re

import optax

from calm_jax import config as config_lib
from calm_jax.errors import ConfigError

DECAYED = ("kernel", r"kernels/\d+", "lora/[ab]", "embedding", "positions", "queries")  # last names of parameters
SPARED = ("scale", "bias", r"biases/\d+", "cls", "registers")


def make(cfg: config_lib.Optimizer, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Adam with linear warm-up and cosine annealing (paper), global-norm clipping and decoupled weight decay (ours).

    Of W warm-up steps the first has the rate peak / W and the last the peak (ours), so that no step changes nothing.
    """
    warmup = min(max(1, round(cfg.warmup * steps)), steps)
    schedule = optax.join_schedules([
        optax.linear_schedule(cfg.peak_lr / warmup, cfg.peak_lr, max(warmup - 1, 1)),
        optax.cosine_decay_schedule(cfg.peak_lr, steps - warmup + 1, alpha=cfg.final)], [warmup - 1])
    chain = [optax.clip_by_global_norm(cfg.clip)] if cfg.clip > 0 else []
    chain.append(optax.scale_by_adam(cfg.b1, cfg.b2, cfg.eps))
    if cfg.weight_decay > 0:
        chain.append(optax.add_decayed_weights(cfg.weight_decay, mask=lambda params: {
            path: decays(path) for path in params}))
    chain.append(optax.scale_by_learning_rate(schedule))
    if cfg.scale:
        chain.append(optax.stateless(lambda updates, _: {path: factor(cfg, path) * leaf
                                                         for path, leaf in updates.items()}))
    return optax.chain(*chain), schedule


def decays(path: str) -> bool:
    """Whether weight decay pulls on a parameter: on kernels, LoRA's factors, embeddings, positions and queries, not on
    norms, LayerScale, biases, the class token and registers. By its name, for axes of stacking make the shape say
    nothing.

    Raises:
      ConfigError: the name is of a kind that nobody has decided about.
    """
    kinds = {decayed: [regex for regex in regexes if re.fullmatch(f"(.*/)?({regex})", path)]
             for decayed, regexes in ((True, DECAYED), (False, SPARED))}
    if bool(kinds[True]) == bool(kinds[False]):
        raise ConfigError(f"whether weight_decay pulls on {path} is not decided: add it to one of the two "
                          "lists of calm_jax.training.optimizer, or set weight_decay=0")
    return bool(kinds[True])


def factor(cfg: config_lib.Optimizer, path: str) -> float:
    """What the learning rate of a parameter is multiplied by."""
    for regex, _, value in (entry.rpartition("=") for entry in cfg.scale):
        if re.fullmatch(regex, path):
            return float(value)
    return 1.0
