"""A size of model in; every benchmark that one accelerator can say something about, beside torch, as files out.

    python -m tools.bench.gpu --size 7b [--out runs/bench_gpu] [--rows 4] [--rounds 5] [--only train,lora]

Fine-tuning of everything, low-rank fine-tuning, a pre-training process with encoder and language model frozen, and
inference, one after the other, each by the command that it prints. What fails is said in a line, and the rest goes on.
The folder gets NAME.json of each, `table.md` with rows as docs/benchmarks.md has them, and `log.txt`.

Where the device does not hold parameters, gradients and moments, the language model gets as many blocks as it holds,
and the result says so. Where it holds the results of all products besides, they are kept, not computed again. On CPU,
with `--size tiny`, the same commands show that everything is in place.
"""

from __future__ import annotations

import datetime
import json
import math
import pathlib
import runpy
import shlex
import subprocess
import sys
from typing import Annotated, Literal

import typer

from calm_jax import cli
from calm_jax import config as config_lib
from calm_jax.errors import ConfigError, nearest
from tools.bench import contenders
from tools.bench import train as bench_train

SCRATCH = ("tiny", "small")  # sizes whose config freezes nothing
FREEZE = ('--config.processes.self_supervised.train=("mfam/qformers/.*",)',
          '--config.processes.self_supervised.freeze=("mfam/thematic/.*","encoder/.*","decoder/.*")')  # as in 7b
# Bytes a parameter: master, gradient and two moments; a copy to compute with, which torch keeps of all and XLA of a
# block at a time; what is frozen is that copy.
TRAINED, COPY = 16, 2
FREE = 6 * 2 ** 30  # bytes that else a step may take; 3 GiB were measured with 7b
TRAINING = {"train": ("finetune", "", "comments"), "lora": ("finetune", "+lora", "comments"),
            "pretrain": ("pretrain", "", "self_supervised")}  # name -> config, option of its variant, process
NAMES = (*TRAINING, "inference")


def arguments(name: str, size: str, rows: int, rounds: int, memory: float | None) -> list[str]:
    """Those of `tools.bench` for one of NAMES.

    Args:
      memory: bytes that the device has for a program; None = enough.

    Raises:
      ConfigError: the device does not even hold one block.
    """
    common = ["--against", "torch", "--rounds", str(rounds)]
    if name == "inference":
        return ["inference", "--config", f"configs/finetune.py:{size}", *common]
    file, option, process = TRAINING[name]
    config = _config(file, size + option, process)
    depth = fitting(config, memory) if memory else 0
    keep = memory and config.model.remat == "full" and state(config, TRAINED) + products(
        config, rows) <= memory - FREE
    return ["train", "--config", f"configs/{file}.py:{size}{option}", "--process", process, *common,
            "--rows", str(rows), *(["--depth", str(depth)] if depth else []),
            *(["--config.model.remat=dots"] if keep else []),
            *(FREEZE if file == "pretrain" and size in SCRATCH else [])]


def _config(file: str, variant: str, process: str) -> config_lib.Config:
    config = config_lib.from_config_dict(runpy.run_path(f"configs/{file}.py")["get_config"](variant))
    return config_lib.Config(model=config.model, run=(process,), processes={process: config.processes[process]})


def state(config: config_lib.Config, trained: int) -> float:
    """Bytes of the parameters of the first process on an accelerator, at `trained` for each that it teaches."""
    from calm_jax.models.parameters import Geometry
    learns = bench_train.learning(config)
    return float(sum(math.prod(leaf.shape) * (trained if learns[path] else COPY)
                     for path, leaf in Geometry.of(config.model).shapes.items()))


def products(config: config_lib.Config, rows: int) -> float:
    """Bytes of what `remat=dots` keeps of the language model, bfloat16, for so many rows of the first process: queries,
    keys, values, attention, its projection, gate and up; nothing reads the last product of a block again."""
    llama, [process] = config.model.decoder, config.processes.values()
    widths = llama.width + 2 * llama.head_size * (llama.heads + llama.kv_heads) + 2 * llama.mlp_width
    return 2.0 * rows * process.row.tokens * llama.depth * widths


def fitting(config: config_lib.Config, memory: float) -> int:
    """Blocks of the language model that so much memory holds, with torch's copies; 0 = all.

    Raises:
      ConfigError: none.
    """
    room, blocks, all_of_them = memory - FREE, config.model.decoder.depth, state(config, TRAINED + COPY)
    if all_of_them <= room:
        return 0
    one = state(bench_train.with_depth(config, 1), TRAINED + COPY)
    depth = 1 + math.floor((room - one) / ((all_of_them - one) / (blocks - 1)))
    if depth < 1:
        raise ConfigError(f"one block of the language model takes {one / 2**30:.1f} GiB with all that is "
                          f"beside it, and {room / 2**30:.1f} GiB are there")
    return depth


def measure(names: list[str], size: str, folder: pathlib.Path, *, rows: int, rounds: int,
            memory: float | None) -> list[str]:
    """Runs the benchmarks one after the other; a sentence for each that gave no figure of ours."""
    folder.mkdir(parents=True, exist_ok=True)
    wrong = []
    for name in names:
        try:
            words = arguments(name, size, rows, rounds, memory)
            print(f"\n{name}: python -m tools.bench {shlex.join(words)}", flush=True)
            result = run(words, folder, name)
            if error := result["results"]["calm_jax"].get("error"):
                raise ConfigError(error)
        except ConfigError as error:
            wrong.append(f"{name}: {error}")
            print(wrong[-1], flush=True)
    if wrong:
        with (folder / "table.md").open("a") as page:
            page.write(f"\n{datetime.date.today()}, without a figure:\n\n" + "".join(f"- {one}\n" for one in wrong))
    return wrong


def run(words: list[str], folder: pathlib.Path, name: str) -> dict:
    """The result of `tools.bench`, which prints as it goes on.

    Raises:
      ConfigError: it failed; with the last that it said.
    """
    out, log = folder / f"{name}.json", folder / "log.txt"
    out.unlink(missing_ok=True)
    with log.open("a") as stream:
        stream.write(f"==== {name}\n")
        stream.flush()
        done = subprocess.run([sys.executable, "-m", "tools.bench", *words, "--out", str(out), "--append",
                               str(folder / "table.md")], stderr=stream)
    if done.returncode or not out.is_file():
        said = log.read_text().rpartition(f"==== {name}\n")[2].split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "no message")
        raise ConfigError(f"failed with exit code {done.returncode}: {last} (see {log})")
    return json.loads(out.read_text())


def main(
        size: Annotated[Literal["tiny", "small", "7b", "13b"], typer.Option(help="The model.")] = "7b",
        out: Annotated[str, typer.Option(help="Folder of the results.")] = "runs/bench_gpu",
        rows: Annotated[int, typer.Option(min=1, help="Rows of a training step.")] = 4,
        rounds: Annotated[int, typer.Option(min=1, help="Measured rounds of each contender, after one to warm "
                                            "up.")] = 5,
        only: Annotated[str, typer.Option(metavar="NAME[,NAME...]", help=f"Some of {', '.join(NAMES)}.",
                                          show_default=False)] = "") -> int:
    names = [name for name in only.split(",") if name] or list(NAMES)
    for name in names:
        if name not in NAMES:
            raise ConfigError(f"--only {name}: there is no such benchmark{nearest(name, NAMES)}")
    device = contenders.probe()
    contenders.stay_on_cpu()
    known = "" if device["memory"] is None else f", {device['memory'] / 2**30:.1f} GiB"
    print(f"on {contenders.machine(device)}{known}", flush=True)
    wrong = measure(names, size, pathlib.Path(out), rows=rows, rounds=rounds, memory=device["memory"])
    print(f"\n{len(names) - len(wrong)} of {len(names)} measured; files in {out}", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    cli.single(main)
