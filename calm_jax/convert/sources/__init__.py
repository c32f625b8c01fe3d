"""Where pretrained parts come from: one kind of source a file.

A source is what a path or hub id names: a Hugging Face folder or weight file (`hugging_face`), a GGUF file of a
language model (`gguf`) or an ONNX file of an encoder (`onnx`). All speak Hugging Face's terms: a config.json, and
tensors by the names of transformers' classes, so that the weight tables in `convert.families` serve every kind.
"""

from __future__ import annotations

import pathlib
from typing import Protocol

from calm_jax import json_files
from calm_jax.convert import torch_files
from calm_jax.convert.torch_files import FileError, Tensor
from calm_jax.text.tokenizers import Tokenizer


class Source(Protocol):
    """A pretrained part that is not in memory.

    Attributes:
      path: the folder or file.
      notes: what is said about it when it is converted, a sentence each, such as which of its tensors are not used.
    """

    path: pathlib.Path
    notes: tuple[str, ...]

    def config(self) -> json_files.Table:
        """The fields of its config.json, whether there is such a file or not.

        Raises:
          GeometryError, FileError: it is damaged, or of a kind that is not read.
        """
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Every tensor by its name in transformers, none of them in memory before it is read.

        Raises:
          FileError: the file is damaged, or of a kind that is not read.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """The tokenizer of a language model. Its files are there as long as the source is.

        Raises:
          ConfigError: there is none, or it is of a kind that is not read.
        """
        ...

    def licence(self) -> str:
        """A short line of text, or empty where none is stated."""
        ...


def find(where: str) -> Source:
    """The source that a path or hub id names. A folder with a single `.gguf` or `.onnx` file and neither a config.json
    nor weights of transformers stands for that file.

    Raises:
      FileError: there is none, or the folder has several such files.
    """
    from calm_jax.convert.sources import gguf, hugging_face, onnx
    kinds = {".gguf": gguf.Gguf, ".onnx": onnx.Onnx}
    path = torch_files.locate(where)
    if path.is_dir() and not any((path / name).exists() for name in (
            "config.json", *torch_files.INDICES, *torch_files.SINGLE)):
        files = sorted(file for suffix in kinds for file in path.glob(f"*{suffix}"))
        if len(files) > 1:
            raise FileError(f"{path} holds {', '.join(file.name for file in files[:4])}"
                            f"{', ...' if len(files) > 4 else ''}; name one of these files")
        path = files[0] if files else path
    return kinds.get(path.suffix.lower() if not path.is_dir() else "", hugging_face.HuggingFace)(path)
