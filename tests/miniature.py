"""Nothing in; the smallest model, batches and runs that still have every part, shared by the tests of training, out."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import pathlib
import signal
import subprocess
import sys
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from calm_jax import config as config_lib

ROOT = pathlib.Path(__file__).resolve().parents[1]
# CALM_THOROUGH=1 make test-slow: a test that `sweeps` takes every case there; in `make test` one of every kind.
THOROUGH = bool(os.environ.get("CALM_THOROUGH"))
sweeps = pytest.mark.slow if THOROUGH else (lambda test: test)

MODEL = config_lib.Model(
    encoder=config_lib.encoder("clip", image_size=32, patch=8, width=32, depth=2, heads=2, mlp_width=64, stem="conv"),
    depths=config_lib.Depths(low=0.5, middle=0.5, high=1.0, thematic=1.0),
    qformer=config_lib.QFormer(width=32, depth=1, heads=2, mlp_width=64, cross_every=1, queries=2),
    decoder=config_lib.decoder("llama", vocab=2048, width=32, depth=2, heads=2, kv_heads=2, mlp_width=64,
                               positions=512),
    remat="none")
ROW = config_lib.Row(tokens=192, images=2, answers=64)
PROCESS = config_lib.Process(dataset="demo", tasks={"caption": 1.0}, parts=("low", "thematic"), row=ROW, batch=2,
                             steps=4, eval_every=2, eval_batches=1, optimizer=config_lib.Optimizer(peak_lr=1e-2))


def config(**changes) -> config_lib.Config:
    """One process called `only` over the miniature model; `changes` are fields of the Config."""
    values = {"model": MODEL, "run": ("only",), "processes": {"only": PROCESS}, "log_every": 1,
              "mesh": config_lib.Mesh(fsdp=-1), **changes}
    return config_lib.Config(**values)


def process(**changes) -> config_lib.Process:
    return dataclasses.replace(PROCESS, **changes)


def batch(model: config_lib.Model, of: config_lib.Process, seed: int = 0) -> dict[str, np.ndarray]:
    """A random but valid batch: packed segments and padding, images, hard and soft targets, unused places."""
    rng = np.random.default_rng(seed)
    rows, row = of.batch, of.row
    size = sum(model.visual_tokens(part) for part in of.parts)
    out = {
        "images": rng.integers(0, 256, (rows, row.images, model.encoder.image_size, model.encoder.image_size, 3),
                               np.uint8),
        "tokens": rng.integers(3, model.decoder.vocab, (rows, row.tokens), np.int32),
        "visual": np.full((rows, row.tokens), -1, np.int32),
        "segments": np.zeros((rows, row.tokens), np.int32),
        "positions": np.zeros((rows, row.tokens), np.int32),
        "places": np.zeros((rows, row.answers), np.int32),
        "labels": rng.integers(3, model.decoder.vocab, (rows, row.answers, row.candidates), np.int32),
        "weights": np.zeros((rows, row.answers, row.candidates), np.float32),
        "asked": rng.integers(0, row.tokens, (rows, row.images), np.int32),
        "targets": np.where(rng.random((rows, row.images)) < 0.6, rng.uniform(1, 10, (rows, row.images)), 0
                            ).astype(np.float32),
        "bad": np.zeros(rows, np.int32),
    }
    for r in range(rows):
        cuts = np.sort(rng.choice(np.arange(size + 4, row.tokens - 4), 1))
        for number, (start, stop) in enumerate(((0, cuts[0]), (cuts[0], row.tokens - int(rng.integers(1, 4)))), 1):
            out["segments"][r, start:stop] = number
            out["positions"][r, start:stop] = np.arange(stop - start)
            image = (number - 1) % row.images
            seen = min(size, stop - start - 1)
            out["visual"][r, start + 1:start + 1 + seen] = image * size + np.arange(seen)
        used = int(rng.integers(1, row.answers + 1))  # rows differ in how much they answer
        out["places"][r, :used] = rng.integers(0, row.tokens - 5, used)
        out["weights"][r, :used] = rng.dirichlet(np.ones(row.candidates), used) * rng.choice([0.5, 1.0], (used, 1))
    return out


def saved(folder: pathlib.Path, parts: tuple[str, ...] = PROCESS.parts, tasks: tuple[str, ...] = (), *,
          tokenizer: str = "", template: str = "vicuna", drawn: bool = False, **changes) -> str:
    """A checkpoint as training saves it, of random parameters, which says that it learned some tasks or, without any
    named, all; `changes` are fields of MODEL. With `drawn` no bias is zero, no norm one, and nothing is compiled."""
    from calm_jax.checkpoints.store import Checkpoints
    from calm_jax.data.tasks import TASKS
    from calm_jax.models.parameters import Geometry, initial
    from calm_jax.text import chat as chat_lib  # here: what only starts programs needs no JAX
    model = dataclasses.replace(MODEL, **changes)
    if drawn:
        rng = np.random.default_rng(0)
        parameters = {path: (path.endswith("scale") + rng.normal(size=leaf.shape) * (
            leaf.shape[-2] ** -0.5 if path.endswith("kernel") else 0.2)).astype(np.float32)
            for path, leaf in Geometry.of(model).shapes.items()}
    else:
        parameters = jax.jit(lambda key: initial(model, key))(jax.random.key(1))
        parameters = {path: leaf + 0.1 if path.endswith("lora/b") else leaf for path, leaf in parameters.items()}
    checkpoints = Checkpoints(folder, config_lib.Checkpoint())
    meta = {"process": "only", "rows": 0, "best": None, "trained": sorted(parameters), "base": "", "seed": 0,
            "config": dataclasses.asdict(config(
                model=model, tokenizer=tokenizer, chat=template, processes={"only": process(
                    parts=parts, tasks=dict.fromkeys(tasks or TASKS, 1.0), support=(1, 1),
                    score_head=float(model.score_head.width > 0))})),
            "tokenizer": chat_lib.load(tokenizer, template).tokenizer.fingerprint}
    checkpoints.save(3, {"parameters": parameters, "optimizer": ()}, meta)
    checkpoints.close()
    return str(folder)


def overrides(values: dict, path: str = "config") -> list[str]:
    """Command-line flags that set the fields of a nested dict."""
    flags = []
    for name, value in values.items():
        if isinstance(value, dict):
            flags += overrides(value, f"{path}.{name}")
        else:
            flags.append(f"--{path}.{name}={value!r}" if not isinstance(value, str) else f"--{path}.{name}={value}")
    return flags


# configs/pretrain.py:tiny made as small as MODEL; one of its processes, thirty steps.
SMALL = {
    "model": {
        "encoder": {"image_size": 32, "width": 32, "heads": 2, "depth": 2, "mlp_width": 64},
        "qformer": {"width": 32, "heads": 2, "depth": 1, "mlp_width": 64, "queries": 2},
        "decoder": {"width": 32, "heads": 2, "kv_heads": 2, "depth": 2, "mlp_width": 64}},
    "processes": {"generic": {"steps": 30, "batch": 2, "eval_every": 10, "eval_batches": 1,
                              "optimizer": {"peak_lr": 0.01}, "row": {"tokens": 192, "images": 2, "answers": 64}}},
    "run": ("generic",),
    "checkpoint": {"every_steps": 4},
    "log_every": 1,
}


# Code: the most memory that this process has held, KiB. `ru_maxrss` begins with that of the process it was forked from,
# here a test worker with everything that it has loaded.
PEAK = "int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"


def command(workdir: pathlib.Path, *extra: str, values: dict | None = None) -> list[str]:
    """The training program on configs/pretrain.py with SMALL (or `values`) as overrides."""
    return [sys.executable, "-m", "calm_jax.train", "--config", "configs/pretrain.py", "--workdir", str(workdir),
            *overrides(SMALL if values is None else values), *extra]


def environment(cache: pathlib.Path | None = None, devices: int = 1) -> dict[str, str]:
    """One CPU device or several simulated ones, quick compilation, and a cache, so that a restart costs little."""
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
           "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests", *sorted((ROOT / "tests").glob("[a-z]*/"))))),
           "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"}
    if cache is not None:
        env |= {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}
    return env


@contextlib.contextmanager
def compiled_once(cache: pathlib.Path) -> Iterator[None]:
    """Programs of this process are compiled quickly, and each once, however often a test trains."""
    settings = {"jax_disable_most_optimizations": True, "jax_persistent_cache_min_compile_time_secs": 0,
                "jax_persistent_cache_min_entry_size_bytes": -1, "jax_compilation_cache_dir": str(cache)}
    before = {name: jax.config.values[name] for name in settings}
    compilation_cache.reset_cache()
    for name, value in settings.items():
        jax.config.update(name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


def run(arguments: list[str], env: dict[str, str], timeout: float = 900, cwd: pathlib.Path = ROOT
        ) -> subprocess.CompletedProcess:
    """A program that ends within `timeout` seconds; one that does not is asked where all its threads are (SIGUSR1, to
    which training answers), and fails the test with what it said."""
    started = subprocess.Popen(arguments, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        said = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        started.send_signal(signal.SIGUSR1)
        with contextlib.suppress(subprocess.TimeoutExpired):
            started.communicate(timeout=20)
        started.kill()
        said = started.communicate()
        pytest.fail(f"{arguments} did not end within {timeout} s; it said:\n{said[0][-4000:]}\n{said[1][-12000:]}")
    return subprocess.CompletedProcess(arguments, started.returncode, *said)
