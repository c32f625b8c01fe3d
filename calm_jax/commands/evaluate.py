"""A trained model and a dataset in; a table on the terminal, answers, figures and a plot as files out.

Of a workdir the process is measured that learned the task; the folder of a process, or a checkpoint, is measured
whatever it learned. Several stand in one table, with what others have published on that dataset.
Results go to DIR/evaluation, of several to that of the first, unless --out says otherwise. What was measured already is
not measured again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax import config as config_lib
from calm_jax import files
from calm_jax.checkpoints import lineage, locate, on_disk, restore
from calm_jax.checkpoints.meta import Saved
from calm_jax.commands.steps import result_name
from calm_jax.data import builders, cues
from calm_jax.data.samples import Dataset
from calm_jax.data.tasks import skills
from calm_jax.errors import ConfigError
from calm_jax.evaluation import charts, peers, personalised, protocols, suggesting
from calm_jax.evaluation.replies import Replies
from calm_jax.inference import choice
from calm_jax.inference.generate import Generator
from calm_jax.training.startup import keep_programs

TASKS = ("attributes", "scoring", "commenting", "suggesting", "personalised")


@dataclasses.dataclass(frozen=True)
class Options:
    """What is measured; the flags of the same names say more.

    Attributes:
      records: pictures of the split, spread evenly; 0 = all.
      control: checkpoint to compare with, or "".
      process: of a workdir that is measured, whatever it learned; "" = the one that learned the task.
      threshold: of the accuracies of scoring, on the scale 1-10.
      method: of personalised, ridge or context.
      shots, raters, shown, context: of personalised.
    """

    task: str
    dataset: str
    data_dir: str = ""
    split: str = "test"
    reader: str = "text"
    records: int = 0
    control: str = ""
    process: str = ""
    threshold: float = 5.0
    method: str = "ridge"
    shots: tuple[int, ...] = personalised.SHOTS
    raters: int = 0
    shown: str = "train"
    context: int = 0
    spice: bool | None = None

    @property
    def skill(self) -> str:
        """What it asks of a model, one of `skills.SKILLS`."""
        asked = {"commenting": "comment", "suggesting": "suggest", "personalised": "personalise"}
        return skills.for_reader(self.reader) if self.task == "scoring" else asked.get(self.task, self.task)


def evaluate(path: str, options: Options, file: pathlib.Path) -> dict[str, Any]:
    """The result of one task as JSON values: the options, `model`, its checkpoint's identity, `table`, `answers`.

    Replies of the model are kept beside `file`, where the result will be, so that an interrupted evaluation goes on.
    """
    dataset = builders.load(options.dataset, options.data_dir)
    saved, control = _found(path, options)
    asked = _asked(path, options, dataset, saved, control)
    indices = dataset.indices(options.split)
    if options.records:
        places = np.linspace(0, len(indices) - 1, min(options.records, len(indices))).round().astype(int)
        indices = indices[np.unique(places)]
    comparisons = any(task == "comparisons" for _, task in _trained(saved).mixture)
    if options.task == "attributes" and not comparisons:
        print(f"{saved.path} never learned comparisons of two pictures, and is not asked for them", file=sys.stderr)
    ask = functools.partial(_answers, options=options, dataset=dataset, indices=indices, comparisons=comparisons,
                            asked=asked)
    mine, theirs = _kept(file)
    answered = ask(saved, replies=mine)
    beside = ask(control, replies=theirs) if control and options.task in ("attributes", "suggesting") else ()
    if options.task == "attributes":
        table = protocols.attribute_table(answered, beside)
    elif options.task == "scoring":
        table = protocols.score_table(answered, options.threshold)
    elif options.task == "suggesting":
        table = suggesting.suggestion_table(answered, beside)
    elif options.task == "personalised":
        table = personalised.personal_table(answered)
    else:
        table = protocols.comment_table(answered, dataset, options.spice)
    return asked | {"table": _plain(table), "answers": [
        _plain(dataclasses.asdict(item)) for item in answered]}


def _trained(saved: Saved) -> config_lib.Process:
    """The process that a checkpoint is of; a conversion learned nothing."""
    return saved.config.processes.get(saved.meta["process"], config_lib.Process(words=0.0, light_head=1.0))


def _kept(file: pathlib.Path) -> tuple[pathlib.Path, pathlib.Path]:
    """Where the replies of a model and of its control are kept until the result is in `file`."""
    return file.with_suffix(".replies.jsonl"), file.with_suffix(".control.replies.jsonl")


def _chosen(path: str, options: Options) -> list[choice.Choice]:
    """What is measured: the model, and its control if there is one, which may be one that never learned the task."""
    if options.task == "personalised" and options.method == "ridge":
        learned = choice.processes(path, options.process)
        skill = next((skill for skill in skills.GENERIC if skill in learned), "")
        return [choice.choose(path, skill, process=options.process) if skill else
                choice.seeing(path, options.process)]
    return [choice.choose(path, options.skill, process=options.process,
                          as_it_is=not locate.is_workdir(pathlib.Path(path))),
            *([choice.choose(options.control, options.skill, as_it_is=True)] if options.control else ())]


def _found(path: str, options: Options) -> tuple[Saved, Saved | None]:
    """The checkpoints of a model and of its control."""
    saved, *control = (locate.find(chosen.path) for chosen in _chosen(path, options))
    return saved, control[0] if control else None


def _asked(path: str, options: Options, dataset: Dataset, saved: Saved,
           control: Saved | None) -> dict[str, Any]:
    """What a result is an answer to: the options, and the content of everything that they name."""
    process = saved.meta["config"]["processes"].get(saved.meta["process"], {})
    asked_in = cues.fingerprint(process.get("cues", "")) if options.task == "attributes" else ""
    return json.loads(json.dumps({
        "model": str(path), **lineage.identity(saved), "beside": lineage.identity(control) if control else None,
        "data": dataset.fingerprint, "cues": asked_in, **dataclasses.asdict(options)}))


def _answers(saved: Saved, options: Options, dataset: Dataset, indices: Sequence[int],
             comparisons: bool, replies: pathlib.Path, asked: Mapping[str, Any]) -> list:
    model = restore.whole(saved)
    trained = _trained(model.saved)
    parts = trained.parts if options.task != "attributes" else config_lib.LEVELS
    generator = Replies(Generator(model.config.model, model.parameters, model.chat, parts, model.dtype), replies,
                        {**asked, "comparisons": comparisons, "replies": lineage.identity(saved)})
    del model  # the generator holds its weights in arrays of its own
    if options.task == "attributes":
        if unlearned := [f"the level {level}" for level in config_lib.LEVELS if level not in trained.parts]:
            print(f"{saved.path} never learned {' and '.join(unlearned)}: what it answers there is chance",
                  file=sys.stderr)
        return protocols.attributes(generator, dataset, indices, comparisons=comparisons, cues=trained.cues,
                                    phrasings=trained.phrasings)
    if options.task == "suggesting":
        return suggesting.suggesting(generator, dataset, indices)
    if options.task == "personalised":
        shown = dataset.indices(options.shown)
        foretell = (personalised.InContext(generator, dataset, options.context) if options.method == "context" else
                    personalised.ByRidge(generator, dataset, [*indices, *shown], reader=next(
                        (reader for skill, reader in skills.GENERIC.items()
                         if skills.state(trained, skill) == skills.TAUGHT), "")))
        return personalised.personalised(foretell, dataset, indices, shown, shots=options.shots, raters=options.raters)
    return protocols.opinions(generator, dataset, indices, {"scoring": "score", "commenting": "comment"}[options.task],
                              options.reader)


# ---- tables ------------------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any]) -> str:
    """The table of a result as aligned text."""
    table, task = result["table"], result["task"]
    title = f"{task} on {result['dataset']} ({result['split']})"
    if task == "scoring":
        title += f", read as {result['reader']}"
    if task == "attributes":
        lines = [f"  {'attribute':<14}{'level':<8}{'question':<12}{'n':>5}{'accuracy':>10}{'majority':>10}"
                 f"{'gain (95 % interval)':>25}{'over other photographs':>28}{'over control':>28}"]
        for row in table:
            lines.append(f"  {row['subject']:<14}{row['level']:<8}{row['kind']:<12}{row['n']:>5}"
                         f"{row['accuracy']:>10.3f}{row['majority']:>10.3f}{_with(row, 'gain'):>25}"
                         f"{_with(row, 'elsewhere_gain'):>28}{_with(row, 'control_gain'):>28}")
    elif task == "suggesting":
        lines = [f"  {'flaw':<22}{'n':>5}{'right':>8}{'elsewhere':>11}{'gain (95 % interval)':>25}"
                 f"{'gain over control':>26}{'distinct':>10}"]
        for row in table:
            lines.append(f"  {row['flaw']:<22}{row['n']:>5}{row['right']:>8.3f}{row['elsewhere']:>11.3f}"
                         f"{_with(row, 'gain'):>25}{_with(row, 'control_gain'):>26}{row['distinct']:>10}")
    elif task == "personalised":
        lines = [f"  {'shots':>5}  {'arm':<10}{'raters':>7}{'SRCC (95 % interval)':>25}{'PLCC':>11}{'MAE':>7}"
                 f"{'gain over permuted ratings':>30}{'gain over no ratings':>30}"]
        for row in table:
            lines.append(f"  {row['shots']:>5}  {row['arm']:<10}{row['raters']:>7}{_with(row, 'srcc'):>25}"
                         f"{_figure(row['plcc']):>11}{_figure(row['mae']):>7}{_with(row, 'gain'):>30}"
                         f"{_with(row, 'over_none'):>30}")
    else:
        lines = [f"  {name:<28}{_figure(value)}" for name, value in table.items()]
    return "\n".join([title, *lines])


def compare(results: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: a row a checkpoint, then what others have published on the same dataset and task."""
    task, dataset = results[0]["task"], results[0]["dataset"]
    summaries = {result["model"]: summary(result) for result in results}
    names = list(dict.fromkeys(name for row in summaries.values() for name in row))
    lines = [f"| {task} on {dataset} ({results[0]['split']}) | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for model, row in summaries.items():
        lines.append(f"| {model} | {' | '.join(row.get(name, '') for name in names)} |")
    for peer, figures in peers.published(task, dataset).items():
        lines.append(f"| {peer} | {' | '.join(figures.get(name, '') for name in names)} |")
    return "\n".join(lines)


def summary(result: Mapping[str, Any]) -> dict[str, str]:
    """The figures of a result that fit into a row, with their intervals."""
    table, task = result["table"], result["task"]
    if task == "attributes":
        kinds = {kind: [row for row in table if row["kind"] == kind] for kind in ("grade", "comparison")}
        return {f"{kind}: mean {name}": _figure(float(np.mean([row[name] for row in rows])))
                for kind, rows in kinds.items() if rows for name in ("accuracy", "gain")}
    if task == "suggesting":
        return {name: _with(table[-1], name) for name in ("right", "elsewhere", "gain", "control_gain")
                if name in table[-1]}
    if task == "personalised":
        return {f"SRCC, {row['shots']} shots": _with(row, "srcc") for row in table if row["arm"] == "own"}
    return {name.upper() if name in ("plcc", "srcc", "mae") else name: _with(table, name) for name in table
            if not name.endswith("_interval") and (table[name] is None or isinstance(table[name], (int, float)))}


def _with(row: Mapping[str, Any], name: str) -> str:
    """A figure with its interval; nothing where there is none."""
    if row.get(name) is None:
        return "" if name not in row else "undefined"
    interval = row.get(f"{name}_interval")
    return _figure(row[name]) + (f" {_figure(interval)}" if interval else "")


def _figure(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        return "[" + ", ".join(map(_figure, value)) + "]"
    return "undefined" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def _plain(value: Any) -> Any:
    """JSON values: NumPy numbers as Python's, nan and infinity as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- the program -------------------------------------------------------------------------------------------------


def run(workdirs: Sequence[str], task: str, *, shots: Sequence[str], out: str, **more: Any) -> None:
    """Measures every workdir, shows the tables and writes the results.

    Args:
      out: folder of the results; empty = `evaluation` in the first workdir.
      more: fields of `Options`.

    Raises:
      ConfigError, CheckpointError: see `evaluate`.
    """
    keep_programs()
    try:
        counts = tuple(sorted({int(count) for count in shots}))
    except ValueError:
        raise ConfigError(f"--shots {','.join(shots)} are not all whole numbers") from None
    if not counts or min(counts) < 0:
        raise ConfigError(f"--shots {','.join(shots)}: fewer than none cannot be shown")
    options = Options(task, shots=counts, **more)
    out = pathlib.Path(out or f"{workdirs[0]}/evaluation")
    files.folder(out)
    stem = result_name(options.task, options.dataset, options.split, options.reader, options.method)
    results = []
    for number, path in enumerate(workdirs):
        file = out / (f"{stem}.json" if len(workdirs) == 1 else f"{stem}-{number + 1}.json")
        for chosen in _chosen(path, options):
            print(chosen.line, file=sys.stderr)
        results.append(_once(path, options, file))
        print(show(results[-1]))
        chart = charts.write(results[-1], file.with_suffix(".png"))
        print(f"written to {file}" + (f" and {chart}" if chart else ""))
    if len(results) > 1 or peers.published(options.task, options.dataset):
        file = out / f"{stem}.md"
        files.write(file, compare(results) + "\n")
        print(f"\n{compare(results)}\nwritten to {file}")


def _once(path: str, options: Options, file: pathlib.Path) -> dict[str, Any]:
    """As `_measured`, of the checkpoint that is there: training may go on, and prune the one that was found."""
    for _ in range(locate.TRIES):
        try:
            return _measured(path, options, file)
        except on_disk.Vanished as error:
            vanished = error
    raise vanished


def _measured(path: str, options: Options, file: pathlib.Path) -> dict[str, Any]:
    """The result in a file, if it is an answer to just this; else a new one, written whole or not at all."""
    if file.is_file():
        try:
            found = json.loads(file.read_text())
        except ValueError:
            found = {}
        asked = _asked(path, options, builders.load(options.dataset, options.data_dir), *_found(path, options))
        other = [name for name in asked if name not in found or asked[name] != found[name]]
        if not other and "table" in found:
            print(f"known already from {file}")
            return found
        print(f"measured anew: what is in {file} answers to another {' and '.join(map(_in_words, other))}"
              if other else f"measured anew: {file} is damaged")
    result = evaluate(path, options, file)
    files.write(file, json.dumps(result, indent=1, allow_nan=False))
    for kept in _kept(file):
        kept.unlink(missing_ok=True)
    return result


def _in_words(name: str) -> str:
    return {"data": "content of the dataset", "digest": "state of the model", "beside": "state of the control",
            "cues": "content of the file of cues"}.get(name, name)
