"""A path in; the verified checkpoint that it stands for, out: the newest folder that verifies is what counts."""

from __future__ import annotations

import os
import pathlib
from typing import Any

from calm_jax import config as config_lib
from calm_jax import json_files
from calm_jax.checkpoints import first, on_disk
from calm_jax.checkpoints.meta import ARRAYS, MARKER, META, Saved
from calm_jax.errors import CheckpointError

TRIES = 5  # how often a reader looks again for a checkpoint when training has pruned the one it had found


def find(path: str | os.PathLike) -> Saved:
    """A verified checkpoint from a checkpoint folder, a process's folder, or a workdir (its last process; best first).

    Of several processes all must call it. Verifying reads every byte, so the first process alone does it and tells the
    others, who then read no more than their share of the arrays; an error is raised in all of them.

    Raises:
      CheckpointError: there is none, or it is damaged.
      ConfigError: the path is the address of a bucket.
    """
    config_lib.check_local("checkpoint", path)
    saved = first.by_the_first(lambda: _find(pathlib.Path(path).absolute()))
    assert saved is not None
    return saved


def _find(path: pathlib.Path) -> Saved:
    for _ in range(TRIES):
        chosen = choose(path)
        try:
            return on_disk.read(chosen)
        except CheckpointError as error:
            gone = isinstance(error, on_disk.Vanished) or not on_disk.is_complete(chosen)
            if chosen == path or not gone:
                raise
    raise on_disk.Vanished(chosen)


def choose(path: pathlib.Path) -> pathlib.Path:
    """The checkpoint that a folder stands for, not yet verified."""
    for place in reversed(_places(path)):
        if found := _best(place):
            return found
    raise CheckpointError(f"there is no complete checkpoint in {path}; give a workdir of calm train, or a folder "
                          f"that holds {MARKER}")


def _places(path: pathlib.Path) -> list[pathlib.Path]:
    """The folders of a workdir's processes in the order in which they run; of another folder, itself."""
    if not is_workdir(path):
        return [path]
    try:
        names = json_files.table(path / "config.json", remedy="", error=ValueError).names("run")
        if not all(on_disk.inside(name) and "/" not in name for name in names):
            raise ValueError
        return [path / "checkpoints" / name for name in names]
    except ValueError:
        raise CheckpointError(f"{path}/config.json is damaged; the folder is no usable workdir") from None


def _best(place: pathlib.Path) -> pathlib.Path | None:
    """A checkpoint itself; of a process's folder its best one, or the newest where none is marked."""
    if (place / ARRAYS).is_dir() or (place / MARKER).exists():
        return place
    complete = [path for path in on_disk.folders(place) if on_disk.is_complete(path)]
    chosen = [path for path in complete if int(path.name) == on_disk.best_step(place)]
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
                        on_disk.read(best)  # says what is wrong
                        raise
        return found

    found = first.of_the_first(look)
    if not found:
        raise on_disk.Vanished(_find(pathlib.Path(path).absolute()).path)  # unless that says what is wrong
    return {name: (pathlib.Path(place), meta) for name, (place, meta) in found.items()}
