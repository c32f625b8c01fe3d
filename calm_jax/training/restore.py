"""A checkpoint, or none, in; the parameters a program needs, each in its sharding and dtype, out."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import jax

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
    tokenizer = Tokenizer(config.tokenizer)
    if tokenizer.fingerprint != saved.meta["tokenizer"]:
        raise checkpoint.CheckpointError(f"the checkpoint {saved.path} was trained with another tokenizer than "
                                         f"{tokenizer.path}; give that file back its content")
    geometry = Geometry.of(config.model)
    layout = sharding.parameters(geometry.shapes, sharding.make_mesh(config_lib.Mesh()))
    dtype, storage, _ = numerics(config.model)
    kept = {name: jax.ShapeDtypeStruct(leaf.shape, storage, sharding=layout[name])
            for name, leaf in geometry.shapes.items()}
    return Restored(saved, config, load(saved, geometry, config, kept), tokenizer, dtype)


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
