"""A model's geometry in; how fast it scores and decodes, beside its own export in torch, out. For `tools.bench`.

    python -m tools.bench inference --config configs/finetune.py:small [--against torch] [--rounds 5]

Both sides have the same random weights: a checkpoint is made and exported, and each side is a process of its own that
waits for its turn. Scoring is what a user calls, from arrays of pixels to numbers: `Generator.scores` here,
`CalmForCausalLM.score` there (encoder, prompt, and the tree of all decimals behind it). Decoding is greedy; its speed
is that of the tokens behind the first, so that the prompt does not count. That both sides give the same scores and the
same tokens is checked on the way.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping

import numpy as np

from calm_jax import config as config_lib
from calm_jax.data.samples import Answer, ImageRef, Mention, Sample, Turn
from calm_jax.data.tasks import instructions

SCORED, TOKENS = 8, 64  # pictures of a batch, tokens of an answer
BATCHES = (1, 8)  # of decoding
TOLERANCE = 2e-3  # of scores on 1-10, float32 on both sides


def measure(config: config_lib.Config, folder: pathlib.Path, *, against: bool, rounds: int) -> dict:
    """Median times of every contender, interleaved, as JSON values."""
    checkpoint = _checkpoint(config, folder / "checkpoint")
    sources = {"calm_jax": str(checkpoint)}
    if against:
        from tools import export_to_hf
        sources["torch"] = str(export_to_hf.export(str(checkpoint), str(folder / "hf")))
    workers = {name: subprocess.Popen([sys.executable, "-m", "tools.bench_inference", name, source],
                                      stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
               for name, source in sources.items()}
    jobs = [("score", SCORED, 0), *((job, batch, tokens) for batch in BATCHES
                                    for job, tokens in (("first", 1), ("answer", TOKENS)))]
    times: dict[str, dict[str, list[float]]] = {name: {} for name in workers}
    last: dict[str, dict] = {name: {} for name in workers}

    def ask(name, job):
        worker = workers[name]
        try:
            worker.stdin.write(json.dumps(job) + "\n")
            worker.stdin.flush()
            text = worker.stdout.readline()
        except BrokenPipeError:
            text = ""
        if not text:
            raise config_lib.ConfigError(f"the contender {name} died; its message is above")
        return json.loads(text)

    try:
        for number in range(rounds + 1):  # the first warms up
            for job in jobs:
                for name in workers:
                    reply = ask(name, job)
                    last[name][f"{job[0]} {job[1]}"] = reply["value"]
                    last[name]["peak"] = reply["peak"]
                    if number:
                        times[name].setdefault(f"{job[0]} {job[1]}", []).append(reply["seconds"])
            print(f"  round {number} of {rounds}", flush=True)
    finally:
        for worker in workers.values():
            worker.kill()
    if against:
        _agree(last)
    results = {}
    for name, taken in times.items():
        median = {job: statistics.median(values) for job, values in taken.items()}
        row = {"score_s": median[f"score {SCORED}"] / SCORED, "peak_bytes": last[name]["peak"],
               "spread": {job: [min(values), max(values)] for job, values in taken.items()}}
        for batch in BATCHES:
            behind = median[f"answer {batch}"] - median[f"first {batch}"]
            row[f"tokens_per_s_{batch}"] = batch * (TOKENS - 1) / behind
        results[name] = row
    from tools import flops  # which needs JAX, as this process else does not
    prompt = _prompt(config.model)
    return {"what": "inference", "results": results, "cores": os.cpu_count(), "prompt_tokens": prompt,
            "flops_score": flops.a_score(config.model, prompt).forward,
            "flops_token": flops.language(config.model, 1, 1).weights,
            "machine": platform.processor() or platform.machine()}


def _checkpoint(config: config_lib.Config, folder: pathlib.Path) -> pathlib.Path:
    """One of no arrays: everything is drawn from its seed when it is read."""
    from calm_jax.data.tokenizer import Tokenizer
    from calm_jax.training import checkpoint
    meta = {"process": config.run[0], "rows": 0, "best": None, "trained": [], "base": "", "seed": config.seed,
            "config": dataclasses.asdict(config), "tokenizer": Tokenizer(config.tokenizer).fingerprint}
    store = checkpoint.Checkpoints(folder, config_lib.Checkpoint())
    store.save(1, {"parameters": {}, "optimizer": ()}, meta)
    store.close()
    return folder


def _agree(last: Mapping[str, Mapping]) -> None:
    ours, theirs = last["calm_jax"], last["torch"]
    worst = float(np.abs(np.subtract(ours[f"score {SCORED}"], theirs[f"score {SCORED}"])).max())
    if not worst <= TOLERANCE:
        raise config_lib.ConfigError(f"the two sides do not compute the same: scores differ by {worst:.1e}")
    for batch in BATCHES:
        if ours[f"answer {batch}"] != theirs[f"answer {batch}"]:
            print(f"  note: not all greedy tokens are the same at batch {batch}; random weights have near ties",
                  flush=True)


# ---- floors ------------------------------------------------------------------------------------------------------


def _prompt(model: config_lib.Model) -> int:
    """Tokens of a scoring prompt."""
    from calm_jax.data.prompts import Layout, encode
    from calm_jax.data.tokenizer import Tokenizer
    return len(encode(_question(0)[0], Tokenizer(), Layout.of(model, config_lib.PARTS), ask=0).tokens)


# ---- contenders --------------------------------------------------------------------------------------------------


def _question(index: int) -> tuple[Sample, int]:
    text = f" {instructions.SCORE[0]}"
    return Sample((ImageRef(index),), (Turn((Mention(0, config_lib.PARTS), text), Answer("")),)), 0


def _pictures(size: int) -> list[np.ndarray]:
    """Squares of what the encoder sees: nothing is left to resize."""
    rng = np.random.default_rng(0)
    y, x = np.mgrid[0:size, 0:size]
    return [np.clip(127 + 70 * np.stack([np.sin(x / rng.uniform(3, 30)), np.cos(y / rng.uniform(3, 30)),
                                         np.sin((x + y) / rng.uniform(3, 30))], -1), 0, 255).astype(np.uint8)
            for _ in range(SCORED)]


def _calm_jax(source: str):
    from calm_jax.inference.decoding import Sampling
    from calm_jax.inference.generate import Generator
    from calm_jax.training import restore
    model = restore.model(source)
    generator = Generator(model.config.model, model.parameters, model.tokenizer, dtype=model.dtype)
    del model
    pictures = _pictures(generator.size)

    def run(job, batch, tokens):
        asked = [_question(index) for index in range(batch)]
        if job == "score":
            return [score.value for score in generator.scores(asked, pictures.__getitem__, batch=batch)]
        arrays = generator.arrays(asked, pictures.__getitem__, tokens)
        return generator.ids(arrays, tokens, Sampling(shortest=tokens)).tolist()

    return run


def _torch(source: str):
    import torch
    import transformers
    torch.set_num_threads(os.cpu_count() or 1)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, torch_dtype=torch.float32)
    model.eval()
    pictures = _pictures(model.config.vit["image_size"])

    def run(job, batch, tokens):
        if job == "score":
            return model.score(pictures[:batch], batch_size=batch)
        inputs = model.processor([[picture] for picture in pictures[:batch]], [instructions.SCORE[0]] * batch)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return ids[:, inputs["input_ids"].shape[1]:].tolist()

    return run


def main(name: str, source: str) -> None:
    """A contender's process: a line of JSON for each line it is sent."""
    run = {"calm_jax": _calm_jax, "torch": _torch}[name](source)
    for line in sys.stdin:
        job = json.loads(line)
        begin = time.perf_counter()
        value = run(*job)
        seconds = time.perf_counter() - begin
        print(json.dumps({"seconds": seconds, "value": value,
                          "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}), flush=True)


def show(result: Mapping) -> str:
    """The result as aligned text, ratios against ours last."""
    lines = [f"inference: prompt of {result['prompt_tokens']} tokens, {result['flops_score'] / 1e9:.2f} GFLOP a score, "
             f"{result['flops_token'] / 1e9:.3f} GFLOP a decoded token, {result['cores']} cores",
             f"  {'':<12}{'scores/s':>10}{'GFLOP/s':>10}" + "".join(f"{f'tokens/s, {batch}':>14}" for batch in BATCHES)
             + f"{'peak GiB':>10}"]
    for name, row in result["results"].items():
        lines.append(f"  {name:<12}{1 / row['score_s']:>10.2f}{result['flops_score'] / row['score_s'] / 1e9:>10.1f}"
                     + "".join(f"{row[f'tokens_per_s_{batch}']:>14.1f}" for batch in BATCHES)
                     + f"{row['peak_bytes'] / 2**30:>10.2f}")
    ours = result["results"]["calm_jax"]
    for name, row in result["results"].items():
        if name != "calm_jax":
            speeds = [f"scoring {row['score_s'] / ours['score_s']:.2f}",
                      *(f"decoding at batch {batch} {ours[key] / row[key]:.2f}" for batch in BATCHES
                        for key in [f"tokens_per_s_{batch}"])]
            lines.append(f"  times as fast as {name}: {', '.join(speeds)}; memory "
                         f"{ours['peak_bytes'] / row['peak_bytes']:.2f} of its")
    return "\n".join(lines)


if __name__ == "__main__":
    main(*sys.argv[1:])
