"""A config in; how long a step takes, beside the same geometry in torch in the same run, out.

    python -m tools.bench train --config configs/finetune.py:small [--against torch] [--rows 2] [--rounds 5]
    python -m tools.bench inference --config configs/finetune.py:small [--against torch]    (tools/bench_inference.py)
    python -m tools.bench data --config configs/pretrain.py:7b [--against torch]        (see tools/bench_data.py)
    python -m tools.bench conversion --config configs/pretrain.py:7b [--scratch DIR]   (see tools/bench_conversion.py)

Every contender runs in a process of its own and waits for its turn, so that the steps of all are interleaved on an
otherwise idle machine and each one's peak memory is its own. Ratios mean something; times alone depend on the machine.
The torch contender is what its users would write: CLIPVisionModel, three Blip2QFormerModels, LlamaModel with SDPA,
Adam, logits at the supervised positions only, a block-diagonal causal mask for the packed conversations.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

import numpy as np
from absl import flags

from calm_jax import command
from calm_jax import config as config_lib
from tools import bench_conversion, bench_data, bench_inference

_CONFIG = command.define_config()
_AGAINST = flags.DEFINE_enum("against", None, ["torch"], "what to compare with")
_ROWS = flags.DEFINE_integer("rows", 2, "rows a step")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "measured steps of each contender, after one to warm up")
_PROCESS = flags.DEFINE_string("process", None, "process of the config; default: its first")
_SCRATCH = flags.DEFINE_string("scratch", None, "conversion, inference, data: where there is room; "
                              "conversion wants three times the model")
_OUT = flags.DEFINE_string("out", None, "also write the result as JSON here")
_CONTENDER = flags.DEFINE_string("contender", None, "internal: run this contender on --batch and obey standard input")
_BATCH = flags.DEFINE_string("batch", None, "internal: the batch as .npz")


def make_batch(config: config_lib.Config, process: config_lib.Process) -> dict[str, np.ndarray]:
    """The first rows of the real pipeline."""
    from calm_jax.data import builders, pipeline
    from calm_jax.data.tokenizer import Tokenizer
    datasets = {name: builders.load(name, config.data.dir) for name in process.datasets}
    rows = pipeline.Rows(process, datasets, Tokenizer(config.tokenizer), config.model, seed=config.seed, split="train")
    batch = next(pipeline.batches(rows, config.data, batch=process.batch, start=0, stop=1))
    del batch["cursor"]
    return batch


def jax_step(config: config_lib.Config, process: config_lib.Process,
             batch: dict[str, np.ndarray]) -> Callable[[], float]:
    """The project's own training step; returns the loss of each call."""
    import jax
    import jax.numpy as jnp

    from calm_jax.models.parameters import Geometry, initial
    from calm_jax.training import sharding
    from calm_jax.training.setup import Setup
    from calm_jax.training.step import State
    setup = Setup.of(config, config.run[0], Geometry.of(config.model), sharding.make_mesh(config.mesh))
    layout = {path: leaf.sharding for path, leaf in setup.kept.items()}
    parameters = jax.jit(lambda key: initial(config.model, key), out_shardings=layout)(jax.random.key(config.seed))
    parameters = {path: value.astype(setup.kept[path].dtype) for path, value in parameters.items()}
    trained = {path: parameters[path] for path in setup.trained}
    frozen = {path: parameters[path] for path in setup.frozen}
    run = setup.compiled()
    state = jax.device_put(State(jnp.zeros((), jnp.int32), trained, jax.jit(setup.tx.init)(trained)), setup.placements)
    mesh = setup.mesh
    arrays, key = sharding.put(batch, mesh, process.batch), jax.random.key(0)

    def call() -> float:
        nonlocal state
        state, metrics = run(state, frozen, arrays, key)
        return float(metrics["loss"])

    return call


def torch_step(config: config_lib.Config, process: config_lib.Process,
               batch: dict[str, np.ndarray]) -> Callable[[], float]:
    """The same geometry from transformers' parts; random weights of its own. Returns the loss of each call."""
    import torch
    import transformers
    from torch import nn

    from calm_jax.models.vit import MEAN, STD
    torch.set_num_threads(os.cpu_count() or 1)
    cfg = config.model
    vit = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(
        hidden_size=cfg.vit.width, intermediate_size=cfg.vit.mlp_width, num_hidden_layers=cfg.vit.depth,
        num_attention_heads=cfg.vit.heads, image_size=cfg.vit.image_size, patch_size=cfg.vit.patch,
        attn_implementation="sdpa"))
    core = getattr(vit, "vision_model", vit)
    if cfg.vit.stem == "conv":
        count = cfg.vit.patch.bit_length() - 1
        widths = [3] + [max(cfg.vit.width >> (count - 1 - i), 16) for i in range(count)]
        convolutions = [layer for a, b in itertools.pairwise(widths)
                        for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.GELU(approximate="tanh"))]
        core.embeddings.patch_embedding = nn.Sequential(*convolutions, nn.Conv2d(widths[-1], cfg.vit.width, 1))
        core.embeddings.patch_embedding.weight = core.embeddings.patch_embedding[-1].weight  # its dtype is asked for
    depths = {part: cfg.depths.block(part, cfg.vit.depth) for part in process.parts}
    core.encoder.layers = core.encoder.layers[:max(depths.values())]
    q = cfg.qformer
    levels = [part for part in process.parts if part in config_lib.LEVELS]
    qformers = nn.ModuleDict({level: transformers.Blip2QFormerModel(transformers.Blip2QFormerConfig(
        hidden_size=q.width, num_hidden_layers=q.depth, num_attention_heads=q.heads, intermediate_size=q.mlp_width,
        cross_attention_frequency=q.cross_every, encoder_hidden_size=cfg.vit.width, hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0)) for level in levels})
    norms = nn.ModuleDict({level: nn.LayerNorm(cfg.vit.width) for level in levels})
    queries = nn.ParameterDict({level: nn.Parameter(torch.randn(1, q.queries, q.width) * 0.02) for level in levels})
    project = nn.ModuleDict({level: nn.Linear(q.width, cfg.llama.width) for level in levels})
    thematic = nn.Linear(cfg.vit.width, cfg.llama.width)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=cfg.llama.vocab, hidden_size=cfg.llama.width, intermediate_size=cfg.llama.mlp_width,
        num_hidden_layers=cfg.llama.depth, num_attention_heads=cfg.llama.heads, num_key_value_heads=cfg.llama.kv_heads,
        max_position_embeddings=cfg.llama.positions, attn_implementation="sdpa", use_cache=False))
    everything = nn.ModuleList([vit, qformers, norms, queries, project, thematic, llama]).train()
    optimizer = torch.optim.Adam([p for p in everything.parameters() if p.requires_grad], lr=process.optimizer.peak_lr)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in batch.items()}
    rows, images = tensors["images"].shape[:2]
    length = tensors["tokens"].shape[1]
    pixels = (tensors["images"].flatten(0, 1).float() / 255 - torch.tensor(MEAN)) / torch.tensor(STD)
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    segments = tensors["segments"]
    mask = (segments[:, :, None] == segments[:, None, :]) & torch.ones(length, length, dtype=torch.bool).tril()
    visual, positions = tensors["visual"].long(), tensors["positions"].long()
    places, labels, weights = tensors["places"].long(), tensors["labels"].long(), tensors["weights"]

    def call() -> float:
        hidden = vit(pixel_values=pixels, output_hidden_states=True).hidden_states
        parts = [project[level](qformers[level](
            query_embeds=queries[level].expand(rows * images, -1, -1),
            encoder_hidden_states=norms[level](hidden[depths[level]])).last_hidden_state) for level in levels]
        if "thematic" in process.parts:
            parts.append(thematic(hidden[depths["thematic"]][:, 1:]))
        pool = torch.cat(parts, 1).unflatten(0, (rows, images)).flatten(1, 2)
        words = llama.model.embed_tokens(tensors["tokens"].long())
        width = words.shape[-1]
        seen = pool.gather(1, visual.clamp(min=0)[..., None].expand(-1, -1, width))
        x = torch.where((visual >= 0)[..., None], seen, words)
        hidden = llama.model(inputs_embeds=x, attention_mask=mask[:, None], position_ids=positions).last_hidden_state
        logits = llama.lm_head(hidden.gather(1, places[..., None].expand(-1, -1, width)))
        loss = -(weights * logits.log_softmax(-1).gather(-1, labels)).sum() / weights.sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(everything.parameters(), process.optimizer.clip)
        optimizer.step()
        return float(loss.detach())

    return call


CONTENDERS = {"calm_jax": jax_step, "torch": torch_step}


def contend(name: str, config: config_lib.Config, process: config_lib.Process) -> None:
    """A contender's process: one line of JSON for each line it is sent."""
    with np.load(_BATCH.value) as arrays:
        batch = dict(arrays)
    begin = time.perf_counter()
    call = CONTENDERS[name](config, process, batch)
    loss = call()
    print(json.dumps({"first": time.perf_counter() - begin, "loss": loss}), flush=True)
    for _ in sys.stdin:
        begin = time.perf_counter()
        loss = call()
        print(json.dumps({"seconds": time.perf_counter() - begin, "loss": loss,
                          "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


def train(config: config_lib.Config, process: config_lib.Process) -> dict:
    """Times of every contender's training step, interleaved."""
    names = ["calm_jax", *([_AGAINST.value] if _AGAINST.value else [])]
    batch = make_batch(config, process)
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "batch.npz"
        np.savez(file, **batch)
        workers = {name: subprocess.Popen(
            [sys.executable, "-m", "tools.bench", *sys.argv[1:], f"--contender={name}", f"--batch={file}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for name in names}
        try:
            first = {name: _line(name, worker) for name, worker in workers.items()}
            times: dict[str, list[float]] = {name: [] for name in names}
            last: dict[str, dict] = {}
            for number in range(_ROUNDS.value):
                for name, worker in workers.items():
                    worker.stdin.write("go\n")
                    worker.stdin.flush()
                    last[name] = _line(name, worker)
                    times[name].append(last[name]["seconds"])
                    print(f"  round {number + 1}: {name:<10}{last[name]['seconds']:>8.2f} s", flush=True)
        finally:
            for worker in workers.values():
                worker.kill()
    tokens = int((batch["segments"] > 0).sum())
    results = {name: {"median_s": statistics.median(t), "min_s": min(t), "max_s": max(t),
                      "first_s": first[name]["first"], "tokens_per_s": tokens / statistics.median(t),
                      "peak_bytes": last[name]["peak"], "loss": last[name]["loss"]} for name, t in times.items()}
    return {"what": "train", "results": results, "rows": process.batch, "tokens": tokens,
            "pictures": int(batch["images"].any((2, 3, 4)).sum()), "cores": os.cpu_count(),
            "machine": platform.processor() or platform.machine()}


def _line(name: str, worker: subprocess.Popen) -> dict:
    text = worker.stdout.readline()
    if not text:
        raise config_lib.ConfigError(f"the contender {name} died; its message is above")
    return json.loads(text)


def show(result: dict) -> str:
    """The result as aligned text, ratios against ours last."""
    lines = [f"{result['what']}: {result['rows']} rows, {result['tokens']} tokens, {result['pictures']} pictures "
             f"a step, {result['cores']} cores",
             f"  {'':<12}{'median s':>10}{'min':>8}{'max':>8}{'first':>8}{'tokens/s':>10}{'peak GiB':>10}"]
    for name, row in result["results"].items():
        lines.append(f"  {name:<12}{row['median_s']:>10.2f}{row['min_s']:>8.2f}{row['max_s']:>8.2f}"
                     f"{row['first_s']:>8.1f}{row['tokens_per_s']:>10.0f}{row['peak_bytes'] / 2**30:>10.2f}")
    ours = result["results"]["calm_jax"]
    for name, row in result["results"].items():
        if name != "calm_jax":
            lines.append(f"  calm_jax / {name}: time {ours['median_s'] / row['median_s']:.2f}, "
                         f"memory {ours['peak_bytes'] / row['peak_bytes']:.2f}")
    return "\n".join(lines)


def main(what: list[str]) -> None:
    if what not in (["train"], ["inference"], ["data"], ["conversion"]):
        raise config_lib.ConfigError("say what to measure: train, inference, data or conversion, not "
                                     f"{' '.join(what) or 'nothing'}")
    config = command.config(_CONFIG)
    if what == ["conversion"]:
        with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as folder:
            report(bench_conversion.measure(config.model, pathlib.Path(folder) / "conversion"), bench_conversion.show)
        return
    if what == ["inference"]:
        with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as folder:
            report(bench_inference.measure(config, pathlib.Path(folder), against=bool(_AGAINST.value),
                                           rounds=_ROUNDS.value), bench_inference.show)
        return
    name = _PROCESS.value or config.run[0]
    if name not in config.processes:
        raise config_lib.ConfigError(f"there is no process {name!r}{config_lib.nearest(name, config.processes)}")
    process = dataclasses.replace(config.processes[name], batch=_ROWS.value, accumulate=1)
    config = dataclasses.replace(config, run=(name,), processes={name: process})
    if what == ["data"]:
        process = dataclasses.replace(process, dataset="folder")
        with tempfile.TemporaryDirectory(dir=_SCRATCH.value) as folder:
            report(bench_data.measure(config, process, pathlib.Path(folder) / "data", against=bool(_AGAINST.value),
                                      rounds=_ROUNDS.value), bench_data.show)
        return
    if _CONTENDER.value:
        contend(_CONTENDER.value, config, process)
        return
    report(train(config, process), show)


def report(result: dict, show: Callable[[dict], str]) -> None:
    """The result as text on the terminal, and as JSON in --out."""
    print(show(result))
    if _OUT.value:
        pathlib.Path(_OUT.value).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    command.run(main, words=True)
