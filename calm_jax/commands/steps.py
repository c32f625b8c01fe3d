"""Commands of this project in, run one after the other or side by side, and not again when they are up to date."""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys

# Compiled code that runs slowly is the right thing for three steps.
FAST_COMPILER = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@dataclasses.dataclass(frozen=True)
class Step:
    """One command: its headline, the arguments of `python -m`, the file that it writes, and what it is made from.

    `result` of a training is its metrics; an evaluation whose result is newer than all checkpoints in `sources`, and
    has the values of `asked`, is not repeated, nor is what is made `once` and is there. The output of a step with a
    `log` goes there.
    """

    title: str
    arguments: tuple[str, ...]
    result: pathlib.Path
    sources: tuple[pathlib.Path, ...] = ()
    log: pathlib.Path | None = None
    once: bool = False
    asked: tuple[tuple[str, object], ...] = ()

    @property
    def current(self) -> bool:
        """Whether it need not run again; a training decides by itself."""
        if self.once:
            return self.result.is_file()
        if not self.sources or not self.result.is_file():
            return False
        try:
            found = json.loads(self.result.read_text()) if self.asked else {}
        except ValueError:  # it says itself what is wrong with its file
            return False
        if any(found.get(name) != value for name, value in self.asked):
            return False
        made = [marker.stat().st_mtime for source in self.sources for marker in source.rglob("COMPLETE.json")]
        return bool(made) and max(made) < self.result.stat().st_mtime


def result_name(task: str, dataset: str, split: str, reader: str = "text", method: str = "context") -> str:
    """Of the files of an evaluation, without their ending: those of other readers and methods than the paper's stand
    beside it."""
    other = {"scoring": [reader] if reader != "text" else [], "personalised": [method] if method != "context" else []}
    return "-".join((task, dataset, split, *other.get(task, ())))


def interpreter() -> str:
    """How to call this Python from here, without a path that means something on this machine only."""
    inside = os.path.relpath(sys.executable)
    return "python" if inside.startswith("..") else inside


def command_line(step: Step) -> str:
    """The step as it is typed."""
    return shlex.join([interpreter(), "-m", *step.arguments])


def start(step: Step, environment: dict[str, str]) -> subprocess.Popen:
    """Starts a step. One with a log writes there and hears no Ctrl-C: the caller stops it, once, so that it saves."""
    if step.log is None:
        return subprocess.Popen([sys.executable, "-m", *step.arguments], env=environment)
    with step.log.open("a") as stream:
        return subprocess.Popen([sys.executable, "-m", *step.arguments], env=environment, stdout=stream, stderr=stream,
                                start_new_session=True)


def finish(child: subprocess.Popen) -> int:
    """Waits for a step and returns its exit code; SIGINT and SIGTERM reach it, and it saves before it goes."""
    before = signal.signal(signal.SIGTERM, lambda *_: child.send_signal(signal.SIGTERM))
    try:
        while True:
            try:
                return child.wait()
            except KeyboardInterrupt:  # the terminal sent it to the child as well
                continue
    finally:
        signal.signal(signal.SIGTERM, before)


def environment(workdir: pathlib.Path, quick: bool) -> dict[str, str]:
    """What the steps share: a cache of compiled programs, so that each is compiled once."""
    values = {"JAX_COMPILATION_CACHE_DIR": str((workdir / "cache").absolute()),
              "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    if quick:
        values["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FAST_COMPILER}".strip()
    return os.environ | values


def changed(path: pathlib.Path) -> int:
    """When a file was last written, nanoseconds; 0 where there is none. A command that was complete leaves it."""
    return path.stat().st_mtime_ns if path.is_file() else 0
