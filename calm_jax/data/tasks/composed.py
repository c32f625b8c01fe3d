"""What is known of a picture that nobody described in; a caption or a comment made of it, out.

Ours, and no human wrote it: scene words, counted emotions, scores of single aspects and measured tenths become
sentences. Such texts teach a model to say what was counted and measured, in words; they are no critique. A process asks
for them with `compose`, and the name of the sample says so.
"""

from __future__ import annotations

import types
from collections.abc import Mapping

import numpy as np

from calm_jax.data import statistics
from calm_jax.data.samples import BadRecord, Record
from calm_jax.data.tasks.context import pick

SCENES: Mapping[str, tuple[str, ...]] = types.MappingProxyType({
    "stilllife": ("A still life.", "Things, arranged or found."),
    "scene": ("A view of a place.", "A landscape or a street."),
    "portrait": ("A portrait.", "Somebody's likeness."), "animal": ("An animal.", "A creature is the subject."),
    "plant": ("Plants.", "Something that grows."), "food": ("Food.", "Something to eat."),
    "building": ("A building.", "Architecture."), "night scene": ("A night scene.", "A view by night."),
    "object": ("An object.", "A thing is the subject."), "person": ("A person.", "Somebody is the subject."),
})
# Lower bounds on the scale 1-10, from the highest.
VERDICTS: tuple[tuple[float, tuple[str, ...]], ...] = (
    (7.0, ("A beautiful picture.", "People find it beautiful.", "A very good photograph.")),
    (5.8, ("A good picture.", "People like it.", "A pleasing photograph.")),
    (4.5, ("An ordinary picture.", "People are of two minds about it.", "A photograph like many.")),
    (1.0, ("A weak picture.", "People do not like it much.", "Not a good photograph.")),
)
FEELINGS: Mapping[str, str] = types.MappingProxyType({
    "amusement": "It amuses", "awe": "It awes", "contentment": "It contents", "disgust": "It disgusts",
    "excitement": "It excites", "fear": "It frightens", "sadness": "It saddens"})
FELT = 0.2  # share of the raters from which on an emotion is mentioned
ASPECTS: Mapping[str, str] = types.MappingProxyType({
    "composition": "composition", "color": "colour", "light": "light", "depth_of_field": "depth of field",
    "content": "content"})
FAR = 0.35  # of an aspect from the score, on a scale of five, from which on it is mentioned
SAID = 3  # measured facts in one text at most


def caption(record: Record, rng: np.random.Generator) -> str:
    """Its scene, if that is known, and what is measured to be unusual.

    Raises:
      BadRecord: nothing of that is known.
    """
    parts = [*_scene(record, rng), *_unusual(record, rng, ("middle", "high"))]
    return _joined(record, parts, "caption")


def comment(record: Record, rng: np.random.Generator, score: float | None) -> str:
    """How good it was found, how it was felt, its best and weakest aspects, and what is measured to be unusual.

    Args:
      score: on the scale 1-10, if it is known.
    """
    parts = []
    if score is not None:
        parts.append(pick(rng, next(texts for lowest, texts in VERDICTS if score >= lowest)))
    parts += [*_feeling(record), *_aspects(record), *_unusual(record, rng, ("low", "middle", "high"))]
    return _joined(record, parts, "comment")


def _joined(record: Record, parts: list[str], what: str) -> str:
    if not parts:
        raise BadRecord(f"nothing is known of record {record.key} that a {what} could be composed of")
    return " ".join(parts)


def _scene(record: Record, rng: np.random.Generator) -> list[str]:
    name = str(record.facts.get("semantic") or record.facts.get("category") or "").lower()
    return [pick(rng, SCENES[name])] if name in SCENES else []


def _feeling(record: Record) -> list[str]:
    counts = {name: count for name, count in (record.facts.get("emotions") or {}).items() if name in FEELINGS}
    raters = sum((record.facts.get("emotions") or {}).values())
    strongest = max(counts, key=counts.__getitem__, default=None)
    if strongest is None or counts[strongest] < FELT * raters:
        return []
    return [f"{FEELINGS[strongest]} {'most' if counts[strongest] > 0.5 * raters else 'some'} who see it."]


def _aspects(record: Record) -> list[str]:
    if record.score is None:
        return []
    unit = (record.scale[1] - record.scale[0]) / 4
    apart = {name: (float(record.facts[name]) - record.score) / unit for name in ASPECTS if name in record.facts}
    found = []
    if apart and max(apart.values()) >= FAR:
        found.append(f"The {ASPECTS[max(apart, key=apart.__getitem__)]} is its strength.")
    if apart and min(apart.values()) <= -FAR:
        found.append(f"The {ASPECTS[min(apart, key=apart.__getitem__)]} is its weakness.")
    return found


def _unusual(record: Record, rng: np.random.Generator, levels: tuple[str, ...]) -> list[str]:
    """Sentences of statistics in the lowest or highest two tenths, and of the hue; some of them, in any order."""
    found = []
    for name, decile in record.deciles.items():
        statistic = statistics.STATISTICS.get(name)
        if statistic is not None and statistic.level in levels:
            if statistic.circular:
                found.append(statistic.cues.answers(decile)[1])
            elif decile in (0, 1, 8, 9):
                found.append(statistic.cues.answers(decile // 2)[1])
    return [found[place] for place in rng.permutation(len(found))[:rng.integers(1, SAID, endpoint=True)]]
