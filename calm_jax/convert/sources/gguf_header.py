"""Read the header of a GGUF file: its metadata, and where its tensors lie.

GGUF is the format of llama.cpp: one file with the weights, mostly quantised, the geometry and the tokenizer of a
language model. The file may be damaged or hostile: every count and length is compared with what the file still has
before anything is made of it, so that memory is bounded by the size of the header.
"""

from __future__ import annotations

import dataclasses
import mmap
import pathlib
import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

from calm_jax import json_files
from calm_jax.convert.torch_files import FileError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32  # of the values, bytes, where the metadata name no other
DIMENSIONS = 4  # of a tensor at most
# Type of a value -> its format in `struct`; 7 is a bool, 8 a string and 9 an array.
SCALARS = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<B", 10: "<Q", 11: "<q", 12: "<d"}
BOOL, STRING, ARRAY = 7, 8, 9
REMEDY = "fetch it again"


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies: its shape as torch has it, the number of its type in ggml, and its first byte."""

    shape: tuple[int, ...]
    kind: int
    start: int


@dataclasses.dataclass(frozen=True)
class Header:
    """What a GGUF file says before its values.

    Attributes:
      metadata: name -> number, text, True or False, a list of texts, or a NumPy array of numbers.
      tensors: name -> place, in the order of the file.
      size: bytes of the whole file.
    """

    path: pathlib.Path
    metadata: json_files.Table
    tensors: Mapping[str, Place]
    size: int

    def texts(self, name: str) -> list[str]:
        """A list of texts in the metadata.

        Raises:
          FileError: there is none of this name.
        """
        found = self.metadata.values.get(name)
        if not isinstance(found, list):
            raise self.metadata.refuse(f"there is no {name}, which has to be a list of texts")
        return found

    def numbers(self, name: str, count: int) -> np.ndarray | None:
        """An array of `count` numbers in the metadata, or None where there is none.

        Raises:
          FileError: it is no array, or of another length.
        """
        found = self.metadata.values.get(name)
        if found is None:
            return None
        if not isinstance(found, np.ndarray) or len(found) != count:
            raise self.metadata.refuse(f"{name} is not an array of {count:,} numbers")
        return found


def read(path: pathlib.Path) -> Header:
    """The header of a GGUF file.

    Raises:
      FileError: it is missing, no regular file, no GGUF file, of another version or byte order, or damaged.
    """
    try:
        if not path.is_file():  # nobody may ever write into a pipe
            raise FileError(f"{path} is {'no regular file' if path.exists() else 'missing'}; {REMEDY}")
        with path.open("rb") as stream:
            if stream.read(4) != MAGIC:
                raise FileError(f"{path} is no GGUF file: it does not begin with {MAGIC.decode()}; {REMEDY}")
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(path, content).header()
    except OSError as problem:
        raise FileError(f"{path} cannot be read: {problem.strerror or problem}; {REMEDY}") from None


class _Damaged(Exception):
    """What is wrong with the bytes."""


class _Reader:
    """Walks through the bytes of a header."""

    def __init__(self, path: pathlib.Path, content: mmap.mmap):
        self._path, self._content = path, content
        self._at, self._size = len(MAGIC), len(content)

    def header(self) -> Header:
        try:
            version = self._number("<I")
            if version not in VERSIONS:
                swapped = int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS
                raise FileError(f"{self._path} is a GGUF file "
                                  + ("of big-endian machines" if swapped else f"of version {version}") +
                                  "; convert it anew with today's llama.cpp, for little-endian machines")
            count, fields = self._number("<Q"), self._number("<Q")
            self._fits(fields, 13)  # bytes of the smallest: two lengths, a type and a value
            metadata: dict[str, Any] = {}
            for _ in range(fields):
                name = self._text()
                if name in metadata:
                    raise _Damaged(f"the metadata {name[:80]!r} occur twice")
                metadata[name] = self._value(self._number("<I"))
            self._fits(count, 24)
            places: dict[str, tuple[tuple[int, ...], int, int]] = {}
            for _ in range(count):
                name = self._text()
                if name in places:
                    raise _Damaged(f"the tensor {name[:80]!r} occurs twice")
                places[name] = self._place()
        except (_Damaged, struct.error) as problem:
            reason = str(problem) if isinstance(problem, _Damaged) else "it ends within its header"
            raise FileError(f"{self._path} is damaged: {reason}; {REMEDY}") from None
        table = json_files.Table(metadata, str(self._path), REMEDY, FileError)
        align = table.whole("general.alignment", ALIGNMENT, most=1 << 16)
        if align & (align - 1):
            raise table.refuse(f"general.alignment is {align}, which is no power of two")
        first = -(-self._at // align) * align
        return Header(self._path, table, {name: Place(shape, kind, first + start)
                                          for name, (shape, kind, start) in places.items()}, self._size)

    def _number(self, form: str) -> Any:
        [value] = struct.unpack_from(form, self._content, self._at)
        self._at += struct.calcsize(form)
        # A float32 is the shortest decimal number that it is nearest to: 1e-05, not 9.999999747378752e-06.
        return float(str(np.float32(value))) if form == "<f" else value

    def _fits(self, count: int, size: int) -> None:
        """Raises _Damaged unless `count` things of at least `size` bytes may follow."""
        if count * size > self._size - self._at:
            raise _Damaged(f"it promises {count:,} entries, which do not fit into it")

    def _text(self) -> str:
        length = self._number("<Q")
        self._fits(length, 1)
        value = self._content[self._at:self._at + length]
        self._at += length
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise _Damaged("a text in it is no UTF-8") from None

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return self._text()
        if kind == BOOL:
            return self._number("<B") != 0
        if kind in SCALARS:
            return self._number(SCALARS[kind])
        if kind != ARRAY:
            raise _Damaged(f"a value in it is of the unknown type {kind}")
        inner, count = self._number("<I"), self._number("<Q")
        if inner == STRING:
            self._fits(count, 8)
            return [self._text() for _ in range(count)]
        if inner not in SCALARS:
            raise _Damaged(f"a list in it is of the unknown type {inner}")
        dtype = np.dtype(bool if inner == BOOL else SCALARS[inner])
        self._fits(count, dtype.itemsize)
        found = np.frombuffer(self._content[self._at:self._at + count * dtype.itemsize], dtype)
        self._at += found.nbytes
        return found

    def _place(self) -> tuple[tuple[int, ...], int, int]:
        count = self._number("<I")
        if count > DIMENSIONS:
            raise _Damaged(f"a tensor in it has {count} dimensions")
        shape = tuple(self._number("<Q") for _ in range(count))
        return shape[::-1], self._number("<I"), self._number("<Q")
