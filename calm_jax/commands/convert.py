"""Hugging Face folders of the parts in, a checkpoint to train from out."""

from __future__ import annotations

from collections.abc import Sequence

from calm_jax.checkpoints.meta import read_meta
from calm_jax.convert import hf_import


def run(vit: str, llm: str, qformers: Sequence[str], out: str, seed: int, chat: str,
        image_size: int = 0) -> None:
    """Converts, and says how to train from the result.

    Raises:
      ConfigError, CheckpointError: see `hf_import.convert`.
    """
    path = hf_import.convert(vit, llm, list(qformers), out, seed, template=chat, image_size=image_size)
    template = read_meta(path)["config"]["chat"]
    told = "" if template == "vicuna" else f" --config.chat={template}"
    print(f"written to {path}; train from it with --config.init={path} --config.tokenizer={path}{told}")
