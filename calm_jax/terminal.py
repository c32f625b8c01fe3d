"""Text for people at a terminal: nothing in a file's name or a model's answer can move its cursor or pose as a line."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import Any

from calm_jax import files

# Control characters of ASCII and Latin-1, and those that turn the direction of writing.
_HIDDEN = [*range(0x20), *range(0x7F, 0xA0), *range(0x202A, 0x202F), *range(0x2066, 0x206A), 0x2028, 0x2029]
_ESCAPES = {code: chr(code).encode("unicode_escape").decode() for code in _HIDDEN}
_KEPT = {code: text for code, text in _ESCAPES.items() if chr(code) not in "\n\r\t"}  # a progress bar needs these

closed: set[str] = set()  # which of stdout and stderr nobody gave this program


def shown(text: object) -> str:
    """A name or an answer on one line, its control characters written out."""
    return str(text).translate(_ESCAPES)


class _Safe:
    """A stream to a terminal, through which no control sequence passes."""

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(text.translate(_KEPT))

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def protect() -> None:
    """Standard output and errors of this program never fail at a character, and bring no control sequence to a
    terminal."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _Safe):
            continue
        if stream is None:  # closed: the next file that is opened would get its number, and what libraries write there
            nowhere = os.open(os.devnull, os.O_WRONLY)
            stream = open(nowhere, "w", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
            closed.add(name)
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(errors=files.FAITHFUL)
        if name == "stderr" or (hasattr(stream, "isatty") and stream.isatty()):
            setattr(sys, name, _Safe(stream))
