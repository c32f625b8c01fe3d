"""Metrics in; a progress bar, metrics.jsonl and TensorBoard files, by the first process only, and traces out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

import jax
import tqdm

from calm_jax import files


class Terminal:
    """Standard error or output, whose reader may go away: the training goes on, unheard."""

    def __init__(self, stream: Any):
        self._stream, self.encoding = stream, getattr(stream, "encoding", None)

    def _tried(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except OSError:
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self._stream.fileno())

    def write(self, text: str) -> None:
        self._tried(lambda: self._stream.write(text))

    def flush(self) -> None:
        self._tried(self._stream.flush)

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


class Log:
    """The log of one training process inside a workdir.

    Lines of metrics.jsonl are JSON objects with `process`, `step` and `kind` (train or validation). Lines behind the
    step a run resumes from are cut, so that the file reads as if it had never been interrupted.
    """

    def __init__(self, workdir: str | os.PathLike, process: str, *, start: int, steps: int, title: str):
        self.process, self.active = process, jax.process_index() == 0
        if not self.active:
            return
        folder = pathlib.Path(workdir)
        self._path = folder / "metrics.jsonl"
        cut(self._path, process, start)
        self._file = self._path.open("a", buffering=1)
        self._board = _tensorboard().SummaryWriter(str(folder / "tensorboard" / process), purge_step=start + 1)
        self._terminal = Terminal(sys.stderr)
        self._bar = tqdm.tqdm(total=steps, initial=start, desc=title, unit="step", file=self._terminal,
                              mininterval=0.5, maxinterval=30, dynamic_ncols=True)

    def advance(self) -> None:
        """One more step is done."""
        if self.active:
            self._bar.update()

    def show(self, values: Mapping[str, str]) -> None:
        """Figures beside the bar, such as loss and examples/s."""
        if self.active:
            self._bar.set_postfix(values, refresh=False)

    def write(self, step: int, kind: str, values: Mapping[str, float]) -> None:
        """Appends a line and the TensorBoard scalars of a step."""
        if not self.active:
            return
        # JSON has no nan: what cannot be measured is null.
        record = {"process": self.process, "step": step, "kind": kind,
                  **{name: value if math.isfinite(value) else None for name, value in values.items()}}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.active:
            self._bar.write(text, file=self._terminal)

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._file.close()
            self._board.close()


class Trace:
    """A profiler trace of a few steps, for XProf (TensorBoard's profile plugin) and Perfetto.

    Args:
      folder: where it goes; every process adds a file of its own.
      steps: how many; 0 = none.
      first: the number of the first step that is traced.
    """

    def __init__(self, folder: pathlib.Path, steps: int, first: int):
        self.folder, self.first, self.behind = folder, first, first + steps
        self._running = False

    def before(self, step: int) -> None:
        """Must be called before each step."""
        if step == self.first < self.behind:
            jax.profiler.start_trace(str(self.folder))
            self._running = True

    def after(self, step: int, result: Any) -> bool:
        """Whether the trace was complete with this step, for whose arrays `result` it then waits."""
        if not self._running or step + 1 < self.behind:
            return False
        jax.block_until_ready(result)
        self.close()
        return True

    def close(self) -> None:
        """Ends a trace that still runs, such as that of a run with fewer steps."""
        if self._running:
            self._running = False
            jax.profiler.stop_trace()


def _tensorboard() -> Any:
    """tensorboardX, which imports torch wherever it is installed, for seconds and nothing: it is hidden meanwhile."""
    hidden = "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        import tensorboardX
    finally:
        if hidden:
            del sys.modules["torch"]
    return tensorboardX


def cut(path: pathlib.Path, process: str, step: int) -> None:
    """Removes lines of `process` behind `step`, and a last line that a crash left half written."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if record["process"] != process or record["step"] <= step:
            kept.append(line + "\n")
    files.write(path, "".join(kept))


def read(path: str | os.PathLike) -> list[dict]:
    """All records of a metrics.jsonl."""
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
