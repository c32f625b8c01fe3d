"""Conversations that end with a question in, answers or scores out, in batches that the device need not wait for."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import functools
import itertools
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Float, Int, UInt8

from calm_jax import config as config_lib
from calm_jax.data import images as images_lib
from calm_jax.data import pictures, scale
from calm_jax.data.samples import ImageRef, Sample
from calm_jax.errors import ConfigError
from calm_jax.features import frozen
from calm_jax.features.encoding import Encoding, Seen
from calm_jax.inference import decoding, scorer
from calm_jax.inference.decoding import GREEDY, Sampling
from calm_jax.inference.once import once
from calm_jax.inference.scorer import Score
from calm_jax.models import layers
from calm_jax.models.decoders import Before
from calm_jax.models.parameters import Geometry, Parameters, unroll
from calm_jax.text.chat import Chat
from calm_jax.text.prompts import Encoded, Layout, encode

AHEAD = 2  # batches that are prepared while the device computes
STATISTICS = 64  # pictures that wait for their statistics at the same time
SCORE_TOKENS = 12  # of a score as text: the longest, " 10.0.", with room for a model that says more
Question = tuple[Sample, int]  # a conversation and the turn that is asked
# The picture of an `ImageRef.index`. Of `Pictures` those are not read of which the visual tokens are known.
Pixels = Callable[[int], UInt8[np.ndarray, "H W 3"]]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """`Pixels` that also know what tells pictures apart."""

    read: Pixels
    content: Callable[[int], bytes | None]

    def __call__(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        return self.read(index)

    @classmethod
    def fitted(cls, pixels: Pixels, size: int, kept: int) -> Pictures:
        """The same pictures with their longest side `size`, of which `kept` are remembered. Whole and without edits
        they give the same squares."""
        def fit(index: int) -> UInt8[np.ndarray, "H W 3"]:
            found = pixels(index)
            return found if found is images_lib.NOTHING else pictures.fit(found, size)

        return cls(once(fit, kept), content_of(pixels))


def content_of(pixels: Pixels) -> Callable[[int], bytes | None]:
    """A digest of the bytes of a picture, without reading more than those; None where nobody can say."""
    return getattr(pixels, "content", lambda index: None)


# Readers that ask a head -> its name, what teaches it, and the program.
HEADS = {"head": ("score_head", "finetune:SIZE+head", scorer.regression),
         "light": ("light_head", "laptop", scorer.light)}


@dataclasses.dataclass(frozen=True)
class Memory:
    """The beginning that conversations have in common, computed once: its cache, and what of a conversation it is."""

    before: Before
    tokens: int
    images: int


class Generator:
    """A model ready to answer. Programs are compiled once per (batch, prompt length bucket, images).

    It computes where its parameters are: those of `restore.model` are spread over all devices, and so are the rows of
    a batch. The blocks of the language model become arrays of their own; a caller that drops `parameters` holds no
    weight twice.

    Args:
      model: its geometry and numerics.
      parameters: path -> array, of `Geometry.of(model)`.
      parts: visual parts its prompts may mention.
      dtype: of the computation.
      keep: visual tokens of pictures are kept on disk and found again, where that is a gain (`features.frozen`).
    """

    def __init__(self, model: config_lib.Model, parameters: Parameters, chat: Chat,
                 parts: tuple[str, ...] = config_lib.PARTS, dtype: Any = jnp.float32, *, keep: bool = False):
        transposed = layers.platform() == "cpu"
        self.chat, self.tokenizer, self.dtype = chat, chat.tokenizer, dtype
        self.parameters = unroll(parameters, transposed=transposed)
        self.layout = Layout.of(model, parts)
        self.size, self.longest = model.encoder.image_size, model.decoder.positions
        self.padding = model.encoder.padding
        self.geometry = Geometry.of(model, unrolled=True, transposed=transposed)
        places = [leaf.sharding for leaf in self.parameters.values() if isinstance(leaf.sharding, NamedSharding)]
        self.mesh = places[0].mesh if places and places[0].mesh.size > 1 else None
        self._trees = {reader: scorer.Tree.of(chat.tokenizer, said) for reader, said in scorer.SAID.items()}
        self._programs: dict[Any, Callable] = {}
        self._readers = concurrent.futures.ThreadPoolExecutor(os.cpu_count(), "pictures")
        self._model, self._width = model, model.decoder.width
        self._known = self._encoding(parts) if keep and frozen.worth_keeping(model, parts, dtype) else None
        self._pooled: Encoding | None = None

    def answers(self, questions: Iterable[Question], pixels: Pixels, *, limit: int = 48, batch: int = 16,
                sampling: Sampling = GREEDY, memory: Memory | None = None) -> Iterator[str]:
        """The answer to turn i of each (sample, i), in order; the turns before it are taken as said.

        Args:
          pixels: reads a picture; called from several threads, ahead of the device.
          limit: most tokens of an answer.
          batch: conversations at a time; the last batch is filled up with copies, which are dropped.
          memory: from `remember`, of a beginning that all these conversations have.

        Raises:
          ConfigError: a prompt and its answer do not fit the model's positions.
        """
        for arrays, wanted in self._batches(questions, pixels, limit, batch, memory):
            for ids in self.ids(arrays, limit, sampling, memory)[:wanted]:
                yield self.tokenizer.decode(ids[ids != self.chat.stop])

    def scores(self, questions: Iterable[Question], pixels: Pixels, *, reader: str = "expectation",
               batch: int = 16, memory: Memory | None = None) -> Iterator[Score]:
        """The score that answers each question, as one of `scale.READERS` finds it; else as `answers`.

        Raises:
          ConfigError: as `answers`; or the reader is `head` and the model has none.
        """
        if reader == "text":
            for text in self.answers(questions, pixels, limit=SCORE_TOKENS, batch=batch, memory=memory):
                value = scale.read_score(text)
                yield Score(float("nan") if value is None else value, text=text)
            return
        program = self._reader(reader)
        for arrays, wanted in self._batches(questions, pixels, 0, batch, memory):
            mean, spread = jax.device_get(program(self.parameters, self._put(arrays, memory)))
            yield from (Score(*pair) for pair in zip(mean[:wanted].tolist(), spread[:wanted].tolist(), strict=True))

    def _reader(self, name: str) -> Callable:
        """The program of a reader that lets the model say nothing."""
        if name not in HEADS:
            return self._program(scorer.expectation, tree=self._trees[name], vocab=self.tokenizer.vocab)
        head, recipe, function = HEADS[name]
        if not any(path.startswith(f"{head}/") for path in self.parameters):
            raise ConfigError(
                f"the reader {name} needs a {head.replace('_', ' ')}, which this model does not have; train one "
                f"({recipe}), or take another reader: "
                f"{', '.join(reader for reader in scale.READERS if reader not in HEADS)}")
        return self._program(function)

    def remember(self, sample: Sample, turns: int, pixels: Pixels) -> Memory:
        """The first turns of a conversation, with the images that they show, computed once and for all."""
        start = dataclasses.replace(sample, turns=sample.turns[:turns])
        whole = encode(start, self.chat, self.layout)
        shown = int(whole.visual.max(initial=-1)) // self.layout.size + 1
        program = self._program(decoding.remembered)
        arrays = self._arrays([whole], [sample.images[:shown]], pixels)
        return Memory(program(self.parameters, arrays), len(whole.tokens), shown)

    def ids(self, arrays: dict[str, np.ndarray], limit: int, sampling: Sampling = GREEDY, memory: Memory | None = None
            ) -> Int[np.ndarray, "B L"]:
        """Ids of the answers to prompts that `arrays` has made; the end-of-sequence id stands behind the shorter."""
        shared = {"limit": limit, "eos": self.chat.stop, "vocab": self.chat.tokenizer.vocab}
        inputs = self.parameters, self._put(arrays, memory)
        if sampling.beams > 1:
            program = self._program(decoding.search, beams=sampling.beams, **shared)
            return np.asarray(program(*inputs, np.float32(sampling.length_penalty), np.int32(sampling.shortest)))
        program = self._program(decoding.sample, drawn=sampling.temperature > 0, **shared)
        return np.asarray(program(*inputs, np.float32(sampling.temperature), np.float32(sampling.top_p),
                                  np.uint32(sampling.seed), np.int32(sampling.shortest)))

    def arrays(self, questions: Sequence[Question], pixels: Pixels, limit: int,
               memory: Memory | None = None) -> dict[str, np.ndarray]:
        """The prompts as `decoding` takes them; each with `limit` more tokens must fit the model's positions."""
        encoded = [encode(sample, self.chat, self.layout, ask=turn) for sample, turn in questions]
        longest = max(len(item.tokens) for item in encoded)
        if longest + limit > self.longest:
            raise ConfigError(f"a prompt of {longest} tokens and an answer of {limit} exceed the model's "
                              f"{self.longest} positions; mention fewer images or parts")
        images = [item.images for item in encoded]
        if memory is not None:
            encoded = [dataclasses.replace(item, tokens=item.tokens[memory.tokens:], visual=np.where(
                item.visual < 0, -1, item.visual - memory.images * self.layout.size)[memory.tokens:])
                for item in encoded]
            images = [shown[memory.images:] for shown in images]
        return self._arrays(encoded, images, pixels)

    def fits(self, sample: Sample, limit: int = SCORE_TOKENS) -> bool:
        """Whether a conversation up to its last answer, and `limit` tokens of that, fit the model's positions."""
        asked = encode(sample, self.chat, self.layout, ask=len(sample.turns) - 1)
        return len(asked.tokens) + limit <= self.longest

    def _arrays(self, encoded: Sequence[Encoded], images: Sequence[tuple[ImageRef, ...]], pixels: Pixels
                ) -> dict[str, np.ndarray]:
        width = bucket(max(len(item.tokens) for item in encoded))
        slots = max(1, max(map(len, images)))
        arrays = {"tokens": np.full((len(encoded), width), self.chat.pad, np.int32),
                  "visual": np.full((len(encoded), width), -1, np.int32),
                  "lengths": np.asarray([len(item.tokens) for item in encoded], np.int32),
                  "digests": np.zeros(len(encoded), np.uint32)}
        shown = [(row, slot, ref) for row, refs in enumerate(images) for slot, ref in enumerate(refs)]
        name, values, checksums = self._seen([ref for *_, ref in shown], pixels)
        each = (self.size, self.size, 3) if name == "images" else (self.layout.size, self._width)
        arrays[name] = np.zeros((len(encoded), slots, *each), values[0].dtype if values else np.uint8)
        for (row, slot, _), value in zip(shown, values, strict=True):
            arrays[name][row, slot] = value
        if name == "pool":
            arrays[name] = rearrange(arrays[name], "b i n d -> b (i n) d")
        for row, item in enumerate(encoded):
            arrays["tokens"][row, :len(item.tokens)] = item.tokens
            arrays["visual"][row, :len(item.visual)] = item.visual
            digest = zlib.crc32(item.visual.tobytes(), zlib.crc32(item.tokens.tobytes()))
            own = [checksum for (other, *_), checksum in zip(shown, checksums, strict=True) if other == row]
            arrays["digests"][row] = zlib.crc32(np.asarray(own, np.uint32).tobytes(), digest)
        return arrays

    def _seen(self, refs: Sequence[ImageRef], pixels: Pixels) -> tuple[str, list[np.ndarray], list[int]]:
        """What the programs get of pictures, their squares or their visual tokens, and checksums of the squares."""
        if self._known is None:
            squares = list(self._readers.map(lambda ref: images_lib.render(
                pixels(ref.index), ref, self.size, self.padding), refs))
            return "images", squares, [zlib.crc32(square.tobytes()) for square in squares]
        seen = [wait() for wait in self._asked(self._known, "tokens", refs, pixels)]
        return "pool", [one.arrays["tokens"] for one in seen], [one.checksum for one in seen]

    def statistics(self, refs: Sequence[ImageRef], pixels: Pixels) -> dict[str, Float[np.ndarray, "n N E"]]:
        """Part -> mean, standard deviation and class token, if any, of the encoder's features (N = 3 or 2); float32,
        from half precision."""
        if self._pooled is None:
            self._pooled = self._known or self._encoding(())
        seen = [wait() for some in _chunks(refs, STATISTICS)
                for wait in self._asked(self._pooled, "pooled", some, pixels)]
        return {part: np.stack([one.arrays[part].astype(np.float32) for one in seen]) for part in config_lib.PARTS}

    def _asked(self, known: Encoding, kind: str, refs: Sequence[ImageRef], pixels: Pixels) -> list[Callable[[], Seen]]:
        content = content_of(pixels)
        return list(self._readers.map(lambda ref: known.ask(
            kind, content(ref.index), ref, lambda: images_lib.Fitter(pixels(ref.index))), refs))

    def close(self) -> None:
        """Ends what works in the background."""
        self._readers.shutdown()
        for encoding in {self._known, self._pooled} - {None}:
            encoding.close()

    def _encoding(self, parts: tuple[str, ...]) -> Encoding:
        return frozen.tokens(self._model, self.geometry, self.parameters, parts, self.dtype, self.mesh)

    def _batches(self, questions, pixels, limit, size, memory) -> Iterator[tuple[dict[str, np.ndarray], int]]:
        """Arrays of `size` questions at a time and how many of them count, made in a thread, AHEAD of their use."""
        if self.mesh is not None:  # rows divide among the devices that split them
            parts = self.mesh.shape["data"] * self.mesh.shape["fsdp"]
            size = -(-size // parts) * parts
        pending: collections.deque = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            try:
                for chunk in _chunks(questions, size):
                    pending.append((pool.submit(self._filled, chunk, size, pixels, limit, memory), len(chunk)))
                    if len(pending) > AHEAD:
                        made, wanted = pending.popleft()
                        yield made.result(), wanted
                while pending:
                    made, wanted = pending.popleft()
                    yield made.result(), wanted
            finally:
                for made, _ in pending:
                    made.cancel()

    def _filled(self, chunk, size, pixels, limit, memory) -> dict[str, np.ndarray]:
        """Arrays of a batch; rows that are wanting are copies of its last, whose picture is not read again."""
        arrays = self.arrays(chunk, pixels, limit, memory)
        return {name: np.concatenate([value, np.repeat(value[-1:], size - len(chunk), 0)])
                for name, value in arrays.items()} if len(chunk) < size else arrays

    def _put(self, arrays, memory):
        if self.mesh is not None:
            arrays = jax.device_put(arrays, NamedSharding(self.mesh, PartitionSpec(("data", "fsdp"))))
        return arrays if memory is None else arrays | {"before": memory.before}

    def _program(self, function: Callable, **options) -> Callable:
        """`function` of this model with these options, compiled; the same one for the same options."""
        place = function, tuple(options.items())
        if place not in self._programs:
            self._programs[place] = jax.jit(functools.partial(
                placed, self.mesh, functools.partial(function, self.geometry, parts=self.layout.parts,
                                                     dtype=self.dtype, **options)))
        return self._programs[place]


def bucket(length: int) -> int:
    """The length to which prompts of this length are padded, so that a run compiles a few programs only: eight steps an
    octave, so that at most an eighth is padding."""
    step = max(2 ** (length.bit_length() - 4), 8)
    return -(-length // step) * step


def placed(mesh: jax.sharding.Mesh | None, function: Callable, *arguments):
    """The function where the models put their rows on the devices of the mesh."""
    if mesh is None:
        return function(*arguments)
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        return function(*arguments)


def _chunks(items: Iterable, size: int) -> Iterator[list]:
    iterator = iter(items)
    while chunk := list(itertools.islice(iterator, size)):
        yield chunk
