"""Arms in; one small file of predictions for each of their seeds, out: trained one after the other, each only once."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import pathlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax import config as config_lib
from calm_jax import files, recipes
from calm_jax.commands import steps as commands
from calm_jax.data.samples import Dataset
from calm_jax.errors import ConfigError
from tools.study import arms

RESULTS = pathlib.Path(__file__).parent / "results"  # in the repository: a lost machine costs one arm
RECIPE = "tools/study/recipe.py"
READERS = ("expectation", "text")  # of an arm that goes through the language model, beside `light`
PLACES = ("init", "tokenizer")  # fields of a config that say where something is, not what


@dataclasses.dataclass(frozen=True)
class Job:
    """An arm with one of its seeds."""

    name: str
    seed: int

    @property
    def arm(self) -> arms.Arm:
        """What is trained."""
        return arms.get(self.name)

    @property
    def result(self) -> pathlib.Path:
        """Its predictions."""
        return RESULTS / f"{self.name}-{self.seed}.json"


@dataclasses.dataclass(frozen=True)
class Study:
    """Where everything is: the workdir of the trainings, the converted parts that they begin from, PARA and the
    folder that it was stored in, and the split that judges."""

    workdir: pathlib.Path
    start: str
    dataset: Dataset
    data_dir: str
    split: str = "validation"

    def training(self, job: Job) -> commands.Step:
        """The command that trains a job."""
        folder = self.workdir / f"{job.name}-{job.seed}"
        init = self.workdir / f"{job.arm.start}-0" if job.arm.start else self.start
        return commands.Step(f"{job.name}, seed {job.seed}", (
            "calm_jax.train", "--config", f"{RECIPE}:{job.name}", "--workdir", str(folder),
            f"--config.seed={job.seed}", f"--config.init={init}", f"--config.tokenizer={self.start}",
            f"--config.data.dir={self.data_dir}"), folder / "metrics.jsonl", log=self.workdir / f"{folder.name}.log")

    def digest(self, job: Job) -> str:
        """What a result is an answer to: the config, the data, and what the arm begins from."""
        config = recipes.load(f"{RECIPE}:{job.name}", [f"--config.seed={job.seed}"]).config
        values: dict[str, Any] = dataclasses.asdict(config)
        for name in PLACES:
            del values[name]
        del values["data"]["dir"]
        begins = self.digest(Job(job.arm.start, 0)) if job.arm.start else ""
        text = json.dumps([values, self.dataset.fingerprint, self.split, begins], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def known(self, job: Job) -> Mapping[str, Any] | None:
        """The result of a job, if there is one of just this."""
        try:
            found = json.loads(job.result.read_text())
        except (OSError, ValueError):
            return None
        return found if found.get("digest") == self.digest(job) else None

    def jobs(self, names: Sequence[str], seeds: int = 0) -> list[Job]:
        """What is still to be trained for these arms, in an order in which it can be; all arms with one seed before any
        with the next.

        Args:
          seeds: of each arm at most; 0 = all.
        """
        wanted = [Job(name, seed) for name in names for seed in arms.get(name).seeds[:seeds or None]
                  if arms.get(name).scores]
        wanted = [job for job in sorted(wanted, key=lambda job: job.seed) if self.known(job) is None]
        first = dict.fromkeys(Job(job.arm.start, 0) for job in wanted if job.arm.start)
        return [*first, *(job for job in wanted if job not in first)]

    def run(self, jobs: Sequence[Job]) -> Iterator[Job]:
        """Trains and judges; each job when its result is written.

        Raises:
          ConfigError: a training ended with an exit code; says where its message stands.
        """
        from tools.study import judge
        indices = self.dataset.indices(self.split)
        keys = [self.dataset.record(int(index)).key for index in indices]
        for job in jobs:
            step, began = self.training(job), time.monotonic()
            if code := commands.finish(commands.start(step, commands.environment(self.workdir, False))):
                raise ConfigError(f"{step.title} ended with exit code {code}; its message stands in {step.log}, and "
                                  "the same command goes on from here")
            minutes = (time.monotonic() - began) / 60
            if job.arm.scores:
                last = "speaking" if job.arm.words else "looking"
                light = judge.light(step.result.parent / "checkpoints" / last, self.dataset, indices)
                answers = {"light": dict(zip(keys, map(float, np.round(light, 3)), strict=True))}
                for reader in READERS if job.arm.words else ():
                    answers[reader] = self._read(job, reader)
                write(job, {"arm": job.name, "seed": job.seed, "digest": self.digest(job), "split": self.split,
                            "minutes": round(minutes, 1), "cores": os.cpu_count(),
                            "date": datetime.date.today().isoformat(), "said": answers})
            yield job

    def _read(self, job: Job, reader: str) -> dict[str, float | None]:
        """What the language model of a job says, by record; None where it said no score."""
        folder = self.workdir / f"{job.name}-{job.seed}"
        file = folder / "evaluation" / f"{commands.result_name('scoring', self.dataset.name, self.split, reader)}.json"
        step = commands.Step(f"{job.name}, reader {reader}", (
            "calm_jax.evaluate", "--workdir", str(folder), "--task", "scoring", "--dataset", self.dataset.name,
            "--data_dir", self.data_dir, "--split", self.split, "--reader", reader), file, log=self.workdir / (
                f"{folder.name}-{reader}.log"))
        if code := commands.finish(commands.start(step, commands.environment(self.workdir, False))):
            raise ConfigError(f"{step.title} ended with exit code {code}; its message stands in {step.log}")
        return {answer["key"]: float(answer["said"]) if answer["said"] else None
                for answer in json.loads(file.read_text())["answers"]}


def write(job: Job, result: Mapping[str, Any]) -> None:
    """Keeps a result, whole or not at all."""
    RESULTS.mkdir(exist_ok=True)
    files.write(job.result, json.dumps(result, indent=0) + "\n")


def converted(start: str) -> config_lib.Config:
    """The config of the converted parts.

    Raises:
      CheckpointError: there is no checkpoint; ConfigError: it is of other parts than the recipe's.
    """
    from calm_jax.checkpoints import locate
    found = locate.find(start).config
    if found.model.decoder != config_lib.model("laptop").decoder:
        raise ConfigError(f"{start} is not of the parts of `laptop`; make it with calm parts laptop --out parts and "
                          f"calm convert --parts parts --out {start}")
    return found
