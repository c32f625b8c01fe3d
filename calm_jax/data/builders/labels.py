"""Official label files in; checked rows, entries and splits out: the words in which every dataset's page is written.

A page is a subclass of `Source`: a few facts about the dataset and one generator, `entries`. What is wrong with single
rows is counted and named here; what is wrong with a whole file stops the build with one sentence.
"""

from __future__ import annotations

import collections
import csv
import dataclasses
import hashlib
import json
import math
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from calm_jax.data.scale import checked
from calm_jax.errors import ConfigError

SPLITS = ("train", "validation", "test")
SEED = 20241216  # of the splits that are ours: the same pictures are drawn on every machine


@dataclasses.dataclass(frozen=True)
class Entry:
    """One picture to be stored.

    Attributes:
      split: one of SPLITS.
      key: its name, unique in the dataset.
      picture: its file, relative to the source folder and below it.
      label: fields of `samples.Record` by name, as JSON values.
    """

    split: str
    key: str
    picture: str
    label: Mapping[str, Any]


class Source:
    """A dataset as it was published, in the folder where it lies.

    A subclass says what the dataset is and yields its entries; it reads label files through `file`, `table`, `lines`
    and `json`, which count and name what is malformed.

    Args:
      path: the folder with labels and pictures, or a label file in it where a dataset has no fixed name for it.
      scale: (lowest, highest) score, for datasets that do not fix it.
      shares: of train, validation and test, for pictures without an official split; default: the class's own.

    Attributes:
      name, title, homepage, licence, citation: of the dataset.
      scale: lowest and highest score; None = the scores' scale has to be given.
      shares: of train, validation and test among the pictures that have no official split.
      origin: where the splits come from, in words; written into the manifest.
      rows, malformed: label rows read so far, and "place: reason" of those that could not be used.
      left_out: reason -> rows that do not belong to what is built, such as conversations without a picture.
    """

    name = title = homepage = licence = citation = ""
    scale: tuple[float, float] | None = (1.0, 10.0)
    shares = (0.9, 0.05, 0.05)

    def __init__(self, path: Path | str, *, scale: tuple[float, float] | None = None,
                 shares: tuple[float, float, float] | None = None):
        self.path = Path(path)
        self.folder = self.path if self.path.is_dir() else self.path.parent
        if not self.path.exists():
            raise ConfigError(f"{self.path} does not exist; --source is the folder that holds {self.title}")
        if not (self.path.is_dir() or self.path.is_file()):  # a pipe would be waited for
            raise ConfigError(f"{self.path} is neither a folder nor a file; --source is the folder that "
                              f"holds {self.title}")
        if scale and self.scale:
            raise ConfigError(f"{self.name} has the scale {_words(self.scale)}; leave --scale out")
        self.scale = self.scale or scale
        if scale:
            checked(scale, "--scale")
        self.given_shares = shares
        self.shares = shares or self.shares
        if len(self.shares) != 3 or min(self.shares) < 0 or not math.isclose(sum(self.shares), 1.0, abs_tol=1e-6):
            raise ConfigError(f"--shares {_words(self.shares)} are not three shares of train, validation "
                              "and test that sum to 1, such as 0.9,0.05,0.05")
        self.origin = f"ours, drawn by picture with seed {SEED}, shares {_words(self.shares)}"
        self.rows = 0
        self.malformed: list[str] = []
        self.left_out: collections.Counter[str] = collections.Counter()

    def entries(self) -> Iterator[Entry]:
        """Every labelled picture, in a fixed order. Raises ConfigError when the source is not what it should be."""
        raise NotImplementedError

    def file(self, *names: str, what: str = "the labels") -> Path:
        """The first of `names` that exists below the folder.

        Raises:
          ConfigError: none does.
        """
        for name in names:
            if (self.folder / name).is_file():
                return self.folder / name
        where = f"; get it at {self.homepage}" if self.homepage else ""
        raise ConfigError(f"{self.folder} has no {' or '.join(names)}, {what} of {self.title}; give the "
                          f"folder that holds it as --source{where}")

    def sole_file(self, suffix: str) -> Path:
        """The source itself where it is a file, else the only file of that suffix in the folder.

        Raises:
          ConfigError: there is none, or there are several.
        """
        found = [self.path] if self.path.is_file() else sorted(
            path for path in self.folder.glob(f"*{suffix}") if path.is_file())
        if len(found) != 1:
            raise ConfigError(f"{self.folder} holds {len(found)} files *{suffix}; name the one with the "
                              f"labels: --source {self.folder}/NAME{suffix}")
        return found[0]

    def picture(self, name: str, place: str) -> str:
        """A picture's name as every label shall write it, `inside`; empty, and counted as malformed, where it lies
        outside of the source."""
        try:
            return inside(name)
        except ValueError as error:
            self.malformed.append(f"{place}: {error}")
            return ""

    def table(self, path: Path, *, pictures: Sequence[str] = (), text: Sequence[str] = (),
              scores: Sequence[str] = (), numbers: Sequence[str] = (), blank: Sequence[str] = (),
              optional: Sequence[str] = (), delimiter: str = ",") -> Iterator[dict[str, Any]]:
        """Rows of a table with a header: column -> stripped text, or a number; further columns are not looked at.

        Args:
          pictures: columns that name files below a folder, in any bytes; they come as `inside` writes them.
          text: columns that must be there and not be empty.
          scores: columns of numbers on the dataset's scale.
          numbers: columns of any finite numbers.
          blank: columns of text that must be there and may be empty.
          optional: columns of text that may be absent or empty; then "".
        Raises:
          ConfigError: the file cannot be read, a column is missing, or a score lies outside of the scale.
        """
        with _reading(path), open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.reader(stream, delimiter=delimiter)
            try:
                header = [name.strip() for name in next(reader, [])]
            except csv.Error as error:
                raise ConfigError(f"{path} is no table of text ({error}); check --source") from None
            needed = (*pictures, *text, *scores, *numbers, *blank)
            missing = [name for name in needed if name not in header]
            if missing:
                raise ConfigError(
                    f"{path} has no column {missing[0]!r}; its first line is {delimiter.join(header)[:200]!r}, and "
                    f"{self.title} needs {delimiter.join(needed)}")
            places = {name: header.index(name) for name in (*needed, *optional) if name in header}
            for row in self._parsed(reader):
                if not row:
                    continue
                self.rows += 1
                place = f"{path.name}, line {reader.line_num}"
                if len(row) != len(header):
                    self.malformed.append(f"{place}: {len(row)} fields, and the header has {len(header)}")
                    continue
                found: dict[str, Any] = dict.fromkeys(optional, "")
                found.update((name, row[at].strip()) for name, at in places.items())
                empty = [name for name in (*pictures, *text) if not found[name]]
                if empty:
                    self.malformed.append(f"{place}: {empty[0]} is empty")
                    continue
                torn = [name for name in places if name not in pictures and not _is_text(found[name])]
                if torn:
                    self.malformed.append(f"{place}: {torn[0]} is not UTF-8")
                    continue
                found.update((name, self.picture(found[name], place)) for name in pictures)
                if not all(found[name] for name in pictures):
                    continue
                try:
                    for name in (*scores, *numbers):
                        found[name] = number(found[name])
                except ValueError:
                    self.malformed.append(f"{place}: {name} is {found[name][:40]!r}, not a number")
                    continue
                for name in scores:
                    self.check_scale(found[name], place)
                yield found

    def _parsed(self, reader: Any) -> Iterator[list[str]]:
        while True:
            try:
                yield next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                self.rows += 1
                self.malformed.append(f"line {reader.line_num}: {error}")

    def check_scale(self, score: float, place: str) -> None:
        """Raises ConfigError when the score lies outside of the scale."""
        low, high = self.scale
        if not low <= score <= high:
            remedy = ("correct the file" if type(self).scale else "give the true one as --scale LOWEST,HIGHEST")
            raise ConfigError(f"{place}: the score {score:g} is outside of the scale {_words(self.scale)}; "
                              f"{remedy}")

    def lines(self, path: Path) -> Iterator[tuple[str, list[str]]]:
        """("FILE, line N", the words) of each line that is not empty."""
        with _reading(path), open(path, encoding="utf-8-sig", errors="replace") as stream:
            for count, line in enumerate(stream, 1):
                words = line.split()
                if words:
                    yield f"{path.name}, line {count}", words

    def json(self, path: Path) -> Any:
        """The value in a JSON file. Raises ConfigError when it holds none."""
        with _reading(path):
            try:
                return json.loads(path.read_bytes())
            except (ValueError, RecursionError) as error:
                raise ConfigError(f"{path} is not JSON: {error}; fetch it again") from None

    def parted(self, keys: Iterable[str], shares: Sequence[float] | None = None) -> dict[str, str]:
        """key -> split, in exact shares of the keys; whoever draws from the same keys draws the same."""
        order = sorted(set(keys), key=lambda key: hashlib.sha256(
            f"{SEED}:{key}".encode("utf-8", "backslashreplace")).digest())
        train, validation, _ = shares or self.shares
        first, second = round(train * len(order)), round((train + validation) * len(order))
        return {key: SPLITS[(place >= first) + (place >= second)] for place, key in enumerate(order)}


class _reading:
    """Turns the errors of opening and reading a label file into one sentence."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, OSError):
            raise ConfigError(f"{self.path} cannot be read: {error.strerror or error}; check --source"
                              ) from None


def inside(name: str) -> str:
    """The name of a file relative to a folder in one way of writing it: `a.jpg` for `./a.jpg` and `b/../a.jpg`.

    Raises:
      ValueError: it is empty, absolute, or leads out of the folder.
    """
    plain = posixpath.normpath(name)
    if not name.strip() or plain == "." or posixpath.isabs(plain) or plain.split("/")[0] == ".." or "\0" in plain:
        raise ValueError(f"{name[:200]!r} is no picture inside of the folder; give its path relative to that")
    return plain


def number(text: str) -> float:
    """A finite number. Raises ValueError."""
    value = float(text)
    if not math.isfinite(value) or "_" in text:
        raise ValueError(f"{text} is not finite")
    return value


def rated(ratings: Mapping[str, float]) -> dict[str, Any]:
    """The label of ratings by person: `ratings`, their mean `score` and population standard deviation `spread`."""
    return {**averaged(list(ratings.values())), "ratings": dict(ratings)}


def averaged(scores: Sequence[float], weights: Sequence[float] | None = None) -> dict[str, float]:
    """Mean `score` and, of more than one, the population standard deviation `spread`; weights are counts."""
    weights = weights or [1.0] * len(scores)
    total = sum(weights)
    mean = sum(score * weight for score, weight in zip(scores, weights, strict=True)) / total
    label = {"score": round(mean, 6)}
    if total > 1:
        variance = sum(weight * (score - mean) ** 2 for score, weight in zip(scores, weights, strict=True)) / total
        label["spread"] = round(math.sqrt(variance), 6)
    return label


def _words(values: Sequence[float]) -> str:
    return ",".join(f"{value:g}" for value in values)


def _is_text(value: str) -> bool:
    """Whether it was UTF-8 in the file."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True
