"""The folder of a run: one training at a time works in it, and it belongs to one config.

A training holds the folder by an advisory lock on `lock` inside it, which the kernel releases when the process ends,
however it ends. The config is written (`config.json`) when the first step has run: a start that fails leaves no claim.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import fcntl
import json
import logging
import os
import pathlib
import socket
from collections.abc import Iterator

import jax

from calm_jax import config as config_lib
from calm_jax import files
from calm_jax.checkpoints import locate
from calm_jax.checkpoints.meta import config_of
from calm_jax.errors import ConfigError

LOCK, CONFIG = "lock", "config.json"
WITHOUT_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)  # of some file systems


@contextlib.contextmanager
def held(workdir: pathlib.Path) -> Iterator[None]:
    """Inside, no other training works in this folder, which is made if it is not there. The first process holds it for
    all.

    Raises:
      ConfigError: another training holds it, it cannot be made, or it is the address of a bucket.
    """
    if jax.process_index():
        yield
        return
    config_lib.check_local("workdir", workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        file = (workdir / LOCK).open("a+")
    except OSError as error:
        raise ConfigError(f"the workdir {workdir} cannot be used: {error.strerror or error}; choose another "
                          "--workdir") from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip()
            raise ConfigError(f"another training works in the workdir {workdir}"
                              f"{f' ({holder})' if holder else ''}; wait for its end, stop it, or choose "
                              "another --workdir") from None
        except OSError as error:
            if error.errno not in WITHOUT_LOCKS:
                raise
            logging.warning("the file system of %s has no locks: take care that no second training is started there",
                            workdir)
        file.truncate(0)
        file.write(f"pid {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def check(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Raises ConfigError where the folder belongs to another config, or holds checkpoints of nobody."""
    path = workdir / CONFIG
    if path.is_file():
        try:
            theirs = json.loads(path.read_text())
        except ValueError:
            raise ConfigError(f"{path} is damaged; restore it, or choose another --workdir") from None
        lines = config_lib.differences(theirs, _values(config))
        if lines:
            raise ConfigError(f"the workdir {workdir} belongs to another config ({'; '.join(lines)}); "
                              "choose another --workdir, or take the change back to resume")
    elif jax.process_index() == 0 and (workdir / "checkpoints").exists():
        raise ConfigError(f"the workdir {workdir} holds checkpoints but no {CONFIG}; choose another "
                          "--workdir")


def settled(workdir: pathlib.Path, config: config_lib.Config) -> config_lib.Config:
    """The config with `model.visual_rms` as this run has it, where the config leaves it open: as it was when the
    folder was claimed, or as the checkpoint in `init` has it, a conversion that measured its word embeddings.

    Raises:
      CheckpointError: there is no checkpoint in `init`, or its config is none of today's.
    """
    if config.model.visual_rms or not config.init:
        return config
    path = workdir / CONFIG
    if path.is_file():
        try:
            model = json.loads(path.read_text())["model"]
        except (KeyError, TypeError, ValueError):  # `check` says what is wrong
            return config
    else:
        *_, (place, meta) = locate.offered(config.init).values()
        model = dataclasses.asdict(config_of(place, meta).model)
    return dataclasses.replace(config, model=dataclasses.replace(
        config.model, visual_rms=model.get("visual_rms", 0.0)))


def claim(workdir: pathlib.Path, config: config_lib.Config) -> None:
    """Makes the folder the config's own, for good; `check` comes first."""
    check(workdir, config)
    path = workdir / CONFIG
    if jax.process_index() or path.is_file():
        return
    workdir.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(_values(config), indent=1, allow_nan=False), durable=True)


def _values(config: config_lib.Config) -> dict:
    """The config as JSON gives it back."""
    return json.loads(json.dumps(dataclasses.asdict(config)))
