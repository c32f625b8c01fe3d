"""A Sample in; the token ids of its conversation, with the places of its visual tokens and of its answers, out."""

from __future__ import annotations

import dataclasses

import numpy as np
from jaxtyping import Float, Int

from calm_jax import config as config_lib
from calm_jax.data.samples import Answer, BadRecord, ImageRef, Mention, Sample
from calm_jax.text.chat import Chat
from calm_jax.text.tokenizers import Tokenizer


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the tokens of each part stand among the N visual tokens of an image: part -> (first, count)."""

    parts: tuple[str, ...]
    spans: dict[str, tuple[int, int]]
    size: int

    @classmethod
    def of(cls, model: config_lib.Model, parts: tuple[str, ...]) -> Layout:
        spans = model.spans(parts)
        return cls(tuple(spans), spans, sum(count for _, count in spans.values()))


@dataclasses.dataclass(frozen=True)
class Encoded:
    """A conversation as arrays.

    Attributes:
      tokens: `[n]` ids; 0 where a visual token stands.
      visual: `[n]` image * N + offset of the visual token there, -1 for words.
      places: `[k]` positions whose next token is supervised.
      labels: `[k, C]` candidate next tokens, the likeliest first.
      weights: `[k, C]` their target probabilities times the answer's weight.
      turns: `[k]` index of the turn each belongs to.
      images: the pictures to encode.
    """

    tokens: Int[np.ndarray, "n"]
    visual: Int[np.ndarray, "n"]
    places: Int[np.ndarray, "k"]
    labels: Int[np.ndarray, "k C"]
    weights: Float[np.ndarray, "k C"]
    turns: Int[np.ndarray, "k"]
    images: tuple[ImageRef, ...]


def encode(sample: Sample, chat: Chat, layout: Layout, *, candidates: int = 1,
           ask: int | None = None) -> Encoded:
    """Writes the conversation as ids; labels are the answers, each with the token that ends it.

    Every stretch of text is encoded by itself and the ids are joined, so that labels follow from the segments and a
    marker inside somebody's text could never act as one.

    Args:
      candidates: C, how many tokens a soft target keeps (its most probable; their probabilities are renormalised).
      ask: index of a turn: the conversation ends before its answer, ready for generation.

    Raises:
      BadRecord: text contains a marker of the conversation, or a part is mentioned that the process does not compute.
    """
    tokenizer = chat.tokenizer
    tokens: list[int] = []
    visual: list[int] = []
    places: list[int] = []
    labels: list[list[int]] = []
    weights: list[list[float]] = []
    turns: list[int] = []

    def write(ids, slots=None):
        tokens.extend(ids)
        visual.extend([-1] * len(ids) if slots is None else slots)

    write(chat.begin)
    for number, turn in enumerate(sample.turns if ask is None else sample.turns[:ask + 1]):
        write(chat.user)
        for piece in turn.prompt:
            if isinstance(piece, Mention):
                slots = _slots(piece, sample, layout)
                write([0] * len(slots), slots)
            else:
                _refuse_markers(piece, chat, sample)
                write(tokenizer.encode(piece))
        write(chat.assistant)
        if number == ask:
            break
        _refuse_markers(turn.answer.text, chat, sample)
        ids = [*tokenizer.encode(turn.answer.text), chat.stop]
        if turn.answer.weight > 0:
            soft = _soft(turn.answer, tokenizer, sample)
            for offset, token in enumerate(ids):
                kept = sorted(soft.get(offset, {token: 1.0}).items(), key=lambda item: -item[1])[:candidates]
                total = sum(p for _, p in kept)
                spare = candidates - len(kept)
                places.append(len(tokens) - 1 + offset)
                labels.append([t for t, _ in kept] + [0] * spare)
                weights.append([turn.answer.weight * p / total for _, p in kept] + [0.0] * spare)
                turns.append(number)
        write(ids)
        write(chat.end[1:])
    return Encoded(np.asarray(tokens, np.int32), np.asarray(visual, np.int32), np.asarray(places, np.int32),
                   np.asarray(labels, np.int32).reshape(-1, candidates),
                   np.asarray(weights, np.float32).reshape(-1, candidates), np.asarray(turns, np.int32), sample.images)


def _slots(mention: Mention, sample: Sample, layout: Layout) -> list[int]:
    if not 0 <= mention.image < len(sample.images):
        raise BadRecord(f"{sample.name}: the text mentions image {mention.image}, but there are {len(sample.images)}")
    slots: list[int] = []
    for part in config_lib.PARTS:
        if part in mention.parts:
            if part not in layout.spans:
                raise BadRecord(f"{sample.name}: the text mentions the {part} part, which this process does not "
                                f"compute; its `parts` are {', '.join(layout.parts)}")
            first, count = layout.spans[part]
            slots.extend(range(mention.image * layout.size + first, mention.image * layout.size + first + count))
    return slots


def _refuse_markers(text: str, chat: Chat, sample: Sample) -> None:
    for marker in chat.markers:
        if marker in text:
            raise BadRecord(f"{sample.name or 'the text'} contains {marker!r}, a marker of the conversation format; "
                            f"remove it or write it otherwise: {text[:80]!r}")


def _soft(answer: Answer, tokenizer: Tokenizer, sample: Sample) -> dict[int, dict[int, float]]:
    """Soft targets by token index instead of character offset."""
    if not answer.soft:
        return {}
    offsets, result = tokenizer.offsets(answer.text), {}
    for at, probabilities in answer.soft.items():
        if at not in offsets:
            raise BadRecord(f"{sample.name}: character {at} of {answer.text!r} is no token of its own in this "
                            "tokenizer, so it cannot carry a soft target")
        result[offsets[at]] = {tokenizer.character(c): float(p) for c, p in probabilities.items() if p > 0}
    return result
