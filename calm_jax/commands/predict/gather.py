"""Files, folders, globs and lists on standard input in; the paths of pictures, each once, out."""

from __future__ import annotations

import codecs
import functools
import glob
import os
import pathlib
from collections.abc import Iterable, Iterator, Sequence
from typing import TextIO

from calm_jax.data.datasets.folder import SUFFIXES
from calm_jax.errors import ConfigError


def gather(places: Sequence[str], listed: TextIO | None, own: Sequence[str] = ()) -> list[str]:
    """Paths in the order in which they are named, a folder's (and those below it) by name.

    A file that is named is taken whatever it is called; folders and globs give what ends like a picture.

    Args:
      places: files, folders, globs, or `-` for one path a line on `listed`, or as `find -print0` lists them.
      own: folders that the program itself writes pictures into; what a folder or glob finds there is left out.

    Raises:
      ConfigError: nothing was named, there is no such place, a folder or glob holds no pictures, or the list is no
        text.
    """
    if not places:
        raise ConfigError("name pictures: files, folders or globs, or - to read their paths from standard "
                          "input")
    found: dict[str, None] = {}
    for place in places:
        if place == "-":
            found |= dict.fromkeys(_listed(listed))
            continue
        if os.path.isdir(place):
            inside = dict.fromkeys(_others(_below(place), place, own))
            if not inside:
                raise ConfigError(f"the folder {place} holds no pictures ({', '.join(SUFFIXES)})")
        elif os.path.exists(place):
            inside = {place: None}
        elif glob.has_magic(place):
            inside = {path: None for path in sorted(_others(_matching(place), os.path.dirname(place), own))
                      if _like_a_picture(path) and not os.path.isdir(path)}
            if not inside:
                raise ConfigError(f"no picture matches {place}")
        else:
            raise ConfigError(f"there is no file, folder or glob {place}")
        found |= inside
    if not found:
        raise ConfigError("standard input names no pictures; give one path a line")
    return list(_apart(found))


def _listed(stream: TextIO | None) -> list[str]:
    """The paths of a list; they may end with a zero or a line's end, in UTF-8, UTF-16 with its mark, or any bytes."""
    if stream is None:
        raise ConfigError("standard input is closed; give one path a line there, or name pictures")
    data = stream.buffer.read() if hasattr(stream, "buffer") else os.fsencode(stream.read())
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        try:
            data = data.decode("utf-16").encode("utf-8")
        except UnicodeDecodeError:
            raise ConfigError("the list on standard input begins like UTF-16 and is damaged; give UTF-8, "
                              "one path a line") from None
    if 3 * data.count(b"\0") > len(data):
        raise ConfigError("the list on standard input looks like UTF-16 without its mark, for every other "
                          "byte is a zero; give UTF-8, one path a line")
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


def _others(paths: Iterable[str], place: str, own: Sequence[str]) -> Iterator[str]:
    """The paths that do not lie in one of our own folders, unless `place`, which was named, does so itself."""
    named, real_of = os.path.realpath(place), functools.cache(os.path.realpath)
    left_out = [real for real in map(os.path.realpath, own) if not _inside(named, real)]
    for path in paths:
        if not left_out or not any(_inside(real_of(os.path.dirname(path)), real) for real in left_out):
            yield path


def _inside(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip(os.sep) + os.sep)


def _matching(pattern: str) -> Iterator[str]:
    """What matches a glob, in which `**` is a folder and all below it. As in a shell, links are not followed there:
    two that lead back would give each file a million names."""
    pieces = pattern.split(os.sep)
    if "**" not in pieces:
        yield from glob.iglob(pattern)
        return
    place = pieces.index("**")
    begin, rest = os.sep.join(pieces[:place]), pieces[place + 1:] or ["*"]
    for start in _matching(begin) if begin else [os.sep if place else os.curdir]:
        for root, folders, _ in os.walk(start):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found = _matching(os.path.join(glob.escape(root), *rest))
            yield from found if begin or place else (os.path.relpath(path) for path in found)


def _below(folder: str) -> Iterator[str]:
    for root, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and _like_a_picture(name):
                yield os.path.join(root, name)


def _like_a_picture(path: str) -> bool:
    return pathlib.PurePath(path).suffix.lower() in SUFFIXES
