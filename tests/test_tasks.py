"""calm_jax.data.tasks: labels agree with edits and answers whatever the seed; only given parts are mentioned."""

import collections
import dataclasses

import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.data import attributes, builders, tasks
from calm_jax.data.samples import BadRecord, Mention

PARTS = config_lib.PARTS
DRAWS = 900


@pytest.fixture(scope="module")
def demo():
    return builders.load("demo")


@pytest.fixture(scope="module")
def drawn(demo):
    rng = np.random.default_rng(0)
    indices = demo.indices("train")
    return [tasks.make(("attributes", "comparisons")[draw % 3 // 2], demo, int(rng.choice(indices)), rng, PARTS)
            for draw in range(DRAWS)]


def mentions(sample):
    return [piece for turn in sample.turns for piece in turn.prompt if isinstance(piece, Mention)]


def split_label(turn):
    name, _, truth = turn.label.replace("=", ":").partition(":")
    return name, truth


def test_unknown_tasks_and_useless_parts_are_refused(demo):
    rng = np.random.default_rng(0)
    with pytest.raises(config_lib.ConfigError, match="nearest is 'caption'"):
        tasks.make("captions", demo, 0, rng, PARTS)
    with pytest.raises(config_lib.ConfigError, match="add one of them"):
        tasks.make("attributes", demo, 0, rng, ("thematic",))
    with pytest.raises(config_lib.ConfigError, match="add one of them"):
        tasks.make("comparisons", demo, 0, rng, ("thematic",))


@pytest.mark.parametrize("task", tasks.TASKS)
def test_a_sample_is_a_function_of_the_seed(demo, task):
    one, two, other = (tasks.make(task, demo, 3, np.random.default_rng(seed), PARTS) for seed in (1, 1, 2))
    assert one == two and one != other
    assert one.name == f"demo/{task}/{demo.record(3).key}"


def test_labels_agree_with_edits_and_answers(drawn, demo):
    for sample in drawn:
        assert sample.turns
        for turn in sample.turns:
            name, truth = split_label(turn)
            edits = [{edit.attribute: edit.grade for edit in image.edits} for image in sample.images]
            attribute = attributes.get(name)
            grades = [edit.get(name, attribute.neutral) for edit in edits]
            if len(grades) == 1:
                assert attributes.grade_of(name, turn.answer.text) == int(truth) == grades[0]
                assert attribute.absolute
            else:
                assert attributes.choice_of(name, turn.answer.text) == truth
                question = turn.prompt[-1].strip()
                assert (question in attribute.cues.more) != (question in attribute.cues.less)
                higher = np.argmax(grades) if question in attribute.cues.more else np.argmin(grades)
                assert truth == ("first", "second")[higher] and grades[0] != grades[1]


def test_pictures_are_whole_windows_with_consistent_edits(drawn, demo):
    for sample in drawn:
        record = demo.record(sample.images[0].index)
        for image in sample.images:
            assert image.window == record.image.window
            assert image.edits == attributes.ordered(image.edits)
            assert attributes.together(edit.attribute for edit in image.edits)
        if len(sample.images) == 1:
            asked = [split_label(turn) for turn in sample.turns]
            assert attributes.consistent({name: int(grade) for name, grade in asked})
            assert {edit.attribute for edit in sample.images[0].edits} <= {name for name, _ in asked}
            assert not {name for name, _ in asked} & set(record.unfit)
            assert len({name for name, _ in asked}) == len(asked)


def test_each_level_is_mentioned_once_and_first(drawn):
    for sample in drawn:
        assert all(len(mention.parts) == 1 for mention in mentions(sample))
        assert len(set(mentions(sample))) == len(mentions(sample))
        shown = set()
        for turn in sample.turns:
            shown |= {(piece.image, piece.parts[0]) for piece in turn.prompt if isinstance(piece, Mention)}
            level = attributes.get(split_label(turn)[0]).level
            assert {(image, level) for image in range(len(sample.images))} <= shown


def test_answers_are_about_balanced(drawn):
    counts = collections.defaultdict(collections.Counter)
    for sample in drawn:
        for turn in sample.turns:
            name, truth = split_label(turn)
            counts[name, len(sample.images)][truth] += 1
    choices = sum((count for (_, images), count in counts.items() if images == 2), collections.Counter())
    assert 0.4 < choices["first"] / choices.total() < 0.6
    for (name, images), count in counts.items():
        if images == 1:
            assert len(count) == len(attributes.get(name).grades), name
            assert max(count.values()) / count.total() < 1.4 / len(count), (name, count)
    assert {name for name, _ in counts} == set(attributes.ATTRIBUTES)


@pytest.mark.parametrize("task", ["attributes", "comparisons"])
@pytest.mark.parametrize("parts", [("low",), ("middle", "thematic"), ("low", "high")])
def test_only_given_parts_are_asked(demo, task, parts):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sample = tasks.make(task, demo, seed * 4, rng, parts)
        assert {part for mention in mentions(sample) for part in mention.parts} <= set(parts)
        assert {attributes.get(split_label(turn)[0]).level for turn in sample.turns} <= set(parts)


@pytest.mark.parametrize(("task", "parts", "shown"), [
    ("caption", PARTS, ("thematic",)), ("caption", ("low", "high"), ("low", "high")),
    ("comment", PARTS, PARTS), ("score", PARTS, PARTS), ("score", ("thematic", "low"), ("low", "thematic")),
])
def test_parts_are_mentioned_in_order(demo, task, parts, shown):
    sample = tasks.make(task, demo, 0, np.random.default_rng(0), parts)
    assert mentions(sample) == [Mention(0, shown)]


def test_known_facts_become_answers(demo):
    for index in range(0, len(demo), 7):
        record = demo.record(index)
        rng = np.random.default_rng(index)
        caption, comment, score = (tasks.make(task, demo, index, rng, PARTS)
                                   for task in ("caption", "comment", "score"))
        assert caption.images == comment.images == score.images == (record.image,)
        assert caption.turns[0].answer.text in record.captions
        assert comment.turns[0].answer.text in record.comments
        assert score.turns[0].answer.text == f"{record.score:.1f}." and score.target == pytest.approx(record.score)


@pytest.mark.parametrize(("score", "scale", "text"), [
    (0.0, (0.0, 1.0), "1.0."), (1.0, (0.0, 1.0), "10.0."), (3.0, (1.0, 5.0), "5.5."), (6.52, (1.0, 10.0), "6.5."),
])
def test_scores_are_mapped_to_one_to_ten(score, scale, text):
    assert tasks.score_text(tasks.mapped(score, scale)) == text


def test_instructions_are_many():
    for prompts in (tasks.CAPTION_PROMPTS, tasks.COMMENT_PROMPTS, tasks.SCORE_PROMPTS):
        assert len(set(prompts)) == len(prompts) >= 8


@pytest.mark.parametrize("task", ["caption", "comment", "score"])
def test_a_record_without_the_fact_is_a_bad_record(demo, task):
    class Bare:
        name = "bare"

        def record(self, index):
            return dataclasses.replace(demo.record(index), captions=(), comments=(), score=None)

    with pytest.raises(BadRecord, match=f"task {task} needs"):
        tasks.make(task, Bare(), 0, np.random.default_rng(0), PARTS)
