"""A config in; how fast it trains, answers, reads data or is converted, beside torch in the same run, out.

    python -m tools.bench train --config configs/finetune.py:small [--against torch] [--rows 2] [--rounds 5]
    python -m tools.bench inference --config configs/finetune.py:small [--against torch]
    python -m tools.bench data --config configs/pretrain.py:7b [--against torch]
    python -m tools.bench conversion --config configs/pretrain.py:7b [--scratch DIR]

tools/bench_train.py, bench_inference.py, bench_data.py and bench_conversion.py say what each of them measures. Ratios
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

from absl import flags

from calm_jax import command, files
from calm_jax import config as config_lib
from calm_jax.errors import ConfigError
from tools import bench_conversion, bench_data, bench_inference, bench_page, bench_train, contenders

_CONFIG = command.define_config()
_AGAINST = flags.DEFINE_enum("against", None, ["torch"], "what to compare with")
_ROWS = flags.DEFINE_integer("rows", 2, "train: rows a step", lower_bound=1)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "measured rounds of each contender, after one to warm up", lower_bound=1)
_PROCESS = flags.DEFINE_string("process", None, "train, data: process of the config; default: its first")
_DEPTH = flags.DEFINE_integer("depth", 0, "train: so many blocks of the language model instead of the config's, for "
                              "devices that do not hold all; the result says so", lower_bound=0)
_SCRATCH = flags.DEFINE_string("scratch", None, "conversion, inference, data: where there is room; "
                              "conversion wants three times the model")
_OUT = flags.DEFINE_string("out", None, "also write the result as JSON here")
_APPEND = flags.DEFINE_string("append", None, "also add the result to the tables of this page, such as "
                              "docs/benchmarks.md")
NOT_SHOWN = ("--out", "--append", "--scratch")  # in the command that a table names


def main(what: list[str]) -> None:
    if what not in (["train"], ["inference"], ["data"], ["conversion"]):
        raise ConfigError("say what to measure: train, inference, data or conversion, not "
                          f"{' '.join(what) or 'nothing'}")
    if _OUT.value:
        files.output(_OUT.value, ours=files.json_with("results", "command"))
    if _APPEND.value:
        files.output(_APPEND.value, "--append", ours=files.text)
    config, against, rounds = command.config(_CONFIG), bool(_AGAINST.value), _ROUNDS.value
    if what == ["train"]:
        report(bench_train.measure(_one_process(config), against=against, rounds=rounds, depth=_DEPTH.value),
               bench_train)
        return
    with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as name:
        folder = pathlib.Path(name)
        if what == ["conversion"]:
            report(bench_conversion.measure(config.model, folder / "conversion"), bench_conversion)
        elif what == ["inference"]:
            report(bench_inference.measure(config, folder, against=against, rounds=rounds), bench_inference)
        else:
            config = _one_process(config)
            process = dataclasses.replace(config.processes[config.run[0]], dataset="folder")
            report(bench_data.measure(config, process, folder / "data", against=against, rounds=rounds), bench_data)


def _one_process(config: config_lib.Config) -> config_lib.Config:
    """The config with --process alone, of --rows rows at a time."""
    name = _PROCESS.value or config.run[0]
    if name not in config.processes:
        raise ConfigError(f"there is no process {name!r}{config_lib.nearest(name, config.processes)}")
    process = dataclasses.replace(config.processes[name], batch=_ROWS.value, accumulate=1)
    return dataclasses.replace(config, run=(name,), processes={name: process})


def report(result: dict, module: ModuleType) -> None:
    """The result as text on the terminal, as JSON in --out, and in the tables of --append.

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
    if _OUT.value:
        files.write(_OUT.value, json.dumps(result, indent=1))
    if _APPEND.value:
        bench_page.append(pathlib.Path(_APPEND.value), module.SECTION, module.COLUMNS, module.cells(result),
                          date=result["date"], machine=result["machine"], command=result["command"])


if __name__ == "__main__":
    command.run(main, words=True)
