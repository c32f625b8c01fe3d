"""A model's geometry and what a process learns in; the floating-point operations that this takes out.

Two a weight and token for each product, and the attention of all pairs that may see each other (half of them in the
language model). A backward pass takes as much again for the gradients of the inputs, where anything before them
learns, and as much again for those of the weights that learn. What is computed again to save memory is not counted, as
in model FLOPs utilisation (MFU, after PaLM).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from calm_jax import config as config_lib
from calm_jax.models.parameters import Geometry


@dataclasses.dataclass(frozen=True)
class Work:
    """Of one part of the model and one row: FLOPs of its products with weights, and of its attention."""

    weights: float = 0.0
    attention: float = 0.0

    @property
    def forward(self) -> float:
        return self.weights + self.attention

    def __add__(self, other: Work) -> Work:
        return Work(self.weights + other.weights, self.attention + other.attention)


def encoder(model: config_lib.Model, parts: tuple[str, ...] = config_lib.PARTS) -> Work:
    """The visual encoder on one image, as far as these parts read it; of a family that does not say, what its program
    computes, attention not told apart."""
    cfg = model.encoder
    said = cfg.flops(parts, model.depths)
    if said is not None:
        return Work(*said)
    geometry = Geometry.of(model)
    image = jax.ShapeDtypeStruct((1, cfg.image_size, cfg.image_size, 3), jnp.uint8)
    program = jax.make_jaxpr(lambda parameters, images: geometry.bind(parameters).encoder.features(
        images, parts, dtype=jnp.float32))(geometry.shapes, image)
    return Work(traced(program.jaxpr))


def qformers(model: config_lib.Model, parts: tuple[str, ...] = config_lib.PARTS, patches: int = 0) -> Work:
    """The three Q-Formers on one image; all are computed where any level is and they are stacked.

    Args:
      patches: that they see; 0 = all.
    """
    if not set(parts) & set(config_lib.LEVELS):
        return Work()
    cfg, levels = model.qformer, {level: model.encoder.part(level) for level in config_lib.LEVELS}
    stacked = len(set(levels.values())) == 1
    total = Work()
    for level, seen in levels.items():
        if stacked or level in parts:
            crossed = -(-cfg.depth // cfg.cross_every)
            weights = cfg.queries * (cfg.depth * (4 * cfg.width ** 2 + 2 * cfg.width * cfg.mlp_width)
                                     + crossed * 2 * cfg.width ** 2 + cfg.width * model.decoder.width)
            tokens = seen.prefix + patches if patches else seen.tokens
            weights += crossed * 2 * tokens * seen.width * cfg.width
            total += Work(2.0 * weights, 4.0 * cfg.width * cfg.queries * (
                cfg.depth * cfg.queries + crossed * tokens))
    return total


def thematic(model: config_lib.Model, parts: tuple[str, ...] = config_lib.PARTS) -> Work:
    """The fully connected layer on one image."""
    if "thematic" not in parts:
        return Work()
    seen = model.encoder.part("thematic")
    return Work(2.0 * model.visual_tokens("thematic") * seen.width * model.decoder.width)


def language(model: config_lib.Model, tokens: int, answers: int) -> Work:
    """The language model on a row of so many tokens, with logits at so many of them."""
    cfg = model.decoder
    block = cfg.width * (2 * cfg.head_size * (cfg.heads + cfg.kv_heads) + 3 * cfg.mlp_width)
    return Work(2.0 * (tokens * cfg.depth * block + answers * cfg.width * cfg.vocab),
                2.0 * cfg.depth * tokens ** 2 * cfg.heads * cfg.head_size)


def a_score(model: config_lib.Model, prompt: int, parts: tuple[str, ...] = config_lib.PARTS, tree: int = 0) -> Work:
    """A score: one picture, a prompt of so many tokens, and `tree` tokens behind it."""
    return (encoder(model, parts) + qformers(model, parts) + thematic(model, parts)
            + language(model, prompt + tree, 1 + tree))


def a_row(model: config_lib.Model, process: config_lib.Process, learns: Mapping[str, bool]) -> dict[str, float]:
    """Of one row of a training step: `forward`, `inputs` (their gradients) and `weights` (theirs).

    Args:
      learns: path -> whether it learns.
    """
    def taught(prefix):
        return any(learn for path, learn in learns.items() if path.startswith(prefix))

    def whole(prefix):  # a low-rank update's own products are too small to count
        return any(learn for path, learn in learns.items() if path.startswith(prefix) and "/lora/" not in path)

    row, parts = process.row, process.parts
    works = (("encoder/", Work() if process.cached else encoder(model, parts), row.images),
             ("mfam/qformers/", qformers(model, parts, process.patches), row.images),
             ("mfam/thematic/", thematic(model, parts), row.images),
             ("decoder/", language(model, row.tokens, row.answers) if process.words else Work(), 1))
    found = {"forward": 0.0, "inputs": 0.0, "weights": 0.0}
    for prefix, work, count in works:
        found["forward"] += count * work.forward
        reaches = taught(prefix) or taught("encoder/") or (prefix == "decoder/" and taught("mfam/"))
        if prefix == "mfam/thematic/":  # nothing stands before its layer but the encoder, and a norm
            reaches = taught("encoder/") or taught("mfam/thematic/norm/")
        if reaches:  # both factors of attention are activations: twice
            found["inputs"] += count * (work.weights + 2 * work.attention)
        if whole(prefix):
            found["weights"] += count * work.weights
    return found


def traced(jaxpr: Any) -> float:
    """FLOPs of all products and convolutions of a traced program (`jax.make_jaxpr(...)(...).jaxpr`); loops count as
    often as they turn, and what is computed again counts again."""
    total = 0.0
    for equation in jaxpr.eqns:
        kind, inputs, outputs = equation.primitive.name, equation.invars, equation.outvars
        if kind == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2.0 * math.prod(outputs[0].aval.shape) * math.prod(inputs[0].aval.shape[i] for i in contracted)
        elif kind == "conv_general_dilated":
            channels = outputs[0].aval.shape[equation.params["dimension_numbers"].out_spec[1]]
            total += 2.0 * math.prod(outputs[0].aval.shape) * math.prod(inputs[1].aval.shape) / channels
        turns = equation.params["length"] if kind == "scan" else 1
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                inner = getattr(inner, "jaxpr", inner)
                total += turns * traced(inner) if hasattr(inner, "eqns") else 0.0
    return total
