"""A file of phrases that `calm cues` wrote in, the phrases by attribute, kind and grade out.

The file is JSON: `phrases` is a list of {attribute, kind, grade, text, request}, where `grade` belongs to the kinds
`answer` and `advice` and `request` names an entry of `requests`, the provenance. Only `phrases` is read here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping

from calm_jax import json_files
from calm_jax.data.cues.entry import Cues
from calm_jax.errors import ConfigError, nearest

FORMAT = "calm_jax cues 1"
KINDS = ("question", "answer", "more", "more_answer", "less", "less_answer", "advice")
GRADED = ("answer", "advice")
Place = tuple[str, str, int | None]  # attribute, kind, grade


def normal(text: str) -> str:
    """`text` without case, surplus white space and its full stop: the form in which phrases are compared."""
    return " ".join(text.lower().split()).rstrip(". ")


def places(bank: Mapping[str, Cues]) -> Iterator[tuple[Place, tuple[str, ...]]]:
    """Every place of a bank with its phrases; questions only where an attribute has any."""
    for name, cues in bank.items():
        if cues.questions:
            yield (name, "question", None), cues.questions
        for grade, texts in enumerate(cues.answers):
            yield (name, "answer", grade), texts
        for kind, texts in (("more", cues.more), ("more_answer", cues.more_answers), ("less", cues.less),
                            ("less_answer", cues.less_answers)):
            yield (name, kind, None), texts
        for grade, texts in cues.advice.items():
            yield (name, "advice", grade), texts


def read(path: str, bank: Mapping[str, Cues]) -> dict[Place, tuple[str, ...]]:
    """The phrases of a file.

    Args:
      path: as `calm cues` writes it.
      bank: the written phrases, which say what there is, and which none of the file repeats.
    Raises:
      ConfigError: the file cannot be read, or a phrase has no place in the bank, or occurs twice.
    """
    content = json_files.load(path, remedy="it is the file of cues, which calm cues writes; an empty cues= does "
                              "without one")
    phrases = content.get("phrases") if isinstance(content, dict) and content.get("format") == FORMAT else None
    if not isinstance(phrases, list):
        raise ConfigError(f"{path} is no file of calm cues: its format is not {FORMAT!r}")
    known = dict(places(bank))
    seen = {normal(text) for texts in known.values() for text in texts}
    found: dict[Place, list[str]] = {}
    for number, entry in enumerate(phrases, 1):
        where = f"phrase {number} of {path}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where} is no table of attribute, kind, grade and text")
        place, text = (entry.get("attribute"), entry.get("kind"), entry.get("grade")), entry.get("text")
        _check(where, place, text, known)
        if normal(text) in seen:
            raise ConfigError(f"{where}, {text!r}, occurs twice, in the file or in the written bank; "
                              "delete it")
        seen.add(normal(text))
        found.setdefault(place, []).append(text)
    return {place: tuple(texts) for place, texts in found.items()}


def fingerprint(path: str, bank: Mapping[str, Cues]) -> str:
    """Of the phrases in a file, whatever else it says; raises as `read`."""
    return hashlib.sha256(repr(sorted(read(path, bank).items(), key=repr)).encode()).hexdigest()[:16]


def _check(where: str, place: Place, text: object, known: Mapping[Place, object]) -> None:
    name, kind, grade = place
    names = dict.fromkeys(known_name for known_name, _, _ in known)
    if not isinstance(name, str) or name not in names:
        raise ConfigError(f"{where}: there is no attribute {name!r}"
                          f"{nearest(str(name), names)}")
    if kind not in KINDS:
        raise ConfigError(f"{where}: there is no kind {kind!r}{nearest(str(kind), KINDS)}")
    if type(grade) not in (int, type(None)) or place not in known:
        grades = [str(other) for known_name, known_kind, other in known if (known_name, known_kind) == (name, kind)]
        raise ConfigError(
            f"{where}: {name} has no {kind} of grade {grade!r}; there is {' or '.join(grades)}" if grades else
            f"{where}: {name} has no questions, because one picture alone does not answer them")
    if not isinstance(text, str) or not normal(text):
        raise ConfigError(f"{where} has no text")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{where}, {text!r}, holds half of a character; write it anew") from None
    wanted = 1 if kind.endswith("_answer") else 0
    if text.count("{which}") != wanted or text.count("{") != wanted or text.count("}") != wanted:
        raise ConfigError(f"{where}, {text!r}, must hold {{which}} "
                          f"{'once' if wanted else 'nowhere'} and no other brace")
