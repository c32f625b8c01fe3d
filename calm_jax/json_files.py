"""A JSON file that anybody may have written in; its values, each of the type and in the range asked for, out.

What is not as it should be is one sentence that names the file, the field and the remedy. Nothing is guessed: a number
is no text, True is no number, a name that occurs twice in a table and numbers that JSON does not have are refused.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
import reprlib
from collections.abc import Callable, Mapping
from typing import Any

from calm_jax.errors import ConfigError

LARGEST = 1 << 25  # bytes; the index of a model of a thousand billion parameters is a third of it
NEEDED: Any = object()  # default of a field that must be there
Error = Callable[[str], Exception]


def load(path: str | os.PathLike, *, remedy: str, error: Error = ConfigError, nan: bool = False) -> Any:
    """The value in a JSON file of any of JSON's encodings, with or without a byte-order mark.

    Args:
      remedy: what helps, the end of every sentence.
      error: the class that is raised.
      nan: NaN and Infinity, which JSON has not, are read all the same: earlier versions of a writer wrote them.

    Raises:
      error: it is missing, no regular file, larger than LARGEST, no JSON, or nested too deeply.
    """
    path = pathlib.Path(path)
    try:
        if not path.is_file():  # nobody may ever write into a pipe
            raise error(f"{path} is {'no regular file' if path.exists() else 'missing'}; {remedy}")
        if path.stat().st_size > LARGEST:
            raise error(f"{path} has {path.stat().st_size:,} bytes, and no file of its kind has more than {LARGEST:,}; "
                        f"{remedy}")
        content = path.read_bytes()
    except OSError as problem:
        raise error(f"{path} cannot be read: {problem.strerror or problem}; {remedy}") from None
    try:
        return json.loads(content, parse_constant=float if nan else _refused, object_pairs_hook=_once)
    except RecursionError:
        raise error(f"{path} is damaged: it is nested too deeply; {remedy}") from None
    except ValueError as problem:
        raise error(f"{path} is damaged: it is no JSON ({problem}); {remedy}") from None


def table(path: str | os.PathLike, *, remedy: str, error: Error = ConfigError, nan: bool = False) -> Table:
    """The table in a JSON file; raises as `load`, and where it holds another thing."""
    value = load(path, remedy=remedy, error=error, nan=nan)
    if not isinstance(value, dict):
        raise error(f"{path} is damaged: it holds {reprlib.repr(value)} instead of a table; {remedy}")
    return Table(value, str(path), remedy, error)


def _refused(word: str) -> None:
    raise ValueError(f"{word} is no number of JSON")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the name {next(name for name in found if names.count(name) > 1)[:80]!r} occurs twice")
    return found


@dataclasses.dataclass(frozen=True)
class Table:
    """A table of a JSON file. A field that is null counts as absent, for which its default is given.

    Attributes:
      values: as they were read.
      name: of the file, and of the table in it.
      remedy, error: as in `load`.
    """

    values: Mapping[str, Any]
    name: str
    remedy: str = "fetch it again"
    error: Error = ConfigError

    def __contains__(self, field: str) -> bool:
        return self.values.get(field) is not None

    def whole(self, field: str, default: Any = NEEDED, *, least: int = 1, most: int | None = None) -> int:
        """A whole number within its bounds, both of which are allowed."""
        upper = "" if most is None else f" to {most:,}"
        return self._of(field, default, f"a whole number from {least:,}{upper or ' on'}", lambda value:
                        type(value) is int and least <= value and (most is None or value <= most))

    def number(self, field: str, default: Any = NEEDED, *, above: float = 0.0) -> float:
        """A finite number above a bound."""
        value = self._of(field, default, f"a finite number above {above:g}", lambda value:
                         type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value) and value > above)
        return value if value is default else float(value)

    def text(self, field: str, default: Any = NEEDED) -> str:
        return self._of(field, default, "text", lambda value: isinstance(value, str))

    def flag(self, field: str, default: Any = NEEDED) -> bool:
        return self._of(field, default, "true or false", lambda value: isinstance(value, bool))

    def names(self, field: str, default: Any = NEEDED) -> list[str]:
        """A list of texts."""
        return self._of(field, default, "a list of names", lambda value:
                        isinstance(value, list) and all(isinstance(item, str) for item in value))

    def numbers(self, field: str, default: Any = NEEDED) -> list[float]:
        """A list of finite numbers."""
        return self._of(field, default, "a list of finite numbers", lambda value: isinstance(value, list) and all(
            type(item) in (int, float) and abs(item) < 1e300 and math.isfinite(item) for item in value))

    def table(self, field: str, default: Any = NEEDED) -> Table:
        value = self._of(field, default, "a table", lambda value: isinstance(value, dict))
        return Table(value, f"{self.name}: {field}", self.remedy, self.error)

    def refuse(self, sentence: str) -> Exception:
        """The error, ready to be raised, that says what is wrong with this table."""
        return self.error(f"{self.name}: {sentence}; {self.remedy}")

    def _of(self, field: str, default: Any, kind: str, holds: Callable[[Any], bool]) -> Any:
        value = self.values.get(field)
        if value is None:
            if default is NEEDED:
                raise self.refuse(f"there is no {field}, which has to be {kind}")
            return default
        if not holds(value):
            raise self.refuse(f"{field} is {_shown(value)} instead of {kind}")
        return value


def _shown(value: Any) -> str:
    # The text of a number of a million digits takes long, or is refused.
    return "a very large number" if type(value) is int and value.bit_length() > 200 else reprlib.repr(value)
