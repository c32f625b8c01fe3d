"""A training state in, verified folders on disk out, and back: Orbax arrays under a completion marker of our own.

A checkpoint is a folder `NAME/00000120/` that holds

  arrays/         Orbax (OCDBT): {"parameters": what was ever trained, "optimizer": state of this process}
  meta.json       step, process, metrics, config, code version, tokenizer, fingerprints of the data, the base it began
                  from, and for every parameter that is not held here where its value is (`training.restore`)
  COMPLETE.json   size and SHA-256 of every file above, written last; a folder without it does not exist for readers
  needed_by/      notes of checkpoints elsewhere that read weights of this one, which pruning therefore keeps

Another checkpoint is always named by a `Pin`: its folder, its step and the digest of its marker, which changes with any
of its bytes. One that was moved is found again through the environment variable CALM_BASE.

Orbax restores a flipped byte silently and accepts a folder whose commit marker is gone, hence the checksums: they
are verified before anything is read, and the newest folder that verifies is the one that counts.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import hashlib
import itertools
import json
import logging
import math
import os
import pathlib
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, BinaryIO

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.experimental import multihost_utils

import calm_jax
from calm_jax import config as config_lib
from calm_jax import files, json_files
from calm_jax.models.parameters import Parameters

MARKER, META, ARRAYS, BEST, NEEDED = "COMPLETE.json", "meta.json", "arrays", "best.json", "needed_by"
BASE = "CALM_BASE"  # environment: where moved checkpoints are: workdirs, folders of them or below, os.pathsep between
TRIES = 5  # how often a reader looks again for a checkpoint when training has pruned the one it had found
LARGE = 1 << 22  # leaves from this many bytes on are cut into chunks
TICK = 16  # steps after which several processes compare their clocks
VERIFYING = 4 * 3600  # seconds that processes wait for the first one to verify a checkpoint, which reads all of it
_turns = itertools.count()  # names of barriers: every process asks for its checkpoints in the same order


def _ours(record: logging.LogRecord) -> bool:
    """Orbax also logs what it raises, a traceback a thread, and warns of metadata that nothing here reads."""
    orbax = f"{os.sep}orbax{os.sep}checkpoint{os.sep}" in record.pathname
    return not orbax or (record.levelno < logging.ERROR and not record.pathname.endswith("array_metadata_store.py"))


logging.getLogger("absl").addFilter(_ours)
# So does asyncio, of what Orbax starts and does not wait for once one of it has failed.
logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or must not be read; the message names the folder and the remedy."""


class Vanished(CheckpointError):
    """A checkpoint that was there is gone: training has pruned it, or somebody has removed it."""

    def __init__(self, path: pathlib.Path):
        super().__init__(f"the checkpoint {path} was removed or replaced while it was read (training keeps its newest "
                         "and its best one); run the same command again: it takes the one that is there now")


@dataclasses.dataclass(frozen=True)
class Pin:
    """The name of one checkpoint for ever: the folder where it was, its step, and the digest of its marker, which
    stands for all of its bytes. Its fields are JSON values."""

    path: str
    step: int
    digest: str

    def __str__(self) -> str:
        return f"{self.path} (step {self.step}, digest {self.digest[:12]})"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint whose checksums hold. `digest` is that of its marker."""

    path: pathlib.Path
    meta: dict[str, Any]
    digest: str

    @property
    def step(self) -> int:
        return self.meta["step"]

    @property
    def config(self) -> config_lib.Config:
        return config_of(self.path, self.meta)

    @property
    def pin(self) -> Pin:
        return Pin(str(self.path.resolve()), self.step, self.digest)

    @property
    def identity(self) -> dict[str, Any]:
        """What tells it from any other, with whatever other weights it reads: JSON values."""
        known = {"checkpoint": str(self.path.resolve()), "step": self.step, "digest": self.digest}
        if not unpinned(self.meta):  # the digest covers the pins of the checkpoints below
            return known
        with contextlib.suppress(CheckpointError):  # needed or not: who reads weights there will say so
            known["base"] = sole(self).identity
        return known


class Checkpoints:
    """The checkpoints of one training process in one folder: saved in the background, pruned by policy."""

    def __init__(self, folder: str | os.PathLike, policy: config_lib.Checkpoint):
        self.folder, self.policy = pathlib.Path(folder).absolute(), policy
        self._orbax = ocp.AsyncCheckpointer(ocp.PyTreeCheckpointHandler())
        self._finisher: threading.Thread | None = None
        self._error: BaseException | None = None
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether the policy asks for a checkpoint now, by steps or by minutes since the last one."""
        policy = self.policy
        by_step = policy.every_steps and step % policy.every_steps == 0
        by_time = policy.every_minutes and time.monotonic() - self._saved_at > 60 * policy.every_minutes
        if policy.every_minutes and jax.process_count() > 1:  # their clocks differ: that of the first one counts
            by_time = step % TICK == 0 and bool(multihost_utils.broadcast_one_to_all(np.bool_(by_time)))
        return bool(by_step or by_time)

    def save(self, step: int, arrays: Mapping[str, Any], meta: Mapping[str, Any], *, best: bool = False) -> None:
        """Starts saving; returns as soon as the arrays may be overwritten. Waits for the save before it.

        Args:
          arrays: {"parameters": path -> array, "optimizer": pytree}.
          meta: JSON values; step and code version are added.
          best: this one is the best so far by validation, and is kept until a better one is complete.

        Raises:
          CheckpointError: this save or the one before it failed, for example on a full disk.
        """
        self.wait()
        path = self.folder / f"{step:08d}"
        if _of_the_first(lambda: self._known(path)):
            self._finish(path, None, best, step)
            return
        tree = {"parameters": nest(arrays["parameters"]), "optimizer": _named(arrays["optimizer"])}
        try:
            self._orbax.save(path / ARRAYS, args=ocp.args.PyTreeSave(tree, save_args=jax.tree.map(chunks, tree)))
        except Exception as error:
            raise failed(path, error) from error
        meta = {**meta, "step": step, "is_best": best, "version": calm_jax.__version__, "commit": _commit()}
        self._saved_at = time.monotonic()
        self._finisher = threading.Thread(target=self._finish, args=(path, meta, best, step), daemon=True)
        self._finisher.start()

    def _known(self, path: pathlib.Path) -> bool:
        """Whether this checkpoint is there already; what a crash left of it is removed, and its folder made."""
        if is_complete(path):
            return True
        try:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        except OSError as error:
            raise failed(path, error) from error
        return False

    def _finish(self, path: pathlib.Path, meta: Mapping[str, Any] | None, best: bool, step: int) -> None:
        """Waits for Orbax, writes meta data and marker, then prunes: never before the new one is complete."""
        try:
            if meta is not None:
                self._orbax.wait_until_finished()
                if jax.process_index() == 0:
                    write_json(path / META, meta)
                    write_marker(path)
            if jax.process_index() == 0:
                if best:
                    write_json(self.folder / BEST, {"step": step})
                self._prune()
        except BaseException as error:
            self._error = failed(path, error)

    def wait(self) -> None:
        """Returns when nothing is being saved. Raises CheckpointError when the last save failed."""
        if self._finisher is not None:
            self._finisher.join()
            self._finisher = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def close(self) -> None:
        """Waits and releases Orbax's threads."""
        try:
            self.wait()
        finally:
            self._orbax.close()

    def _prune(self) -> None:
        """What a reader is at work in stays, and what cannot be removed now: until the next time."""
        steps = [int(path.name) for path in folders(self.folder) if is_complete(path)]
        for path in folders(self.folder):
            if not is_complete(path):  # left by a crash while it was being pruned
                shutil.rmtree(path, ignore_errors=True)
        keep = set(sorted(steps)[-max(self.policy.keep, 1):]) | {best_step(self.folder)}
        if self.policy.keep_every_steps:
            keep |= {step for step in steps if step % self.policy.keep_every_steps == 0}
        for step in set(steps) - keep:
            path = self.folder / f"{step:08d}"
            lock = _locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is not None and not needed(path):
                (path / MARKER).unlink(missing_ok=True)  # first: a crash in between leaves nothing that looks complete
                shutil.rmtree(path, ignore_errors=True)
            if lock:
                lock.close()

    def latest(self) -> Saved | None:
        """The newest checkpoint that verifies. Damaged ones are set aside with a warning, unfinished ones removed.

        All processes must call it; the first one alone looks, verifies and tidies up, as in `find`.

        Raises:
          CheckpointError: there are complete checkpoints, but every one of them is damaged.
        """
        return _by_the_first(self._latest)

    def _latest(self) -> Saved | None:
        for path in reversed(folders(self.folder)):
            if not is_complete(path):
                shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                saved = read(path)
                if saved.meta["is_best"] and best_step(self.folder) != saved.step:  # it died before it could say so
                    write_json(self.folder / BEST, {"step": saved.step})
                return saved
            except Vanished:
                continue
            except CheckpointError as error:
                logging.warning("%s; trying the one before it", error)
                aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
                path.rename(aside)
        if any(self.folder.glob("*.damaged-*")):  # also those of an earlier try: never start anew without being told
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged; they were set aside as "
                                  "*.damaged-*: restore them from a backup, or delete them to start this process anew")
        return None


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


def find(path: str | os.PathLike) -> Saved:
    """A verified checkpoint from a checkpoint folder, a process's folder, or a workdir (its last process; best first).

    Of several processes all must call it. Verifying reads every byte, so the first process alone does it and tells the
    others, who then read no more than their share of the arrays; an error is raised in all of them.

    Raises:
      CheckpointError: there is none, or it is damaged.
      ConfigError: the path is the address of a bucket.
    """
    config_lib.check_local("checkpoint", path)
    saved = _by_the_first(lambda: _find(pathlib.Path(path).absolute()))
    assert saved is not None
    return saved


def _find(path: pathlib.Path) -> Saved:
    for _ in range(TRIES):
        chosen = _choose(path)
        try:
            return read(chosen)
        except CheckpointError as error:
            gone = isinstance(error, Vanished) or not is_complete(chosen)
            if chosen == path or not gone:
                raise
    raise Vanished(chosen)


def _choose(path: pathlib.Path) -> pathlib.Path:
    """The checkpoint that a folder stands for, not yet verified."""
    for place in reversed(_places(path)):
        if found := _best(place):
            return found
    raise CheckpointError(f"there is no complete checkpoint in {path}; give a workdir of calm_jax.train, or a folder "
                          f"that holds {MARKER}")


def _places(path: pathlib.Path) -> list[pathlib.Path]:
    """The folders of a workdir's processes in the order in which they run; of another folder, itself."""
    if not is_workdir(path):
        return [path]
    try:
        names = json_files.table(path / "config.json", remedy="", error=ValueError).names("run")
        if not all(_inside(name) and "/" not in name for name in names):
            raise ValueError
        return [path / "checkpoints" / name for name in names]
    except ValueError:
        raise CheckpointError(f"{path}/config.json is damaged; the folder is no usable workdir") from None


def _best(place: pathlib.Path) -> pathlib.Path | None:
    """A checkpoint itself; of a process's folder its best one, or the newest where none is marked."""
    if (place / ARRAYS).is_dir() or (place / MARKER).exists():
        return place
    complete = [path for path in folders(place) if is_complete(path)]
    chosen = [path for path in complete if int(path.name) == best_step(place)]
    return (chosen or complete or [None])[-1]


def is_workdir(path: pathlib.Path) -> bool:
    """Whether a folder is the workdir of a training, and no checkpoint."""
    return (path / "config.json").is_file() and not (path / MARKER).exists()


def offered(path: str | os.PathLike) -> dict[str, tuple[pathlib.Path, dict[str, Any]]]:
    """Process -> its folder and its meta data, not verified, of all that have a checkpoint in a workdir, in the order
    in which they run; of the folder of a process or a checkpoint, of that alone. A conversion has the name "".

    Of several processes all must call it, as `find`.

    Raises:
      CheckpointError: there is none.
    """
    def look():
        found = {}
        for place in _places(pathlib.Path(path).absolute()):
            for _ in range(TRIES):  # training may go on, and prune what was just there
                if (best := _best(place)) is None:
                    break
                try:
                    meta = json_files.table(best / META, remedy="use another checkpoint", error=CheckpointError,
                                            nan=True)
                    meta.table("config")
                    found[meta.text("process")] = [str(place), dict(meta.values)]
                    break
                except CheckpointError:
                    if (best / META).exists():
                        read(best)  # says what is wrong
                        raise
        return found

    found = _of_the_first(look)
    if not found:
        raise Vanished(_find(pathlib.Path(path).absolute()).path)  # unless that says what is wrong
    return {name: (pathlib.Path(place), meta) for name, (place, meta) in found.items()}


def _by_the_first(work: Callable[[], Saved | None]) -> Saved | None:
    """The checkpoint that `work()` finds, which only the first process does, in every process."""
    def found():
        saved = work()
        return None if saved is None else {"path": str(saved.path), "meta": saved.meta, "digest": saved.digest}

    outcome = _of_the_first(found)
    return None if outcome is None else Saved(pathlib.Path(outcome["path"]), outcome["meta"], outcome["digest"])


def _of_the_first(work: Callable[[], Any]) -> Any:
    """The outcome of `work()`, JSON values, which only the first process does, in every process; or its error."""
    if jax.process_count() == 1:
        return work()
    outcome: dict[str, Any] = {}
    if jax.process_index() == 0:
        try:
            outcome = {"found": work()}
        except Exception as error:  # whatever it is, the others must not wait for ever
            outcome = {"error": str(error) if isinstance(error, CheckpointError) else repr(error)}
    # A barrier first: it waits as long as it is told to, where a broadcast counts on all processes being there.
    ocp.multihost.get_barrier_sync_fn()(key=f"calm_checkpoint_{next(_turns)}", timeout_ms=1000 * VERIFYING)
    text = json.dumps(outcome).encode()
    size = int(multihost_utils.broadcast_one_to_all(np.int32(len(text))))
    same = np.frombuffer(text.ljust(size)[:size], np.uint8)  # what the others put in does not matter, but its size
    outcome = json.loads(multihost_utils.broadcast_one_to_all(same).tobytes())
    if "error" in outcome:
        raise CheckpointError(outcome["error"])
    return outcome["found"]


def read(path: pathlib.Path) -> Saved:
    """Verifies every file against the marker and returns the meta data; arrays are read by `restore`.

    Raises:
      CheckpointError: a file is missing, truncated or changed, or the marker is; Vanished if the folder went meanwhile.
    """
    lock = _locked(path, fcntl.LOCK_SH)
    try:
        return _verified(path)
    finally:
        if lock:
            lock.close()


def _verified(path: pathlib.Path) -> Saved:
    try:
        marker = json_files.table(path / MARKER, remedy="", error=ValueError)
        files, digest = marker.table("files").values, marker.text("digest")
        valid = META in files and all(map(_listed, files.items())) and digest == _digest(files)
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
            return None if _checksum(file) == checksum else f"{name} was changed"
        except FileNotFoundError:
            return f"{name} is missing"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror or error})"

    with concurrent.futures.ThreadPoolExecutor() as pool:
        problems = [text for text in pool.map(problem, files.items()) if text]
    if problems and digest_of(path) != digest:
        raise Vanished(path)
    if problems:
        raise CheckpointError(f"the checkpoint {path} is damaged: {problems[0]}"
                              + (f" (and {len(problems) - 1} more files)" if len(problems) > 1 else "")
                              + "; use another one")
    if not (path / META).exists():
        raise Vanished(path)
    return Saved(path, _meta(path), digest)


def config_of(path: pathlib.Path, meta: Mapping[str, Any]) -> config_lib.Config:
    """The config with which the checkpoint in a folder was trained, from its meta data.

    Raises:
      CheckpointError: it is none of today's.
    """
    try:
        return config_lib.from_config_dict(meta["config"])
    except config_lib.ConfigError as error:
        raise CheckpointError(f"{path / META}: {error}; use another checkpoint, or the version of this program that "
                              "wrote it") from None


def _inside(name: str) -> bool:
    """Whether a name is that of something below the folder where it is written."""
    return bool(name) and "\0" not in name and not name.startswith("/") and ".." not in name.split("/")


def _listed(item: tuple[str, Any]) -> bool:
    """Whether an entry of a marker is a file of the checkpoint with its size and checksum."""
    name, entry = item
    return _inside(name) and isinstance(entry, list) and list(map(type, entry)) == [int, str]


def _meta(path: pathlib.Path) -> dict[str, Any]:
    """The meta data of a checkpoint, with everything in it that readers rely on.

    Raises:
      CheckpointError: names what is not as it should be.
    """
    found = json_files.table(path / META, remedy="use another checkpoint", error=CheckpointError, nan=True)
    found.whole("step", least=0), found.whole("seed", least=0), found.table("config")
    found.text("process"), found.text("tokenizer"), found.names("trained")
    pins = [found.table("base")] if isinstance(found.values.get("base"), dict) else []
    if not pins:
        found.text("base")
    if "borrowed" in found:
        borrowed = found.table("borrowed")
        borrowed.table("parameters")
        listed = borrowed.values.get("checkpoints")
        if not isinstance(listed, list) or not all(isinstance(pin, dict) for pin in listed):
            raise borrowed.refuse("checkpoints is no list of tables")
        pins += [dataclasses.replace(found, values=pin, name=f"{borrowed.name}: checkpoints") for pin in listed]
    for pin in pins:
        pin.text("path"), pin.whole("step", least=0), pin.text("digest")
        if len(pin.values) != 3:
            raise pin.refuse("a checkpoint is named by path, step and digest alone")
    if "sources" in found:
        sources = found.table("sources")
        qformers = sources.values.get("qformer")
        if not isinstance(qformers, list) or not all(isinstance(source, dict) for source in qformers):
            raise sources.refuse("qformer is no list of tables")
        for source in (sources.table("vit"), sources.table("llm"), *(dataclasses.replace(
                sources, values=source, name=f"{sources.name}: qformer") for source in qformers)):
            source.text("name"), source.text("licence")
    return dict(found.values)


def _locked(path: pathlib.Path, kind: int) -> BinaryIO | bool | None:
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
    lock = _locked(saved.path, fcntl.LOCK_SH) or False
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
        if isinstance(error, config_lib.ConfigError):
            raise
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:300]
        raise CheckpointError(f"the checkpoint {saved.path} cannot be read ({reason}); it is damaged, or memory does "
                              "not suffice: use another one, or another machine") from error
    finally:
        if lock:
            lock.close()
    if digest_of(saved.path) != saved.digest:
        raise Vanished(saved.path)


# ---- checkpoints that others read weights of ----------------------------------------------------------------------


def pinned(pin: Pin, reader: str) -> Saved:
    """The very checkpoint of a pin, verified, from where it was or from a folder that CALM_BASE names.

    Of several processes all must call it, as `find`.

    Args:
      reader: who needs it, for the message.

    Raises:
      CheckpointError: it is gone, or another one lies in its place, or it is damaged.
    """
    def look():
        if (found := located(pin)) is not None:
            return read(found)
        other = digest_of(pathlib.Path(pin.path))
        what = (f"there lies another one now (digest {other[:12]}), made by a later training" if other else
                "it is no longer there")
        given = os.environ.get(BASE)
        raise CheckpointError(f"{reader} needs weights of the checkpoint {pin}, but {what}; bring it back, or name the "
                              f"workdir or folder to which it was moved in the environment variable {BASE}"
                              + (f" (it is not in {BASE}={given})" if given else ""))

    saved = _by_the_first(look)
    assert saved is not None
    return saved


def located(pin: Pin) -> pathlib.Path | None:
    """Where the checkpoint of a pin lies now: the folder whose marker has its digest, if there is one."""
    was = pathlib.Path(pin.path)
    if digest_of(was) == pin.digest:
        return was
    for folder in (pathlib.Path(name).absolute() for name in os.environ.get(BASE, "").split(os.pathsep) if name):
        for pattern in (".", f"{pin.step:08d}", f"checkpoints/*/{pin.step:08d}", f"*/checkpoints/*/{pin.step:08d}"):
            for place in sorted(folder.glob(pattern)) if pattern != "." else [folder]:
                if digest_of(place) == pin.digest:
                    return place
    return None


def protect(pin: Pin, reader: pathlib.Path) -> None:
    """Notes in the checkpoint of a pin that `reader`, a folder of checkpoints, reads weights of it. Training that goes
    on there does not prune it as long as that folder exists. The first process alone does so."""
    if jax.process_index() or (place := located(pin)) is None:
        return
    reader = reader.resolve()
    note = place / NEEDED / hashlib.sha256(str(reader).encode()).hexdigest()[:16]
    try:
        note.parent.mkdir(exist_ok=True)
        note.write_text(f"{reader}\n")
    except OSError as error:
        logging.warning("%s cannot be marked as needed by %s (%s): see that no training that goes on there prunes it",
                        place, reader, error.strerror)


def needed(path: pathlib.Path) -> bool:
    """Whether a folder that `protect` has noted there still exists."""
    for note in (path / NEEDED).glob("*"):
        with contextlib.suppress(OSError):
            if pathlib.Path(note.read_text().rstrip("\n")).exists():
                return True
    return False


def unpinned(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint names its base by a path alone, as those of before 2026-11-27 do."""
    return isinstance(meta.get("base"), str) and bool(meta["base"])


def base(saved: Saved) -> Saved | None:
    """The checkpoint that a run began from, not verified; None where it began from nothing.

    Raises:
      CheckpointError: it is gone.
    """
    if not saved.meta["base"] or unpinned(saved.meta):
        return sole(saved) if saved.meta["base"] else None
    pin = Pin(**saved.meta["base"])
    if (place := located(pin)) is None:
        raise CheckpointError(f"{saved.path} was trained from {pin}, which is no longer there")
    return Saved(place, _meta(place), pin.digest)


def sole(saved: Saved) -> Saved:
    """The base of a checkpoint that names it by a path alone, not verified: the only checkpoint that this can mean.

    Raises:
      CheckpointError: there is none or several, or the one there is younger than `saved`.
    """
    folder = pathlib.Path(saved.meta["base"])
    try:
        chosen = _choose(folder)
        others = [path for path in folders(chosen.parent) if is_complete(path)] if chosen != folder else [chosen]
        younger = (chosen / MARKER).stat().st_mtime > (saved.path / MARKER).stat().st_mtime
        base = Saved(chosen, _meta(chosen), digest_of(chosen))
    except (CheckpointError, OSError, ValueError):
        raise CheckpointError(f"the checkpoint {saved.path} needs weights of {folder}, where there is none now; bring "
                              "it back there (a relative path is one from the folder where training was started)"
                              ) from None
    if younger or len(others) > 1:
        raise CheckpointError(f"the checkpoint {saved.path} names its base by the path {folder} alone, and "
                              + ("what lies there is younger" if younger else f"{len(others)} checkpoints lie there")
                              + "; leave only the one there that it was trained from, or train it again")
    return base


# ---- arrays -------------------------------------------------------------------------------------------------------


def restore(saved: Saved, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the arrays named in `abstract`, each straight into its sharding; a part that is absent there is not read.

    Args:
      abstract: {"parameters": path -> ShapeDtypeStruct with sharding, optionally "optimizer": pytree of them}.

    Raises:
      CheckpointError: a wanted array is not in the checkpoint or has another shape.
    """
    tree = {"parameters": nest(abstract["parameters"])} if abstract["parameters"] else {}  # Orbax fails on {} in a tree
    if "optimizer" in abstract:
        tree["optimizer"] = _named(abstract["optimizer"])
    if not tree:  # nor is there anything to read
        return {"parameters": {}}
    present = shapes(saved)
    for name, leaf in abstract["parameters"].items():
        if name not in present:
            raise CheckpointError(f"the checkpoint {saved.path} does not hold {name}: it is of another model")
        if present[name] != tuple(leaf.shape):
            raise CheckpointError(f"{name} is {list(present[name])} in the checkpoint {saved.path} and "
                                  f"{list(leaf.shape)} in this config; use the config it was trained with")
    with reading(saved), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        result = orbax.restore(saved.path / ARRAYS, args=ocp.args.PyTreeRestore(
            tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True))
    arrays: dict[str, Any] = {"parameters": unnest(result.get("parameters", {}))}
    if "optimizer" in abstract:
        leaves = [result["optimizer"][name] for name in _named(abstract["optimizer"])]
        arrays["optimizer"] = jax.tree.unflatten(jax.tree.structure(abstract["optimizer"]), leaves)
    return arrays


def shapes(saved: Saved) -> dict[str, tuple[int, ...]]:
    """path -> shape of every parameter a checkpoint holds."""
    with reading(saved), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        tree = orbax.metadata(saved.path / ARRAYS).item_metadata.tree
        return {path: tuple(leaf.shape) for path, leaf in unnest(tree["parameters"]).items()}


def arrays(saved: Saved) -> dict[str, tensorstore.TensorStore]:
    """path -> every parameter a checkpoint holds, still on disk: `array[index].read().result()` reads that part, inside
    `reading`."""
    found = {}
    for path in shapes(saved):
        place = {"driver": "ocdbt", "base": f"file://{saved.path / ARRAYS}/",
                 "path": f"parameters.{path.replace('/', '.')}/"}
        found[path] = tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True)
    with reading(saved):
        return {path: future.result() for path, future in found.items()}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def unnest(tree: Mapping[str, Any], prefix: str = "") -> Parameters:
    """The inverse of `nest`."""
    flat: Parameters = {}
    for name, value in tree.items():
        flat |= unnest(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def _named(tree: Any) -> dict[str, Any]:
    """An optimizer state as {position: leaf}: independent of optax's classes, in a fixed order."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def chunks(leaf: Any) -> ocp.SaveArgs:
    """One layer a chunk at most, cut into at least 8 x 8 tiles: a reader of one of 8 parts along either axis reads
    no more than its part. One chunk a leaf would make every reader read everything.

    Orbax halves the longer side first, so that an oblong matrix needs more cuts until its short side has eight parts.
    """
    size = leaf.size * leaf.dtype.itemsize
    if leaf.ndim < 2 or size < LARGE:
        return ocp.SaveArgs()
    short, long = sorted(leaf.shape[-2:])
    tiles = 64 * 2 ** math.ceil(math.log2(long / short))
    return ocp.SaveArgs(chunk_byte_size=max(short * long * leaf.dtype.itemsize // tiles, 1 << 14),
                        shard_axes=tuple(range(leaf.ndim - 2)))


def write_marker(path: pathlib.Path) -> None:
    """Lists every file with its size and checksum; written last and atomically, it makes the folder a checkpoint."""
    names = sorted(str(file.relative_to(path)) for file in path.rglob("*") if file.is_file() and file.name != MARKER)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        sums = list(pool.map(lambda name: _checksum(path / name), names))
    files = {name: [(path / name).stat().st_size, checksum] for name, checksum in zip(names, sums, strict=True)}
    write_json(path / MARKER, {"files": files, "digest": _digest(files)})


def _checksum(file: pathlib.Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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


def _commit() -> str:
    """The commit of the code, when it runs from a checkout."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=pathlib.Path(__file__).parent, text=True,
                              capture_output=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
