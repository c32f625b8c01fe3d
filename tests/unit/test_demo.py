"""calm_jax.data.builders: the demo is the same everywhere, its splits are apart, and what it says is true."""

import subprocess
import sys

import numpy as np
import pytest

from calm_jax.data import attributes, builders, cues, images
from calm_jax.data.builders import demo as demo_lib
from calm_jax.errors import ConfigError


@pytest.fixture(scope="module")
def demo() -> demo_lib.Demo:
    return builders.load("demo")


def test_unknown_datasets_and_splits_are_refused(demo):
    with pytest.raises(ConfigError, match="nearest is 'demo'"):
        builders.load("demos")
    with pytest.raises(ConfigError, match="nearest is 'validation'"):
        demo.indices("valid")


def test_splits_are_apart(demo):
    splits = {split: demo.indices(split) for split in ("train", "validation", "test")}
    assert {split: len(indices) for split, indices in splits.items()} == {"train": 1080, "validation": 90, "test": 96}
    assert sorted(np.concatenate(list(splits.values()))) == list(range(len(demo)))
    names = {split: {demo.record(int(i)).key.split("-")[0] for i in indices} for split, indices in splits.items()}
    assert names["train"] == names["validation"] and len(names["train"]) == 9
    assert len(names["test"]) == 4 and not names["test"] & names["train"]


def test_validation_windows_are_held_out(demo):
    def union(a, b):
        inner = demo_lib._overlap(a, b)
        return inner / (demo_lib._overlap(a, a) + demo_lib._overlap(b, b) - inner)
    windows = {split: [(demo.record(int(i)).key.split("-")[0], demo.record(int(i)).image.window)
                       for i in demo.indices(split)] for split in ("train", "validation")}
    assert all(union(a, b) < demo_lib.NEAR for one, a in windows["validation"] for other, b in windows["train"]
               if one == other)


def test_records_are_complete_and_repeatable(demo):
    again = demo_lib.build()
    keys = set()
    for index in range(len(demo)):
        record = demo.record(index)
        assert record == again.record(index) and record.image.index == index
        keys.add(record.key)
        left, top, right, bottom = record.image.window
        assert 0 <= left < right <= 1 and 0 <= top < bottom <= 1
        assert min(right - left, bottom - top) > 0.49
        assert 1 <= len(record.captions) <= 4 and 1 <= len(record.comments) <= 3
        assert record.scale[0] <= record.score <= record.scale[1]
        assert len(record.image.edits) <= 2 and attributes.together(edit.attribute for edit in record.image.edits)
        assert record.image.edits == attributes.ordered(record.image.edits)
        assert not {edit.attribute for edit in record.image.edits} & set(record.unfit)
    assert len(keys) == len(demo)
    assert set(attributes.ATTRIBUTES) >= {name for p in demo.photographs for name in p.unfit}


def test_scores_and_comments_follow_the_edits(demo):
    scores = []
    for index in range(len(demo)):
        record = demo.record(index)
        edits = record.image.edits
        scores.append(record.score)
        assert (record.score == demo_lib.BEST) == (not edits)
        for edit in edits:
            phrases = attributes.get(edit.attribute).cues.answers[edit.grade]
            assert all(any(phrase in comment for phrase in phrases) for comment in record.comments)
        if any((edit.attribute, edit.grade) == ("saturation", 0) for edit in edits):
            assert not any(demo_lib._COLOURS.search(caption) for caption in record.captions)
    assert np.std(scores) > 1.0


def test_pixels_are_decoded_once_and_protected(demo):
    first = demo.pixels(0)
    assert demo.pixels(1) is first and first.dtype == np.uint8 and first.shape == (512, 512, 3)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0, 0] = 1


def test_every_degradation_shows(demo):
    silent = 0
    for index in range(0, len(demo), 3):
        record = demo.record(index)
        square, doubtful = images.render_noting(images.Fitter(demo.pixels(index)), record.image, 96)
        assert square.shape == (96, 96, 3)
        silent += any(edit.attribute in doubtful for edit in record.image.edits)
    assert silent <= 2


def test_a_missing_package_is_one_sentence(monkeypatch):
    monkeypatch.setattr(demo_lib.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"skimage, which is not installed; run: pip install calm_jax"):
        demo_lib.build()


def test_loading_imports_none_of_the_packages():
    code = ("import sys; from calm_jax.data import builders; builders.load('demo').pixels(0); "
            "print(sorted({'skimage', 'sklearn', 'matplotlib', 'pooch', 'jax'} & set(sys.modules)))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_composed_texts_use_the_bank(demo):
    bank = {cues.normal(phrase) for entry in cues.CUES.values() for grade in entry.answers for phrase in grade}
    edited = [demo.record(i) for i in range(len(demo)) if demo.record(i).image.edits]
    for record in edited[:40]:
        sentences = record.comments[0].rstrip(".").split(". ")
        assert sum(cues.normal(sentence) in bank for sentence in sentences) == len(record.image.edits)
