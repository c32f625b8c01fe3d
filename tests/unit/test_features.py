"""calm_jax.features: what a frozen encoder sees is computed once, kept within bounds, and never of something else."""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import random
import shutil
import signal
import sqlite3
import sys
import time

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import pytest
from PIL import Image

import calm_jax
from calm_jax import config as config_lib
from calm_jax.checkpoints import array_io, locate
from calm_jax.commands import train as program
from calm_jax.commands.predict import verbs
from calm_jax.data import builders, images, pipeline
from calm_jax.data.samples import BadRecord, Edit, ImageRef
from calm_jax.errors import ConfigError
from calm_jax.features import encoding as encodings
from calm_jax.features import frozen, keys, store
from calm_jax.features.store import Store
from calm_jax.inference.decoding import Sampling
from calm_jax.inference.generate import Generator, Pictures
from calm_jax.models.parameters import Geometry, initial
from calm_jax.text import chat as chat_lib

FROZEN = miniature.process(train=("mfam/.*", "decoder/.*"), freeze=("encoder/.*",), cached=True, tasks={
    "caption": 0.5, "attributes": 0.5}, row=config_lib.Row(tokens=256, images=3, answers=96))


@pytest.fixture(scope="module", autouse=True)
def quick_compilation(tmp_path_factory):
    with miniature.compiled_once(tmp_path_factory.getbasetemp() / "compiled"):
        yield


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """A cache of its own for each test."""
    monkeypatch.setenv(store.PLACE, str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def parameters():
    return jax.jit(lambda key: initial(miniature.MODEL, key))(jax.random.key(0))


@pytest.fixture(scope="module")
def demo():
    return builders.load("demo")


def seen_by(parameters, model=miniature.MODEL) -> encodings.Encoding:
    return frozen.encoder(model, Geometry.of(model), parameters, jnp.float32, name="only")


def asked(encoding, dataset, ref, kind="features"):
    return encoding.ask(kind, dataset.content(ref.index), ref, lambda: images.Fitter(dataset.pixels(ref.index)))


# ---- the store -----------------------------------------------------------------------------------------------------


def test_a_store_gives_back_what_was_put_and_the_latest_used_stay(tmp_path):
    limit, size = 2_000_000, 20_000
    kept = Store(tmp_path / "some" / "folder" / "a.sqlite", limit)
    values = {number.to_bytes(4, "big"): os.urandom(size) for number in range(300)}
    first = next(iter(values))
    for key, value in values.items():
        kept.put({key: value})
        assert kept.get(key) == value
        assert kept.get(first) == values[first]  # in use all the time
        assert kept.size() <= limit
    found = [key for key in values if kept.get(key) is not None]
    assert first in found and found[1:] == list(values)[-len(found) + 1:] and 50 < len(found) < 101
    kept.close()  # all that was found was used now
    assert kept.get(first) == values[first]
    kept.close()
    assert sum(file.stat().st_size for file in kept.path.parent.iterdir()) <= limit + 100_000
    smaller = Store(kept.path, limit // 4)  # opened with a lower limit, the file shrinks
    assert smaller.get(first) == values[first] and smaller.size() <= limit // 4
    smaller.close()
    assert kept.path.stat().st_size <= limit // 4 + 100_000
    smaller.put({b"large": bytes(limit)})
    assert smaller.get(b"large") is None and smaller.get(first) == values[first]


def test_a_damaged_entry_is_none(tmp_path):
    kept = Store(tmp_path / "a.sqlite", 10**6)
    kept.put({b"one": b"1" * 5000, b"two": b"2" * 5000})
    kept.close()
    with sqlite3.connect(kept.path) as connection:
        connection.execute("UPDATE entries SET value = ? WHERE key = ?", (b"1" * 4999 + b"x", b"one"))
    connection.close()
    assert kept.get(b"one") is None and kept.get(b"two") == b"2" * 5000


@pytest.mark.parametrize("how", ["damaged", "a folder", "read only", "another version"])
def test_a_store_that_cannot_be_used_says_so_once_and_keeps_nothing(tmp_path, caplog, how):
    path = tmp_path / "a" / "a.sqlite"
    path.parent.mkdir()
    if how == "a folder":
        path.mkdir()
    elif how == "damaged":
        path.write_bytes(random.Random(0).randbytes(20_000))
    elif how == "another version":
        with sqlite3.connect(path) as connection:
            connection.execute("PRAGMA user_version = 99")
        connection.close()
    else:
        path.parent.rmdir()
        path.parent.write_text("a file where the folder should be")
    kept = Store(path, 10**6)
    kept.put({b"one": b"1"})
    assert kept.get(b"one") is None and kept.get(b"one") is None
    assert len(caplog.records) == 1 and str(path) in caplog.text and store.PLACE in caplog.text


def _write(path, seed):
    kept = Store(path, 3_000_000)
    rng = random.Random(seed)
    while True:
        number = rng.randrange(200)
        value = number.to_bytes(4, "big") * 5_000
        known = kept.get(bytes([number]))
        assert known in (None, value)
        kept.put({bytes([number]): value})


def test_many_processes_share_a_store_and_none_that_is_killed_harms_it(tmp_path):
    path = tmp_path / "a.sqlite"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_write, args=(path, seed)) for seed in range(2)]
    for worker in workers:
        worker.start()
    kept, end = Store(path, 3_000_000), time.monotonic() + 120
    while kept.size() < 1_000_000 and time.monotonic() < end:
        time.sleep(0.05)
    for worker in workers:
        assert worker.is_alive()  # both found what they and the other had put
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    numbers = [number for number in range(200) if kept.get(bytes([number])) is not None]
    assert len(numbers) > 30
    for number in numbers:
        assert kept.get(bytes([number])) == number.to_bytes(4, "big") * 5_000
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()


@pytest.mark.parametrize("said", ["many", "-1", "nan"])
def test_a_size_that_is_none_is_refused(monkeypatch, said):
    monkeypatch.setenv(store.SIZE, said)
    with pytest.raises(ConfigError, match=f"{store.SIZE}={said}"):
        store.gigabytes(10)


def test_nothing_is_kept_where_the_size_is_nought(monkeypatch, place):
    monkeypatch.setenv(store.SIZE, "0")
    kept = frozen.stores("features")["features"]
    kept.put({b"one": b"1"})
    assert kept.get(b"one") is None and not place.exists()


# ---- what a key names ----------------------------------------------------------------------------------------------


def test_another_content_window_edit_or_encoding_is_another_key():
    edit = Edit("noise", 1, 3)
    refs = [ImageRef(0), ImageRef(0, (0.0, 0.0, 0.5, 1.0)), ImageRef(0, (0.0, 0.0, 1.0, 0.5)),
            *(ImageRef(0, edits=edits) for edits in ((edit,), (edit, edit), (Edit("noise", 2, 3),), (Edit(
                "noise", 1, 4),), (Edit("sharpness", 1, 3),)))]
    found = {keys.of_picture(encoding, content, ref) for encoding in (b"a", b"b") for content in (b"x", b"y")
             for ref in refs}
    assert len(found) == 4 * len(refs)
    assert keys.of_picture(b"a", b"x", ImageRef(7)) == keys.of_picture(b"a", b"x", ImageRef(0))  # not its number


def test_another_encoder_size_depth_or_dtype_finds_nothing_that_is_kept(parameters, demo):
    first = seen_by(parameters)
    asked(first, demo, ImageRef(0))()
    moved = parameters | {"encoder/cls": parameters["encoder/cls"] + 1e-3}
    other = parameters | {"decoder/head/kernel": parameters["decoder/head/kernel"] + 1}
    deeper = dataclasses.replace(miniature.MODEL, depths=config_lib.Depths(low=1.0))
    half = frozen.encoder(miniature.MODEL, Geometry.of(miniature.MODEL), parameters, jnp.bfloat16, name="only")
    for encoding, computed in ((seen_by(moved), 1), (seen_by(parameters, deeper), 1), (half, 1), (seen_by(other), 0),
                               (seen_by(parameters), 0)):
        asked(encoding, demo, ImageRef(0))()
        assert encoding.computed == computed
        encoding.close()


# ---- encoding ------------------------------------------------------------------------------------------------------


def test_what_is_found_is_what_was_computed_and_what_the_encoder_sees(parameters, demo):
    refs = [ImageRef(0), ImageRef(1, (0.1, 0.0, 0.8, 0.9)), ImageRef(2, edits=(Edit("noise", 1, 3),)),
            ImageRef(len(demo) - 1)]
    encoding = seen_by(parameters)
    waits = [asked(encoding, demo, ref) for ref in refs + refs[::-1]]  # all are asked for before one is waited for
    computed = [wait() for wait in waits]
    again = seen_by(parameters)
    model = Geometry.of(miniature.MODEL).bind(parameters)
    for ref, one, twin in zip(refs, computed, computed[::-1], strict=False):
        found = asked(again, demo, ref)()
        square, doubtful = images.render_noting(images.Fitter(demo.pixels(ref.index)), ref, 32,
                                                miniature.MODEL.encoder.padding)
        assert found.doubtful == one.doubtful == doubtful and found.checksum == one.checksum
        alone = model.encoder.features(jnp.asarray(square)[None], config_lib.PARTS, dtype=jnp.float32)
        for part in config_lib.PARTS:
            np.testing.assert_array_equal(found.arrays[part], one.arrays[part])
            np.testing.assert_array_equal(twin.arrays[part], one.arrays[part])
            np.testing.assert_allclose(found.arrays[part], alone[part].tokens[0], rtol=6e-4, atol=1e-5)
    assert (encoding.computed, again.computed) == (4, 0)
    pooled = asked(again, demo, ImageRef(0), "pooled")()
    tokens = np.asarray(computed[0].arrays["high"], np.float32)
    np.testing.assert_allclose(pooled.arrays["high"], [tokens[1:].mean(0), tokens[1:].std(0), tokens[0]], atol=5e-3)
    assert again.computed == 0
    asked(again, demo, refs[2], "pooled")()  # those of edited pictures would crowd the others out
    assert again.computed == 1


def test_a_picture_is_found_under_another_name_and_one_of_unknown_content_by_what_is_seen(parameters, demo, tmp_path):
    encoding = seen_by(parameters)
    asked(encoding, demo, ImageRef(0))()
    same = next(index for index in range(1, len(demo)) if demo.content(index) == demo.content(0))
    asked(encoding, demo, ImageRef(same))()
    assert encoding.computed == 1
    for _ in range(2):
        encoding.ask("features", None, ImageRef(0), lambda: images.Fitter(demo.pixels(0)))()
        assert encoding.computed == 2
    Image.fromarray(demo.pixels(0)).save(tmp_path / "a.png")
    assert keys.of_source(tmp_path / "a.png") == keys.of_source((tmp_path / "a.png").read_bytes())
    os.mkfifo(tmp_path / "pipe")
    assert not any(map(keys.of_source, (tmp_path / "absent.png", tmp_path, tmp_path / "pipe", demo.pixels(0))))


def test_what_half_precision_cannot_hold_is_refused_and_names_the_remedy(parameters, demo):
    huge = parameters | {"encoder/blocks/down/bias": parameters["encoder/blocks/down/bias"] + 1e6}
    encoding = seen_by(huge)
    with pytest.raises(ConfigError, match=r"not finite.*processes\.only\.cached=False"):
        asked(encoding, demo, ImageRef(0))()
    encoding.close()


def test_who_waits_is_told_of_a_failure_and_of_the_end(demo):
    def fails(squares):
        raise RuntimeError("out of memory")

    encoding = encodings.Encoding(fails, {}, frozen.stores("features"), rows=1, size=32, padding=(0, 0, 0))
    wait = asked(encoding, demo, ImageRef(0))
    with pytest.raises(RuntimeError, match="out of memory"):
        wait()
    encoding.close()
    with pytest.raises(RuntimeError):
        asked(encoding, demo, ImageRef(1))


# ---- training ------------------------------------------------------------------------------------------------------


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["kind"], line["step"]): (line["loss"], line["accuracy"]) for line in lines}


def test_training_on_kept_features_is_training_and_the_same_whether_they_were_kept_or_not(tmp_path, place, monkeypatch):
    counts = []
    close, begin = encodings.Encoding.close, pipeline.batches
    monkeypatch.setattr(encodings.Encoding, "close", lambda self: (counts.append(self.computed), close(self)))

    def train(name, process=FROZEN):
        program.train(miniature.config(processes={"only": process}, checkpoint=config_lib.Checkpoint(every_steps=2)),
                      tmp_path / name)
        return losses(tmp_path / name)

    def stops(rows, data, **options):
        for number, batch in enumerate(begin(rows, data, **options)):
            if rows.split == "train" and number == 3:
                raise KeyboardInterrupt
            yield batch

    cold, warm = train("cold"), train("another arm")
    assert counts[0] > 0 and counts[1] == 0
    assert cold == warm
    monkeypatch.setenv(store.SIZE, "0")  # nothing is kept, and the run is interrupted and goes on
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "batches", stops)
        with pytest.raises(KeyboardInterrupt):
            train("stopped")
    assert train("stopped") == cold and counts[2] > 0 and counts[3] > 0
    monkeypatch.delenv(store.SIZE)
    live = train("live", dataclasses.replace(FROZEN, cached=False))
    assert len(counts) == 4 and live != cold
    for step, (loss, _) in cold.items():
        assert loss == pytest.approx(live[step][0], rel=2e-3)
    assert {file.name for file in place.iterdir() if file.suffix == ".sqlite"} == {"features.sqlite", "pooled.sqlite"}
    with pytest.raises(ConfigError, match=r"processes\.only\.cached: "):
        train("cold", dataclasses.replace(FROZEN, cached=False))


def test_a_row_of_features_has_the_conversations_of_a_row_of_pictures(parameters, demo):
    def rows(features):
        return pipeline.Rows(FROZEN, {"demo": demo}, chat_lib.load(), miniature.MODEL, seed=0, split="train",
                             features=features)

    encoding = seen_by(parameters)
    known, plain = rows(encoding), rows(None)
    model = Geometry.of(miniature.MODEL).bind(parameters)
    for number in range(12):
        seen, shown = known.row(number), plain.row(number)
        assert {name for name in seen if name not in shown} == {"features/low", "features/thematic"}
        assert {name for name in shown if name not in seen} == {"images"}
        for name in seen.keys() & shown.keys():
            np.testing.assert_array_equal(seen[name], shown[name], err_msg=name)
        pool = [model.look({name: jnp.asarray(value)[None] for name, value in row.items()}, FROZEN.parts,
                           dtype=jnp.float32)[0] for row in (seen, shown)]
        size = pool[0].shape[0] // FROZEN.row.images
        used = shown["images"].any((1, 2, 3)).repeat(size)
        np.testing.assert_allclose(pool[0][used], pool[1][used], atol=3e-3)
    encoding.close()


def test_patches_are_drawn_of_levels_alone_anew_in_each_row_and_of_none_in_validation(parameters, demo):
    """Of miniature's features, 1 class token and 16 patches: the class token stays, and so does their order."""
    encoding = seen_by(parameters)
    whole, few, again = (pipeline.Rows(dataclasses.replace(FROZEN, patches=count), {"demo": demo}, chat_lib.load(),
                                       miniature.MODEL, seed=0, split="train", features=encoding)
                         for count in (0, 5, 5))
    seen, places = miniature.MODEL.encoder.part("low"), []
    for number in range(4):
        full, drawn, same = whole.row(number), few.row(number), again.row(number)
        assert drawn["features/low"].shape[1] == seen.prefix + 5 < seen.tokens
        for name in full:
            np.testing.assert_array_equal(drawn[name], same[name], err_msg=name)
            if name != "features/low":  # what is averaged in squares stays whole
                np.testing.assert_array_equal(drawn[name], full[name], err_msg=name)
        for picture, some in zip(full["features/low"], drawn["features/low"], strict=True):
            if picture.any():
                found = [int(np.flatnonzero((picture == token).all(-1))[0]) for token in some]
                assert found[:seen.prefix] == list(range(seen.prefix)) and found == sorted(set(found))
                places.append(tuple(found))
    assert len(set(places)) > len(places) // 2
    with pytest.raises(ConfigError, match="patches=99: an image has"):
        pipeline.blank(dataclasses.replace(FROZEN, patches=99), miniature.MODEL, cached=True)
    with pytest.raises(ConfigError, match="patches=5 are drawn from features that are kept; set cached=True"):
        dataclasses.replace(FROZEN, patches=5, cached=False)
    encoding.close()


def test_a_run_that_draws_patches_resumes_bit_for_bit(tmp_path):
    """Validation sees all of them, in programs of other shapes."""
    drawn = dataclasses.replace(FROZEN, patches=5, steps=4, eval_every=2)
    keep = config_lib.Checkpoint(every_steps=2, keep=3)
    program.train(miniature.config(processes={"only": drawn}, checkpoint=keep), tmp_path / "whole")
    shutil.copytree(tmp_path / "whole", tmp_path / "part")
    shutil.rmtree(tmp_path / "part/checkpoints/only/00000004")
    program.train(miniature.config(processes={"only": drawn}, checkpoint=keep), tmp_path / "part")
    first, second = (array_io.stored(locate.find(tmp_path / name)) for name in ("whole", "part"))
    for path, leaf in first.items():
        np.testing.assert_array_equal(leaf.read().result(), second[path].read().result(), err_msg=path)


def test_a_picture_that_cannot_be_read_masks_its_conversation_alone(parameters, demo):
    class Broken:
        name, fingerprint = "broken", "0"
        indices, record, content = demo.indices, demo.record, demo.content

        def pixels(self, index):
            if demo.content(index) == demo.content(0):
                raise BadRecord("a photograph is truncated")
            return demo.pixels(index)

    encoding = seen_by(parameters)
    shown = pipeline.Rows(FROZEN, {"demo": Broken()}, chat_lib.load(), miniature.MODEL, seed=0, split="train")
    known = pipeline.Rows(FROZEN, {"demo": Broken()}, chat_lib.load(), miniature.MODEL, seed=0, split="train",
                          features=encoding)
    bad = 0
    for number in range(12):
        ours, theirs = known.row(number), shown.row(number)
        bad += int(ours["bad"])
        assert ours["bad"] == theirs["bad"]
        np.testing.assert_array_equal(ours["weights"], theirs["weights"])
    assert bad > 0
    encoding.close()


@pytest.mark.parametrize("process, data, said", [
    (dataclasses.replace(FROZEN, train=(".*",), freeze=()), config_lib.Data(), "the encoder learns"),
    (FROZEN, config_lib.Data(workers=2), "data.workers=2")])
def test_what_cannot_be_kept_is_refused(tmp_path, process, data, said):
    with pytest.raises(ConfigError, match=said):
        program.train(miniature.config(processes={"only": process}, data=data), tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def test_several_processes_are_refused(parameters, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ConfigError, match=r"one process, and 2 train together.*processes\.only\.cached=False"):
        seen_by(parameters)


def on_eight_devices(folder: str) -> None:
    program.train(miniature.config(processes={"only": dataclasses.replace(FROZEN, batch=8)}), folder)


@pytest.mark.slow
def test_eight_devices_see_what_one_sees(tmp_path):
    """Pictures are divided among the devices, whose results may differ in the last bit of half precision."""
    found = []
    for devices in (1, 8):
        env = miniature.environment(tmp_path / "compiled", devices=devices) | {
            store.PLACE: str(tmp_path / f"cache {devices}")}
        code = f"import pathlib, test_features as t; t.on_eight_devices(pathlib.Path({str(tmp_path / str(devices))!r}))"
        done = miniature.run([sys.executable, "-c", code], env)
        assert done.returncode == 0, done.stderr[-3000:]
        found.append(losses(tmp_path / str(devices)))
    assert found[0].keys() == found[1].keys()
    for where, (loss, _) in found[0].items():
        assert loss == pytest.approx(found[1][where][0], rel=1e-3)


# ---- inference -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return miniature.saved(tmp_path_factory.mktemp("run"), config_lib.PARTS)


@pytest.fixture(scope="module")
def album(tmp_path_factory, demo):
    folder = tmp_path_factory.mktemp("album")
    for number in range(5):
        Image.fromarray(demo.pixels(number * 20)[::4, ::4]).save(folder / f"{number}.png")
    return sorted(folder.iterdir())


def test_answers_are_those_of_a_model_that_keeps_nothing(checkpoint, album, monkeypatch, place):
    kept, again = calm_jax.load(checkpoint), calm_jax.load(checkpoint)
    monkeypatch.setenv(store.SIZE, "0")
    plain = calm_jax.load(checkpoint)
    drawn = Sampling(temperature=1.0, seed=7)
    expected = plain.score(album), plain.comment(album, limit=6, sampling=drawn), plain.attributes(album[0])
    assert not place.exists()
    monkeypatch.delenv(store.SIZE)
    for model in (kept, again):
        scores, comments, attributes = (model.score(album), model.comment(album, limit=6, sampling=drawn),
                                        model.attributes(album[0]))
        assert [score.value for score in scores] == pytest.approx([score.value for score in expected[0]], abs=1e-5)
        assert comments == expected[1] and attributes == expected[2]
        rated = model.personalise([(album[0], 3.0), (album[1], 8.0)], album)
        assert [score.value for score in rated] == pytest.approx(
            [score.value for score in plain.personalise([(album[0], 3.0), (album[1], 8.0)], album)], abs=1e-5)
    assert kept.loaded("score").generator._known.computed and not again.loaded("score").generator._known.computed


def test_known_pictures_are_not_decoded(checkpoint, album, monkeypatch):
    model = calm_jax.load(checkpoint)
    expected = model.score(album)
    monkeypatch.setattr(calm_jax.data.pictures, "pixels", lambda picture: pytest.fail("it is known"))
    assert model.score(album) == expected == calm_jax.load(checkpoint).score([path.read_bytes() for path in album])


def test_statistics_are_those_of_the_features(checkpoint, album, monkeypatch):
    model = calm_jax.load(checkpoint)
    found = np.stack(model.statistics(album))
    assert found.shape == (5, 4 * 3 * 32) and found.dtype == np.float32
    np.testing.assert_array_equal(model.statistics(album[2]), found[2])
    monkeypatch.setattr(frozen, "LARGE", 0)  # a model whose visual tokens are not kept
    large = calm_jax.load(checkpoint)
    large.score(album)
    assert large.loaded("score").generator._known is None
    np.testing.assert_allclose(np.stack(large.statistics(album)), found, atol=1e-3)


def test_what_stands_for_an_unreadable_picture_is_not_kept_as_that_picture(parameters, demo):
    generator = Generator(miniature.MODEL, parameters, chat_lib.load(), keep=True)
    broken = Pictures(lambda index: images.NOTHING, lambda index: b"the content of a file")
    whole = Pictures(demo.pixels, lambda index: b"the content of a file")
    for pixels in (broken, Pictures.fitted(broken, 32, 4)):
        generator.statistics([ImageRef(0)], pixels)
    assert generator._pooled.computed == 1
    found = generator.statistics([ImageRef(0)], whole)
    assert generator._pooled.computed == 2
    again = generator.statistics([ImageRef(0)], demo.pixels)
    assert again.keys() == found.keys() and all(np.array_equal(again[part], found[part]) for part in found)
    generator.close()


def test_a_damaged_file_is_named_each_time_it_is_asked_about(checkpoint, album, tmp_path, capsys):
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "good.png").write_bytes(album[0].read_bytes())
    (folder / "bad.png").write_bytes(album[1].read_bytes()[:300])
    rows = []
    for verb in ("score", "score", "comment"):
        assert verbs.run(verb, [str(folder)], checkpoint=checkpoint, process="", batch=4, out=None, format="jsonl") == 0
        bad, good = map(json.loads, capsys.readouterr().out.splitlines())
        assert "error" in bad and "error" not in good
        rows.append(good)
    assert rows[0] == rows[1]
