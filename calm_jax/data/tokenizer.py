"""Text in, token ids out, and back: one thin wrapper of a SentencePiece model (ours, or LLaMA's by its path)."""

from __future__ import annotations

import functools
import hashlib
import pathlib

import sentencepiece

from calm_jax.errors import ConfigError

SHIPPED = pathlib.Path(__file__).with_name("tokenizer_small.model")
REMEDY = "give --config.tokenizer the path of a tokenizer.model, or leave it empty for the one that ships"


class Tokenizer:
    """A SentencePiece model. Control pieces are never produced from text: ids of segments are joined instead.

    Attributes:
      vocab, bos, eos, pad: vocabulary size and special ids; padding is the unknown id, which nothing supervises.
      fingerprint: short hash of the model file, kept in checkpoints so that a wrong tokenizer is noticed.

    Args:
      path: of the model file; empty for the one that ships.
      remedy: what helps where it cannot be used.

    Raises:
      ConfigError: the file is absent or is no SentencePiece model, or one without LLaMA's special pieces.
    """

    def __init__(self, path: str = "", *, remedy: str = REMEDY):
        self.path = pathlib.Path(path) if path else SHIPPED
        try:
            content = self.path.read_bytes() if self.path.is_file() else None
            reason = ("the file is empty" if content == b"" else "" if content else
                      "it is no regular file" if self.path.exists() else "there is no such file")
            self._model = sentencepiece.SentencePieceProcessor(model_proto=content or None)
            if content and min(self._model.bos_id(), self._model.eos_id(), self._model.unk_id()) < 0:
                reason = "it has no pieces for the beginning and end of a text and for what is unknown"
        except OSError as error:
            reason = error.strerror or str(error)
        except Exception:  # the library raises RuntimeError and others
            reason = "the file is no SentencePiece model"
        if reason:
            raise ConfigError(f"cannot read the tokenizer {self.path}: {reason}; {remedy}")
        self.fingerprint = hashlib.sha256(content).hexdigest()[:12]
        self.vocab = self._model.get_piece_size()
        self.bos, self.eos, self.pad = self._model.bos_id(), self._model.eos_id(), self._model.unk_id()
        self._encode = functools.lru_cache(maxsize=65_536)(lambda text: tuple(self._model.encode(text)))

    def encode(self, text: str) -> tuple[int, ...]:
        """Ids of a segment, without special tokens; SentencePiece puts a word boundary in front of it."""
        return self._encode(text)

    def decode(self, ids) -> str:
        """Text of ids; special tokens vanish."""
        return self._model.decode([int(token) for token in ids])

    def pieces(self, ids) -> list[str]:
        """The vocabulary's spelling of each id."""
        return [self._model.id_to_piece(int(token)) for token in ids]

    def offsets(self, text: str) -> dict[int, int]:
        """Character offset -> index in `encode(text)`, for every character that is a token of its own."""
        found, place = {}, -1  # the word boundary in front of the text stands at -1
        for index, piece in enumerate(self.pieces(self.encode(text))):
            if len(piece) == 1 and place >= 0:
                found[place] = index
            place += len(piece)
        return found

    def character(self, character: str) -> int:
        """Id of a single character inside a word (a digit after the word boundary)."""
        return self._model.piece_to_id(character)
