"""Training starts from a converted checkpoint: every process reads its share of it and never holds the whole model.

Real processes that jax.distributed joins over loopback restore what tools.convert_from_hf wrote. Each of them says
what it read (/proc/self/io) and how much anonymous memory that took; the control restores everything everywhere.
"""

from __future__ import annotations

import json
import pathlib
import shutil
import socket
import subprocess
import sys
import threading

import jax
import miniature
import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.checkpoints import array_io, locate, restore
from calm_jax.checkpoints.meta import MARKER
from calm_jax.convert import torch_files
from calm_jax.errors import CheckpointError
from calm_jax.models.parameters import Geometry
from calm_jax.training import logging

MIB = 1 << 20
# Processes that share eight devices; a single device each is the literal claim, and a minute of two cores.
COUNTS = [2, 4, 8] if miniature.THOROUGH else [4]

# ---- what runs in each of several processes -----------------------------------------------------------------------


class Cost:
    """Of a block: bytes that this process read meanwhile, and the most anonymous memory that it took beyond before."""

    def __enter__(self):
        self._before, self._peak, self._over = (self._read(), self._anonymous()), 0, threading.Event()
        self._thread = threading.Thread(target=self._sample)
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        self.read, self.memory = self._read() - self._before[0], max(self._peak, self._anonymous()) - self._before[1]

    def _sample(self):
        while not self._over.wait(0.002):
            self._peak = max(self._peak, self._anonymous())

    @staticmethod
    def _read() -> int:
        return int(pathlib.Path("/proc/self/io").read_text().split()[1])

    @staticmethod
    def _anonymous() -> int:
        lines = pathlib.Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) << 10


def restores(folder: str, address: str, index: int, count: int, control: bool) -> None:
    """One of `count` processes with eight devices together; prints what finding and restoring `folder`/out cost it."""
    jax.distributed.initialize(address, count, index)
    assert jax.process_count() == count and len(jax.devices()) == 8
    try:
        locate.find(f"{folder}/damaged")
    except CheckpointError as error:
        result = {"damaged": str(error)}  # also loads what joined processes need, so that below only files count
    with Cost() as finding:
        saved = locate.find(f"{folder}/out")
    config = config_lib.from_config_dict(saved.meta["config"])
    geometry, mesh = Geometry.of(config.model), sharding.make_mesh(config_lib.Mesh(fsdp=8))
    layout, held = sharding.parameters(geometry.shapes, mesh), array_io.shapes(saved)
    kept = {path: jax.ShapeDtypeStruct(leaf.shape, np.float32, sharding=layout[path])
            for path, leaf in geometry.shapes.items()}
    first = "decoder/norm/scale"  # loading one small array, and in one test the layer at random, is in the baseline
    loaded = restore.load(saved, geometry, config, {
        path: leaf for path, leaf in kept.items() if path == first or (control and path not in held)})
    with Cost() as sharing:
        loaded |= jax.block_until_ready(
            restore.load(saved, geometry, config, {path: kept[path] for path in held if path != first}))
    assert loaded.keys() == (kept if control else held).keys()
    result |= {"found": finding.read, "read": sharing.read, "memory": sharing.memory,
               "share": sum(shard.data.nbytes for path in held for shard in loaded[path].addressable_shards)}
    source = torch_files.tensors(pathlib.Path(folder) / "llm")
    for path, truth in {
            "decoder/head/kernel": source["lm_head.weight"].read().T,
            "decoder/blocks/down/kernel": np.stack([source[f"model.layers.{n}.mlp.down_proj.weight"].read().T
                                                  for n in range(config.model.decoder.depth)])}.items():
        for shard in loaded[path].addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), truth[shard.index])
    if control:
        del loaded, truth
        everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        with Cost() as whole:
            jax.block_until_ready(restore.load(saved, geometry, config, {
                path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=everywhere)
                for path, leaf in kept.items() if path in held and path != first}))
        result["control"] = {"read": whole.read, "memory": whole.memory}
    print(json.dumps(result))


# ---- the checkpoint, and the processes that start from it ---------------------------------------------------------


def converted(folder: pathlib.Path, llm) -> pathlib.Path:
    """A small encoder, this language model and Q-Formers of LAVIS, converted: everything but the thematic layer."""
    import test_conversion
    import torch

    from calm_jax.convert import hf_import
    from calm_jax.text.tokenizers import SHIPPED
    torch.manual_seed(0)
    test_conversion.write(test_conversion.vit(), folder / "vit", "safetensors")
    test_conversion.write(llm, folder / "llm", "safetensors")
    shutil.copyfile(SHIPPED, folder / "llm" / "tokenizer.model")
    torch.save({"model": test_conversion.lavis(width=64, out=llm.config.hidden_size)}, folder / "qformer.pth")
    return hf_import.convert(str(folder / "vit"), str(folder / "llm"), [str(folder / "qformer.pth")],
                                   str(folder / "out"))


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> tuple[pathlib.Path, int]:
    """A folder with a converted model of 160 MB in out/ and a damaged checkpoint beside it; the bytes of the model."""
    pytest.importorskip("torch", reason="torch is not here; make test has it")
    import transformers
    folder = tmp_path_factory.mktemp("large")
    out = converted(folder, transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=2048, hidden_size=1024, num_hidden_layers=3, num_attention_heads=16, intermediate_size=2816)))
    (folder / "damaged").mkdir()
    (folder / "damaged" / MARKER).write_text("{}")
    saved = locate.find(out)
    whole = sum(4 * int(np.prod(shape)) for shape in array_io.shapes(saved).values())
    assert whole > 150 * MIB
    yield folder, whole
    shutil.rmtree(folder)


def joined(folder: pathlib.Path, count: int, control: bool) -> list[dict]:
    """What each of `count` processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    code = "import sys, test_start_from_converted as t; t.restores(*sys.argv[1:3], *map(int, sys.argv[3:]))"
    env = miniature.environment(devices=8 // count)
    processes = [subprocess.Popen([sys.executable, "-c", code, str(folder), address, str(n), str(count),
                                   str(int(control))], cwd=miniature.ROOT, env=env, text=True, stdout=subprocess.PIPE,
                                  stderr=(folder / f"errors-{n}").open("w")) for n in range(count)]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    for n, process in enumerate(processes):
        assert process.returncode == 0, (folder / f"errors-{n}").read_text()[-4000:]
    return [json.loads(text.splitlines()[-1]) for text in said]


@pytest.mark.slow
@pytest.mark.parametrize("count", COUNTS)
def test_each_process_reads_and_holds_its_share(large, count):
    folder, whole = large
    results = joined(folder, count, control=count < 8)
    for n, result in enumerate(results):
        print(f"{count} processes, number {n}: model {whole / MIB:.0f} MiB, share {result['share'] / MIB:.1f}, "
              f"read {result['read'] / MIB:.1f} and {result['found'] / MIB:.1f} to find it, "
              f"memory {result['memory'] / MIB:.1f}; control {result.get('control')}")
        share = result["share"]
        assert whole / count <= share < 1.1 * whole / count
        assert 0.9 * share < result["read"] < 1.2 * share + 2 * MIB
        assert 0.5 * share < result["memory"] < min(2 * share + 24 * MIB, whole)
        # Only the first verifies, which reads everything; an error of its is everyone's.
        assert result["found"] < 1 * MIB if n else result["found"] > whole
        assert result["damaged"] == results[0]["damaged"] and "is incomplete" in result["damaged"]
    for result in results if count < 8 else ():  # the same limits can be broken
        assert result["control"]["read"] > max(1.2 * result["share"] + 2 * MIB, whole)
        assert result["control"]["memory"] > max(2 * result["share"] + 24 * MIB, whole)


def test_on_the_papers_geometry_little_is_read_by_everyone():
    """Arrays of one chunk are read whole by every process; in the model of a real size they are few."""
    sizes = [2 * leaf.size for leaf in Geometry.of(config_lib.model("7b")).shapes.values()]
    assert sum(size for size in sizes if size < array_io.LARGE) < 0.001 * sum(sizes)


@pytest.mark.slow
def test_the_program_trains_from_it_on_eight_devices(tmp_path):
    import test_conversion
    out = converted(tmp_path, test_conversion.llama())
    saved = locate.find(out)
    model = saved.meta["config"]["model"]
    rate = 1e-4
    values = {
        "model": {name: model[name] for name in ("encoder", "depths", "qformer", "decoder")} | {"remat": "none"},
        "init": str(out), "tokenizer": str(out / "tokenizer.model"), "run": ("generic",), "log_every": 1,
        "processes": {"generic": {"steps": 2, "batch": 8, "eval_every": 0, "eval_batches": 1,
                                  "optimizer": {"peak_lr": rate, "scale": ()},
                                  "row": {"tokens": 192, "images": 2, "answers": 64}}}}
    done = miniature.run(miniature.command(tmp_path / "run", values=values), miniature.environment(devices=8))
    assert done.returncode == 0, done.stderr[-4000:]
    assert "devices: 8 x cpu" in done.stdout and "'fsdp': 8" in done.stdout
    records = logging.read(tmp_path / "run" / "metrics.jsonl")
    losses = [record["loss"] for record in records if record["kind"] == "train"]
    assert len(losses) == 2 and np.isfinite(losses).all()
    _, before = test_conversion.values(out)
    _, after = test_conversion.values(tmp_path / "run")
    assert locate.find(tmp_path / "run").meta["base"]["path"] == str(out)
    moved = {path: float(np.abs(after[path] - before[path]).max()) for path in before}
    # Two steps of Adam, at the rate and at half of it; random numbers would be far off.
    assert max(moved.values()) < 1.6 * rate
    assert min(moved[path] for path in before if path.startswith(("encoder/blocks", "decoder/"))) > 0
