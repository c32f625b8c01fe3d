"""configs/personal.py: one person's ratings as a small update of a trained model, which changes what the model says."""

from __future__ import annotations

import csv
import sys

import miniature
import numpy as np
from PIL import Image

import calm_jax
from calm_jax.checkpoints import array_io, locate


def train(*words: str) -> None:
    done = miniature.run([sys.executable, "-m", "calm_jax.train", *words], miniature.environment())
    assert done.returncode == 0, done.stderr[-3000:]


def test_a_person_is_an_update_of_a_few_kilobytes(tmp_path):
    """From a table of ratings, as `calm personalise` reads it, to other scores of the same picture."""
    rng = np.random.default_rng(0)
    for number in range(20):
        pixels = rng.integers(0, 255, (40, 48, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    with (tmp_path / "mine.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "score"), *((f"{n}.png", 1 + n % 5) for n in range(20))])
    done = miniature.run([sys.executable, "-m", "tools.prepare_data", "--dataset", "csv", "--scale", "1,5", "--source",
                          str(tmp_path / "mine.csv"), "--data_dir", str(tmp_path / "data"), "--shares", "0.8,0.1,0.1"],
                         miniature.environment())
    assert done.returncode == 0, done.stderr
    train("--config", "configs/finetune.py", "--workdir", str(tmp_path / "base"), "--config.run=('scores',)",
          "--config.processes.scores.steps=1", "--config.processes.scores.eval_batches=1")
    train("--config", "configs/personal.py", "--workdir", str(tmp_path / "mine"), f"--config.init={tmp_path / 'base'}",
          f"--config.data.dir={tmp_path / 'data'}", "--config.processes.personal.steps=4",
          "--config.processes.personal.eval_batches=1", "--config.processes.personal.optimizer.peak_lr=0.05")
    held = array_io.shapes(locate.find(tmp_path / "mine"))
    assert set(held) == {f"decoder/blocks/{layer}/lora/{factor}" for layer in "qv" for factor in "ab"}
    base, mine = calm_jax.load(tmp_path / "base"), calm_jax.load(tmp_path / "mine")
    picture = str(tmp_path / "3.png")
    assert abs(base.score(picture).value - mine.score(picture).value) > 1e-3
    weights = [model.loaded("score").generator.parameters["encoder/positions"] for model in (base, mine)]
    np.testing.assert_array_equal(*weights)
