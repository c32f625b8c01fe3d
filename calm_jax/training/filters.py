"""Patterns of a process in; which parameters learn and which stay, and a table of both, out."""

from __future__ import annotations

import math
from collections.abc import Mapping

import jax

from calm_jax import config as config_lib
from calm_jax import path_rules
from calm_jax.errors import ConfigError


def trainable(shapes: Mapping[str, jax.ShapeDtypeStruct], process: config_lib.Process) -> dict[str, bool]:
    """path -> whether it learns; every parameter must match exactly one of `train` and `freeze`.

    Raises:
      ConfigError: names each parameter and pattern for which that does not hold; or features are to be kept of an
        encoder that learns.
    """
    groups = {"train": process.train, "freeze": process.freeze}
    chosen = path_rules.match(shapes, {k: v for k, v in groups.items() if v}, "train and freeze patterns")
    if "train" not in chosen.values():
        raise ConfigError("nothing learns: no parameter matches a `train` pattern")
    learns = {path: name == "train" for path, name in chosen.items()}
    moving = [path for path, learn in learns.items() if learn and path.startswith("encoder/")]
    if process.cached and moving:
        raise ConfigError(f"the encoder learns ({moving[0]} and {len(moving) - 1} more), so that what it sees cannot "
                          "be kept: set cached=False of the process, or freeze encoder/.*")
    return learns


def table(shapes: Mapping[str, jax.ShapeDtypeStruct], learns: Mapping[str, bool]) -> str:
    """What learns and what stays, one line a part of the model, in millions of parameters."""
    groups: dict[str, list[int]] = {}
    for path, leaf in shapes.items():
        pieces = path.split("/")
        name = "/".join(pieces[:2]) if pieces[0] in ("mfam", "decoder") else pieces[0]
        name += " (LoRA)" if "/lora/" in path else ""
        counts = groups.setdefault(name, [0, 0])
        counts[not learns[path]] += math.prod(leaf.shape)
    total = [sum(c[i] for c in groups.values()) for i in (0, 1)]
    lines = [f"  {'part':<24}{'trained':>12}{'frozen':>12}   million parameters"]
    for name, (a, b) in [*groups.items(), ("all", total)]:
        lines.append(f"  {name:<24}{a / 1e6:>12.3f}{b / 1e6:>12.3f}")
    return "\n".join(lines)
