"""A language model of its own name, and a tokenizer of bytes without a beginning of a text."""

from __future__ import annotations

import dataclasses

from calm_jax import config
from calm_jax.models.decoders.llama import Llama, LlamaConfig

SPECIAL = ("<|im_start|>", "<|im_end|>")


@dataclasses.dataclass(frozen=True)
class TongueConfig(LlamaConfig):
    """LLaMA under another name, small."""

    family: str = config.field("tongue", "name of the family", "retina")

    def build(self, rngs):
        return Llama(self, rngs)


class Bytes:
    """UTF-8, a token a byte."""

    FILES = ()

    def __init__(self):
        self.name, self.files, self.fingerprint = "bytes", (), "bytes-1"
        self.vocab, self.bos, self.eos, self.unknown = 256 + len(SPECIAL), None, None, None

    def encode(self, text):
        return tuple(text.encode())

    def decode(self, ids):
        return bytes(token for token in map(int, ids) if token < 256).decode(errors="replace")

    def pieces(self, ids):
        return [chr(token) if token < 256 else SPECIAL[token - 256] for token in map(int, ids)]

    def special(self, token):
        return 256 + SPECIAL.index(token) if token in SPECIAL else None

    def offsets(self, text):
        return {place: place for place in range(len(text))} if text.isascii() else {}

    def character(self, character):
        return ord(character)
