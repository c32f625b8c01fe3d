"""Devices and parameter paths in, a mesh and the sharding of every array out: one table for the whole project."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from calm_jax import config as config_lib
from calm_jax import path_rules
from calm_jax.errors import ConfigError, nearest

AXES = ("data", "fsdp", "tensor")
ROWS = PartitionSpec(("data", "fsdp"))  # rows of a batch: split over both, whole along tensor

# Rule -> (regexes of paths, axes of the trailing dimensions). Leading dimensions (layers, levels) are never split.
# Column-parallel matrices split their outputs over `tensor`, row-parallel ones their inputs, so that a block
# communicates once after attention and once after the MLP.
TABLE: dict[str, tuple[tuple[str, ...], tuple[str | None, ...]]] = {
    "column": ((r".*/(q|k|v|gate|up)/kernel", r"decoder/head/kernel", r"score_head/hidden/kernel"),
               ("fsdp", "tensor")),
    "row": ((r".*/(o|down|embed)/kernel", r"mfam/(qformers/(\d+/)?|thematic/)project/kernel"),
            ("tensor", "fsdp")),
    "vocabulary": ((r"decoder/embedding",), ("tensor", "fsdp")),
    "column bias": ((r"decoder/blocks/(q|k|v)/bias",), ("tensor",)),
    "lora": ((r".*/lora/a",), ("fsdp", None)),
    "lora out": ((r".*/lora/b",), (None, "fsdp")),
    "positions": ((r"encoder/positions",), (None, "fsdp")),
    "convolution": ((r"encoder/stem/kernels/\d+",), (None, None, None, "fsdp")),
    "small": ((r"(?!decoder/blocks/[qkv]/).*/bias", r".*/scale", r"encoder/(cls|registers)", r"encoder/stem/biases/\d+",
               r"mfam/qformers/(\d+/)?queries", r"score_head/out/kernel",
               r"light_head/out/kernel"), ()),
}


def make_mesh(cfg: config_lib.Mesh, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """A mesh of all devices with axes data, fsdp, tensor (Auto types); one size may be -1 = what remains.

    Several slices of TPUs lie along data: the network between them is the slowest, and only gradients cross it.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or data not to that of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [cfg.data, cfg.fsdp, cfg.tensor]
    known = math.prod(size for size in sizes if size != -1)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise ConfigError(f"mesh sizes {dict(zip(AXES, sizes, strict=True))}: at most one may be -1, "
                          "the others are positive")
    if -1 in sizes and len(devices) % known == 0:
        sizes[sizes.index(-1)] = len(devices) // known
    if math.prod(sizes) != len(devices):
        raise ConfigError(f"mesh data={cfg.data} fsdp={cfg.fsdp} tensor={cfg.tensor} does not multiply to "
                          f"the {len(devices)} devices present; set one of them to -1")
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    types = (AxisType.Auto,) * len(AXES)
    if slices == 1:
        return jax.make_mesh(sizes, AXES, devices=devices, axis_types=types)
    if sizes[0] % slices:
        raise ConfigError(f"mesh data={sizes[0]} is no multiple of the {slices} slices, between which only "
                          f"gradients should travel; set --config.mesh.data={slices}")
    placed = mesh_utils.create_hybrid_device_mesh((sizes[0] // slices, *sizes[1:]), (slices, 1, 1), devices)
    return jax.sharding.Mesh(placed, AXES, axis_types=types)


def inference_mesh(model: config_lib.Model, devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """All devices, as many as its heads allow along tensor: a decoded token then reads each weight once, wherever."""
    devices = jax.devices() if devices is None else devices
    heads = math.gcd(len(devices), model.decoder.heads, model.decoder.kv_heads)
    return make_mesh(config_lib.Mesh(data=-1, fsdp=1, tensor=heads), devices)


def check_batch(process: config_lib.Process, mesh: jax.sharding.Mesh, name: str) -> None:
    """Raises ConfigError when a micro-batch does not divide among the devices that split it."""
    rows, parts = process.batch // process.accumulate, mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % parts:
        raise ConfigError(
            f"processes.{name}: batch={process.batch} over accumulate={process.accumulate} makes {rows} rows a "
            f"micro-batch, which do not divide among data*fsdp={parts} devices; choose a batch that is a multiple of "
            f"{parts * process.accumulate}")


def add(rule: str, regex: str) -> None:
    """Lets a rule of TABLE hold for more parameters: those of an encoder or decoder family with names of its own, when
    its module is imported.

    Raises:
      ConfigError: there is no such rule.
    """
    if rule not in TABLE:
        raise ConfigError(f"there is no sharding rule {rule!r}{nearest(rule, TABLE)}")
    regexes, axes = TABLE[rule]
    if regex not in regexes:
        TABLE[rule] = (*regexes, regex), axes


def rules(shapes: Mapping[str, Any]) -> dict[str, str]:
    """path -> name of its rule in TABLE; every parameter must match exactly one."""
    present = {name: tuple(r for r in regexes if path_rules.matches(r, shapes))  # a stem or LoRA may be absent
               for name, (regexes, _) in TABLE.items()}
    return path_rules.match(shapes, present, "sharding rules")


def parameters(shapes: Mapping[str, Any], mesh: jax.sharding.Mesh) -> dict[str, NamedSharding]:
    """path -> sharding. An axis that does not divide its dimension is left out for that parameter."""
    result = {}
    for path, rule in rules(shapes).items():
        shape, axes = shapes[path].shape, TABLE[rule][1]
        spec = [None] * (len(shape) - len(axes)) + [
            axis if axis and size % mesh.shape[axis] == 0 else None
            for axis, size in zip(axes, shape[len(shape) - len(axes):], strict=True)]
        result[path] = NamedSharding(mesh, PartitionSpec(*spec))
    return result


def optimizer(tx: optax.GradientTransformation, shapes: Mapping[str, Any],
              shardings: Mapping[str, NamedSharding], mesh: jax.sharding.Mesh) -> Any:
    """Shardings of the optimizer state: moments like their parameter, counters everywhere."""
    state = jax.eval_shape(tx.init, dict(shapes))
    return optax.tree_map_params(tx, lambda _, sharding: sharding, state, dict(shardings),
                                 transform_non_params=lambda _: NamedSharding(mesh, PartitionSpec()))


def rows(mesh: jax.sharding.Mesh) -> NamedSharding:
    """Sharding of every array of a batch: its leading axis over data and fsdp."""
    return NamedSharding(mesh, ROWS)


def own_rows(mesh: jax.sharding.Mesh, batch: int) -> list[int]:
    """The rows of a batch that devices of this process hold, which it must read: where a mesh splits heads over
    processes, several of them read the same rows."""
    spans = rows(mesh).addressable_devices_indices_map((batch,)).values()
    return sorted({row for (span,) in spans for row in range(batch)[span]})


def put(batch: Mapping[str, np.ndarray], mesh: jax.sharding.Mesh, size: int) -> dict[str, jax.Array]:
    """This process's rows (`own_rows`) of a batch of `size` -> global arrays, each device holding its rows."""
    return {name: jax.make_array_from_process_local_data(rows(mesh), value, (size, *value.shape[1:]))
            for name, value in batch.items()}


def table(shapes: Mapping[str, Any], mesh: jax.sharding.Mesh) -> str:
    """One line a rule: its axes, how much it holds, and how much of it each device keeps."""
    shardings, by_rule = parameters(shapes, mesh), {}
    for path, rule in rules(shapes).items():
        whole = math.prod(shapes[path].shape)
        part = math.prod(shardings[path].shard_shape(shapes[path].shape))
        counts = by_rule.setdefault(rule, [0, 0, 0])
        for i, value in enumerate((1, whole, part)):
            counts[i] += value
    lines = [f"  {'rule':<14}{'axes':<30}{'arrays':>7}{'million':>12}{'a device':>12}"]
    for rule, (count, whole, part) in by_rule.items():
        axes = " x ".join(axis or "-" for axis in TABLE[rule][1]) or "-"
        lines.append(f"  {rule:<14}{axes:<30}{count:>7}{whole / 1e6:>12.3f}{part / 1e6:>12.3f}")
    return "\n".join(lines)
