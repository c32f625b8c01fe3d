"""A checkpoint, or none, in; the parameters a program needs, each in its sharding and dtype, out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from calm_jax import config as config_lib
from calm_jax.data.tokenizer import Tokenizer
from calm_jax.models.parameters import Geometry, Parameters, initial, numerics
from calm_jax.training import checkpoint, sharding


@dataclasses.dataclass(frozen=True)
class Restored:
    """A trained model, ready to use: its config, its parameters (path -> array), its tokenizer and compute dtype."""

    saved: checkpoint.Saved
    config: config_lib.Config
    parameters: Parameters
    tokenizer: Tokenizer
    dtype: Any


def model(path: str | os.PathLike) -> Restored:
    """The model in a workdir, a process's folder or a checkpoint, over all devices present.

    Raises:
      CheckpointError: there is none, it is damaged, or it was trained with another tokenizer.
    """
    saved = checkpoint.find(path)
    config = config_lib.from_config_dict(saved.meta["config"])
    geometry = Geometry.of(config.model)
    layout = sharding.parameters(geometry.shapes, sharding.inference_mesh(config.model))
    dtype, storage, _ = numerics(config.model)
    kept = {name: jax.ShapeDtypeStruct(leaf.shape, storage, sharding=layout[name])
            for name, leaf in geometry.shapes.items()}
    return Restored(saved, config, load(saved, geometry, config, kept), tokenizer(saved), dtype)


def tokenizer(saved: checkpoint.Saved) -> Tokenizer:
    """The one a checkpoint was made with: the file inside it, or the one its config names.

    Raises:
      CheckpointError: neither has the content it had then.
    """
    inside = saved.path / "tokenizer.model"
    found = Tokenizer(str(inside) if inside.is_file() else saved.meta["config"]["tokenizer"])
    if found.fingerprint != saved.meta["tokenizer"]:
        raise checkpoint.CheckpointError(f"the checkpoint {saved.path} was trained with another tokenizer than "
                                         f"{found.path}; give that file back its content")
    return found


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A parameter that is not in memory; `read(index)` gives the part at an index of its leading axes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[int, ...]], np.ndarray]


def lazily(saved: checkpoint.Saved) -> dict[str, Lazy]:
    """Every parameter of a checkpoint's model, in its stored dtype, read from where it was last trained when asked for.
    What was never trained nor converted is drawn from its seed now, in float32.

    Raises:
      CheckpointError: a checkpoint that this one was trained from is damaged or gone.
    """
    config = config_lib.from_config_dict(saved.meta["config"])
    geometry = Geometry.of(config.model)
    found: dict[str, Lazy] = {}
    at: checkpoint.Saved | None = saved
    while at is not None:
        for path, array in checkpoint.arrays(at).items():
            if path in geometry.shapes and path not in found:
                found[path] = Lazy(tuple(array.shape), array.dtype.numpy_dtype,
                                   lambda index, array=array: array[index].read().result())
        config = dataclasses.replace(config, seed=at.meta["seed"])
        missing = geometry.shapes.keys() - found.keys()
        at = checkpoint.find(at.meta["base"]) if at.meta["base"] and missing else None
    if missing:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        drawn = load(None, geometry, config, {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one)
                                              for path, leaf in geometry.shapes.items() if path in missing})
        for path, leaf in drawn.items():
            value = np.asarray(leaf)
            found[path] = Lazy(value.shape, value.dtype, lambda index, value=value: value[index])
    return {path: found[path] for path in geometry.shapes}


def load(saved: checkpoint.Saved | None, geometry: Geometry, config: config_lib.Config,
         kept: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """The parameters of `kept`, each read from where it was last trained, straight into its sharding and dtype.

    A checkpoint holds what was trained and names its base: a checkpoint again, or the seed of the random start.

    Raises:
      CheckpointError: the checkpoint or a base of it is of another geometry, or gone.
    """
    if saved is None:
        key = jax.random.key(config.seed)

        def make(key):
            values = initial(config.model, key)
            return {path: values[path].astype(leaf.dtype) for path, leaf in kept.items()}

        return jax.jit(make, out_shardings={path: leaf.sharding for path, leaf in kept.items()})(key)
    theirs = config_lib.from_config_dict(saved.meta["config"])
    ours = dataclasses.replace(config.model, lora=theirs.model.lora)
    if not (config.model.score_head.width and theirs.model.score_head.width):  # what the base lacks begins at random
        ours = dataclasses.replace(ours, score_head=theirs.model.score_head)
    if not saved.meta["process"]:  # converted, never trained: no weight depends on these yet
        ours = dataclasses.replace(ours, depths=theirs.model.depths)
    lines: list[str] = []
    config_lib.compare(config_lib.Model, dataclasses.asdict(theirs.model), dataclasses.asdict(ours), "model", lines)
    if lines:
        raise checkpoint.CheckpointError(f"the checkpoint {saved.path} is of another geometry: {'; '.join(lines)}")
    held = set(checkpoint.shapes(saved)) & set(kept)
    found = checkpoint.restore(saved, {"parameters": {path: kept[path] for path in kept if path in held}})["parameters"]
    rest = {path: leaf for path, leaf in kept.items() if path not in held}
    if rest:
        base = checkpoint.find(saved.meta["base"]) if saved.meta["base"] else None
        found |= load(base, geometry, dataclasses.replace(config, seed=saved.meta["seed"]), rest)
    return found
