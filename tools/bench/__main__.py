"""A config in; how fast it trains, answers, reads data or is converted, beside torch in the same run, out.

    python -m tools.bench train --config configs/finetune.py:small [--against torch] [--rows 2] [--rounds 5]
    python -m tools.bench inference --config configs/finetune.py:small [--against torch]
    python -m tools.bench data --config configs/pretrain.py:7b [--against torch]
    python -m tools.bench pictures --config configs/finetune.py:laptop
    python -m tools.bench conversion --config configs/pretrain.py:7b [--scratch DIR]

train.py, inference.py, data.py, pictures.py and conversion.py beside this file say what each of them measures. Ratios
mean something; times alone depend on the machine, which should be idle otherwise. --append puts the result at the end
of its table in docs/benchmarks.md, or in a page of one's own.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import pathlib
import shlex
import sys
import tempfile
from types import ModuleType
from typing import Annotated, Literal

import typer

from calm_jax import cli, files, recipes
from calm_jax import config as config_lib
from calm_jax.errors import ConfigError, nearest
from tools.bench import contenders
from tools.bench import conversion as bench_conversion
from tools.bench import data as bench_data
from tools.bench import inference as bench_inference
from tools.bench import page as bench_page
from tools.bench import pictures as bench_pictures
from tools.bench import train as bench_train

NOT_SHOWN = ("--out", "--append", "--scratch")  # in the command that a table names


def main(
        context: typer.Context,
        what: Annotated[Literal["train", "inference", "data", "pictures", "conversion"],
                        typer.Argument(help="What to measure.")],
        config: cli.Recipe,
        against: Annotated[Literal["torch"] | None, typer.Option(help="What to compare with.",
                                                                 show_default=False)] = None,
        rows: Annotated[int, typer.Option(min=1, help="train: rows a step.")] = 2,
        rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each contender, after one to warm "
                                            "up.")] = 5,
        process: Annotated[str, typer.Option(help="train, data: process of the config; default: its first.",
                                             show_default=False)] = "",
        depth: Annotated[int, typer.Option(min=0, help="train: so many blocks of the language model instead of the "
                                           "config's, for devices that do not hold all; the result says so.")] = 0,
        scratch: Annotated[str | None, typer.Option(help="All but train: where there is room; conversion wants three "
                                                    "times the model.", show_default=False)] = None,
        out: Annotated[str, typer.Option(help="Also write the result as JSON here.", show_default=False)] = "",
        append: Annotated[str, typer.Option(help="Also add the result to the tables of this page, such as "
                                            "docs/benchmarks.md.", show_default=False)] = "") -> None:
    if out:
        files.output(out, ours=files.json_with("results", "command"))
    if append:
        files.output(append, "--append", ours=files.text)
    of = recipes.load(config, cli.overrides(context)).config
    if what == "train":
        report(bench_train.measure(_one_process(of, process, rows), against=bool(against), rounds=rounds, depth=depth),
               bench_train, out, append)
        return
    with tempfile.TemporaryDirectory(dir=scratch) as name:
        folder = pathlib.Path(name)
        if what == "conversion":
            report(bench_conversion.measure(of.model, folder / "conversion"), bench_conversion, out, append)
        elif what == "pictures":
            report(bench_pictures.measure(of, folder, rounds=rounds), bench_pictures, out, append)
        elif what == "inference":
            report(bench_inference.measure(of, folder, against=bool(against), rounds=rounds), bench_inference, out,
                   append)
        else:
            of = _one_process(of, process, rows)
            photos = dataclasses.replace(of.processes[of.run[0]], dataset="folder")
            report(bench_data.measure(of, photos, folder / "data", against=bool(against), rounds=rounds), bench_data,
                   out, append)


def _one_process(config: config_lib.Config, name: str, rows: int) -> config_lib.Config:
    """The config with one process alone, by default its first, of `rows` rows at a time."""
    name = name or config.run[0]
    if name not in config.processes:
        raise ConfigError(f"there is no process {name!r}{nearest(name, config.processes)}")
    process = dataclasses.replace(config.processes[name], batch=rows, accumulate=1)
    return dataclasses.replace(config, run=(name,), processes={name: process})


def report(result: dict, module: ModuleType, out: str, append: str) -> None:
    """The result as text on the terminal, as JSON in `out`, and in the tables of the page `append`, if named.

    Args:
      module: the benchmark's, with its `show`, SECTION, COLUMNS and `cells`.
    """
    words, shown = sys.argv[1:], []
    while words:
        word = words.pop(0)
        if word in NOT_SHOWN and words:
            words.pop(0)
        elif not word.startswith(tuple(f"{name}=" for name in NOT_SHOWN)):
            shown.append(word)
    result |= {"date": datetime.date.today().isoformat(), "cores": os.cpu_count(),
               "command": f"python -m tools.bench {shlex.join(shown)}"}
    result.setdefault("machine", contenders.machine({"platform": "cpu"}))
    print(module.show(result))
    if out:
        files.write(out, json.dumps(result, indent=1))
    if append:
        bench_page.append(pathlib.Path(append), module.SECTION, module.COLUMNS, module.cells(result),
                          date=result["date"], machine=result["machine"], command=result["command"])


if __name__ == "__main__":
    cli.single(main, extras=True)
