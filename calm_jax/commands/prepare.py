"""A public data set as it was published in, a TFDS data set of array_record shards that training reads, out.

The same command again goes on after an interruption. Images are kept whole; those larger than the longest side are
shrunk to it. What is missing or unreadable is counted and named; above a share the build stops. docs/data.md has a page
of data sets. TensorFlow is not needed.
"""

from __future__ import annotations

from typing import Any

from calm_jax.data import builders
from calm_jax.data.builders import store


def prepare(dataset: str, source: str, data_dir: str, *, scale: tuple[float, ...] | None,
            shares: tuple[float, ...] | None, **options: Any) -> None:
    """Stores a data set.

    Args:
      dataset: its name, one of `builders.names()`.
      source: where it lies as it was published.
      scale, shares: as the class of the data set takes them; None = its own.
      options: as `store.prepare` takes them.

    Raises:
      ConfigError: there is no such data set, or the source is none.
    """
    store.prepare(builders.source(dataset)(source, scale=scale, shares=shares), data_dir, **options)
