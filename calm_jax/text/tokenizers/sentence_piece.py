"""SentencePiece models: LLaMA's, Vicuna's, and the small one that ships (ours)."""

from __future__ import annotations

import functools
import hashlib
import pathlib
from collections.abc import Iterable

import sentencepiece

from calm_jax.text.tokenizers import REMEDY, content, unusable


class SentencePieceTokenizer:
    """See `text.tokenizers.Tokenizer`. A word boundary stands before each segment.

    Args:
      path: of the model file.
      remedy: what helps where it cannot be used.

    Raises:
      ConfigError: the file is absent or is no SentencePiece model, or one without LLaMA's special pieces.
    """

    FILES = ("tokenizer.model",)

    def __init__(self, path: str, *, remedy: str = REMEDY):
        file = pathlib.Path(path)
        self.name, self.files = path, (file,)
        model = content(file, remedy)
        reason = ""
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
            if min(self._model.bos_id(), self._model.eos_id(), self._model.unk_id()) < 0:
                reason = "it has no pieces for the beginning and end of a text and for what is unknown"
        except Exception:  # the library raises RuntimeError and others
            reason = "the file is no SentencePiece model"
        if reason:
            raise unusable(file, reason, remedy)
        self.fingerprint = hashlib.sha256(model).hexdigest()[:12]
        self.vocab = self._model.get_piece_size()
        self.bos, self.eos, self.unknown = self._model.bos_id(), self._model.eos_id(), self._model.unk_id()
        self._encode = functools.lru_cache(maxsize=65_536)(lambda text: tuple(self._model.encode(text)))

    def encode(self, text: str) -> tuple[int, ...]:
        return self._encode(text)

    def decode(self, ids: Iterable[int]) -> str:
        return self._model.decode([int(token) for token in ids])

    def pieces(self, ids: Iterable[int]) -> list[str]:
        return [self._model.id_to_piece(int(token)) for token in ids]

    def special(self, token: str) -> int | None:
        found = self._model.piece_to_id(token)
        return found if found != self.unknown or token == self._model.id_to_piece(found) else None

    def offsets(self, text: str) -> dict[int, int]:
        found, place = {}, -1  # the word boundary in front of the text stands at -1
        for index, piece in enumerate(self.pieces(self.encode(text))):
            if len(piece) == 1 and place >= 0:
                found[place] = index
            place += len(piece)
        return found

    def character(self, character: str) -> int:
        return self._model.piece_to_id(character)


TOKENIZER = SentencePieceTokenizer
