"""The arrays of a checkpoint: read each into its sharding, or from disk part by part, and how they lie there."""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
import tensorstore

from calm_jax.checkpoints import on_disk
from calm_jax.checkpoints.meta import ARRAYS, Saved
from calm_jax.errors import CheckpointError
from calm_jax.models.parameters import Parameters

LARGE = 1 << 22  # leaves from this many bytes on are cut into chunks


def _ours(record: logging.LogRecord) -> bool:
    """Orbax also logs what it raises, a traceback a thread, and warns of metadata that nothing here reads and of chunks
    that are small so that eight readers can share a layer."""
    orbax = f"{os.sep}orbax{os.sep}checkpoint{os.sep}" in record.pathname
    return not orbax or (record.levelno < logging.ERROR and not record.pathname.endswith(
        ("array_metadata_store.py", "subchunking.py")))


logging.getLogger("absl").addFilter(_ours)
# So does asyncio, of what Orbax starts and does not wait for once one of it has failed.
logging.getLogger("asyncio").addFilter(lambda record: "never retrieved" not in record.getMessage())


def restore(saved: Saved, abstract: Mapping[str, Any]) -> dict[str, Any]:
    """Reads the arrays named in `abstract`, each straight into its sharding; a part that is absent there is not read.

    Args:
      abstract: {"parameters": path -> ShapeDtypeStruct with sharding, optionally "optimizer": pytree of them}.

    Raises:
      CheckpointError: a wanted array is not in the checkpoint or has another shape.
    """
    tree = {"parameters": nest(abstract["parameters"])} if abstract["parameters"] else {}  # Orbax fails on {} in a tree
    if "optimizer" in abstract:
        tree["optimizer"] = named(abstract["optimizer"])
    if not tree:  # nor is there anything to read
        return {"parameters": {}}
    present = shapes(saved)
    for name, leaf in abstract["parameters"].items():
        if name not in present:
            raise CheckpointError(f"the checkpoint {saved.path} does not hold {name}: it is of another model")
        if present[name] != tuple(leaf.shape):
            raise CheckpointError(f"{name} is {list(present[name])} in the checkpoint {saved.path} and "
                                  f"{list(leaf.shape)} in this config; use the config it was trained with")
    with on_disk.reading(saved), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        result = orbax.restore(saved.path / ARRAYS, args=ocp.args.PyTreeRestore(
            tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree), partial_restore=True))
    arrays: dict[str, Any] = {"parameters": unnest(result.get("parameters", {}))}
    if "optimizer" in abstract:
        leaves = [result["optimizer"][name] for name in named(abstract["optimizer"])]
        arrays["optimizer"] = jax.tree.unflatten(jax.tree.structure(abstract["optimizer"]), leaves)
    return arrays


def shapes(saved: Saved) -> dict[str, tuple[int, ...]]:
    """path -> shape of every parameter a checkpoint holds."""
    with on_disk.reading(saved), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        tree = orbax.metadata(saved.path / ARRAYS).item_metadata.tree
        return {path: tuple(leaf.shape) for path, leaf in unnest(tree["parameters"]).items()}


def stored(saved: Saved) -> dict[str, tensorstore.TensorStore]:
    """path -> every parameter a checkpoint holds, still on disk: `array[index].read().result()` reads that part, inside
    `reading`."""
    found = {}
    for path in shapes(saved):
        place = {"driver": "ocdbt", "base": f"file://{saved.path / ARRAYS}/",
                 "path": f"parameters.{path.replace('/', '.')}/"}
        found[path] = tensorstore.open({"driver": "zarr", "kvstore": place}, open=True, read=True)
    with on_disk.reading(saved):
        return {path: future.result() for path, future in found.items()}


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """{"a/b": x} -> {"a": {"b": x}}."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        *above, last = path.split("/")
        node = tree
        for name in above:
            node = node.setdefault(name, {})
        node[last] = leaf
    return tree


def unnest(tree: Mapping[str, Any], prefix: str = "") -> Parameters:
    """The inverse of `nest`."""
    flat: Parameters = {}
    for name, value in tree.items():
        flat |= unnest(value, f"{prefix}{name}/") if isinstance(value, Mapping) else {prefix + name: value}
    return flat


def named(tree: Any) -> dict[str, Any]:
    """An optimizer state as {position: leaf}: independent of optax's classes, in a fixed order."""
    return {f"{i:05d}": leaf for i, leaf in enumerate(jax.tree.leaves(tree))}


def chunks(leaf: Any) -> ocp.SaveArgs:
    """One layer a chunk at most, cut into at least 8 x 8 tiles: a reader of one of 8 parts along either axis reads
    no more than its part. One chunk a leaf would make every reader read everything.

    Orbax halves the longer side first, so that an oblong matrix needs more cuts until its short side has eight parts.
    """
    size = leaf.size * leaf.dtype.itemsize
    if leaf.ndim < 2 or size < LARGE:
        return ocp.SaveArgs()
    short, long = sorted(leaf.shape[-2:])
    tiles = 64 * 2 ** math.ceil(math.log2(long / short))
    return ocp.SaveArgs(chunk_byte_size=max(short * long * leaf.dtype.itemsize // tiles, 1 << 14),
                        shard_axes=tuple(range(leaf.ndim - 2)))
