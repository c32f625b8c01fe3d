"""calm_jax: a photograph and an instruction in; a score, a comment or an answer about it out."""

from __future__ import annotations

import os
import typing

from calm_jax import jaxlib_guard

if typing.TYPE_CHECKING:
    from calm_jax.api import Model

__version__ = "0.1.0"
jaxlib_guard.apply()


def load(checkpoint: str | os.PathLike, *, process: str = "") -> Model:
    """The model of a workdir, of one of its processes, or of a checkpoint, over all devices: see `calm_jax.api.Model`.

        model = calm_jax.load("runs/finetune")
        model.score("picture.jpg").value

    Args:
      process: of the workdir, which then answers everything; default: for each question the one that learned it.

    Raises:
      CheckpointError: there is none, or it is damaged.
      ConfigError: there is no such process.
    """
    from calm_jax.api import Model  # here, so that programs that need no JAX do not wait for it
    return Model(checkpoint, process=process)
