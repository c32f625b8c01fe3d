"""Photos and a checkpoint in; scores, comments, suggestions, attributes or a personal verdict, a row a photo, out.

Photos that cannot be read are reported and harm nothing. With an output file, what is known is kept beside it in
FILE.journal at once: the same command goes on where it was stopped, and looks only at new photos later.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import os
import pathlib
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tqdm

from calm_jax import files, terminal
from calm_jax.commands.predict import output
from calm_jax.commands.predict.gather import gather
from calm_jax.commands.predict.journal import Journal, Row, stamp
from calm_jax.commands.predict.ratings import read_ratings
from calm_jax.data.scale import READERS, checked
from calm_jax.errors import ConfigError
from calm_jax.terminal import shown


@dataclasses.dataclass(frozen=True)
class Verb:
    """What can be asked for.

    Attributes:
      columns: of the results, in order; None = whatever the rows hold.
      options: those that change its answers.
      ask: (model, count, pixels, the options' values) -> what is known of each picture.
    """

    columns: tuple[str, ...] | None
    options: tuple[str, ...]
    ask: Callable[..., Iterator[Row]]


def _score(model, count, pixels, given) -> Iterator[Row]:
    for score in model.scores(count, pixels, reader=given["reader"], scale=given["scale"]):
        yield _scored(score) | ({"said": score.text} if given["reader"] == "text" else {})


def _personalise(model, count, pixels, given) -> Iterator[Row]:
    for score in model.personal(given["rated"], count, pixels, scale=given["scale"], method=given["method"],
                                shots=given["shots"]):
        yield _scored(score)


def _scored(score) -> Row:
    return {"score": _number(score.value), "spread": _number(score.spread)}


def _number(value: float) -> float | None:
    return round(value, 6) if math.isfinite(value) else None


def _comment(model, count, pixels, given) -> Iterator[Row]:
    from calm_jax.api import comment_on
    for text in model.texts(count, pixels, comment_on(given["aspect"]), limit=given["tokens"],
                            sampling=given["sampling"]):
        yield {"comment": text}


def _suggest(model, count, pixels, given) -> Iterator[Row]:
    from calm_jax.data.tasks import instructions
    for text in model.texts(count, pixels, instructions.SUGGEST[0], limit=given["tokens"], sampling=given["sampling"]):
        yield {"suggestion": text}


def _attributes(model, count, pixels, given) -> Iterator[Row]:
    for judged in model.judged(count, pixels):
        yield {name: answer.grade or answer.text for name, answer in judged.items()}


TEXTS = ("tokens", "sampling")
VERBS = {
    "score": Verb(("score", "spread"), ("reader", "scale"), _score),
    "comment": Verb(("comment",), ("aspect", *TEXTS), _comment),
    "suggest": Verb(("suggestion",), TEXTS, _suggest),
    "attributes": Verb(None, (), _attributes),
    "personalise": Verb(("score", "spread"), ("scale", "method", "shots", "rated"), _personalise),
}


# Of the options that a verb does not have.
ABSENT = {"reader": READERS[0], "scale": ["1", "10"], "ratings": "", "user": "", "method": "", "shots": 0, "aspect": "",
          "tokens": 128, "temperature": 0.0, "top_p": 1.0, "beams": 1, "seed": 0, "top_k": 0, "min_score": None,
          "sort": None, "copy_to": ""}


def run(name: str, places: Sequence[str], **options: Any) -> int:
    """Asks a model about photos, shows or writes the results, and returns an exit code.

    Args:
      name: of a verb, one of VERBS.
      places: files, folders, globs, or `-`.
      options: as `calm_jax.cli` declares them for this verb.

    Raises:
      ConfigError, CheckpointError: what was asked for is wrong, or there is no such model.
    """
    values = {**ABSENT, **options}
    _check(values)
    small = [str(output.thumbnails(pathlib.Path(values["out"])))] if values["out"] else []
    paths = gather(places, sys.stdin, [*small, *([values["copy_to"]] if values["copy_to"] else [])])
    out = _place(values["out"], values["format"] == "html")
    if values["copy_to"]:
        files.folder(values["copy_to"], "--copy-to")

    from calm_jax.api import Model  # JAX starts here: wrong use is answered before
    from calm_jax.data.tasks import skills
    from calm_jax.inference.decoding import Sampling
    from calm_jax.training.startup import keep_programs
    keep_programs()
    verb = VERBS[name]
    rated = read_ratings(values["ratings"], values["user"], values["scale"]) if values["ratings"] else []
    given = values | {"scale": tuple(map(float, values["scale"])), "sampling": Sampling(
        values["temperature"], values["top_p"], values["beams"], seed=values["seed"]), "rated": rated}
    model = Model(values["checkpoint"], batch=values["batch"], process=values["process"],
                  say=lambda line: print(line, file=sys.stderr, flush=True))
    skill = skills.for_reader(given["reader"]) if name == "score" else name
    one = model.seeing() if given["method"] == "ridge" else model.loaded(skill)
    asked = {"verb": name, **one.identity}
    for option in verb.options:
        value = given[option]
        if option == "rated":  # a picture counts as the same while its size and time of change are
            value = [(path, score, *stamp(path)) for path, score in value]
        asked |= dataclasses.asdict(value) if dataclasses.is_dataclass(value) else {option: value}
    journal = Journal(_journal(out), asked)
    try:
        with _interruptible():
            _look(model, verb, given, journal, paths, out if values["format"] == "html" else None)
    except KeyboardInterrupt:
        done = len(paths) - len(journal.missing(paths))
        remedy = "goes on from there" if out else "could go on from there if it had an --out"
        print(f"error: interrupted after {done:,} of {len(paths):,} pictures; the same command {remedy}",
              file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    finally:
        journal.close()
    rows = [journal.rows[path] for path in paths]
    bad = [row for row in rows if "error" in row]
    chosen = _chosen(rows, values)
    columns = verb.columns or tuple(dict.fromkeys(key for row in rows for key in row
                                                  if key not in ("path", "error", *output.HIDDEN)))
    if name == "score" and given["reader"] == "text":
        columns = ("score", "said")
    title = f"{name}: {len(chosen):,} of {len(rows):,} pictures"
    _write(chosen, columns, values["format"], out, title, given["scale"])
    if values["copy_to"]:
        copied = output.copy([row for row in chosen if "error" not in row], pathlib.Path(values["copy_to"]))
        print(f"copied {copied:,} pictures to {values['copy_to']}", file=sys.stderr)
    if bad:
        print(f"{len(bad):,} of {len(rows):,} pictures could not be read:", file=sys.stderr)
        for row in bad:
            print(f"  {shown(row['error'])}", file=sys.stderr)
    if out:
        print(f"written to {out}", file=sys.stderr)
    return 1 if len(bad) == len(rows) else 0


def _check(values: dict[str, Any]) -> None:
    """Raises ConfigError for options that cannot be, or do not go together."""
    checked(values["scale"], "--scale")
    if values["format"] == "html" and not values["out"]:
        raise ConfigError("a contact sheet is a file with small pictures beside it; name it: --out pictures.html")


def _place(out: str | None, page: bool) -> pathlib.Path | None:
    """The file of the results, if there is to be one.

    Raises:
      ConfigError: it cannot be written, or is a file that this program has not written; or there is neither a file nor
        a standard output.
    """
    if not out:
        if "stdout" in terminal.closed:
            raise ConfigError("standard output is closed; name a file for the results: --out FILE")
        return None
    place = files.output(out)
    if page and os.path.lexists(output.thumbnails(place)):
        files.folder(output.thumbnails(place), "the small pictures beside --out")
    if os.path.lexists(_journal(place)) and not _journal(place).is_file():
        raise ConfigError(f"{_journal(place)}, where results are kept, is no file; move it away, or name "
                          "another --out")
    if os.path.lexists(place) and not (place.is_file() and (_journal(place).is_file() or not place.stat().st_size)):
        raise ConfigError(f"--out {place} is there already and was not written by this program (it has no "
                          f"{_journal(place).name} beside it); name another file, or move it away")
    return place


def _journal(out: pathlib.Path | None) -> pathlib.Path | None:
    return out.with_name(out.name + ".journal") if out else None


def _look(model, verb: Verb, given: dict[str, Any], journal: Journal, paths: list[str],
          page: pathlib.Path | None) -> None:
    """Asks about every picture that the journal does not know, and writes the small pictures of a page."""
    from calm_jax.data import images, pictures
    from calm_jax.features import keys
    from calm_jax.inference.generate import Pictures
    todo = journal.missing(paths)
    known: dict[int, Row] = {}
    if page:
        small = output.thumbnails(page)
        small.mkdir(parents=True, exist_ok=True)

    def content(index: int):
        if page:  # it needs the picture itself
            return None
        known[index] = {"path": todo[index], "stamp": stamp(todo[index])}
        return keys.of_source(todo[index])

    def pixels(index: int):
        row = known[index] = {"path": todo[index], "stamp": stamp(todo[index])}
        try:
            found = pictures.read(todo[index])
            if page:
                output.thumbnail(found, small / output.thumbnail_name(row))
            return found
        except pictures.BadRecord as error:
            row["error"] = str(error)
            return images.NOTHING

    if len(todo) < len(paths):
        print(f"{len(paths) - len(todo):,} of {len(paths):,} pictures are known already", file=sys.stderr)
    with tqdm.tqdm(total=len(todo), desc="pictures", unit="picture", mininterval=0.5, disable=not todo) as bar:
        for index, answer in enumerate(verb.ask(model, len(todo), Pictures(pixels, content), given)
                                         if todo else ()):
            row = known.pop(index)
            journal.add(row if "error" in row else row | answer)
            bar.update()
    for path in paths if page else ():  # known from a run that made no page
        row = journal.rows[path]
        if "error" not in row and not (small / output.thumbnail_name(row)).exists():
            with contextlib.suppress(pictures.BadRecord):
                output.thumbnail(pictures.read(path), small / output.thumbnail_name(row))


def _chosen(rows: list[Row], values: dict[str, Any]) -> list[Row]:
    """Filtered, sorted, and no more than wanted."""
    if values["min_score"] is not None or values["top_k"]:
        rows = [row for row in rows if row.get("score") is not None
                and (values["min_score"] is None or row["score"] >= values["min_score"])]
    if values["top_k"] or values["sort"] == "score":
        rows = sorted(rows, key=lambda row: (row.get("score") is None, -(row.get("score") or 0.0), row["path"]))
    return rows[:values["top_k"]] if values["top_k"] else rows


def _write(rows, columns, form: str, out: pathlib.Path | None, title: str, scale: tuple[float, float]) -> None:
    """To a file, whole or not at all, or to standard output."""
    if out is None:
        output.FORMATS[form](rows, columns, sys.stdout)
        return
    stream = io.StringIO()
    if form == "html":
        stream.write(output.contact_sheet(rows, columns, out, title=title, scale=scale))
    else:
        output.FORMATS[form](rows, columns, stream)
    files.write(out, stream.getvalue())


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """SIGTERM is answered like Ctrl-C."""
    def stop(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
