"""A process of a config in; how long its training step takes, beside the same geometry in torch, out.

    python -m tools.bench train --config configs/finetune.py:small [--against torch] [--rows 2] [--rounds 5]
    python -m tools.bench train --config configs/finetune.py:7b --against torch --depth 16

Part of `python -m tools.bench train`. Ours is the project's own step, as `calm_jax.train` compiles it; theirs is in
tools/bench_torch.py. Both have random weights of their own, teach what the process teaches, and keep frozen parts in
the dtype of the computation. Where the config keeps more of a block than its input and torch runs out of memory, it is
measured with checkpointed blocks, and the result says so.

The batch is made of random pixels and words: every row is full, with as many conversations as pictures, all of equal
length, so that neither datasets nor photographs are needed. Real rows take the same time, having the same shapes, and
hold fewer tokens: training logs their `fill`.

Model FLOPs are those of `calm_jax.models.flops`: what the process needs, whatever is computed again to save memory.

On CPU, where two libraries multiply at different rates, both also multiply what their steps multiply and nothing else
(products.py): the report says what is left of the ratio once that difference is taken off.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import statistics
import sys
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from calm_jax import config as config_lib
from calm_jax.data import pipeline
from calm_jax.errors import ConfigError
from tools.bench import contenders, products

SECTION = "Training step"  # of docs/benchmarks.md, and the columns of its table
COLUMNS = ("calm_jax", "torch", "time ratio", "memory ratio")
CHECKPOINTED = "torch with checkpointed blocks, for without it runs out of memory"
# What is in a device's name -> the chip of `tools.plan` with its peak.
KINDS = {"h200": "h100", "h100": "h100", "a100": "a100", "v5 lite": "v5e", "v6 lite": "v6e"}


def measure(config: config_lib.Config, *, against: bool, rounds: int, depth: int = 0) -> dict:
    """Median times of every contender's step of the first process of `config.run`, as JSON values.

    Args:
      against: also torch.
      rounds: measured steps, after one to warm up.
      depth: blocks of the language model instead of the config's, where all of them do not fit; 0 = the config's.

    Raises:
      ConfigError: torch's side cannot do what the process does, or a contender died.
    """
    contenders.stay_on_cpu()
    from calm_jax.models import flops
    blocks = config.model.decoder.depth
    if depth:
        if not 0 < depth <= blocks:
            raise ConfigError(f"--depth {depth}: the language model has {blocks} blocks")
        config = with_depth(config, depth)
    process = config.processes[config.run[0]]
    learns = learning(config)
    if against:
        whole(config, learns)
    config = dataclasses.replace(config, processes={config.run[0]: process})
    taught = json.dumps(taught_parts(learns))

    def compete(of: config_lib.Config, sides: Mapping[str, str]) -> dict[str, contenders.Played]:
        return contenders.compete({name: [sys.executable, "-m", "tools.bench.train", side,
                                          json.dumps(dataclasses.asdict(of)), taught]
                                   for name, side in sides.items()}, [[]], rounds + 1, twice=True)

    played = compete(config, {"calm_jax": "jax", **({"torch": "torch"} if against else {})})
    checkpointed = against and bool(played["torch"].error) and config.model.remat != "full"
    if checkpointed:  # autograd keeps more than we do: torch computes again what it cannot hold
        of = dataclasses.replace(config, model=dataclasses.replace(config.model, remat="full"))
        played |= compete(of, {"torch": "torch"})
    batch = make_batch(config)
    size = {"rows": process.batch, "tokens": int((batch["segments"] > 0).sum()),
            "pictures": int(np.any([value.reshape(*value.shape[:2], -1).any(-1) for name, value in batch.items()
                                    if shows(name)], 0).sum())}
    work = {kind: value * process.batch for kind, value in flops.a_row(config.model, process, learns).items()}
    device = played["calm_jax"].device
    return {"what": "train", "process": config.run[0], **size, "depth": depth, "blocks": blocks, "flops": work,
            "torch_checkpointed": checkpointed,
            "device": device, "machine": contenders.machine(device), "peak_flops": peak_flops(device),
            "numerics": played["calm_jax"].built.get("numerics", ""),
            "products": _multiply(compete, config, learns, played) if against and device["platform"] == "cpu" else {},
            "results": {name: row(one, size, sum(work.values()), peak_flops(device)) for name, one in played.items()}}


def _multiply(compete, config: config_lib.Config, learns: Mapping[str, bool],
              played: Mapping[str, contenders.Played]) -> dict[str, Any]:
    """FLOPs of the products of a step, and the median seconds that each contender takes for nothing else; {} where one
    of them had no memory for its step."""
    if any(one.error for one in played.values()):
        return {}
    alone = compete(config, {"calm_jax": "jax-products", "torch": "torch-products"})
    times = {name: statistics.median(replies[0]["seconds"] for replies in one.rounds[1:])
             for name, one in alone.items()}
    return {"flops": sum(product.flops for product in products.of_step(config, learns)), "seconds": times}


def row(played: contenders.Played, size: Mapping[str, int], work: float, peak: float | None) -> dict[str, Any]:
    """A contender's figures; its `error` where it has none.

    Args:
      size: rows, tokens and pictures of a step.
      work: model FLOPs of a step.
      peak: FLOP/s of the device, if known.
    """
    if played.error:
        return {"error": played.error}
    warm, *measured = [replies[0] for replies in played.rounds]
    times = [reply["seconds"] for reply in measured]
    median = statistics.median(times)
    return {"median_s": median, "min_s": min(times), "max_s": max(times),
            "first_s": played.built["seconds"] + warm["seconds"], "tokens_per_s": size["tokens"] / median,
            "pictures_per_s": size["pictures"] / median, "flop_per_s": work / median,
            "mfu": work / median / peak if peak else None, "peak_bytes": measured[-1]["peak"],
            "trained": played.built["trained"], "loss": measured[-1]["value"]}


def peak_flops(device: Mapping[str, Any]) -> float | None:
    """bfloat16 FLOP/s of all devices together by their maker; None where that is not known."""
    from calm_jax.commands import plan
    kind = next((chip for part, chip in KINDS.items() if part in device["kind"].lower()), None)
    return plan.CHIPS[kind].peak * device["count"] if kind else None


def with_depth(config: config_lib.Config, depth: int) -> config_lib.Config:
    """The same with so many blocks of the language model."""
    llama = dataclasses.replace(config.model.decoder, depth=depth)
    return dataclasses.replace(config, model=dataclasses.replace(config.model, decoder=llama))


def learning(config: config_lib.Config) -> dict[str, bool]:
    """path -> whether the first process teaches it."""
    from calm_jax.models.parameters import Geometry
    from calm_jax.training import filters
    return filters.trainable(Geometry.of(config.model).shapes, config.processes[config.run[0]])


PREFIXES = {"encoder": "encoder/", "qformers": "mfam/qformers/", "thematic": "mfam/thematic/", "decoder": "decoder/"}


def taught_parts(learns: Mapping[str, bool]) -> dict[str, bool]:
    """part of torch's side -> whether it learns; `lora` are the low-rank updates, if any."""
    parts = {name: any(learn for path, learn in learns.items() if path.startswith(prefix) and "/lora/" not in path)
             for name, prefix in PREFIXES.items()}
    return parts | {"lora": any(learn for path, learn in learns.items() if "/lora/" in path)}


def beyond(model: config_lib.Model) -> list[str]:
    """What torch_side.py does not compute of a model; it would build another one without a word."""
    encoder, decoder = model.encoder, model.decoder
    if encoder.family not in ("clip", "dinov2") or decoder.family != "llama":
        return [f"model.encoder.family={encoder.family}, model.decoder.family={decoder.family}"]
    clip = encoder.family == "clip"
    exact = clip or encoder.mlp_width % encoder.width == 0  # Dinov2Model names the MLP's width by a whole ratio
    options = (("encoder.mlp_width", encoder.mlp_width, encoder.mlp_width if exact else "a multiple of the width"),
               ("encoder.activation", encoder.activation, "quick_gelu" if clip else "gelu"),
               ("encoder.native_size", encoder.native, encoder.image_size if clip else encoder.native),
               ("encoder.registers", encoder.registers, 0), ("decoder.qkv_bias", decoder.qkv_bias, False),
               ("decoder.qk_norm", decoder.qk_norm, False), ("decoder.rope_factor", decoder.rope_factor, 1.0))
    return [f"model.{name}={value}" for name, value, plain in options if value != plain]


def whole(config: config_lib.Config, learns: Mapping[str, bool]) -> None:
    """Raises ConfigError where torch's side, which freezes whole parts, cannot do the same, or is of another model."""
    if config.processes[config.run[0]].cached:
        raise ConfigError("--against torch encodes in each step; set cached=False of the process")
    if other := beyond(config.model):
        raise ConfigError(f"--against torch builds CLIP or DINOv2, LLaMA and an MFAM, not {', '.join(other)}; "
                          "leave --against out, or measure another variant")
    parts = taught_parts(learns)
    for name, prefix in PREFIXES.items():
        mixed = [path for path, learn in learns.items()
                 if path.startswith(prefix) and "/lora/" not in path and learn != parts[name]]
        if mixed:
            raise ConfigError(f"--against torch freezes whole parts, and of {prefix}* the process teaches a "
                              f"part: {mixed[0]} is frozen; measure it alone, or change train and freeze")
    updates = [path for path in learns if "/lora/" in path]
    if any(not path.startswith("decoder/blocks/") for path in updates):
        raise ConfigError("--against torch has low-rank updates in the blocks of the language model only; "
                          f"model.lora.targets={config.model.lora.targets!r} asks for others")
    if not config.processes[config.run[0]].words or config.processes[config.run[0]].light_head:
        raise ConfigError("--against torch has no light head; measure a process that learns words alone")
    if config.processes[config.run[0]].score_head:
        raise ConfigError("--against torch has no regression head; measure a variant without +head")


def shows(name: str) -> bool:
    """Whether an array of a batch is what the model gets of pictures."""
    return name == "images" or name.startswith("features/")


def make_batch(config: config_lib.Config, seed: int = 0) -> dict[str, np.ndarray]:
    """A batch as `data.pipeline` documents it, of random numbers, full.

    Raises:
      ConfigError: a row does not hold the visual tokens of a picture.
    """
    process, model = config.processes[config.run[0]], config.model
    rng, rows, row = np.random.default_rng(seed), process.batch, process.row
    seen = sum(model.visual_tokens(part) for part in process.parts)
    count = min(row.images, row.tokens // (seen + 4))  # conversations, each with at least a few words
    if not count:
        raise ConfigError(f"row.tokens={row.tokens} does not hold the {seen} visual tokens of a picture")
    length = row.tokens // count
    answers = min(row.answers // count, length - seen - 2)
    blank = pipeline.blank(process, model, cached=process.cached)
    shown = {name: value for name, value in blank.items() if shows(name)}
    out = {**{name: np.zeros((rows, *value.shape), value.dtype) for name, value in shown.items()},
           "tokens": rng.integers(0, model.decoder.vocab, (rows, row.tokens), np.int32),
           "visual": np.full((rows, row.tokens), -1, np.int32),
           "segments": np.zeros((rows, row.tokens), np.int32), "positions": np.zeros((rows, row.tokens), np.int32),
           "places": np.zeros((rows, row.answers), np.int32),
           "labels": rng.integers(0, model.decoder.vocab, (rows, row.answers, row.candidates), np.int32),
           "weights": np.zeros((rows, row.answers, row.candidates), np.float32),
           "asked": np.zeros((rows, row.images), np.int32), "targets": np.zeros((rows, row.images), np.float32),
           "bad": np.zeros(rows, np.int32)}
    if process.light_head:
        out["grades"] = rng.integers(0, min(model.light_head.grades), (rows, *blank["grades"].shape), np.int32)
    for name in shown:
        own = out[name][:, :count]
        own[:] = (rng.integers(0, 256, own.shape, np.uint8) if name == "images" else
                  rng.standard_normal(own.shape, np.float32))
    for number in range(count):
        start, first = number * length, number * answers
        out["segments"][:, start:start + length] = number + 1
        out["positions"][:, start:start + length] = np.arange(length)
        out["visual"][:, start + 1:start + 1 + seen] = number * seen + np.arange(seen)
        out["places"][:, first:first + answers] = start + length - 1 - answers + np.arange(answers)
        out["weights"][:, first:first + answers] = 1 / row.candidates
        if process.score_head:
            out["asked"][:, number], out["targets"][:, number] = start + length - 2, rng.uniform(1, 10, rows)
    return out


# ---- our contender -------------------------------------------------------------------------------------------------


def jax_step(config: config_lib.Config) -> tuple[Callable[[], float], dict[str, Any]]:
    """The project's own training step, which returns the loss of each call; and facts about it."""
    import jax
    import jax.numpy as jnp

    from calm_jax import sharding
    from calm_jax.models.parameters import Geometry
    from calm_jax.training.setup import Setup
    from calm_jax.training.step import State
    name = config.run[0]
    setup = Setup.of(config, name, Geometry.of(config.model), sharding.make_mesh(config.mesh))
    key, start = jax.random.key(config.seed), jax.random.key(0, impl="rbg")  # which compiles quickly
    # Drawn one by one, so that the most memory is that of the step.
    parameters = {path: _draw(leaf.shape, leaf.dtype, leaf.sharding)(jax.random.fold_in(start, number))
                  for number, (path, leaf) in enumerate(setup.kept.items())}
    trained = {path: parameters[path] for path in setup.trained}
    frozen = {path: parameters[path] for path in setup.frozen}
    del parameters
    moments = jax.jit(setup.tx.init, out_shardings=setup.placements.optimizer)(trained)
    state = jax.device_put(State(jnp.zeros((), jnp.int32), trained, moments), setup.placements)
    del trained, moments
    arrays = sharding.put(make_batch(config), setup.mesh, setup.process.batch)
    step = setup.compiled()

    def call() -> float:
        nonlocal state
        state, metrics = step(state, frozen, arrays, key)
        jax.block_until_ready(state)
        return float(metrics["loss"])

    return call, {"numerics": setup.why, "trained": sum(math.prod(leaf.shape) for leaf in setup.trained.values())}


@functools.cache
def _draw(shape: tuple[int, ...], dtype: Any, place: Any) -> Callable:
    """A program that draws small random numbers; arrays of one shape share it."""
    import jax
    return jax.jit(lambda key: 0.02 * jax.random.normal(key, shape, dtype), out_shardings=place)


def main(side: str, values: str, taught: str) -> None:
    """A contender's process, see `contenders.serve`."""
    config = config_lib.from_config_dict(json.loads(values))
    if side.endswith("-products"):
        make = products.torch_side if side.startswith("torch") else products.jax_side
        contenders.serve(side.removesuffix("-products"), lambda: (make(products.of_step(config, learning(config))), {}))
    elif side == "torch":
        from tools.bench import torch_side as bench_torch
        contenders.serve(side, lambda: bench_torch.torch_step(config, json.loads(taught), make_batch(config)))
    else:
        contenders.serve(side, lambda: jax_step(config))


# ---- the report ----------------------------------------------------------------------------------------------------


def show(result: Mapping[str, Any]) -> str:
    """The result as aligned text, ratios against ours last."""
    work = ", ".join(f"{kind} {value / 1e12:.3g}" for kind, value in result["flops"].items())
    lines = [f"train: {result['process']}, {result['rows']} rows, {result['tokens']} tokens, {result['pictures']} "
             f"pictures a step, on {result['machine']}, {result['numerics']}",
             f"  TFLOP a step: {work}; all {sum(result['flops'].values()) / 1e12:.3g}",
             f"  {'':<12}{'median s':>10}{'min':>9}{'max':>9}{'first':>8}{'tokens/s':>10}{'pictures/s':>12}"
             f"{'TFLOP/s':>9}{'of peak':>9}{'peak GiB':>10}{'M trained':>11}"]
    if result["depth"]:
        lines.insert(1, "  NOT the whole model: " + _depth(result))
    for name, row in result["results"].items():
        if "error" in row:
            lines.append(f"  {name:<12}{row['error']}")
            continue
        share = "" if row["mfu"] is None else f"{row['mfu']:.1%}"
        lines.append(f"  {name:<12}{row['median_s']:>10.3f}{row['min_s']:>9.3f}{row['max_s']:>9.3f}"
                     f"{row['first_s']:>8.1f}{row['tokens_per_s']:>10.0f}{row['pictures_per_s']:>12.2f}"
                     f"{row['flop_per_s'] / 1e12:>9.3g}{share:>9}{row['peak_bytes'] / 2**30:>10.2f}"
                     f"{row['trained'] / 1e6:>11.2f}")
    if result["torch_checkpointed"]:
        lines.append(f"  {CHECKPOINTED}")
    if ratios := _ratios(result):
        lines.append(f"  calm_jax / torch: time {ratios[0]}, memory {ratios[1]}")
    if left := _left(result):
        alone = result["products"]
        rates = ", ".join(f"{name} {seconds:.3f} s ({alone['flops'] / seconds / 1e9:.0f} GFLOP/s)"
                          for name, seconds in alone["seconds"].items())
        lines.append(f"  products alone, {alone['flops'] / 1e12:.3g} TFLOP: {rates}; with torch's products, time "
                     f"{left:.2f}")
    return "\n".join(lines)


def cells(result: Mapping[str, Any]) -> list[list[str]]:
    """The row of the table, without its common columns."""
    found = []
    for name in COLUMNS[:2]:
        row = result["results"].get(name, {"error": ""})
        if "error" in row:
            found.append(row["error"])
            continue
        share = "" if row["mfu"] is None else f" ({row['mfu']:.1%} of the peak)"
        found.append(f"{row['median_s']:.3g} s ({row['min_s']:.3g} to {row['max_s']:.3g}), {row['tokens_per_s']:.0f} "
                     f"tokens/s, {row['pictures_per_s']:.3g} pictures/s, {row['flop_per_s'] / 1e12:.3g} TFLOP/s"
                     f"{share}, {row['peak_bytes'] / 2**30:.2f} GiB")
    if result["depth"]:
        found[0] = f"{_depth(result)}: {found[0]}"
    if result["torch_checkpointed"]:
        found[1] = f"{CHECKPOINTED}: {found[1]}"
    time, memory = _ratios(result) or ("", "")
    if left := _left(result):
        time += f"; {left:.2f} with torch's products"
    return [[*found, time, memory]]


def _left(result: Mapping[str, Any]) -> float | None:
    """The time ratio if our products took torch's time; None where they were not measured."""
    if not (result["products"] and _ratios(result)):
        return None
    (ours, theirs), times = (result["results"][name] for name in COLUMNS[:2]), result["products"]["seconds"]
    return (ours["median_s"] - times["calm_jax"] + times["torch"]) / theirs["median_s"]


def _depth(result: Mapping[str, Any]) -> str:
    return f"{result['depth']} of {result['blocks']} blocks of the language model"


def _ratios(result: Mapping[str, Any]) -> tuple[str, str] | None:
    rows = [result["results"].get(name, {"error": ""}) for name in COLUMNS[:2]]
    if any("error" in row for row in rows):
        return None
    ours, theirs = rows
    return f"{ours['median_s'] / theirs['median_s']:.2f}", f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}"


if __name__ == "__main__":
    main(*sys.argv[1:])
