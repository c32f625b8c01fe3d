"""A task's name and a record in, a Sample out. Draws come from the given generator only; no pixel is read."""

from __future__ import annotations

import types
from collections.abc import Callable, Mapping

import numpy as np

from calm_jax.data.samples import Dataset, Sample
from calm_jax.data.tasks import measured, opinions, pseudo_labels
from calm_jax.data.tasks.context import Content, Context
from calm_jax.errors import ConfigError, nearest

TASKS: Mapping[str, Callable[..., Content]] = types.MappingProxyType({
    "attributes": pseudo_labels.attributes_of,
    "comparisons": pseudo_labels.comparisons,
    "measured": measured.measured,
    "measured_pair": measured.measured_pair,
    "caption": opinions.caption,
    "comment": opinions.comment,
    "score": opinions.score,
    "level": opinions.level,
    "personal": opinions.personal,
    "suggestion": opinions.suggestion,
    "question": opinions.question,
})


def make(task: str, dataset: Dataset, index: int, rng: np.random.Generator, context: Context) -> Sample:
    """The Sample that a task makes of a record.

    Args:
      task: one of TASKS.
      dataset: where record `index` lies; the images of the Sample point into it.
      index: record number.
      rng: decides everything that is drawn: edits, order and phrasing.
      context: what is the same for all examples of a process.
    Raises:
      ConfigError: there is no such task, or it has no use for these parts.
      BadRecord: the record lacks what the task needs.
    """
    if task not in TASKS:
        raise ConfigError(f"there is no task {task!r}{nearest(task, TASKS)}")
    record = dataset.record(index)
    images, turns, target = TASKS[task](record, rng, context)
    written = {"caption": record.captions, "comment": record.comments}.get(task, True)
    return Sample(images, turns, target, f"{dataset.name}/{task}/{record.key}{'' if written else ' (composed)'}")
