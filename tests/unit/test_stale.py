"""What was computed from other content under the same name is computed again: fingerprints of data and cues."""

from __future__ import annotations

import csv
import json
import pathlib
import shutil
import sys

import miniature
import numpy as np
import pytest
from PIL import Image

from calm_jax import config as config_lib
from calm_jax.data import builders, cues
from calm_jax.data.builders import store
from calm_jax.data.datasets import csv as csv_lib
from calm_jax.errors import ConfigError


def tables(folder: pathlib.Path, scores: list[int], seed: int = 0) -> pathlib.Path:
    """Pictures and a table of their scores."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(len(scores)):
        Image.fromarray(rng.integers(0, 256, (24, 32, 3), np.uint8)).save(folder / f"{number}.png")
    with (folder / "scores.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "score"), *((f"{n}.png", score) for n, score in enumerate(scores))])
    return folder / "scores.csv"


def prepared(table: pathlib.Path, data: pathlib.Path, **options):
    source = csv_lib.Csv(table, scale=(1.0, 5.0), shares=(0.5, 0.25, 0.25))
    store.prepare(source, data, say=lambda _: None, **options)
    return builders.load("csv", str(data))


SCORES = [1 + n % 5 for n in range(16)]


def test_a_fingerprint_is_of_the_content_alone(tmp_path):
    """The same content has the same one wherever it lies; labels, pictures and splits each change it."""
    table = tables(tmp_path / "a", SCORES)
    first = prepared(table, tmp_path / "data").fingerprint
    assert first == prepared(table, tmp_path / "elsewhere").fingerprint
    shutil.copytree(tmp_path / "data", tmp_path / "copied")
    manifest = next((tmp_path / "copied").rglob("manifest.json"))
    known = json.loads(manifest.read_text())
    del known["pictures"]  # of before it was written there
    manifest.write_text(json.dumps(known))
    assert builders.load("csv", str(tmp_path / "copied")).fingerprint == first
    others = [prepared(tables(tmp_path / "b", SCORES[::-1]), tmp_path / "data", rebuild=True).fingerprint,
              prepared(tables(tmp_path / "c", SCORES, seed=1), tmp_path / "data", rebuild=True).fingerprint,
              prepared(tables(tmp_path / "d", SCORES[:-1]), tmp_path / "data", rebuild=True).fingerprint]
    assert len({first, *others}) == 4
    assert prepared(table, tmp_path / "data", rebuild=True).fingerprint == first


def test_the_fingerprint_of_the_demo_is_of_its_photographs_too(tmp_path, monkeypatch):
    demo = builders.load("demo")
    assert demo.fingerprint == builders.load("demo").fingerprint
    other = builders.load("demo")
    file = tmp_path / "photograph.png"
    file.write_bytes(other._paths[0].read_bytes() + b"\0")
    other._paths = (file, *other._paths[1:])
    assert other.fingerprint != demo.fingerprint


def test_the_fingerprint_of_cues_is_of_the_phrases(tmp_path):
    def write(text, **more):
        file = tmp_path / "cues.json"
        phrase = {"attribute": "noise", "kind": "question", "grade": None, "text": text, "request": 0}
        file.write_text(json.dumps({"format": "calm_jax cues 1", "phrases": [phrase], **more}))
        return cues.fingerprint(str(file))

    one = write("How much grain does one see here?")
    assert one == write("How much grain does one see here?", requests={"0": {}})
    assert one != write("How much grain does one notice here?")
    assert cues.fingerprint("") == ""
    with pytest.raises(ConfigError, match=r"absent\.json"):
        cues.fingerprint(str(tmp_path / "absent.json"))


def test_an_evaluation_is_measured_anew_on_a_data_set_that_was_rebuilt(tmp_path):
    """Reversed scores under the same name: another figure, and why is said; so for another model in the same place."""
    model = miniature.saved(tmp_path / "model", config_lib.PARTS)
    prepared(tables(tmp_path / "a", SCORES), tmp_path / "data")

    def run():
        done = miniature.run([sys.executable, "-m", "calm_jax.evaluate", "--workdir", model, "--task", "scoring",
                              "--dataset", "csv", "--data_dir", str(tmp_path / "data"), "--reader", "expectation"],
                             miniature.environment())
        assert done.returncode == 0, done.stderr
        return done.stdout, json.loads((tmp_path / "model/evaluation/scoring-csv-test-expectation.json").read_text())

    _, first = run()
    prepared(tables(tmp_path / "a", SCORES[::-1]), tmp_path / "data", rebuild=True)
    said, second = run()
    assert "known already" not in said and "content of the dataset" in said
    assert first["table"] != second["table"] and first["data"] != second["data"]
    assert [answer["true"] for answer in first["answers"]] != [answer["true"] for answer in second["answers"]]
