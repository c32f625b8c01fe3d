"""calm_jax.load and the program `calm`: pictures in, a row each out, whatever stops it or lies among them."""

import csv
import io
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import miniature
import numpy as np
import psutil
import pytest
from PIL import Image

import calm_jax
from calm_jax import config as config_lib
from calm_jax.checkpoints import on_disk
from calm_jax.commands.predict import output
from calm_jax.commands.predict.gather import gather
from calm_jax.commands.predict.journal import Journal
from calm_jax.commands.predict.ratings import read_ratings
from calm_jax.data import pictures
from calm_jax.data.samples import BadRecord, ImageRef
from calm_jax.errors import ConfigError
from calm_jax.inference import taste
from calm_jax.inference.decoding import Sampling

CHROMIUM = next((path for path in ("/usr/bin/chromium", "/usr/bin/chromium-browser", "/usr/bin/google-chrome")
                 if os.path.exists(path)), None)
MANY = 10_000 if miniature.THOROUGH else 400  # pictures of the interrupted run


def picture(number: int, width: int = 48, height: int = 40) -> np.ndarray:
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:height, 0:width]
    waves = np.stack([np.sin(x / rng.uniform(2, 9)), np.cos(y / rng.uniform(2, 9)), np.sin((x + y) / 7)], -1)
    return np.clip(rng.uniform(40, 200, 3) + 60 * waves, 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return miniature.saved(tmp_path_factory.mktemp("run"), config_lib.PARTS, score_head=config_lib.ScoreHead(8))


@pytest.fixture(scope="module")
def model(checkpoint):
    return calm_jax.load(checkpoint)


@pytest.fixture(scope="module")
def album(tmp_path_factory):
    """Twelve pictures in two folders, three files that are none, and what a folder holds besides."""
    folder = tmp_path_factory.mktemp("album")
    (folder / "deeper").mkdir()
    for number in range(12):
        place = folder / ("deeper" if number % 3 == 0 else ".") / f"{number:02d}.{'png' if number % 2 else 'jpg'}"
        Image.fromarray(picture(number, 30 + 7 * number, 90 - 5 * number)).save(place)
    whole = (folder / "01.png").read_bytes()
    (folder / "half.png").write_bytes(whole[:len(whole) // 2])
    (folder / "deeper" / "<script><b>&'.jpg").write_bytes(b"no picture")
    (folder / "empty.jpeg").write_bytes(b"")
    (folder / ".hidden.jpg").write_bytes(whole)
    (folder / "notes.txt").write_text("no picture")
    return folder


BAD = {"half.png": "truncated or damaged", "<script><b>&'.jpg": "not a picture in a known format",
       "empty.jpeg": "not a picture in a known format"}


def calm(*words, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "calm_jax", *map(str, words)], cwd=miniature.ROOT, text=True,
                          capture_output=True, timeout=600, env=miniature.environment(), **options)


# ---- the model as an object --------------------------------------------------------------------------------------


@pytest.mark.parametrize("reader", ["expectation", "levels", "head"])
def test_a_score_depends_on_its_picture_alone(model, album, reader):
    paths = [path for path in gather([str(album)], io.StringIO()) if pathlib.Path(path).name not in BAD]
    assert len(paths) == 12
    alone = [model.score(path, reader=reader).value for path in paths]
    together = [score.value for score in model.score(paths, reader=reader)]
    np.testing.assert_allclose(together, alone, atol=1e-4)
    turned = model.score(paths[::-1], reader=reader)
    np.testing.assert_allclose([score.value for score in turned], alone[::-1], atol=1e-4)
    kinds = [pathlib.Path(paths[0]), pathlib.Path(paths[1]).read_bytes(), Image.open(paths[2]), pictures.read(paths[3])]
    np.testing.assert_allclose([score.value for score in model.score(kinds, reader=reader)], alone[:4], atol=1e-4)
    assert len(set(np.round(alone, 5))) > 6


def test_scores_on_another_scale(model, album):
    path = str(album / "01.png")
    one, hundred = model.score(path), model.score(path, scale=(0, 100))
    assert hundred.value == pytest.approx((one.value - 1) / 9 * 100)
    assert hundred.spread == pytest.approx(one.spread / 9 * 100)
    unsaid = model.score(path, reader="text")
    assert not unsaid.parsed and np.isnan(unsaid.value) and unsaid.text  # random weights say no number


def test_texts(model, album):
    paths = [str(album / "01.png"), str(album / "02.jpg")]
    assert model.comment(paths, limit=8) == [model.comment(path, limit=8) for path in paths]
    assert model.comment(paths[0], aspect="light", limit=8) == model.ask(
        paths[0], "Comment on the light in this photograph.", limit=8)
    drawn = Sampling(temperature=1.0, seed=3)
    assert model.suggest(paths, limit=8, sampling=drawn) == [model.suggest(path, limit=8, sampling=drawn)
                                                              for path in paths]
    judged = model.attributes(paths)
    assert [list(one) for one in judged] == [list(judged[0])] * 2 and "sharpness" in judged[0]
    assert judged[0] == model.attributes(paths[0]) and all(answer.text for answer in judged[0].values())


def test_a_model_refuses_what_it_cannot_do(model, album, tmp_path):
    for call, error, sentence in (
            (lambda: model.score(str(album / "half.png")), BadRecord, "half.png is truncated or damaged"),
            (lambda: model.score(np.zeros((4, 4))), BadRecord, r"an array \(4, 4\) of float64 is no picture"),
            (lambda: model.score(picture(0), reader="expected"), ConfigError, "nearest is 'expectation'"),
            (lambda: model.score(picture(0), scale=(5, 1)), ConfigError, "scale=5,1"),
            (lambda: model.comment(picture(0), aspect="ligth"), ConfigError, "the nearest is 'light'"),
            (lambda: calm_jax.api.Model(tmp_path, batch=0), ConfigError, "batch=0 is not positive")):
        with pytest.raises(error, match=sentence):
            call()
    blind = calm_jax.load(miniature.saved(tmp_path / "thematic", ("thematic",)))
    with pytest.raises(ConfigError, match="none of which answers for an attribute"):
        blind.attributes(picture(0))
    with pytest.raises(ConfigError, match="learned scores by a regression head"):
        blind.score(picture(0), reader="head")


@pytest.mark.slow
def test_a_personal_score_is_the_mean_over_contexts(model, tmp_path):
    rated = [(picture(number), 1 + number % 5) for number in range(7)]
    asked = [picture(20), picture(21)]

    def given(**options):
        scores = model.personalise(rated, asked, scale=(1, 5), method="context", **options)
        assert all(1 <= score.value <= 5 and score.spread > 0 for score in scores)
        return np.asarray([(score.value, score.spread) for score in scores])

    def context(places):
        return np.asarray([(score.value, score.spread) for score in model.personalise(
            [rated[place] for place in places], asked, scale=(1, 5), method="context")])

    parts = [context(places) for places in ((0, 3, 6), (1, 4), (2, 5))]  # at most three at a time
    mean = np.mean([part[:, 0] for part in parts], 0)
    np.testing.assert_allclose(given(shots=3)[:, 0], mean, atol=1e-4)
    variance = np.mean([part[:, 1] ** 2 + (part[:, 0] - mean) ** 2 for part in parts], 0)
    np.testing.assert_allclose(given(shots=3)[:, 1], np.sqrt(variance), atol=1e-4)
    whole = context(range(7))
    np.testing.assert_allclose(given(), whole, atol=1e-4)
    assert abs(whole[:, 0] - mean).max() > 1e-4  # one context is not three
    turned = [(shown, 6 - score) for shown, score in rated]
    shown = {"scale": (1, 5), "method": "context"}
    assert model.personalise(turned, asked[0], **shown).value != pytest.approx(whole[0, 0], abs=1e-5)
    many = rated * 4  # more than fit into one context
    assert model.personalise(many, asked[0], **shown).value > 1
    for call, sentence in ((lambda: model.personalise(many, asked[0], **shown, shots=28),
                            r"28 rated pictures do not fit into one context of this model; at most \d+ do"),
                           (lambda: model.personalise(rated, asked[0], shots=2), "shots=2 are pictures in a context"),
                           (lambda: model.personalise(rated, asked[0], method="rigde"), "the nearest is 'ridge'"),
                           (lambda: model.personalise([], asked[0]), "no picture is rated"),
                           (lambda: model.personalise([(asked[0], 11)], asked[0]), "score 11, which is not from 1")):
        with pytest.raises(ConfigError, match=sentence):
            call()


def tastes(model, pixels):
    return taste.features(model.seeing().generator.statistics(
        [ImageRef(index) for index in range(len(pixels))], lambda index: pixels[index]))


def test_a_personal_score_in_closed_form(model):
    """From the generic scores and what the encoder sees, as `inference.taste` has it; no answer depends on others."""
    rated = [(picture(number), 1 + number % 5) for number in range(7)]
    asked = [picture(number) for number in range(20, 40)]  # more than a batch
    found = model.personalise(rated, asked, scale=(1, 5))

    shown = [pixels for pixels, _ in rated]
    own = taste.Taste.of(tastes(model, shown), [1 + 9 * (score - 1) / 4 for _, score in rated],
                         [score.value for score in model.score(shown)])
    expected = own.scores(tastes(model, asked), [score.value for score in model.score(asked)])
    for score, other in zip(found, expected, strict=True):
        assert score.value == pytest.approx(1 + 4 * (other.value - 1) / 9, abs=1e-5) and 1 <= score.value <= 5
        assert score.spread == pytest.approx(own.error * 4 / 9)
    assert model.personalise(rated, asked[3], scale=(1, 5)).value == pytest.approx(found[3].value, abs=1e-5)
    turned = [(pixels, 6 - score) for pixels, score in rated]
    assert model.personalise(turned, asked[0], scale=(1, 5)).value != pytest.approx(found[0].value, abs=1e-5)


def test_ratings_alone_count_where_nothing_scores(tmp_path):
    """A checkpoint that learned no scores, or was converted, still has an encoder."""
    folder = pathlib.Path(miniature.saved(tmp_path / "mute", tasks=("attributes",)))
    mute = calm_jax.load(folder)
    rated, asked = [(picture(number), 1.0 + number) for number in range(8)], [picture(20), picture(21)]
    found = mute.personalise(rated, asked)
    seen = [tastes(mute, pixels) for pixels in ([pixels for pixels, _ in rated], asked)]
    own = taste.Taste.of(seen[0], [score for _, score in rated], None)
    assert [score.value for score in found] == pytest.approx([score.value for score in own.scores(seen[1], None)])
    with pytest.raises(ConfigError, match="never learned personal scores"):
        mute.personalise(rated, asked, method="context")


SCORES = """
import json, sys, jax, calm_jax
from calm_jax.inference.decoding import Sampling
model = calm_jax.load(sys.argv[1])
assert (model.loaded("score").generator.mesh is None) == (len(jax.devices()) == 1)
found = {reader: [score.value for score in model.score(sys.argv[2:], reader=reader)]
         for reader in ("expectation", "levels")}
found["personal"] = [score.value for score in model.personalise([(sys.argv[2], 3.0), (sys.argv[3], 8.0)], sys.argv[4:],
                                                                    method="context")]
found["ridge"] = [score.value for score in model.personalise([(sys.argv[2], 3.0), (sys.argv[3], 8.0)], sys.argv[4:])]
found["texts"] = [model.comment(sys.argv[2:], limit=6, sampling=sampling)
                  for sampling in (Sampling(), Sampling(1.0, seed=4), Sampling(beams=2))]
print(json.dumps(found))
"""


@pytest.mark.slow
def test_scores_are_the_same_on_any_number_of_devices(checkpoint, album):
    paths = [path for path in gather([str(album)], io.StringIO()) if pathlib.Path(path).name not in BAD][:7]

    def on(devices):
        command = [sys.executable, "-c", SCORES, checkpoint, *paths]
        done = miniature.run(command, miniature.environment(devices=devices))
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])

    one = on(1)
    for devices in (2, 8) if miniature.THOROUGH else (8,):
        found = on(devices)
        for reader in ("expectation", "levels", "personal", "ridge"):
            np.testing.assert_allclose(found[reader], one[reader], atol=1e-4)
        assert found["texts"] == one["texts"]


# ---- which pictures ----------------------------------------------------------------------------------------------


def test_pictures_are_gathered_once_each(album):
    inside = gather([str(album)], io.StringIO())
    assert len(inside) == 15 and not any("hidden" in path or "notes" in path for path in inside)
    assert inside == sorted(inside, key=lambda path: (path.count(os.sep), path))  # a folder's own before those below
    globbed = gather([str(album / "*.png"), str(album / "**" / "0*")], io.StringIO())
    assert len(globbed) == len(set(globbed)) == 12 and globbed[0].endswith("01.png")
    named = io.StringIO(f"{album}/02.jpg\r\n\n{album}/gone.jpg\n{album}/02.jpg")
    listed = gather(["-", str(album / "notes.txt")], named)  # whatever is named is tried, and reported
    assert [pathlib.Path(path).name for path in listed] == ["02.jpg", "gone.jpg", "notes.txt"]


@pytest.mark.parametrize(("places", "sentence"), [
    ([], "name pictures: files, folders or globs"), (["nowhere"], "no file, folder or glob nowhere"),
    (["nowhere/*.jpg"], "no picture matches nowhere"), (["-"], "standard input names no pictures")])
def test_nothing_to_look_at_is_said(places, sentence, tmp_path):
    with pytest.raises(ConfigError, match=sentence):
        gather(places, io.StringIO())
    with pytest.raises(ConfigError, match="holds no pictures"):
        gather([str(tmp_path)], io.StringIO())


# ---- the journal -------------------------------------------------------------------------------------------------


def test_a_journal_keeps_what_was_written_whole(tmp_path):
    file, kept = tmp_path / "out.csv.journal", tmp_path / "a.jpg"
    kept.write_bytes(b"1")
    journal = Journal(file, {"verb": "score", "scale": (1, 10)})
    row = {"path": str(kept), "stamp": [1, kept.stat().st_mtime_ns], "score": 5.0}
    journal.add(row)
    journal.add({"path": "b.jpg", "stamp": [0, 0], "error": "b.jpg does not exist"})
    journal.close()
    whole = file.read_bytes()
    for cut in range(len(whole)):  # killed at any byte
        file.write_bytes(whole[:cut])
        again = Journal(file, {"verb": "score", "scale": (1, 10)})
        assert again.rows == {} or again.rows[str(kept)] == row
        assert again.missing([str(kept), "b.jpg"]) == ([] if again.rows else [str(kept)]) + ["b.jpg"]
        again.add(row)
        again.close()
        assert Journal(file, {"verb": "score", "scale": (1, 10)}).rows[str(kept)] == row
    file.write_bytes(whole)
    again = Journal(file, {"verb": "score", "scale": (1, 10)})
    assert again.missing([str(kept), "b.jpg", "c.jpg"]) == ["b.jpg", "c.jpg"]
    os.utime(kept, (1, 1))  # another picture under the old name
    assert Journal(file, {"verb": "score", "scale": (1, 10)}).missing([str(kept)]) == [str(kept)]
    with pytest.raises(ConfigError, match=r"answers to something else \(scale: \[1, 10\] there, \[0, 1\]"):
        Journal(file, {"verb": "score", "scale": (0, 1)})
    assert file.read_bytes() == whole
    for damage in (b"no journal\n", b"[1]\n", whole.replace(b'"path"', b'"puth"')):
        file.write_bytes(damage)
        with pytest.raises(ConfigError, match="is no journal of this program"):
            Journal(file, {"verb": "score", "scale": (1, 10)})
        assert file.read_bytes() == damage


# ---- the program -------------------------------------------------------------------------------------------------


def test_the_table_names_every_picture_and_the_unreadable_ones(album, checkpoint, model):
    done = calm("score", album, "--checkpoint", checkpoint)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["score", "spread", "path"] and len(lines) == 16
    assert f"{model.score(str(album / '01.png')).value:.2f}" in next(line for line in lines if "01.png" in line)
    for name, reason in BAD.items():
        assert reason in next(line for line in lines if name in line) and name in done.stderr
    assert "3 of 15 pictures could not be read" in done.stderr and "picture/s" in done.stderr


def test_formats_choosing_and_copying(album, checkpoint, model, tmp_path):
    out, best = tmp_path / "scores.csv", tmp_path / "best"
    common = ("--checkpoint", checkpoint, "--scale", "0,100", "--out", out)
    assert calm("score", album, *common, "--format", "csv").returncode == 0
    rows = list(csv.DictReader(out.open()))
    assert [row["path"] for row in rows] == gather([str(album)], io.StringIO())
    scores = {row["path"]: float(row["score"]) for row in rows if not row["error"]}
    for path, score in scores.items():
        assert score == pytest.approx(model.score(path, scale=(0, 100)).value, abs=1e-3)
    assert {pathlib.Path(row["path"]).name for row in rows if row["error"]} == set(BAD)
    ranked = sorted(scores, key=scores.get, reverse=True)
    for flags, expected in ((("--top-k", 3), ranked[:3]), (("--min-score", scores[ranked[4]] - 1e-6, "--sort", "score"),
                                                           ranked[:5])):
        done = calm("score", album, *common, "--format", "jsonl", *flags, "--copy-to", best)
        assert done.returncode == 0 and "12 of 15 pictures are known already" in done.stderr
        found = [json.loads(line) for line in out.read_text().splitlines()]
        assert [row["path"] for row in found] == expected and "stamp" not in found[0]
    assert sorted(path.name for path in best.iterdir()) == sorted(pathlib.Path(path).name for path in ranked[:5])
    folder = pathlib.Path(checkpoint) / "00000003"
    before = {name: (folder / name).read_bytes() for name in ("meta.json", "COMPLETE.json")}
    (folder / "meta.json").write_text(json.dumps(json.loads(before["meta.json"]) | {"rows": 9}))
    on_disk.write_marker(folder)  # another model in its place
    done = calm("score", album, *common)
    for name, content in before.items():
        (folder / name).write_bytes(content)
    assert done.returncode == 2 and str(out) in done.stderr
    other = calm("score", album, "--checkpoint", checkpoint, "--out", out)
    assert other.returncode == 2 and "scale: [0.0, 100.0] there, [1.0, 10.0] here" in other.stderr


def test_copies_never_overwrite(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "same.jpg").write_text(folder * 3 if folder == "b" else folder)
    rows = [{"path": str(tmp_path / folder / "same.jpg")} for folder in ("a", "b")]
    for _ in range(2):
        assert output.copy(rows, tmp_path / "to") == 2
        assert {path.name: path.read_text() for path in (tmp_path / "to").iterdir()} == {"same.jpg": "a",
                                                                                        "same-2.jpg": "bbb"}


@pytest.mark.parametrize("verb", ["comment", "suggest", "attributes"])
def test_the_other_verbs(album, checkpoint, model, verb):
    path = album / "01.png"
    options = () if verb == "attributes" else ("--tokens", 8)
    done = calm(verb, path, "--checkpoint", checkpoint, "--format", "jsonl", *options)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    expected = {"comment": lambda: {"comment": model.comment(path, limit=8)},
                "suggest": lambda: {"suggestion": model.suggest(path, limit=8)},
                "attributes": lambda: {name: answer.grade or answer.text
                                       for name, answer in model.attributes(path).items()}}[verb]()
    assert row == {"path": str(path), **expected}


def test_a_personal_verdict_from_a_table(album, checkpoint, model, tmp_path):
    table = album / "ratings.csv"
    table.write_text("image,score,user\n01.png,4,ann\n02.jpg,1,ann\n02.jpg,5,bob\ndeeper/03.png,5,ann\n")
    rated = [(str(album / name), score) for name, score in (("01.png", 4), ("02.jpg", 1), ("deeper/03.png", 5))]
    path = album / "04.jpg"
    common = ("personalise", path, "--checkpoint", checkpoint, "--ratings", table, "--scale", "1,5",
              "--format", "jsonl")
    out = tmp_path / "own.jsonl"
    done = calm(*common, "--user", "ann", "--out", out)
    assert done.returncode == 0, done.stderr
    own = model.personalise(rated, path, scale=(1, 5)).value
    assert json.loads(out.read_text())["score"] == pytest.approx(own, abs=1e-4)
    before = out.with_name("own.jsonl.journal").read_bytes()
    os.utime(rated[1][0])  # a picture that was rated is another one now: so is the verdict
    done = calm(*common, "--user", "ann", "--out", out)
    assert done.returncode == 2 and "rated" in done.stderr and "--out" in done.stderr
    assert out.with_name("own.jsonl.journal").read_bytes() == before
    assert "of 2 people; name one of them: --user ann" in calm(*common).stderr
    table.unlink()


@pytest.mark.parametrize(("text", "options", "sentence"), [
    ("image,rating\na.jpg,3\n", {}, "no column score"), ("image,score\n", {}, "have no rows"),
    ("image,score\ngone.jpg,3\n", {}, "row 2: there is no picture"),
    ("image,score\na.jpg,3\na.jpg,4\n", {}, "row 3: a.jpg is rated twice"),
    ("image,score\na.jpg,7\n", {}, "row 2: the score '7' is no number from 1 to 5"),
    ("image,score\na.jpg,nan\n", {}, "the score 'nan' is no number"),
    ("image,score\na.jpg,good\n", {}, "the score 'good' is no number"),
    ("image,score\na.jpg\n", {}, "row 2: the score"),
    ("image,score,user\na.jpg,3,ann\n", {"user": "anne"}, "know no user 'anne'; the nearest is 'ann'"),
    ("image,score\na.jpg,3\n", {"user": "ann"}, "know no user 'ann'")])
def test_wrong_ratings_are_refused(tmp_path, text, options, sentence):
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "ratings.csv").write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        read_ratings(str(tmp_path / "ratings.csv"), **{"user": "", "scale": ("1", "5"), **options})
    with pytest.raises(ConfigError, match="cannot be read"):
        read_ratings(str(tmp_path / "none.csv"), "", ("1", "5"))


@pytest.mark.parametrize(("words", "sentence"), [
    (("rate", "."), "no such command 'rate'"),
    (("score", "tests", "--checkpoint", "x"), "the folder tests holds no pictures"),
    (("score", "docs/demo.jpg"), "--checkpoint is missing"),
    (("score", "docs/demo.jpg", "--checkpoint", "nowhere"), "nowhere"),
    (("score", "docs/demo.jpg", "--checkpoint", "x", "--format", "html"), "name it: --out pictures.html"),
    (("score", "docs/demo.jpg", "--checkpoint", "x", "--scale", "10,1"), "--scale"),
    (("score", "docs/demo.jpg", "--checkpoint", "x", "--scale", "ten"), "--scale"),
    (("comment", "docs/demo.jpg", "--checkpoint", "x", "--top-k", "3"), "no option --top-k"),
    (("personalise", "docs/demo.jpg", "--checkpoint", "x"), "--ratings is missing: A table"),
    (("score", "docs/demo.jpg", "--checkpoint", "x", "--ratings", "y"), "no option --ratings"),
    (("comment", "docs/demo.jpg", "--checkpoint", "x", "--beams", "0"), "beams"),
    (("score", "docs/demo.jpg", "--checkpoint", "x", "--scale", "1,inf"), "--scale"),
    (("comment", "docs/demo.jpg", "--checkpoint", "x", "--temperature", "1e-40"), "temperature"),
    (("score", "docs/demo.jpg", "--topk", "3"), "there is no option --topk; the nearest is '--top-k'")])
def test_wrong_use_is_answered_in_a_sentence(words, sentence):
    done = calm(*words)
    assert done.returncode in (1, 2) and sentence in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


@miniature.sweeps
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL, *([signal.SIGTERM] if miniature.THOROUGH else [])])
def test_a_stopped_run_goes_on_without_loss_or_repetition(checkpoint, tmp_path, how):
    """Memory is watched on the way: it does not grow with the number of pictures."""
    folder, out = tmp_path / "many", tmp_path / "scores.jsonl"
    folder.mkdir()
    made = [tmp_path / f"{number}.jpg" for number in range(5)]
    for number, file in enumerate(made):
        Image.fromarray(picture(number, 400, 300)).save(file)
    for number in range(MANY):
        os.symlink(made[number % 5], folder / f"{number:05d}.jpg")
    (folder / "00007.jpg").unlink()
    (folder / "00007.jpg").write_bytes(b"no picture")
    command = [sys.executable, "-m", "calm_jax", "score", str(folder), "--checkpoint", checkpoint,
               "--out", str(out), "--format", "jsonl", "--batch", "8"]
    journal, memory = tmp_path / "scores.jsonl.journal", []
    started = {"cwd": miniature.ROOT, "env": miniature.environment(), "stderr": subprocess.PIPE, "text": True}
    child = subprocess.Popen(command, **started)
    while child.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") < MANY // 10):
        time.sleep(0.02)
    child.send_signal(how)
    error = child.communicate(timeout=60)[1]
    if how != signal.SIGKILL:
        assert child.returncode == 130 and f"of {MANY:,} pictures; the same command goes on" in error
    assert not out.exists()
    first = journal.read_bytes().count(b"\n") - 1
    assert MANY // 10 - 1 <= first < MANY
    child = subprocess.Popen(command, **started)
    watched = psutil.Process(child.pid)
    while child.poll() is None:
        done = journal.read_bytes().count(b"\n") - 1 - first
        if done > 50:
            try:
                memory.append(watched.memory_info().rss)
            except psutil.NoSuchProcess:
                break
        time.sleep(0.1)
    error = child.communicate()[1]
    assert child.returncode == 0 and "pictures are known already" in error and "00007.jpg is not a picture" in error
    rows = [json.loads(line) for line in journal.read_bytes().splitlines()[1:]]
    assert sorted(row["path"] for row in rows) == [str(folder / f"{number:05d}.jpg") for number in range(MANY)]
    found = {row["path"]: row for row in map(json.loads, out.read_text().splitlines())}
    assert len(found) == MANY and sum("error" in row for row in found.values()) == 1
    of_one = [found[str(folder / f"{number:05d}.jpg")]["score"] for number in range(0, MANY, 5)]
    np.testing.assert_allclose(of_one, of_one[0], atol=1e-4)
    if len(memory) > 4:
        print(f"{how.name}: {memory[0] / 2**20:.0f} MiB at first, at most {max(memory) / 2**20:.0f}")
        assert max(memory) < memory[0] + 60 * 2**20


# ---- the contact sheet -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sheet(album, checkpoint, tmp_path_factory):
    out = tmp_path_factory.mktemp("sheet") / "page.html"
    done = calm("score", album, "--checkpoint", checkpoint, "--format", "html", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


def test_the_contact_sheet_has_a_small_picture_of_each(sheet, album):
    small = list((sheet.parent / "page-pictures").iterdir())
    assert len(small) == 12 and all(max(Image.open(file).size) <= output.THUMBNAIL for file in small)
    assert sheet.read_text().count("<script") == 2  # none from a file's name
    for file in small:
        file.unlink()
    journal = sheet.parent / "page.html.journal"
    before = journal.read_bytes()
    done = calm("score", album, "--checkpoint", json.loads(before.splitlines()[0])["checkpoint"], "--format", "html",
                "--out", sheet)
    assert done.returncode == 0 and len(list((sheet.parent / "page-pictures").iterdir())) == 12
    assert journal.read_bytes() == before


@pytest.mark.skipif(CHROMIUM is None, reason="there is no chromium")
def test_the_contact_sheet_sorts_and_filters_in_a_browser(sheet, tmp_path):
    from playwright.sync_api import expect, sync_playwright
    rows = [json.loads(line) for line in (sheet.parent / "page.html.journal").read_text().splitlines()[1:]]
    scores = {row["path"]: row["score"] for row in rows if "error" not in row}
    ranked = sorted(scores, key=scores.get, reverse=True)
    bad = [row["path"] for row in rows if "error" in row]
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 900})
        trouble = []
        page.on("pageerror", lambda error: trouble.append(str(error)))
        page.on("requestfailed", lambda request: trouble.append(request.url))
        page.goto(sheet.as_uri())

        def shown():
            return page.eval_on_selector_all(".card", "cards => cards.map(card => card.dataset.path)")

        assert shown()[:12] == ranked and sorted(shown()[12:]) == sorted(bad)
        assert page.inner_text("#shown") == "15 of 15 shown"
        page.click("#direction")
        assert shown()[:12] == ranked[::-1]
        page.select_option("#sort", "path")
        assert [path for path in shown() if path in scores] == sorted(scores) and len(shown()) == 15
        page.select_option("#sort", "score")
        page.uncheck("#errors")
        assert shown() == ranked
        middle = (scores[ranked[3]] + scores[ranked[4]]) / 2
        page.fill("#low", str(middle))
        assert shown() == ranked[:4] and page.inner_text("#shown") == "4 of 15 shown"
        page.fill("#high", str((scores[ranked[0]] + scores[ranked[1]]) / 2))
        assert shown() == ranked[1:4]
        page.fill("#low", "")
        page.fill("#high", "")
        page.fill("#find", "DEEPER")
        assert shown() == [path for path in ranked if "deeper" in path]
        page.fill("#find", "no such name")
        assert shown() == [] and "no picture is like that" in page.inner_text("#cards")
        page.fill("#find", "")
        page.check("#errors")
        page.wait_for_function("[...document.images].every(image => image.complete && image.naturalWidth)")
        # A card that is off the screen isn't rendered (content-visibility), so it has no inner text.
        half = page.locator('.card[data-path$="half.png"]')
        half.scroll_into_view_if_needed()
        expect(half).to_contain_text("truncated or damaged", use_inner_text=True)
        page.screenshot(path=tmp_path / "sheet.png", full_page=True)
        assert not trouble
        browser.close()
