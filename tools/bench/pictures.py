"""A model's geometry in; how many photographs a second it looks at when it has never seen them, and when it has, out.

    python -m tools.bench pictures --config finetune:laptop [--rounds 3]

Part of `tools.bench`. The photographs are JPEG files, windows of the demo's at 512 pixels. Two ways are measured, with
nothing kept of them yet (cold) and a second time (warm): `score`, what `calm score` does, from files to scores, with
visual tokens kept; and `train`, from files to the features of a frozen encoder for a batch, without the training
itself. Programs are compiled before. Each round begins with an empty cache.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax import config as config_lib
from calm_jax.errors import ConfigError
from calm_jax.features import store
from tools.bench import contenders
from tools.bench import data as bench_data
from tools.bench import inference as bench_inference

PICTURES = 96
BATCH = 16
WAYS = ("score", "train")
SECTION = "Photographs seen before"  # of docs/benchmarks.md, and the columns of its table
COLUMNS = ("", "cold, pictures/s", "warm, pictures/s", "warm / cold")


def measure(config: config_lib.Config, scratch: pathlib.Path, *, rounds: int, pictures: int = PICTURES) -> dict:
    """Pictures a second of each way, cold and warm, of each round; `scratch` takes files and weights."""
    contenders.stay_on_cpu()
    checkpoint = bench_inference.checkpoint(config, scratch / "checkpoint")
    bench_data.write_pictures(scratch / "files", pictures)
    found: dict[str, dict[str, list[float]]] = {way: {"cold": [], "warm": []} for way in WAYS}
    for number in range(rounds):
        place = scratch / "cache"
        done = subprocess.run([sys.executable, "-m", "tools.bench.pictures", str(checkpoint), str(scratch / "files")],
                              env={**contenders.ENVIRONMENT, **os.environ, store.PLACE: str(place)}, text=True,
                              capture_output=True)
        if done.returncode:
            raise ConfigError(f"looking at pictures failed: {done.stderr[-2000:]}")
        for way, taken in json.loads(done.stdout.splitlines()[-1]).items():
            for state, seconds in taken.items():
                found[way][state].append(pictures / seconds)
            print(f"  round {number + 1}: {way:<8}" + "".join(f"{state} {pictures / seconds:>8.1f}/s  "
                                                              for state, seconds in taken.items()), flush=True)
        shutil.rmtree(place)
    return {"what": "pictures", "pictures": pictures, "side": bench_data.SIDE, "results": found}


def show(result: Mapping[str, Any]) -> str:
    """The result as aligned text."""
    lines = [f"{result['pictures']} photographs of {result['side']} px, {result['machine']}",
             f"  {'':<10}{'cold, pictures/s':>24}{'warm, pictures/s':>26}{'warm / cold':>14}"]
    for name, cold, warm, ratio in cells(result):
        lines.append(f"  {name:<10}{cold:>24}{warm:>26}{ratio:>14}")
    return "\n".join(lines)


def cells(result: Mapping[str, Any]) -> list[list[str]]:
    """The rows of the table, without its common columns."""
    rows = []
    for way, rates in result["results"].items():
        ratio = statistics.median(warm / cold for warm, cold in zip(rates["warm"], rates["cold"], strict=True))
        rows.append([way, *(f"{statistics.median(rates[state]):.1f} ({min(rates[state]):.1f} to "
                            f"{max(rates[state]):.1f})" for state in ("cold", "warm")), f"{ratio:.1f}"])
    return rows


# ---- in a process of its own ---------------------------------------------------------------------------------------


def _score(checkpoint: str) -> Callable[[Sequence[pathlib.Path | np.ndarray]], None]:
    from calm_jax.checkpoints import restore
    from calm_jax.data import pictures
    from calm_jax.features import keys
    from calm_jax.inference.generate import Generator, Pictures
    model = restore.model(checkpoint)
    generator = Generator(model.config.model, model.parameters, model.chat, dtype=model.dtype, keep=True)

    def look(sources: Sequence[pathlib.Path | np.ndarray]) -> None:
        asked = [bench_inference.question(index) for index in range(len(sources))]
        shown = Pictures(lambda index: pictures.pixels(sources[index]), lambda index: keys.of_source(sources[index]))
        assert all(score.parsed for score in generator.scores(asked, shown, batch=BATCH))

    return look


def _train(checkpoint: str) -> Callable[[Sequence[pathlib.Path | np.ndarray]], None]:
    from calm_jax.checkpoints import restore
    from calm_jax.data import images, pictures
    from calm_jax.data.samples import ImageRef
    from calm_jax.features import frozen, keys
    from calm_jax.models.parameters import Geometry
    model = restore.model(checkpoint)
    encoding = frozen.encoder(model.config.model, Geometry.of(model.config.model), model.parameters, model.dtype,
                              name="measured")

    def look(sources: Sequence[pathlib.Path | np.ndarray]) -> None:
        for begin in range(0, len(sources), BATCH):
            waits = [encoding.ask("features", keys.of_source(source), ImageRef(0),
                                  lambda source=source: images.Fitter(pictures.pixels(source)))
                     for source in sources[begin:begin + BATCH]]
            for wait in waits:
                wait()

    return look


def main(checkpoint: str, folder: str) -> None:
    """Each way once, cold and warm; prints seconds as JSON."""
    files = sorted(pathlib.Path(folder).glob("*.jpg"))
    rng = np.random.default_rng(0)
    others = [rng.integers(0, 256, (64, 64, 3), np.uint8) for _ in range(BATCH)]  # to compile with
    taken: dict[str, dict[str, float]] = {}
    for way, make in zip(WAYS, (_score, _train), strict=True):
        look = make(checkpoint)
        look(others)
        taken[way] = {}
        for state in ("cold", "warm"):
            begin = time.perf_counter()
            look(files)
            taken[way][state] = time.perf_counter() - begin
    print(json.dumps(taken), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
