"""A checkpoint, or none, in; the parameters a program needs, each in its sharding and dtype, out.

A checkpoint holds what was ever trained in its run. For every other parameter its meta data says where the value is
(`Origin`): held by another checkpoint, which is pinned by its digest; drawn from a seed; or a kernel with LoRA adapters
merged into it, both of other checkpoints. The merge is repeated whenever the kernel is read, in float32, so that one
person's adapters on top of other adapters stay a few megabytes. Only checkpoints that hold a wanted value are read.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Collection, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.checkpoints import array_io, lineage, locate, on_disk
from calm_jax.checkpoints.meta import META, Pin, Saved, unpinned
from calm_jax.errors import CheckpointError, ConfigError
from calm_jax.models import lora
from calm_jax.models.parameters import Geometry, Parameters, initial, numerics
from calm_jax.text import chat as chat_lib
from calm_jax.text import tokenizers
from calm_jax.text.chat import Chat


@dataclasses.dataclass(frozen=True)
class Held:
    """By the checkpoint of this pin."""

    by: Pin


@dataclasses.dataclass(frozen=True)
class Drawn:
    """At random, from this seed."""

    seed: int


@dataclasses.dataclass(frozen=True)
class Merged:
    """`kernel + scale * a @ b`, with the factors at the paths beside the kernel's."""

    kernel: Origin
    a: Held
    b: Held
    scale: float


Origin = Held | Drawn | Merged
Origins = Mapping[str, Origin]


# ---- where values are ---------------------------------------------------------------------------------------------


def origins(saved: Saved | None, config: config_lib.Config) -> dict[str, Origin]:
    """path -> where its value is, of every parameter of `config`'s model when it begins from `saved` or from nothing.

    Adapters that differ from the config's in rank, alpha or targets are merged into their kernels, and the config's
    begin anew, as do heads that `saved` lacks. What a conversion does not hold is initialised for the
    config's own geometry and seed. Nothing but `saved` is looked at.

    Raises:
      CheckpointError: the checkpoint is of another geometry.
    """
    paths = Geometry.of(config.model).shapes
    if saved is None:
        return {path: Drawn(config.seed) for path in paths}
    theirs = saved.config.model
    ours = dataclasses.replace(config.model, lora=theirs.lora)
    if not (ours.score_head.width and theirs.score_head.width):  # what the base lacks begins at random
        ours = dataclasses.replace(ours, score_head=theirs.score_head)
    if not (ours.light_head.grades and theirs.light_head.grades):
        ours = dataclasses.replace(ours, light_head=theirs.light_head)
    converted = not saved.meta["process"]
    if converted:  # never trained: no weight depends on these yet
        ours = dataclasses.replace(ours, depths=theirs.depths, thematic=theirs.thematic, visual_rms=theirs.visual_rms)
        if not any(path.startswith("mfam/qformers/") for path in array_io.shapes(saved)):
            ours = dataclasses.replace(ours, qformer=theirs.qformer)
        with contextlib.suppress(ConfigError):  # a family that sees images of one size alone
            ours = dataclasses.replace(ours, encoder=ours.encoder.resized(theirs.encoder.image_size))
    lines: list[str] = []
    config_lib.compare(config_lib.Model, dataclasses.asdict(theirs), dataclasses.asdict(ours), "model", lines)
    if lines:
        raise CheckpointError(f"the checkpoint {saved.path} is of another geometry: {'; '.join(lines)}")
    found = _own(saved, Geometry.of(theirs).shapes)
    if converted:
        found = {path: origin for path, origin in found.items() if not isinstance(origin, Drawn)}
    if _adapters(theirs) != _adapters(config.model):
        found = {path: _merged(saved, path, found, theirs.lora) for path in found if "/lora/" not in path}
    return {path: found.get(path, Drawn(config.seed)) for path in paths}


def changes(saved: Saved | None, config: config_lib.Config) -> list[str]:
    """A line on everything learned in `saved` that does not go on as it is in `config`'s model."""
    if saved is None:
        return []
    before, after = saved.config.model, config.model
    lines = []
    if _adapters(before) != _adapters(after):
        old, new = _own(saved, Geometry.of(before).shapes), origins(saved, config)
        count = sum("/lora/" not in path and old.get(path, origin) != origin for path, origin in new.items())
        begins = (f"new ones begin: rank {after.lora.rank}, alpha {after.lora.alpha:g}, {after.lora.targets}"
                  if after.lora.rank else "this config has none")
        if count:
            lines.append(f"the LoRA adapters of {saved.path} (rank {before.lora.rank}, alpha {before.lora.alpha:g}, "
                         f"{before.lora.targets}) are merged into {count} kernels; {begins}")
    if before.score_head.width and not after.score_head.width:
        lines.append(f"the regression head of {saved.path} is left out: this config has model.score_head.width=0")
    if before.light_head.grades and not after.light_head.grades:
        lines.append(f"the light head of {saved.path} is left out: it was there to warm up the MFAM")
    return lines


def borrowed(where: Origins, held: Collection[str]) -> dict[str, Any]:
    """Where the parameters are that a checkpoint with `held` does not hold, as JSON values for its meta data."""
    rest = {path: origin for path, origin in where.items() if path not in held}
    pins = lenders(rest)

    def plain(origin):
        if isinstance(origin, Held):
            return {"of": pins.index(origin.by)}
        if isinstance(origin, Drawn):
            return {"seed": origin.seed}
        return {"kernel": plain(origin.kernel), "a": plain(origin.a), "b": plain(origin.b), "scale": origin.scale}

    return {"checkpoints": [dataclasses.asdict(pin) for pin in pins],
            "parameters": {path: plain(origin) for path, origin in sorted(rest.items())}}


def lenders(where: Origins) -> list[Pin]:
    """The checkpoints that hold any of the values, in order."""
    def of(origin):
        if isinstance(origin, Held):
            return [origin.by]
        return [] if isinstance(origin, Drawn) else [*of(origin.kernel), *of(origin.a), *of(origin.b)]

    return list(dict.fromkeys(pin for _, origin in sorted(where.items()) for pin in of(origin)))


def _own(saved: Saved, paths: Collection[str]) -> dict[str, Origin]:
    """Where the values are of the model that a checkpoint is of."""
    held, meta = array_io.shapes(saved), saved.meta
    listed = meta.get("borrowed") or {"checkpoints": [], "parameters": {}}
    pins = [Pin(**pin) for pin in listed["checkpoints"]]

    def origin(plain):
        if "of" in plain:
            return Held(pins[plain["of"]])
        if "seed" in plain:
            return Drawn(plain["seed"])
        return Merged(origin(plain["kernel"]), origin(plain["a"]), origin(plain["b"]), plain["scale"])

    def known(path):
        try:
            return origin(listed["parameters"][path])
        except (AttributeError, IndexError, KeyError, RecursionError, TypeError):
            raise CheckpointError(f"{saved.path}/{META} is damaged: it does not say where {path} "
                                  "is; use another checkpoint") from None

    # What is there under a name of before would be drawn anew under today's, and nobody would notice.
    if strange := sorted({*held, *listed["parameters"]} - set(Geometry.of(saved.config.model).shapes)):
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise CheckpointError(f"the checkpoint {saved.path} has the parameter {strange[0]}{more}, which models do not "
                              "have today; use another checkpoint, or the version of this program that wrote it")
    rest = [path for path in paths if path not in held and path not in listed["parameters"]]
    below = _own(lineage.sole(saved), rest) if rest and unpinned(meta) else {
        path: Drawn(meta["seed"]) for path in rest}
    return {path: Held(saved.pin) if path in held else
            known(path) if path in listed["parameters"] else below[path] for path in paths}


def _adapters(model: config_lib.Model) -> tuple[dict[str, tuple[int, ...]], float] | None:
    """The adapters of a model, as far as they change its outputs: their factors' shapes and their scale."""
    if not model.lora.rank:
        return None
    shapes = {path: leaf.shape for path, leaf in Geometry.of(model).shapes.items() if "/lora/" in path}
    return shapes, model.lora.alpha / model.lora.rank


def _merged(saved: Saved, path: str, found: Origins, cfg: config_lib.Lora) -> Origin:
    """Where a value of a checkpoint is once the adapter beside it, if it has learned anything, is merged into it."""
    a, b = (found.get(factor) for factor in lora.factors(path))
    if not path.endswith("/kernel") or b is None or isinstance(b, Drawn):  # as it was drawn, b is zero
        return found[path]
    if not (isinstance(a, Held) and isinstance(b, Held)):
        raise CheckpointError(f"the checkpoint {saved.path} holds one factor of the LoRA adapter of {path} "
                              "without the other, so that it cannot be merged; begin with its own "
                              f"model.lora: rank={cfg.rank} alpha={cfg.alpha:g} targets={cfg.targets!r}")
    return Merged(found[path], a, b, cfg.alpha / cfg.rank)


# ---- values -------------------------------------------------------------------------------------------------------


def load(saved: Saved | None, geometry: Geometry, config: config_lib.Config,
         kept: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
    """The parameters of `kept`, of `config`'s model as it begins from `saved` or from nothing, each straight into its
    sharding and dtype.

    Raises:
      CheckpointError: the checkpoint, or one that it needs weights of, is of another geometry, or gone.
    """
    where = origins(saved, config)
    return read({path: where[path] for path in kept}, kept, config.model, saved)


def read(where: Origins, kept: Mapping[str, jax.ShapeDtypeStruct], model: config_lib.Model,
         saved: Saved | None = None) -> Parameters:
    """The values, each straight into the sharding and dtype that `kept` gives its path; merging adds one array.

    Args:
      saved: a checkpoint that is verified already.

    Raises:
      CheckpointError: a checkpoint that holds one of them is gone, or damaged, or another one lies in its place.
    """
    return _Reader(model, saved).values(where, kept)


class _Reader:
    """Opens and verifies each checkpoint once."""

    def __init__(self, model: config_lib.Model, saved: Saved | None):
        self.model, self._for = model, str(saved.path) if saved else "this training"
        self._open = {saved.pin: saved} if saved else {}

    def checkpoint(self, pin: Pin) -> Saved:
        if pin not in self._open:
            self._open[pin] = lineage.pinned(pin, self._for)
        return self._open[pin]

    def values(self, where: Origins, kept: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
        held, drawn = collections.defaultdict(list), collections.defaultdict(list)
        for path, origin in where.items():
            if isinstance(origin, Held):
                held[origin.by].append(path)
            elif isinstance(origin, Drawn):
                drawn[origin.seed].append(path)
        found: Parameters = {}
        for pin, paths in held.items():
            found |= array_io.restore(self.checkpoint(pin), {"parameters": {path: kept[path] for path in paths}}
                                      )["parameters"]
        for seed, paths in drawn.items():
            found |= self._draw(seed, {path: kept[path] for path in paths})
        for path, origin in where.items():
            if isinstance(origin, Merged):
                found[path] = self._merge(path, origin, kept[path])
        return found

    def _draw(self, seed: int, kept: Mapping[str, jax.ShapeDtypeStruct]) -> Parameters:
        def make(key):
            values = initial(self.model, key)
            return {path: values[path].astype(leaf.dtype) for path, leaf in kept.items()}

        return jax.jit(make, out_shardings={path: leaf.sharding for path, leaf in kept.items()})(jax.random.key(seed))

    def _merge(self, path: str, origin: Merged, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        kernel = self.values({path: origin.kernel}, {path: _like(leaf, path, leaf.shape)})[path]
        factors = []
        for factor, of in zip(lora.factors(path), (origin.a, origin.b), strict=True):
            shape = array_io.shapes(self.checkpoint(of.by))[factor]
            factors.append(self.values({factor: of}, {factor: _like(leaf, factor, shape)})[factor])
        merge = functools.partial(lora.merged, scale=origin.scale, dtype=leaf.dtype)
        return jax.block_until_ready(jax.jit(merge, out_shardings=leaf.sharding)(kernel, *factors))


def _like(leaf: jax.ShapeDtypeStruct, path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """A float32 parameter that is spread over the devices of another one by the rules of its own path."""
    own = jax.ShapeDtypeStruct(shape, jnp.float32)
    place = leaf.sharding
    if isinstance(place, jax.sharding.NamedSharding) and set(sharding.AXES) <= set(place.mesh.axis_names):
        place = sharding.parameters({path: own}, place.mesh)[path]
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=place)


@dataclasses.dataclass(frozen=True)
class Lazy:
    """A parameter that is not in memory; `read(index)` gives the part at an index of its leading axes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[tuple[int, ...]], np.ndarray]


def lazily(saved: Saved) -> dict[str, Lazy]:
    """Every parameter of a checkpoint's model, in its stored dtype, read from where it is when asked for. What was
    never trained nor converted is drawn from its seed now, in float32; a kernel with merged adapters is float32.

    Raises:
      CheckpointError: a checkpoint that holds one of them is damaged or gone.
    """
    config = saved.config
    where, shapes = origins(saved, config), Geometry.of(config.model).shapes
    for path, shape in array_io.shapes(saved).items():
        if path in shapes and shape != shapes[path].shape:
            raise CheckpointError(f"{path} is {list(shape)} in the checkpoint {saved.path} and "
                                  f"{list(shapes[path].shape)} in its own config; use another one")
    reader, opened = _Reader(config.model, saved), dict[Pin, dict[str, tensorstore.TensorStore]]()
    locks = {}  # which live as long as anything that reads there

    def below(origin):
        return below(origin.kernel) if isinstance(origin, Merged) else origin

    one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    drawn = reader.values(
        {path: below(origin) for path, origin in where.items() if isinstance(below(origin), Drawn)},
        {path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=one) for path, leaf in shapes.items()})

    def lazy(path, origin):
        if isinstance(origin, Merged):
            a, b = (lazy(factor, of) for factor, of in zip(lora.factors(path), (origin.a, origin.b), strict=True))
            return merged(lazy(path, origin.kernel), a, b, origin.scale, np.dtype(np.float32))
        if isinstance(origin, Drawn):
            value = np.asarray(drawn[path])
            return Lazy(value.shape, value.dtype, lambda index: value[index])
        held = reader.checkpoint(origin.by)
        if origin.by not in opened:
            locks[origin.by] = on_disk.hold(held)
            opened[origin.by] = array_io.stored(held)
        array = opened[origin.by][path]

        def part(index, lock=locks[origin.by]):
            with on_disk.reading(held):
                return array[index].read().result()

        return Lazy(tuple(array.shape), array.dtype.numpy_dtype, part)

    return {path: lazy(path, origin) for path, origin in where.items()}


def merged(kernel: Lazy, a: Lazy, b: Lazy, scale: float, dtype: np.dtype) -> Lazy:
    """`models.lora.merged` of parameters that are not in memory."""
    def read(index):
        update = (a.read(index).astype(np.float32) @ b.read(index).astype(np.float32)) * scale
        return (kernel.read(index).astype(np.float32) + update).astype(dtype)

    return Lazy(kernel.shape, dtype, read)


# ---- a model, ready to use ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Restored:
    """A trained model, ready to use: its config, its parameters (path -> array), its chat and compute dtype."""

    saved: Saved
    config: config_lib.Config
    parameters: Parameters
    chat: Chat
    dtype: Any


def model(path: str | os.PathLike) -> Restored:
    """The model in a workdir, a process's folder or a checkpoint, over all devices present.

    Training may go on there: when it prunes the checkpoint that is being read, the one that is there now is taken.

    Raises:
      CheckpointError: there is none, it is damaged, or it was trained with another tokenizer.
    """
    for _ in range(locate.TRIES if jax.process_count() == 1 else 1):
        saved = locate.find(path)
        try:
            return whole(saved)
        except on_disk.Vanished as error:
            vanished = error
    raise vanished


def whole(saved: Saved) -> Restored:
    """The model of a verified checkpoint; raises as `model`."""
    config = saved.config
    geometry = Geometry.of(config.model)
    layout = sharding.parameters(geometry.shapes, sharding.inference_mesh(config.model))
    dtype, storage, _ = numerics(config.model)
    kept = {name: jax.ShapeDtypeStruct(leaf.shape, storage, sharding=layout[name])
            for name, leaf in geometry.shapes.items()}
    found = chat(saved)
    return Restored(saved, config, load(saved, geometry, config, kept), found, dtype)


def chat(saved: Saved) -> Chat:
    """How a checkpoint's conversations are written: with the tokenizer inside it, or the one that its config names.

    Raises:
      CheckpointError: neither has the content it had then.
    """
    config = saved.config
    with on_disk.reading(saved):
        found = chat_lib.load(str(saved.path) if tokenizers.inside(saved.path) else config.tokenizer, config.chat)
    if found.tokenizer.fingerprint != saved.meta["tokenizer"]:
        raise CheckpointError(f"the checkpoint {saved.path} was trained with another tokenizer than "
                              f"{found.tokenizer.name}; give that file back its content")
    return found
