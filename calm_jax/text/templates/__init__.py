"""Chat templates as data: what stands between the turns of a conversation. One template a file, found by its name.

To add one: a `ChatTemplate` assigned to TEMPLATE in a file here, or an entry point in the group `calm_jax.templates`.
"""

from __future__ import annotations

import dataclasses

BOS, EOS = "BOS", "EOS"  # the tokenizer's own tokens of the beginning and the end of a text


@dataclasses.dataclass(frozen=True)
class Special:
    """A special token by its name, such as `<|im_start|>`; or BOS, which is left out where a tokenizer has none, or
    EOS."""

    token: str


Segments = tuple[str | Special, ...]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """A conversation is `begin`, and for each turn: `user`, the prompt, `assistant`, the answer, `end`.

    Each text here is a segment that is encoded by itself; so are the texts of the prompt and the answer.

    Attributes:
      begin: before the first turn, with the system message.
      user: before a prompt.
      assistant: between a prompt and its answer.
      end: after an answer. Its first segment is a Special: the model learns to say it, and generation stops there.
      markers: texts that no prompt or answer may contain, besides the names of the special tokens above.
    """

    begin: Segments
    user: Segments
    assistant: Segments
    end: tuple[Special, *tuple[str | Special, ...]]
    markers: tuple[str, ...] = ()
