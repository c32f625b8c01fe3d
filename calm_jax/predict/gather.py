"""Files, folders, globs and lists on standard input in; the paths of pictures, each once, out."""

from __future__ import annotations

import codecs
import glob
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from calm_jax import config as config_lib
from calm_jax.data.builders.folder import SUFFIXES


def gather(places: Sequence[str], listed: TextIO) -> list[str]:
    """Paths in the order in which they are named, a folder's (and those below it) by name.

    A file that is named is taken whatever it is called; folders and globs give what ends like a picture.

    Args:
      places: files, folders, globs, or `-` for one path a line on `listed`, or as `find -print0` lists them.

    Raises:
      ConfigError: nothing was named, there is no such place, a folder or glob holds no pictures, or the list is no
        text.
    """
    if not places:
        raise config_lib.ConfigError("name pictures: files, folders or globs, or - to read their paths from standard "
                                     "input")
    found: dict[str, None] = {}
    for place in places:
        if place == "-":
            found |= dict.fromkeys(_listed(listed))
            continue
        if os.path.isdir(place):
            inside = dict.fromkeys(_below(place))
            if not inside:
                raise config_lib.ConfigError(f"the folder {place} holds no pictures ({', '.join(SUFFIXES)})")
        elif os.path.exists(place):
            inside = {place: None}
        elif glob.has_magic(place):
            inside = {path: None for path in sorted(glob.glob(place, recursive=True)) if _like_a_picture(path)}
            if not inside:
                raise config_lib.ConfigError(f"no picture matches {place}")
        else:
            raise config_lib.ConfigError(f"there is no file, folder or glob {place}")
        found |= inside
    if not found:
        raise config_lib.ConfigError("standard input names no pictures; give one path a line")
    return list(_apart(found))


def _listed(stream: TextIO) -> list[str]:
    """The paths of a list; they may end with a zero or a line's end, in UTF-8, UTF-16 with its mark, or any bytes."""
    data = stream.buffer.read() if hasattr(stream, "buffer") else os.fsencode(stream.read())
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = data.decode("utf-16").encode("utf-8")
        except UnicodeDecodeError:
            raise config_lib.ConfigError("the list on standard input begins like UTF-16 and is damaged; give UTF-8, "
                                         "one path a line") from None
    data = data.removeprefix(codecs.BOM_UTF8)
    lines = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(line) for line in lines if line.strip()]


def _apart(paths: Iterable[str]) -> Iterator[str]:
    """Each file once, under its first name, where folders that contain each other name it often."""
    real: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    for path in paths:
        above, name = os.path.split(path)
        if above not in real:
            real[above] = os.path.realpath(above or ".")
        if (real[above], name) not in seen:
            seen.add((real[above], name))
            yield path


def _below(folder: str) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and _like_a_picture(name):
                yield os.path.join(root, name)


def _like_a_picture(path: str) -> bool:
    return pathlib.PurePath(path).suffix.lower() in SUFFIXES
