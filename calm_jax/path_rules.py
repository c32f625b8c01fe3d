"""Regexes by name and parameter paths in; for every path the one name whose regex matches it, out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from calm_jax.errors import ConfigError


def matches(regex: str, parameters: Iterable[str]) -> bool:
    """Whether a regex matches any path in full."""
    return any(re.fullmatch(regex, path) for path in parameters)


def match(parameters: Mapping[str, object], patterns: Mapping[str, tuple[str, ...]], what: str) -> dict[str, str]:
    """path -> the one name in `patterns` with a regex that matches the path in full.

    Raises:
      ConfigError: every path that matches no name or several, and every regex that matches nothing, at once.
    """
    chosen: dict[str, str] = {}
    wrong: list[str] = []
    for regex in (regex for regexes in patterns.values() for regex in regexes):
        try:
            re.compile(regex)
        except re.error as error:
            raise ConfigError(f"{regex!r} in the {what} is no regular expression: {error}") from None
    for path in parameters:
        names = [name for name, regexes in patterns.items() if any(re.fullmatch(r, path) for r in regexes)]
        if len(names) == 1:
            chosen[path] = names[0]
        else:
            wrong.append(f"{path} matches {' and '.join(names) if names else 'none of ' + ', '.join(patterns)}")
    for name, regexes in patterns.items():
        wrong.extend(f"the pattern {r!r} of {name} matches no parameter" for r in regexes
                     if not matches(r, parameters))
    if wrong:
        shown = "; ".join(wrong[:8]) + (f"; and {len(wrong) - 8} more" if len(wrong) > 8 else "")
        raise ConfigError(f"the {what} do not cover the parameters exactly: {shown}")
    return chosen
