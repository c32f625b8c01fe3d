"""Rows about pictures in; a table, CSV, JSON lines or a contact sheet out."""

from __future__ import annotations

import csv
import hashlib
import importlib.resources
import io
import math
import os
import pathlib
import shutil
import urllib.parse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TextIO

from PIL import Image

from calm_jax import files
from calm_jax.commands.predict.journal import Row
from calm_jax.terminal import shown

THUMBNAIL = 320  # longest side, pixels
HIDDEN = ("stamp",)  # of a row: for the program itself


def table(rows: Sequence[Row], columns: Sequence[str], stream: TextIO) -> None:
    """Aligned columns: what is known, then the path; a picture that could not be read has its reason instead."""
    texts_of = [[shown(_cell(row.get(column))) for column in columns] for row in rows]
    widths = [max(map(len, (column, *(cells[place] for cells in texts_of)))) for place, column in enumerate(columns)]
    # Texts are as long as they are: the last column is not padded, and paths come before it.
    numeric = [all(isinstance(row.get(column), (int, float, type(None))) for row in rows) for column in columns]
    longest = max((len(shown(row["path"])) for row in rows), default=4)

    def line(cells, path, error=""):
        padded = [cell.rjust(width) if right else cell.ljust(width)
                  for cell, width, right in zip(cells, widths, numeric, strict=True)]
        numbers = [cell for cell, right in zip(padded, numeric, strict=True) if right]
        texts = [cell for cell, right in zip(padded, numeric, strict=True) if not right]
        print("  ".join([*numbers, path.ljust(longest), *texts, *([error] if error else [])]).rstrip(), file=stream)

    line(columns, "path")
    for row, cells in zip(rows, texts_of, strict=True):
        line(cells, shown(row["path"]), f"({shown(row['error'])})" if "error" in row else "")


def as_csv(rows: Sequence[Row], columns: Sequence[str], stream: TextIO) -> None:
    """A header and a row a picture: `path`, the columns, `error`."""
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["path", *columns, "error"])
    for row in rows:
        writer.writerow([row["path"], *(_cell(row.get(column), digits=6) for column in columns), row.get("error", "")])


def json_lines(rows: Sequence[Row], columns: Sequence[str], stream: TextIO) -> None:
    """An object a picture; a number that is missing is null."""
    for row in rows:
        print(files.as_json({name: value for name, value in row.items() if name not in HIDDEN}), file=stream)


FORMATS: Mapping[str, Callable[[Sequence[Row], Sequence[str], TextIO], None]] = {
    "table": table, "csv": as_csv, "jsonl": json_lines}


def _cell(value: Any, digits: int = 2) -> str:
    if isinstance(value, float):
        return f"{value:.{digits}f}" if math.isfinite(value) else ""
    return "" if value is None else str(value)


def contact_sheet(rows: Sequence[Row], columns: Sequence[str], out: pathlib.Path, *, title: str,
                  scale: tuple[float, float]) -> str:
    """The page, which sorts and filters in a browser. Its small pictures lie beside it, in `thumbnails(out)`."""
    small = thumbnails(out)
    cards = [{name: value for name, value in row.items() if name not in HIDDEN} | {
        "href": _url(os.path.relpath(row["path"], out.parent)),
        "src": "" if "error" in row else _url(f"{small.name}/{thumbnail_name(row)}")} for row in rows]
    data = files.as_json({"title": title, "columns": list(columns), "scale": list(scale), "rows": cards})
    page = importlib.resources.files(__package__).joinpath("contact_sheet.html").read_text(encoding="utf-8")
    for sign in "<>&":  # nothing in a path or an answer can end the script or begin a tag
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    return page.replace("__DATA__", data)


def thumbnails(out: pathlib.Path) -> pathlib.Path:
    """The folder of a page's small pictures."""
    return out.with_name(f"{out.stem}-pictures")


def thumbnail_name(row: Mapping[str, Any]) -> str:
    """Of the file, the same for the same version of the picture."""
    place = os.path.abspath(row["path"]).encode("utf-8", "surrogateescape")
    return hashlib.sha256(place + repr(row["stamp"]).encode()).hexdigest()[:24] + ".jpg"


def thumbnail(pixels: Any, file: pathlib.Path) -> None:
    """Writes a small JPEG of RGB pixels, whole or not at all."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=82)
    files.write(file, buffer.getvalue())


def _url(path: str) -> str:
    return urllib.parse.quote(path.replace(os.sep, "/").encode("utf-8", "surrogateescape"))


def copy(rows: Sequence[Row], folder: pathlib.Path) -> int:
    """Copies the pictures of these rows; no file is overwritten by another. Returns how many are there now."""
    files.folder(folder, "--copy-to")
    taken: set[str] = set()
    for row in rows:
        source = pathlib.Path(row["path"])
        name, number = source.name, 1
        while name in taken or ((folder / name).exists() and not _same(source, folder / name)):
            number += 1
            name = f"{source.stem}-{number}{source.suffix}"
        taken.add(name)
        if not (folder / name).exists():
            shutil.copy2(source, folder / name)
    return len(taken)


def _same(one: pathlib.Path, other: pathlib.Path) -> bool:
    first, second = one.stat(), other.stat()
    return (first.st_size, int(first.st_mtime)) == (second.st_size, int(second.st_mtime))
