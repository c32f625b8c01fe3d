"""A training state and a batch in, the next state and metrics out: the one step function of every process."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from einops import rearrange
from jaxtyping import Array, Float, Int, Key

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.models.parameters import Geometry, Parameters


@functools.partial(jax.tree_util.register_dataclass, data_fields=["step", "trained", "optimizer"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class State:
    """What a step changes: steps done, trained parameters (float32) and optimizer state, for those alone."""

    step: Int[Array, ""]
    trained: Parameters
    optimizer: Any


@dataclasses.dataclass(frozen=True)
class Step:
    """The losses and updates of one process; `train` and `evaluate` are pure and meant for jit.

    Attributes:
      geometry: the model.
      process: what learns, on rows of which shape.
      tx, schedule: from `optimizer.make`.
      dtype: of the computation.
      freeze_encoder: the encoder does not learn, so nothing is kept for its backward pass.
      dropout: whether LoRA dropout is on.
      mesh: devices; None for a single one.
    """

    geometry: Geometry
    process: config_lib.Process
    tx: optax.GradientTransformation
    schedule: optax.Schedule
    dtype: Any
    freeze_encoder: bool
    dropout: bool
    mesh: jax.sharding.Mesh | None = None

    def loss(self, trained: Parameters, frozen: Parameters, batch: Mapping[str, Array],
             totals: Mapping[str, Array], key: Key[Array, ""] | None
             ) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
        """(the loss of these rows, sums over them), both as parts of a batch with these `totals`.

        Logits exist at supervised positions only, [B, K, V]; soft targets are spread over C candidates. The sums are
        answers that are `right`: tokens predicted, or without the language model grades; and where a head learns
        scores its absolute `score_error` in points.
        """
        process = self.process
        model = self.geometry.bind({**trained, **frozen})
        loss, sums = jnp.zeros(()), {}
        if process.mixup and key is not None:
            batch = mixed(batch, process.mixup, key)
        with contextlib.nullcontext() if self.mesh is None else jax.sharding.use_abstract_mesh(self.mesh.abstract_mesh):
            pool = model.look(batch, process.parts, dtype=self.dtype, freeze_encoder=self.freeze_encoder)
            if process.light_head:
                images = batch["targets"].shape[1]
                light = model.light_head.loss(  # the same phrases in every row
                    rearrange(pool, "b (i n) d -> b i n d", i=images), model.phrases(batch["phrases"][0]),
                    model.cfg.attribute_tokens(process.parts), batch["grades"], batch["targets"])
                loss += process.light_head * (light["grades"] / totals["grades"] + light["scores"] / totals["scores"])
                sums |= {"right": light["grades_right"], "score_error": light["score_error"]}
            if process.words:
                hidden = model.read(batch, pool, key=key if self.dropout else None)
                logits = model.answer_logits(hidden, batch["places"])
            if process.score_head:
                head, sums["score_error"] = model.score_head.loss(hidden, batch["asked"], batch["targets"])
                loss += process.score_head * head / totals["scores"]
        if process.words:
            log_likelihood = (jnp.take_along_axis(logits, batch["labels"], axis=-1)
                              - jax.nn.logsumexp(logits, axis=-1, keepdims=True))
            right = (logits.argmax(-1) == batch["labels"][..., 0]) & (batch["weights"][..., 0] > 0)
            loss -= process.words * (batch["weights"] * log_likelihood).sum() / totals["words"]
            sums["right"] = right.sum().astype(jnp.float32)
        return loss, sums

    def gradients(self, trained: Parameters, frozen: Parameters, batch: Mapping[str, Array],
                  key: Key[Array, ""] | None) -> tuple[Parameters, dict[str, Array]]:
        """Gradients of the mean loss over all supervised tokens of the batch, whatever mesh and accumulation."""
        totals = _totals(batch)
        value_and_grad = jax.value_and_grad(self.loss, has_aux=True)
        count = self.process.accumulate
        if count == 1:
            (loss, sums), grads = value_and_grad(trained, frozen, batch, totals, key)
        else:
            # Neighbouring rows go to different micro-batches, so that rows stay on their devices.
            micro = jax.tree.map(lambda x: rearrange(x, "(b a) ... -> a b ...", a=count), dict(batch))
            keys = None if key is None else jax.random.split(key, count)

            def add(carry, inputs):
                rows, row_key = inputs
                if self.mesh is not None:
                    rows = jax.lax.with_sharding_constraint(rows, sharding.rows(self.mesh))
                (loss, sums), grads = value_and_grad(trained, frozen, rows, totals, row_key)
                return jax.tree.map(jnp.add, carry, (loss, sums, grads)), None

            scores = self.process.score_head or self.process.light_head
            sums = dict.fromkeys(("right", "score_error") if scores else ("right",), jnp.zeros(()))
            zero = (jnp.zeros(()), sums, jax.tree.map(jnp.zeros_like, trained))
            (loss, sums, grads), _ = jax.lax.scan(add, zero, (micro, keys))
        answered = self.answered(batch)
        metrics = {"loss": loss, "accuracy": sums["right"] / jnp.maximum(answered, 1), "answers": answered,
                   "tokens": (batch["segments"] > 0).sum(),
                   "examples": batch["segments"].max(-1).sum(), "bad": batch["bad"].sum()}
        if "score_error" in sums:
            metrics["score_error"] = sums["score_error"] / totals["scores"]
            metrics["scores"] = (batch["targets"] > 0).sum()
        return grads, metrics

    def train(self, state: State, frozen: Parameters, batch: Mapping[str, Array],
              key: Key[Array, ""]) -> tuple[State, dict[str, Array]]:
        """One optimizer step. `key` is the run's; each step folds its own number in."""
        key = jax.random.fold_in(key, state.step) if self.dropout or self.process.mixup else None
        grads, metrics = self.gradients(state.trained, frozen, batch, key)
        updates, optimizer = self.tx.update(grads, state.optimizer, state.trained)
        trained = optax.apply_updates(state.trained, updates)
        metrics |= {"grad_norm": optax.tree.norm(grads), "lr": self.schedule(state.step)}
        return State(state.step + 1, trained, optimizer), metrics

    def evaluate(self, trained: Parameters, frozen: Parameters, batch: Mapping[str, Array]) -> dict[str, Array]:
        """Of a batch: its mean loss and the weight of that, and sums: right tokens, supervised tokens, scores."""
        totals = _totals(batch)
        loss, sums = self.loss(trained, frozen, batch, totals, None)
        weight = batch["weights"].sum()
        return {"loss": loss * weight, "weight": weight, **sums, "answers": self.answered(batch),
                "scores": (batch["targets"] > 0).sum()}

    def answered(self, batch: Mapping[str, Array]) -> Int[Array, ""]:
        """Supervised tokens, or, without the language model, grades that are known."""
        if self.process.words:
            return (batch["weights"].sum(-1) > 0).sum()
        return (batch["grades"] >= 0).sum()


def mixed(batch: Mapping[str, Array], concentration: float, key: Key[Array, ""]) -> dict[str, Array]:
    """The batch with the features and the score of each image mixed with those of the image before it, wherever both
    have a score; each keeps the larger share, which is drawn from Beta(concentration, concentration)."""
    rows, images = batch["targets"].shape
    own = rearrange(batch["targets"], "b i -> (b i)")
    before = jnp.roll(own, 1)
    share = jax.random.beta(key, concentration, concentration, own.shape)
    share = jnp.where((own > 0) & (before > 0), jnp.maximum(share, 1 - share), 1.0)
    found = {"targets": rearrange(share * own + (1 - share) * before, "(b i) -> b i", b=rows)}
    for name, value in batch.items():
        if name.startswith("features/"):
            flat = rearrange(value.astype(jnp.float32), "b i s e -> (b i) s e")
            kept = rearrange(share, "n -> n 1 1")
            flat = kept * flat + (1 - kept) * jnp.roll(flat, 1, 0)
            found[name] = rearrange(flat, "(b i) s e -> b i s e", i=images).astype(value.dtype)
    return {**batch, **found}


def _totals(batch: Mapping[str, Array]) -> dict[str, Float[Array, ""]]:
    """What the losses of a batch are means over: weight of the words, number of the scores and of the grades."""
    grades = {"grades": jnp.maximum((batch["grades"] >= 0).sum(), 1)} if "grades" in batch else {}
    return {**grades, "words": jnp.maximum(batch["weights"].sum(), 1e-6),
            "scores": jnp.maximum((batch["targets"] > 0).sum().astype(jnp.float32), 1.0)}


def compile_train(step: Step, shardings: State, frozen: Mapping[str, Any]) -> Callable:
    """`step.train` under jit for its mesh; the old state's buffers are reused for the new one."""
    replicated = jax.sharding.NamedSharding(step.mesh, jax.sharding.PartitionSpec())
    return jax.jit(step.train, donate_argnums=0,
                   in_shardings=(shardings, dict(frozen), sharding.rows(step.mesh), replicated),
                   out_shardings=(shardings, replicated))
