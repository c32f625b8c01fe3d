"""A config in; a page that shows what a process learns from, out: pictures as the model sees them, edits and grades,
the text with its learned tokens marked, and the composition of the mixture.

"""

from __future__ import annotations

import base64
import collections
import io
import pathlib
import re
from typing import Any

import jinja2
import numpy as np
from PIL import Image

from calm_jax import config as config_lib
from calm_jax import files, recipes
from calm_jax.data import attributes, builders, pipeline
from calm_jax.data.samples import ImageRef
from calm_jax.errors import ConfigError, nearest
from calm_jax.text import chat as chat_lib

LEARN, MASKED, CHIP, PLAIN = "learn", "masked", "chip", ""


def page(config: config_lib.Config, name: str, *, split: str, shown: int, title: str) -> str:
    """The page of process `name`.

    Args:
      shown: rows that are shown in full; the composition is counted over a whole block of rows.

    Raises:
      ConfigError: there is no such process or dataset.
    """
    if name not in config.processes:
        raise ConfigError(f"the config has no process {name!r}{nearest(name, config.processes)}")
    process = config.processes[name]
    datasets = {dataset: builders.load(dataset, config.data.dir) for dataset in process.datasets}
    rows = pipeline.Rows(process, datasets, chat_lib.load(config.tokenizer, config.chat), config.model,
                         seed=config.seed, split=split)
    planned = [rows.plan(number) for number in range(pipeline.BLOCK)]
    texts = [(example, encoded) for row in planned
             for example, (_, encoded) in zip(row.examples, row.texts, strict=True)]
    keys = [(process.datasets[example.source], example.task) for example, _ in texts]
    counts, learned = collections.Counter(keys), collections.Counter()
    for key, (_, encoded) in zip(keys, texts, strict=True):
        learned[key] += len(encoded.places)
    mixture = [{"dataset": key[0], "task": key[1], "weight": weight, "count": counts[key],
                "share": counts[key] / len(texts), "learned": learned[key]} for key, weight in process.mixture.items()]
    row = process.row
    used = np.sum([(len(e.tokens), len(e.images), len(e.places)) for _, e in texts], 0) / len(planned)
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(pathlib.Path(__file__).with_name("samples.html").read_text())
    return template.render(
        process=name, config=title, split=split, seed=config.seed, size=rows.size, mixture=mixture, rows=len(planned),
        tokens=row.tokens, images=row.images, answers=row.answers, per_row=len(texts) / len(planned),
        fill=dict(zip(("tokens", "images", "answers"), used / (row.tokens, row.images, row.answers), strict=True)),
        refused=sum(one.refused for one in planned),
        shown=[_row(rows, number, planned[number]) for number in range(min(shown, len(planned)))])


def _row(rows: pipeline.Rows, number: int, planned: pipeline.Planned) -> dict[str, Any]:
    arrays = rows.pack(planned)
    samples, image = [], 0
    for segment, (sample, encoded) in enumerate(planned.texts, 1):
        count = len(encoded.images)
        samples.append({
            "name": sample.name, "target": sample.target, "pieces": _pieces(rows, arrays, segment, image),
            "pictures": [{"src": _uri(arrays["images"][image + slot]), "caption": _caption(ref)}
                         for slot, ref in enumerate(encoded.images)],
            "why": _masked(arrays, segment, sample, encoded)})
        image += count
    return {"number": number, "samples": samples, "used": int((arrays["segments"] > 0).sum()), "pictures": image}


def _pieces(rows: pipeline.Rows, arrays: dict[str, np.ndarray], segment: int, image: int) -> list[dict[str, str]]:
    """The text of a conversation in stretches of one kind, with a chip for each mention of a picture's part."""
    weights = dict(zip(arrays["places"].tolist(), arrays["weights"], strict=True))
    labels = dict(zip(arrays["places"].tolist(), arrays["labels"], strict=True))
    asked = {int(place) for place, label in zip(arrays["places"], arrays["labels"], strict=True) if label.any()}
    part_of = {first + offset: part for part, (first, count) in rows.layout.spans.items() for offset in range(count)}
    found: list[dict[str, str]] = []
    positions = np.flatnonzero(arrays["segments"] == segment)
    for place in positions:
        visual = int(arrays["visual"][place])
        if visual >= 0:
            slot, offset = divmod(visual, rows.layout.size)
            part = part_of[offset]
            text = f"picture {slot - image + 1}: {part} ({rows.layout.spans[part][1]})"
            if not found or found[-1]["text"] != text:
                found.append({"kind": CHIP, "text": text, "title": ""})
            continue
        before = int(place) - 1
        kind, title = PLAIN, ""
        if before in asked and arrays["segments"][max(before, 0)] == segment:
            kind = LEARN if weights[before].any() else MASKED
            if kind == LEARN and (weights[before] > 0).sum() > 1:
                title = "  ".join(f"{rows.chat.tokenizer.pieces([token])[0]} {weight:.2f}" for token, weight
                                  in zip(labels[before], weights[before], strict=True) if weight > 0)
        text = _spelled(rows.chat.tokenizer.pieces([arrays["tokens"][place]])[0])
        if found and found[-1]["kind"] == kind and not title and not found[-1]["title"] and kind != CHIP:
            found[-1]["text"] += text
        else:
            found.append({"kind": kind, "text": text, "title": title})
    return found


def _spelled(piece: str) -> str:
    """A piece of the vocabulary as text: word boundaries are spaces, bytes below 128 their characters."""
    byte = re.fullmatch(r"<0x([0-7][0-9A-F])>", piece)
    return chr(int(byte[1], 16)) if byte else piece.replace("\u2581", " ")


def _masked(arrays: dict[str, np.ndarray], segment: int, sample, encoded) -> str:
    """Which turns are not learned from, although they have an answer."""
    inside = arrays["segments"][arrays["places"]] == segment
    weights = arrays["weights"][inside][:len(encoded.places)]
    lost = sorted({sample.turns[turn].subject for turn, weight in zip(encoded.turns, weights, strict=False)
                   if not weight.any()})
    return f"not learned from: {', '.join(lost)} (its edit changes nothing visible here)" if lost else ""


def _caption(ref: ImageRef) -> str:
    edits = [f"{edit.attribute}: {attributes.get(edit.attribute).grades[edit.grade]}" for edit in ref.edits]
    return f"record {ref.index}" + (f" \u00b7 {', '.join(edits)}" if edits else " \u00b7 untouched")


def _uri(pixels: np.ndarray) -> str:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=92)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def run(recipe: recipes.Recipe, *, process: str, split: str, rows: int, out: str) -> None:
    """Writes the page of a process of a recipe, by default of its first.

    Raises:
      ConfigError: see `page`; or `out` is there and was not written by this program.
    """
    place = files.output(out, ours=files.page)
    name = process or next(iter(recipe.config.run))
    files.write(place, page(recipe.config, name, split=split, shown=rows, title=recipe.given))
    print(f"samples: {place}")
