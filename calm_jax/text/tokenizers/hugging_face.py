"""Tokenizers of the Hugging Face library `tokenizers`: SmolLM2's, Llama 3's, Qwen's, TinyLlama's tokenizer.json."""

from __future__ import annotations

import functools
import hashlib
import json
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

from calm_jax.text.tokenizers import REMEDY, content, unusable

BEGINS = ("<|begin_of_text|>", "<s>", "<bos>")  # what families call the token before a text, if they have one
ENDS = ("<|end_of_text|>", "<|endoftext|>", "</s>", "<eos>")


class HuggingFaceTokenizer:
    """See `text.tokenizers.Tokenizer`.

    Args:
      path: of the tokenizer.json. A tokenizer_config.json beside it, where there is one, says which tokens begin and
        end a text; else those of known families do.
      remedy: what helps where it cannot be used.

    Raises:
      ConfigError: the file is absent or is none of the library's.
    """

    FILES = ("tokenizer.json",)

    def __init__(self, path: str, *, remedy: str = REMEDY):
        import tokenizers  # here: programs that use another kind should not wait for it
        file, beside = pathlib.Path(path), pathlib.Path(path).with_name("tokenizer_config.json")
        self.name, self.files = path, (file, *([beside] if beside.is_file() else []))
        model = content(file, remedy)
        try:
            self._model = tokenizers.Tokenizer.from_str(model.decode("utf-8"))
        except Exception as error:  # the library raises Exception itself
            raise unusable(file, "the file is no tokenizer.json of the library `tokenizers`", remedy) from error
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True  # the name of a special token inside a text is text
        self._special = {token.content: number for number, token in self._model.get_added_tokens_decoder().items()}
        self.vocab = max(self._model.get_vocab(with_added_tokens=True).values(), default=-1) + 1
        named = _config(beside)
        self.bos = self._first("bos_token" in named, named.get("bos_token"), BEGINS)
        self.eos = self._first("eos_token" in named, named.get("eos_token"), ENDS)
        self.unknown = self._first("unk_token" in named, named.get("unk_token"), ("<unk>",))
        self.fingerprint = hashlib.sha256(model + repr((self.bos, self.eos)).encode()).hexdigest()[:12]
        self._encode = functools.lru_cache(maxsize=65_536)(self._ids)

    def _first(self, known: bool, token: Any, usual: tuple[str, ...]) -> int | None:
        """The id of the token that the config names, which may be none; without one, of the first usual one."""
        token = token.get("content") if isinstance(token, Mapping) else token
        names = ((token,) if isinstance(token, str) else ()) if known else usual
        return next((self._special[name] for name in names if name in self._special), None)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._model.encode(text, add_special_tokens=False).ids)

    def encode(self, text: str) -> tuple[int, ...]:
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(token) for token in ids], skip_special_tokens=True)

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._model.id_to_token(int(token)) or "" for token in ids]

    def special(self, token: str) -> int | None:
        return self._special.get(token)

    def offsets(self, text: str) -> dict[int, int]:
        spans = self._model.encode(text, add_special_tokens=False).offsets
        return {first: index for index, (first, last) in enumerate(spans) if last - first == 1}

    def character(self, character: str) -> int:
        ids = self.encode(character)
        return ids[-1]


def _config(path: pathlib.Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, Mapping) else {}


TOKENIZER = HuggingFaceTokenizer
