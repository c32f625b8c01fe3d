"""A tokenizer and a chat template in; the ids of every segment between the turns of a conversation, out."""

from __future__ import annotations

import dataclasses

from calm_jax.errors import ConfigError
from calm_jax.registry import TEMPLATES
from calm_jax.text import tokenizers
from calm_jax.text.templates import BOS, EOS, ChatTemplate, Segments, Special
from calm_jax.text.tokenizers import Tokenizer

IMAGE = "<image>"  # where LLaVA's question-answer sets put the image; in no text


@dataclasses.dataclass(frozen=True, eq=False)
class Chat:
    """How conversations are written for one language model.

    Attributes:
      tokenizer: of their texts.
      template: its name.
      begin, user, assistant, end: ids of the template's segments, see `ChatTemplate`.
      stop: the first of `end`: what ends an answer.
      pad: the id of positions that hold nothing; nothing supervises them.
      markers: texts that no prompt or answer may contain.
    """

    tokenizer: Tokenizer
    template: str
    begin: tuple[int, ...]
    user: tuple[int, ...]
    assistant: tuple[int, ...]
    end: tuple[int, ...]
    pad: int
    markers: tuple[str, ...]

    @property
    def stop(self) -> int:
        return self.end[0]

    @classmethod
    def of(cls, tokenizer: Tokenizer, name: str) -> Chat:
        """The ids of a template in a tokenizer.

        Raises:
          ConfigError: there is no template of this name, or the tokenizer lacks one of its special tokens.
        """
        template: ChatTemplate = TEMPLATES.get(name)

        def ids(segments: Segments) -> tuple[int, ...]:
            found: list[int] = []
            for segment in segments:
                if isinstance(segment, str):
                    found.extend(tokenizer.encode(segment))
                elif (token := _special(tokenizer, segment)) is not None:
                    found.append(token)
                elif segment.token != BOS:
                    raise ConfigError(f"the chat template {name} needs the token "
                                      f"{'of the end of a text' if segment.token == EOS else segment.token}, which the "
                                      f"tokenizer {tokenizer.name} does not have; choose another --config.chat "
                                      f"({', '.join(TEMPLATES.names())})")
            return tuple(found)

        parts = {part: ids(getattr(template, part)) for part in ("begin", "user", "assistant", "end")}
        named = {segment.token for part in parts for segment in getattr(template, part) if isinstance(segment, Special)}
        pad = tokenizer.unknown if tokenizer.unknown is not None else parts["end"][0]
        return cls(tokenizer, name, **parts, pad=pad,
                   markers=(*template.markers, *sorted(named - {BOS, EOS}), IMAGE))

    def fits(self, vocab: int) -> bool:
        """Whether a language model of `vocab` tokens can be of this tokenizer: as many, or more where the number was
        rounded up to a multiple of 64, as is often done."""
        return vocab == self.tokenizer.vocab or (vocab > self.tokenizer.vocab and vocab % 64 == 0
                                                 and vocab - self.tokenizer.vocab <= SPARE)


SPARE = 512  # more tokens than this that nobody can say are no rounding


def _special(tokenizer: Tokenizer, segment: Special) -> int | None:
    own = {BOS: tokenizer.bos, EOS: tokenizer.eos}
    return own[segment.token] if segment.token in own else tokenizer.special(segment.token)


def load(tokenizer: str = "", template: str = "vicuna", *, remedy: str = tokenizers.REMEDY) -> Chat:
    """The chat of a tokenizer (`text.tokenizers.load`) and a template by its name.

    Raises:
      ConfigError: there is none, or they do not go together.
    """
    return Chat.of(tokenizers.load(tokenizer, remedy=remedy), template)
