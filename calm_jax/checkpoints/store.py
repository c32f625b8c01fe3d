"""A training state in; verified folders on disk, saved in the background and pruned by policy, out."""

from __future__ import annotations

import fcntl
import logging
import os
import pathlib
import shutil
import subprocess
import threading
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

import calm_jax
from calm_jax import config as config_lib
from calm_jax.checkpoints import array_io, first, lineage, on_disk
from calm_jax.checkpoints.meta import ARRAYS, BEST, MARKER, META, Saved
from calm_jax.errors import CheckpointError

TICK = 16  # steps after which several processes compare their clocks


class Checkpoints:
    """The checkpoints of one training process in one folder: saved in the background, pruned by policy.

    Args:
      files: name -> content of what each carries beside its arrays, such as a tokenizer.
    """

    def __init__(self, place: str | os.PathLike, policy: config_lib.Checkpoint, files: Mapping[str, bytes] | None = None
                 ):
        self.folder, self.policy, self._files = pathlib.Path(place).absolute(), policy, files or {}
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
        if first.of_the_first(lambda: self._known(path)):
            self._finish(path, None, best, step)
            return
        tree = {"parameters": array_io.nest(arrays["parameters"]), "optimizer": array_io.named(arrays["optimizer"])}
        try:
            self._orbax.save(path / ARRAYS, args=ocp.args.PyTreeSave(
                tree, save_args=jax.tree.map(array_io.chunks, tree)))
        except Exception as error:
            raise on_disk.failed(path, error) from error
        meta = {**meta, "step": step, "is_best": best, "version": calm_jax.__version__, "commit": _commit()}
        self._saved_at = time.monotonic()
        self._finisher = threading.Thread(target=self._finish, args=(path, meta, best, step), daemon=True)
        self._finisher.start()

    def _known(self, path: pathlib.Path) -> bool:
        """Whether this checkpoint is there already; what a crash left of it is removed, and its folder made."""
        if on_disk.is_complete(path):
            return True
        try:
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)
        except OSError as error:
            raise on_disk.failed(path, error) from error
        return False

    def _finish(self, path: pathlib.Path, meta: Mapping[str, Any] | None, best: bool, step: int) -> None:
        """Waits for Orbax, writes meta data and marker, then prunes: never before the new one is complete."""
        try:
            if meta is not None:
                self._orbax.wait_until_finished()
                if jax.process_index() == 0:
                    on_disk.write_json(path / META, meta)
                    for name, content in self._files.items():
                        (path / name).write_bytes(content)
                    on_disk.write_marker(path)
            if jax.process_index() == 0:
                if best:
                    on_disk.write_json(self.folder / BEST, {"step": step})
                self._prune()
        except BaseException as error:
            self._error = on_disk.failed(path, error)

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
        steps = [int(path.name) for path in on_disk.folders(self.folder) if on_disk.is_complete(path)]
        for path in on_disk.folders(self.folder):
            if not on_disk.is_complete(path):  # left by a crash while it was being pruned
                shutil.rmtree(path, ignore_errors=True)
        keep = set(sorted(steps)[-max(self.policy.keep, 1):]) | {on_disk.best_step(self.folder)}
        if self.policy.keep_every_steps:
            keep |= {step for step in steps if step % self.policy.keep_every_steps == 0}
        for step in set(steps) - keep:
            path = self.folder / f"{step:08d}"
            lock = on_disk.locked(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if lock is not None and not lineage.needed(path):
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
        return first.by_the_first(self._latest)

    def _latest(self) -> Saved | None:
        for path in reversed(on_disk.folders(self.folder)):
            if not on_disk.is_complete(path):
                shutil.rmtree(path, ignore_errors=True)
                continue
            try:
                saved = on_disk.read(path)
                if saved.meta["is_best"] and on_disk.best_step(self.folder) != saved.step:  # it died before it said so
                    on_disk.write_json(self.folder / BEST, {"step": saved.step})
                return saved
            except on_disk.Vanished:
                continue
            except CheckpointError as error:
                logging.warning("%s; trying the one before it", error)
                aside = path.with_name(f"{path.name}.damaged-{int(time.time())}")
                path.rename(aside)
        if any(self.folder.glob("*.damaged-*")):  # also those of an earlier try: never start anew without being told
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged; they were set aside as "
                                  "*.damaged-*: restore them from a backup, or delete them to start this process anew")
        return None


def _commit() -> str:
    """The commit of the code, when it runs from a checkout."""
    try:
        return subprocess.run(["git", "rev-parse", "HEAD"], cwd=pathlib.Path(__file__).parent, text=True,
                              capture_output=True, check=True, timeout=5).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
