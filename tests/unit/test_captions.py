"""calm_jax.evaluation.captions: the COCO caption tools' own figures, hand-computed ones, and clear refusals."""

import itertools
import json
import os
import pathlib
import shutil

import numpy as np
import pytest

from calm_jax.data import builders
from calm_jax.errors import ConfigError
from calm_jax.evaluation import captions

DATA = os.environ.get("CALM_DATA")
JAVA = pytest.mark.skipif(shutil.which("java") is None, reason="there is no Java")


class Coco:
    """What pycocoevalcap reads of a COCO annotation file."""

    def __init__(self, texts):
        self.imgToAnns = {number: [{"caption": text} for text in some] for number, some in enumerate(texts)}

    def getImgIds(self):
        return list(self.imgToAnns)


class NoSpice:
    def compute_score(self, truth, _):
        return 0.0, [0.0] * len(truth)

    def method(self):
        return "no SPICE"


def pccd():
    critiques = json.loads((pathlib.Path(DATA) / "pccd" / "guru_test.json").read_text())
    texts = [(item["general_impression"], [item[name] for name in ("subject_of_photo", "color_lighting", "focus")])
             for item in critiques if all(isinstance(item.get(name), str) and item[name].strip() for name in (
                 "general_impression", "subject_of_photo", "color_lighting", "focus"))]
    return texts[:200]


def demo():
    """Comments of the demo against those of its neighbours."""
    data = builders.load("demo")
    comments = [data.record(index).comments for index in range(0, 600, 10)]
    return [(one[0], other[:2]) for one, other in itertools.pairwise(comments)]


@pytest.mark.slow
@JAVA
@pytest.mark.parametrize("texts", [demo, pytest.param(pccd, marks=pytest.mark.skipif(
    DATA is None, reason="CALM_DATA is not set"))], ids=["demo", "PCCD"])
def test_figures_are_those_of_pycocoevalcap(texts, monkeypatch):
    from pycocoevalcap import eval as theirs
    monkeypatch.setattr(theirs, "Spice", NoSpice)
    said, references = zip(*texts(), strict=True)
    found = captions.measure(said, references, spice=False)
    judge = theirs.COCOEvalCap(Coco(references), Coco([[text] for text in said]))
    judge.evaluate()
    names = {"BLEU-1": "Bleu_1", "BLEU-2": "Bleu_2", "BLEU-3": "Bleu_3", "BLEU-4": "Bleu_4", "METEOR": "METEOR",
             "ROUGE-L": "ROUGE_L", "CIDEr": "CIDEr"}
    assert found.corpus.keys() == names.keys()
    for ours, name in names.items():
        assert found.corpus[ours] == pytest.approx(judge.eval[name], abs=1e-12), ours
        assert found.items[ours] == pytest.approx([judge.imgToEval[number][name] for number in range(len(said))])
    print({name: round(value, 4) for name, value in found.corpus.items()}, len(said))
    for name, (low, high) in found.intervals.items():
        assert low <= found.corpus[name] <= high and low < high, name
    assert found.intervals.keys() == names.keys() - {"METEOR"}
    assert found.corpus["BLEU-1"] > 0.05  # they have words in common


@JAVA
def test_figures_computed_by_hand():
    found = captions.measure(["The cat sat on the mat.", "A red door, half open."],
                             [["The cat is on the mat."], ["A red door, half open."]], spice=False)
    # Of 6 + 5 words 5 + 5 are right, of 5 + 4 pairs 3 + 4, of 4 + 3 triples 1 + 3, of 3 + 2 fours 0 + 2.
    precision = np.cumprod([10 / 11, 7 / 9, 4 / 7, 2 / 5]) ** (1 / np.arange(1, 5))
    for name, value in zip(captions.BLEU, precision, strict=True):
        assert found.corpus[name] == pytest.approx(value, abs=1e-8)
    assert found.items["ROUGE-L"] == pytest.approx([5 / 6, 1.0])  # "the cat on the mat": 5 of 6 on both sides
    assert found.items["CIDEr"][1] == pytest.approx(10.0)  # the same n-grams, each in one of two references
    assert found.items["METEOR"][1] == pytest.approx(1.0, abs=0.01) and found.items["METEOR"][0] < 0.7


@JAVA
def test_odd_texts_stay_in_their_line():
    said = ["A big cat\nsat down.", "", "x ||| y", "tab\tand\u2028more\r\nwords"]
    references = [["a big cat sat down"], ["nothing was said"], ["x y"], ["tab and more words", "..."]]
    found = captions.measure(said, references, spice=False)
    assert found.items["BLEU-1"] == pytest.approx([1, 0, 1, 1], abs=1e-6)
    assert found.items["ROUGE-L"] == pytest.approx([1, 0, 1, 1])


def test_what_is_missing_is_said(monkeypatch):
    with pytest.raises(ConfigError, match="every text needs references"):
        captions.measure(["a"], [[]])
    with pytest.raises(ConfigError, match="there must be at least one text"):
        captions.measure([], [])
    reason = captions.spice_is_missing()
    if reason and shutil.which("java"):
        with pytest.raises(ConfigError, match=r"SPICE cannot be computed: .*(Java 8|models are missing)"):
            captions.measure(["a b"], [["a b"]], spice=True)
        assert captions.measure(["a b"], [["a b"]]).missing == reason
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="need Java on the PATH"):
        captions.measure(["a"], [["a"]])
