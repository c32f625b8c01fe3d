"""The light head: what it learns from, that the language model is left out, and that nothing of it stays."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest
import safetensors.numpy as safetensors_numpy

import calm_jax
from calm_jax import config as config_lib
from calm_jax import recipes, sharding
from calm_jax.checkpoints import array_io, locate, restore
from calm_jax.commands import train as program
from calm_jax.convert import hf_export
from calm_jax.data import attributes, builders, images, pipeline
from calm_jax.data.samples import ImageRef
from calm_jax.data.tasks import skills
from calm_jax.errors import ConfigError
from calm_jax.models import flops
from calm_jax.models.parameters import Geometry, initial
from calm_jax.text import chat as chat_lib
from calm_jax.training import filters, optimizer
from calm_jax.training.setup import Setup
from calm_jax.training.step import Step, mixed

GRADES = tuple(len(attribute.grades) for attribute in attributes.ATTRIBUTES.values())
LEVELS = tuple(attribute.level for attribute in attributes.ATTRIBUTES.values())
MODEL = dataclasses.replace(miniature.MODEL, light_head=config_lib.LightHead(GRADES, LEVELS),
                            qformer=dataclasses.replace(miniature.MODEL.qformer, queries=5))
WARM_UP = miniature.process(tasks={"attributes": 0.7, "score": 0.3}, parts=config_lib.PARTS, words=0.0, light_head=1.0,
                            row=config_lib.Row(tokens=1024, images=4, answers=400), batch=2,
                            train=("mfam/.*", "light_head/.*"), freeze=("encoder/.*", "decoder/.*"))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    with miniature.compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


STEP = dataclasses.replace(WARM_UP, row=miniature.ROW)  # of a batch that is made, not planned


def batch(process=STEP, model=MODEL):
    found = miniature.batch(model, process)
    rng = np.random.default_rng(1)
    grades = rng.integers(-1, min(GRADES), (process.batch, process.row.images, len(GRADES)), np.int32)
    phrases = np.repeat(pipeline.phrases(chat_lib.load())[None], process.batch, 0)
    return {**found, "grades": grades, "phrases": phrases}


@functools.cache
def values():
    return jax.jit(lambda key: initial(MODEL, key))(jax.random.key(0))


def step(process):
    geometry = Geometry.of(MODEL)
    learns = filters.trainable(geometry.shapes, process)
    made = Step(geometry, process, *optimizer.make(process.optimizer, process.steps), jnp.float32, freeze_encoder=True,
                dropout=False)
    return made, *({p: v for p, v in values().items() if learns[p] == now} for now in (True, False))


def test_the_loss_is_that_of_known_grades_and_scores():
    made, trained, frozen = step(STEP)
    given = batch()
    loss, sums = jax.jit(made.loss, static_argnums=4)(trained, frozen, given, {
        "words": jnp.ones(()), "scores": jnp.float32(2), "grades": jnp.float32(3)}, None)
    model = made.geometry.bind({**trained, **frozen})
    pool = np.asarray(model.encode(jnp.asarray(given["images"]), STEP.parts, dtype=jnp.float32))
    pool = pool.reshape(2, 2, -1, pool.shape[-1])
    table, ids = np.asarray(frozen["decoder/embedding"]), pipeline.phrases(chat_lib.load())
    means = np.stack([[table[[i for i in word if i >= 0]].mean(0) if (word >= 0).any() else np.zeros(table.shape[1])
                       for word in words] for words in ids])
    phrases = [means[place, :1] + means[place, 1:1 + count] for place, count in enumerate(GRADES)]
    unit = np.square(np.concatenate(phrases)).sum(-1).mean()
    expected = right = error = 0.0
    for row, slot in np.ndindex(2, 2):
        mean = pool[row, slot].mean(0)
        normal = (mean - mean.mean()) / np.sqrt(mean.var() + 1e-5)
        score = 5.5 + 2.25 * float((normal @ trained["light_head/out/kernel"] + trained["light_head/out/bias"])[0])
        for place, (grade, level) in enumerate(zip(given["grades"][row, slot], LEVELS, strict=True)):
            if grade >= 0:
                token = pool[row, slot, 5 * config_lib.LEVELS.index(level) + LEVELS[:place].count(level)]
                far = np.square(token - phrases[place]).sum(-1) / unit
                expected += (4 * far[grade] + np.log(np.exp(-4 * far).sum()) + far[grade] / 2) / 3
                right += far.argmin() == grade
        if (target := given["targets"][row, slot]) > 0:
            expected += ((score - target) / 2.25) ** 2 / 2
            error += abs(score - target)
    assert float(loss) == pytest.approx(float(expected), rel=1e-4)
    assert float(sums["right"]) == right and float(sums["score_error"]) == pytest.approx(float(error), rel=1e-4)


def test_images_with_scores_are_mixed_in_pairs_and_no_others():
    """Features and scores by one share; what has no score, or stands behind such a one, stays as it is."""
    targets = np.asarray([[4.0, 8.0, 0.0], [6.0, 2.0, 10.0]], np.float32)
    features = np.random.default_rng(0).normal(size=(2, 3, 5, 7)).astype(np.float16)
    given = {"targets": jnp.asarray(targets), "features/low": jnp.asarray(features), "grades": jnp.ones((2, 3, 1))}
    found = [mixed(given, 0.4, jax.random.key(seed)) for seed in range(200)]
    shares = []
    for one in found:
        assert one["grades"] is given["grades"] and one["features/low"].dtype == jnp.float16
        for (row, slot), before in (((0, 1), (0, 0)), ((1, 1), (1, 0)), ((1, 2), (1, 1)), ((0, 0), (1, 2))):
            own, other = targets[row, slot], targets[before]
            share = float((one["targets"][row, slot] - other) / (own - other))
            assert 0.5 - 1e-6 <= share <= 1 + 1e-6
            np.testing.assert_allclose(one["features/low"][row, slot], share * features[row, slot].astype(np.float32)
                                       + (1 - share) * features[before].astype(np.float32), atol=4e-3)
            shares.append(share)
        for row, slot in ((0, 2), (1, 0)):  # without a score; behind it
            assert one["targets"][row, slot] == targets[row, slot]
            np.testing.assert_array_equal(one["features/low"][row, slot], features[row, slot])
    draws = np.random.default_rng(1).beta(0.4, 0.4, 20_000)
    assert np.mean(shares) == pytest.approx(np.maximum(draws, 1 - draws).mean(), abs=0.02)


def test_training_mixes_and_validation_does_not():
    kept = dataclasses.replace(WARM_UP, cached=True, mixup=0.4, row=miniature.ROW)
    seen = MODEL.encoder.part("low")
    rng = np.random.default_rng(2)
    given = {name: value for name, value in batch().items() if name != "images"}
    shape = given["targets"].shape
    given |= {"targets": rng.uniform(2, 9, shape).astype(np.float32), "grades": np.full_like(given["grades"], -1)}
    given |= {f"features/{part}": rng.normal(size=(*shape, seen.tokens, seen.width)).astype(np.float16)
              for part in config_lib.PARTS}
    made, trained, frozen = step(kept)
    plain = dataclasses.replace(made, process=dataclasses.replace(kept, mixup=0.0))
    key, totals = jax.random.key(3), {name: jnp.float32(4) for name in ("words", "scores", "grades")}
    loss = [float(one.loss(trained, frozen, values, totals, key)[0]) for one, values in (
        (made, given), (plain, mixed(given, 0.4, key)), (plain, given))]
    assert loss[0] == pytest.approx(loss[1], rel=1e-6) != pytest.approx(loss[2], rel=1e-3)
    judged = [float(one.evaluate(trained, frozen, given)["loss"]) for one in (made, plain)]
    assert judged[0] == judged[1]
    for changes in ({"words": 1.0}, {"cached": False}):
        with pytest.raises(ConfigError, match=r"mixup=0\.4 mixes features that are kept, for the light head"):
            dataclasses.replace(kept, **changes)


def test_the_language_model_is_not_computed_and_micro_batches_change_nothing():
    made, trained, frozen = step(STEP)
    once, metrics = jax.jit(made.gradients)(trained, frozen, batch(), None)
    twice, same = jax.jit(dataclasses.replace(made, process=dataclasses.replace(STEP, accumulate=2)).gradients)(
        trained, frozen, batch(), None)
    for path in once:
        np.testing.assert_allclose(twice[path], once[path], atol=5e-6, rtol=1e-4, err_msg=path)
        assert np.any(once[path]), path
    for name in metrics:
        assert float(metrics[name]) == pytest.approx(float(same[name]), rel=1e-5)
    assert 0 < float(metrics["accuracy"]) < 1 and float(metrics["answers"]) == (batch()["grades"] >= 0).sum()
    broken = {path: leaf * jnp.nan if path.startswith("decoder/blocks/") else leaf for path, leaf in frozen.items()}
    assert np.isfinite(float(jax.jit(made.gradients)(trained, broken, batch(), None)[1]["loss"]))
    both = dataclasses.replace(STEP, words=1.0)
    assert flops.a_row(MODEL, STEP, filters.trainable(made.geometry.shapes, STEP))["forward"] < 0.7 * flops.a_row(
        MODEL, both, filters.trainable(made.geometry.shapes, both))["forward"]


def test_words_and_head_may_learn_together():
    words = dataclasses.replace(STEP, words=1.0, light_head=0.0)
    both = dataclasses.replace(STEP, words=0.5, light_head=2.0)
    found = []
    for process in (STEP, words, both):
        made, trained, frozen = step(process)
        found.append(float(jax.jit(made.gradients)(trained, frozen, batch(), None)[1]["loss"]))
    assert found[2] == pytest.approx(2 * found[0] + 0.5 * found[1], rel=1e-5)


def test_a_row_says_the_grades_that_its_questions_ask_for():
    demo = builders.load("demo")
    rows = pipeline.Rows(WARM_UP, {"demo": demo}, chat_lib.load(), MODEL, seed=0, split="train")
    names, seen = list(attributes.ATTRIBUTES), 0
    for number in range(8):
        row = rows.row(number)
        image = 0
        for sample, encoded in rows.plan(number).texts:
            expected = {turn.subject: int(turn.label.partition("=")[2]) for turn in sample.turns
                        if "=" in turn.label and turn.subject in names}
            known = {names[place]: int(grade) for place, grade in enumerate(row["grades"][image]) if grade >= 0}
            assert known.items() <= expected.items()
            edits = {edit.attribute: edit.grade for edit in sample.images[0].edits}
            assert all(known[name] == grade for name, grade in edits.items() if name in known)
            seen += len(known)
            image += len(encoded.images)
        assert (row["grades"][image:] == -1).all()
    assert seen > 60


def test_only_labels_of_attributes_are_grades():
    place = list(attributes.ATTRIBUTES).index("noise")
    assert attributes.graded("noise=2") == (place, 2)
    assert not any(map(attributes.graded, ("noise:first", "score=6.400", "grain=7", "acuity=level3", "noise=none", "")))


def test_versions_take_turns():
    demo = builders.load("demo")
    process = dataclasses.replace(WARM_UP, versions=2)
    rows = pipeline.Rows(process, {"demo": demo}, chat_lib.load(), MODEL, seed=0, split="train")
    count = len(demo.indices("train"))
    examples = [rows._example(0, place) for place in range(4 * count)]
    epochs = [sorted((example.index, example.version, example.task) for example in examples[n * count:][:count])
              for n in range(4)]
    assert epochs[0] == epochs[2] != epochs[1] == epochs[3]
    assert [e.index for e in examples[:count]] != [e.index for e in examples[2 * count:3 * count]]  # in another order
    shown = {rows.sample(example).images for example in examples}
    assert len(shown) <= 2 * count


def test_it_is_trained_dropped_afterwards_and_said(tmp_path, capsys):
    config = miniature.config(model=MODEL, processes={"only": dataclasses.replace(WARM_UP, cached=True)})
    program.train(config, tmp_path / "warm")
    assert "grade accuracy" in "".join(capsys.readouterr())
    saved = locate.find(tmp_path / "warm")
    assert any(path.startswith("light_head/") for path in array_io.shapes(saved))
    assert not skills.learned(saved.config.processes["only"])
    without = dataclasses.replace(MODEL, light_head=config_lib.LightHead())
    after = miniature.config(model=without, processes={"only": miniature.process(train=("mfam/.*",), freeze=(
        "encoder/.*", "decoder/.*"))}, init=str(tmp_path / "warm"))
    program.train(after, tmp_path / "after")
    assert "the light head of " in "".join(capsys.readouterr())
    assert restore.origins(saved, after).keys() == Geometry.of(without).shapes.keys()
    again = miniature.config(model=MODEL, init=str(tmp_path / "after"))
    assert isinstance(restore.origins(locate.find(tmp_path / "after"), again)["light_head/out/kernel"], restore.Drawn)


def test_the_reader_light_asks_it_for_scores(tmp_path, capsys):
    """What it says of the visual tokens, without the language model; of a checkpoint that taught it scores."""
    warm = dataclasses.replace(WARM_UP, tasks={"score": 1.0}, steps=2)
    program.train(miniature.config(model=MODEL, processes={"only": warm}), tmp_path / "warm")
    said = "".join(capsys.readouterr())
    assert "scores off by" in said and "accuracy" not in said  # no grade was asked for
    model = calm_jax.load(tmp_path / "warm")
    with pytest.raises(ConfigError, match="never learned scores"):
        model.score(str(miniature.ROOT / "docs/demo.jpg"))
    photos = [np.full((40, 60, 3), value, np.uint8) for value in (20, 130, 240)]
    said = [score.value for score in model.score(photos, reader="light")]
    saved = locate.find(tmp_path / "warm")
    bound = Geometry.of(MODEL).bind(restore.model(saved.path).parameters)
    squares = np.stack([images.render(photo, ImageRef(0), MODEL.encoder.image_size, MODEL.encoder.padding)
                        for photo in photos])
    tokens = bound.encode(squares[:, None], warm.parts, dtype=np.float32)
    np.testing.assert_allclose(said, np.clip(bound.light_head.score(tokens), 1, 10), atol=1e-4)
    # Its scores are the generic ones beside a person's ratings, too: every rating two points above moves them by two.
    moved = model.personalise([(photo, value + 2) for photo, value in zip(photos, said, strict=True)], photos)
    assert [score.value for score in moved] == pytest.approx([value + 2 for value in said], abs=1e-3)
    plain = calm_jax.load(miniature.saved(tmp_path / "plain"))
    with pytest.raises(ConfigError, match="never learned scores by the light head"):
        plain.score(photos, reader="light")
    with pytest.raises(ConfigError, match="the reader light needs a light head, which this model does not have"):
        next(plain.loaded("score").generator.scores([], lambda index: photos[index], reader="light"))


def test_an_export_does_without_it(tmp_path):
    source = miniature.saved(tmp_path / "run", config_lib.PARTS, light_head=MODEL.light_head)
    assert "light_head/out/kernel" in restore.lazily(locate.find(source))
    folder = hf_export.export(source, str(tmp_path / "hf"), say=lambda line: None)
    names = [name for file in folder.glob("*.safetensors") for name in safetensors_numpy.load_file(file)]
    assert len(names) > 50 and not any("light" in name for name in names)


@pytest.mark.parametrize("change, said", [
    ({"light_head": 0.0}, "nothing to learn from"), ({"score_head": 1.0}, "reads the language model")])
def test_what_cannot_learn_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        dataclasses.replace(WARM_UP, **change)


def test_a_head_of_other_attributes_or_none_is_refused():
    with pytest.raises(ConfigError, match="teaches a light head, and the model has none"):
        miniature.config(processes={"only": WARM_UP})
    with pytest.raises(ConfigError, match="are not the grades of the attributes"):
        pipeline.check_grades(config_lib.LightHead((3, 3), ("low", "low")))
    with pytest.raises(ConfigError, match="are not the levels of the attributes"):
        pipeline.check_grades(config_lib.LightHead(GRADES, LEVELS[::-1]))
    with pytest.raises(ConfigError, match="queries=2 are too few for a light head: a level has 5 attributes"):
        miniature.config(model=dataclasses.replace(MODEL, qformer=miniature.MODEL.qformer), processes={"only": WARM_UP})
    with pytest.raises(ConfigError, match="each attribute has both"):
        miniature.config(model=dataclasses.replace(MODEL, light_head=config_lib.LightHead(GRADES)),
                         processes={"only": WARM_UP})


def test_an_attributes_token_is_where_its_level_stands():
    whole, low = MODEL.attribute_tokens(config_lib.PARTS), MODEL.attribute_tokens(("low", "thematic"))
    assert len(set(whole)) == len(GRADES) and max(whole) < 15
    for place, level in enumerate(LEVELS):
        assert whole[place] // 5 == config_lib.LEVELS.index(level)
        assert low[place] == (whole[place] if level == "low" else 0)


def test_the_recipe_warms_up_first_and_every_mesh_can_hold_the_head():
    config = recipes.load("pretrain:laptop").config
    assert config.run == ("warm_up", "self_supervised", "generic") and config.model.light_head.grades == GRADES
    mesh = sharding.make_mesh(config.mesh)
    for name in config.run:
        setup = Setup.of(config, name, Geometry.of(config.model), mesh)
        assert ("light_head/out/kernel" in setup.trained) == (name == "warm_up")
        assert not any(path.startswith("decoder/") for path in setup.trained)
    rules = sharding.rules(Geometry.of(MODEL).shapes)
    assert {rule for path, rule in rules.items() if path.startswith("light_head/")} == {"small"}
