"""Rows of a benchmark and a Markdown page in; the page with the rows at the end of their section's table, out."""

from __future__ import annotations

import pathlib
from collections.abc import Sequence

from calm_jax import files
from calm_jax.errors import ConfigError

COMMON = ("date", "machine", "command")  # the first columns of every table


def append(page: pathlib.Path, section: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, date: str,
           machine: str, command: str) -> None:
    """Adds rows to the first table below `## section`; a page or a section that is not there is made.

    Args:
      columns: names of the columns behind the common ones.
      rows: their cells; the common ones stand in the first row alone.

    Raises:
      ConfigError: the section has a table of other columns, or none.
    """
    header = _line([*COMMON, *columns])
    filled = [_line([*((date, machine, f"`{command}`") if not number else ("",) * 3), *cells])
              for number, cells in enumerate(rows)]
    lines = page.read_text().splitlines() if page.is_file() else ["# Benchmarks"]
    if f"## {section}" not in lines:
        lines += ["", f"## {section}", "", header, "|---" * (len(COMMON) + len(columns)) + "|"]
    begin = lines.index(f"## {section}") + 1
    end = next((i for i in range(begin, len(lines)) if lines[i].startswith("## ")), len(lines))
    place = next((i for i in range(begin, end) if lines[i].startswith("|")), None)
    if place is None or lines[place] != header:
        raise ConfigError(f"{page}: the table below '## {section}' does not begin with {header}")
    while place < end and lines[place].startswith("|"):
        place += 1
    lines[place:place] = filled
    files.write(page, "\n".join(lines) + "\n")


def _line(cells: Sequence[str]) -> str:
    return "".join(f"| {cell} " if cell else "| " for cell in cells) + "|"
