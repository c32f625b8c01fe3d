"""Photographs that come with Python packages in; a trained tiny model, its evaluation and a report page out.


Runs the project's own programs one after the other, and prints each command before it runs, so that any of them can be
repeated by hand. The same command again goes on where the last one stopped. `--quick` takes a few steps with a still
smaller model: it shows that everything works here, and learns nothing.
"""

from __future__ import annotations

import json
import pathlib
import resource
import shlex
import subprocess
import sys
import time

from calm_jax import files
from calm_jax.commands import steps as steps_lib
from calm_jax.commands.steps import Step
from calm_jax.evaluation import report

TITLE = "calm_jax: the tiny model, trained from scratch"
LEAD = ("CALM, a multimodal language model that looks at photographs and says how beautiful they are and why, trained "
        "here from nothing through all four processes of its paper, in the geometry “tiny”.")
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
QUICK_NOTE = "This page was made with --quick: a handful of steps, so every answer is expected to be nonsense."

_SMALL = {  # a geometry that compiles and runs fast
    "model.encoder.image_size": 48, "model.encoder.depth": 2, "model.encoder.width": 32, "model.encoder.heads": 2,
    "model.encoder.mlp_width": 64, "model.qformer.depth": 1, "model.qformer.width": 32, "model.qformer.heads": 2,
    "model.qformer.mlp_width": 64, "model.qformer.queries": 2, "model.decoder.depth": 1, "model.decoder.width": 32,
    "model.decoder.heads": 2, "model.decoder.kv_heads": 2, "model.decoder.mlp_width": 64, "log_every": 1}
# The same shapes, schedule and parts in every process: one program serves all of them.
_FEW = {"steps": 3, "batch": 2, "eval_batches": 1, "eval_every": 0, "optimizer.peak_lr": 1e-3, "row.tokens": 448,
        "row.images": 3, "row.answers": 192, "parts": '("low","middle","high","thematic")'}

def steps(workdir: pathlib.Path, quick: bool) -> list[Step]:
    """The commands of the demo, in their order.

    One with a log runs beside those after it, up to the first that needs it: one training of this size keeps one core
    busy, not two.
    """

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


def demo(workdir: pathlib.Path, quick: bool) -> int:
    """Runs what is not done yet, writes the page, and returns an exit code."""
    plan = steps(workdir, quick)
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
            started = (number, step, steps_lib.start(step, steps_lib.environment(workdir, quick)), before, begin)
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
    page = write_report(workdir, plan, spent, seconds, quick)
    print("\ntime of each step, seconds:")
    for step in plan:
        print(f"  {spent.get(step.title, 0.0):>7.0f}  {step.title}")
    print(f"  {seconds:>7.0f}  {EVERYTHING}; trainings ran side by side")
    print(f"peak memory of a process: {_peak() / 2**30:.2f} GiB, and at most two run at a time")
    print(f"report: {page}", flush=True)
    return 0


def write_report(workdir: pathlib.Path, plan: list[Step], spent: dict[str, float], seconds: float,
                 quick: bool) -> pathlib.Path:
    """The page of everything that was run."""
    ran = [report.Command(step.title, steps_lib.command_line(step), spent.get(step.title)) for step in plan]
    whole = shlex.join([steps_lib.interpreter(), "-m", "calm_jax", "demo", "--workdir", str(workdir),
                        *(["--quick"] if quick else [])])
    return report.write(
        workdir / "report.html", title=TITLE, lead=LEAD, notes=((QUICK_NOTE, *NOTES) if quick else NOTES),
        workdirs={name: workdir / name for name in ("pretrain", "control", "finetune")},
        results=[json.loads(step.result.read_text()) for step in plan if step.sources],
        commands=[report.Command(EVERYTHING, whole), *ran], seconds=seconds, truth="composed")


def _peak() -> int:
    """Bytes of the largest child so far; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(workdir: str, quick: bool) -> int:
    """The program; returns an exit code."""
    return demo(pathlib.Path(workdir or ("runs/demo-quick" if quick else "runs/demo")), quick)
