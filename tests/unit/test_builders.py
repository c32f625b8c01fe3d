"""calm_jax.data.builders: true formats in, the right counts, splits and first records out, whatever lies among them."""

import contextlib
import csv
import errno
import hashlib
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import zlib

import miniature
import numpy as np
import pytest
from PIL import Image

from calm_jax.data import builders, pictures, statistics
from calm_jax.data.builders import labels, store, stored
from calm_jax.data.datasets import ava, folder, oasis, para, qa
from calm_jax.data.datasets import csv as csv_lib
from calm_jax.data.samples import BadRecord
from calm_jax.errors import ConfigError

REAL = pathlib.Path(os.environ.get("CALM_DATA", "data"))


def real(name: str) -> pathlib.Path:
    path = REAL / name
    if not path.is_dir():
        pytest.skip(f"no {name}: set CALM_DATA to a folder that holds {name}/")
    return path


def picture(path: pathlib.Path, size=(60, 40), *, seed: int | None = None, **options) -> pathlib.Path:
    """A smooth photograph-like picture in the format of its suffix."""
    rng = np.random.default_rng(zlib.crc32(path.name.encode()) if seed is None else seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8))
    small.resize(size, Image.Resampling.BICUBIC).save(path, **options)
    return path


def table(path: pathlib.Path, rows) -> pathlib.Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return path


def build(source: labels.Source, data_dir: pathlib.Path, **options) -> stored.Stored:
    said = []
    store.prepare(source, data_dir, say=said.append, **options)
    dataset = builders.load(options.get("name") or source.name, str(data_dir))
    dataset.said = "\n".join(said)
    return dataset


def counts(dataset) -> dict[str, int]:
    return {split: len(dataset.indices(split)) for split in labels.SPLITS}


def keys(dataset, split: str) -> list[str]:
    return [dataset.record(int(index)).key for index in dataset.indices(split)]


def by_key(dataset) -> dict:
    return {dataset.record(index).key: dataset.record(index) for index in range(len(dataset))}


# ---- the real data, where it is ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def real_para(tmp_path_factory):
    return build(para.Para(real("para")), tmp_path_factory.mktemp("para"))


def test_para_as_it_lies_in_the_folder_of_means(real_para):
    assert counts(real_para) == {"train": 7500, "validation": 1000, "test": 1200}
    with open(REAL / "para/annotation/test.csv") as stream:
        row = next(csv.DictReader(stream))
    first = real_para.record(int(real_para.indices("test")[0]))
    assert (first.key, first.scale) == ("iaa_pub52", (1.0, 5.0))
    assert first.score == pytest.approx(float(row["aestheticScore_mean"]), abs=1e-6) and first.spread > 0
    assert first.facts["emotions"]["neutral"] == 18 and first.facts["semantic"]
    assert set(para.ASPECTS) <= set(first.facts) and len(first.deciles) > 10
    train = real_para.record(0)
    assert train.key == "iaa_pub3" and train.spread is None and "semantic" not in train.facts
    file = REAL / "para/imgs/session1/iaa_pub3_.jpg"
    assert (real_para.pixels(0) == pictures.read(file)).all()
    assert "no redistribution" in real_para.said and "yang2022" in real_para.said


def test_para_is_stored_byte_for_byte(real_para):
    import tensorflow_datasets as tfds
    source = tfds.builder_from_directory(str(real_para.folder)).as_data_source(
        "train", decoders={"image": tfds.decode.SkipDecoding()})
    assert len(source) == 7500 and source[0]["key"] == b"iaa_pub3"
    assert source[0]["image"] == (REAL / "para/imgs/session1/iaa_pub3_.jpg").read_bytes()


def test_oasis_as_it_lies(tmp_path):
    dataset = build(oasis.Oasis(real("oasis")), tmp_path)
    assert counts(dataset) == {"train": 640, "validation": 80, "test": 80}
    records = by_key(dataset)
    assert len(records) == 800 and sum(len(record.ratings) for record in records.values()) == 99_382
    assert len({user for record in records.values() for user in record.ratings}) == 500
    one = records["Acorns1"]
    assert one.scale == (1.0, 7.0) and one.facts == {"category": "Object"}
    assert one.score == pytest.approx(np.mean(list(one.ratings.values())), abs=1e-5)
    assert one.spread == pytest.approx(np.std(list(one.ratings.values())), abs=1e-5)
    assert keys(dataset, "test")[0] == "Acorns2" and len(set(keys(dataset, "test"))) == 80


# ---- miniatures in the true formats ------------------------------------------------------------------------------


HEADER = ("sessionId", "imageName", "userId", "aestheticScore", "qualityScore", "compositionScore", "colorScore",
          "dofScore", "contentScore", "lightScore", "isObjectEmphasis", "imageEmotion", "difficultyOfJudgment",
          "contentPreference", "willingnessToShare", "semantic")


def official_para(root: pathlib.Path, pictures_: int = 12, lists: bool = True) -> pathlib.Path:
    rows = [HEADER]
    for number in range(pictures_):
        session, name = f"session{1 + number // 4}", f"iaa_pub{number}_.jpg"
        picture(root / "imgs" / session / name)
        for rater in range(3):
            rows.append((session, name, f"A{rater}", 1.5 + (number % 4) * 0.5 + 0.5 * rater, 3.2, 3, 4, 2, 3, 4, 1,
                         ("awe", "neutral", "neutral")[rater], "-1", 3, 3, "scene" if number % 2 else "food"))
    table(root / "annotation/PARA-Images.csv", rows)
    if lists:
        names = [f"iaa_pub{number}_.jpg" for number in range(pictures_)]
        table(root / "annotation/PARA-GiaaTrain.csv", [("sessionId", "imageName"), *(("s", n) for n in names[:9])])
        table(root / "annotation/PARA-GiaaTest.csv", [("sessionId", "imageName"), *(("s", n) for n in names[9:])])
    return root


def test_the_official_para(tmp_path):
    dataset = build(para.Para(official_para(tmp_path / "para"), shares=(0.7, 0.3, 0.0)), tmp_path / "out")
    assert counts(dataset) == {"train": 6, "validation": 3, "test": 3}
    assert keys(dataset, "test") == ["iaa_pub9", "iaa_pub10", "iaa_pub11"]
    record = by_key(dataset)["iaa_pub1"]
    assert record.ratings == {"A0": 2.0, "A1": 2.5, "A2": 3.0} and record.score == 2.5
    assert record.spread == pytest.approx(np.std([2.0, 2.5, 3.0]), abs=1e-6)  # of the population, as PARA's own
    assert record.facts == {"semantic": "scene", "emotions": {"awe": 1, "neutral": 2}, "quality": 3.2,
                            "composition": 3.0, "color": 4.0, "depth_of_field": 2.0, "light": 4.0, "content": 3.0}


def test_para_without_its_lists_is_refused_or_drawn(tmp_path):
    root = official_para(tmp_path / "para", lists=False)
    with pytest.raises(ConfigError, match=r"has no PARA-GiaaTrain.csv, the official split.*--shares"):
        list(para.Para(root).entries())
    assert counts(build(para.Para(root, shares=(0.5, 0.25, 0.25)), tmp_path / "out")) == {
        "train": 6, "validation": 3, "test": 3}


def ava_folder(root: pathlib.Path, count: int = 30, absent=(4, 17)) -> pathlib.Path:
    root.mkdir(parents=True)
    lines = []
    for number in range(count):
        if number not in absent:
            picture(root / "images" / f"{1000 + number}.jpg")
        votes = [0, 1, 5, 17, 38, 36, 15, 6, 5, number]
        lines.append(f"{number + 1} {1000 + number} {' '.join(map(str, votes))} {number % 3} 22 1396")
    (root / "AVA.txt").write_text("\n".join(lines) + "\n")
    (root / "test.txt").write_text("\n".join(str(1000 + number) for number in range(0, count, 5)))
    (root / "tags.txt").write_text("1 Abstract\n2 Cityscape\n22 Still Life\n")
    return root


def test_a_miniature_ava(tmp_path):
    root = ava_folder(tmp_path / "ava")
    comments = {"dataset": "AVA", "images": [{"filename": "1001.jpg", "split": "train", "sentences": [
        {"raw": " Lovely light. ", "clean": "lovely light"}, {"raw": "", "clean": ""}]}]}
    (root / ava.CAPTIONS).write_text(json.dumps(comments))
    dataset = build(ava.Ava(root, shares=(0.75, 0.25, 0)), tmp_path / "out", max_bad_share=0.1)
    assert counts(dataset) == {"train": 17, "validation": 5, "test": 6}  # of 18, 6 and 6, two are missing
    record = by_key(dataset)["1001"]
    votes = [0, 1, 5, 17, 38, 36, 15, 6, 5, 1]
    every = np.repeat(np.arange(1, 11), votes)
    assert record.score == pytest.approx(every.mean(), abs=1e-6)
    assert record.spread == pytest.approx(every.std(), abs=1e-6)
    assert record.facts == {"counts": votes, "challenge": 1396, "tags": ["Abstract", "Still Life"]}
    assert record.comments == ("Lovely light.",)
    assert keys(dataset, "test") == [str(1000 + number) for number in range(0, 30, 5)]
    assert "2 missing and 0 unreadable pictures of 30" in dataset.said and "1004.jpg does not exist" in dataset.said


def test_ava_needs_its_test_list(tmp_path):
    root = ava_folder(tmp_path / "ava")
    (root / "test.txt").unlink()
    with pytest.raises(ConfigError, match="no list of test pictures"):
        list(ava.Ava(root).entries())


def test_a_table_of_scores(tmp_path):
    rows = [("image", "score", "user", "comment", "split"), ("a.jpg", 7, "ann", "Fine light.", "train"),
            ("a.jpg", 5, "bob", "", "train"), ("b.jpg", "", "", "Dull.", "val"), ("sub/c.jpg", 2, "", "", "test")]
    path = table(tmp_path / "source/scores.csv", rows)
    for name in ("a.jpg", "b.jpg", "sub/c.jpg"):
        picture(path.parent / name)
    dataset = build(csv_lib.Csv(path, scale=(0, 10)), tmp_path / "out", name="mine")
    assert counts(dataset) == {"train": 1, "validation": 1, "test": 1} and "mine" in stored.names(tmp_path / "out")
    records = by_key(dataset)
    assert records["a.jpg"].ratings == {"ann": 7.0, "bob": 5.0} and records["a.jpg"].score == 6.0
    assert records["a.jpg"].comments == ("Fine light.",) and records["a.jpg"].scale == (0.0, 10.0)
    assert records["b.jpg"].score is None and records["b.jpg"].comments == ("Dull.",)
    assert records["sub/c.jpg"].score == 2.0 and records["sub/c.jpg"].spread is None


def test_questions_and_answers(tmp_path):
    def talk(*words):
        return [{"from": qa.SPEAKERS[place % 2], "value": text} for place, text in enumerate(words)]
    source = tmp_path / "source"
    picture(source / "000/1.jpg")
    picture(source / "000/2.jpg")
    (source / "blip_laion_cc_sbu_558k.json").write_text(json.dumps([
        {"id": "1", "image": "000/1.jpg", "conversations": talk("What?\n<image>", "A cat \ud83d.")},
        {"id": "1", "image": "000/1.jpg", "conversations": talk("<image>\nWhat?", "A cat.", "Where?", "There.")},
        {"id": "2", "image": "000/2.jpg", "conversations": talk("<image>\nWhat?", "A dog.")},
        {"id": "3", "conversations": talk("What?", "Words alone.")},
        {"id": "4", "image": "000/2.jpg", "conversations": talk("What?")}]))
    dataset = build(qa.Qa(source, shares=(1, 0, 0)), tmp_path / "out", max_bad_share=0.5)
    records = by_key(dataset)
    assert list(records) == ["1", "1#2", "2"]
    assert records["1"].questions == (("What?\n<image>", "A cat ?."),)
    assert records["1#2"].questions == (("<image>\nWhat?", "A cat."), ("Where?", "There."))
    assert records["1"].group == records["1#2"].group == "000/1.jpg"
    assert "1 conversations without a picture" in dataset.said and "record 5: 1 turns" in dataset.said


def test_a_folder_of_pictures(tmp_path):
    for number in range(40):
        picture(tmp_path / "source" / f"{number % 3}" / f"{number}.{'png' if number % 2 else 'JPG'}", format=(
            "PNG" if number % 2 else "JPEG"))
    (tmp_path / "source/notes.txt").write_text("no picture")
    picture(tmp_path / "source/.thumbs/1.jpg")
    dataset = build(folder.Folder(tmp_path / "source"), tmp_path / "out")
    assert counts(dataset) == {"train": 36, "validation": 2, "test": 2}
    record = dataset.record(0)
    assert record.key == "0/0.JPG" and record.score is None and record.deciles
    for number in range(40):  # only the untouched grades of ordinary pictures are neutral
        unfit = statistics.unfit(statistics.measure(dataset.pixels(number)))
        assert dataset.record(number).unfit == tuple(sorted(unfit))
    assert any(dataset.record(number).unfit for number in range(40))
    again = folder.Folder(tmp_path / "source")
    assert [entry.split for entry in again.entries()] == [entry.split for entry in again.entries()]


# ---- pictures of every kind --------------------------------------------------------------------------------------


def test_pictures_of_every_kind(tmp_path):
    root = tmp_path / "source"
    good = {"plain": picture(root / "plain.jpg", seed=1, quality=80), "large": picture(root / "large.jpg", (900, 300))}
    picture(root / "one.jpg", (1, 1))
    base = Image.open(good["plain"])
    base.convert("CMYK").save(root / "cmyk.jpg")
    base.convert("L").save(root / "grey.jpg")
    Image.fromarray(np.arange(600, dtype=np.uint16).reshape(20, 30) * 100).save(root / "deep.png")
    base.convert("P").save(root / "moving.gif", save_all=True, append_images=[base.convert("P")] * 3)
    turned = Image.Exif()
    turned[0x0112] = 6
    base.save(root / "turned.jpg", exif=turned)
    base.save(root / "mislabelled.jpg", format="PNG")
    data = good["plain"].read_bytes()
    (root / "truncated.jpg").write_bytes(data[:len(data) // 2])
    (root / "corrupt.jpg").write_bytes(b"\x00" + data[1:])
    (root / "empty.jpg").write_bytes(b"")
    Image.new("1", (20_000, 10_000)).save(root / "huge.png")
    dataset = build(folder.Folder(root, shares=(1, 0, 0)), tmp_path / "out", max_bad_share=0.5)
    records = by_key(dataset)
    assert sorted(records) == ["cmyk.jpg", "deep.png", "grey.jpg", "large.jpg", "mislabelled.jpg", "moving.gif",
                               "one.jpg", "plain.jpg", "turned.jpg"]
    pixels = {key: dataset.pixels(record.image.index) for key, record in records.items()}
    assert (pixels["plain.jpg"] == pictures.read(good["plain"])).all()
    assert pixels["large.jpg"].shape == (171, 512, 3) and pixels["one.jpg"].shape == (1, 1, 3)
    assert pixels["turned.jpg"].shape == (60, 40, 3) and pixels["moving.gif"].shape == (40, 60, 3)
    for key in ("cmyk.jpg", "grey.jpg", "mislabelled.jpg", "deep.png", "moving.gif"):
        difference = np.abs(pixels[key].astype(int) - pictures.read(root / key))
        assert difference.mean() < 4, key  # JPEG of a dithered palette
    assert "4 unreadable pictures of 13" in dataset.said
    for name in ("truncated.jpg", "corrupt.jpg", "empty.jpg", "huge.png"):
        assert name in dataset.said
    skipped = [json.loads(line) for line in (dataset.folder / "skipped.jsonl").read_text().splitlines()]
    assert sorted(item["key"] for item in skipped) == ["corrupt.jpg", "empty.jpg", "huge.png", "truncated.jpg"]
    assert any("megapixels" in item["reason"] for item in skipped)
    import tensorflow_datasets as tfds  # everything that was stored is a JPEG that TFDS itself can decode
    plain = tfds.builder_from_directory(str(dataset.folder)).as_data_source("train")
    assert {one["image"].shape[2] for one in plain} == {3}


def test_the_longest_side_is_a_choice(tmp_path):
    picture(tmp_path / "source/a.png", (700, 350))
    for side, shape in ((0, (350, 700, 3)), (100, (50, 100, 3)), (1000, (350, 700, 3))):
        dataset = build(folder.Folder(tmp_path / "source", shares=(1, 0, 0)), tmp_path / f"out{side}",
                        longest_side=side)
        assert dataset.pixels(0).shape == shape
    with pytest.raises(ConfigError, match=r"longest_side=0, and 64 is asked for.*--rebuild"):
        build(folder.Folder(tmp_path / "source", shares=(1, 0, 0)), tmp_path / "out0", longest_side=64)
    dataset = build(folder.Folder(tmp_path / "source", shares=(1, 0, 0)), tmp_path / "out0", longest_side=64,
                    rebuild=True)
    assert dataset.pixels(0).shape == (32, 64, 3)
    assert "prepared already" in build(folder.Folder(tmp_path / "source", shares=(1, 0, 0)), tmp_path / "out0",
                                       longest_side=64).said


# ---- what is wrong ---------------------------------------------------------------------------------------------------


def test_too_many_bad_pictures_stop_the_build_and_a_larger_share_goes_on(tmp_path):
    for number in range(20):
        picture(tmp_path / "source" / f"{number:02d}.jpg")
    for number in (3, 9):
        (tmp_path / "source" / f"{number:02d}.jpg").write_bytes(b"nothing")
    source = folder.Folder(tmp_path / "source", shares=(1, 0, 0))
    with pytest.raises(BadRecord, match=r"stopped: 2 of 20 pictures.*share 0.05; the first: .*03.jpg.*--max_bad_share"):
        build(source, tmp_path / "out", shard=4)
    with pytest.raises(ConfigError, match="'folder' is not finished in"):
        builders.load("folder", str(tmp_path / "out"))
    assert len(build(source, tmp_path / "out", shard=4, max_bad_share=0.1)) == 18


def test_pictures_that_arrive_later_are_taken(tmp_path):
    root = ava_folder(tmp_path / "ava", absent=(1, 2, 28, 29))
    with pytest.raises(BadRecord, match="stopped: 4 of 30"):
        build(ava.Ava(root), tmp_path / "out", shard=5, max_bad_share=0.1)
    for number in (1, 2):
        picture(root / "images" / f"{1000 + number}.jpg")
    assert len(build(ava.Ava(root), tmp_path / "out", shard=5, max_bad_share=0.1)) == 28


def test_a_shard_without_one_good_picture(tmp_path):
    root = ava_folder(tmp_path / "ava", absent=tuple(range(6, 25)))
    dataset = build(ava.Ava(root, shares=(1, 0, 0)), tmp_path / "out", shard=4, max_bad_share=1.0)
    assert len(dataset) == 11 and [dataset.pixels(index).shape for index in range(11)] == [(40, 60, 3)] * 11


def test_malformed_rows_are_counted_and_named(tmp_path):
    rows = [("image", "score", "user"), *((f"{number}.jpg", 3, "ann") for number in range(40)),
            ("40.jpg", "three", "b"), ("41.jpg", 3), ("0.jpg", 3, "ann"), ("", 3, "ann"), ("42.jpg", "", "ann"),
            ("43.jpg", "nan", "ann")]
    path = table(tmp_path / "source/scores.csv", rows)
    for number in range(44):
        picture(path.parent / f"{number}.jpg")
    dataset = build(csv_lib.Csv(path, scale=(1, 5)), tmp_path / "out", max_bad_share=0.2)
    assert len(dataset) == 40 and "6 malformed rows of 46" in dataset.said
    for reason in ("'three', not a number", "line 43: 2 fields, and the header has 3", "ann rates 0.jpg twice",
                   "line 45: image is empty", "neither a score nor a comment", "'nan', not a number"):
        assert reason in dataset.said
    with pytest.raises(BadRecord, match=r"6 of 46 label rows of .* malformed, more than the share 0.05; the first: "):
        build(csv_lib.Csv(path, scale=(1, 5)), tmp_path / "other")


def test_malformed_lines_of_ava(tmp_path):
    root = ava_folder(tmp_path / "ava", absent=())
    with open(root / "AVA.txt", "a") as stream:
        stream.write("31 1030 1 2 3\n32 1031 0 0 0 0 0 0 0 0 0 0 1 2 3\n33 1000 1 1 1 1 1 1 1 1 1 1 1 2 3\n")
    dataset = build(ava.Ava(root), tmp_path / "out", max_bad_share=0.1)
    for reason in ("line 31: 5 numbers, and a line has 15", "line 32: no votes", "line 33: the picture 1000 again"):
        assert reason in dataset.said


def sources(tmp_path):
    """(a Source of a broken source folder, what the sentence says)"""
    picture(tmp_path / "pictures/a.jpg")
    (tmp_path / "empty").mkdir()
    yield lambda: para.Para(tmp_path / "pictures"), r"has no annotation/PARA-Images.csv or annotation/train.csv.*http"
    yield lambda: para.Para(tmp_path / "absent"), "absent does not exist; --source is the folder that holds PARA"
    yield lambda: oasis.Oasis(tmp_path / "pictures"), r"has no ratings.csv, the labels of OASIS"
    yield lambda: ava.Ava(tmp_path / "pictures"), r"has no AVA.txt"
    yield lambda: folder.Folder(tmp_path / "empty"), "holds no pictures"
    table(tmp_path / "headers/ratings.csv", [("user", "imageName", "category", "beauty"), ("u", "a.jpg", "x", 3)])
    yield lambda: oasis.Oasis(tmp_path / "headers"), "has no column 'userId'; its first line is 'user,imageName"
    table(tmp_path / "scale/ratings.csv", [("userId", "imageName", "category", "beauty"), ("u", "a.jpg", "x", 8)])
    yield lambda: oasis.Oasis(tmp_path / "scale"), r"ratings.csv, line 2: the score 8 is outside of the scale 1,7; corr"
    table(tmp_path / "mine/scores.csv", [("image", "score"), ("a.jpg", 8)])
    yield lambda: csv_lib.Csv(tmp_path / "mine", scale=(1, 5)), r"the score 8 is outside of the scale 1,5; give the tr"
    yield lambda: csv_lib.Csv(tmp_path / "mine"), "give --scale LOWEST,HIGHEST"
    yield lambda: csv_lib.Csv(tmp_path / "empty", scale=(1, 5)), r"holds 0 files \*.csv; name the one"
    table(tmp_path / "noscore/scores.csv", [("image", "mark"), ("a.jpg", 8)])
    yield lambda: csv_lib.Csv(tmp_path / "noscore", scale=(1, 5)), "has no column 'score'"
    yield lambda: oasis.Oasis(tmp_path / "scale", scale=(1, 9)), "oasis has the scale 1,7; leave --scale out"
    yield lambda: folder.Folder(tmp_path / "pictures", shares=(0.5, 0.1, 0.1)), "not three shares of train"
    (tmp_path / "qa").mkdir()
    (tmp_path / "qa/a.json").write_text("{}")
    yield lambda: qa.Qa(tmp_path / "qa"), "holds no list of conversations but dict"
    (tmp_path / "notjson").mkdir()
    (tmp_path / "notjson/a.json").write_text("[{")
    yield lambda: qa.Qa(tmp_path / "notjson"), "a.json is not JSON"
    (tmp_path / "ava").mkdir()
    (tmp_path / "ava/AVA.txt").write_text("<html>\n")
    yield lambda: ava.Ava(tmp_path / "ava"), "is not AVA.txt: a line is"


def test_a_wrong_source_is_one_sentence(tmp_path):
    for make, sentence in sources(tmp_path):
        with pytest.raises(ConfigError, match=sentence) as caught:
            build(make(), tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_wrong_place_is_one_sentence(tmp_path):
    picture(tmp_path / "source/a.jpg")
    source = folder.Folder(tmp_path / "source")
    with pytest.raises(ConfigError, match=r"could not be written: Not a directory; free some space or"):
        build(source, tmp_path / "source/a.jpg")
    with pytest.raises(ConfigError, match="cannot name a prepared dataset"):
        build(source, tmp_path / "out", name="My Pictures")
    (tmp_path / "out/folder/1.0.0").mkdir(parents=True)
    for rebuild in (False, True):
        with pytest.raises(ConfigError, match="was not written by this program, or is damaged; remove it"):
            build(source, tmp_path / "out", rebuild=rebuild)


def test_names_of_datasets(tmp_path):
    with pytest.raises(ConfigError, match="there is no data set 'oasys'; the nearest is 'oasis'"):
        builders.source("oasys")
    with pytest.raises(ConfigError, match="nearest is 'para'"):
        builders.load("pra", str(tmp_path))
    with pytest.raises(ConfigError, match=r"none is named: give --config.data.dir=DIR.*calm prepare"):
        builders.load("para")
    with pytest.raises(ConfigError, match=r"'para' is not there in .*; prepare it: calm prepare"):
        builders.load("para", str(tmp_path))


PROGRAM = [sys.executable, "-m", "tools.prepare_data"]


def run(*arguments, limit: int | None = None) -> subprocess.CompletedProcess:
    def small_files():
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    return subprocess.run([*PROGRAM, *map(str, arguments)], cwd=miniature.ROOT, env=miniature.environment(), text=True,
                          capture_output=True, preexec_fn=small_files if limit else None)


def test_the_program(tmp_path):
    for number in range(30):
        picture(tmp_path / "source" / f"{number}.png", (200, 200))
    common = ("--dataset", "folder", "--source", tmp_path / "source", "--data_dir", tmp_path / "out")
    # A disk that takes no more than this ends the build with one sentence; with more room the same command goes on.
    full = run(*common, limit=200_000)
    assert full.returncode == 2 and "Traceback" not in full.stderr
    assert full.stderr.count("error: ") == 1 and "could not be written" in full.stderr
    done = run(*common)
    assert done.returncode == 0 and "train 27, validation 2, test 1 pictures" in done.stdout
    assert "licence: that of the pictures" in done.stdout
    wrong = run("--dataset", "oasys", "--source", tmp_path, "--data_dir", tmp_path)
    assert wrong.returncode == 2 and "error: there is no data set 'oasys'" in wrong.stderr


# ---- on disk ---------------------------------------------------------------------------------------------------------


def tree(root: pathlib.Path) -> dict[str, str]:
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(root.rglob("*")) if path.is_file()}


BUILD = """
import sys
from calm_jax.data.builders import store
from calm_jax.data.datasets import folder
store.prepare(folder.Folder(sys.argv[1]), sys.argv[2], shard=10, workers=2, longest_side=100)
"""


@pytest.mark.slow
def test_a_killed_build_goes_on_and_ends_in_the_same_bytes(tmp_path):
    for number in range(150):
        picture(tmp_path / "source" / f"{number:03d}.png", (600, 500), seed=number, compress_level=1)
    def start(out):
        return subprocess.Popen([sys.executable, "-c", BUILD, tmp_path / "source", out], cwd=miniature.ROOT,
                                env=miniature.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    out, kills, chance = tmp_path / "killed", 0, random.Random(0)
    for _ in range(3):
        child = start(out)
        before = len(list(out.glob("folder/1.0.0.partial/*.array_record-*-of-*[0-9]")))
        while child.poll() is None:
            if len(list(out.glob("folder/1.0.0.partial/*.array_record-*-of-*[0-9]"))) >= before + 2:
                time.sleep(chance.uniform(0, 0.1))
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        kills += child.wait() == -signal.SIGKILL
        assert not (out / "folder/1.0.0").exists()
        with pytest.raises(ConfigError, match="'folder' is not finished"):
            builders.load("folder", str(out))
    assert kills == 3
    assert start(out).wait() == 0 and start(tmp_path / "whole").wait() == 0
    found = tree(out)
    assert found == tree(tmp_path / "whole") and len(found) > 15
    assert not [name for name in found if "partial" in name or "parts" in name]


def test_two_builds_at_once_are_refused(tmp_path):
    picture(tmp_path / "source/a.jpg")
    partial = tmp_path / "out/folder/1.0.0.partial"
    partial.mkdir(parents=True)
    with store._alone(partial), pytest.raises(ConfigError, match="another program is building"):
        build(folder.Folder(tmp_path / "source"), tmp_path / "out")


def test_nothing_imports_tensorflow(tmp_path):
    """Nor torch, nor JAX: worker processes that read pictures need none of them. Plain TFDS reads the folder, too."""
    picture(tmp_path / "source/a.jpg", (30, 20))
    code = f"""
import sys
from calm_jax.data import builders
from calm_jax.data.builders import store
from calm_jax.data.datasets import folder
path = store.prepare(folder.Folder({str(tmp_path / 'source')!r}, shares=(1, 0, 0)), {str(tmp_path / 'out')!r})
dataset = builders.load("folder", {str(tmp_path / 'out')!r})
assert dataset.pixels(0).shape == (20, 30, 3) and dataset.record(0).key == "a.jpg"
import tensorflow_datasets as tfds
builder = tfds.builder_from_directory(str(path))
source = builder.as_data_source("train")
assert len(source) == 1 and source[0]["key"] == b"a.jpg" and source[0]["image"].shape == (20, 30, 3)
assert builder.info.redistribution_info.license == "that of the pictures"
print(sorted({{"tensorflow", "torch", "jax"}} & set(sys.modules)), file=sys.stderr)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=miniature.ROOT, env=miniature.environment(), text=True,
                          capture_output=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


@pytest.fixture
def small(tmp_path):
    for number in range(12):
        picture(tmp_path / "source" / f"{number:02d}.jpg", seed=number)
    return build(folder.Folder(tmp_path / "source", shares=(0.5, 0.25, 0.25)), tmp_path / "out", shard=4)


def test_record_numbers_run_through_the_splits(small):
    assert [list(small.indices(split)) for split in labels.SPLITS] == [[*range(6)], [6, 7, 8], [9, 10, 11]]
    assert small.indices("train").dtype == np.int64
    assert sorted(by_key(small)) == [f"{number:02d}.jpg" for number in range(12)]
    for index in range(12):
        record = small.record(index)
        assert record.image.index == index
        file = small.folder.parents[2] / "source" / record.key
        assert (small.pixels(index) == pictures.read(file)).all()
    with pytest.raises(ConfigError, match="no split 'valid'; the nearest is 'validation'"):
        small.indices("valid")
    with pytest.raises(IndexError):
        small.record(12)


def test_a_dataset_travels_to_worker_processes(small):
    small.pixels(0)
    again = pickle.loads(pickle.dumps(small))
    assert again.record(7) == small.record(7) and (again.pixels(7) == small.pixels(7)).all()
    assert len(pickle.dumps(small)) < 5000


def test_damaged_stores_are_one_sentence(small):
    shard = next(small.folder.glob("folder-train.array_record-00000-*"))
    data = bytearray(shard.read_bytes())
    for start in range(1000, len(data), 1000):
        data[start] ^= 0xFF
    shard.write_bytes(bytes(data))
    with pytest.raises(BadRecord, match=r".jpg of .* cannot be read: .*--rebuild"):
        for index in range(4):
            stored.Stored("folder", small.folder.parents[1]).pixels(index)
    text = small.folder / "labels/train.jsonl"
    text.write_bytes(text.read_bytes()[:-20])
    with pytest.raises(ConfigError, match="labels is damaged: train should have 6 records"):
        stored.Stored("folder", small.folder.parents[1])
    (small.folder / "manifest.json").write_text("{")
    with pytest.raises(ConfigError, match=r"is damaged .*prepare it again"):
        stored.Stored("folder", small.folder.parents[1])


def test_a_quarter_of_a_million_records_open_at_once(tmp_path):
    count = 255_530
    root = tmp_path / "ava/1.0.0"
    (root / "labels").mkdir(parents=True)
    label = {"score": 5.4, "spread": 1.4, "facts": {"counts": [1] * 10, "challenge": 3, "tags": ["Still Life"]},
             "deciles": {f"statistic{number}": 4 for number in range(20)}}
    lines = [f'{{"key":"{number}",{json.dumps(label)[1:]}\n'.encode() for number in range(count)]
    (root / "labels/train.jsonl").write_bytes(b"".join(lines))
    np.save(root / "labels/train.npy", np.cumsum([0, *map(len, lines)], dtype=np.int64))
    (root / "manifest.json").write_text(json.dumps({"plan": {"scale": [1, 10]}, "splits": {"train": count}}))
    del lines
    tracemalloc.start()
    began = time.perf_counter()
    dataset = stored.Stored("ava", tmp_path)
    opened = time.perf_counter() - began
    order = np.random.default_rng(0).permutation(dataset.indices("train"))[:2000]
    began = time.perf_counter()
    assert all(dataset.record(int(index)).key == str(index) for index in order)
    each, (_, peak) = (time.perf_counter() - began) / len(order), tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert opened < 1.0 and each < 1e-3 and peak < 16 * 2**20


def test_only_the_bytes_of_small_upright_jpegs_are_kept(tmp_path):
    kept = picture(tmp_path / "a.jpg", (80, 50), quality=60)
    assert store.encode(kept, 80)[0] == kept.read_bytes() and store.encode(kept, 0)[0] == kept.read_bytes()
    data, pixels = store.encode(kept, 79)
    assert data != kept.read_bytes() and pixels.shape == (49, 79, 3)
    stream = io.BytesIO(data)
    with Image.open(stream) as again:
        assert again.format == "JPEG" and again.size == (79, 49)


def test_the_page_about_adding_a_dataset_tells_the_truth(tmp_path):
    text = (miniature.ROOT / "docs/data.md").read_text().split("## How to add one")[1]
    found: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], found)
    root = tmp_path / "tad66k"
    for split, count in (("train", 50), ("test", 7)):
        table(root / f"merge/{split}.csv", [("image", "score"), *((f"{split}{n}.jpg", 2.85) for n in range(count))])
        for number in range(count):
            picture(root / f"images/{split}{number}.jpg", (20, 20))
    store.prepare(found["Tad66k"](root), tmp_path / "out", say=lambda text: None)
    dataset = stored.Stored("tad66k", tmp_path / "out")
    assert counts(dataset) == {"train": 49, "validation": 1, "test": 7}
    assert by_key(dataset)["test0.jpg"].score == 2.85


# ---- names that lead elsewhere, and damaged labels --------------------------------------------------------------


def test_a_picture_has_one_name_and_none_leads_out_of_the_folder(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for name in ("a.jpg", "b.jpg"):
        Image.new("RGB", (20, 20), (9, 99, 199)).save(source / name)
    Image.new("RGB", (20, 20)).save(tmp_path / "outside.jpg")
    rows = ["./a.jpg,1,ann", "a.jpg,3,bob", "x/../a.jpg,5,cid", "b.jpg,4,ann", "../outside.jpg,2,ann",
            f"{tmp_path}/outside.jpg,2,ann", "x/../../outside.jpg,2,ann", "..,2,ann"]
    (source / "mine.csv").write_text("image,score,user\n" + "\n".join(rows) + "\n")
    made = builders.source("csv")(source, scale=(1, 5))
    entries = list(made.entries())
    assert {entry.key: entry.label["score"] for entry in entries} == {"a.jpg": 3.0, "b.jpg": 4.0}
    assert len(made.malformed) == 4 and all("outside" in text or ".." in text for text in made.malformed)
    records = [{"id": str(number), "image": name, "conversations": [{"from": "human", "value": "Q?"},
                                                                    {"from": "gpt", "value": "A."}]}
               for number, name in enumerate(["a.jpg", "./a.jpg", "../outside.jpg", "/etc/passwd"])]
    (source / "qa.json").write_text(json.dumps(records))
    made = builders.source("qa")(source / "qa.json")
    assert {entry.picture for entry in made.entries()} == {"a.jpg"} and len(made.malformed) == 2


def test_names_that_are_not_utf8_are_stored_and_stay_apart(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for number, name in enumerate((b"caf\xe9.jpg", b"caf\xe8.jpg", b"plain.jpg")):
        Image.new("RGB", (20, 20), (number, 0, 0)).save(os.fsdecode(os.fsencode(source) + b"/" + name))
    folder = store.prepare(builders.source("folder")(source, shares=(1.0, 0.0, 0.0)), tmp_path / "data",
                           say=lambda text: text.encode())
    data = stored.Stored("folder", tmp_path / "data")
    assert len({data.record(index).key for index in range(len(data))}) == 3 and folder.is_dir()


@pytest.mark.parametrize("line", [
    b"{", b"[]", b'{"key": 5}', b'{"key": "a", "score": "x"}', b'{"key": "a", "score": 99}',
    b'{"key": "a", "scoer": 3}', b'{"key": "a", "questions": [["q"]]}', b"\xff" * 9,
    b'{"key": "a", "score": NaN}', b"[" * 9_000])
def test_a_damaged_label_is_a_bad_record_and_no_other_is_touched(tmp_path, line):
    source = tmp_path / "source"
    source.mkdir()
    for name in "abc":
        Image.new("RGB", (20, 20)).save(source / f"{name}.jpg")
    folder = store.prepare(builders.source("folder")(source, shares=(1.0, 0.0, 0.0)), tmp_path / "data",
                           say=lambda text: None)
    labels_file = folder / "labels" / "train.jsonl"
    lines = labels_file.read_bytes().splitlines()
    lines[1] = line
    labels_file.write_bytes(b"".join(text + b"\n" for text in lines))
    np.save(labels_file.with_suffix(".npy"), np.cumsum([0, *(len(text) + 1 for text in lines)]))
    data = stored.Stored("folder", tmp_path / "data")
    with pytest.raises(BadRecord, match="train"):
        data.record(1)
    assert data.record(0).key == "a.jpg" and data.record(2).key == "c.jpg"


def test_a_rebuild_that_ends_anywhere_leaves_the_old_or_the_new_data(tmp_path, monkeypatch):
    source = tmp_path / "source"
    source.mkdir()
    for name in "abc":
        Image.new("RGB", (20, 20)).save(source / f"{name}.jpg")
    make = lambda **options: store.prepare(  # noqa: E731
        builders.source("folder")(source, shares=(1.0, 0.0, 0.0)), tmp_path / "data", say=lambda text: None, **options)
    make()
    Image.new("RGB", (20, 20)).save(source / "d.jpg")
    real = pathlib.Path.rename
    for stop in range(8):
        steps = iter(range(99))

        def rename(self, target, stop=stop, steps=steps):
            if next(steps) == stop:
                raise KeyboardInterrupt
            return real(self, target)

        monkeypatch.setattr(pathlib.Path, "rename", rename)
        with contextlib.suppress(KeyboardInterrupt):
            make(rebuild=True)
        monkeypatch.undo()
        try:
            found = {stored.Stored("folder", tmp_path / "data").record(index).key for index in range(3)}
            assert found in ({"a.jpg", "b.jpg", "c.jpg"}, {"a.jpg", "b.jpg", "c.jpg", "d.jpg"} & found)
        except ConfigError:
            pass  # between the two: the same command ends it
    make(rebuild=True)
    assert len(stored.Stored("folder", tmp_path / "data")) == 4
    assert sorted(path.name for path in (tmp_path / "data" / "folder").iterdir()) == ["1.0.0"]


def test_the_bytes_behind_a_picture_are_not_stored(tmp_path):
    path = picture(tmp_path / "source/a.jpg", quality=80)
    whole = path.read_bytes()
    os.truncate(path, 300 << 20)  # a sparse file: a picture and much else
    data, pixels = store.encode(path, 512)
    assert len(data) < 1 << 20 and pixels.shape == (40, 60, 3)
    path.write_bytes(whole)
    assert store.encode(path, 512)[0] == whole


@pytest.mark.parametrize("kind", ["oasis", "para"])
def test_one_file_under_two_names_is_one_picture(tmp_path, kind):
    names = ("a.jpg", "./a.jpg", "b/../a.jpg", "../../outside.jpg", "/etc/a.jpg")
    if kind == "oasis":
        table(tmp_path / "ratings.csv", [("userId", "imageName", "category", "beauty"), *(
            (str(user), name, "Scene", 3) for user, name in enumerate(names))])
        made = oasis.Oasis(tmp_path)
    else:
        table(tmp_path / "annotation/PARA-Images.csv", [
            ("sessionId", "imageName", "userId", "imageEmotion", "semantic", "aestheticScore", *para.ASPECTS.values()),
            *(("s1", name, str(user), "awe", "scene", 3, *[3] * len(para.ASPECTS)) for user, name in enumerate(names))])
        made = para.Para(tmp_path, shares=(0.8, 0.1, 0.1))
    entry, = made.entries()
    assert (entry.key, len(entry.label["ratings"])) == ("a", 3)
    assert len(made.malformed) == 2 and all("line" in text for text in made.malformed)


def test_one_picture_in_two_splits_is_refused(tmp_path):
    class Leaking(folder.Folder):
        def entries(self):
            yield labels.Entry("train", "one", "a.jpg", {})
            yield labels.Entry("test", "two", "./a.jpg", {})

    picture(tmp_path / "a.jpg")
    with pytest.raises(ConfigError, match=r"a\.jpg"):
        build(Leaking(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_in_another_encoding_names_its_pictures_and_spoils_no_text(tmp_path):
    """Names of files are bytes; words that are no UTF-8 are not guessed at."""
    source = tmp_path / "source"
    for name in (b"caf\xe9.jpg", b"caf\xe8.jpg", b"c.jpg"):
        picture(source / os.fsdecode(name), seed=1)
    (source / "mine.csv").write_bytes(b"image,score,comment\ncaf\xe9.jpg,3,good\ncaf\xe8.jpg,5,\nc.jpg,4,tr\xe8s bon\n")
    dataset = build(csv_lib.Csv(source, scale=(1, 5), shares=(1, 0, 0)), tmp_path / "out", max_bad_share=0.5)
    assert sorted(record.score for record in by_key(dataset).values()) == [3.0, 5.0] and len(by_key(dataset)) == 2
    assert "comment is not UTF-8" in dataset.said


def test_linked_folders_are_entered_and_no_file_comes_twice(tmp_path):
    for name in ("source/real/a.jpg", "elsewhere/b.jpg", "elsewhere/deep/c.jpg", "single.jpg"):
        picture(tmp_path / name)
    source = tmp_path / "source"
    for name, target in {"linked": "../elsewhere", "again": "../elsewhere/deep", "loop": ".", "up": "..",
                         "copy": "real", "d.jpg": "../single.jpg", "e.jpg": "real/a.jpg"}.items():
        (source / name).symlink_to(target)
    (tmp_path / "elsewhere/back").symlink_to("../source")
    made = folder.Folder(source)
    found = [entry.picture for entry in made.entries()]
    assert len(found) == len({(source / name).resolve() for name in found}) == 4
    assert {"real/a.jpg", "linked/b.jpg", "d.jpg"} < set(found) and sum(made.left_out.values()) >= 4


@pytest.mark.parametrize("given", ["pipe.csv", "."])
def test_a_pipe_in_the_place_of_labels_is_not_waited_for(tmp_path, given):
    os.mkfifo(tmp_path / "pipe.csv")
    with pytest.raises(ConfigError, match="csv"):
        list(csv_lib.Csv(tmp_path / given, scale=(1, 5)).entries())


class Killed(BaseException):
    """As good as kill -9: after it nothing is written or removed any more."""


class _Disk:
    """Stands between Python and a folder: from write number `stop` on, each write there raises."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.stop, self.made, self.error = str(folder), None, 0, None
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self.stop is None or event not in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate"):
            return
        if event == "open" and not (args[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            return
        path = args[0]
        if not isinstance(path, str | bytes | os.PathLike):
            return
        removes = event in ("os.remove", "os.rmdir", "os.rename")
        # shutil.rmtree removes by names relative to an open folder.
        if not (os.fsdecode(path).startswith(self.folder) or (removes and not os.path.isabs(os.fsdecode(path)))):
            return
        if self.error is OSError and removes:
            return
        self.made += 1
        if self.made > self.stop:
            raise OSError(errno.ENOSPC, "No space left on device") if self.error is OSError else Killed

    @contextlib.contextmanager
    def ends_at(self, stop: int, error: type[BaseException]):
        self.stop, self.made, self.error = stop, 0, error
        try:
            yield
        finally:
            self.stop = None


@pytest.mark.parametrize("error", [Killed, OSError], ids=["killed", "full"])
def test_a_build_that_ends_at_any_write_harms_nothing_and_goes_on(tmp_path, error):
    """First builds and rebuilds; what is read is the old data set or the new one, whole, or a sentence."""
    source = tmp_path / "source"
    for name in "abc":
        picture(source / f"{name}.jpg")
    options = {"shares": (1, 0, 0)}
    build(folder.Folder(source, **options), tmp_path / "old")
    picture(source / "d.jpg")
    build(folder.Folder(source, **options), tmp_path / "new")
    whole, disk = tree(tmp_path / "new"), _Disk(tmp_path / "out")
    for rebuild in (False, True):
        stop, ended = 0, False
        while not ended:
            out = tmp_path / "out"
            shutil.rmtree(out, ignore_errors=True)
            if rebuild:
                shutil.copytree(tmp_path / "old", out)
                (out / "folder/1.0.0.partial").mkdir()  # and the rest of an unfinished rebuild of the old data
                shutil.copy(out / "folder/1.0.0/manifest.json", out / "folder/1.0.0.partial")
            try:
                with disk.ends_at(stop, error):
                    store.prepare(folder.Folder(source, **options), out, say=lambda text: None, rebuild=rebuild,
                                  workers=1)
                ended = True
            except (Killed, ConfigError) as caught:
                assert isinstance(caught, Killed) == (error is Killed)
                assert error is Killed or ("No space left" in str(caught) and "\n" not in str(caught))
            if (out / "folder/1.0.0").exists():
                dataset = stored.Stored("folder", out)
                assert set(by_key(dataset)) in ({"a.jpg", "b.jpg", "c.jpg"}, {"a.jpg", "b.jpg", "c.jpg", "d.jpg"})
                assert all(dataset.pixels(index).size for index in range(len(dataset)))
            elif rebuild:
                assert (out / "folder/1.0.0.replaced/manifest.json").exists()
            store.prepare(folder.Folder(source, **options), out, say=lambda text: None, rebuild=rebuild, workers=1)
            assert tree(out) == whole
            stop += 1
        assert stop > 10
