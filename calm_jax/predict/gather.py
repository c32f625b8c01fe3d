"""Files, folders, globs and lists on standard input in; the paths of pictures, each once, out."""

from __future__ import annotations

import glob
import os
import pathlib
from collections.abc import Iterator, Sequence
from typing import TextIO

from calm_jax import config as config_lib
from calm_jax.data.builders.folder import SUFFIXES


def gather(places: Sequence[str], listed: TextIO) -> list[str]:
    """Paths in the order in which they are named, a folder's (and those below it) by name.

    A file that is named is taken whatever it is called; folders and globs give what ends like a picture.

    Args:
      places: files, folders, globs, or `-` for one path a line on `listed`.

    Raises:
      ConfigError: nothing was named, there is no such place, or a folder or glob holds no pictures.
    """
    if not places:
        raise config_lib.ConfigError("name pictures: files, folders or globs, or - to read their paths from standard "
                                     "input")
    found: dict[str, None] = {}
    for place in places:
        if place == "-":
            found |= dict.fromkeys(line for line in (line.rstrip("\r\n") for line in listed) if line)
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
    return list(found)


def _below(folder: str) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and _like_a_picture(name):
                yield os.path.join(root, name)


def _like_a_picture(path: str) -> bool:
    return pathlib.PurePath(path).suffix.lower() in SUFFIXES
