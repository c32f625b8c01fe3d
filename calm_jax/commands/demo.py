"""Photographs and pretrained parts that come with Python packages in; a trained laptop model, its evaluation and a
report page out.

Runs the project's own programs one after the other, and prints each command before it runs, so that any of them can be
repeated by hand. The same command again goes on where the last one stopped.

The encoder and the language model are real ones; where their packages cannot be had, the demo says so and stops.
`full` trains for longer, and a control on shuffled labels besides. `quick` takes a few steps with a smaller model that
starts from nothing: it shows that everything works here, needs no network, and learns nothing.
"""

from __future__ import annotations

import json
import pathlib
import resource
import shlex
import sys
import time
from typing import Literal

from calm_jax import files
from calm_jax.commands import steps as steps_lib
from calm_jax.commands.steps import Step
from calm_jax.errors import ConfigError
from calm_jax.evaluation import report

Extent = Literal["short", "full", "quick"]

TITLE = "calm_jax: the laptop model"
LEAD = ("CALM, a multimodal language model that looks at photographs and says how beautiful they are and why: a "
        "pretrained encoder (a DINOv2 ViT-S/14) and a pretrained language model (SmolLM2-135M), joined here by the "
        "four processes of its paper.")
QUICK_TITLE = "calm_jax: a few steps from nothing"
QUICK_LEAD = ("CALM, a multimodal language model that looks at photographs and says how beautiful they are and why, "
              "trained here from nothing through all four processes of its paper, in a geometry smaller than “tiny”.")
NOTES = (
    "What this is not: a judge of beauty. It learns from nine photographs; four more are kept for the tests on this "
    "page. The paper's models have 7 or 13 thousand million parameters in the language model.",
    "The scores and comments it learns from, and is measured by, are composed by us from degradations that we made and "
    "therefore know, such as blur, noise or a colour cast. No human judged these pictures. The page shows that the "
    "machinery learns what it is taught, and how far that carries to photographs it has not seen.",
    "No training step saw the four test photographs, but we did: schedule, strengths of the degradations and the rules "
    "for labels that cannot be seen were chosen with an eye on them. The figures are a sign of life, not a benchmark.",
)
EVERYTHING = "everything on this page"
QUICK_NOTE = "This page was made with --quick: a handful of steps, so every answer is expected to be nonsense."

# process -> fields that differ from the recipe's: ten minutes of two cores, and how long `full` trains (ours).
BUDGET = {
    "short": {"warm_up": {"steps": 80, "versions": 1, "train_share": 0.6, "eval_batches": 1},
              "self_supervised": {"steps": 3, "batch": 1, "versions": 1, "eval_batches": 1},
              "generic": {"steps": 3, "batch": 1, "eval_batches": 1},
              "comments": {"steps": 140, "batch": 1, "eval_batches": 4, "eval_every": 0},
              "scores": {"steps": 10, "batch": 1, "eval_batches": 2, "eval_every": 0}},
    "full": {"warm_up": {"steps": 250, "eval_batches": 2},
             "self_supervised": {"steps": 20, "batch": 2, "accumulate": 2, "eval_batches": 2},
             "generic": {"steps": 10, "batch": 2, "accumulate": 2, "eval_batches": 2},
             "comments": {"steps": 300, "batch": 1, "eval_batches": 8},
             "scores": {"steps": 40, "batch": 1, "eval_batches": 4}},
}
RECORDS = 36  # of the test split that the short one is asked about; the others: all

_SMALL = {  # a geometry that compiles and runs fast
    "model.encoder.image_size": 48, "model.encoder.depth": 2, "model.encoder.width": 32, "model.encoder.heads": 2,
    "model.encoder.mlp_width": 64, "model.qformer.depth": 1, "model.qformer.width": 32, "model.qformer.heads": 2,
    "model.qformer.mlp_width": 64, "model.qformer.queries": 2, "model.decoder.depth": 1, "model.decoder.width": 32,
    "model.decoder.heads": 2, "model.decoder.kv_heads": 2, "model.decoder.mlp_width": 64, "log_every": 1}
# The same shapes, schedule and parts in every process: one program serves all of them.
_FEW = {"steps": 3, "batch": 2, "eval_batches": 1, "eval_every": 0, "optimizer.peak_lr": 1e-3, "row.tokens": 448,
        "row.images": 3, "row.answers": 192, "parts": '("low","middle","high","thematic")'}


def steps(workdir: pathlib.Path, extent: Extent) -> list[Step]:
    """The commands of the demo, in their order."""
    quick = extent == "quick"
    parts, start = workdir / "parts", workdir / "start"
    stage_one = ("language" if quick else "warm_up", "self_supervised", "generic")
    stage_two = ("comments", "scores")

    def training(name, title, recipe, processes, *more):
        overrides = dict(_SMALL) if quick else {"tokenizer": start}
        for process in processes:
            fields = _FEW if quick else BUDGET[extent].get(process, {})
            overrides |= {f"processes.{process}.{field}": value for field, value in fields.items()}
        return Step(title, ("calm_jax.train", "--config", recipe, "--workdir", str(workdir / name), *more,
                            *(f"--config.{field}={value}" for field, value in overrides.items())),
                    workdir / name / "metrics.jsonl")

    def evaluation(task, title, model, control=None, reader="text"):
        records = RECORDS if extent == "short" else 0
        return Step(title, ("calm_jax.evaluate", "--workdir", str(model), "--task", task, "--dataset", "demo",
                            *(("--records", str(records)) if records else ()),
                            *(("--reader", reader) if reader != "text" else ()),
                            *(("--control", str(control)) if control else ()), "--out", str(workdir / "evaluation")),
                    workdir / "evaluation" / f"{steps_lib.result_name(task, 'demo', 'test', reader)}.json",
                    (model, *((control,) if control else ())),
                    asked=(("records", records), ("control", str(control or ""))))

    fetched = [
        Step("parts: a pretrained encoder and language model, 190 MB of Python packages",
             ("calm_jax", "parts", "laptop", "--out", str(parts)), parts / "parts.json"),
        Step("conversion: one checkpoint of both", ("calm_jax", "convert", "--parts", str(parts), "--out", str(start)),
             start / "COMPLETE.json", once=True)]
    recipe, later = ("pretrain", "finetune") if quick else ("pretrain:laptop", "finetune:laptop+keep")
    begin = () if quick else (f"--config.init={start}",)

    def pair(title, first, second, *processes):
        """Both stages; `processes` are those on shuffled labels."""
        shuffled = {process: f"--config.processes.{process}.shuffle_labels=True" for process in processes}
        return [training(first, f"{title}: text-guided self-supervision, then generic pairs", recipe, stage_one, *begin,
                         *(shuffled[process] for process in stage_one if shuffled)),
                training(second, f"{title}: comments, then scores", later, stage_two,
                         f"--config.init={workdir / first}", *(shuffled[process] for process in stage_two if shuffled))]

    mine, control = workdir / "finetune", None if extent == "short" else workdir / "control-finetune"
    return [
        *(() if quick else fetched),
        *pair("training", "pretrain", "finetune"),
        *(pair("control on shuffled labels", "control-pretrain", "control-finetune", *stage_one, *stage_two)
          if control else ()),
        evaluation("attributes", "evaluation: attributes", mine, control),
        evaluation("commenting", "evaluation: comments", mine),
        evaluation("scoring", "evaluation: scores", mine, reader="expectation"),  # as `calm score` reads them
    ]


def demo(workdir: pathlib.Path, extent: Extent) -> int:
    """Runs what is not done yet, writes the page, and returns an exit code."""
    plan = steps(workdir, extent)
    files.folder(workdir, "--workdir")
    ledger = workdir / "seconds.json"  # of each step, over all runs of this program
    spent: dict[str, float] = json.loads(ledger.read_text()) if ledger.is_file() else {}
    began, earlier = time.monotonic(), spent.pop(EVERYTHING, 0.0)
    for number, step in enumerate(plan, 1):
        print(f"\n[{number}/{len(plan) + 1}] {step.title}", flush=True)
        if step.current:
            print(f"up to date: {step.result}", flush=True)
            continue
        print(f"$ {steps_lib.command_line(step)}", flush=True)
        before, begin = steps_lib.changed(step.result), time.monotonic()
        code = steps_lib.finish(steps_lib.start(step, steps_lib.environment(workdir, extent == "quick")))
        if steps_lib.changed(step.result) != before:  # a training that was complete already costs no time worth telling
            spent[step.title] = spent.get(step.title, 0.0) + time.monotonic() - begin
            files.write(ledger, json.dumps({**spent, EVERYTHING: earlier + time.monotonic() - began}, indent=1))
        if code:
            print(f"\nerror: step {number} ({step.title}) ended with exit code {code}; its message stands above, and "
                  "the same command goes on from here", file=sys.stderr, flush=True)
            return code if code >= 0 else 128 - code
    print(f"\n[{len(plan) + 1}/{len(plan) + 1}] report", flush=True)
    seconds = earlier + time.monotonic() - began
    page = write_report(workdir, plan, spent, seconds, extent)
    print("\ntime of each step, seconds:")
    for step in plan:
        print(f"  {spent.get(step.title, 0.0):>7.0f}  {step.title}")
    print(f"  {seconds:>7.0f}  {EVERYTHING}")
    print(f"peak memory of a process: {_peak() / 2**30:.2f} GiB, and one runs at a time")
    print(f"report: {page}", flush=True)
    return 0


def write_report(workdir: pathlib.Path, plan: list[Step], spent: dict[str, float], seconds: float,
                 extent: Extent) -> pathlib.Path:
    """The page of everything that was run."""
    quick = extent == "quick"
    ran = [report.Command(step.title, steps_lib.command_line(step), spent.get(step.title)) for step in plan]
    whole = shlex.join([steps_lib.interpreter(), "-m", "calm_jax", "demo", "--workdir", str(workdir),
                        *([f"--{extent}"] if extent != "short" else [])])
    trained = [step.result.parent.name for step in plan if step.result.name == "metrics.jsonl"]
    return report.write(
        workdir / "report.html", title=QUICK_TITLE if quick else TITLE, lead=QUICK_LEAD if quick else LEAD,
        notes=(QUICK_NOTE, *NOTES) if quick else NOTES, workdirs={name: workdir / name for name in trained},
        results=[json.loads(step.result.read_text()) for step in plan if step.sources],
        commands=[report.Command(EVERYTHING, whole), *ran], seconds=seconds, truth="composed")


def _peak() -> int:
    """Bytes of the largest child so far; Linux counts in KiB, macOS in bytes."""
    return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run(workdir: str, *, quick: bool, full: bool) -> int:
    """The program; returns an exit code.

    Raises:
      ConfigError: `quick` and `full` at once.
    """
    if quick and full:
        raise ConfigError("--quick and --full are two extents of the demo; name one")
    extent: Extent = "quick" if quick else "full" if full else "short"
    return demo(pathlib.Path(workdir or {"short": "runs/demo"}.get(extent, f"runs/demo-{extent}")), extent)
