"""calm_jax.data.pipeline: a batch is a pure function of (seed, step), whatever reads it."""

import dataclasses
import pickle

import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.data import builders, pipeline
from calm_jax.data.samples import BadRecord
from calm_jax.errors import ConfigError
from calm_jax.text import chat as chat_lib
from tools.bench import data as bench_data

MODEL = dataclasses.replace(config_lib.model("tiny"), encoder=dataclasses.replace(config_lib.model("tiny").encoder,
                                                                             image_size=32))
ROW = config_lib.Row(tokens=384, images=3, answers=160, candidates=2)
PROCESS = config_lib.Process(tasks={"attributes": 2.0, "comment": 1.0}, row=ROW, batch=4)
PER_STEP = ("images", "tokens", "visual", "segments", "positions", "places", "labels", "weights", "asked",
            "targets", "bad", "cursor")


@pytest.fixture(scope="module")
def demo():
    return builders.load("demo")


def make_rows(dataset, process=PROCESS, seed=0, split="train"):
    return pipeline.Rows(process, {process.dataset: dataset}, chat_lib.load(), MODEL, seed=seed, split=split)


def read(rows, start, stop, own=None, **data):
    return list(pipeline.batches(rows, config_lib.Data(**data), batch=4, start=start, stop=stop, own=own))


def same(a, b):
    return all(np.array_equal(a[name], b[name]) for name in PER_STEP)


def test_starting_later_gives_the_same_batches(demo):
    whole = read(make_rows(demo), 0, 6)
    assert [b["tokens"].shape for b in whole] == [(4, 384)] * 6
    for start in (1, 3, 5):
        assert all(same(a, b) for a, b in zip(whole[start:], read(make_rows(demo), start, 6), strict=True))
    assert not same(whole[0], whole[1])
    assert not same(whole[0], read(make_rows(demo, seed=1), 0, 1)[0])


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_change_nothing(demo, workers):
    threads, others = read(make_rows(demo), 0, 3), read(make_rows(demo), 0, 3, workers=workers)
    assert all(same(a, b) for a, b in zip(threads, others, strict=True))


@pytest.mark.parametrize("shares", [((0, 1), (2, 3)), ((0, 3), (1, 2)), ((2,), (0, 1, 3))])
def test_two_processes_share_the_rows_of_one(demo, shares):
    whole = read(make_rows(demo), 0, 3)
    for own in shares:
        for step, part in enumerate(read(make_rows(demo), 0, 3, own=own)):
            for name in PER_STEP:
                np.testing.assert_array_equal(part[name], whole[step][name][list(own)])


def examples_of(rows, count):
    """The first `count` accepted examples, in the order in which their streams give them."""
    found, number = [], 0
    while len(found) < count + 200:  # rows finish out of order: a few more settle which came first
        found += rows.plan(number).examples
        number += 1
    return found


def test_an_epoch_holds_every_record_once(demo):
    """Over two epochs none is missed, none repeated, whatever blocks they fall into."""
    rows, size = make_rows(demo), len(demo.indices("train"))
    found = examples_of(rows, 2 * size)
    for epoch in range(2):
        assert sorted(e.index for e in found if e.version == epoch) == sorted(demo.indices("train").tolist())
    orders = [[e.index for e in found if e.version == epoch] for epoch in range(2)]
    assert orders[0] != orders[1]
    share = np.mean([e.task == "comment" for e in found])
    assert 0.25 < share < 0.42  # weights 2 : 1


def test_a_mixture_keeps_its_weights_and_every_dataset_its_epochs(demo):
    class Few(Renamed):
        def indices(self, split):
            return self._dataset.indices(split)[:50]

    process = dataclasses.replace(PROCESS, tasks={"comment": 3.0, "few:score": 1.0, "few:caption": 2.0})
    rows = pipeline.Rows(process, {"demo": demo, "few": Few(demo, "few")}, chat_lib.load(), MODEL, seed=0,
                         split="train")
    found = [e for number in range(pipeline.BLOCK) for e in rows.plan(number).examples]
    assert abs(np.mean([e.source == 1 for e in found]) - 0.5) < 0.01
    few = [e for e in found if e.source == 1]
    assert 0.23 < np.mean([e.task == "score" for e in few]) < 0.43 and {e.task for e in few} == {"score", "caption"}
    whole = max(e.version for e in few)
    assert whole > 3
    for epoch in range(whole):
        assert sorted(e.index for e in few if e.version == epoch) == sorted(demo.indices("train")[:50].tolist())
    with pytest.raises(ConfigError, match=r"may show 8 pictures and one more, and a row has row.images=3"):
        dataclasses.replace(PROCESS, tasks={"few:personal": 1.0})
    with pytest.raises(ConfigError, match="is no weight"):
        dataclasses.replace(PROCESS, tasks={"comment": 0.0})


@pytest.mark.parametrize("seed", range(2))
def test_any_row_can_be_the_first(demo, seed):
    """Planned from the beginning, or from the cursor that an earlier row carried, as a resumed run does."""
    rows, rng = make_rows(demo, seed=seed), np.random.default_rng(seed)
    last = 3 * pipeline.BLOCK
    expected = {int(number): rows.row(int(number)) for number in np.sort(rng.integers(0, last, 10))}
    for number, row in expected.items():
        fresh = make_rows(demo, seed=seed)
        fresh.resume(row["cursor"])
        assert fresh._cursors.keys() <= {0, number // pipeline.BLOCK}
        again = fresh.row(number)
        assert all(np.array_equal(again[name], row[name]) for name in row)
        before = number - pipeline.BLOCK
        if before in expected:  # earlier blocks are still there
            assert all(np.array_equal(fresh.row(before)[name], expected[before][name]) for name in row)
    late = make_rows(demo, seed=seed)
    late.resume((7, 1, 2, 3))  # of another mixture: planned from the beginning
    assert late._cursors.keys() == {0}


def test_kept_pictures_are_the_same_and_bounded(demo):
    plain = make_rows(demo)
    kept = pipeline.Rows(PROCESS, {"demo": demo}, chat_lib.load(), MODEL, seed=0, split="train", cache_mb=1)
    for number in range(6):
        assert all(np.array_equal(kept.row(number)[name], value) for name, value in plain.row(number).items())
    assert kept._pictures._held <= 1 << 20


def test_rows_are_laid_out_as_documented(demo):
    rows = make_rows(demo)
    for number in range(8):
        row, examples = rows.row(number), rows.plan(number).examples
        assert row["segments"].max() == len(examples)
        used = row["segments"] > 0
        assert not used[np.argmin(used):].any() or used.all()  # padding only behind
        for segment in range(1, len(examples) + 1):
            places = np.flatnonzero(row["segments"] == segment)
            np.testing.assert_array_equal(row["positions"][places], np.arange(len(places)))
        answers = row["weights"].sum(-1) > 0
        assert (row["segments"][row["places"][answers]] == row["segments"][row["places"][answers] + 1]).all()
        np.testing.assert_array_equal(row["tokens"][row["places"][answers] + 1], row["labels"][answers, 0])
        slots = row["visual"].max() // rows.layout.size + 1
        assert slots <= ROW.images and row["images"][:slots].any((1, 2, 3)).all()
        assert not row["images"][slots:].any()


def test_packing_wastes_little(demo):
    rows = make_rows(demo)
    rows.plan(0)
    images = np.mean([row["images"].any((1, 2, 3)).mean() for row in map(rows.row, range(60))])
    assert images > 0.83  # images are what the encoder pays for


class Renamed:
    """A dataset under another name."""

    def __init__(self, dataset, name):
        self.name, self._dataset = name, dataset

    def indices(self, split):
        return self._dataset.indices(split)

    def record(self, index):
        return self._dataset.record(index)

    def pixels(self, index):
        return self._dataset.pixels(index)


class Spoiled(Renamed):
    """The demo with one record whose picture cannot be read."""

    def __init__(self, dataset, index):
        super().__init__(dataset, "spoiled")
        self._index = index

    def pixels(self, index):
        if index == self._index:
            raise BadRecord(f"picture {index} is truncated")
        return self._dataset.pixels(index)


def test_a_corrupt_picture_is_masked_counted_and_named_and_shifts_nothing(demo):
    rows = make_rows(demo)
    spoiled_index = rows.plan(1).examples[0].index
    spoiled = make_rows(Spoiled(demo, spoiled_index))
    bad = 0
    for number in range(6):
        good_row, row = rows.row(number), spoiled.row(number)
        for name in ("tokens", "visual", "segments", "positions", "places", "labels"):
            np.testing.assert_array_equal(good_row[name], row[name])
        hit = [i for i, example in enumerate(rows.plan(number).examples, 1) if example.index == spoiled_index]
        changed = np.flatnonzero((good_row["weights"] != row["weights"]).any(-1))
        assert set(good_row["segments"][good_row["places"][changed]]) <= set(hit)
        assert row["bad"] == len(hit)
        bad += int(row["bad"])
    assert bad >= 1
    assert list(spoiled.bad) == [f"spoiled/{demo.record(spoiled_index).key}"]
    assert "truncated" in next(iter(spoiled.bad.values()))


def test_a_damaged_label_is_refused_counted_and_named_and_the_others_are_read(demo):
    class Torn(Spoiled):
        def record(self, index):
            if index == self._index:
                raise BadRecord(f"record {index} is damaged")
            return self._dataset.record(index)

    index = make_rows(demo).plan(1).examples[0].index
    rows = make_rows(Torn(demo, index))
    read = [rows.row(number) for number in range(pipeline.BLOCK)]
    planned = [example.index for number in range(pipeline.BLOCK) for example in rows.plan(number).examples]
    refused, taken = sum(int(row["bad"]) for row in read), sum(rows.row(pipeline.BLOCK)["cursor"][1:])
    assert refused >= 1 and index not in planned and len(planned) + refused == taken
    assert len(rows.bad) >= 1 and all(f"record {index} is damaged" in reason for reason in rows.bad.values())


def test_a_conversation_longer_than_a_row_is_named_and_skipped(demo):
    process = dataclasses.replace(PROCESS, row=config_lib.Row(tokens=40, images=2, answers=64))
    with pytest.raises(ConfigError, match=r"no record .* can be used; .* a row has 40"):
        make_rows(demo, process).plan(0)


def test_records_refused_while_planning_count_as_bad_in_the_row_that_was_filled(demo):
    wide = make_rows(demo)
    lengths = [len(encoded.tokens) for number in range(20) for _, encoded in wide.plan(number).texts]
    row = dataclasses.replace(PROCESS.row, tokens=int(np.median(lengths)))
    rows = make_rows(demo, dataclasses.replace(PROCESS, row=row))
    kept = sum(len(rows.plan(number).examples) for number in range(pipeline.BLOCK))
    refused = sum(int(rows.row(number)["bad"]) for number in range(pipeline.BLOCK))
    assert refused > 20 and kept + refused == sum(rows.row(pipeline.BLOCK)["cursor"][1:])


@pytest.mark.parametrize("task", ["attributes", "comparisons", "measured"])
def test_shuffled_labels_keep_texts_and_change_pictures(demo, task):
    demo = Measured(demo)
    process = dataclasses.replace(PROCESS, tasks={task: 1.0})
    rows, shuffled = make_rows(demo, process), make_rows(demo, dataclasses.replace(process, shuffle_labels=True))
    others = moved = 0
    for number in range(8):
        a, b = rows.row(number), shuffled.row(number)
        np.testing.assert_array_equal(a["tokens"], b["tokens"])
        others += not np.array_equal(a["images"], b["images"])
        moved += sum(one.images[0].index != other.images[0].index for (one, _), (other, _) in zip(
            rows.plan(number).texts, shuffled.plan(number).texts, strict=True))
    assert others == 8 and moved >= 6  # an unedited picture of the same record would still fit its measurements


class Measured:
    """A dataset whose records all have tenths."""

    name = "demo"

    def __init__(self, dataset):
        self._dataset = dataset

    def record(self, index):
        return dataclasses.replace(self._dataset.record(index), deciles={name: index % 10 for name in (
            "sharpness", "brightness", "colourfulness")})

    def __getattr__(self, name):
        return getattr(self._dataset, name)


def test_a_share_of_the_records_is_the_same_in_every_epoch_and_part_of_a_larger_one(demo):
    def used(share, split="train"):
        rows = make_rows(demo, dataclasses.replace(PROCESS, train_share=share), split=split)
        return set(rows.sources[0].indices), {example.index for number in range(60)
                                              for example in rows.plan(number).examples}

    (few, seen), (more, _), (everything, _) = used(0.02), used(0.3), used(1.0)
    assert len(few) == round(0.02 * len(everything)) and seen == few < more < everything  # several epochs of the few
    assert used(0.1, "validation")[0] == used(1.0, "validation")[0]
    with pytest.raises(ConfigError, match="train_share=0"):
        used(0.0)


def test_rows_survive_pickling(demo):
    rows = make_rows(demo)
    clone = pickle.loads(pickle.dumps(rows))
    assert same(rows.row(3), clone.row(3))


def test_an_empty_split_is_refused(demo):
    class Empty:
        name = "empty"

        def indices(self, split):
            return np.zeros(0, np.int64)

    with pytest.raises(ConfigError, match="'empty' has no pictures in its train split"):
        make_rows(Empty())


@pytest.mark.slow
def test_the_benchmark_runs_both_sides(tmp_path):
    pytest.importorskip("torch", reason="torch is not here; make test has it")
    config = config_lib.Config(model=MODEL, run=("p",), processes={"p": PROCESS})
    process = dataclasses.replace(PROCESS, dataset="folder", tasks={"attributes": 1.0, "comparisons": 1.0})
    result = bench_data.measure(config, process, tmp_path / "scratch", against=True, rounds=1, seconds=0.2,
                                pictures=40)
    assert all(row["median"] > 0 for row in result["results"].values()) and not (tmp_path / "scratch").exists()
    assert set(result["results"]) == {"calm_jax", "torch"} and "calm_jax / torch: " in bench_data.show(result)
