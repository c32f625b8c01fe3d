"""Work on checkpoints that the first of several processes does for all of them."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils

from calm_jax.checkpoints.meta import Saved
from calm_jax.errors import CheckpointError

VERIFYING = 4 * 3600  # seconds that processes wait for the first one to verify a checkpoint, which reads all of it
_turns = itertools.count()  # names of barriers: every process asks for its checkpoints in the same order


def by_the_first(work: Callable[[], Saved | None]) -> Saved | None:
    """The checkpoint that `work()` finds, which only the first process does, in every process."""
    def found():
        saved = work()
        return None if saved is None else {"path": str(saved.path), "meta": saved.meta, "digest": saved.digest}

    outcome = of_the_first(found)
    return None if outcome is None else Saved(pathlib.Path(outcome["path"]), outcome["meta"], outcome["digest"])


def of_the_first(work: Callable[[], Any]) -> Any:
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
