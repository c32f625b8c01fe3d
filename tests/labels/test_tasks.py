"""calm_jax.data.tasks: labels agree with edits and answers whatever the seed; only given parts are mentioned."""

import collections
import dataclasses

import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.data import attributes, builders, tasks
from calm_jax.data import scale as scale_lib
from calm_jax.data.samples import BadRecord, Mention
from calm_jax.data.tasks import composed, instructions, opinions
from calm_jax.data.tasks.context import Context
from calm_jax.errors import ConfigError

PARTS = config_lib.PARTS
CONTEXT = Context(PARTS)
DRAWS = 900


@pytest.fixture(scope="module")
def demo():
    return builders.load("demo")


@pytest.fixture(scope="module")
def drawn(demo):
    rng = np.random.default_rng(0)
    indices = demo.indices("train")
    return [tasks.make(("attributes", "comparisons")[draw % 3 // 2], demo, int(rng.choice(indices)), rng, CONTEXT)
            for draw in range(DRAWS)]


def mentions(sample):
    return [piece for turn in sample.turns for piece in turn.prompt if isinstance(piece, Mention)]


def split_label(turn):
    name, _, truth = turn.label.replace("=", ":").partition(":")
    return name, truth


def test_unknown_tasks_and_useless_parts_are_refused(demo):
    rng = np.random.default_rng(0)
    with pytest.raises(ConfigError, match="nearest is 'caption'"):
        tasks.make("captions", demo, 0, rng, CONTEXT)
    with pytest.raises(ConfigError, match="add one to the process"):
        tasks.make("attributes", demo, 0, rng, Context(("thematic",)))
    with pytest.raises(ConfigError, match="add one to the process"):
        tasks.make("comparisons", demo, 0, rng, Context(("thematic",)))


@pytest.mark.parametrize("task", ["attributes", "comparisons", "caption", "comment", "score", "level", "suggestion"])
def test_a_sample_is_a_function_of_the_seed(demo, task):
    one, two, other = (tasks.make(task, demo, 3, np.random.default_rng(seed), CONTEXT) for seed in (1, 1, 2))
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


def test_a_terse_question_is_the_name_of_the_attribute(demo):
    """Of the same pictures the same grades are asked, in the same order."""
    for seed in range(20):
        usual, terse = (tasks.make("attributes", demo, seed * 4, np.random.default_rng(seed),
                                   Context(PARTS, terse=share)) for share in (0.0, 1.0))
        assert usual.images == terse.images and [turn.label for turn in usual.turns] == [
            turn.label for turn in terse.turns]
        for turn in terse.turns:
            name, truth = split_label(turn)
            assert str(turn.prompt[-1]).strip() == f"{name.capitalize()}?"
            assert turn.answer.text == f"{attributes.get(name).grades[int(truth)].capitalize()}."


@pytest.mark.parametrize("task", ["attributes", "comparisons"])
@pytest.mark.parametrize("parts", [("low",), ("middle", "thematic"), ("low", "high")])
def test_only_given_parts_are_asked(demo, task, parts):
    for seed in range(40):
        rng = np.random.default_rng(seed)
        sample = tasks.make(task, demo, seed * 4, rng, Context(parts))
        assert {part for mention in mentions(sample) for part in mention.parts} <= set(parts)
        assert {attributes.get(split_label(turn)[0]).level for turn in sample.turns} <= set(parts)


@pytest.mark.parametrize(("task", "parts", "shown"), [
    ("caption", PARTS, ("thematic",)), ("caption", ("low", "high"), ("low", "high")),
    ("comment", PARTS, PARTS), ("score", PARTS, PARTS), ("score", ("thematic", "low"), ("low", "thematic")),
])
def test_parts_are_mentioned_in_order(demo, task, parts, shown):
    sample = tasks.make(task, demo, 0, np.random.default_rng(0), Context(parts))
    assert mentions(sample) == [Mention(0, shown)]


@pytest.mark.parametrize(("score", "word"), [(1.0, "Bad."), (2.1, "Bad."), (2.2, "Poor."), (5.5, "Fair."),
                                             (7.0, "Good."), (8.8, "Good."), (8.9, "Excellent."), (10.0, "Excellent.")])
def test_a_level_is_the_nearest_of_five_words(demo, score, word):
    record = dataclasses.replace(demo.record(0), score=score, scale=(1.0, 10.0))
    (turn,) = opinions.level(record, np.random.default_rng(0), CONTEXT)[1]
    assert turn.answer.text == word == scale_lib.level_text(score) and turn.subject == "level"
    assert all(name.lower() in turn.prompt[-1] for name in scale_lib.LEVELS) or "from bad to" in turn.prompt[-1]


def test_known_facts_become_answers(demo):
    for index in range(0, len(demo), 7):
        record = demo.record(index)
        rng = np.random.default_rng(index)
        caption, comment, score = (tasks.make(task, demo, index, rng, CONTEXT)
                                   for task in ("caption", "comment", "score"))
        assert caption.images == comment.images == score.images == (record.image,)
        assert caption.turns[0].answer.text in record.captions
        assert comment.turns[0].answer.text in record.comments
        assert score.turns[0].answer.text == f"{record.score:.1f}." and score.target == pytest.approx(record.score)


@pytest.mark.parametrize(("score", "scale", "text"), [
    (0.0, (0.0, 1.0), "1.0."), (1.0, (0.0, 1.0), "10.0."), (3.0, (1.0, 5.0), "5.5."), (6.52, (1.0, 10.0), "6.5."),
])
def test_scores_are_mapped_to_one_to_ten(score, scale, text):
    assert scale_lib.score_text(scale_lib.mapped(score, scale)) == text


def test_instructions_are_many():
    for prompts in (instructions.CAPTION, instructions.COMMENT, instructions.SCORE, instructions.SUGGEST,
                    instructions.PERSONAL):
        assert len(set(prompts)) == len(prompts) >= 8


def test_soft_digits_are_a_gaussian_whose_mean_is_the_score():
    for target in (1.0, 1.04, 3.46, 5.5, 6.97, 9.3, 9.9):
        soft = scale_lib.soft_digits(target, 0.6)
        text = scale_lib.score_text(target)
        first, second = soft[0], soft[2]
        assert sum(first.values()) == pytest.approx(1) and sum(second.values()) == pytest.approx(1)
        near = {f"{tenth / 10:.1f}"[0] for tenth in range(10, 101) if abs(tenth / 10 - target) < 0.8}
        assert near <= first.keys() <= set("123456789") and text[2] in second
        if 3 < target < 8:  # the second digits of the other first digits follow the same Gaussian
            mean = sum(p * (float(digit) + (0.45 if digit != text[0] else sum(
                float(d) * q / 10 for d, q in second.items()))) for digit, p in first.items())
            assert mean == pytest.approx(target, abs=0.35)
    assert scale_lib.soft_digits(10.0, 0.6) == {}
    narrow = scale_lib.soft_digits(6.5, 0.01)
    assert narrow == {0: {"6": 1.0}, 2: {"5": 1.0}}


def test_spread_comes_from_the_raters_or_the_config(demo):
    record = dataclasses.replace(demo.record(0), score=3.0, scale=(1.0, 5.0), spread=0.2)
    one = single(record)
    rng = np.random.default_rng
    hard = tasks.make("score", one, 0, rng(0), CONTEXT).turns[0].answer
    fixed = tasks.make("score", one, 0, rng(0), Context(PARTS, spread=1.0)).turns[0].answer
    raters = tasks.make("score", one, 0, rng(0), Context(PARTS, spread=1.0, raters=True)).turns[0].answer
    assert hard.text == fixed.text == raters.text == "5.5." and not hard.soft
    assert len(fixed.soft[0]) > len(raters.soft[0]) > 1
    assert raters.soft == scale_lib.soft_digits(5.5, 0.2 * 9 / 4)


def single(*records):
    class Some:
        name = "some"

        def record(self, index):
            return records[index]

    return Some()


def test_a_personal_question_shows_pictures_that_this_person_rated(demo):
    raters = [f"rater{number}" for number in range(12)]
    records = []
    for index in range(10):
        image = dataclasses.replace(demo.record(0).image, index=index, edits=())
        ratings = {rater: float((index + number) % 7 + 1) for number, rater in enumerate(raters) if number != index}
        records.append(dataclasses.replace(demo.record(0), image=image, ratings=ratings, scale=(1.0, 7.0)))
    rated = {rater: np.asarray([i for i, record in enumerate(records) if rater in record.ratings]) for rater in raters}
    context = Context(PARTS, dataset=single(*records), rated=rated, support=(2, 4))
    counts, seen = set(), set()
    for seed in range(60):
        sample = tasks.make("personal", single(*records), 5, np.random.default_rng(seed), context)
        assert [image.index for image in sample.images].count(5) == 1 and sample.images[-1].index == 5
        assert len({image.index for image in sample.images}) == len(sample.images)
        counts.add(len(sample.images) - 1)
        given = [float(turn.answer.text[:-1]) for turn in sample.turns]
        possible = [rater for rater in raters if rater in records[5].ratings and all(
            rater in records[image.index].ratings and scale_lib.score_text(scale_lib.mapped(
                records[image.index].ratings[rater], (1, 7))) == f"{score:.1f}."
            for image, score in zip(sample.images, given, strict=True))]
        assert possible  # all scores are one person's
        seen.update(possible if len(possible) == 1 else ())
        assert [turn.answer.weight for turn in sample.turns] == [0.0] * (len(given) - 1) + [1.0]
        assert [mention.parts for mention in mentions(sample)] == [config_lib.LEVELS] * (len(given) - 1) + [PARTS]
    assert counts == {2, 3, 4} and len(seen) > 3 and not any(map(opinions.held_out, seen))
    share = np.mean([opinions.held_out(f"user{number}") for number in range(2000)])
    assert 0.17 < share < 0.23
    with pytest.raises(BadRecord, match="no rater with 2 other pictures"):
        tasks.make("personal", single(*records), 5, np.random.default_rng(0), Context(PARTS))


def test_a_suggestion_undoes_the_flaw_that_was_put_in(demo):
    said = collections.Counter()
    for seed in range(200):
        sample = tasks.make("suggestion", demo, seed * 5 % len(demo), np.random.default_rng(seed), CONTEXT)
        record, turn = demo.record(seed * 5 % len(demo)), sample.turns[0]
        name, truth = split_label(turn)
        said[name] += 1
        if name == "suggestion":
            assert truth == "none" and turn.answer.text in instructions.NOTHING_TO_IMPROVE
            assert not [edit for edit in sample.images[0].edits if attributes.get(edit.attribute).absolute]
            continue
        attribute = attributes.get(name)
        assert attribute.absolute and name not in record.unfit
        assert {edit.attribute: edit.grade for edit in sample.images[0].edits}[name] == int(truth)
        assert turn.answer.text in attribute.cues.advice[int(truth)]
        assert attributes.together(edit.attribute for edit in sample.images[0].edits)
    assert len(said) > 8 and said["suggestion"] > 2


@pytest.mark.parametrize(("asked", "prompt"), [
    ("What is it?", (Mention(0), " What is it?")), ("<image>\nWhat is it?", (Mention(0), "\nWhat is it?")),
    ("What is it?\n<image>", ("What is it?\n", Mention(0))),
])
def test_a_question_answer_set_keeps_its_conversation(demo, asked, prompt):
    record = dataclasses.replace(demo.record(0), questions=((asked, "A cat."), ("Why?", "It purrs.")))
    sample = tasks.make("question", single(record), 0, np.random.default_rng(0), CONTEXT)
    assert [turn.prompt for turn in sample.turns] == [prompt, ("Why?",)]
    assert [turn.answer.text for turn in sample.turns] == ["A cat.", "It purrs."]


def test_what_nobody_described_is_composed_of_what_is_known_and_says_so(demo):
    record = dataclasses.replace(
        demo.record(0), captions=(), comments=(), score=4.0, scale=(1.0, 5.0), deciles={"acuity": 9, "hue": 2},
        facts={"semantic": "portrait", "emotions": {"neutral": 4, "awe": 6}, "light": 4.6, "composition": 3.2})
    context, texts = Context(PARTS, compose=True), set()
    for seed in range(30):
        caption, comment = (tasks.make(task, single(record), 0, np.random.default_rng(seed), context)
                            for task in ("caption", "comment"))
        assert caption.name.endswith(" (composed)") and comment.name.endswith(" (composed)")
        assert any(text in caption.turns[0].answer.text for text in composed.SCENES["portrait"])
        said = comment.turns[0].answer.text
        assert any(text in said for text in composed.VERDICTS[0][1])  # 4 of 5 is 7.75
        assert "It awes most who see it." in said and "The light is its strength." in said
        assert "The composition is its weakness." in said
        texts |= {said}
    assert len(texts) > 3
    bare = dataclasses.replace(record, facts={}, deciles={})
    with pytest.raises(BadRecord, match=r"nothing is known of record .* that a caption could be composed of"):
        tasks.make("caption", single(bare), 0, np.random.default_rng(0), context)
    assert not tasks.make("comment", demo, 0, np.random.default_rng(0), context).name.endswith("(composed)")


def test_measured_questions_need_deciles_and_pairs_lie_apart(demo):
    records = [dataclasses.replace(demo.record(0), image=dataclasses.replace(demo.record(0).image, index=index),
                                   deciles={"acuity": index, "grain": 5}) for index in range(10)]
    one = tasks.make("measured", single(*records), 3, np.random.default_rng(0), CONTEXT)
    assert {turn.label.split("=")[0] for turn in one.turns} <= {"acuity", "grain"} and one.turns
    context = Context(PARTS, dataset=single(*records), indices=np.arange(10))
    for seed in range(20):
        pair = tasks.make("measured_pair", single(*records), 4, np.random.default_rng(seed), context)
        low, high = (image.index for image in pair.images)
        assert abs(low - high) >= 2 and {turn.subject for turn in pair.turns} == {"acuity"}
    with pytest.raises(BadRecord, match="no other picture beside it"):
        tasks.make("measured_pair", single(*records), 4, np.random.default_rng(0), CONTEXT)


@pytest.mark.parametrize("task", ["caption", "comment", "score", "level", "personal", "question", "measured"])
def test_a_record_without_the_fact_is_a_bad_record(demo, task):
    class Bare:
        name = "bare"

        def record(self, index):
            return dataclasses.replace(demo.record(index), captions=(), comments=(), score=None)

    with pytest.raises(BadRecord, match=f"task {task} needs"):
        tasks.make(task, Bare(), 0, np.random.default_rng(0), CONTEXT)
