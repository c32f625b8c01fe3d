"""Pictures from several threads in, what a frozen part of a model makes of them out: found in a store, or computed in
batches by a thread of its own and kept."""

from __future__ import annotations

import collections
import concurrent.futures
import dataclasses
import json
import threading
import zlib
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from calm_jax.data import images
from calm_jax.data.samples import ImageRef
from calm_jax.errors import ConfigError
from calm_jax.features import keys
from calm_jax.features.store import Store

WHOLE = ("pooled",)  # kinds that are kept of pictures without edits alone
# images uint8 [n, S, S, 3] -> kind -> name -> array [n, ...]
Program = Callable[[UInt8[np.ndarray, "n S S 3"]], Mapping[str, Mapping[str, Array]]]


@dataclasses.dataclass(frozen=True)
class Seen:
    """What is known of one picture.

    Attributes:
      arrays: name -> array, not to be written to.
      doubtful: attributes that must not be asked about on it, see `images.render_noting`.
      checksum: CRC-32 of the square that was encoded.
    """

    arrays: Mapping[str, np.ndarray]
    doubtful: frozenset[str]
    checksum: int

    def packed(self) -> bytes:
        """As bytes: a line of JSON, then the arrays."""
        head = {"doubtful": sorted(self.doubtful), "checksum": self.checksum,
                "arrays": [[name, value.dtype.name, value.shape] for name, value in self.arrays.items()]}
        return b"".join([json.dumps(head).encode(), b"\n", *(value.tobytes() for value in self.arrays.values())])

    @classmethod
    def unpacked(cls, data: bytes) -> Seen:
        """What `packed` gave."""
        line, _, rest = data.partition(b"\n")
        head = json.loads(line)
        arrays, begin = {}, 0
        for name, dtype, shape in head["arrays"]:
            kind, count = jnp.dtype(dtype), int(np.prod(shape))
            arrays[name] = np.frombuffer(rest, kind, count, begin).reshape(shape)
            begin += count * kind.itemsize
        return cls(arrays, frozenset(head["doubtful"]), head["checksum"])


@dataclasses.dataclass(frozen=True, eq=False)
class Asked:
    """A picture that waits to be encoded: its key, its square with what is doubtful on it, and who waits."""

    key: bytes
    square: UInt8[np.ndarray, "S S 3"]
    doubtful: frozenset[str]
    edited: bool
    waiting: concurrent.futures.Future


class Encoding:
    """A program that sees pictures, and the stores of its results. Thread-safe.

    Args:
      program: computes all kinds at once, for `rows` pictures at a time; no result depends on the other pictures.
      facts: what tells its results from those of any other program, as JSON values.
      stores: kind -> where its results are kept.
      size, padding: of the squares that it sees.
      remedy: what to do where a result cannot be held in its dtype.
    """

    def __init__(self, program: Program, facts: Mapping[str, Any], stores: Mapping[str, Store], *, rows: int,
                 size: int, padding: images.Colour, remedy: str = ""):
        self._program, self._stores, self._remedy = program, stores, remedy
        self.rows, self.size, self.padding = rows, size, padding
        self._identity = keys.of_facts({**facts, "size": size, "padding": padding, "code": keys.code()})
        self._lock = threading.Lock()
        self._waiting: dict[bytes, concurrent.futures.Future] = {}  # key -> all kinds of what is being computed
        self._asked: collections.deque[Asked] = collections.deque()
        self._pool = concurrent.futures.ThreadPoolExecutor(1, "encoding")
        self.computed = 0  # pictures

    def ask(self, kind: str, content: bytes | None, ref: ImageRef, fitter: Callable[[], images.Fitter]
            ) -> Callable[[], Seen]:
        """Looks for what is known of a picture, and has it computed where nothing is.

        Args:
          content: a digest of the picture's bytes, so that what is known need not be decoded; None: not known.
          ref: its window and edits.
          fitter: reads it.

        Returns:
          A function that waits for the result.

        Raises:
          BadRecord: the picture cannot be read; ConfigError by the function returned: results are not finite.
        """
        if content is not None:
            key = keys.of_picture(self._identity, content, ref)
            if (known := self._find(kind, key)) is not None:
                return known
        fitted = fitter()
        square, doubtful = images.render_noting(fitted, ref, self.size, self.padding)
        if content is None or fitted.pixels is images.NOTHING:
            key = keys.of_picture(self._identity, keys.of_square(square), ImageRef(0))
            if (known := self._find(kind, key)) is not None:  # what is doubtful depends on more than the square
                return lambda: dataclasses.replace(known(), doubtful=doubtful)
        waiting: concurrent.futures.Future = concurrent.futures.Future()
        with self._lock:
            self._waiting[key] = waiting
            self._asked.append(Asked(key, square, doubtful, bool(ref.edits), waiting))
        self._pool.submit(self._work)
        return lambda: waiting.result()[kind]

    def _find(self, kind: str, key: bytes) -> Callable[[], Seen] | None:
        """What is kept under a key, or being computed; a function that waits for it."""
        with self._lock:
            waiting = self._waiting.get(key)
        if waiting is not None:
            return lambda: waiting.result()[kind]
        if (known := self._stores[kind].get(key)) is None:
            return None
        seen = Seen.unpacked(known)
        return lambda: seen

    def close(self) -> None:
        """Stops; whoever waits still is told."""
        self._pool.shutdown(cancel_futures=True)
        with self._lock:
            for one in self._asked:
                one.waiting.cancel()
        for store in self._stores.values():
            store.close()

    def _work(self) -> None:
        """Computes what was asked for first, as much as goes at a time, tells those who wait, and keeps it."""
        with self._lock:
            asked = [self._asked.popleft() for _ in range(min(self.rows, len(self._asked)))]
        if not asked:  # done together with what was asked for before
            return
        try:
            squares = np.stack([one.square for one in asked])
            found = jax.device_get(self._program(
                np.concatenate([squares, np.repeat(squares[-1:], self.rows - len(asked), 0)])))
            self.computed += len(asked)
            kept: dict[str, dict[bytes, bytes]] = {kind: {} for kind in found}
            for row, one in enumerate(asked):
                seen = {kind: Seen({name: np.array(value[row]) for name, value in arrays.items()}, one.doubtful,
                                   zlib.crc32(one.square.tobytes())) for kind, arrays in found.items()}
                if (wrong := _infinite(seen.values())) is not None:
                    one.waiting.set_exception(ConfigError(
                        f"{wrong} of a picture cannot be kept: some are not finite; {self._remedy}"))
                    continue
                one.waiting.set_result(seen)
                for kind, arrays in seen.items():
                    if not (one.edited and kind in WHOLE):
                        kept[kind][one.key] = arrays.packed()
            for kind, entries in kept.items():
                self._stores[kind].put(entries)
        except BaseException as error:  # whoever waits must not wait for ever
            for one in asked:
                if not one.waiting.done():
                    one.waiting.set_exception(error)
        finally:
            with self._lock:
                for one in asked:
                    self._waiting.pop(one.key, None)


def _infinite(several: Iterable[Seen]) -> str | None:
    """The name of an array with numbers that are not finite."""
    return next((name for seen in several for name, value in seen.arrays.items()
                 if not np.isfinite(value.astype(np.float32)).all()), None)
