"""tools.study: arms that fit, trained in an order that goes and only once; judges and baselines that are right."""

from __future__ import annotations

import dataclasses
import json
import pathlib

import miniature
import numpy as np
import pytest

import calm_jax
from calm_jax import config as config_lib
from calm_jax import recipes, sharding
from calm_jax.commands import train as program
from calm_jax.data import attributes
from calm_jax.data.samples import ImageRef, Record
from calm_jax.errors import ConfigError
from calm_jax.models.parameters import Geometry
from calm_jax.training import filters
from tools.study import arms, baselines, judge, report, runner


class Photos:
    """Forty plain pictures whose score is how bright they are; validation has ten of them."""

    name, fingerprint = "para", "f"

    def indices(self, split):
        return np.arange(30) if split == "train" else np.arange(30, 40)

    def record(self, index):
        return Record(f"picture {index}", ImageRef(index), score=1 + 4 * self._light(index) / 255, scale=(1.0, 5.0))

    def pixels(self, index):
        return np.full((40, 60, 3), self._light(index), np.uint8)

    @staticmethod
    def _light(index):
        return 20 + 37 * index % 230


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "RESULTS", tmp_path / "results")
    return runner.Study(tmp_path, "start", Photos(), "data")


@pytest.mark.parametrize("name", arms.ARMS)
def test_every_arm_is_a_config_that_fits(name):
    arm = arms.get(name)
    config = recipes.load(f"{runner.RECIPE}:{name}").config
    assert config.run == (("looking", "speaking") if arm.words else ("looking",))
    first = config.processes["looking"]
    assert first.steps == arm.length and first.dataset == "para"
    if arm.scores:
        assert round(first.train_share * arms.RECORDS) == arm.scores and first.mixture == {("para", "score"): 1.0}
    shapes = Geometry.of(config.model).shapes
    assert sharding.rules(shapes).keys() == shapes.keys()
    learns = filters.trainable(shapes, first)
    assert not any(learn for path, learn in learns.items() if path.startswith(("encoder/", "decoder/")))
    assert arm.minutes <= (60 if name == "main" else 40)


def test_the_budget_is_five_hours_and_eight_arms_of_words():
    jobs = [runner.Job(name, seed) for name, arm in arms.ARMS.items() for seed in arm.seeds]
    assert sum(job.arm.minutes for job in jobs) <= 300
    assert sum(job.arm.words for job in jobs) <= 8


def test_what_others_begin_from_comes_first_and_nothing_is_trained_twice(study):
    names = ["edits-750", "scores-750", "edits"]
    jobs = study.jobs(names)
    assert jobs == [runner.Job("edits", 0), *(runner.Job(name, seed) for seed in arms.SEEDS for name in names[:2])]
    assert study.jobs(names, 1) == jobs[:3]
    lines = {job: study.training(job).arguments for job in jobs}
    assert f"--config.init={study.workdir / 'edits-0'}" in lines[runner.Job("edits-750", 1)]
    assert "--config.init=start" in lines[runner.Job("scores-750", 1)] and "--config.seed=1" in lines[
        runner.Job("scores-750", 1)]
    for seed in arms.SEEDS:
        job = runner.Job("edits-750", seed)
        runner.write(job, {"digest": study.digest(job), "said": {}})
    assert study.jobs(names) == [runner.Job("scores-750", seed) for seed in arms.SEEDS]
    other = dataclasses.replace(study, split="test")  # another question
    assert len(other.jobs(names)) == 7
    runner.Job("edits-750", 0).result.write_text("{")  # damaged
    assert study.jobs(names)[:2] == [runner.Job("edits", 0), runner.Job("edits-750", 0)]
    with pytest.raises(ConfigError, match="no arm 'score-750'; the nearest is 'scores-750'"):
        study.jobs(["score-750"])


def test_a_digest_tells_what_is_trained_and_not_where(study):
    digests = [study.digest(runner.Job(name, seed)) for name in arms.ARMS for seed in (0, 1)]
    assert len(set(digests)) == len(digests)
    moved = dataclasses.replace(study, workdir=study.workdir / "there", start="elsewhere", data_dir="other")
    assert moved.digest(runner.Job("edits-750", 0)) == study.digest(runner.Job("edits-750", 0))


def test_a_training_that_fails_is_named_with_its_log(study, monkeypatch):
    monkeypatch.setattr(runner.Study, "training", lambda self, job: runner.commands.Step(
        "x", ("calm_jax.train", "--nonsense"), study.workdir / "x", log=study.workdir / "x.log"))
    with pytest.raises(ConfigError, match=r"x ended with exit code 2; its message stands in .*x\.log"):
        list(study.run([runner.Job("scores-75", 0)]))
    assert not runner.RESULTS.exists()


def test_the_light_head_is_judged_as_calm_score_reads_it(tmp_path, monkeypatch):
    monkeypatch.setenv("CALM_CACHE", str(tmp_path / "cache"))
    head = config_lib.LightHead(tuple(len(one.grades) for one in attributes.ATTRIBUTES.values()),
                                tuple(one.level for one in attributes.ATTRIBUTES.values()))
    model = dataclasses.replace(miniature.MODEL, light_head=head,
                                qformer=dataclasses.replace(miniature.MODEL.qformer, queries=5))
    process = miniature.process(tasks={"score": 1.0}, parts=config_lib.PARTS, words=0.0, light_head=1.0, steps=2,
                                train=("mfam/.*", "light_head/.*"), freeze=("encoder/.*", "decoder/.*"), eval_every=0)
    program.train(miniature.config(model=model, processes={"looking": process}, run=("looking",)), tmp_path / "run")
    photos = Photos()
    said = judge.light(tmp_path / "run/checkpoints/looking", photos, photos.indices("validation"))
    scores = calm_jax.load(tmp_path / "run").score([photos.pixels(i) for i in range(30, 40)], reader="light")
    np.testing.assert_allclose(said, [score.value for score in scores], atol=5e-3)


def test_kernel_ridge_chooses_its_penalty_by_leaving_each_out():
    rng = np.random.default_rng(0)
    seen, asked = rng.normal(size=(40, 6)), rng.normal(size=(9, 6))
    scores = np.sin(seen[:, 0]) + 0.1 * rng.normal(size=40)
    first, second = baselines.standardised(seen, asked)
    far = ((first[:, None] - first[None]) ** 2).sum(-1)
    width = np.median(far[:500])
    gram, cross = np.exp(-far / width), np.exp(-((second[:, None] - first[None]) ** 2).sum(-1) / width)
    errors, mean = {}, scores.mean()
    for penalty in baselines.PENALTIES:
        left = []
        for place in range(40):
            rest = np.delete(np.arange(40), place)
            weights = np.linalg.solve(gram[np.ix_(rest, rest)] + penalty * np.eye(39), scores[rest] - mean)
            left.append(scores[place] - mean - gram[place, rest] @ weights)
        errors[penalty] = np.mean(np.square(left))
    best = min(errors, key=errors.get)
    expected = mean + cross @ np.linalg.solve(gram + best * np.eye(40), scores - mean)
    np.testing.assert_allclose(baselines.kernel(seen, scores, asked), expected, rtol=1e-6)


def test_the_page_has_a_row_for_each_arm_and_differences_in_pairs(study, monkeypatch):
    true, rng = report.truth(study, "validation"), np.random.default_rng(0)
    for name in ("scores-750", "edits-750", "scores-2500", "low"):
        for seed in arms.SEEDS:
            job = runner.Job(name, seed)
            values = true if name == "edits-750" else rng.permutation(true)
            runner.write(job, {"digest": study.digest(job), "minutes": 2.0, "said": {"light": dict(zip(
                (f"picture {index}" for index in range(30, 40)), values.tolist(), strict=True))}})
    said = {method: {str(count): (true + 1).tolist() for count in arms.STEPS} for method in report.METHODS}
    monkeypatch.setattr(report, "baselines", lambda study: said)
    text = report.write(study)
    assert "| edits-750 | grades of edits, then 750 scores | 3 | 2.0 | 1.000 [1.000, 1.000] |" in text
    assert "| ridge | 7500 scores, statistics of the frozen features | 1 | | 1.000" in text
    assert "| edits-750 less scores-750 | +" in text and "| low less scores-2500 |" in text and "shuffled" not in text
    assert (study.workdir / "study.png").stat().st_size > 10_000
    assert (study.workdir / "study.md").read_text() == text
    assert report.line(study, runner.Job("edits-750", 0)) == "PLCC 1.000, SRCC 1.000, MAE 0.000"
    assert json.loads(runner.Job("low", 0).result.read_text())["minutes"] == 2.0
    assert pathlib.Path(runner.RECIPE).parts[:2] == ("tools", "study")
