"""Rows about pictures in, one at a time; a file that loses none of them and knows which are still to do, out."""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any, BinaryIO

from calm_jax import files
from calm_jax.errors import ConfigError

Row = dict[str, Any]  # `path` and what is known of that picture: its answers, or `error`

BEGIN = b'{"journal": '  # of every journal


class Journal:
    """A JSON-lines file: what was asked of which model, then a row a picture, written as soon as it is known.

    A command that is stopped and started again finds here what it has done already; so does one that finds new
    pictures in the same folder. A picture counts as the same while its size and its time of change are.

    Args:
      path: of the file, or None: rows are kept in memory alone.
      asked: what the rows are answers to.

    Raises:
      ConfigError: the file holds answers to something else, or is no journal.
    """

    def __init__(self, path: pathlib.Path | None, asked: Mapping[str, Any]):
        self.path, self.rows, self._file = path, dict[str, Row](), None
        asked = json.loads(json.dumps({"journal": 1, **asked}))
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            self._read(path, asked)
        self._file: BinaryIO | None = path.open("ab", buffering=0)
        if self._file.tell() == 0:
            self._write(asked)

    def _read(self, path: pathlib.Path, asked: Mapping[str, Any]) -> None:
        lines = path.read_bytes().split(b"\n")
        half = lines.pop()  # of a line that was not written to its end
        try:
            if not lines and not (half.startswith(BEGIN) or BEGIN.startswith(half)):
                raise ValueError
            # Until 2026-11 names of files that are no UTF-8 stood there as the bytes that they are.
            texts = [line.decode("utf-8", "surrogateescape") for line in lines]
            first, *rows = map(json.loads, texts) if texts else [asked]
            theirs = {name: first[name] for name in asked}
            self.rows = {row["path"]: row for row in rows}
        except (ValueError, KeyError, TypeError):
            raise ConfigError(f"{path} is no journal of this program, or it is damaged; move it away or "
                              "choose another --out") from None
        different = [f"{name}: {theirs[name]!r} there, {value!r} here" for name, value in asked.items()
                     if theirs[name] != value]
        if different:
            raise ConfigError(f"{path} holds answers to something else ({'; '.join(different)}); choose "
                              "another --out, or delete it")
        if half:  # only now: it is ours
            os.truncate(path, sum(len(line) + 1 for line in lines))

    def missing(self, paths: list[str]) -> list[str]:
        """Those of which nothing is known, or that have changed since, or that could not be read."""
        return [path for path in paths if path not in self.rows or "error" in self.rows[path]
                or self.rows[path]["stamp"] != stamp(path)]

    def add(self, row: Row) -> None:
        """Keeps a row; it is in the file when this returns."""
        if self.rows.get(row["path"]) != row:  # an error is tried again each time, and need not be told again
            self.rows[row["path"]] = row
            self._write(row)

    def _write(self, line: Mapping[str, Any]) -> None:
        """Raises OSError on a full disk; what was written before stays, and no half of a line with it."""
        if self._file is None:
            return
        text = files.as_json(line).encode() + b"\n"
        end = self._file.seek(0, os.SEEK_END)
        try:
            while text:
                text = text[self._file.write(text):]
        except OSError as error:
            with contextlib.suppress(OSError):
                self._file.truncate(end)
            error.filename = str(self.path)
            raise

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def stamp(path: str) -> list[int]:
    """Size in bytes and time of change in nanoseconds, by which a file is known again; zeros for none."""
    try:
        status = os.stat(path)
        return [status.st_size, status.st_mtime_ns]
    except OSError:
        return [0, 0]
