"""A checkpoint in; the model card that travels with its export, out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax import config as config_lib
from calm_jax.checkpoints import lineage
from calm_jax.checkpoints.meta import Saved
from calm_jax.convert import torch_files
from calm_jax.data import scale
from calm_jax.data.tasks import skills
from calm_jax.errors import CheckpointError


def card(saved: Saved, model: config_lib.Model, content: Sequence[torch_files.Tensor],
         taught: Mapping[str, Any], tokenizer: str) -> str:
    """The README.md of the whole model: use, what it was taught, scale of the scores, training, sizes, licences.

    Args:
      taught: by its own process: process, tasks and skills.
      tokenizer: name of its file.
    """
    history, sources = ancestry(saved)
    count = sum(int(np.prod(tensor.shape, dtype=np.int64)) for tensor in content)
    dtypes = sorted({tensor.dtype.name for tensor in content})
    licences = sorted({source["licence"] for _, source in sources if source["licence"]})
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text",
            "tags:", "- image-aesthetics", "- calm",
            # as YAML, whatever the source's own card says there
            f"license: {json.dumps(licences[0]) if len(licences) == 1 else 'other'}", "---"]
    needed = {"tokenizer.model": "sentencepiece", "tokenizer.json": "tokenizers"}[tokenizer]
    can = ", ".join(skills.SKILLS[skill].what for skill in taught["skills"])
    scored = [] if "score" in taught["skills"] else ["", "**It was never trained on scores, or has unlearned them: its "
                                                     "numbers mean nothing.**"]
    return "\n".join([
        *head, "",
        "# CALM, exported from calm_jax", "",
        "An aesthetic multimodal language model after CALM (AAAI 2025, arXiv 2412.11952), an independent",
        "implementation. It looks at photographs and gives scores and comments.", "",
        "```python",
        "from transformers import AutoModelForCausalLM, AutoProcessor",
        'model = AutoModelForCausalLM.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
        'model.score(["a.jpg", "b.jpg"])',
        'model.comment(["a.jpg"])',
        'processor = AutoProcessor.from_pretrained("THIS_FOLDER", trust_remote_code=True)',
        'inputs = processor(images=["a.jpg"], text="What would improve this photograph?")',
        "ids = model.generate(**inputs, max_new_tokens=64)",
        'processor.batch_decode(ids[:, inputs["input_ids"].shape[1]:])',
        "```", "",
        f"It needs torch, transformers (4.46 or newer), {needed} and pillow. The files beside the weights compute",
        "everything themselves; the processor pads pictures to a square and never crops them.", "",
        "## What it was taught", "",
        f"{can.capitalize()}, by its last training process, {taught['process']}." if can else "Nothing.",
        f"Tasks of that process: {', '.join(taught['tasks']) or 'none'}. What an earlier process taught counts as",
        "unlearned. Asked for anything else, the model answers all the same, and that means nothing; suggestions alone",
        "can be asked for unlearned (zero-shot, as in the paper), of a model that learned words about pictures.", "",
        "## Scores", "",
        f"From {scale.LOWEST:g} to {scale.HIGHEST:g}, higher is better; the scale of each data set was mapped to it "
        "linearly. `score` gives the mean of",
        f"all {len(scale.DECIMALS)} decimals under the model's probabilities of saying them, "
        "`score(images, reader=\"levels\")` that of",
        "five words from bad to excellent" + (
            ", and `reader=\"head\"` asks the regression head." if model.score_head.width else "."), *scored, "",
        "## Training", "",
        *_table(("process", "steps", "rows a step", "data", "tasks"),
                [(entry["process"], entry["steps"], entry["batch"], entry["dataset"], ", ".join(entry["tasks"]))
                 for entry in history] or [("none", "", "", "", "")]), "",
        f"Checkpoint at step {saved.step} of {saved.meta['process'] or 'a conversion'}, seed {saved.meta['seed']}, "
        f"calm_jax {saved.meta.get('version', '')} {saved.meta.get('commit', '')[:12]}".rstrip() + ".",
        f"Encoder {model.encoder.family} {model.encoder.width} x {model.encoder.depth} at {model.encoder.image_size} "
        f"px, Q-Formers {model.qformer.width} x {model.qformer.depth} with {model.qformer.queries} queries each, "
        f"language model {model.decoder.width} x {model.decoder.depth}:",
        f"{count / 1e6:,.1f} million parameters in {', '.join(dtypes)}.", "",
        "## Parts and licences", "",
        *_parts(sources), "",
        "The licences of the parts and of the training data go with the weights; the code is Apache-2.0.", ""])


def _parts(sources: Sequence[tuple[str, Mapping[str, str]]]) -> list[str]:
    """The table of the parts, with the columns of which anything is known, and what else is stated of them."""
    if not sources:
        return _table(("part", "from", "licence"), [("all", "randomly initialised", "")])
    more = {field: title for field, title in (("version", "version"), ("sha256", "SHA-256"))
            if any(source.get(field) for _, source in sources)}
    return [*_table(("part", "from", "licence", *more.values()),
                    [(part, source["name"], source["licence"] or "not stated in its folder",
                      *(source.get(field, "") for field in more)) for part, source in sources]),
            *(line for part, source in sources if source.get("statement")
              for line in ("", f"{part.capitalize()}: {_cell(source['statement'])}"))]


def ancestry(saved: Saved) -> tuple[list[dict[str, Any]], list[tuple[str, dict[str, str]]]]:
    """Training processes that led to a checkpoint, oldest first, and the parts that began it, as far as the
    checkpoints on the way are still where they were."""
    history: list[dict[str, Any]] = []
    at: Saved | None = saved
    while at is not None:
        if sources := at.meta.get("sources"):
            parts = [("encoder", sources["vit"]), ("language model", sources["llm"]),
                     *(("Q-Former", source) for source in sources["qformer"])]
            return history, parts
        config = at.meta["config"]
        if at.meta["process"] not in config["run"]:
            raise CheckpointError(f"{at.path} is of the process {at.meta['process']!r}, which its own "
                                  "config does not run; use another checkpoint")
        last = config["run"].index(at.meta["process"])
        done = []
        for name in config["run"][:last + 1]:
            process = config["processes"][name]
            steps = at.step if name == at.meta["process"] else process["steps"]
            done.append({"process": name, "steps": steps, "batch": process["batch"], "dataset": process["dataset"],
                         "tasks": [task for task, share in process["tasks"].items() if share]})
        history = done + history
        try:
            at = lineage.base(at)
        except CheckpointError:
            history.insert(0, {"process": f"{config['init']} (no longer there)", "steps": "", "batch": "",
                               "dataset": "", "tasks": []})
            at = None
    return history, []


def qformer(level: str, model: config_lib.Model) -> str:
    """The README.md of a Q-Former's folder: what lies where, and how to run it."""
    tap = model.depths.block(level, model.encoder.depth)
    return "\n".join([
        f"# The {level}-level Q-Former of a CALM", "",
        "`Blip2QFormerModel.from_pretrained` reads `model.safetensors`. That class holds neither queries nor",
        "projection: they are in `queries_and_projection.safetensors`, as", "",
        *_table(("tensor", "shape", "use"), [
            ("ln_vision.weight, ln_vision.bias", f"[{model.encoder.width}]",
             f"LayerNorm (eps 1e-5) of the encoder's hidden states after block {tap}, "
             "class token and registers, if any, included"),
            ("query_tokens", f"[1, {model.qformer.queries}, {model.qformer.width}]", "`query_embeds`"),
            ("language_projection.weight, .bias", f"[{model.decoder.width}, {model.qformer.width}]",
             "linear layer behind the last hidden state, to the language model's width")]), "",
        "Older transformers (4.46) want the config given: `Blip2QFormerModel.from_pretrained(FOLDER, "
        "config=Blip2QFormerConfig.from_pretrained(FOLDER))`.", ""])


def _table(names: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    return [f"| {' | '.join(map(_cell, row))} |" for row in (names, ["---"] * len(names), *rows)]


def _cell(value: Any) -> str:
    """Text as it is, in one cell: names and licences are other people's."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
