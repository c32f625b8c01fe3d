"""A config and a slice that nobody need own in; whether its training step fits, and what it costs, out.

The real step is lowered and compiled ahead of time: for TPUs by the TPU compiler itself (`make
plan-env` fetches it; no TPU is needed), whose figures of memory are those of the program that would run. For GPUs and
`cpu:N` XLA compiles it for simulated CPU devices: arrays, sharding and collectives are exact there, while temporaries
are those of a CPU program, which keeps float32 and fuses differently. Times are estimates, from an assumed share of the
peak.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import os
import pathlib
import re
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calm_jax import config as config_lib
from calm_jax import files, recipes
from calm_jax.errors import ConfigError, nearest

GIB = 2 ** 30
MFU = 0.4  # of the peak, assumed


@dataclasses.dataclass(frozen=True)
class Chip:
    """A device, by its maker's figures.

    Attributes:
      memory: bytes of its own that a program can use.
      peak: bfloat16 FLOP/s.
      link: bytes/s to its neighbours, all links together.
    """

    memory: float
    peak: float
    link: float


CHIPS = {"v4": Chip(15.48 * GIB, 137.5e12, 135e9),  # a device is one of the two cores of a chip
         "v5e": Chip(15.75 * GIB, 197e12, 200e9), "v5p": Chip(95.74 * GIB, 459e12, 600e9),
         "v6e": Chip(31.25 * GIB, 918e12, 448e9), "a100": Chip(79.1 * GIB, 312e12, 300e9),
         "h100": Chip(79.1 * GIB, 989e12, 450e9), "cpu": Chip(math.inf, 2e11, 1e10)}
BETWEEN = 6.25e9  # bytes/s a chip between slices: 25 GB/s a host of four
FLAT = {1: "1x1", 4: "2x2", 8: "2x4", 16: "4x4", 32: "4x8", 64: "8x8", 128: "8x16", 256: "16x16"}  # v5e, v6e
DEEP = {8: "2x2x1", 16: "2x2x2", 32: "2x2x4", 64: "2x4x4", 128: "4x4x4", 256: "4x4x8", 512: "4x8x8"}  # by cores
SPEC = re.compile(r"(?:(?P<slices>\d+)x)?(?P<kind>[a-z]\w+?)(?::(?P<shape>\d+(?:x\d+)*)|-(?P<count>\d+))")


@dataclasses.dataclass(frozen=True)
class Topology:
    """Attributes: kind of CHIPS, slices, shape of a slice as libtpu takes it (or the number of devices), and `name`."""

    kind: str
    slices: int
    shape: str
    name: str

    @classmethod
    def of(cls, spec: str) -> Topology:
        """Reads `v5e-16`, `v5e:4x4`, `2xv5e-16`, `a100:8`.

        Raises:
          ConfigError: it is none of these.
        """
        found = SPEC.fullmatch(spec)
        if found is None or found["kind"] not in CHIPS:
            raise ConfigError(f"--topology {spec} is none that is known; write it as v5e-16, v5e:4x4, "
                              f"2xv5e-16 (two slices), v5p-8 or a100:8, of {', '.join(CHIPS)}")
        kind, shape = found["kind"], found["shape"]
        if shape is None:
            if not kind.startswith("v"):
                raise ConfigError(f"--topology {spec}: write --topology {kind}:{found['count']}")
            known = FLAT if kind in ("v5e", "v6e") else DEEP
            shape = known.get(int(found["count"]))
            if shape is None:
                raise ConfigError(f"--topology {spec}: {kind} comes in "
                                  f"{', '.join(f'{kind}-{n}' for n in known)}; write another shape as "
                                  f"{kind}:{'4x4' if known is FLAT else '2x2x2'}")
        return cls(kind, int(found["slices"] or 1), shape, spec)

    @property
    def tpu(self) -> bool:
        return self.kind.startswith("v")

    @property
    def chip(self) -> Chip:
        return CHIPS[self.kind]

    def prepare(self) -> None:
        """Must run before JAX is imported: simulated devices are made when it starts."""
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        if self.tpu:
            os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
            os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")  # whatever; without them it complains
            os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
            os.environ.setdefault("TPU_LOG_DIR", "disabled")
            os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no device is held, so that two may plan at once
        else:
            count = math.prod(map(int, self.shape.split("x")))
            os.environ["XLA_FLAGS"] = (f"{os.environ.get('XLA_FLAGS', '')} "
                                       f"--xla_force_host_platform_device_count={count}")

    def devices(self) -> Sequence[Any]:
        """Its devices, none of which exists.

        Raises:
          ConfigError: the TPU compiler is not installed, or knows no such slice.
        """
        import jax
        if not self.tpu:
            return jax.devices()
        if importlib.util.find_spec("libtpu") is None:
            beside = pathlib.Path(sys.prefix) / "libtpu"  # of each environment its own: it has to fit its JAX
            if not beside.is_dir():
                raise ConfigError("planning for a TPU needs its compiler, not a TPU; run: make plan-env")
            sys.path.append(str(beside))
        from jax.experimental import topologies
        more = {"num_slices": self.slices} if self.slices > 1 else {}
        try:
            return topologies.get_topology_desc(f"{self.kind}:{self.shape}", "tpu", **more).devices
        except Exception as error:
            raise ConfigError(f"the TPU compiler knows no slice {self.kind}:{self.shape}: "
                              f"{str(error).splitlines()[0]}") from error


# ---- what a compiled program holds and does ------------------------------------------------------------------------

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
BITS = {"pred": 8, "s8": 8, "u8": 8, "bf16": 16, "f16": 16, "s16": 16, "u16": 16, "s32": 32, "u32": 32, "f32": 32,
        "s64": 64, "u64": 64, "f64": 64}
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")
COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{\s*$")
CALLED = re.compile(r"(?:body|to_apply|calls|async_computation)=%?([\w.\-]+)")
CONDITION = re.compile(r"condition=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\s*\{\s*"n":\s*"(\d+)"')
LIMIT = re.compile(r" = s32\[\]\S* constant\((\d+)\)")
INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.+?) (?P<op>[\w\-]+)\(")
CHAIN = re.compile(r'chain_id="(\d+)"')  # of a collective that the TPU compiler has spread over several fusions


def collectives(hlo: str) -> dict[str, tuple[float, float]]:
    """Kind -> (how often, bytes of its results), of one step on one device; loops count as often as they turn."""
    bodies: dict[str, list[tuple[str, str, str, str]]] = {}
    entry, current = "", None
    for line in hlo.splitlines():
        if (head := COMPUTATION.match(line)) and " = " not in line.split("(")[0]:
            current = bodies.setdefault(head[2], [])
            entry = head[2] if head[1] else entry
        elif current is not None and (found := INSTRUCTION.match(line)):
            current.append((found["name"], found["op"], found["type"], line))
    seen: dict[str, tuple[str, float, float]] = {}

    def turns(line: str) -> float:
        if found := TRIPS.search(line):
            return float(found[1])
        condition = CONDITION.search(line)  # the TPU compiler drops the count: its loops end at a constant
        limits = [int(found[1]) for *_, inside in bodies.get(condition[1] if condition else "", ())
                  if (found := LIMIT.search(inside))]
        return float(max(limits, default=1))

    def walk(computation: str, times: float) -> None:
        for name, op, kind, line in bodies.get(computation, ()):
            base = op.removesuffix("-start")
            if base in KINDS and not op.endswith("-done"):
                sizes = [math.prod(map(int, filter(None, dims.split(",")))) * BITS.get(dtype, 32) / 8
                         for dtype, dims in ARRAY.findall(kind)]
                # The start of an asynchronous one gives its operand and its result.
                size = max(sizes, default=0.0) if op.endswith("-start") else sum(sizes)
                chain = CHAIN.search(line)
                key = f"chain {chain[1]}" if chain else name
                seen[key] = base, max(times, seen.get(key, ("", 0.0))[1]), size
            inner = times * turns(line) if op == "while" else times
            for called in CALLED.findall(line):
                walk(called, inner)

    walk(entry, 1.0)
    found: dict[str, tuple[float, float]] = {}
    for kind, times, size in seen.values():
        count, total = found.get(kind, (0.0, 0.0))
        found[kind] = count + times, total + times * size
    return found


def a_device(arrays: Any) -> float:
    """Bytes of arrays (shapes with shardings) on one device."""
    import jax
    return float(sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
                     for leaf in jax.tree.leaves(arrays)))


def replicated(arrays: Mapping[str, Any], least: float = 2 ** 20) -> dict[str, float]:
    """Path -> bytes of what every device holds whole, from a size on."""
    return {path: float(math.prod(leaf.shape) * leaf.dtype.itemsize) for path, leaf in arrays.items()
            if leaf.sharding.is_fully_replicated and math.prod(leaf.shape) * leaf.dtype.itemsize >= least}


# ---- the plan ------------------------------------------------------------------------------------------------------


def plan(config: config_lib.Config, name: str, topology: Topology, *, given: str = "", inference: bool = False,
         rows: int = 1, hlo: str = "") -> dict:
    """Everything that `show` shows, as JSON values.

    Args:
      name: process of the config.
      inference: the scorer instead of the training step, with so many `rows` a device.
      hlo: file for the compiled program's text.
    """
    import jax

    from calm_jax import sharding
    from calm_jax.models import flops
    from calm_jax.models.parameters import Geometry
    from calm_jax.training.setup import Setup
    begin = time.monotonic()
    devices = topology.devices()
    mesh = sharding.inference_mesh(config.model, devices) if inference else sharding.make_mesh(config.mesh, devices)
    geometry = Geometry.of(config.model)
    setup = Setup.of(config, name, geometry, mesh, backend="tpu" if topology.tpu else "gpu")
    process = setup.process
    found: dict[str, Any] = {"config": given, "process": name, "topology": topology.name,
                             "devices": mesh.devices.size, "mesh": dict(mesh.shape), "batch": process.batch,
                             "accumulate": process.accumulate, "capacity": topology.chip.memory, "inference": inference}
    if inference:
        lowered, arrays, work = _scorer(config, setup, rows)
        found |= {"bytes": arrays, "batch": rows * mesh.shape["data"] * mesh.shape["fsdp"]}
    else:
        state, frozen, batch, key = setup.arguments()
        found["bytes"] = {"trained parameters": a_device(state.trained), "frozen parameters": a_device(frozen),
                          "optimizer": a_device(state.optimizer), "batch": a_device(batch)}
        found["replicated"] = replicated({**state.trained, **frozen})
        lowered = setup.compiled().lower(state, frozen, batch, key)
        work = flops.a_row(config.model, process, setup.learns)
    found["flops"] = {kind: value * found["batch"] for kind, value in work.items()}
    found["lower_s"] = time.monotonic() - begin
    found |= _compiled(lowered, hlo)
    total = sum(found["flops"].values())
    compute = total / (found["devices"] * topology.chip.peak * MFU)
    moved = sum(size for _, size in found.get("collectives", {}).values())
    found["estimate_s"] = {"compute": compute, "collectives": moved / topology.chip.link}
    found["seconds"] = time.monotonic() - begin
    found["peak_rss"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["fits"] = found["total"] <= topology.chip.memory
    found["advice"] = "" if found["fits"] else advice(found, config, process)
    found["cores"], found["jax"] = os.cpu_count(), jax.__version__
    return found


def _compiled(lowered: Any, hlo: str) -> dict[str, Any]:
    begin = time.monotonic()
    try:
        program = lowered.compile()
    except Exception as error:  # the compiler itself says that it does not fit
        used = re.search(r"Used ([\d.]+)([GM]) of", str(error))
        if used is None:
            raise
        return {"total": float(used[1]) * (GIB if used[2] == "G" else 2 ** 20), "temporaries": None,
                "compile_s": time.monotonic() - begin, "collectives": {}}
    memory, text = program.memory_analysis(), program.as_text()
    if hlo:
        files.write(hlo, text)
    arguments = memory.argument_size_in_bytes
    return {"temporaries": memory.temp_size_in_bytes, "arguments": arguments,
            "total": (arguments + memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
                      + memory.generated_code_size_in_bytes),
            "compile_s": time.monotonic() - begin, "collectives": collectives(text)}


def _scorer(config: config_lib.Config, setup: Any, rows: int) -> tuple[Any, dict[str, float], dict[str, float]]:
    """The scorer by `expectation` for a batch of `rows` a device, weights in the computation's dtype."""
    import functools

    import jax
    import jax.numpy as jnp

    from calm_jax import sharding
    from calm_jax.data.samples import Answer, ImageRef, Mention, Sample, Turn
    from calm_jax.data.tasks import instructions
    from calm_jax.inference import generate, scorer
    from calm_jax.models import flops
    from calm_jax.models.parameters import BLOCKS, Geometry
    from calm_jax.text import chat as chat_lib
    from calm_jax.text.prompts import Layout, encode
    model, mesh, chat = config.model, setup.mesh, chat_lib.load(config.tokenizer, config.chat)
    parts = setup.process.parts
    sample = Sample((ImageRef(0),), (Turn((Mention(0, parts), f" {instructions.SCORE[0]}"), Answer("")),))
    length = len(encode(sample, chat, Layout.of(model, parts), ask=0).tokens)
    width = generate.bucket(length)
    geometry = Geometry.of(model, unrolled=True)
    stacked = {path: leaf.sharding for path, leaf in setup.kept.items()}

    def place(path):
        if path in stacked:
            return stacked[path]
        _, _, below = path.removeprefix(BLOCKS).partition("/")
        spec = stacked[BLOCKS + below].spec
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*spec[1:]))

    parameters = {path: jax.ShapeDtypeStruct(leaf.shape, setup.step.dtype, sharding=place(path))
                  for path, leaf in geometry.shapes.items()}
    count, row = rows * mesh.shape["data"] * mesh.shape["fsdp"], sharding.rows(mesh)
    size = model.encoder.image_size
    batch = {name: jax.ShapeDtypeStruct((count, *shape), dtype, sharding=row) for name, (shape, dtype) in {
        "images": ((1, size, size, 3), jnp.uint8), "tokens": ((width,), jnp.int32), "visual": ((width,), jnp.int32),
        "lengths": ((), jnp.int32), "digests": ((), jnp.uint32)}.items()}
    tree = scorer.Tree.of(chat.tokenizer, scorer.SAID["expectation"])
    program = jax.jit(functools.partial(generate.placed, mesh, functools.partial(
        scorer.expectation, geometry, parts=parts, dtype=setup.step.dtype, tree=tree,
        vocab=chat.tokenizer.vocab)))
    work = flops.a_score(model, width, parts, len(tree.tokens))
    return program.lower(parameters, batch), {"parameters": a_device(parameters), "batch": a_device(batch)}, {
        "forward": work.forward}


def advice(found: Mapping[str, Any], config: config_lib.Config, process: config_lib.Process) -> str:
    """The one knob to turn where it does not fit."""
    held, capacity = sum(found["bytes"].values()), found["capacity"]
    if found["inference"]:
        return ("weights alone exceed the memory: take more devices, or --config.mesh.tensor=2" if held > capacity else
                "give fewer --rows")
    if held > 0.9 * capacity:
        trained = found["bytes"]["trained parameters"] + found["bytes"]["optimizer"]
        needed = 2 ** math.ceil(math.log2(held / capacity * found["devices"] * 1.3))
        if trained > 0.5 * held and not config.model.lora.rank:
            return (f"parameters and optimizer state alone take {held / GIB:.1f} GiB a device: take {needed} devices, "
                    "or low-rank updates (the variant +lora of configs/finetune.py)")
        return f"parameters alone take {held / GIB:.1f} GiB a device: take {needed} devices"
    rows = process.batch // process.accumulate // (found["mesh"]["data"] * found["mesh"]["fsdp"])
    if rows > 1:
        return (f"activations do not fit: --config.processes.{found['process']}.accumulate={process.accumulate * 2} "
                f"halves the rows at a time (now {rows} a device)")
    if config.model.remat != "full":
        return "activations do not fit: --config.model.remat=full keeps only the input of every block"
    return ("one row a device does not fit: --config.mesh.tensor=2 splits a row over two devices, or shorten "
            f"--config.processes.{found['process']}.row.tokens (now {process.row.tokens})")


def show(found: Mapping[str, Any]) -> str:
    """A plan as aligned text."""
    mesh = " x ".join(f"{axis}={size}" for axis, size in found["mesh"].items())
    what = "scorer" if found["inference"] else f"training step of {found['process']}"
    lines = [f"{found['config']}, {what}, on {found['topology']}: {found['devices']} devices, mesh {mesh}, "
             f"{found['batch']} rows" + (f" in {found['accumulate']} micro-batches" if found["accumulate"] > 1 else ""),
             f"  {'a device':<28}{'GiB':>9}"]
    lines += [f"  {name:<28}{size / GIB:>9.2f}" for name, size in found["bytes"].items()]
    if found["temporaries"] is None:
        lines.append(f"  {'activations, temporaries':<28}{'more than fit':>16}")
    else:
        lines.append(f"  {'activations, temporaries':<28}{found['temporaries'] / GIB:>9.2f}")
    share = found["total"] / found["capacity"]
    lines.append(f"  {'all, as compiled':<28}{found['total'] / GIB:>9.2f}   of {found['capacity'] / GIB:.2f}"
                 f" ({share:.0%}): {'fits' if found['fits'] else 'DOES NOT FIT'}")
    if found["advice"]:
        lines.append(f"  turn this: {found['advice']}")
    work = ", ".join(f"{kind} {value / 1e12:.1f}" for kind, value in found["flops"].items())
    lines.append(f"  TFLOP a step: {work}; all {sum(found['flops'].values()) / 1e12:.1f}")
    lines.append(f"  estimate: {found['estimate_s']['compute']:.2f} s of computation a step at {MFU:.0%} of the peak "
                 f"(assumed), {found['estimate_s']['collectives']:.2f} s of collectives if nothing hides them")
    for kind, (count, size) in sorted(found["collectives"].items(), key=lambda item: -item[1][1]):
        lines.append(f"  {kind:<20}{count:>8.0f} times{size / GIB:>10.2f} GiB of results a device and step")
    for path, size in found.get("replicated", {}).items():
        lines.append(f"  whole on every device: {path} ({size / 2 ** 20:.1f} MiB)")
    read = found["devices"] * sum(size for name, size in found["bytes"].items() if "parameters" in name)
    lines.append(f"  start-up: {read / GIB:.1f} GiB of parameters read by all hosts together; lowered here in "
                 f"{found['lower_s']:.0f} s, compiled in {found['compile_s']:.0f} s (a second start has the cache)")
    lines.append(f"  this plan took {found['seconds']:.0f} s and {found['peak_rss'] / GIB:.1f} GiB on "
                 f"{found['cores']} cores, jax {found['jax']}")
    return "\n".join(lines)


def run(recipe: Callable[[], recipes.Recipe], topology: str, *, process: str, inference: bool, rows: int, hlo: str,
        out: str) -> int:
    """Plans a process, shows the plan and writes it; 1 where it does not fit the memory.

    Args:
      recipe: loads the config, after JAX has been told which devices to plan for.

    Raises:
      ConfigError: there is no such process or slice, or it cannot be planned here.
    """
    if out:
        files.output(out, ours=files.json_with("fits", "jax"))
    if hlo:
        files.output(hlo, "--hlo", ours=lambda path: path.read_bytes().startswith(b"HloModule"))
    devices = Topology.of(topology)
    devices.prepare()
    chosen = recipe()
    name = process or chosen.config.run[-1]
    if name not in chosen.config.processes:
        raise ConfigError(f"there is no process {name!r}{nearest(name, chosen.config.processes)}")
    found = plan(chosen.config, name, devices, given=chosen.given, inference=inference, rows=rows, hlo=hlo)
    print(show(found))
    if out:
        files.write(out, json.dumps(found, indent=1))
    return 0 if found["fits"] else 1
