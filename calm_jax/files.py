"""Write files whole or not at all, and check before the work begins that a place given on a command line can be used.

Text is UTF-8. A file name that is no UTF-8 (Python holds its bytes as surrogates) is written as the bytes it is; in
JSON, which has to be UTF-8, as escapes that a JSON reader turns back into the same name.
"""

from __future__ import annotations

import codecs
import contextlib
import errno
import fcntl
import glob
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from calm_jax.errors import ConfigError

_turns = itertools.count()
MARK = b'<meta name="generator" content="calm_jax">'  # in the head of pages that are written
SIGNATURES = (b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"II*\0", b"MM\0*", b"BM")  # beginnings of pictures; RIFF apart
PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".avif", ".jp2", ".heic", ".raw",
            ".cr2", ".cr3", ".nef", ".arw", ".dng", ".orf", ".rw2", ".raf")
FAITHFUL = "calm_faithful"  # error handler of encoders: bytes of file names as they are, other characters written out


def _faithful(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    part = error.object[error.start:error.end]
    return b"".join(bytes([ord(sign) - 0xDC00]) if 0xDC80 <= ord(sign) <= 0xDCFF else
                    sign.encode("ascii", "backslashreplace") for sign in part), error.end


codecs.register_error(FAITHFUL, _faithful)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def write(path: str | os.PathLike, content: str | bytes, *, durable: bool = False) -> None:
    """Puts a file in its place, replacing one that is there: readers see the old one or the new one, and writers at the
    same time do not meet. A link is followed, and permissions stay.

    Args:
      durable: on disk when this returns, also where the machine then loses its power.

    Raises:
      OSError: it cannot be written; the old file is as it was.
    """
    path, place = Path(path), Path(os.path.realpath(path))
    # Not made of the name, which may be as long as a name can be.
    partial = place.with_name(f".{os.getpid()}-{threading.get_ident()}-{next(_turns)}.partial")
    try:
        with open(partial, "xb") as stream:
            with contextlib.suppress(OSError):  # there is none yet, or the file system knows no permissions
                os.fchmod(stream.fileno(), stat.S_IMODE(place.stat().st_mode))
            stream.write(content.encode("utf-8", FAITHFUL) if isinstance(content, str) else content)
            if durable:
                stream.flush()
                os.fsync(stream.fileno())
        os.replace(partial, place)
    except BaseException as error:
        partial.unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename in (None, str(partial), partial):
            error.filename = str(path)  # what the user knows of
            error.filename2 = None
        raise


def as_json(value: Any) -> str:
    """JSON on one line, of what UTF-8 can hold; nan is refused."""
    return re.sub("[\ud800-\udfff]", lambda found: f"\\u{ord(found[0]):04x}",
                  json.dumps(value, ensure_ascii=False, allow_nan=False))


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """A new folder, which is called `path` at the end and removed if the block fails. Until then its name, of this
    writer alone, ends in `.partial`. What writers of the same folder left when they were killed is removed first.

    Raises:
      OSError: `path` exists, or cannot be made.
    """
    place = Path(path).absolute()
    place.parent.mkdir(parents=True, exist_ok=True)
    for left in place.parent.glob(f"{glob.escape(place.name)}.*.partial"):
        _remove_left(left)
    partial = place.with_name(f"{place.name}.{os.getpid()}-{threading.get_ident()}-{next(_turns)}.partial")
    lock = _lock(partial)
    try:
        with lock.open("wb") as held:
            with contextlib.suppress(OSError):  # some file systems have no locks
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            partial.mkdir()  # once it is held: nobody takes it for one that was left behind
            yield partial
            if os.path.lexists(place):
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(place))
            partial.rename(place)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.unlink(missing_ok=True)


def _lock(partial: Path) -> Path:
    return partial.with_name(f"{partial.name}.lock")


def _remove_left(partial: Path) -> None:
    """Removes a folder of `whole_folder` whose writer is gone."""
    with contextlib.suppress(OSError), _lock(partial).open("rb") as file:  # without a lock it is not ours
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(partial, ignore_errors=True)
        _lock(partial).unlink(missing_ok=True)


def page(path: Path) -> bool:
    """Whether a file is a page that a program of this project wrote."""
    with path.open("rb") as stream:
        return MARK in stream.read(4096)


def text(path: Path) -> bool:
    """Whether a file is text."""
    try:
        return "\0" not in path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return False


def json_with(*names: str) -> Callable[[Path], bool]:
    """Whether a file holds a JSON object with these names, by which the results of a program are known."""
    def ours(path: Path) -> bool:
        try:
            value = json.loads(path.read_bytes())
        except ValueError:
            return False
        return isinstance(value, dict) and value.keys() >= set(names)
    return ours


def output(path: str | os.PathLike, flag: str = "--out", *, ours: Callable[[Path], bool] | None = None) -> Path:
    """The place of a file that is to be written, with the folder for it made.

    Args:
      ours: whether a file that is there was written by the same program, and may be written again.

    Raises:
      ConfigError: it is a folder, a picture (the name of the result was forgotten before theirs), a file of somebody
        else, or below a file.
    """
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{flag} {path} is a folder; name a file in it")
    if path.suffix.lower() in PICTURES or _is_picture(path):
        raise ConfigError(f"{flag} {path} is a picture, which would be overwritten; name a file for the "
                          "results")
    if ours and os.path.lexists(path) and not (path.is_file() and (not path.stat().st_size or ours(path))):
        raise ConfigError(f"{flag} {path} is there already and was not written by this program; name "
                          "another file, or move it away")
    folder(path.parent, flag)
    return path


def folder(path: str | os.PathLike, flag: str = "--out") -> Path:
    """A folder to write into, made if it is not there.

    Raises:
      ConfigError: it is a file, below one, or may not be written in.
    """
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise ConfigError(f"{flag}: {path} is a file, where a folder is meant; name another") from None
    except OSError as error:
        raise ConfigError(f"{flag}: the folder {path} cannot be made: {error.strerror or error}; name "
                          "another") from None
    if not os.access(path, os.W_OK | os.X_OK):
        raise ConfigError(f"{flag}: nothing may be written in the folder {path}; name another place")
    return path


def _is_picture(path: Path) -> bool:
    try:
        with open(path, "rb", opener=lambda name, how: os.open(name, how | getattr(os, "O_NONBLOCK", 0))) as stream:
            begin = stream.read(16)
    except OSError:
        return False
    return begin.startswith(SIGNATURES) or (begin[:4] == b"RIFF" and begin[8:12] == b"WEBP")
