"""Text in, token ids out, and back: one kind of tokenizer a file, found by the name of its file.

A tokenizer is named by the path of its file, or of a folder with one, and the kind that reads such a file is taken; or
by the name of a kind that needs no file, such as one of another package. To add one: a class with what `Tokenizer` has,
assigned to TOKENIZER in a file here, or an entry point in the group `calm_jax.tokenizers`.
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable
from typing import Protocol

from calm_jax.errors import ConfigError
from calm_jax.registry import TOKENIZERS

LLAMAS = "tokenizer.model"
SHIPPED = pathlib.Path(__file__).parents[1] / "tokenizer_small.model"
REMEDY = ("give --config.tokenizer the path of a tokenizer.model or tokenizer.json, or leave it empty for the one that "
          "ships")


class Tokenizer(Protocol):
    """A tokenizer. Special tokens are never produced from text: ids of segments are joined instead.

    Attributes:
      FILES: names of the file that such a tokenizer lies in, the usual one first; empty for one without a file.
      name: of its file, or the name under which it is registered.
      files: what checkpoints and exports carry with them, its own file first; empty for one without.
      fingerprint: short hash of its content, kept in checkpoints so that another one is noticed.
      vocab: ids run from 0 to vocab - 1.
      bos, eos, unknown: ids of special tokens, or None where it has none.
    """

    FILES: tuple[str, ...]
    name: str
    files: tuple[pathlib.Path, ...]
    fingerprint: str
    vocab: int
    bos: int | None
    eos: int | None
    unknown: int | None

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a segment of text, without special tokens."""
        ...

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; special tokens vanish."""
        ...

    def pieces(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's spelling of each id, for people to look at."""
        ...

    def special(self, token: str) -> int | None:
        """The id of a special token by its name, such as `<|im_end|>`; None where there is none."""
        ...

    def offsets(self, text: str) -> dict[int, int]:
        """Character offset -> index in `encode(text)`, for every character that is a token of its own."""
        ...

    def character(self, character: str) -> int:
        """The id of a single character, such as a digit, where `offsets` finds it."""
        ...


def load(where: str = "", *, remedy: str = REMEDY) -> Tokenizer:
    """The tokenizer of a path or name; of nothing, the small one that ships.

    Args:
      remedy: what helps where it cannot be used.

    Raises:
      ConfigError: there is none, or its file is none.
    """
    if not where:
        where = str(SHIPPED)
    path, kinds = pathlib.Path(where), {name: TOKENIZERS.get(name) for name in TOKENIZERS.names()}
    if where in kinds and not kinds[where].FILES:
        return kinds[where]()
    if path.is_dir():
        # Where LLaMA's own model lies beside a tokenizer.json that was made of it, it is what counts.
        known = sorted((file for kind in kinds.values() for file in kind.FILES), key=lambda file: file != LLAMAS)
        path = path / next((file for file in known if (path / file).exists()), known[0])
    for kind in kinds.values():
        if any(path.suffix == pathlib.Path(file).suffix for file in kind.FILES):
            return kind(str(path), remedy=remedy)
    raise ConfigError(f"cannot read the tokenizer {where}: it is neither a file of a kind that is known "
                      f"({', '.join(file for kind in kinds.values() for file in kind.FILES)}) nor the name of one; "
                      f"{remedy}")


def inside(folder: pathlib.Path) -> bool:
    """Whether a folder holds the file of a tokenizer."""
    return any((folder / file).is_file() for name in TOKENIZERS.names() for file in TOKENIZERS.get(name).FILES)


def content(path: pathlib.Path, remedy: str) -> bytes:
    """The bytes of a tokenizer's file.

    Raises:
      ConfigError: it cannot be read, or is empty.
    """
    try:
        found = path.read_bytes() if path.is_file() else None
        reason = ("the file is empty" if found == b"" else "" if found else
                  "it is no regular file" if path.exists() else "there is no such file")
    except OSError as error:
        found, reason = None, error.strerror or str(error)
    if not found:
        raise unusable(path, reason, remedy)
    return found


def unusable(path: pathlib.Path, reason: str, remedy: str) -> ConfigError:
    """The error of a tokenizer's file that cannot be used."""
    return ConfigError(f"cannot read the tokenizer {path}: {reason}; {remedy}")
