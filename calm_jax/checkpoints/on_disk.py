"""One checkpoint folder: verified against its marker, locked while it is read, and the marker written.

Orbax restores a flipped byte silently and accepts a folder whose commit marker is gone, hence the checksums: they are
verified before anything is read.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import hashlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

from calm_jax import files, json_files
from calm_jax.checkpoints.meta import BEST, MARKER, META, Saved, read_meta
from calm_jax.errors import CheckpointError, ConfigError


class Vanished(CheckpointError):
    """A checkpoint that was there is gone: training has pruned it, or somebody has removed it."""

    def __init__(self, path: pathlib.Path):
        super().__init__(f"the checkpoint {path} was removed or replaced while it was read (training keeps its newest "
                         "and its best one); run the same command again: it takes the one that is there now")


def folders(folder: pathlib.Path) -> list[pathlib.Path]:
    """Checkpoint folders by step, complete or not."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isascii() and path.name.isdigit())


def best_step(folder: pathlib.Path) -> int | None:
    """The step of the checkpoint in a process's folder that validated best, if one was marked."""
    try:
        return json_files.table(folder / BEST, remedy="", error=ValueError).whole("step", least=0)
    except ValueError:
        return None


def is_complete(path: pathlib.Path) -> bool:
    """Whether the marker is there; `read` verifies what it promises."""
    return (path / MARKER).is_file()


def read(path: pathlib.Path) -> Saved:
    """Verifies every file against the marker and returns the meta data; arrays are read by `restore`.

    Raises:
      CheckpointError: a file is missing, truncated or changed, or the marker is; Vanished if the folder went meanwhile.
    """
    lock = locked(path, fcntl.LOCK_SH)
    try:
        return _verified(path)
    finally:
        if lock:
            lock.close()


def _verified(path: pathlib.Path) -> Saved:
    try:
        marker = json_files.table(path / MARKER, remedy="", error=ValueError)
        listed, digest = marker.table("files").values, marker.text("digest")
        valid = META in listed and all(map(_listed, listed.items())) and digest == _digest(listed)
    except ValueError:
        if not path.exists():
            raise Vanished(path) from None
        valid = False
    if not valid:
        raise CheckpointError(f"the checkpoint {path} is incomplete or its {MARKER} is damaged; use another one")

    def problem(item):
        name, (size, checksum) = item
        file = path / name
        try:
            found = file.stat().st_size
            if not file.is_file():
                return f"{name} is no file"
            if found != size:
                return f"{name} has {found} bytes instead of {size}"
            return None if files.sha256(file) == checksum else f"{name} was changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = [text for text in pool.map(problem, listed.items()) if text]
    if problems and digest_of(path) != digest:
        raise Vanished(path)
    if problems:
        raise CheckpointError(f"the checkpoint {path} is damaged: {problems[0]}"
                              + (f" (and {len(problems) - 1} more files)" if len(problems) > 1 else "")
                              + "; use another one")
    if not (path / META).exists():
        raise Vanished(path)
    return Saved(path, read_meta(path), digest)


def inside(name: str) -> bool:
    """Whether a name is that of something below the folder where it is written."""
    return bool(name) and "\0" not in name and not name.startswith("/") and ".." not in name.split("/")


def _listed(item: tuple[str, Any]) -> bool:
    """Whether an entry of a marker is a file of the checkpoint with its size and checksum."""
    name, entry = item
    return inside(name) and isinstance(entry, list) and list(map(type, entry)) == [int, str]


def locked(path: pathlib.Path, kind: int) -> BinaryIO | bool | None:
    """A lock on a checkpoint's marker, held until it is closed: readers share it, and pruning wants it alone. False
    where there is no marker or no locking; None where somebody else holds it and `kind` does not wait."""
    if not is_complete(path):  # a pipe in its place would be waited for
        return False
    stream: BinaryIO | None = None
    try:
        stream = (path / MARKER).open("r+b" if kind & fcntl.LOCK_EX else "rb")
        fcntl.flock(stream, kind)
        return stream
    except OSError as error:
        if stream is not None:
            stream.close()
        return None if isinstance(error, BlockingIOError) else False


def hold(saved: Saved) -> BinaryIO | bool:
    """Keeps training from pruning a checkpoint until what is returned is closed or let go; False where that cannot be.

    Raises:
      Vanished: it is gone already.
    """
    lock = locked(saved.path, fcntl.LOCK_SH) or False
    if digest_of(saved.path) != saved.digest:
        if lock:
            lock.close()
        raise Vanished(saved.path)
    return lock


def digest_of(path: pathlib.Path) -> str:
    """The digest in a checkpoint's marker, without verifying anything; empty where there is none."""
    try:
        return json_files.table(path / MARKER, remedy="", error=ValueError).text("digest")
    except ValueError:
        return ""


@contextlib.contextmanager
def reading(saved: Saved) -> Iterator[None]:
    """What is read inside is read from this very checkpoint, which training does not prune meanwhile.

    Raises:
      Vanished: it was or is removed or replaced, whatever the reader met then.
    """
    lock = hold(saved)
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        if digest_of(saved.path) != saved.digest:
            raise Vanished(saved.path) from error
        if isinstance(error, ConfigError):
            raise
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:300]
        raise CheckpointError(f"the checkpoint {saved.path} cannot be read ({reason}); it is damaged, or memory does "
                              "not suffice: use another one, or another machine") from error
    finally:
        if lock:
            lock.close()
    if digest_of(saved.path) != saved.digest:
        raise Vanished(saved.path)


def write_marker(path: pathlib.Path) -> None:
    """Lists every file with its size and checksum; written last and atomically, it makes the folder a checkpoint."""
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != MARKER)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = list(pool.map(lambda name: files.sha256(path / name), names))
    listed = {name: [(path / name).stat().st_size, checksum] for name, checksum in zip(names, sums, strict=True)}
    write_json(path / MARKER, {"files": listed, "digest": _digest(listed)})


def _digest(files: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def write_json(path: pathlib.Path, value: Any) -> None:
    """Atomic: readers see the old file or the new one."""
    files.write(path, json.dumps(value, indent=1, allow_nan=False), durable=True)


def failed(path: pathlib.Path, error: BaseException) -> CheckpointError:
    text = str(error)
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in text:
        return CheckpointError(f"no space left for the checkpoint {path}; free some space and run the same command "
                               "again: it resumes from the last complete checkpoint")
    return CheckpointError(f"the checkpoint {path} could not be saved: {text.splitlines()[0] if text else error!r}")
