"""calm_jax.data.cues: a rich bank whose phrases say what they should and nothing else; files of more, checked."""

from __future__ import annotations

import dataclasses
import json
import pickle
import subprocess
import sys

import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.data import attributes, builders, cues, pipeline, tasks
from calm_jax.data.cues import rules as cue_rules
from calm_jax.data.cues import stored
from calm_jax.data.tasks.context import Context
from calm_jax.errors import ConfigError
from calm_jax.text import chat as chat_lib

NAMES = tuple(attributes.ATTRIBUTES)
EVERY = [(place, text) for place, texts in stored.places(cues.CUES) for text in texts]


@pytest.mark.parametrize("name", NAMES)
def test_the_bank_is_rich(name):
    attribute, bank = attributes.get(name), cues.CUES[name]
    assert all(len(phrases) >= 12 for phrases in bank.answers)
    assert len(bank.questions) >= 8 if attribute.absolute else not bank.questions
    assert len(bank.more) >= 5 and len(bank.less) >= 5
    assert len(bank.more_answers) >= 4 and len(bank.less_answers) >= 4
    assert set(bank.advice) == set(attribute.flaws) and all(len(texts) >= 6 for texts in bank.advice.values())


def test_no_phrase_occurs_twice():
    assert len({cues.normal(text) for _, text in EVERY}) == len(EVERY)
    assert dict(stored.places(cues.CUES)).keys() == {place for place, _ in EVERY}


@pytest.mark.parametrize("name", NAMES)
def test_every_phrase_is_read_as_what_it_is(name):
    wrong = {text: found for (other, kind, grade), text in EVERY
             if other == name and (found := cue_rules.objection(name, kind, grade, text))}
    assert not wrong


@pytest.mark.parametrize("name", NAMES)
def test_no_phrase_is_read_as_what_it_is_not(name):
    bank = cues.CUES[name]
    for grade, phrases in enumerate(bank.answers):
        for other in set(range(len(bank.answers))) - {grade}:
            assert all(cue_rules.objection(name, "answer", other, phrase) for phrase in phrases)
    for kind, other in (("more", "less"), ("less", "more")):
        assert all(cue_rules.objection(name, other, None, text) for text in getattr(bank, kind))
        answers = getattr(bank, f"{kind}_answers")
        assert all(cue_rules.objection(name, f"{other}_answer", None, text) for text in answers)
    if set(bank.advice) == {0, 2}:
        assert all(cue_rules.objection(name, "advice", 2 - grade, text)
                   for grade, texts in bank.advice.items() for text in texts)


@pytest.mark.parametrize(("name", "grade", "text"), [
    ("noise", 0, "The sky is silky smooth with no visible noise."),
    ("noise", 1, "There is a subtle layer of grain in the sky."),
    ("noise", 2, "Noise is overwhelming throughout."),
    ("exposure", 1, "The image is neither overexposed nor underexposed."),
    ("sharpness", 0, "Everything is tack-sharp without a hint of blur."),
    ("sharpness", 1, "The image isn't quite sharp, as if slightly soft."),
    ("vignetting", 0, "There isn’t any darkening in the corners."),
    ("tilt", 1, "The horizon is perfectly level."),
    ("contrast", 1, "The contrast is well balanced without being harsh."),
    ("saturation", 1, "The hues look muted, with faded colors."),
    ("saturation", 0, "A photo in gray tones only, without color."),
    ("compression", 0, "No visible artifacts degrade the image."),
    ("framing", 2, "The subject is cropped far too tightly."),
    ("orientation", 0, "The photo is not flipped."),
])
def test_phrases_of_others_are_understood(name, grade, text):
    assert cue_rules.objection(name, "answer", grade, text) == ""
    for other in set(range(len(cues.CUES[name].answers))) - {grade}:
        assert cue_rules.objection(name, "answer", other, text)


@pytest.mark.parametrize(("name", "grade", "text", "reason"), [
    ("noise", 0, "Noise is slight.", "may mean grade 1"),
    ("noise", 2, "The picture is noisy.", "may mean grade 1 or 2"),
    ("exposure", 2, "It is not too bright.", "may mean grade 0 or 1"),
    ("exposure", 2, "Dark and overexposed.", "contradicts itself"),
    ("sharpness", 0, "The image isn't sharp.", "may mean grade 1 or 2"),
    ("tilt", 1, "The horizon is not level.", "not clearly grade 1"),
    ("contrast", 2, "Harsh contrast and heavy grain.", "speaks of noise"),
    ("tint", 2, "A dog runs over the meadow.", "is not about tint"),
    ("noise", 0, "no noise is visible.", "capital"),
    ("noise", 0, "No noise is visible!", "end"),
    ("noise", 0, "No noise. None at all.", "one sentence"),
    ("noise", 0, "No noise in the {which} picture.", "characters"),
    ("noise", 0, "No noise </s> is visible.", "marker"),
    ("noise", 0, "No  noise is visible.", "white space"),
    ("noise", 0, "No " + "visible " * 20 + "noise.", "characters"),
    ("noise", 0, None, "no text"),
])
def test_what_cannot_serve_is_told_why(name, grade, text, reason):
    assert reason in cue_rules.objection(name, "answer", grade, text)


def test_comparisons_name_a_direction_and_a_place():
    judge = cue_rules.objection
    assert judge("noise", "more", None, "Which photo is grainier?") == ""
    assert "does not clearly" in judge("noise", "less", None, "Which photo is grainier?")
    assert judge("noise", "less", None, "Which photo has less grain?") == ""
    assert "{which}" in judge("noise", "more_answer", None, "The first one is noisier.")
    assert "{which}" in judge("noise", "more_answer", None, "The {which} is noisier than the {which}.")
    assert "opposite" in judge("exposure", "advice", 0, "Brighten the picture and then darken it.")


# ---- banks and files ------------------------------------------------------------------------------------------------


def write(path, *phrases, form=stored.FORMAT):
    path.write_text(json.dumps({"format": form, "phrases": list(phrases), "rejected": [], "requests": {}}))
    cues.bank.cache_clear()
    return str(path)


def phrase(text="Overall, no noise is visible.", attribute="noise", kind="answer", grade=0):
    return {"attribute": attribute, "kind": kind, "grade": grade, "text": text, "request": "noise/answer/0#1"}


def test_the_bank_of_a_process():
    assert cues.bank() == dict(cues.CUES)
    first = cues.bank("", 5)
    for name, entry in first.items():
        assert [len(phrases) for phrases in entry.answers] == [5] * len(entry.answers)
        assert entry.answers[0] == cues.CUES[name].answers[0][:5] and len(entry.advice) == len(cues.CUES[name].advice)
        assert len(entry.questions) in (0, 5) and len(entry.more) == 5 and len(entry.less_answers) >= 4
    assert pickle.loads(pickle.dumps(first)) == first  # worker processes get it
    with pytest.raises(ConfigError, match="phrasings=-1 is negative"):
        cues.bank("", -1)


def test_tasks_say_what_the_bank_of_the_process_says():
    demo = builders.load("demo")
    few = cues.bank("", 1)
    said = set()
    for index in range(60):
        for task in ("attributes", "comparisons"):
            sample = tasks.make(task, demo, index, np.random.default_rng(index), Context(config_lib.PARTS, bank=few))
            for turn in sample.turns:
                name = turn.subject
                known = {*few[name].questions, *few[name].more, *few[name].less}
                question = str(turn.prompt[-1]).strip()
                said.add(name)
                assert any(question.startswith(text) for text in known), question
                assert turn.answer.text in {
                    *(text for texts in few[name].answers for text in texts),
                    *(f"{grade.capitalize()}." for grade in attributes.get(name).grades),
                    *(text for template in few[name].more_answers + few[name].less_answers
                      for text in cues.variations(template))}
    assert said == set(NAMES)


def test_a_file_adds_phrases_and_they_are_read_back(tmp_path):
    path = write(tmp_path / "cues.json", phrase(), phrase("Is there grain, by the way?", kind="question", grade=None),
                 phrase("Overall, the {which} one is noisier.", kind="more_answer", grade=None),
                 phrase("Overall, use a lower ISO.", kind="advice", grade=1))
    bank = cues.bank(path, 2)["noise"]
    assert bank.answers[0] == (*cues.CUES["noise"].answers[0][:2], "Overall, no noise is visible.")
    assert bank.questions[-1] == "Is there grain, by the way?" and bank.advice[1][-1] == "Overall, use a lower ISO."
    assert attributes.grade_of("noise", "overall, no noise is visible", path) == 0
    assert attributes.grade_of("noise", "overall, no noise is visible") is None
    assert attributes.choice_of("noise", "Overall, the second one is noisier.", path) == "second"


@pytest.mark.parametrize(("entries", "sentence"), [
    ([phrase(attribute="noize")], "phrase 1 of .*there is no attribute 'noize'; the nearest is 'noise'"),
    ([phrase(attribute=["noise"])], "there is no attribute"),
    ([phrase(kind="anser")], "there is no kind 'anser'; the nearest is 'answer'"),
    ([phrase(grade=3)], "noise has no answer of grade 3; there is 0 or 1 or 2"),
    ([phrase(grade=True)], "noise has no answer of grade True"),
    ([phrase(grade=None)], "noise has no answer of grade None"),
    ([phrase(grade=0, kind="advice")], "noise has no advice of grade 0; there is 1 or 2"),
    ([phrase(attribute="framing", kind="question", grade=None)], "framing has no questions"),
    ([phrase(), phrase("Overall, NO noise is visible")], "phrase 2 of .*occurs twice"),
    ([phrase("No noise is visible.")], "occurs twice, in the file or in the written bank"),
    ([phrase(" . ")], "phrase 1 of .* has no text"),
    ([phrase(5)], "has no text"),
    ([phrase("The one is noisier.", kind="more_answer", grade=None)], "must hold {which} once"),
    ([phrase("The {which} one.")], "must hold {which} nowhere"),
    (["text"], "is no table"),
])
def test_a_file_that_is_wrong_is_one_sentence(tmp_path, entries, sentence):
    path = write(tmp_path / "cues.json", *entries)
    with pytest.raises(ConfigError, match=sentence) as raised:
        cues.bank(path)
    assert "\n" not in str(raised.value)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match=r"is missing; .*calm cues writes"):
        cues.bank(str(tmp_path / "none.json"))
    for content in ("{", "[]", '{"phrases": []}', '{"format": "calm_jax cues 1", "phrases": 3}', "\xff"):
        (tmp_path / "bad.json").write_text(content, encoding="latin-1")
        with pytest.raises(ConfigError, match=r"bad\.json"):
            cues.bank(str(tmp_path / "bad.json"))


def test_a_process_trains_with_its_file(tmp_path):
    more = [phrase(f"Overall, the {{which}} one has the {word} {cue}.", name, "more_answer", None)
            for name, cue in (("noise", "noise"), ("tint", "green")) for word in ("stronger", "heavier", "greater")]
    process = config_lib.Process(tasks={"comparisons": 1.0}, phrasings=1, cues=write(tmp_path / "cues.json", *more))

    def rows(process):
        return pipeline.Rows(process, {"demo": builders.load("demo")}, chat_lib.load(), config_lib.model("tiny"),
                             seed=0, split="train")

    said = {turn.answer.text for number in range(20) for sample, _ in rows(process).plan(number).texts
            for turn in sample.turns}
    assert any(text.startswith("Overall, the second one has the") for text in said)
    with pytest.raises(ConfigError, match="nowhere"):
        rows(dataclasses.replace(process, cues="nowhere.json"))


def test_loading_the_bank_needs_nothing_else():
    code = ("import sys; from calm_jax.data import cues; cues.bank(); "
            "print(sorted({'jax', 'openai', 'flax', 'PIL', 'scipy'} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
