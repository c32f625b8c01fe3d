"""Workdirs with metrics.jsonl and results of calm_jax.evaluate in; one self-contained HTML page out.

Everything is inside the file: style, pictures (data URIs) and curves (SVG), so that it opens anywhere, offline. What
is shown is computed here, how it looks stands in report.html; the pictures are drawn from the whole split at even
distances, never chosen by how well they were answered.
"""

from __future__ import annotations

import base64
import dataclasses
import datetime
import functools
import importlib.metadata
import importlib.resources
import io
import json
import math
import os
import pathlib
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

import calm_jax
from calm_jax import config as config_lib
from calm_jax import files
from calm_jax.data import attributes, builders, images
from calm_jax.data.samples import Dataset, Edit, ImageRef
from calm_jax.data.scale import HIGHEST, LOWEST, read_score
from calm_jax.errors import ConfigError
from calm_jax.evaluation import plots

CARDS, PAIRS, QUESTIONS = 12, 6, 4  # pictures in the gallery, comparisons behind it, questions on a card
SHARP = 192  # least side, pixels, at which a picture is drawn: small encoders see less than is pleasant to look at
QUALITY = 93  # of the page's JPEGs, well above what `compression` calls visible


@dataclasses.dataclass(frozen=True)
class Command:
    """A command that was run for the page: what it is for, the line itself, and how long it took in all."""

    title: str
    line: str
    seconds: float | None = None


def write(out: str | os.PathLike, *, workdirs: Mapping[str, str | os.PathLike], results: Sequence[Mapping[str, Any]],
          title: str, lead: str = "", notes: Sequence[str] = (), commands: Sequence[Command] = (),
          seconds: float | None = None, truth: str = "true") -> pathlib.Path:
    """Writes the page and returns its path.

    Args:
      workdirs: name -> folder with config.json and metrics.jsonl; those trained on shuffled labels are recognised by
        their config and drawn beside the others.
      results: what `calm_jax.evaluate` returns or writes: attributes, scoring, commenting, each at most once; a part
        of the page whose result is missing is left out.
      lead: one sentence that says what this is.
      notes: sentences a reader must know before believing anything.
      commands: how to reproduce it.
      seconds: how long everything took; less than the sum of the commands where some ran side by side.
      truth: the word for where the true scores come from, such as `composed`.

    Raises:
      ConfigError: the packages that draw the page are not installed, or a dataset is unknown.
    """
    try:
        import jinja2
        import matplotlib  # noqa: F401  (fails here rather than half way)
    except ImportError as error:
        raise ConfigError(f"the report needs {error.name}; run: pip install calm_jax[demo]") from None
    found = {result["task"]: result for result in results}
    runs = [_Run(name, pathlib.Path(folder)) for name, folder in workdirs.items()]
    sizes = [run.config["model"]["encoder"]["image_size"] for run in runs if run.config]
    painter = _Painter(max(SHARP, *sizes) if sizes else SHARP,
                       {result["dataset"]: result.get("data_dir", "") for result in results})
    asked = found.get("attributes")
    page = {
        "title": title, "lead": lead, "notes": notes, "commands": commands, "truth": truth,
        "facts": facts(runs, seconds),
        "split": next((result["split"] for result in results), ""),
        "gallery": gallery(found, painter),
        "named": comments_in_figures(found.get("commenting")),
        "attributes": attribute_groups(asked["table"]) if asked else None,
        "photographs": sorted({answer["group"] for answer in asked["answers"]}) if asked else [],
        "scores": scores(found.get("scoring"), truth),
        "curves": curves(runs),
        "pairs": pairs(asked, painter),
        "models": {task: _answering(result) for task, result in found.items()},
        "configs": {run.name: json.dumps(run.config, indent=1) for run in runs if run.config},
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True,
                                     undefined=jinja2.StrictUndefined)
    environment.filters |= {"figure": figure, "percent": percent, "duration": duration}
    template = importlib.resources.files(__package__).joinpath("report.html").read_text(encoding="utf-8")
    out = pathlib.Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    files.write(out, environment.from_string(template).render(page))
    return out


def _answering(result: Mapping[str, Any]) -> str:
    """The model of a result, and which process of it was asked where its path leaves that open."""
    model, process = result["model"], pathlib.PurePath(result.get("checkpoint", "")).parent.name
    return f"{model} (process {process})" if process and process not in pathlib.PurePath(model).parts else model


# ---- figures as words ------------------------------------------------------------------------------------------------


def finite(value: Any) -> float | None:
    """The number, or None for null, nan and infinity."""
    return float(value) if isinstance(value, (int, float)) and math.isfinite(value) else None


def figure(value: Any, form: str = ".3f") -> str:
    """A number, or an interval of two, as text; a dash for what is not finite."""
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(figure(item, form) for item in value) + "]"
    return "–" if finite(value) is None else format(float(value), form).replace("-", "−")


def percent(value: Any, form: str = ".0f") -> str:
    """A share as percent, or an interval of them in percentage points."""
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(percent(item, form) for item in value) + "]"
    return "–" if finite(value) is None else format(100 * float(value), form).replace("-", "−")


def duration(seconds: float | None) -> str:
    """`75 s` or `12 min 30 s`; a dash for None."""
    if finite(seconds) is None:
        return "–"
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:02.0f} s"


# ---- what was run ----------------------------------------------------------------------------------------------------


class _Run:
    """A workdir as the page needs it: its config and the finite records of its metrics."""

    def __init__(self, name: str, folder: pathlib.Path):
        self.name = name
        path = folder / "config.json"
        self.config = json.loads(path.read_text()) if path.is_file() else None
        self.records = []
        path = folder / "metrics.jsonl"
        for line in path.read_text().splitlines() if path.is_file() else ():
            try:
                self.records.append(json.loads(line))
            except ValueError:  # the last line of a run that is being written
                continue

    @property
    def processes(self) -> list[str]:
        seen = dict.fromkeys(record["process"] for record in self.records)
        return [name for name in (self.config["run"] if self.config else seen) if name in seen]

    def shuffled(self, process: str) -> bool:
        return bool(self.config and self.config["processes"][process]["shuffle_labels"])

    def series(self, process: str, kind: str, value: str) -> tuple[np.ndarray, np.ndarray]:
        """(steps, values) of a metric, in which no value is missing or infinite."""
        points = [(record["step"], record.get(value)) for record in self.records
                  if (record["process"], record["kind"]) == (process, kind)]
        points = [(step, number) for step, number in points if finite(number) is not None]
        return np.asarray([p[0] for p in points], float), np.asarray([p[1] for p in points], float)


def facts(runs: Sequence[_Run], seconds: float | None) -> list[tuple[str, str]]:
    """When, where, with what and how long, as (name, text)."""
    versions = []
    for package in ("jax", "flax"):
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"{package} (not installed)")
    trained = []
    for run in runs:
        for process in run.processes:
            steps, _ = run.series(process, "train", "loss")
            if len(steps):
                label = " on shuffled labels" if run.shuffled(process) else ""
                trained.append(f"{process}{label}, {int(steps[-1])} steps")
    rows = [
        ("written", datetime.datetime.now(datetime.UTC).strftime("%d %B %Y, %H:%M UTC")),
        ("trained", "; ".join(trained)),
        ("machine", f"{_cores()} CPU cores, {platform.system()} {platform.machine()}"),
        ("software", ", ".join([f"calm_jax {calm_jax.__version__}", *versions, f"Python {platform.python_version()}"])),
        ("time", f"{duration(seconds)} for all commands below" if seconds is not None else ""),
    ]
    return [(name, text) for name, text in rows if text]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---- pictures --------------------------------------------------------------------------------------------------------


class _Painter:
    """Pictures of results as data URIs, datasets loaded once."""

    def __init__(self, size: int, places: Mapping[str, str]):
        self.size = size
        self._dataset = functools.cache(lambda name: builders.load(name, places.get(name, "")))

    def dataset(self, name: str) -> Dataset:
        return self._dataset(name)

    def picture(self, name: str, image: Mapping[str, Any]) -> dict[str, Any]:
        """`uri`, `edits` in words, and `size`, of an image of a result of dataset `name`."""
        ref = _ref(image)
        pixels = images.render(self.dataset(name).pixels(ref.index), ref, self.size)
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=QUALITY, subsampling=0)
        uri = "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
        return {"uri": uri, "edits": [edit_words(edit) for edit in ref.edits], "size": self.size}


def _ref(image: ImageRef | Mapping[str, Any]) -> ImageRef:
    if isinstance(image, ImageRef):
        return image
    return ImageRef(image["index"], tuple(image["window"]) if image.get("window") else None,
                    tuple(Edit(**edit) for edit in image.get("edits", ())))


def edit_words(edit: Edit) -> str:
    """`sharpness: blurred`."""
    return f"{edit.attribute}: {attributes.get(edit.attribute).grades[edit.grade]}"


def spread(items: Sequence[Any], count: int) -> list[Any]:
    """At most `count` items at even distances, first and last among them."""
    if len(items) <= count:
        return list(items)
    return [items[place] for place in np.linspace(0, len(items) - 1, count).round().astype(int)]


def gallery(found: Mapping[str, Mapping[str, Any]], painter: _Painter) -> list[dict[str, Any]]:
    """Cards of at most CARDS records: picture, comment, score, and questions about another version of the picture."""
    by_task = {task: {answer["key"]: answer for answer in found[task]["answers"]}
               for task in ("scoring", "commenting") if task in found}
    questions: dict[str, list[dict[str, Any]]] = {}
    for answer in found["attributes"]["answers"] if "attributes" in found else ():
        if answer["kind"] == "grade":
            questions.setdefault(answer["key"], []).append(answer)
    shown = next((found[task] for task in ("commenting", "scoring", "attributes") if task in found), None)
    if shown is None:
        return []
    cards = []
    for key in spread(list(dict.fromkeys(answer["key"] for answer in shown["answers"])), CARDS):
        comment, score = (by_task.get(task, {}).get(key) for task in ("commenting", "scoring"))
        card: dict[str, Any] = {"key": key, "picture": None, "comment": None, "score": None, "asked": None}
        opinion = comment or score
        if opinion:
            card["picture"] = painter.picture(shown["dataset"], opinion["images"][0])
        if comment:
            hit, missed, invented = named(comment)
            card["comment"] = {"text": comment["text"], "true": comment["true"], "question": comment["question"],
                               "hit": [edit_words(edit) for edit in hit],
                               "missed": [edit_words(edit) for edit in missed],
                               "invented": [edit_words(edit) for edit in invented]}
        if score:
            card["score"] = _score_marks(score)
        if key in questions:
            card["asked"] = _asked(found["attributes"]["dataset"], questions[key], painter)
        cards.append(card)
    return cards


def _score_marks(answer: Mapping[str, Any]) -> dict[str, Any]:
    def place(value):
        return None if value is None else 100 * (value - LOWEST) / (HIGHEST - LOWEST)

    said, true = read_score(answer["said"] or ""), read_score(answer["true"])
    return {"said": said, "true": true, "text": answer["text"], "said_at": place(said), "true_at": place(true)}


def _asked(dataset: str, answers: Sequence[Mapping[str, Any]], painter: _Painter) -> dict[str, Any]:
    """The questions about the first version of a record that was asked about, which were put to one picture."""
    version = answers[0]["images"]
    same = [answer for answer in answers if answer["images"] == version]
    return {"picture": painter.picture(dataset, version[0]), "more": max(len(same) - QUESTIONS, 0),
            "answers": [_answer(answer) for answer in same[:QUESTIONS]]}


def _answer(answer: Mapping[str, Any]) -> dict[str, Any]:
    true, said = answer["true"], answer["said"]
    if answer["kind"] == "grade":
        grades = attributes.get(answer["subject"]).grades
        true = grades[int(true)]
        said = grades[int(said)] if said else ""
    return {"subject": answer["subject"], "question": answer["question"], "text": answer["text"],
            "right": answer["said"] == answer["true"], "true": true, "said": said}


def named(answer: Mapping[str, Any]) -> tuple[list[Edit], list[Edit], list[Edit]]:
    """The degradations of a picture that a comment names in the right grade, those it does not, and invented ones.

    Only known phrasings count; a comment that paraphrases gets no credit.
    """
    done, stated = list(_ref(answer["images"][0]).edits), _stated(answer["text"])
    hit = [edit for edit in done if (edit.attribute, edit.grade) in stated]
    invented = sorted(stated - {(edit.attribute, edit.grade) for edit in done})
    return hit, [edit for edit in done if edit not in hit], [Edit(name, grade) for name, grade in invented]


@functools.lru_cache(maxsize=4096)
def _stated(text: str) -> frozenset[tuple[str, int]]:
    """The degradations that a comment names, as attribute and grade."""
    stated = set()
    for sentence in re.split(r"(?<=[.!?])\s+", text.strip()):
        for name, attribute in attributes.ATTRIBUTES.items():
            grade = attributes.grade_of(name, sentence)
            if grade is not None and grade != attribute.neutral:
                stated.add((name, grade))
    return frozenset(stated)


def comments_in_figures(result: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How many degradations there were, were named and were invented, over all comments of a result; and `elsewhere`,
    how many would be named on average by comments about other photographs in the place of the right ones, None where
    there are none."""
    if result is None:
        return None
    answers = result["answers"]
    sums = np.sum([[len(part) for part in named(answer)] for answer in answers] or [[0, 0, 0]], axis=0)
    done = [{(edit.attribute, edit.grade) for edit in _ref(answer["images"][0]).edits} for answer in answers]
    elsewhere = []
    for answer, edits in zip(answers, done, strict=True):
        others = [len(edits & _stated(other["text"])) for other in answers if other["group"] != answer["group"]]
        elsewhere += [np.mean(others)] if others else []
    return {"done": int(sums[0] + sums[1]), "hit": int(sums[0]), "invented": int(sums[2]), "n": len(answers),
            "distinct": len({answer["text"] for answer in answers}),
            "elsewhere": float(np.sum(elsewhere)) if elsewhere else None}


def pairs(result: Mapping[str, Any] | None, painter: _Painter) -> list[dict[str, Any]]:
    """At most PAIRS comparisons at even distances, with both pictures."""
    comparisons = [answer for answer in result["answers"] if answer["kind"] == "comparison"] if result else []
    return [_answer(answer) | {"key": answer["key"],
                               "pictures": [painter.picture(result["dataset"], image) for image in answer["images"]]}
            for answer in spread(comparisons, PAIRS)]


# ---- the table -------------------------------------------------------------------------------------------------------


# Of accuracy, over what can be had without looking at the photograph in question.
GAINS = {"gain": "majority", "elsewhere_gain": "other photographs", "control_gain": "control"}


def attribute_groups(table: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rows of `protocols.attribute_table` by kind of question and level, each with its whiskers in percent of a
    common axis; and how many of them lie above zero."""
    scales = {name: _axis([row.get(f"{name}_interval") for row in table]) for name in GAINS}
    absent = dict.fromkeys([*GAINS, *(f"{name}_interval" for name in GAINS)])  # in rows of one photograph alone
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in table:
        whiskers = {name: _whisker(row.get(name), row.get(f"{name}_interval"), scale)
                    for name, scale in scales.items()}
        photographs = sorted((name, percent(share)) for name, share in row.get("photographs", {}).items())
        groups.setdefault((row["kind"], row["level"]), []).append(
            {**absent, **row, "whiskers": whiskers, "photographs": photographs})
    order = sorted(groups, key=lambda key: (key[0] != "grade", config_lib.PARTS.index(key[1])))
    rows = [row for key in order for row in groups[key]]
    return {"groups": [(kind, level, groups[kind, level]) for kind, level in order], "rows": len(rows),
            "gains": [name for name in GAINS if any(name in row for row in table)], "scales": scales,
            "over": GAINS,
            "above": {name: {kind: sum(row["whiskers"][name]["verdict"] == "above" for row in rows
                                       if row["kind"] == kind) for kind in ("grade", "comparison")}
                      for name in scales},
            "kinds": {kind: sum(row["kind"] == kind for row in rows) for kind in ("grade", "comparison")}}


def _axis(intervals: Iterable[Any]) -> tuple[float, float]:
    """An axis in tenths that holds zero and every finite end of an interval."""
    ends = [end for pair in intervals for end in pair or () if finite(end) is not None]
    return min([-0.1, *(math.floor(10 * end) / 10 for end in ends)]), max(
        [0.1, *(math.ceil(10 * end) / 10 for end in ends)])


def _whisker(value: Any, interval: Any, scale: tuple[float, float]) -> dict[str, Any]:
    def place(number):
        return None if finite(number) is None else 100 * (number - scale[0]) / (scale[1] - scale[0])

    low, high = interval or (None, None)
    verdict = ""
    if finite(low) is not None and finite(high) is not None:
        verdict = "above" if low > 0 else "below" if high < 0 else ""
    return {"at": place(value), "low": place(low), "high": place(high), "zero": place(0.0), "verdict": verdict}


# ---- plots -----------------------------------------------------------------------------------------------------------


def curves(runs: Sequence[_Run]) -> list[dict[str, Any]]:
    """One panel a process: loss, token accuracy and learning rate; runs on shuffled labels beside their namesakes."""
    panels = []
    for run in runs:
        for process in run.processes:
            if run.shuffled(process) and any(process in other.processes and not other.shuffled(process)
                                             for other in runs):
                continue
            lines = [("", run, plots.BLUE)] + [("control: ", other, plots.ORANGE) for other in runs
                                         if other is not run and process in other.processes and other.shuffled(process)]
            name = f"{run.name} {process}"
            last = run.series(process, "validation", "loss")[1], run.series(process, "validation", "accuracy")[1]
            panels.append({
                "process": process, "run": run.name, "controlled": len(lines) > 1,
                "loss": float(last[0][-1]) if len(last[0]) else None,
                "accuracy": float(last[1][-1]) if len(last[1]) else None,
                "plots": [plots.plot(f"{name} loss",
                                     functools.partial(_draw, lines, process, "loss", "loss (nats a token)")),
                          plots.plot(f"{name} accuracy",
                                     functools.partial(_draw, lines, process, "accuracy", "token accuracy")),
                          plots.plot(f"{name} rate", functools.partial(_draw_rate, run, process))]})
    return panels


def _draw(lines, process, value, label, axes) -> None:
    for prefix, run, colour in lines:
        steps, values = run.series(process, "train", value)
        if len(steps):
            axes.plot(steps, values, color=colour, alpha=0.28, linewidth=0.8)
            axes.plot(steps, plots.smooth(values), color=colour, linewidth=1.6, label=f"{prefix}train, smoothed")
        steps, values = run.series(process, "validation", value)
        if len(steps):
            axes.plot(steps, values, "o", color=colour, markersize=5, markeredgecolor=plots.INK, markeredgewidth=0.6,
                      label=f"{prefix}validation")
    if value == "accuracy":
        axes.set_ylim(0, 1)
    else:
        axes.set_ylim(bottom=0)
    axes.set_title(label, loc="left", fontsize=9.5)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="lower right" if value == "accuracy" else "upper right")


def _draw_rate(run, process, axes) -> None:
    steps, values = run.series(process, "train", "lr")
    axes.plot(steps, 1e3 * values, color=plots.VIOLET, linewidth=1.6)
    axes.set_ylim(bottom=0)
    axes.set_title("learning rate, thousandths", loc="left", fontsize=9.5)
    axes.set_xlabel("step")
    axes.xaxis.get_major_locator().set_params(integer=True)


READ = {"text": "read from the words of the answer",
        "expectation": "the mean of all decimals by the model's own probabilities of saying them",
        "levels": "the mean of five words from bad to excellent by the model's own probabilities of saying them",
        "head": "the regression head's", "light": "the light head's, which reads the visual tokens alone"}


def scores(result: Mapping[str, Any] | None, truth: str) -> dict[str, Any] | None:
    """The scatter plot and the table of a scoring result."""
    if result is None:
        return None
    points: dict[str, list[tuple[float, float]]] = {}
    for answer in result["answers"]:
        said, true = read_score(answer["said"] or ""), read_score(answer["true"])
        if said is not None and true is not None:
            points.setdefault(answer["group"], []).append((true, said))

    def draw(axes):
        axes.plot([LOWEST, HIGHEST], [LOWEST, HIGHEST], color=plots.GREY, linewidth=1, linestyle="--")
        colours = (plots.BLUE, plots.ORANGE, plots.GREEN, plots.VIOLET)
        for (name, pairs_), colour, mark in zip(sorted(points.items()), colours * 100, "osD^" * 100, strict=False):
            # More than a few photographs are points of one kind: a legend of a thousand names helps nobody.
            few = len(points) <= 4
            axes.plot(*np.asarray(pairs_).T, mark if few else "o", color=colour if few else plots.BLUE, alpha=0.7,
                      markersize=5, markeredgewidth=0, label=name if few else None)
        axes.set(xlim=(LOWEST, HIGHEST), ylim=(LOWEST, HIGHEST), xlabel=f"{truth} score", ylabel="score the model said")
        axes.set_aspect("equal")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="upper left", handletextpad=0.1)

    table = result["table"]
    names = (("plcc", "PLCC", "linear correlation"), ("srcc", "SRCC", "rank correlation"),
             ("mae", "MAE", "mean absolute error, points"))
    return {"plot": plots.plot("scores", draw, width=4.6, height=4.4), "n": table["n"],
            "failures": table["parse_failures"], "read": READ[result["reader"]],
            "distinct": len({said for pairs_ in points.values() for _, said in pairs_}),
            "rows": [(name, meaning, table.get(key), table.get(f"{key}_interval")) for key, name, meaning in names]}
