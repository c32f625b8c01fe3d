"""Checkpoints that others read weights of: found again by their digest, noted so that none is pruned.

Another checkpoint is always named by a `Pin`: its folder, its step and the digest of its marker, which changes with any
of its bytes. One that was moved is found again through the environment variable CALM_BASE.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import pathlib
from typing import Any

import jax

from calm_jax.checkpoints import first, locate, on_disk
from calm_jax.checkpoints.meta import MARKER, NEEDED, Pin, Saved, read_meta, unpinned
from calm_jax.errors import CheckpointError

BASE = "CALM_BASE"  # environment: where moved checkpoints are: workdirs, folders of them or below, os.pathsep between


def identity(saved: Saved) -> dict[str, Any]:
    """What tells a checkpoint from any other, with whatever other weights it reads: JSON values."""
    known = {"checkpoint": str(saved.path.resolve()), "step": saved.step, "digest": saved.digest}
    if not unpinned(saved.meta):  # the digest covers the pins of the checkpoints below
        return known
    with contextlib.suppress(CheckpointError):  # needed or not: who reads weights there will say so
        known["base"] = identity(sole(saved))
    return known


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
            return on_disk.read(found)
        other = on_disk.digest_of(pathlib.Path(pin.path))
        what = (f"there lies another one now (digest {other[:12]}), made by a later training" if other else
                "it is no longer there")
        given = os.environ.get(BASE)
        raise CheckpointError(f"{reader} needs weights of the checkpoint {pin}, but {what}; bring it back, or name the "
                              f"workdir or folder to which it was moved in the environment variable {BASE}"
                              + (f" (it is not in {BASE}={given})" if given else ""))

    saved = first.by_the_first(look)
    assert saved is not None
    return saved


def located(pin: Pin) -> pathlib.Path | None:
    """Where the checkpoint of a pin lies now: the folder whose marker has its digest, if there is one."""
    was = pathlib.Path(pin.path)
    if on_disk.digest_of(was) == pin.digest:
        return was
    for folder in (pathlib.Path(name).absolute() for name in os.environ.get(BASE, "").split(os.pathsep) if name):
        for pattern in (".", f"{pin.step:08d}", f"checkpoints/*/{pin.step:08d}", f"*/checkpoints/*/{pin.step:08d}"):
            for place in sorted(folder.glob(pattern)) if pattern != "." else [folder]:
                if on_disk.digest_of(place) == pin.digest:
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
    return Saved(place, read_meta(place), pin.digest)


def sole(saved: Saved) -> Saved:
    """The base of a checkpoint that names it by a path alone, not verified: the only checkpoint that this can mean.

    Raises:
      CheckpointError: there is none or several, or the one there is younger than `saved`.
    """
    folder = pathlib.Path(saved.meta["base"])
    try:
        chosen = locate.choose(folder)
        beside = on_disk.folders(chosen.parent) if chosen != folder else [chosen]
        others = [path for path in beside if path == chosen or on_disk.is_complete(path)]
        younger = (chosen / MARKER).stat().st_mtime > (saved.path / MARKER).stat().st_mtime
        base = Saved(chosen, read_meta(chosen), on_disk.digest_of(chosen))
    except (CheckpointError, OSError, ValueError):
        raise CheckpointError(f"the checkpoint {saved.path} needs weights of {folder}, where there is none now; bring "
                              "it back there (a relative path is one from the folder where training was started)"
                              ) from None
    if younger or len(others) > 1:
        raise CheckpointError(f"the checkpoint {saved.path} names its base by the path {folder} alone, and "
                              + ("what lies there is younger" if younger else f"{len(others)} checkpoints lie there")
                              + "; leave only the one there that it was trained from, or train it again")
    return base
