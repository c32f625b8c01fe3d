"""A model's parameters in; an encoding of what its frozen part makes of pictures, out.

Three kinds of results are kept, each in a store of its own: `features`, what the encoder sees at every depth that is
read, in half precision, for training; `tokens`, the visual tokens behind the MFAM, for inference; and beside either
`pooled`, a few statistics of the features, for whatever compares whole pictures.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, UInt8

from calm_jax import config as config_lib
from calm_jax.errors import ConfigError
from calm_jax.features import keys, store
from calm_jax.features.encoding import Encoding
from calm_jax.features.store import Store
from calm_jax.models.encoders import Feature
from calm_jax.models.parameters import Geometry, Parameters

GIGABYTES = {"features": 10.0, "tokens": 2.0, "pooled": 1.0}  # by default; ours
HALF = jnp.float16
LARGE = 1 << 18  # bytes of a picture's visual tokens from which on keeping them is no gain: those of small models
# Pictures that a device encodes at a time: on CPU one is enough for all cores, and none is computed that nobody asked
# for.
ROWS = {"cpu": 4}
ROWS_ELSEWHERE = 16


def stores(*kinds: str) -> dict[str, Store]:
    """The stores of some kinds, in the user's cache folder or where CALM_CACHE says."""
    return {kind: Store(store.folder() / f"{kind}.sqlite", int(store.gigabytes(GIGABYTES[kind]) * 1e9))
            for kind in kinds}


def pooled(seen: Feature) -> Float[Array, "B N E"]:
    """Mean and standard deviation over the tokens that stand for places, and, where there is one, the first of those
    that do not (a class token): N = 2 or 3, in half precision."""
    tokens = seen.tokens.astype(jnp.float32)
    places = tokens[:, seen.prefix:]
    rows = [places.mean(1), places.std(1), *([tokens[:, 0]] if seen.prefix else [])]
    return jnp.stack(rows, 1).astype(HALF)


def encoder(model: config_lib.Model, geometry: Geometry, parameters: Parameters, dtype: Any, *, name: str) -> Encoding:
    """The encoding of a training process whose encoder is frozen: `features`, part -> `[S, E]`, and `pooled`.

    Each device has a copy of the encoder.

    Args:
      parameters: the model's; those of the encoder are read.
      dtype: of the computation.
      name: of the process, for messages.

    Raises:
      ConfigError: see `check_alone`.
    """
    check_alone(name)
    mesh = Mesh(np.asarray(jax.local_devices()), ("rows",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("rows"))
    own = {path: jax.device_put(leaf, everywhere) for path, leaf in parameters.items()
           if path.startswith("encoder/")}

    def see(own: Parameters, images: UInt8[Array, "n H W 3"]) -> Mapping[str, Mapping[str, Array]]:
        bound = geometry.bind({**geometry.shapes, **own})
        found = bound.encoder.features(images, config_lib.PARTS, dtype=dtype)
        return {"features": {part: seen.tokens.astype(HALF) for part, seen in found.items()},
                "pooled": {part: pooled(seen) for part, seen in found.items()}}

    program = jax.jit(see, in_shardings=(dict.fromkeys(own, everywhere), split), out_shardings=split)
    return Encoding(functools.partial(program, own), _facts(model, own, dtype), stores("features", "pooled"),
                    rows=_rows(mesh.size), size=model.encoder.image_size, padding=model.encoder.padding,
                    remedy=f"encode in each step: --config.processes.{name}.cached=False")


def check_alone(name: str) -> None:
    """Raises ConfigError where several processes train together: features are kept for a training of one."""
    if jax.process_count() > 1:
        raise ConfigError(f"processes.{name}.cached=True is for a training of one process, and {jax.process_count()} "
                          f"train together: encode in each step, --config.processes.{name}.cached=False")


def worth_keeping(model: config_lib.Model, parts: tuple[str, ...], dtype: Any) -> bool:
    """Whether visual tokens of pictures are so small that finding them is a gain, and may be kept: by a process
    alone, where CALM_CACHE_GB does not say 0."""
    count = sum(model.visual_tokens(part) for part in parts)
    small = count * model.decoder.width * jnp.dtype(dtype).itemsize <= LARGE
    return small and jax.process_count() == 1 and store.gigabytes(GIGABYTES["tokens"]) > 0


def tokens(model: config_lib.Model, geometry: Geometry, parameters: Parameters, parts: tuple[str, ...], dtype: Any,
           mesh: Mesh | None) -> Encoding:
    """The encoding of inference: `tokens`, the visual tokens `[N, D]` of `parts` in their order, unless there are none,
    and `pooled`.

    Args:
      parameters: the model's, on the devices of `mesh`, or on one device.
    """
    read = ("encoder/", "mfam/") if parts else ("encoder/",)
    own = {path: leaf for path, leaf in parameters.items() if path.startswith(read)}

    def see(own: Parameters, images: UInt8[Array, "n H W 3"]) -> Mapping[str, Mapping[str, Array]]:
        bound = geometry.bind({**geometry.shapes, **own})
        found = bound.encoder.features(images, config_lib.PARTS, dtype=dtype)
        seen = {"tokens": {"tokens": bound.mfam({part: found[part] for part in parts})}} if parts else {}
        return {**seen, "pooled": {part: pooled(one) for part, one in found.items()}}

    compiled = jax.jit(see)

    def program(images: UInt8[np.ndarray, "n H W 3"]) -> Mapping[str, Mapping[str, Array]]:
        if mesh is None:
            return compiled(own, images)
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return compiled(own, jax.device_put(images, NamedSharding(mesh, PartitionSpec(("data", "fsdp")))))

    devices = 1 if mesh is None else mesh.shape["data"] * mesh.shape["fsdp"]
    facts = {**_facts(model, own, dtype), "parts": parts, "qformer": dataclasses.asdict(model.qformer),
             "thematic": dataclasses.asdict(model.thematic), "lora": dataclasses.asdict(model.lora)}
    return Encoding(program, facts, stores(*(("tokens",) if parts else ()), "pooled"), rows=_rows(devices),
                    size=model.encoder.image_size, padding=model.encoder.padding,
                    remedy="the checkpoint is damaged, or was trained to no good end")


def _rows(devices: int) -> int:
    return devices * ROWS.get(jax.default_backend(), ROWS_ELSEWHERE)


def _facts(model: config_lib.Model, own: Parameters, dtype: Any) -> dict[str, Any]:
    return {"encoder": dataclasses.asdict(model.encoder), "depths": dataclasses.asdict(model.depths),
            "parameters": keys.of_parameters(own), "dtype": jnp.dtype(dtype).name, "backend": jax.default_backend()}
