"""A checkpoint and its export in; a table of differences out."""

from __future__ import annotations

from typing import Any

from calm_jax.convert import parity


def run(checkpoint: str, hf: str, **options: Any) -> int:
    """Compares and shows the result; 0 where both compute the same.

    Args:
      options: as `convert.parity.check` takes them.

    Raises:
      ConfigError, CheckpointError: see `convert.parity.check`.
    """
    result = parity.check(checkpoint, hf, **options)
    print(parity.show(result))
    return 0 if result.holds() else 1
