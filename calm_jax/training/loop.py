"""Parameters and one process of a config in; the same parameters, trained and saved, out."""

from __future__ import annotations

import dataclasses
import math
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import multihost_utils
from jaxtyping import Array, Bool

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.checkpoints import array_io, lineage, locate, on_disk, restore
from calm_jax.checkpoints.meta import Saved, unpinned
from calm_jax.checkpoints.store import Checkpoints
from calm_jax.data import cues, pipeline
from calm_jax.data.samples import Dataset
from calm_jax.errors import CheckpointError, ConfigError, TrainingError
from calm_jax.features import frozen as frozen_lib
from calm_jax.models.parameters import Geometry, Parameters
from calm_jax.text.chat import Chat
from calm_jax.training import filters, logging, processes
from calm_jax.training.setup import Setup
from calm_jax.training.startup import Startup
from calm_jax.training.step import State

MIN_EXAMPLES = 200  # before that many, a share of bad records says little
REPEATED = 1.0  # seconds after which a second signal is a second request
UNTRACED = 5  # first steps of a process, which compile and warm up


class Interrupted(SystemExit):
    """A signal ended training after everything was saved."""


@dataclasses.dataclass
class Run:
    """What the processes of a run share.

    Attributes:
      parameters: current once any process has begun.
      trained: those that some process of this run has trained, which every later checkpoint therefore holds.
      origins: where all others are.
      base: the checkpoint that the run began from, as the fields of a Pin.
      data: fingerprints of what the run has learned from.
      startup: is there until it has reported the first step.
      begun: is called once, when the first step has run.
      progress: what a supervisor sees.
      profile: so many steps of each process are traced into the workdir.
    """

    config: config_lib.Config
    workdir: pathlib.Path
    mesh: jax.sharding.Mesh
    geometry: Geometry
    chat: Chat
    parameters: Parameters | None = None
    trained: frozenset[str] = frozenset()
    origins: restore.Origins = dataclasses.field(default_factory=dict)
    base: dict[str, Any] | str = ""
    data: dict[str, str] = dataclasses.field(default_factory=dict)
    startup: Startup | None = None
    begun: Callable[[], None] | None = None
    progress: processes.Progress = dataclasses.field(default_factory=processes.Progress)
    profile: int = 0

    def reached(self, phase: str) -> None:
        if self.startup is not None:
            self.startup.reached(phase)

    def checkpoints(self, name: str) -> Checkpoints:
        """Those of a process; with the tokenizer, unless it ships: its place means nothing elsewhere."""
        own = self.chat.tokenizer
        files = zip((own.FILES[:1] + tuple(file.name for file in own.files[1:])), own.files, strict=True)
        return Checkpoints(self.workdir / "checkpoints" / name, self.config.checkpoint,
                           {file: path.read_bytes() for file, path in files} if self.config.tokenizer else {})


def run_process(run: Run, name: str, datasets: Mapping[str, Dataset]) -> None:
    """Trains process `name` from where it stands to its last step; updates `run.parameters` and `run.trained`.

    Raises:
      TrainingError: loss, parameters or validation loss are not finite, or too many records are bad.
      Interrupted: SIGTERM, SIGINT or SIGHUP came; everything is saved.
      ConfigError, CheckpointError: what was asked for cannot be done, said in one sentence.
    """
    config, process, mesh = run.config, run.config.processes[name], run.mesh
    place = config.run.index(name)
    run.progress(place)
    store = run.checkpoints(name)
    saved = store.latest()
    if saved is not None and saved.step >= process.steps:
        store.close()
        run.parameters, run.trained = None, frozenset(saved.meta["trained"])
        run.data |= saved.meta.get("data", {})
        say(f"{name}: complete ({saved.step} steps)")
        return

    _same_content(run, name, datasets, saved)

    # ---- what learns, where it lives --------------------------------------------------------------------------
    setup = Setup.of(config, name, run.geometry, mesh, run.trained)
    run.trained |= setup.trained.keys()
    # Of an adapter both factors are held, even where one alone learns: they are of no use without each other.
    run.trained |= {path[:-1] + other for path in run.trained if "/lora/" in path for other in "ab"}
    say(f"{name}: {process.steps} steps of {process.batch} rows on {mesh.devices.size} device(s); {setup.why}")
    say(filters.table(run.geometry.shapes, setup.learns))

    # ---- parameters and optimizer state: carried on, resumed, or made anew --------------------------------------
    if saved is not None or run.parameters is None:
        within = saved is not None or config.run.index(name) > 0
        _begin(run, saved or _before(run, name), setup, within=within)
    parameters = {path: jax.device_put(run.parameters.pop(path).astype(leaf.dtype), leaf.sharding)
                  for path, leaf in setup.kept.items()}
    trained = {path: parameters[path] for path in setup.trained}
    frozen = {path: parameters[path] for path in setup.frozen}
    del parameters
    if saved is None:
        moments = jax.jit(setup.tx.init, out_shardings=setup.placements.optimizer)(trained)
        state = State(jnp.zeros((), jnp.int32), trained, moments)
    else:
        restored = array_io.restore(saved, {"parameters": {}, "optimizer": setup.moments})
        state = State(jnp.asarray(saved.step, jnp.int32), trained, restored["optimizer"])
        say(f"{name}: resumes after step {saved.step} from {saved.path}")

    jax.block_until_ready(state)
    run.reached("parameters")

    # ---- the step and its batches -------------------------------------------------------------------------------
    state = jax.device_put(state, setup.placements)
    train_step = setup.compiled()
    eval_step = jax.jit(setup.step.evaluate, out_shardings=setup.placements.step)
    finite = jax.jit(all_finite, out_shardings=setup.placements.step)
    key = jax.random.key(config.seed)
    start = int(state.step)
    run.progress(place, start, start)
    own = sharding.own_rows(mesh, process.batch)
    encoding = frozen_lib.encoder(config.model, run.geometry, frozen, setup.step.dtype, name=name
                                  ) if process.cached else None
    rows = pipeline.Rows(process, datasets, run.chat, config.model, seed=config.seed, split="train",
                         cache_mb=config.data.cache_mb, features=encoding)
    held_out = pipeline.Rows(dataclasses.replace(process, patches=0), datasets, run.chat, config.model,
                             seed=config.seed, split="validation", features=encoding)
    if saved is not None:
        rows.resume(saved.meta.get("cursor", ()))
    batches = pipeline.batches(rows, config.data, batch=process.batch, start=start, stop=process.steps, own=own)

    # ---- the loop: metrics are read one step late, so that the device never waits for the host --------------------
    log = logging.Log(run.workdir, name, start=start, steps=process.steps,
                      title=f"[{place + 1}/{len(config.run)}] {name}")
    best = saved.meta["best"] if saved is not None else None
    if best is not None and not math.isfinite(best):  # said by a version that did not look
        best = None
    meter = Meter(log, process, rows, config, store)
    trace = logging.Trace(run.workdir / "profile" / name, run.profile, start + UNTRACED + 1)

    def save(number: int, is_best: bool) -> None:
        everything = {path: (state.trained | frozen)[path] for path in sorted(run.trained)}
        store.save(number, {"parameters": everything, "optimizer": state.optimizer}, {
            "process": name, "rows": number * process.batch, "best": best, "trained": sorted(run.trained),
            "base": run.base, "borrowed": restore.borrowed(run.origins, run.trained), "seed": config.seed,
            "config": dataclasses.asdict(config), "tokenizer": run.chat.tokenizer.fingerprint,
            "data": run.data, "cursor": cursor}, best=is_best)

    def validate() -> dict[str, float]:
        totals: dict[str, Any] = {}
        for batch in pipeline.batches(held_out, config.data, batch=process.batch, start=0, stop=process.eval_batches,
                                      own=own):
            del batch["cursor"]
            sums = eval_step(state.trained, frozen, sharding.put(batch, mesh, process.batch))
            run.progress()
            totals = sums if not totals else jax.tree.map(jnp.add, totals, sums)
        totals = jax.device_get(totals)
        if not totals["weight"] > 0:
            reasons = "; ".join(f"{key}: {reason}" for key, reason in list(held_out.bad.items())[:1])
            raise TrainingError(f"no answer of the {process.eval_batches} validation batches of {name} can be judged"
                                f"{f' ({reasons})' if reasons else ''}; mend the pictures, or raise eval_batches")
        values = {"loss": float(totals["loss"] / totals["weight"])}
        if totals["answers"]:
            values["accuracy"] = float(totals["right"] / totals["answers"])
        if "score_error" in totals and totals["scores"]:
            values["score_error"] = float(totals["score_error"] / totals["scores"])
        return values

    try:
        with StopSignal() as stop:
            for number, batch in enumerate(batches, start + 1):
                cursor = batch.pop("cursor")[-1].tolist()
                run.reached("first batch")
                trace.before(number)
                placed = sharding.put(batch, mesh, process.batch)
                state, metrics = train_step(state, frozen, placed, key)
                meter.read()
                meter.pending = (number, metrics)
                log.advance()
                if run.startup is not None or run.begun is not None:
                    jax.block_until_ready(metrics)
                if run.begun is not None:
                    run.begun()
                    run.begun = None
                if run.startup is not None:
                    run.reached("first step")
                    log.say(run.startup.report())
                    run.startup = None
                run.progress(place, start, number)
                if trace.after(number, metrics):
                    log.say(f"{name}: steps {trace.first} to {number} are traced in {trace.folder}")
                last, stopping, due = number == process.steps, stop.now(number), store.due(number)
                validates = last or (process.eval_every and number % process.eval_every == 0)
                if not (validates or stopping or due):
                    continue
                meter.read()
                # The loss is that of the weights before the step: those that would be saved are judged themselves.
                if not bool(finite(state)):
                    raise meter.diverged(number, f"after step {number} parameters or moments are not finite")
                is_best = False
                values = validate() if validates else {"loss": float(eval_step(state.trained, frozen, placed)["loss"])}
                if not all(map(math.isfinite, values.values())):
                    raise meter.diverged(number, f"the loss of the weights after step {number} is {values['loss']}")
                if validates:
                    log.write(number, "validation", values)
                    log.say(f"{name} step {number}: validation loss {values['loss']:.4f}" + "".join(
                        f", {words} {values[figure]:.3f}" for figure, words in (
                            ("accuracy", f"{'token' if process.words else 'grade'} accuracy"),
                            ("score_error", "scores off by")) if figure in values))
                    is_best = best is None or values["loss"] < best
                    best = values["loss"] if is_best else best
                if last or is_best or stopping or due:
                    save(number, is_best)
                if stopping:
                    break
            store.wait()
            if stop.received and (number < process.steps or name != config.run[-1]):
                log.say(f"{stop.received}: saved step {number} in {store.folder}; the same command resumes there")
                raise Interrupted(128 + signal.Signals[stop.received].value)
    finally:
        trace.close()
        log.close()
        store.close()
        if encoding is not None:
            encoding.close()
    run.parameters = state.trained | frozen


class Meter:
    """Reads the metrics of the step before, logs them, and stops a run that goes wrong."""

    def __init__(self, log: logging.Log, process: config_lib.Process, rows: pipeline.Rows, config: config_lib.Config,
                 store: Checkpoints):
        self.log, self.process, self.rows, self.config, self.store = log, process, rows, config, store
        self.pending: tuple[int, Mapping[str, jax.Array]] | None = None
        self.examples = self.bad = 0.0
        self._window = [time.monotonic(), 0.0, 0.0]  # begin, examples and tokens since then

    def read(self) -> None:
        """Waits for the pending step's metrics, if any.

        Raises:
          TrainingError: loss or gradients are not finite, or the share of bad records is too high.
        """
        if self.pending is None:
            return
        number, metrics = self.pending
        self.pending = None
        values = {name: float(value) for name, value in jax.device_get(metrics).items()}
        if not values.pop("scores", 1):  # of none there is no error
            del values["score_error"]
        if not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])):
            # They are those of the weights after the step before.
            raise self.diverged(number - 1, f"the loss of step {number} is {values['loss']} (gradient norm "
                                f"{values['grad_norm']})")
        self.examples += values["examples"]
        self.bad += values["bad"]
        if self.examples >= MIN_EXAMPLES and self.bad > self.config.data.max_bad_share * self.examples:
            name, reason = next(iter(self.rows.bad.items()), ("see the log", "unreadable"))
            raise TrainingError(f"{self.bad:.0f} of {self.examples:.0f} examples could not be used, more than "
                                f"data.max_bad_share={self.config.data.max_bad_share}; the first is {name}: {reason}")
        begin, examples, tokens = self._window
        self._window = [begin, examples + values["examples"], tokens + values["tokens"]]
        if number % self.config.log_every == 0 or number == self.process.steps:
            seconds = max(time.monotonic() - begin, 1e-9)
            rates = {"examples_per_s": self._window[1] / seconds, "tokens_per_s": self._window[2] / seconds}
            self._window = [time.monotonic(), 0.0, 0.0]
            fill = values["tokens"] / (self.process.batch * self.process.row.tokens)  # the rest of the rows is padding
            self.log.write(number, "train", values | rates | {"fill": fill})
            self.log.show({"loss": f"{values['loss']:.3f}", "examples/s": f"{rates['examples_per_s']:.1f}",
                           "tokens/s": f"{rates['tokens_per_s']:.0f}", "fill": f"{fill:.0%}"})

    def diverged(self, step: int, what: str) -> TrainingError:
        """The error for weights that are no good after `step`, which names the last checkpoint before."""
        self.store.wait()
        good = [path for path in on_disk.folders(self.store.folder)
                if on_disk.is_complete(path) and int(path.name) < step]
        where = f"the last good checkpoint is {good[-1]}" if good else "no checkpoint was saved before"
        return TrainingError(f"{what}; {where}. Lower optimizer.peak_lr or optimizer.clip and run again in a new "
                             f"workdir{' with --config.init set to it' if good else ''}")


def all_finite(tree: Any) -> Bool[Array, ""]:
    """Whether every number of every array is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.stack([jnp.isfinite(leaf).all() for leaf in leaves]).all()


class StopSignal:
    """Notes SIGTERM, SIGINT and SIGHUP instead of dying, so that the loop can save first. `received` is the signal's
    name. A signal that is ignored, such as SIGHUP under nohup, stays ignored.

    With several processes a SIGTERM to one of them stops all, at one step, which JAX's preemption service agrees on; it
    listens for the signal itself.
    """

    def __init__(self):
        self.received, self._since = "", 0.0

    def now(self, step: int) -> bool:
        """Whether to stop behind this step; all processes must ask at every step, and get the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.received = signal.SIGTERM.name
        return bool(self.received)

    def __enter__(self):
        self._old = {}
        if threading.current_thread() is threading.main_thread() and jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                if signal.getsignal(number) != signal.SIG_IGN:
                    self._old[number] = signal.signal(number, self._note)
        return self

    def _note(self, number, _):
        if self.received:
            # Asked twice: do not wait for the step to end. One request can come twice at once: the kernel tells of a
            # parent's end for every thread of it.
            if time.monotonic() - self._since > REPEATED:
                raise KeyboardInterrupt
            return
        self.received, self._since = signal.Signals(number).name, time.monotonic()

    def __exit__(self, *_):
        for number, handler in self._old.items():
            signal.signal(number, handler)


def say(text: str) -> None:
    """A line for the person at the terminal, from the first process only."""
    if jax.process_index() == 0:
        print(text, file=logging.Terminal(sys.stdout), flush=True)


def _begin(run: Run, saved: Saved | None, setup: Setup, *, within: bool) -> None:
    """Reads the parameters of `saved`, a checkpoint `within` this run or the one that it begins from, or draws them.

    Raises:
      ConfigError: the tokenizer is not the one of `saved`, whose word embeddings would be of other words.
      CheckpointError: as `restore.origins` and `restore.read`.
    """
    if saved is not None:
        if saved.meta["tokenizer"] != run.chat.tokenizer.fingerprint:
            raise ConfigError(f"the checkpoint {saved.path} was trained with another tokenizer than "
                              f"{run.chat.tokenizer.name}; set --config.tokenizer to "
                              f"{restore.chat(saved).tokenizer.name}")
        if (theirs := saved.config.chat) != run.chat.template:
            say(f"the conversations of {saved.path} follow the chat template {theirs}; here they follow "
                f"{run.chat.template}")
        run.base = dataclasses.asdict(saved.pin) if not within else "" if unpinned(
            saved.meta) else saved.meta["base"]
    run.origins = restore.origins(saved, run.config)
    for line in restore.changes(saved, run.config):
        say(line)
    for pin in restore.lenders({path: origin for path, origin in run.origins.items() if path not in run.trained}):
        lineage.protect(pin, run.workdir)
    run.parameters = restore.read(run.origins, setup.kept, run.config.model, saved)


def _same_content(run: Run, name: str, datasets: Mapping[str, Dataset], saved: Saved | None) -> None:
    """Notes what process `name` learns from.

    Raises:
      ConfigError: it is not what this run has learned from so far.
    """
    cues_file = run.config.processes[name].cues
    found = {f"dataset {key}": dataset.fingerprint for key, dataset in datasets.items()}
    found |= {f"file of cues {cues_file}": cues.fingerprint(cues_file)} if cues_file else {}
    found["tokenizer"] = run.chat.tokenizer.fingerprint
    known = run.data | (saved.meta.get("data", {}) if saved is not None else {})
    for what, fingerprint in found.items():
        if known.get(what, fingerprint) != fingerprint:
            newest = f"--config.init={saved.path}" if saved is not None else f"--config.init={run.workdir}"
            raise ConfigError(
                f"the {what} has changed since {run.workdir} was trained on it (fingerprint {known[what]} then, "
                f"{fingerprint} now): give it back its content to resume, or train on the new one in another --workdir"
                f", from what was learned with {newest} or from the start")
    run.data = known | found


def _before(run: Run, name: str) -> Saved | None:
    """Where a process that has not begun takes its parameters from: the process before it, else `config.init`."""
    index = run.config.run.index(name)
    if index:
        store = run.checkpoints(run.config.run[index - 1])
        saved = store.latest()
        store.close()
        if saved is None:
            raise CheckpointError(f"{name} follows {run.config.run[index - 1]}, which has no checkpoint in "
                                  f"{store.folder}")
        return saved
    return locate.find(run.config.init) if run.config.init else None
