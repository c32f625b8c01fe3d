"""A prepared PARA in; four ways to spend one budget of training, compared on pictures no model has seen, out.

    python -m tools.prepare_data --dataset para --longest_side 256 --source PARA --data_dir DATA
    python -m tools.studies.first_look --data_dir DATA [--workdir runs/first-look] [--steps N]

Does text-guided self-supervision help a model that learns to score? Every arm takes the same number of steps of the
same size, in the geometry of configs/first_look.py, from random numbers (all of this is ours):

    a  scores alone                             with all scores, and with a tenth of them
    b  self-supervision, then scores            with all scores, and with a tenth of them
    c  as b, with shuffled pseudo-labels        with all scores
    d  as b, with the encoder frozen at random  with all scores

Boosted trees on the measured tenths stand beside them: what the scores owe to simple statistics.
Self-supervision sees all training pictures and no score. The same command goes on where the last one stopped; arms
that need nothing of each other run side by side. Ends with WORKDIR/first_look.md and WORKDIR/first_look.png.
"""

from __future__ import annotations

import io
import json
import pathlib
import runpy
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Annotated

import numpy as np
import tqdm
import typer

from calm_jax import cli, files, recipes
from calm_jax import config as config_lib
from calm_jax.commands import steps as commands
from calm_jax.errors import ConfigError
from calm_jax.training import logging

CONFIG = "first_look"
FROZEN = ('train=("mfam/.*","decoder/.*")', 'freeze=("encoder/.*",)')
TENTH = ("train_share=0.1",)
# arm -> (what it is, where its scores come from: (variant, the self-supervision it starts from, overrides))
ARMS: Mapping[str, tuple[str, str, str, tuple[str, ...]]] = {
    "a-all": ("scores alone", "scores", "", ()),
    "b-all": ("self-supervision, then scores", "then_scores", "taught", ()),
    "c-all": ("shuffled pseudo-labels, then scores", "then_scores", "shuffled", ()),
    "d-all": ("encoder frozen at random", "then_scores", "frozen", FROZEN),
    "a-tenth": ("scores alone, a tenth of them", "scores", "", TENTH),
    "b-tenth": ("self-supervision, then a tenth of the scores", "then_scores", "taught", TENTH),
}
SHUFFLED = ("shuffle_labels=True",)
FIRST: Mapping[str, Mapping[str, tuple[str, ...]]] = {  # self-supervision -> the overrides of its processes
    "taught": {}, "shuffled": {"language": SHUFFLED, "self_supervised": SHUFFLED},
    "frozen": {"self_supervised": FROZEN}}
ASKED = 250  # validation pictures whose attributes are asked about
READERS = ("expectation", "text")
SPLIT = "validation"
Plan = dict[str, tuple[commands.Step, tuple[str, ...]]]  # name -> (the command, the names of what it needs)


def plan(workdir: pathlib.Path, data_dir: str, steps: int = 0, more: Sequence[str] = ()) -> Plan:
    """All commands in the order in which they are started.

    Args:
      steps: of every arm; 0 = as the configuration says.
      more: further overrides of the config, for all trainings.
    """

    shares = _of_config("SHARES")

    def training(name, title, variant, overrides, init=""):
        given = [f"--config.init={workdir / init}"] if init else []
        for process, share in shares[variant].items():
            own = max(round(share * steps), 1)
            changed = (*overrides.get(process, ()), *((f"steps={own}", f"eval_every={-(-own // 4)}") if steps else ()))
            given += [f"--config.processes.{process}.{override}" for override in changed]
        return commands.Step(title, ("calm_jax.train", "--config", f"{CONFIG}:{variant}", "--workdir",
                                     str(workdir / name), f"--config.data.dir={data_dir}", *given, *more),
                             workdir / name / "metrics.jsonl", log=workdir / f"{name}.log")

    def evaluation(name, model, task, *options, reader="text"):
        file = f"{commands.result_name(task, dataset(), SPLIT, reader)}.json"
        process = "self_supervised" if task == "attributes" else "scores"
        sources = [workdir / model / "checkpoints" / process]
        folder = workdir / "evaluation" / name
        return commands.Step(f"{task}: {name}", (
            "calm_jax.evaluate", "--workdir", str(sources[0]), "--task", task, "--dataset", dataset(), "--data_dir",
            data_dir, "--split", SPLIT, "--reader", reader, "--out", str(folder), *options),
            folder / file, tuple(sources), log=workdir / f"evaluation-{name}.log")

    found: Plan = {}
    for name, overrides in FIRST.items():
        found[name] = training(name, f"self-supervision: {name}", "self_supervised", overrides), ()
    for arm, (title, variant, init, overrides) in ARMS.items():
        found[arm] = training(arm, f"{arm}: {title}", variant, {"scores": overrides}, init), (init,) if init else ()
        for reader in READERS:
            name = f"{arm}-{reader}"
            found[name] = evaluation(name, arm, "scoring", reader=reader), (arm,)
    for name in FIRST:
        found[f"{name}-attributes"] = evaluation(f"{name}-attributes", name, "attributes", "--records", str(ASKED)), \
            (name,)
    return found


def dataset() -> str:
    """The name under which CONFIG expects the pictures."""
    return _of_config("DATASET")


def _of_config(name: str):
    return runpy.run_path(str(recipes.FOLDER / f"{CONFIG}.py"))[name]


def run(steps: Plan, workdir: pathlib.Path, beside: int) -> int:
    """Runs what is not done yet, `beside` at a time, and returns an exit code. Output goes to log files."""
    ledger = workdir / "seconds.json"
    spent: dict[str, float] = json.loads(ledger.read_text()) if ledger.is_file() else {}
    waiting, done, running = dict(steps), set(), {}
    bar = tqdm.tqdm(total=len(steps), desc="commands", unit="command", bar_format="{l_bar}{bar}| {n}/{total} {elapsed}"
                    "{postfix}")
    handler = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # not without the children
    try:
        while waiting or running:
            for name, (step, needs) in list(waiting.items()):
                if len(running) < beside and done.issuperset(needs):
                    del waiting[name]
                    if step.current:
                        done.add(name)
                        bar.update()
                        continue
                    tqdm.tqdm.write(f"$ {commands.command_line(step)}   (output: {step.log})")
                    before, begin = commands.changed(step.result), time.monotonic()
                    running[name] = commands.start(step, commands.environment(workdir, False)), before, begin
            bar.set_postfix_str(", ".join(f"{name} {_progress(steps[name][0])}" for name in running))
            time.sleep(0.5)
            for name, (child, before, begin) in list(running.items()):
                if (code := child.poll()) is None:
                    continue
                del running[name]
                if commands.changed(steps[name][0].result) != before:  # a training that was complete costs no time
                    spent[name] = spent.get(name, 0.0) + time.monotonic() - begin
                files.write(ledger, json.dumps(spent, indent=1))
                if code:
                    bar.close()
                    print(f"error: {name} ended with exit code {code}; its message stands in {steps[name][0].log}, and "
                          "the same command goes on from here", file=sys.stderr, flush=True)
                    return code if code > 0 else 128 - code
                done.add(name)
                bar.update()
    except KeyboardInterrupt:
        print("error: interrupted; the same command goes on from here", file=sys.stderr, flush=True)
        return 128 + signal.SIGINT
    finally:
        bar.close()
        for child, _, _ in running.values():  # it saves, and the same command goes on
            child.terminate()
        for child, _, _ in running.values():
            child.wait()
        signal.signal(signal.SIGTERM, handler)
    return 0


def _progress(step: commands.Step) -> str:
    """The last step of a training."""
    if step.sources or not step.result.is_file():
        return ""
    whole = step.result.read_text().rpartition("\n")[0]  # the line behind the last break may still be written
    return f"step {json.loads(whole.splitlines()[-1])['step']}" if whole else ""


def trees(data_dir: str) -> dict[str, dict]:
    """What the stored tenths of the measurements alone tell of the scores, by boosted trees, with all scores and with
    the tenth of them that the arms have: name -> a row as `protocols.score_table` makes them. No picture is seen."""
    try:
        from sklearn.ensemble import HistGradientBoostingRegressor
    except ImportError:
        raise ConfigError("boosted trees need scikit-learn; run: pip install calm_jax[demo]") from None

    from calm_jax.data import builders, pipeline
    from calm_jax.data.scale import mapped
    from calm_jax.evaluation import metrics
    data = builders.load(dataset(), data_dir)

    train = data.indices("train")
    names = sorted({name for index in train for name in data.record(int(index)).deciles})

    def read(indices):
        records = [data.record(int(index)) for index in indices]
        return (np.asarray([[record.deciles.get(name, np.nan) for name in names] for record in records], float),
                np.asarray([mapped(record.score, record.scale) for record in records]))

    asked, true = read(data.indices(SPLIT))
    found = {}
    for name, share in (("trees-all", 1.0), ("trees-tenth", 0.1)):
        known, scores = read(pipeline.shared(train, share, config_lib.Config().seed))
        model = HistGradientBoostingRegressor(max_iter=200, learning_rate=0.05, random_state=0)
        said, groups = model.fit(known, scores).predict(asked), [str(number) for number in range(len(true))]
        found[name] = {key: value for figure in (metrics.plcc, metrics.srcc) for key, value in (
            (figure.__name__, figure(said, true)),
            (f"{figure.__name__}_interval", metrics.interval(lambda i, f=figure, s=said: f(s[i], true[i]), groups)))}
    return found


def table(results: Mapping[str, dict], spent: Mapping[str, float], baselines: Mapping[str, dict]) -> str:
    """Markdown: a row an arm, and one a baseline; and one an attribute."""
    lines = ["| arm | | PLCC | SRCC | PLCC, as said | SRCC, as said | not parsed | minutes |",
             "|---|---|---|---|---|---|---|---|"]
    for arm, (title, _, init, _) in ARMS.items():
        minutes = (spent.get(arm, 0.0) + spent.get(init, 0.0)) / 60
        cells = [_figure(results[f"{arm}-{reader}"]["table"], name) for reader in READERS for name in ("plcc", "srcc")]
        failures = results[f"{arm}-text"]["table"]["parse_failures"]
        lines.append(f"| {arm} | {title} | {' | '.join(cells)} | {failures:.1%} | {minutes:.1f} |")
    for name, row in baselines.items():
        lines.append(f"| {name} | boosted trees on the measured tenths, no picture | {_figure(row, 'plcc')} | "
                     f"{_figure(row, 'srcc')} | | | | |")
    rows = {name: {(row["kind"], row["subject"]): row for row in results[f"{name}-attributes"]["table"]}
            for name in FIRST}
    lines += ["", "| question | level | n | majority | taught | shuffled | frozen | gain of taught over the majority |",
              "|---|---|---|---|---|---|---|---|"]
    for key, row in rows["taught"].items():
        if row["kind"] != "grade":  # comparisons are no part of this self-supervision
            continue
        others = [f"{rows[name][key]['accuracy']:.2f}" for name in FIRST]
        low, high = row["gain_interval"]
        lines.append(f"| {row['subject']} ({row['kind']}) | {row['level']} | {row['n']} | {row['majority']:.2f} | "
                     f"{' | '.join(others)} | {row['gain']:+.2f} [{low:+.2f}, {high:+.2f}] |")
    return "\n".join(lines) + "\n"


def _figure(row: Mapping, name: str) -> str:
    if row[name] is None:
        return "constant"
    low, high = row.get(f"{name}_interval") or (float("nan"),) * 2
    return f"{row[name]:.3f} [{low:.3f}, {high:.3f}]"


def _steps(workdir: pathlib.Path) -> int:
    """Of all processes of a training together."""
    last: dict[str, int] = {}
    for row in logging.read(workdir / "metrics.jsonl"):
        last[row["process"]] = max(row["step"], last.get(row["process"], 0))
    return sum(last.values())


def draw(workdir: pathlib.Path, results: Mapping[str, dict], path: pathlib.Path) -> None:
    """Scores with intervals, the validation loss of scores over all steps of an arm, and attributes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    scores, losses, attributes = figure.subplots(1, 3)
    colours = dict(zip(ARMS, ("C0", "C1", "C2", "C3", "C0", "C1"), strict=True))
    for place, arm in enumerate(reversed(ARMS)):
        row = results[f"{arm}-expectation"]["table"]
        for shift, name, marker in ((0.12, "plcc", "o"), (-0.12, "srcc", "s")):
            if row[name] is None:
                continue
            low, high = row[f"{name}_interval"]
            scores.plot([low, high], [place + shift] * 2, color=colours[arm], linewidth=1.5)
            scores.plot(row[name], place + shift, marker, color=colours[arm], markersize=5)
    scores.set_yticks(range(len(ARMS)), reversed(ARMS))
    scores.set_xlabel("PLCC (circle) and SRCC (square), 95 % interval")
    for arm, (_, _, init, _) in ARMS.items():
        offset = _steps(workdir / init) if init else 0
        points = [(offset + row["step"], row["loss"]) for row in logging.read(workdir / arm / "metrics.jsonl")
                  if row["kind"] == "validation"]
        losses.plot(*zip(*points, strict=True), color=colours[arm], label=arm,
                    linestyle="--" if arm.endswith("tenth") else "-", marker=".")
    losses.set_xlabel("step, self-supervision included")
    losses.set_ylabel("validation loss of scores, nats a token")
    losses.legend(frameon=False)
    rows = results["taught-attributes"]["table"]
    control = {(row["kind"], row["subject"]): row["accuracy"] for row in results["shuffled-attributes"]["table"]}
    shown = [row for row in rows if row["kind"] == "grade"]
    places = range(len(shown))
    attributes.barh(places, [row["accuracy"] for row in shown], color="C1", height=0.6, label="taught")
    attributes.plot([row["majority"] for row in shown], places, "|", color="black", markersize=12, label="majority")
    attributes.plot([control[row["kind"], row["subject"]] for row in shown], places, "x", color="C2", label="shuffled")
    attributes.set_yticks(places, [row["subject"] for row in shown])
    attributes.set_xlabel("accuracy on held-out pictures")
    attributes.legend(frameon=False, loc="lower right")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    files.write(path, picture.getvalue())


def main(
        data_dir: Annotated[str, typer.Option(help="Folder of the data set that calm prepare stored.")],
        workdir: Annotated[str, typer.Option(help="Folder of everything.")] = "runs/first-look",
        steps: Annotated[int, typer.Option(min=0, help="Of every arm; 0 = as the configuration says.")] = 0,
        beside: Annotated[int, typer.Option(min=1, help="Commands at a time; one of this size keeps one core "
                                            "busy.")] = 2,
        override: Annotated[list[str] | None, typer.Option(help="A field of the config for all trainings, as in "
                                                           "model.encoder.depth=2.", show_default=False)] = None
        ) -> int:
    place = pathlib.Path(workdir)
    files.folder(place, "--workdir")
    planned = plan(place, data_dir, steps, [f"--config.{field}" for field in override or ()])
    if code := run(planned, place, beside):
        return code
    results = {name: json.loads(step.result.read_text()) for name, (step, _) in planned.items() if step.sources}
    text = table(results, json.loads((place / "seconds.json").read_text()), trees(data_dir))
    files.write(place / "first_look.md", text)
    draw(place, results, place / "first_look.png")
    print(f"{text}\nwritten to {place / 'first_look.md'} and {place / 'first_look.png'}")
    return 0


if __name__ == "__main__":
    cli.single(main)
