"""The regression head: what teaches it, what it reads, and that models without one stay as they were."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import optax
import pytest
from flax import nnx

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.checkpoints import array_io, locate, restore
from calm_jax.convert import hf_export, parity
from calm_jax.data import builders, pipeline
from calm_jax.errors import ConfigError
from calm_jax.models.parameters import Geometry, initial
from calm_jax.models.score_head import ScoreHead
from calm_jax.text import chat as chat_lib
from calm_jax.training import filters, optimizer
from calm_jax.training.step import Step

HEAD = config_lib.ScoreHead(8)
PLAIN = dataclasses.replace(miniature.MODEL, decoder=dataclasses.replace(miniature.MODEL.decoder, vocab=128))
MODEL = dataclasses.replace(PLAIN, score_head=HEAD)
PROCESS = miniature.process(batch=4, row=config_lib.Row(tokens=64, images=2, answers=12, candidates=3),
                            train=("score_head/.*", "decoder/.*"), freeze=("encoder/.*", "mfam/.*"), score_head=0.5)


def gradients(process: config_lib.Process, values, batch):
    geometry = Geometry.of(MODEL)
    learns = filters.trainable(geometry.shapes, process)
    step = Step(geometry, process, *optimizer.make(process.optimizer, process.steps), jnp.float32, freeze_encoder=True,
                dropout=False)
    trained, frozen = ({p: v for p, v in values.items() if learns[p] == now} for now in (True, False))
    return jax.jit(step.gradients)(trained, frozen, batch, None)


@pytest.fixture(scope="module")
def values():
    return jax.jit(lambda key: initial(MODEL, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def batch():
    return miniature.batch(MODEL, PROCESS)


def test_the_loss_is_that_of_the_words_and_a_share_of_the_heads(values, batch):
    _, both = gradients(PROCESS, values, batch)
    grads, words = gradients(dataclasses.replace(PROCESS, score_head=0.0), values, batch)
    assert "score_error" not in words
    assert all(not np.any(leaf) for path, leaf in grads.items() if path.startswith("score_head/"))
    model = Geometry.of(MODEL).bind(values)
    hidden = np.asarray(model(batch, PROCESS.parts))
    loss = error = count = 0.0
    for row, slot in np.argwhere(batch["targets"] > 0):
        score, spread = (float(x) for x in model.score_head(jnp.asarray(hidden[row, batch["asked"][row, slot]])))
        missed, wide = (score - batch["targets"][row, slot]) / 2.25, spread / 2.25
        loss += missed ** 2 / 2 + (missed / wide) ** 2 / 2 + np.log(wide)
        error += abs(score - batch["targets"][row, slot])
        count += 1
    assert count > 2
    assert float(both["loss"] - words["loss"]) == pytest.approx(0.5 * loss / count, rel=1e-4)
    assert float(both["score_error"]) == pytest.approx(error / count, rel=1e-4)


def test_micro_batches_and_unused_targets_change_nothing(values, batch):
    once, metrics = gradients(PROCESS, values, batch)
    twice, same = gradients(dataclasses.replace(PROCESS, accumulate=2), values, batch)
    other = {**batch, "asked": np.where(batch["targets"] > 0, batch["asked"], 5).astype(np.int32)}
    again, _ = gradients(PROCESS, values, other)
    for path in once:
        np.testing.assert_allclose(twice[path], once[path], atol=5e-6, rtol=1e-4, err_msg=path)
        np.testing.assert_array_equal(again[path], once[path], err_msg=path)
    assert float(same["score_error"]) == pytest.approx(float(metrics["score_error"]), rel=1e-5)
    silent, none = gradients(PROCESS, values, {**batch, "targets": np.zeros_like(batch["targets"])})
    assert float(none["score_error"]) == 0 and all(np.isfinite(leaf).all() for leaf in silent.values())


def test_the_head_changes_no_other_parameter_and_every_mesh_can_hold_it(values):
    plain = jax.jit(lambda key: initial(PLAIN, key))(jax.random.key(0))
    assert values.keys() - plain.keys() == {f"score_head/{layer}/{leaf}" for layer in ("hidden", "out")
                                            for leaf in ("kernel", "bias")}
    for path, leaf in plain.items():
        # The compiler may round a sum otherwise where it draws something else beside it.
        np.testing.assert_allclose(values[path], leaf, rtol=1e-5, atol=1e-6, err_msg=path)
    assert {path: rule for path, rule in sharding.rules(Geometry.of(MODEL).shapes).items() if "score_head" in path} == {
        "score_head/hidden/kernel": "column", "score_head/hidden/bias": "small", "score_head/out/kernel": "small",
        "score_head/out/bias": "small"}


def test_a_batch_says_where_each_score_is_asked_for():
    process = miniature.process(tasks={"score": 0.5, "attributes": 0.5}, dataset="demo", batch=2, parts=("low",),
                                row=config_lib.Row(tokens=512, images=4, answers=96))
    chat = chat_lib.load()
    rows = pipeline.Rows(process, {"demo": builders.load("demo")}, chat, miniature.MODEL, seed=0, split="train")
    found = 0
    for number in range(12):
        row = rows.row(number)
        planned = rows.plan(number).texts
        expected = sorted(sample.target for sample, _ in planned if sample.target is not None)
        assert sorted(row["targets"][row["targets"] > 0]) == pytest.approx(expected)
        for place, target in zip(row["asked"], row["targets"], strict=True):
            if target > 0:
                said = chat.tokenizer.decode(row["tokens"][place + 1:place + 5])
                assert said.strip().startswith(f"{target:.1f}"[:3]), (said, target)
                found += 1
    assert found > 5


def test_a_head_learns_scores_and_how_much_to_trust_them():
    """Of features that tell half of the scores and nothing of the others."""
    rng = np.random.default_rng(0)
    targets, told = rng.uniform(2, 9, (1, 256)), np.arange(256) % 2
    features = np.stack([np.where(told, targets[0], 5.5) - 5.5, told, 1 - told], -1)[None].astype(np.float32)
    graphdef, state = nnx.split(ScoreHead(3, config_lib.ScoreHead(16), nnx.Rngs(0)))
    tx = optax.adam(1e-2)

    def step(carry, _):
        state, moments = carry
        grads = jax.grad(lambda state: nnx.merge(graphdef, state).loss(
            features, np.arange(256)[None], targets.astype(np.float32))[0])(state)
        updates, moments = tx.update(grads, moments)
        return (optax.apply_updates(state, updates), moments), None

    (state, _), _ = jax.jit(lambda state: jax.lax.scan(step, (state, tx.init(state)), None, 800))(state)
    score, spread = nnx.merge(graphdef, state)(features[0])
    error = np.abs(score - targets[0])
    assert error[told == 1].mean() < 0.2 and error[told == 0].mean() > 1
    assert spread[told == 1].mean() < 0.3 and abs(spread[told == 0].mean() - targets[0][told == 0].std()) < 0.3


def test_a_head_is_taught_from_a_checkpoint_without_one_and_read(tmp_path):
    """A training program, the reader, and the export, from a model that never had a head."""
    def train(folder, *more):
        done = subprocess.run([sys.executable, "-m", "calm_jax.train", "--config", "configs/finetune.py:tiny+head",
                               "--workdir", str(tmp_path / folder), "--config.run=('scores',)",
                               "--config.processes.scores.eval_batches=2", "--config.log_every=5", *more],
                              cwd=miniature.ROOT, text=True, capture_output=True, env=miniature.environment())
        assert done.returncode == 0, done.stderr[-3000:]
        return [json.loads(line) for line in (tmp_path / folder / "metrics.jsonl").read_text().splitlines()]

    train("plain", "--config.model.score_head.width=0", "--config.processes.scores.score_head=0.0",
          "--config.processes.scores.steps=2")
    rows = train("head", f"--config.init={tmp_path / 'plain'}", "--config.processes.scores.steps=5",
                 "--config.processes.scores.train=('score_head/.*',)",
                 "--config.processes.scores.freeze=('encoder/.*', 'mfam/.*', 'decoder/.*')")
    assert all(np.isfinite(row["score_error"]) for row in rows) and {row["kind"] for row in rows} == {
        "train", "validation"}
    held = array_io.shapes(locate.find(tmp_path / "head"))
    assert all(path.startswith("score_head/") for path in held)  # the rest is read from where it was trained
    whole, before = restore.model(tmp_path / "head").parameters, restore.model(tmp_path / "plain").parameters
    np.testing.assert_array_equal(whole["decoder/embedding"], before["decoder/embedding"])


@pytest.mark.slow
def test_an_exported_head_scores_alike(tmp_path):
    pytest.importorskip("torch", reason="torch is not here; make test has it")
    source = miniature.saved(tmp_path / "run", config_lib.PARTS, score_head=HEAD)
    out = hf_export.export(source, str(tmp_path / "hf"), say=lambda _: None)
    result = parity.check(source, str(out), new_tokens=4)
    assert result.holds() and result.scores < 1e-4, parity.show(result)
    assert json.loads((out / "config.json").read_text())["score_head"] == {"width": 8}


def test_a_head_that_is_not_there_cannot_learn():
    with pytest.raises(ConfigError, match=r"processes\.only\.score_head=0\.5 teaches a regression head"):
        miniature.config(model=PLAIN, processes={"only": PROCESS})
