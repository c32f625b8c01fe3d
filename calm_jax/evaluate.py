"""A trained model and a dataset in; a table on the terminal, answers and figures as JSON out.

    python -m calm_jax.evaluate --workdir DIR --task attributes|scoring|commenting --dataset NAME [--data_dir DIR]
        [--split validation] [--reader text|expectation|levels] [--records N]

DIR is a workdir, the folder of one of its processes, or a checkpoint. Results go to DIR/evaluation unless --out says
otherwise.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import numpy as np
from absl import flags

from calm_jax import command
from calm_jax import config as config_lib
from calm_jax.data import builders, scale
from calm_jax.evaluation import protocols
from calm_jax.inference.generate import Generator
from calm_jax.training import restore

TASKS = ("attributes", "scoring", "commenting")

_WORKDIR = flags.DEFINE_string("workdir", None, "workdir, process folder or checkpoint of the model")
_TASK = flags.DEFINE_enum("task", None, TASKS, "what to measure")
_DATASET = flags.DEFINE_string("dataset", "demo", "name of the dataset")
_DATA_DIR = flags.DEFINE_string("data_dir", "", "folder of datasets that tools.prepare_data stored; demo needs none")
_SPLIT = flags.DEFINE_string("split", "test", "its split: train, validation or test")
_READER = flags.DEFINE_enum("reader", "text", scale.READERS, "scoring: how a score is read from the model")
_RECORDS = flags.DEFINE_integer("records", 0, "pictures of the split that are asked about, spread evenly; 0 = all")
_CONTROL = flags.DEFINE_string("control", None, "attributes: a model trained on shuffled labels, to compare with")
_OUT = flags.DEFINE_string("out", None, "folder of the results; default: WORKDIR/evaluation")


def evaluate(path: str, task: str, dataset_name: str, split: str, control: str | None = None,
             data_dir: str = "", reader: str = "text", records: int = 0) -> dict:
    """The result of one task as JSON values: `model`, `task`, `dataset`, `data_dir`, `split`, `reader`, `table`,
    `answers`; about `records` pictures of the split, spread evenly, 0 = all of them."""
    dataset = builders.load(dataset_name, data_dir)
    indices = dataset.indices(split)
    if records:
        indices = indices[np.unique(np.linspace(0, len(indices) - 1, min(records, len(indices))).round().astype(int))]
    answered = _answers(path, task, dataset, indices, reader)
    result = {"model": str(path), "task": task, "dataset": dataset_name, "data_dir": data_dir, "split": split,
              "reader": reader}
    if task == "attributes":
        others = _answers(control, task, dataset, indices, reader) if control else ()
        result["table"] = protocols.attribute_table(answered, others)
    elif task == "scoring":
        result["table"] = protocols.score_table(answered)
    else:
        result["table"] = {"n": len(answered), "distinct": len({item.text for item in answered})}
    return result | {"answers": [dataclasses.asdict(item) for item in answered]}


def _answers(path, task, dataset, indices, reader):
    model = restore.model(path)
    trained = model.config.processes.get(model.saved.meta["process"])
    if trained is None:
        raise config_lib.ConfigError(f"{model.saved.path} was converted and never trained; train from it first")
    parts = trained.parts if task != "attributes" else config_lib.LEVELS
    generator = Generator(model.config.model, model.parameters, model.tokenizer, parts, model.dtype)
    if task == "attributes":
        return protocols.attributes(generator, dataset, indices, cues=trained.cues, phrasings=trained.phrasings)
    return protocols.opinions(generator, dataset, indices, {"scoring": "score", "commenting": "comment"}[task], reader)


def show(result: dict) -> str:
    """The table of a result as aligned text."""
    table = result["table"]
    title = f"{result['task']} on {result['dataset']} ({result['split']})"
    if result["task"] != "attributes":
        return "\n".join([title, *(f"  {name:<16}{_figure(value)}" for name, value in table.items())])
    lines = [title, f"  {'attribute':<14}{'level':<8}{'question':<12}{'n':>5}{'accuracy':>10}{'majority':>10}"
                    f"{'gain (95 % interval)':>25}{'gain over shuffled labels':>28}"]
    for row in table:
        over = f"{row['control_gain']:+.3f} {_figure(row['control_gain_interval'])}" if "control_gain" in row else "-"
        lines.append(f"  {row['subject']:<14}{row['level']:<8}{row['kind']:<12}{row['n']:>5}{row['accuracy']:>10.3f}"
                     f"{row['majority']:>10.3f}{row['gain']:>+9.3f} {_figure(row['gain_interval']):<15}{over:>28}")
    return "\n".join(lines)


def _figure(value) -> str:
    if isinstance(value, (tuple, list)):
        return f"[{value[0]:+.3f}, {value[1]:+.3f}]"
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def main() -> None:
    for name in ("workdir", "task"):
        if not flags.FLAGS[name].value:
            raise config_lib.ConfigError(f"--{name} is missing; see the first lines of calm_jax/evaluate.py")
    result = evaluate(_WORKDIR.value, _TASK.value, _DATASET.value, _SPLIT.value, _CONTROL.value,
                      _DATA_DIR.value, _READER.value, _RECORDS.value)
    out = pathlib.Path(_OUT.value or f"{_WORKDIR.value}/evaluation")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"{_TASK.value}-{_DATASET.value}-{_SPLIT.value}.json"
    file.write_text(json.dumps(_plain(result), indent=1))
    print(show(result))
    print(f"written to {file}")


def _plain(value):
    """JSON values: NumPy numbers as Python's, nan as null."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    value = value.item() if hasattr(value, "item") else value
    return None if isinstance(value, float) and math.isnan(value) else value


if __name__ == "__main__":
    command.run(main)
