"""Hugging Face folders and weight files: a config.json, safetensors or torch's files, and a tokenizer beside them."""

from __future__ import annotations

import functools
import pathlib

from calm_jax import json_files
from calm_jax.convert import hf_config, torch_files
from calm_jax.text import tokenizers


class HuggingFace:
    """See `convert.sources.Source`."""

    notes: tuple[str, ...] = ()

    def __init__(self, path: pathlib.Path):
        self.path = path

    def config(self) -> json_files.Table:
        return hf_config.read(self.path)

    @functools.cached_property
    def _tensors(self) -> dict[str, torch_files.Tensor]:
        return torch_files.tensors(self.path)

    def tensors(self) -> dict[str, torch_files.Tensor]:
        return self._tensors

    def tokenizer(self) -> tokenizers.Tokenizer:
        folder = self.path if self.path.is_dir() else self.path.parent
        return tokenizers.load(str(folder), remedy="it belongs to the language model beside it, as tokenizer.model or "
                               "tokenizer.json: fetch it into that folder")

    def licence(self) -> str:
        return torch_files.licence(self.path)
