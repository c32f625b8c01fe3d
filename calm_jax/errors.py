"""Errors whose message is one sentence for the user: it names the thing and the remedy; programs show it alone.

`exit_code` is the code with which a program ends: 2 what was asked for is wrong, 1 something failed, 3 the training
itself cannot go on, and would end so again (a supervisor does not restart it).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Base of them all."""

    exit_code = 1


class ConfigError(UserError, ValueError):
    """What was asked for cannot be done: a config, an argument or a file of the user's; names the field."""

    exit_code = 2


class CheckpointError(UserError, RuntimeError):
    """A checkpoint that cannot be written or must not be read; names the folder."""


class TrainingError(UserError, RuntimeError):
    """Training that cannot go on: it diverged, or its data are bad."""

    exit_code = 3


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint such as `; the nearest is 'x'`, or the list of all valid names when none is near."""
    valid = list(valid)
    close = difflib.get_close_matches(name, valid, n=1, cutoff=0.5)
    return f"; the nearest is {close[0]!r}" if close else f"; valid are {', '.join(map(repr, valid))}"
