"""A model's geometry in; how fast it scores and decodes, beside its own export in torch, out. For `tools.bench`.

    python -m tools.bench inference --config configs/finetune.py:small [--against torch] [--rounds 5]

Both sides have the same random weights, on an accelerator in bfloat16: a checkpoint is made and exported, and each
side is a process of its own, see tools/contenders.py. Peak memory is that of its whole life, loading included. Scoring
is what a user calls, from arrays of pixels to numbers: `Generator.scores` here, `CalmForCausalLM.score` there (encoder,
prompt, and the tree of all decimals behind it). Decoding is greedy; its speed is that of the tokens behind the first,
so that the prompt does not count. That both sides give the same scores and the same tokens is checked on the way; in
bfloat16 differences are noted, not judged.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import statistics
import subprocess
import sys
from collections.abc import Mapping

import numpy as np

from calm_jax import config as config_lib
from calm_jax.data.samples import Answer, ImageRef, Mention, Sample, Turn
from calm_jax.data.tasks import instructions
from calm_jax.errors import ConfigError
from tools.bench import contenders

SCORED, TOKENS = 8, 64  # pictures of a batch, tokens of an answer
BATCHES = (1, 8)  # of decoding
TOLERANCE = 2e-3  # of scores on 1-10, float32 on both sides
SECTION = "Inference"  # of docs/benchmarks.md, and the columns of its table
COLUMNS = ("", "scores/s (batch 8)", "tokens/s, batch 1", "tokens/s, batch 8", "peak memory")


def measure(config: config_lib.Config, folder: pathlib.Path, *, against: bool, rounds: int) -> dict:
    """Median times of every contender as JSON values; `folder` takes the weights."""
    contenders.stay_on_cpu()
    source = checkpoint(config, folder / "checkpoint")
    sources = {"calm_jax": ("jax", str(source))}
    if against:
        precise = contenders.probe()["platform"] == "cpu"
        # In a process of its own: it draws the weights where they will be computed with.
        subprocess.run([sys.executable, "-m", "tools.export_to_hf", "--checkpoint", str(source), "--out",
                        str(folder / "hf"), "--dtype", "stored" if precise else "bfloat16"], check=True,
                       stdout=subprocess.DEVNULL, env=contenders.ENVIRONMENT | os.environ)
        sources["torch"] = ("torch", str(folder / "hf"))
    jobs = [("score", SCORED, 0), *((job, batch, tokens) for batch in BATCHES
                                    for job, tokens in (("first", 1), ("answer", TOKENS)))]
    played = contenders.compete({name: [sys.executable, "-m", "tools.bench.inference", *source]
                                 for name, source in sources.items()}, jobs, rounds + 1)
    names = [f"{job} {batch}" for job, batch, _ in jobs]
    difference = None
    if all(not one.error for one in played.values()) and against:
        last = {name: dict(zip(names, (reply["value"] for reply in one.rounds[-1]), strict=True))
                for name, one in played.items()}
        difference = _agree(last, precise)
    from calm_jax.models import flops  # which needs JAX, as this process else does not
    prompt = _prompt(config)
    device = played["calm_jax"].device
    return {"what": "inference", "results": {name: _row(one, names) for name, one in played.items()},
            "prompt_tokens": prompt, "score_difference": difference, "device": device,
            "machine": contenders.machine(device), "flops_score": flops.a_score(config.model, prompt).forward,
            "flops_token": flops.language(config.model, 1, 1).weights}


def _row(played: contenders.Played, names: list[str]) -> dict:
    """A contender's figures: medians of its `rounds`, seconds a score and a token; its `error` where it has none.

    A round's answer is compared with the same round's first token: the machine is not as fast in every round, and a
    difference of two medians would take that for decoding.
    """
    if played.error:
        return {"error": played.error}
    taken = [{name: reply["seconds"] for name, reply in zip(names, replies, strict=True)}
             for replies in played.rounds[1:]]  # the first warms up
    rounds = {"score_s": [took[f"score {SCORED}"] / SCORED for took in taken]} | {
        f"token_s_{batch}": [(took[f"answer {batch}"] - took[f"first {batch}"]) / (batch * (TOKENS - 1))
                             for took in taken] for batch in BATCHES}
    return {**{name: statistics.median(values) for name, values in rounds.items()}, "rounds": rounds,
            "peak_bytes": played.rounds[-1][-1]["peak"]}


def checkpoint(config: config_lib.Config, folder: pathlib.Path) -> pathlib.Path:
    """One of no arrays: everything is drawn from its seed when it is read."""
    from calm_jax.checkpoints.store import Checkpoints
    from calm_jax.text import chat as chat_lib
    meta = {"process": config.run[0], "rows": 0, "best": None, "trained": [], "base": "", "seed": config.seed,
            "config": dataclasses.asdict(config),
            "tokenizer": chat_lib.load(config.tokenizer, config.chat).tokenizer.fingerprint}
    store = Checkpoints(folder, config_lib.Checkpoint())
    store.save(1, {"parameters": {}, "optimizer": ()}, meta)
    store.close()
    return folder


def _agree(last: Mapping[str, Mapping], precise: bool) -> float:
    """How far scores of the two sides differ at most.

    Raises:
      ConfigError: too far for `precise` sides.
    """
    ours, theirs = last["calm_jax"], last["torch"]
    worst = float(np.abs(np.subtract(ours[f"score {SCORED}"], theirs[f"score {SCORED}"])).max())
    if precise and not worst <= TOLERANCE:
        raise ConfigError(f"the two sides do not compute the same: scores differ by {worst:.1e}")
    for batch in BATCHES:
        if ours[f"answer {batch}"] != theirs[f"answer {batch}"]:
            print(f"  note: not all greedy tokens are the same at batch {batch}; random weights have near ties",
                  flush=True)
    return worst


# ---- floors ------------------------------------------------------------------------------------------------------


def _prompt(config: config_lib.Config) -> int:
    """Tokens of a scoring prompt."""
    from calm_jax.text import chat as chat_lib
    from calm_jax.text.prompts import Layout, encode
    chat = chat_lib.load(config.tokenizer, config.chat)
    return len(encode(question(0)[0], chat, Layout.of(config.model, config_lib.PARTS), ask=0).tokens)


# ---- contenders --------------------------------------------------------------------------------------------------


def question(index: int) -> tuple[Sample, int]:
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
    from calm_jax.checkpoints import restore
    from calm_jax.inference.decoding import Sampling
    from calm_jax.inference.generate import Generator
    model = restore.model(source)
    generator = Generator(model.config.model, model.parameters, model.chat, dtype=model.dtype)
    del model
    pictures = _pictures(generator.size)

    def run(job, batch, tokens):
        asked = [question(index) for index in range(batch)]
        if job == "score":
            return [score.value for score in generator.scores(asked, pictures.__getitem__, batch=batch)]
        arrays = generator.arrays(asked, pictures.__getitem__, tokens)
        return generator.ids(arrays, tokens, Sampling(shortest=tokens)).tolist()

    return run


def _torch(source: str):
    import torch
    import transformers
    torch.set_num_threads(os.cpu_count() or 1)
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, torch_dtype=dtype)
    model.eval().to(device)
    pictures = _pictures(model.config.vit["image_size"])

    def run(job, batch, tokens):
        if job == "score":
            return model.score(pictures[:batch], batch_size=batch)
        inputs = model.processor([[picture] for picture in pictures[:batch]], [instructions.SCORE[0]] * batch
                                 ).to(device)
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
        return ids[:, inputs["input_ids"].shape[1]:].tolist()

    return run


def main(side: str, source: str) -> None:
    """A contender's process, see `contenders.serve`."""
    contenders.serve(side, lambda: ({"jax": _calm_jax, "torch": _torch}[side](source), {}))


def show(result: Mapping) -> str:
    """The result as aligned text, ratios against ours last."""
    lines = [f"inference: prompt of {result['prompt_tokens']} tokens, {result['flops_score'] / 1e9:.2f} GFLOP a score, "
             f"{result['flops_token'] / 1e9:.3f} GFLOP a decoded token, on {result['machine']}",
             f"  {'':<12}{'scores/s':>10}{'GFLOP/s':>10}" + "".join(f"{f'tokens/s, {batch}':>14}" for batch in BATCHES)
             + f"{'peak GiB':>10}"]
    for name, row in result["results"].items():
        if "error" in row:
            lines.append(f"  {name:<12}{row['error']}")
            continue
        lines.append(f"  {name:<12}{1 / row['score_s']:>10.2f}{result['flops_score'] / row['score_s'] / 1e9:>10.1f}"
                     + "".join(f"{1 / row[f'token_s_{batch}']:>14.1f}" for batch in BATCHES)
                     + f"{row['peak_bytes'] / 2**30:>10.2f}")
    if ratios := _ratios(result["results"]):
        scoring, *decoding, memory = ratios
        speeds = [f"scoring {scoring}", *(f"decoding at batch {batch} {ratio}"
                                          for batch, ratio in zip(BATCHES, decoding, strict=True))]
        lines.append(f"  times as fast as torch: {', '.join(speeds)}; memory {memory} of its")
    if result["score_difference"] is not None:
        lines.append(f"  scores of the two sides differ by {result['score_difference']:.1e} at most")
    return "\n".join(lines)


def cells(result: Mapping) -> list[list[str]]:
    """The rows of the table, without their common columns."""
    found = []
    for name, row in result["results"].items():
        found.append([name, row["error"], "", "", ""] if "error" in row else [
            name, f"{1 / row['score_s']:.2f} ({result['flops_score'] / row['score_s'] / 1e9:.0f} GFLOP/s)",
            *(f"{1 / row[f'token_s_{batch}']:.1f}" for batch in BATCHES), f"{row['peak_bytes'] / 2**30:.2f} GiB"])
    if ratios := _ratios(result["results"]):
        found.append(["times as fast", *ratios[:-1], f"{ratios[-1]} of its"])
    return found


def _ratios(results: Mapping[str, Mapping]) -> list[str]:
    """How many times as fast as torch: scoring, decoding at each batch, each the median over rounds, with the least and
    the most; and the share of its memory."""
    if "torch" not in results or any("error" in row for row in results.values()):
        return []
    ours, theirs = results["calm_jax"], results["torch"]
    found = []
    for name, values in ours["rounds"].items():
        ratios = [other / own for own, other in zip(values, theirs["rounds"][name], strict=True)]
        found.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    return [*found, f"{ours['peak_bytes'] / theirs['peak_bytes']:.2f}"]


if __name__ == "__main__":
    main(*sys.argv[1:])
