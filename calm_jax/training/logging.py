"""Metrics in; a progress bar, metrics.jsonl and TensorBoard files out. Only the first process writes."""

from __future__ import annotations

import json
import os
import pathlib
import sys
from collections.abc import Mapping
from typing import Any

import jax
import tqdm


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
        self._bar = tqdm.tqdm(total=steps, initial=start, desc=title, unit="step", file=sys.stderr, mininterval=0.5,
                              maxinterval=30, dynamic_ncols=True)

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
        record = {"process": self.process, "step": step, "kind": kind, **values}
        self._file.write(json.dumps(record) + "\n")
        for name, value in values.items():
            self._board.add_scalar(f"{kind}/{name}", value, step)

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self.active:
            self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        if self.active:
            self._bar.close()
            self._file.close()
            self._board.close()


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
    partial = path.with_name(path.name + ".partial")
    partial.write_text("".join(kept))
    partial.replace(path)


def read(path: str | os.PathLike) -> list[dict]:
    """All records of a metrics.jsonl."""
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]
