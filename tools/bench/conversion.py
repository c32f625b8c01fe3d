"""A geometry in; how fast and in how much memory its Hugging Face files become a checkpoint and that a Hugging Face
folder again, beside plain copies, out.

Part of `python -m tools.bench conversion`. The source folders are made here: full geometry, random bfloat16 bits, in
shards of the size in which Vicuna is published; the MFAM, which no public file has, starts from random float32 numbers.
Each way runs in a process of its own, whose anonymous memory is read while it runs; mapped files do not count, as the
system may drop them at any time.
"""

from __future__ import annotations

import json
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import numpy as np
import tqdm

from calm_jax import config as config_lib
from calm_jax.convert import families, tables, torch_files
from calm_jax.errors import ConfigError
from calm_jax.models.parameters import Geometry

SHARD = 10 * 10**9  # bytes of a shard, as transformers writes by default when Vicuna was published
PIECE = 1 << 24  # random bytes made at a time
SECTION = "Conversion"  # of docs/benchmarks.md, and the columns of its table
COLUMNS = ("way", "size", "time", "copy of the same files", "ratio", "peak anonymous memory")


def measure(model: config_lib.Model, scratch: pathlib.Path) -> dict:
    """Of both ways: sizes, seconds, peak memory and ratios; `scratch` must have room for three times the model and is
    emptied."""
    shutil.rmtree(scratch, ignore_errors=True)
    sources, calm, back = scratch / "sources", scratch / "calm", scratch / "back"
    try:
        write_sources(model, sources)
        convert = _one_way([sources], sources, ["tools.convert_from_hf", "--vit", str(sources / "vit"),
                                                "--llm", str(sources / "llm"), "--out", str(calm)])
        shutil.rmtree(sources)
        export = _one_way([calm, back], back, ["tools.export_to_hf", "--checkpoint", str(calm), "--out", str(back)])
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return {"what": "conversion", "cores": os.cpu_count(), "convert": convert, "export": export}


def _one_way(cold: list[pathlib.Path], copied: pathlib.Path, command: list[str]) -> dict[str, float]:
    """Runs a program, and copies the Hugging Face folder that it reads or has written: seconds and bytes of each.

    The files that both begin with are dropped from the system's cache first, so that neither finds them in memory.
    """
    def timed(work: Callable[[], int]) -> tuple[int, float]:
        for folder in cold:
            _forget(folder)
        begin = time.perf_counter()
        result = work()
        os.sync()
        return result, time.perf_counter() - begin

    def copy() -> int:
        shutil.copytree(copied, copied.with_name("copy"))
        return 0

    if copied.exists():
        copy_s = timed(copy)[1]
        peak, seconds = timed(lambda: _watched([sys.executable, "-m", *command]))
    else:
        peak, seconds = timed(lambda: _watched([sys.executable, "-m", *command]))
        copy_s = timed(copy)[1]
    shutil.rmtree(copied.with_name("copy"))
    size = sum(file.stat().st_size for file in copied.rglob("*.safetensors"))
    return {"bytes": size, "copy_s": copy_s, "s": seconds, "ratio": seconds / copy_s,
            "gb_per_s": size / seconds / 1e9, "peak_anonymous_bytes": peak}


def _forget(folder: pathlib.Path) -> None:
    """Drops the files of a folder from the system's cache (Linux)."""
    os.sync()
    for file in folder.rglob("*") if folder.exists() else ():
        if file.is_file():
            with file.open("rb") as stream:
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def show(result: Mapping) -> str:
    """The result as text."""
    lines = [f"conversion on {result['cores']} cores", f"  {'':<9}{'size':>9}{'time':>10}{'rate':>12}"
             f"{'copy':>10}{'ratio':>8}{'anonymous memory':>19}"]
    for name in ("convert", "export"):
        way = result[name]
        lines.append(f"  {name:<9}{way['bytes'] / 1e9:>6.1f} GB{way['s']:>8.1f} s{way['gb_per_s']:>7.2f} GB/s"
                     f"{way['copy_s']:>8.1f} s{way['ratio']:>8.2f}{way['peak_anonymous_bytes'] / 2**30:>15.2f} GiB")
    return "\n".join(lines)


def cells(result: Mapping) -> list[list[str]]:
    """The rows of the table, without their common columns."""
    return [[name, f"{way['bytes'] / 1e9:.1f} GB", f"{way['s']:.1f} s ({way['gb_per_s']:.2f} GB/s)",
             f"{way['copy_s']:.1f} s", f"{way['ratio']:.2f}", f"{way['peak_anonymous_bytes'] / 2**30:.2f} GiB"]
            for name, way in ((name, result[name]) for name in ("convert", "export"))]


def write_sources(model: config_lib.Model, folder: pathlib.Path) -> int:
    """The folders `vit` and `llm` with random weights, a config.json each and a tokenizer; returns their bytes."""
    shapes = {path: leaf.shape for path, leaf in Geometry.of(model).shapes.items()}
    total = 0
    for name, prefix, table in (("vit", "encoder/", families.of(model.encoder).table(model.encoder)),
                                ("llm", "decoder/", families.of(model.decoder).table(model.decoder))):
        own = {path.removeprefix(prefix): shape for path, shape in shapes.items() if path.startswith(prefix)}
        entries, problems = tables.expand(table, own)
        assert not problems, problems
        total += _write_shards(folder / name, {entry.key: entry.shape for entry in entries})
    vit, llama = model.encoder, model.decoder
    (folder / "vit" / "config.json").write_text(json.dumps({
        "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": vit.width,
        "image_size": vit.image_size, "intermediate_size": vit.mlp_width, "num_attention_heads": vit.heads,
        "num_hidden_layers": vit.depth, "patch_size": vit.patch, "layer_norm_eps": vit.eps}))
    (folder / "llm" / "config.json").write_text(json.dumps({
        "model_type": "llama", "hidden_act": "silu", "hidden_size": llama.width, "vocab_size": llama.vocab,
        "intermediate_size": llama.mlp_width, "max_position_embeddings": llama.positions,
        "num_attention_heads": llama.heads, "num_key_value_heads": llama.kv_heads, "rms_norm_eps": llama.eps,
        "num_hidden_layers": llama.depth, "rope_theta": llama.rope_theta}))
    _write_tokenizer(folder / "llm" / "tokenizer.model", llama.vocab)
    return total


def _write_shards(folder: pathlib.Path, shapes: Mapping[str, tuple[int, ...]]) -> int:
    """Safetensors shards and their index, tensor by tensor: the library would want a whole shard in memory."""
    folder.mkdir(parents=True)
    shards: list[dict[str, int]] = [{}]
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape, dtype=np.int64))
        if shards[-1] and sum(shards[-1].values()) + size > SHARD:
            shards.append({})
        shards[-1][name] = size
    rng = np.random.default_rng(0)
    places, total = {}, sum(size for shard in shards for size in shard.values())
    with tqdm.tqdm(total=total, unit="B", unit_scale=True, desc=f"random {folder.name}", mininterval=0.5) as bar:
        for number, shard in enumerate(shards, 1):
            file = folder / f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            places |= dict.fromkeys(shard, file.name)
            with file.open("wb") as stream:
                stream.write(torch_files.header({name: (torch_files.DTYPES["BF16"], shapes[name]) for name in shard}))
                for size in shard.values():
                    for begin in range(0, size, PIECE):
                        stream.write(rng.bytes(min(PIECE, size - begin)))
                        bar.update(min(PIECE, size - begin))
    (folder / "model.safetensors.index.json").write_text(json.dumps(
        {"metadata": {"total_size": total}, "weight_map": places}))
    return total


def _write_tokenizer(path: pathlib.Path, vocab: int) -> None:
    """The project's tokenizer with unused pieces up to `vocab`: conversion checks nothing but the number."""
    from sentencepiece import sentencepiece_model_pb2

    from calm_jax.text.tokenizers import SHIPPED
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(SHIPPED.read_bytes())
    for number in range(len(model.pieces), vocab):
        model.pieces.add(piece=f"<unused{number}>", score=0.0, type=5)
    path.write_bytes(model.SerializeToString())


def _watched(command: list[str]) -> int:
    """Runs a command; the most anonymous memory its process held, bytes (Linux)."""
    child, peak = subprocess.Popen(command), 0
    while child.poll() is None:
        try:
            status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
        except OSError:
            break
        peak = max([peak, *(1024 * int(line.split()[1]) for line in status.splitlines() if line.startswith("RssAnon"))])
        time.sleep(0.05)
    if child.wait():
        raise ConfigError(f"{command[2]} ended with exit code {child.returncode}; its message is above")
    return peak
