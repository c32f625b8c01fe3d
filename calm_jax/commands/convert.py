"""Hugging Face folders of the parts in, a checkpoint to train from out."""

from __future__ import annotations

from collections.abc import Sequence

from calm_jax.checkpoints.meta import read_meta
from calm_jax.convert import hf_import
from calm_jax.convert import parts as known
from calm_jax.errors import ConfigError


def run(vit: str, llm: str, qformers: Sequence[str], out: str, seed: int, chat: str, image_size: int = 0, *,
        parts: str = "") -> None:
    """Converts, and says how to train from the result.

    Args:
      parts: a fetched set or the name of one, instead of `vit` and `llm`.

    Raises:
      ConfigError, CheckpointError: see `hf_import.convert` and `parts.locate`; or the parts are named twice or not.
    """
    recipe = ""
    if parts:
        if vit or llm:
            raise ConfigError("--parts names encoder and language model; leave out --vit and --llm, or --parts")
        found = known.locate(parts)
        vit, llm, chat = found.vit, found.llm, chat or found.chat
        recipe = f"calm train --config pretrain:{found.variant} " if found.variant else ""
    for option, given, words in (("--vit", vit, "the encoder"), ("--llm", llm, "the language model")):
        if not given:
            raise ConfigError(f"{option} is missing: {words}; or give both by --parts (calm parts lists the sets)")
    path = hf_import.convert(vit, llm, list(qformers), out, seed, template=chat, image_size=image_size)
    template = read_meta(path)["config"]["chat"]
    told = "" if template == "vicuna" else f" --config.chat={template}"
    print(f"written to {path}; train from it with {recipe}--config.init={path} --config.tokenizer={path}{told}")
