"""PARA, as it was stored, and pretrained parts in; arms trained and judged, and a page of tables and plots, out.

    calm prepare --dataset para --source PARA --data-dir DATA
    calm parts laptop --out parts; calm convert --parts parts --out start
    python -m tools.study --data_dir DATA --start start [--only NAME,...] [--seeds N] [--plan]

The plan is printed first, with what each arm is expected to take; those whose results lie in tools/study/results, of
just this config and these data, are not trained again. The page is WORKDIR/study.md. Features take up to 16 GB in
CALM_CACHE.
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import Annotated

import typer

from calm_jax import cli, files, host_memory
from calm_jax.features import store
from tools.study import arms

GIGABYTES = "16"  # of features on disk, if nobody says otherwise: 790 kB a photograph or edit


def main(
        data_dir: Annotated[str, typer.Option(help="Folder of the data set that calm prepare stored.")],
        start: Annotated[str, typer.Option(help="The converted parts that arms begin from.")] = "runs/study/start",
        workdir: Annotated[str, typer.Option(help="Folder of the trainings.")] = "runs/study",
        only: Annotated[str, typer.Option(metavar="NAME[,NAME...]", help="Arms; default: all.",
                                          show_default=False)] = "",
        seeds: Annotated[int, typer.Option(min=0, help="Of each arm at most; 0 = all.")] = 0,
        plan: Annotated[bool, typer.Option("--plan", help="Print the plan and stop.")] = False,
        split: Annotated[str, typer.Option(help="That judges: validation, or test, once.")] = "validation") -> int:
    from calm_jax.data import builders
    from tools.study import report, runner
    os.environ.setdefault(store.SIZE, GIGABYTES)  # for the trainings, too
    place = pathlib.Path(workdir)
    files.folder(place, "--workdir")
    runner.converted(start)
    names = [name.strip() for name in only.split(",")] if only else list(arms.ARMS)
    study = runner.Study(place, start, builders.load("para", data_dir), data_dir, split)
    jobs = study.jobs(names, seeds)
    for job in jobs:
        print(f"  {job.name:<18} seed {job.seed}  {job.arm.minutes:>5.1f} min  {job.arm.question}: {job.arm.title}")
    print(f"{len(jobs)} trainings, about {sum(job.arm.minutes for job in jobs):.0f} minutes on two cores")
    if plan:
        return 0
    report.baselines(study)  # the encoder sees all photographs
    for number, job in enumerate(study.run(jobs), 1):
        print(f"[{number}/{len(jobs)}] {job.name}, seed {job.seed}: {report.line(study, job)}", flush=True)
    text = report.write(study)
    print(f"{text}\nwritten to {place / 'study.md'}")
    return 0


if __name__ == "__main__":
    if "--plan" not in sys.argv:
        host_memory.settle()
    cli.single(main)
