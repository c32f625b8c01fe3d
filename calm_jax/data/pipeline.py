"""Datasets and a process in, batches of packed rows out; a batch is a pure function of (seed, step).

Rows are planned from the texts alone, before any pixel is read: the planner knows the length of every conversation,
fills rows with several of them, and numbers the rows. Reading row r then needs nothing but r, so threads, worker
processes, several hosts and resumption all see the same rows, and the state of the pipeline is one integer.

Every dataset of a mixture is a stream of its own: epoch after epoch, each in an order of its own, every record once.
Examples are taken from the streams in the proportion of the weights, and BLOCK rows are planned at a time. Where a
block begins in the streams follows from the blocks before it; the arrays of a row carry it along, so that a resumed run
need not plan again what was read long ago (`Rows.resume`).

A batch is a dict of arrays with a leading row axis B:

  images     uint8 [B, I, H, W, 3]   pictures the row owns; unused slots are black
             or, of a frozen encoder that has seen them before, features/PART float16 [B, I, S, E]; unused slots are 0
  tokens     int32 [B, T]            word ids
  visual     int32 [B, T]            index into the row's I * N visual tokens, -1 at words
  segments   int32 [B, T]            1, 2, ... for the conversations of a row, 0 = padding
  positions  int32 [B, T]            position inside the conversation
  places     int32 [B, K]            positions whose next token is supervised
  labels     int32 [B, K, C]         candidate next tokens, the likeliest first
  weights    float32 [B, K, C]       target probability times answer weight; all zero = unused
  asked      int32 [B, I]            position where the answer with a numeric target begins, for the regression head
  targets    float32 [B, I]          those targets on the scale 1-10; 0 = none. Conversations own pictures, hence I
  grades     int32 [B, I, A]         for a light head: true grade of each attribute of a picture, -1 = not known
  bad        int32 [B]               conversations of the row that were masked, or refused while it was filled
  cursor     int64 [B, 1 + D]        number of the row's block, and examples taken before it from each of D datasets
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, Protocol

import grain
import numpy as np
from absl import flags
from jaxtyping import Int, UInt8

from calm_jax import config as config_lib
from calm_jax.data import attributes, cues, images, tasks
from calm_jax.data.samples import BadRecord, Dataset, ImageRef, Sample
from calm_jax.data.tasks.context import Context
from calm_jax.errors import ConfigError
from calm_jax.text import chat as chat_lib
from calm_jax.text.chat import Chat
from calm_jax.text.prompts import Encoded, Layout, encode

NAMED = 20  # bad records that are named in the log
OPEN_ROWS = 16  # rows the planner fills at the same time: more packs tighter and mixes neighbours further apart
BLOCK = 256  # rows planned at a time
PHRASE = 12  # ids of the name of an attribute or a grade at most, whatever the tokenizer
KEPT = 3  # blocks in memory: threads and workers read a little out of order

# Waits for what the model gets of a picture, and for the attributes that must not be asked about it.
Look = Callable[[], tuple[dict[str, np.ndarray], frozenset[str]]]


@dataclasses.dataclass(frozen=True)
class Example:
    """What a Sample is made from: everything that is random follows from (source, version, index). Without
    `Process.versions` a record's version is the epoch."""

    version: int
    index: int
    task: str
    source: int = 0


@dataclasses.dataclass(frozen=True)
class Planned:
    """A row to be read: its examples, their texts, and how many records were refused while it was filled."""

    examples: tuple[Example, ...]
    texts: tuple[tuple[Sample, Encoded], ...]
    refused: int


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """One dataset of a mixture: its records in a split, its tasks with their shares, what they may know."""

    dataset: Dataset
    indices: np.ndarray
    tasks: tuple[str, ...]
    shares: np.ndarray
    weight: float
    context: Context


def shared(indices: Int[np.ndarray, "n"], share: float, seed: int) -> Int[np.ndarray, "m"]:
    """The records that `Process.train_share` leaves; those of a smaller share are among those of every larger one."""
    if share == 1:
        return indices
    drawn = np.random.default_rng([seed, 4]).permutation(indices)
    return np.sort(drawn[:max(1, round(share * len(indices)))])


class FeatureSource(Protocol):
    """Knows what a frozen encoder sees of pictures (`features.encoding.Encoding`)."""

    def ask(self, kind: str, content: bytes | None, ref: ImageRef, fitter: Callable[[], images.Fitter]
            ) -> Callable[[], Any]:
        """Has a picture looked at; the function returned waits for `arrays`, part -> features, and `doubtful`."""


def blank(process: config_lib.Process, model: config_lib.Model, *, cached: bool, pad: int = 0
          ) -> dict[str, np.ndarray]:
    """The arrays of a row of a process that holds nothing yet, all but its cursor.

    Args:
      cached: it brings features instead of images.
      pad: the id of padding.
    """
    row, encoder, size = process.row, model.encoder, model.encoder.image_size
    head = model.light_head.grades if process.light_head else ()
    grades = {"grades": np.full((row.images, len(head)), -1, np.int32),
              "phrases": np.full((len(head), 1 + max(head), PHRASE), -1, np.int32)} if head else {}
    seen = {part: encoder.part(part) for part in process.parts} if cached else {}
    return {
        **({f"features/{part}": np.zeros((row.images, shown(process, model, part), one.width), np.float16)
            for part, one in seen.items()}
           or {"images": np.zeros((row.images, size, size, 3), np.uint8)}),
        "tokens": np.full(row.tokens, pad, np.int32),
        "visual": np.full(row.tokens, -1, np.int32),
        "segments": np.zeros(row.tokens, np.int32),
        "positions": np.zeros(row.tokens, np.int32),
        "places": np.zeros(row.answers, np.int32),
        "labels": np.zeros((row.answers, row.candidates), np.int32),
        "weights": np.zeros((row.answers, row.candidates), np.float32),
        "asked": np.zeros(row.images, np.int32),
        "targets": np.zeros(row.images, np.float32),
        **grades,
        "bad": np.zeros((), np.int32),
    }


def shown(process: config_lib.Process, model: config_lib.Model, part: str) -> int:
    """Tokens of a part's features that a batch brings: all, or, of a level, those for no place and the patches drawn.

    Raises:
      ConfigError: more are asked for than there are.
    """
    one = model.encoder.part(part)
    if process.patches > one.tokens - one.prefix:
        raise ConfigError(f"patches={process.patches}: an image has {one.tokens - one.prefix} at the {part} level")
    return one.prefix + process.patches if process.patches and part in config_lib.LEVELS else one.tokens


def check_grades(head: config_lib.LightHead) -> None:
    """Raises ConfigError for a light head that is not of the attributes that there are."""
    grades = tuple(len(attribute.grades) for attribute in attributes.ATTRIBUTES.values())
    levels = tuple(attribute.level for attribute in attributes.ATTRIBUTES.values())
    for name, given, there in (("grades", head.grades, grades), ("levels", head.levels, levels)):
        if given != there:
            raise ConfigError(f"model.light_head.{name}={given} are not the {name} of the attributes, {there}")


def phrases(chat: Chat) -> Int[np.ndarray, "A P W"]:
    """Ids of the names of the attributes and of their grades, as words within a sentence; -1 = none.

    Raises:
      ConfigError: the tokenizer needs more than PHRASE ids for one.
    """
    named = attributes.phrases()
    found = np.full((len(named), max(map(len, named)), PHRASE), -1, np.int32)
    for place, words in enumerate(named):
        for which, word in enumerate(words):
            ids = min(map(chat.tokenizer.encode, (f" {word}", word)), key=len)  # some put the space there by themselves
            if len(ids) > PHRASE:
                raise ConfigError(f"the tokenizer writes {word!r} in {len(ids)} tokens, and a light head takes at most "
                                  f"{PHRASE}; warm up without one (--config.run leaves a process out)")
            found[place, which, :len(ids)] = ids
    return found


class Rows:
    """The numbered rows of one process over one split. Thread-safe; cheap to copy into worker processes.

    Args:
      cache_mb: decoded pictures kept in memory.
      features: rows bring what it knows of pictures; None: they bring the pictures.

    Attributes:
      bad: names and reasons of the records that could not be used so far, by this copy.
    """

    def __init__(self, process: config_lib.Process, datasets: Mapping[str, Dataset], chat: Chat,
                 model: config_lib.Model, *, seed: int, split: str, cache_mb: int = 0,
                 features: FeatureSource | None = None):
        self.model, self.features = model, features
        if process.light_head:
            check_grades(model.light_head)
            self._phrases = phrases(chat)
        self.process, self.chat, self.seed, self.split = process, chat, seed, split
        self.layout = Layout.of(model, process.parts)
        self.size, self.padding = model.encoder.image_size, model.encoder.padding
        self.bad: dict[str, str] = {}
        self.sources = tuple(self._source(name, datasets[name]) for name in process.datasets)
        self._weights = np.asarray([source.weight for source in self.sources])
        self._weights /= self._weights.sum()
        self._cursors = {0: (0,) * len(self.sources)}
        self._blocks: dict[int, list[Planned]] = {}
        self._orders: dict[tuple[int, int], np.ndarray] = {}
        self._pictures = Pictures(cache_mb << 20)
        self._lock = threading.Lock()

    def _source(self, name: str, dataset: Dataset) -> Source:
        indices = dataset.indices(self.split)
        if not len(indices):
            raise ConfigError(f"the dataset {dataset.name!r} has no pictures in its {self.split} split")
        if self.split == "train":
            indices = shared(indices, self.process.train_share, self.seed)
        wanted = {task: weight for (other, task), weight in self.process.mixture.items() if other == name}
        rated: dict[str, list[int]] = {}
        if "personal" in wanted:
            for index in map(int, indices):
                with contextlib.suppress(BadRecord):  # it is counted and named when its own turn comes
                    for rater in dataset.record(index).ratings:
                        rated.setdefault(rater, []).append(index)
        shares = np.asarray(list(wanted.values()))
        context = Context(
            parts=self.process.parts, bank=cues.bank(self.process.cues, self.process.phrasings),
            phrasings=self.process.phrasings, dataset=dataset,
            indices=indices, rated={rater: np.asarray(numbers) for rater, numbers in rated.items()},
            support=self.process.support, spread=self.process.score_spread, raters=self.process.rater_spread,
            compose=self.process.compose, terse=self.process.terse)
        return Source(dataset, indices, tuple(wanted), shares / shares.sum(), float(shares.sum()), context)

    def __getstate__(self):
        state = {name: value for name, value in self.__dict__.items() if name not in ("_lock", "_blocks", "_orders")}
        return {**state, "chat": (self.chat.tokenizer.name, self.chat.template)}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self.chat, self._lock = chat_lib.load(*state["chat"]), threading.Lock()
        self._blocks, self._orders = {}, {}

    def plan(self, row: int) -> Planned:
        """Row number `row`, planning as many blocks as it takes to reach it.

        Raises:
          ConfigError: a block's worth of records was refused, and none accepted.
        """
        block, place = divmod(row, BLOCK)
        with self._lock:
            if block not in self._blocks:
                for number in range(max(known for known in self._cursors if known <= block), block + 1):
                    self._blocks[number], self._cursors[number + 1] = self._plan_block(self._cursors[number])
                for number in sorted(self._blocks)[:-KEPT]:
                    if number != block:
                        del self._blocks[number]
            return self._blocks[block][place]

    def resume(self, cursor: Sequence[int]) -> None:
        """Begins at a block that another run has reached: `cursor` is the one that its rows carry. Rows of earlier
        blocks are planned from the beginning, should they be asked for."""
        if len(cursor) == 1 + len(self.sources):
            self._cursors[int(cursor[0])] = tuple(map(int, cursor[1:]))

    def _plan_block(self, cursor: tuple[int, ...]) -> tuple[list[Planned], tuple[int, ...]]:
        """BLOCK rows from where the streams stand, each example put into the fullest open row with room for it; and
        where the streams stand behind them."""
        row = self.process.row
        capacity = np.asarray([row.tokens, row.images, row.answers])
        taken = np.asarray(cursor, np.int64)
        done: list[Planned] = []
        unfinished: list[tuple[np.ndarray, list[Example], list[tuple[Sample, Encoded]]]] = []
        refused = seen = 0
        while True:
            source = int(np.argmax(self._weights * (taken.sum() + 1) - taken))
            example = self._example(source, int(taken[source]))
            try:
                sample = self.sample(example)
                encoded = self.encode(sample)
                need = np.asarray([len(encoded.tokens), len(encoded.images), len(encoded.places)])
                if (need > capacity).any():
                    raise BadRecord(f"needs {need[0]} tokens, {need[1]} images and {need[2]} supervised positions; "
                                    f"a row has {row.tokens}, {row.images} and {row.answers}")
            except BadRecord as error:
                self._count_bad(example, error)
                taken[source] += 1
                refused, seen = refused + 1, seen + 1
                if seen == refused and seen >= sum(len(other.indices) for other in self.sources):
                    name, reason = next(iter(self.bad.items()))
                    names = ", ".join(repr(other.dataset.name) for other in self.sources)
                    raise ConfigError(f"no record of {names} ({self.split}) can be used; the first one, "
                                      f"{name}: {reason}") from None
                continue
            fitting = [i for i, (used, _, _) in enumerate(unfinished) if (used + need <= capacity).all()]
            if fitting:
                best = max(fitting, key=lambda i: unfinished[i][0][0])
                used, examples, texts = unfinished[best]
                unfinished[best] = (used + need, [*examples, example], [*texts, (sample, encoded)])
            elif len(done) + len(unfinished) == BLOCK:
                break  # this example begins the next block
            else:
                unfinished.append((need, [example], [(sample, encoded)]))
                if len(unfinished) > OPEN_ROWS:
                    _, examples, texts = unfinished.pop(0)
                    done.append(Planned(tuple(examples), tuple(texts), refused))
                    refused = 0
            taken[source] += 1
            seen += 1
        for _, examples, texts in unfinished:
            done.append(Planned(tuple(examples), tuple(texts), refused))
            refused = 0
        return done, tuple(map(int, taken))

    def _example(self, number: int, place: int) -> Example:
        """Example `place` of a source's stream."""
        source = self.sources[number]
        epoch, at = divmod(place, len(source.indices))
        version = epoch % self.process.versions if self.process.versions else epoch
        if (number, epoch) not in self._orders:
            self._orders.pop((number, epoch - 1), None)
            self._orders[number, epoch] = np.random.default_rng([self.seed, epoch, 1, number]).permutation(
                source.indices)
        index = int(self._orders[number, epoch][at])
        draw = np.random.default_rng([self.seed, version, index, 3, number]).random()
        task = source.tasks[min(int(np.searchsorted(np.cumsum(source.shares), draw, "right")), len(source.tasks) - 1)]
        return Example(version, index, task, number)

    def sample(self, example: Example) -> Sample:
        """The conversation of an example; with `shuffle_labels` about the pictures of another one."""
        sample = self._made(example, example.index, 0)
        if not self.process.shuffle_labels:
            return sample
        indices = self.sources[example.source].indices
        draws = np.random.default_rng([self.seed, example.version, example.index, 6, example.source])
        for draw in range(1, 1000):
            with contextlib.suppress(BadRecord):
                other = self._made(example, int(draws.choice(indices)), draw)
                if len(other.images) == len(sample.images):
                    return dataclasses.replace(sample, images=other.images)
        raise BadRecord(f"no other conversation of the task {example.task} has {len(sample.images)} pictures")

    def _made(self, example: Example, index: int, draw: int) -> Sample:
        source = self.sources[example.source]
        rng = np.random.default_rng([self.seed, example.version, index, 2, draw, example.source])
        return tasks.make(example.task, source.dataset, index, rng, source.context)

    def encode(self, sample: Sample) -> Encoded:
        """The sample as ids and labels, in this process's layout."""
        return encode(sample, self.chat, self.layout, candidates=self.process.row.candidates)

    def row(self, number: int) -> dict[str, np.ndarray]:
        """The arrays of one row, without the leading axis."""
        planned = self.plan(number)
        row = self.pack(planned, number)
        row["bad"] += planned.refused
        block = number // BLOCK
        row["cursor"] = np.asarray((block, *self._cursors[block]), np.int64)
        return row

    def pack(self, planned: Planned, number: int = 0) -> dict[str, np.ndarray]:
        """Reads and edits the pictures of a planned row, the number of which decides what is drawn of them, and lays
        its conversations out one after the other."""
        process = self.process
        out = blank(process, self.model, cached=self.features is not None, pad=self.chat.pad)
        token, image, place = 0, 0, 0
        if process.light_head:
            out["phrases"][:] = self._phrases
        looks, draws = self._looks(planned), np.random.default_rng([self.seed, number, 8])
        for number, (example, (sample, encoded)) in enumerate(zip(planned.examples, planned.texts, strict=True), 1):
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
                for slot, look in enumerate(looks[number - 1], image):
                    arrays, names = look()
                    for name, value in arrays.items():
                        out[name][slot] = self._drawn(name, value, out[name].shape[1], draws)
                    doubtful |= names
                # An edit that changed nothing visible would make its label false: those turns are not learned from.
                asked = np.asarray([turn.subject not in doubtful for turn in sample.turns])
                out["weights"][answers] = encoded.weights * asked[encoded.turns, None]
                if process.light_head:  # such labels are of conversations about one picture
                    for turn in sample.turns:
                        if (known := attributes.graded(turn.label)) is not None and turn.subject not in doubtful:
                            out["grades"][image, known[0]] = known[1]
                if sample.target is not None:  # of the last turn
                    begins = encoded.places[encoded.turns == len(sample.turns) - 1][0]
                    out["asked"][image], out["targets"][image] = begins + token, sample.target
            except BadRecord as error:  # the conversation keeps its place and counts for nothing: no row shifts
                self._count_bad(example, error)
                out["bad"] += 1
            token, image, place = token + length, image + len(encoded.images), place + supervised
        return out

    def _drawn(self, name: str, value: np.ndarray, count: int, draws: np.random.Generator) -> np.ndarray:
        """So many tokens of a picture's features as a batch brings: those for no place, and patches drawn."""
        if name == "images" or count == len(value):
            return value
        prefix = self.model.encoder.part(name.removeprefix("features/")).prefix
        places = prefix + draws.permutation(len(value) - prefix)[:count - prefix]
        return value[np.concatenate([np.arange(prefix), np.sort(places)])]

    def _looks(self, planned: Planned) -> list[list[Look]]:
        """Of each picture of each conversation of a row, a function that gives its arrays and what must not be asked
        about it. Each is read once, and all that must be encoded are asked for before the first is waited for."""
        fitters: dict[tuple[int, int], images.Fitter] = {}

        def fitter(source: int, index: int) -> images.Fitter:
            if (source, index) not in fitters:
                fitters[source, index] = images.Fitter(self._pictures.read(self.sources[source].dataset, index))
            return fitters[source, index]

        def rendered(source: int, ref: ImageRef) -> tuple[dict[str, np.ndarray], frozenset[str]]:
            square, doubtful = images.render_noting(fitter(source, ref.index), ref, self.size, self.padding)
            return {"images": square}, doubtful

        def looked(known: FeatureSource, source: int, ref: ImageRef) -> Look:
            dataset = self.sources[source].dataset
            content = dataset.content(ref.index) if hasattr(dataset, "content") else None
            wait = known.ask("features", content, ref, functools.partial(fitter, source, ref.index))

            def features() -> tuple[dict[str, np.ndarray], frozenset[str]]:
                seen = wait()
                return {f"features/{part}": seen.arrays[part] for part in self.process.parts}, seen.doubtful

            return features

        def look(source: int, ref: ImageRef) -> Look:
            if self.features is None:
                return functools.partial(rendered, source, ref)
            try:
                return looked(self.features, source, ref)
            except BadRecord as error:
                return functools.partial(_raised, error)

        return [[look(example.source, ref) for ref in encoded.images]
                for example, (_, encoded) in zip(planned.examples, planned.texts, strict=True)]

    def _count_bad(self, example: Example, error: BadRecord) -> None:
        dataset = self.sources[example.source].dataset
        try:
            key = f"{dataset.name}/{dataset.record(example.index).key}"
        except BadRecord:  # nobody knows what it was called
            key = f"{dataset.name}, record {example.index}"
        if key not in self.bad and len(self.bad) < NAMED:
            more = "; further ones are counted, not named" if len(self.bad) == NAMED - 1 else ""
            logging.warning("skipped %s: %s%s", key, error, more)
        self.bad[key] = str(error)


def _raised(error: BadRecord) -> NoReturn:
    raise error


class Pictures:
    """Decoded pictures, the latest used kept up to a number of bytes; thread-safe, empty in a copy."""

    def __init__(self, limit: int):
        self._limit, self._held = limit, 0
        self._kept: collections.OrderedDict[tuple[str, int], np.ndarray] = collections.OrderedDict()
        self._lock = threading.Lock()

    def __reduce__(self):
        return Pictures, (self._limit,)

    def read(self, dataset: Dataset, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """The picture of a record. Raises BadRecord when it cannot be read."""
        if not self._limit:
            return dataset.pixels(index)
        key = dataset.name, index
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        pixels = dataset.pixels(index)
        with self._lock:
            if key not in self._kept:
                self._kept[key] = pixels
                self._held += pixels.nbytes
            while self._held > self._limit:
                self._held -= self._kept.popitem(last=False)[1].nbytes
        return pixels


def batches(rows: Rows, data: config_lib.Data, *, batch: int, start: int, stop: int, own: Sequence[int] | None = None
            ) -> Iterator[dict[str, np.ndarray]]:
    """Batches `start` to `stop` of `batch` rows each, prepared ahead; of every batch the rows `own`, or all."""
    places = tuple(range(batch) if own is None else own)

    def read(number: int) -> dict[str, np.ndarray]:
        step, place = divmod(int(number), len(places))
        return rows.row((start + step) * batch + places[place])

    dataset = grain.MapDataset.range((stop - start) * len(places)).map(read).batch(len(places))
    options = grain.ReadOptions(num_threads=data.threads, prefetch_buffer_size=max(2, data.threads))
    if data.workers:
        if not flags.FLAGS.is_parsed():  # Grain's worker processes read absl flags, also outside absl programs
            flags.FLAGS.mark_as_parsed()
        stream = dataset.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2))
        stream = stream.mp_prefetch(grain.MultiprocessingOptions(num_workers=data.workers))
    else:
        stream = dataset.to_iter_dataset(options)
    return iter(stream)
