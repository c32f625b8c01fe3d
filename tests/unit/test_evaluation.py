"""calm_jax.evaluate: protocols against answers whose worth is known, and the program over real checkpoints."""

import json
import sys
import types

import jax
import miniature
import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.commands import evaluate
from calm_jax.data import attributes, builders
from calm_jax.data.cues import CUES
from calm_jax.data.samples import Edit, ImageRef, Record
from calm_jax.data.tasks import instructions
from calm_jax.data.tasks.opinions import held_out
from calm_jax.errors import ConfigError
from calm_jax.evaluation import charts, degradations, metrics, peers, personalised, protocols, suggesting
from calm_jax.evaluation.replies import Replies
from calm_jax.inference.generate import Generator
from calm_jax.inference.scorer import Score
from calm_jax.models.parameters import initial
from calm_jax.text import chat as chat_lib


@pytest.fixture(scope="module")
def photograph():
    """A colourful picture with fine and coarse detail, 96 high and 128 wide."""
    rng = np.random.default_rng(3)
    y, x = np.mgrid[0:96, 0:128]
    waves = np.stack([np.sin(x / 9) + np.cos(y / 5), np.sin((x + y) / 13), np.cos(x * y / 700)], -1)
    return np.clip(125 + 45 * waves + rng.normal(0, 4, (96, 128, 3)), 0, 255).astype(np.uint8)


# ---- flaws -------------------------------------------------------------------------------------------------------


def test_flaws_are_those_that_advice_undoes():
    for name, grade in degradations.FLAWS:
        assert grade in attributes.get(name).flaws and grade in CUES[name].advice and attributes.get(name).absolute
    assert {name for name, _ in degradations.FLAWS} == {
        attribute.name for attribute in attributes.ATTRIBUTES.values() if attribute.absolute}


def measured(picture):
    """What the flaws change: light, spread, colour, balance, fine detail, corners."""
    x = picture.astype(float)
    grey, height, width = x.mean(-1), *x.shape[:2]
    corners = np.concatenate([grey[:height // 6, :width // 6].ravel(), grey[-height // 6:, -width // 6:].ravel()])
    return {"light": grey.mean(), "spread": grey.std(), "colour": (x.max(-1) - x.min(-1)).mean(),
            "green": (x[..., 1] - (x[..., 0] + x[..., 2]) / 2).mean(),
            "detail": np.abs(np.diff(grey, axis=1)).mean(), "corners": corners.mean() - grey.mean()}


@pytest.mark.parametrize(("flaw", "name", "sign"), [
    (("exposure", 0), "light", -1), (("exposure", 2), "light", 1), (("contrast", 0), "spread", -1),
    (("contrast", 2), "spread", 1), (("saturation", 0), "colour", -1), (("saturation", 1), "colour", -1),
    (("tint", 0), "green", -1), (("tint", 2), "green", 1), (("sharpness", 2), "detail", -1),
    (("noise", 2), "detail", 1), (("vignetting", 2), "corners", -1)])
def test_a_flaw_moves_what_training_moves_with_the_same_grade(photograph, flaw, name, sign):
    before = measured(photograph)[name]
    changes = [measured(degradations.degrade(photograph, flaw, seed))[name] - before for seed in range(5)]
    theirs = measured(attributes.apply(photograph, Edit(*flaw, seed=1)))[name] - before
    assert all(sign * change > 0 for change in changes) and sign * theirs > 0
    assert len({round(change, 6) for change in changes}) > 1 or flaw == ("saturation", 0)
    assert (degradations.degrade(photograph, flaw, 2) == degradations.degrade(photograph, flaw, 2)).all()


@pytest.mark.parametrize("grade", [0, 2])
def test_a_flaw_tilts_to_the_side_of_its_grade(grade):
    """The angle of a horizon, fitted to where dark becomes bright in each column."""
    def angle(picture):
        rows = np.argmax(picture[..., 0] > 128, axis=0)
        return np.degrees(np.arctan(np.polyfit(np.arange(len(rows)), rows, 1)[0]))

    horizon = np.zeros((200, 200, 3), np.uint8)
    horizon[100:] = 255
    ours = angle(degradations.degrade(horizon, ("tilt", grade), 4))
    theirs = angle(attributes.apply(horizon, Edit("tilt", grade, 4)))
    assert 7 < abs(ours) < 13 and np.sign(ours) == np.sign(theirs)


def test_the_other_flaws(photograph):
    assert (degradations.degrade(photograph, ("orientation", 1), 0) == photograph[::-1, ::-1]).all()
    covered = np.abs(degradations.degrade(photograph, ("occlusion", 2), 0).astype(int) - photograph).max(-1) > 12
    assert 0.1 < covered.mean() < 0.7
    blocky = degradations.degrade(photograph, ("compression", 2), 0)
    assert 3 < np.abs(blocky.astype(int) - photograph).mean() < 40


# ---- suggestions -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "undone"), [
    ("Brighten the picture or expose longer.", ("exposure: dark",)),
    ("I would lighten it: raise the exposure by a stop.", ("exposure: dark",)),
    ("Rotate it counterclockwise. Apply noise reduction.", ("tilt: right", "noise")),
    ("The picture tells a story.", ()), (instructions.NOTHING_TO_IMPROVE[0], ()), ("", ())])
def test_what_a_suggestion_undoes(text, undone):
    assert set(undone) <= set(suggesting.undone(text)) and bool(undone) == bool(suggesting.undone(text))


def test_all_advice_of_the_bank_is_read_as_what_it_is():
    for name, cues in CUES.items():
        for grade, texts in cues.advice.items():
            for text in texts:
                assert suggesting.undone(text) == (suggesting.kind((name, grade)),)


class Adviser:
    """Stands where a generator does: it answers from what it is shown."""

    def __init__(self, answer):
        self.answer, self.size = answer, 64
        self.layout = type("Layout", (), {"parts": ("low",)})

    def answers(self, questions, pixels, *, limit):
        for sample, _ in questions:
            yield self.answer(pixels(sample.images[0].index))


def test_advice_that_fits_everything_gains_nothing():
    data = builders.load("demo")
    indices = np.arange(0, 1000, 50)
    everything = " ".join(texts[0] for cues in CUES.values() for texts in cues.advice.values())
    found = suggesting.suggesting(Adviser(lambda picture: everything), data, indices, draws=2)
    assert 20 < len(found) <= 40 and all(item.right for item in found)
    rows = suggesting.suggestion_table(found)
    assert rows[-1]["flaw"] == "all" and rows[-1]["right"] == pytest.approx(1) and rows[-1]["gain"] == pytest.approx(0)
    assert all(row["elsewhere"] == 1 and row["gain_interval"] == pytest.approx((0, 0)) for row in rows)
    turn = suggesting.suggesting(Adviser(lambda picture: CUES["tilt"].advice[0][0]), data, indices, draws=4)
    table = {row["flaw"]: row for row in suggesting.suggestion_table(turn)}  # the same to everybody
    assert table["tilt: left"]["right"] == table["tilt: left"]["elsewhere"] == 1 and table["tilt: left"]["gain"] == 0
    assert table["all"]["gain"] == pytest.approx(0)
    grey = suggesting.suggesting(Adviser(lambda picture: "Bring the colour back." if np.ptp(picture, -1).mean() < 2 else
                                         "Leave it."), data, indices, draws=8)
    table = {row["flaw"]: row for row in suggesting.suggestion_table(grey, control=grey)}
    assert table["saturation"]["right"] > table["saturation"]["elsewhere"] + 0.05  # some are grey untouched
    assert table["exposure: dark"]["right"] == 0 and table["all"]["control_gain"] == 0
    assert sum(row["n"] for name, row in table.items() if name != "all") == table["all"]["n"] == len(grey)


# ---- personal scores ---------------------------------------------------------------------------------------------


class Rated:
    """Thirty pictures that forty people have rated: everybody likes what is bright, and half of them the opposite."""

    name = "rated"

    def __init__(self):
        rng = np.random.default_rng(0)
        self.light = rng.permutation(np.linspace(20, 235, 36))
        self.records = [Record(f"{index}", ImageRef(index), scale=(1.0, 7.0), ratings={
            f"rater{rater}": float(np.clip(round(4 + (-1) ** rater * (light - 128) / 45 + rng.normal(0, 0.5)), 1, 7))
            for rater in range(40)}) for index, light in enumerate(self.light)]

    def record(self, index):
        return self.records[index]

    def pixels(self, index):
        return np.full((32, 32, 3), self.light[index], np.uint8)


class Learner:
    """Stands where a generator does: the line through the rated pictures' light and scores, foretold."""

    layout = type("Layout", (), {"parts": ("low", "middle")})
    longest = 512

    def fits(self, sample):
        return len(sample.images) <= 21

    def remember(self, sample, turns, pixels):
        light = [pixels(image.index).mean() for image in sample.images[:turns]]
        said = [float(turn.answer.text.rstrip(".")) for turn in sample.turns[:turns]]
        assert all(turn.answer.weight == 0 for turn in sample.turns[:turns])
        return np.polyfit(light, said, 1)

    def scores(self, questions, pixels, *, batch, memory):
        for sample, _ in questions:
            light = pixels(sample.images[-1].index).mean()
            yield Score(5.5 + light / 1e4 if memory is None else float(np.polyval(memory, light)))


def test_personal_scores_are_judged_by_rater():
    data, asked, shown = Rated(), range(12), range(12, 36)
    strangers = [f"rater{rater}" for rater in range(40) if held_out(f"rater{rater}")]
    learner = personalised.InContext(Learner(), data)
    found = personalised.personalised(learner, data, asked, shown, shots=(0, 2, 20))
    assert {item.rater for item in found} == set(strangers) and len(strangers) > 4
    assert all(item.key in map(str, asked) for item in found)
    table = {(row["arm"], row["shots"]): row for row in personalised.personal_table(found)}
    assert table["own", 20]["srcc"] > 0.8 and table["own", 20]["gain"] > 0.5 and table["own", 20]["mae"] < 1.3
    assert table["own", 20]["gain_interval"][0] > 0 and abs(table["permuted", 20]["srcc"]) < 0.6
    assert abs(table["own", 0]["srcc"]) < 0.7  # nothing known: what is bright, for friends of the dark as well
    crowd = [np.mean([score for rater, score in data.record(index).ratings.items() if not held_out(rater)])
             for index in asked]
    item = next(item for item in found if item.arm == "crowd")
    assert item.said == pytest.approx(1 + 9 * (crowd[int(item.key)] - 1) / 6)
    assert np.isnan(table["mean", 20]["srcc"]) and table["mean", 20]["mae"] > table["own", 20]["mae"]
    assert table["own", 20]["over_none_interval"][0] > 0 and "over_none" not in table["own", 0]
    few = personalised.personalised(learner, data, asked, shown, shots=(2,), raters=3)
    assert len({item.rater for item in few}) == 3
    split = personalised.personalised(learner, data, asked, shown, shots=(24,))  # two contexts of twelve
    ten = personalised.personalised(personalised.InContext(Learner(), data, 10), data, asked, shown, shots=(24,))
    for item, other in zip(split, ten, strict=True):
        assert (item.said == other.said) == (item.arm in ("crowd", "mean")) and abs(item.said - other.said) < 5
    for most, shots, sentence in (
            (22, (22,), "22 rated pictures do not fit into one context of this model; at most"),
            (0, (30,), "no held-out rater of rated has rated 5 of the pictures in question and 30")):
        with pytest.raises(ConfigError, match=sentence):
            personalised.personalised(personalised.InContext(Learner(), data, most), data, asked, shown, shots=shots)


def test_personal_scores_in_closed_form_are_judged_in_the_same_way():
    """Features that tell the light, and generic scores that like it: friends of the dark are told by their ratings."""
    data, asked, shown = Rated(), range(12), range(12, 36)
    class Seer(Learner):
        def statistics(self, refs, pixels):
            turn = np.pi * np.asarray([pixels(ref.index).mean() for ref in refs]) / 255
            one = np.stack([np.cos(turn), np.sin(turn), -np.cos(turn), -np.sin(turn)], 1)
            return {"high": np.stack([one, one], 1)}

        def scores(self, questions, pixels, *, reader, batch):
            assert reader == "light"
            return (Score(1 + 9 * pixels(sample.images[0].index).mean() / 255) for sample, _ in questions)

    with_scores = personalised.ByRidge(Seer(), data, [*asked, *shown], reader="light")
    table = {(row["arm"], row["shots"]): row for row in personalised.personal_table(
        personalised.personalised(with_scores, data, asked, shown, shots=(0, 20)))}
    assert table["own", 20]["over_none"] > 0.15 and table["own", 20]["gain"] > 0.15
    assert table["own", 20]["over_none_interval"][0] > 0
    alone = personalised.ByRidge(Seer(), data, [*asked, *shown], reader="")
    found = personalised.personalised(alone, data, asked, shown, shots=(0, 20))
    assert not any(item.arm == "own" and item.shots == 0 for item in found)  # without ratings nothing is known
    table = {(row["arm"], row["shots"]): row for row in personalised.personal_table(found)}
    assert table["own", 20]["srcc"] > 0.7 and "over_none" not in table["own", 20]


def test_no_question_is_asked_twice_after_an_interruption(tmp_path):
    """Of scores and texts, wherever it stopped: between two calls, in one, or in the middle of a line."""
    class Counting:
        layout, size, longest = None, 32, 512

        def __init__(self, fails_at):
            self.asked, self.fails_at = [], fails_at

        def fits(self, sample):
            return True

        def remember(self, *_):
            self.asked.append("memory")
            return "memory"

        def answers(self, questions, pixels, *, limit):
            for question in questions:
                if len(self.asked) == self.fails_at:
                    raise KeyboardInterrupt
                self.asked.append(question)
                yield f"{question}, {limit}"

        def scores(self, questions, pixels, *, memory, batch):
            for text in self.answers(questions, pixels, limit=memory):
                yield Score(float(text[0]), text=text)

    def protocol(replies):
        first = list(replies.answers(["1", "2", "3"], None, limit=5))
        memory = replies.remember(None, 1, None)
        scores = list(replies.scores(iter(["4", "5"]), None, memory=memory, batch=2))
        return first, [(score.value, score.text) for score in scores], list(replies.answers([], None, limit=1)), list(
            replies.answers(["6"], None, limit=7))

    file, expected = tmp_path / "deep" / "replies", protocol(Replies(Counting(-1), tmp_path / "whole", {"model": "a"}))
    for stop in (0, 2, 4, 5, 6):
        file.unlink(missing_ok=True)
        first = Counting(stop)
        with pytest.raises(KeyboardInterrupt):
            protocol(Replies(first, file, {"model": "a"}))
        with file.open("a") as stream:
            stream.write('["half of a')
        second = Counting(-1)
        assert protocol(Replies(second, file, {"model": "a"})) == expected
        asked = [question for question in first.asked + second.asked if question != "memory"]
        assert asked == list("123456")
        third = Counting(0)
        assert protocol(Replies(third, file, {"model": "a"})) == expected and not third.asked
    other = Counting(-1)
    assert protocol(Replies(other, file, {"model": "b"})) == expected and len(other.asked) == 7


# ---- scores ------------------------------------------------------------------------------------------------------


def test_accuracies():
    true = np.asarray([4.0, 4.5, 6.0, 7.0, 8.0, 9.0])
    assert metrics.accuracy(true, true, 5) == metrics.balanced_accuracy(true, true, 5) == 1
    constant = np.full(6, 6.0)
    assert metrics.accuracy(constant, true, 5) == pytest.approx(4 / 6)
    assert metrics.balanced_accuracy(constant, true, 5) == 0.5
    assert np.isnan(metrics.balanced_accuracy(constant, true, 1)) and np.isnan(metrics.accuracy([], [], 5))


def test_calibration_is_a_line_for_a_calibrated_model():
    rng = np.random.default_rng(0)
    said = rng.uniform(3, 8, 5000)
    means, truths = charts.calibration(said, said + rng.normal(0, 1, 5000))
    np.testing.assert_allclose(means, truths, atol=0.15)
    assert len(means) == charts.BINS and np.all(np.diff(means) > 0)


def test_what_is_asked_for_a_score_is_known_to_a_thousandth():
    data = builders.load("demo")
    generator = Generator(miniature.MODEL, initial(miniature.MODEL, jax.random.key(0)), chat_lib.load())
    answered = protocols.opinions(generator, data, [0, 40], "score", "expectation")
    record = data.record(40)
    lowest, highest = record.scale
    assert float(answered[1].true) == pytest.approx(1 + 9 * (record.score - lowest) / (highest - lowest), abs=1e-4)


@pytest.mark.parametrize(("task", "reader"), [("score", "expectation"), ("score", "levels"), ("comment", "text")])
def test_every_picture_is_asked_what_programs_ask(task, reader):
    """Scores are compared between pictures, so the words of the question must not differ between them."""
    data = builders.load("demo")
    generator = Generator(miniature.MODEL, initial(miniature.MODEL, jax.random.key(0)), chat_lib.load())
    asked = {answer.question for answer in protocols.opinions(generator, data, range(0, 200, 40), task, reader)}
    assert asked == {instructions.COMMENT[0] if task == "comment" else instructions.for_reader(reader)}


# ---- the program -------------------------------------------------------------------------------------------------


def test_comparisons_are_not_asked_of_who_never_learned_them():
    """The other questions are the same ones."""
    class Silent:
        layout, size = types.SimpleNamespace(parts=config_lib.LEVELS), 32

        def answers(self, asked, pixels, limit):
            return [""] * len(asked)

    data = builders.load("demo")
    both, alone = (protocols.attributes(Silent(), data, data.indices("test")[:6], comparisons=asked)
                   for asked in (True, False))
    assert len(both) > len(alone) > 20 and alone == [item for item in both if item.kind == "grade"]


def run(*words):
    return miniature.run([sys.executable, "-m", "calm_jax.evaluate", *map(str, words)], miniature.environment())


@pytest.mark.slow
def test_several_checkpoints_in_one_table_measured_once(tmp_path):
    models = [miniature.saved(tmp_path / name, config_lib.PARTS) for name in ("one", "two")]
    out = tmp_path / "out"
    command = ("--workdir", ",".join(models), "--task", "scoring", "--dataset", "demo", "--records", 12, "--reader",
               "expectation", "--out", out)
    done = run(*command)
    assert done.returncode == 0, done.stderr
    assert "balanced_accuracy" in done.stdout and all(f"| {model} |" in done.stdout for model in models)
    results = [json.loads((out / f"scoring-demo-test-expectation-{number}.json").read_text()) for number in (1, 2)]
    assert len(results[0]["answers"]) == 12 and results[0]["table"] == results[1]["table"]
    assert (out / "scoring-demo-test-expectation-1.png").stat().st_size > 10_000
    assert (out / "scoring-demo-test-expectation.md").is_file()
    again = run(*command)
    assert again.stdout.count("known already") == 2 and "answer/s" not in again.stderr
    other = run(*(word if word != 12 else 6 for word in command))
    assert other.stdout.count("known already") == 0 and "answer/s" in other.stderr


def test_suggestions_and_comments_are_measured(tmp_path):
    model = miniature.saved(tmp_path / "one", config_lib.PARTS)
    done = run("--workdir", model, "--task", "suggesting", "--records", 2, "--control", model)
    assert done.returncode == 0, done.stderr
    assert "elsewhere" in done.stdout and "gain over control" in done.stdout
    assert (tmp_path / "one" / "evaluation" / "suggesting-demo-test.png").is_file()
    done = run("--workdir", model, "--task", "commenting", "--records", 4)
    assert done.returncode == 0 and "distinct" in done.stdout
    assert "BLEU-4" in done.stdout or "not computed" in done.stdout
    wrong = run("--workdir", model, "--task", "personalised", "--dataset", "demo", "--shots", "0,two")
    assert wrong.returncode == 2 and "--shots 0,two are not all whole numbers" in wrong.stderr


def test_published_figures_stand_beside_ours():
    result = {"task": "scoring", "dataset": "ava", "split": "test", "model": "mine",
              "table": {"n": 2, "plcc": 0.8, "plcc_interval": [0.7, 0.9], "srcc": None, "parse_failures": 0.0}}
    lines = evaluate.compare([result]).splitlines()
    assert lines[0].split(" | ")[1:4] == ["n", "PLCC", "SRCC"]
    assert lines[2].startswith("| mine | 2 | 0.800 [0.700, 0.900] | undefined | 0.000 |")
    assert any(line.startswith("| CALM |") and "0.829" in line for line in lines) and len(lines) == 3 + 9
    assert not peers.published("scoring", "para")
