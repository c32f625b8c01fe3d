"""A table of one person's ratings in; the rated pictures and their scores out."""

from __future__ import annotations

import csv
import math
import pathlib
from collections.abc import Sequence

from calm_jax.errors import ConfigError, nearest

LARGEST = 1 << 26  # bytes of a table of ratings


def read_ratings(table: str, user: str, scale: Sequence[str]) -> list[tuple[str, float]]:
    """(path, score) of each row of a CSV table `image,score[,user]`.

    Args:
      user: whose rows; empty where the table is one person's.
      scale: lowest and highest possible score, as on the command line.

    Raises:
      ConfigError: no such table, no such columns, rows of several people and no user, a picture that does not exist
        or is rated twice, a score that is no number or off the scale.
    """
    file = pathlib.Path(table)
    lowest, highest = map(float, scale)
    try:
        if not file.is_file() or file.stat().st_size > LARGEST:
            reason = "larger than any person's" if file.is_file() else "no regular file" if file.exists() else "missing"
            raise ConfigError(f"the ratings {table} cannot be read: the file is {reason}; --ratings is a "
                              "table image,score")
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            fields, rows = set(reader.fieldnames or ()), list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"the ratings {table} cannot be read: {error}") from None
    missing = {"image", "score"} - fields
    if missing:
        raise ConfigError(f"the ratings {table} have no column {' and no '.join(sorted(missing))}; the "
                          "first line names the columns: image,score or image,score,user")
    users = sorted({row["user"] or "" for row in rows}) if "user" in fields else []
    if user and user not in users:
        raise ConfigError(f"the ratings {table} know no user {user!r}{nearest(user, users)}")
    if not user and len(users) > 1:
        raise ConfigError(f"the ratings {table} are of {len(users)} people; name one of them: --user "
                          f"{users[0] or users[1]}")
    rated: dict[str, float] = {}
    for line, row in enumerate(rows, 2):
        if user and row["user"] != user:
            continue
        place = f"{table}, row {line}"
        path = str(file.parent / (row["image"] or ""))
        try:
            score = float(row["score"] or "")
        except ValueError:
            score = math.nan
        if not lowest <= score <= highest:
            raise ConfigError(f"{place}: the score {(row['score'] or '')[:40]!r} is no number from "
                              f"{lowest:g} to {highest:g}; --scale says what the scale is")
        if not pathlib.Path(path).is_file():
            raise ConfigError(f"{place}: there is no picture {path}; paths are relative to the table")
        if path in rated:
            raise ConfigError(f"{place}: {row['image']} is rated twice")
        rated[path] = score
    if not rated:
        raise ConfigError(f"the ratings {table} have no rows")
    return list(rated.items())
