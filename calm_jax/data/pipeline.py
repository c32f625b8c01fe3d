"""A dataset and a process in, batches of packed rows out; a batch is a pure function of (seed, step).

Rows are planned from the texts alone, before any pixel is read: the planner knows the length of every conversation,
fills rows with several of them, and numbers the rows. Reading row r then needs nothing but r, so threads, worker
processes, several hosts and resumption all see the same rows, and the state of the pipeline is one integer.

A batch is a dict of arrays with a leading row axis B:

  images     uint8 [B, I, H, W, 3]   pictures the row owns; unused slots are black
  tokens     int32 [B, T]            word ids
  visual     int32 [B, T]            index into the row's I * N visual tokens, -1 at words
  segments   int32 [B, T]            1, 2, ... for the conversations of a row, 0 = padding
  positions  int32 [B, T]            position inside the conversation
  places     int32 [B, K]            positions whose next token is supervised
  labels     int32 [B, K, C]         candidate next tokens, the likeliest first
  weights    float32 [B, K, C]       target probability times answer weight; all zero = unused
"""

from __future__ import annotations

import dataclasses
import logging
import threading
from collections.abc import Iterator

import grain
import numpy as np
from absl import flags

from calm_jax import config as config_lib
from calm_jax.data import images, tasks
from calm_jax.data.prompts import Encoded, Layout, encode
from calm_jax.data.samples import BadRecord, Dataset, Sample
from calm_jax.data.tokenizer import Tokenizer

NAMED = 20  # bad records that are named in the log
OPEN_ROWS = 16  # rows the planner fills at the same time: more packs tighter and mixes neighbours further apart


@dataclasses.dataclass(frozen=True)
class Example:
    """What a Sample is made from: everything that is random follows from (epoch, index)."""

    epoch: int
    index: int
    task: str


class Rows:
    """The numbered rows of one process over one split. Thread-safe; cheap to copy into worker processes.

    Attributes:
      bad: names and reasons of the records that could not be used so far, by this copy.
    """

    def __init__(self, process: config_lib.Process, dataset: Dataset, tokenizer: Tokenizer, model: config_lib.Model,
                 *, seed: int, split: str):
        self.process, self.dataset, self.tokenizer, self.seed, self.split = process, dataset, tokenizer, seed, split
        self.layout = Layout.of(model, process.parts)
        self.size = model.vit.image_size
        self.bad: dict[str, str] = {}
        self._indices = dataset.indices(split)
        if not len(self._indices):
            raise config_lib.ConfigError(f"the dataset {dataset.name!r} has no pictures in its {split} split")
        self._rows: list[tuple[Example, ...]] = []
        self._refused: list[int] = []  # of each row: records that were refused while it was being filled
        self._epochs = 0
        self._lock = threading.Lock()

    def __getstate__(self):
        return {**{k: v for k, v in self.__dict__.items() if k != "_lock"}, "tokenizer": str(self.tokenizer.path)}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.tokenizer, self._lock = Tokenizer(state["tokenizer"]), threading.Lock()

    def plan(self, row: int) -> tuple[Example, ...]:
        """The examples of row number `row`, planning as many epochs as it takes to reach it."""
        with self._lock:
            while row >= len(self._rows):
                before = len(self._rows)
                for examples, refused in self._plan_epoch(self._epochs):
                    self._rows.append(examples)
                    self._refused.append(refused)
                self._epochs += 1
                if len(self._rows) == before:
                    name, reason = next(iter(self.bad.items()))
                    raise config_lib.ConfigError(f"no record of {self.dataset.name!r} ({self.split}) can be used; "
                                                 f"the first one, {name}: {reason}")
            return self._rows[row]

    def _plan_epoch(self, epoch: int) -> Iterator[tuple[tuple[Example, ...], int]]:
        """Every record once, in a seeded order, each put into the fullest open row with room for it; beside each row
        the number of records that were refused since the row before."""
        row = self.process.row
        rng = np.random.default_rng([self.seed, epoch, 1])
        names, weights = zip(*self.process.tasks.items(), strict=True)
        drawn = rng.choice(len(names), size=len(self._indices), p=np.asarray(weights) / sum(weights))
        capacity = np.asarray([row.tokens, row.images, row.answers])
        unfinished: list[tuple[np.ndarray, list[Example]]] = []
        refused = 0
        for index, task in zip(rng.permutation(self._indices), drawn, strict=True):
            example = Example(epoch, int(index), names[task])
            try:
                encoded = self.encode(self.sample(example))
                need = np.asarray([len(encoded.tokens), len(encoded.images), len(encoded.places)])
                if (need > capacity).any():
                    raise BadRecord(f"needs {need[0]} tokens, {need[1]} images and {need[2]} supervised positions; "
                                    f"a row has {row.tokens}, {row.images} and {row.answers}")
            except BadRecord as error:
                self._count_bad(example, error)
                refused += 1
                continue
            fitting = [i for i, (used, _) in enumerate(unfinished) if (used + need <= capacity).all()]
            if fitting:
                best = max(fitting, key=lambda i: unfinished[i][0][0])
                used, examples = unfinished[best]
                unfinished[best] = (used + need, [*examples, example])
            else:
                unfinished.append((need, [example]))
                if len(unfinished) > OPEN_ROWS:
                    yield tuple(unfinished.pop(0)[1]), refused
                    refused = 0
        for _, examples in unfinished:
            yield tuple(examples), refused
            refused = 0

    def sample(self, example: Example) -> Sample:
        """The conversation of an example; with `shuffle_labels` its pictures are edited by an unrelated draw."""
        def make(draw):
            rng = np.random.default_rng([self.seed, example.epoch, example.index, 2, draw])
            return tasks.make(example.task, self.dataset, example.index, rng, self.process.parts)

        sample = make(0)
        if self.process.shuffle_labels:
            others = (make(draw) for draw in range(1, 1000))
            other = next(other for other in others if len(other.images) == len(sample.images))
            sample = dataclasses.replace(sample, images=other.images)
        return sample

    def encode(self, sample: Sample) -> Encoded:
        """The sample as ids and labels, in this process's layout."""
        return encode(sample, self.tokenizer, self.layout, candidates=self.process.row.candidates)

    def row(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of one row (without the leading axis), plus `bad`: how many of its records were masked,
        and how many were refused while it was filled."""
        row = self.pack(self.plan(number))
        row["bad"] += self._refused[number]
        return row

    def pack(self, examples: tuple[Example, ...]) -> dict[str, np.ndarray]:
        """Reads and edits the pictures of `examples` and lays their conversations out one after the other."""
        row, size = self.process.row, self.size
        out = {
            "images": np.zeros((row.images, size, size, 3), np.uint8),
            "tokens": np.full(row.tokens, self.tokenizer.pad, np.int32),
            "visual": np.full(row.tokens, -1, np.int32),
            "segments": np.zeros(row.tokens, np.int32),
            "positions": np.zeros(row.tokens, np.int32),
            "places": np.zeros(row.answers, np.int32),
            "labels": np.zeros((row.answers, row.candidates), np.int32),
            "weights": np.zeros((row.answers, row.candidates), np.float32),
            "bad": np.zeros((), np.int32),
        }
        token, image, place = 0, 0, 0
        for number, example in enumerate(examples, 1):
            sample = self.sample(example)
            encoded = self.encode(sample)
            length, supervised = len(encoded.tokens), len(encoded.places)
            span, answers = slice(token, token + length), slice(place, place + supervised)
            out["tokens"][span] = encoded.tokens
            out["visual"][span] = np.where(encoded.visual >= 0, encoded.visual + image * self.layout.size, -1)
            out["segments"][span] = number
            out["positions"][span] = np.arange(length)
            out["places"][answers] = encoded.places + token
            out["labels"][answers] = encoded.labels
            try:
                doubtful: set[str] = set()
                for slot, ref in enumerate(encoded.images, image):
                    out["images"][slot], names = images.render_noting(self.dataset.pixels(ref.index), ref, size)
                    doubtful |= names
                # An edit that changed nothing visible would make its label false: those turns are not learned from.
                asked = np.asarray([turn.subject not in doubtful for turn in sample.turns])
                out["weights"][answers] = encoded.weights * asked[encoded.turns, None]
            except BadRecord as error:  # the conversation keeps its place and counts for nothing: no row shifts
                self._count_bad(example, error)
                out["bad"] += 1
            token, image, place = token + length, image + len(encoded.images), place + supervised
        return out

    def _count_bad(self, example: Example, error: BadRecord) -> None:
        key = self.dataset.record(example.index).key
        if key not in self.bad and len(self.bad) < NAMED:
            more = "; further ones are counted, not named" if len(self.bad) == NAMED - 1 else ""
            logging.warning("skipped %s of %s: %s%s", key, self.dataset.name, error, more)
        self.bad[key] = str(error)


def batches(rows: Rows, data: config_lib.Data, *, batch: int, start: int, stop: int, shard: tuple[int, int] = (0, 1)
            ) -> Iterator[dict[str, np.ndarray]]:
    """Batches `start` to `stop` of `batch` rows each, prepared ahead; of every batch, shard i of n as (i, n).

    Raises:
      ConfigError: `batch` does not divide among the shards.
    """
    index, count = shard
    if batch % count:
        raise config_lib.ConfigError(f"batch={batch} rows do not divide among {count} processes; choose a multiple")
    local = batch // count

    def read(number: int) -> dict[str, np.ndarray]:
        step, place = divmod(int(number), local)
        return rows.row((start + step) * batch + index * local + place)

    dataset = grain.MapDataset.range((stop - start) * local).map(read).batch(local)
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(2, data.threads))
    if data.workers:
        if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags, also outside absl programs
            flags.FLAGS.mark_as_parsed()
        stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
    else:
        stream = dataset.to_iter_dataset(options)
    return iter(stream)
