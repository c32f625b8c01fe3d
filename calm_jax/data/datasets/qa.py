"""A JSON list of conversations about pictures (LLaVA's form) in, entries with questions and answers out."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

from calm_jax.data.builders import labels
from calm_jax.errors import ConfigError

SPEAKERS = ("human", "gpt")


class Qa(labels.Source):
    """`[{"id", "image", "conversations": [{"from": "human"|"gpt", "value"}, ...]}, ...]`, pictures relative to the
    file; `<image>` may stand before or after the words. Records without a picture are left out."""

    name = "qa"
    title = "a list of questions and answers"
    licence = "that of the pictures and the texts"
    shares = (0.98, 0.02, 0.0)

    def entries(self) -> Iterator[labels.Entry]:
        """One a conversation; those about the same picture are one group, in one split."""
        path = self.sole_file(".json")
        records = self.json(path)
        if not isinstance(records, list):
            raise ConfigError(f"{path} holds no list of conversations but {type(records).__name__}; it "
                              'should be [{"id", "image", "conversations"}, ...]')
        found = []
        keys: collections.Counter[str] = collections.Counter()
        for count, record in enumerate(records, 1):
            self.rows += 1
            image = record.get("image") if isinstance(record, dict) else None
            if isinstance(record, dict) and not image:
                self.left_out["conversations without a picture"] += 1
                continue
            try:
                questions = _pairs(record["conversations"])
                if not isinstance(image, str):
                    raise ValueError("not one picture")
                image = labels.inside(image)
            except (KeyError, TypeError, ValueError) as error:
                reason = f"no {error}" if isinstance(error, KeyError) else str(error)
                self.malformed.append(f"{path.name}, record {count}: {reason}")
                continue
            key = image if record.get("id") is None else str(record["id"])
            keys[key] += 1
            found.append((key if keys[key] == 1 else f"{key}#{keys[key]}", image, questions))
        split = self.parted(image for _, image, _ in found)
        for key, image, questions in found:
            yield labels.Entry(split[image], key, image, {"questions": questions, "group": image})


def _pairs(turns: Any) -> list[tuple[str, str]]:
    """Question and answer in turn. Raises ValueError when the turns are not that."""
    said = [(turn["from"], turn["value"].strip()) for turn in turns if isinstance(turn["value"], str)]
    if not said or len(said) != len(turns) or len(said) % 2:
        raise ValueError(f"{len(turns)} turns are no questions with answers")
    if any(who != SPEAKERS[place % 2] for place, (who, _) in enumerate(said)):
        raise ValueError("human and gpt do not take turns")
    if not all(words for _, words in said):
        raise ValueError("an empty turn")
    return [(said[place][1], said[place + 1][1]) for place in range(0, len(said), 2)]


SOURCE = Qa
