"""A phrase and what it is meant to say in, why it cannot serve out; the tables of words are in rules.toml.

A phrase is read word by word: every word that an attribute's table knows states some grades, or denies them behind
`no`, `not`, `without` and the like, and what remains must be the one grade that was meant. That is strict on purpose:
what the tables cannot read is not used, because a phrase in the wrong grade teaches a falsehood.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import tomllib
from collections.abc import Mapping

from calm_jax.data import cues as cues_lib
from calm_jax.text.chat import IMAGE
from calm_jax.text.templates import vicuna

SHORTEST, LONGEST = 8, 110  # characters: comments are composed of several phrases
REACH = 4  # words between a negation and what it denies

_BOUNDARY = re.compile(r"[,;:]|\b(?:but|although|though|because|since|only|while|so that|and the)\b")
_ABSENT = re.compile(r"\W+(?:\w+\W+){0,3}?(?:absent|nowhere)\b")
_WEAKER = re.compile(r"\W+(?:\w+\W+){0,2}?(?:less|weaker|lower|smaller|fainter|fewer)\b")
# "without a hint of blur" denies the blur, not a hint of it.
_HINT = re.compile(r"\b(without|no|not|free of|free from|lacks|shows no) (?:(?:a|any|even a|the slightest) )?"
                   r"(?:hint|trace|touch|sign|bit)s? of ")
_OR = re.compile(r"\s*(?:or|nor)?\s*")
_EXTRA = re.compile(r"[{}<>\[\]|\\`*#_\"]|https?:")

Says = tuple[tuple[re.Pattern, frozenset[int]], ...]


@dataclasses.dataclass(frozen=True)
class Rule:
    """The tables of one attribute, compiled; rules.toml explains them. `compares` holds more (1) and less (0)."""

    about: re.Pattern
    says: Says
    compares: Says
    remedies: Mapping[int, re.Pattern]
    own: re.Pattern
    may: re.Pattern


@functools.cache
def rules() -> Mapping[str, Rule]:
    """Attribute -> its tables."""
    tables = _tables()
    compiled = {}
    for name, table in tables.items():
        if name == "words":
            continue
        compares = {"more": (_words(table["more"]), frozenset((1,))), "less": (_words(table["less"]), frozenset((0,)))}
        first = table.get("first", "more")
        compiled[name] = Rule(
            about=_words(table["about"]), own=_words(table["own"]), may=_words(table.get("may", "-")),
            says=tuple((_words(text), frozenset(stated)) for stated, text in table["says"]),
            compares=tuple(compares[which] for which in (first, "less" if first == "more" else "more")),
            remedies={int(grade): _words(text) for grade, text in table["remedies"].items()})
    return compiled


@functools.cache
def _tables() -> dict:
    return tomllib.loads(pathlib.Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


@functools.cache
def _words(text: str) -> re.Pattern:
    """A list of the tables as one expression; the longest of two words that begin alike is found."""
    for name, words in _tables()["words"].items():
        text = re.sub(rf"\b{name}\b", words, text)
    words = sorted((word.strip() for word in text.split(",")), key=len, reverse=True)
    pattern = "|".join(re.escape(word).replace(r"\*", r"\w*").replace("colour", "colou?r").replace("grey", "gr[ea]y")
                       for word in words)
    return re.compile(rf"(?<!\w)(?:{pattern})(?!\w)")


def grades(attribute: str, text: str) -> frozenset[int]:
    """The grades that a phrase leaves possible: all of them if it says nothing, none if it contradicts itself."""
    return _read(text, rules()[attribute].says, len(cues_lib.CUES[attribute].answers), "NO", _ABSENT)


def direction(attribute: str, text: str) -> str:
    """Which of two pictures a question or an answer means: `more`, `less`, or "" where it is not clear."""
    left = _read(text, rules()[attribute].compares, 2, "FEWER", _WEAKER)
    return {frozenset((1,)): "more", frozenset((0,)): "less"}.get(left, "")


def _read(text: str, says: Says, count: int, denials: str, denied_after: re.Pattern) -> frozenset[int]:
    text = _HINT.sub(r"\1 ", _plain(text))
    found: list[tuple[int, int, frozenset[int]]] = []
    for pattern, stated in says:
        for match in pattern.finditer(text):
            if not any(match.start() < end and start < match.end() for start, end, _ in found):
                found.append((match.start(), match.end(), stated))
    left = frozenset(range(count))
    last, denied = 0, False
    for start, end, stated in sorted(found, key=lambda item: item[0]):
        before = text[last:start]
        near = _BOUNDARY.split(before)[-1].split()[-REACH - 1:]
        now = bool(_words(denials).search(" ".join(near))) or bool(denied_after.match(text[end:]))
        # "without any green or magenta tint": one denial holds for all, but a degree takes it all for itself.
        denied = now or (denied and _OR.fullmatch(before) is not None)
        left = left - stated if denied else left & stated
        last, denied = end, denied and not _words("MILD, STRONG").fullmatch(text[start:end])
    return left


def _plain(text: str) -> str:
    return text.lower().replace("’", "'").replace("{which}", "one")


def foreign(attribute: str, text: str) -> str:
    """The first other attribute that a phrase speaks of, or ""."""
    own = rules()[attribute]
    text = own.may.sub(" ", _plain(text))
    return next((name for name, rule in rules().items() if name != attribute
                 # What belongs to both is nobody's.
                 and any(not own.about.fullmatch(match.group()) for match in rule.own.finditer(text))), "")


def form(text: object, kind: str) -> str:
    """What is wrong with a phrase whatever it is about, or ""."""
    if not isinstance(text, str):
        return "is no text"
    template = kind in ("more_answer", "less_answer")
    body = text.replace("{which}", "this") if template else text
    ends = ".?" if kind in ("question", "more", "less") else "."
    faults = (
        (not SHORTEST <= len(text) <= LONGEST, f"has {len(text)} characters, not {SHORTEST} to {LONGEST}"),
        (any(marker in text for marker in (*vicuna.TEMPLATE.markers, IMAGE)), "holds a marker of the conversation"),
        (not text.isprintable() or text != " ".join(text.split()), "holds line breaks or surplus white space"),
        (not body.replace("’", "").replace("–", "").isascii() or _EXTRA.search(body),
         "holds characters that no sentence needs"),
        (not text[:1].isupper(), "does not begin with a capital"),
        (text[-1:] not in tuple(ends), "does not end as it should"),
        (re.search(r"[.!?]", body[:-1]), "is more than one sentence"),
        (template and (text.count("{which}") != 1 or re.search(r"\b(first|second)\b", text.lower())),
         "does not hold {which} once"))
    return next((fault for wrong, fault in faults if wrong), "")


def objection(attribute: str, kind: str, grade: int | None, text: object) -> str:
    """Why a phrase cannot serve, or "".

    Args:
      kind: one of `cues.stored.KINDS`.
      grade: of an answer, or of the flaw that advice undoes; else None.
    """
    fault = form(text, kind)
    if fault:
        return fault
    rule, text = rules()[attribute], _plain(str(text))
    if kind == "advice":
        return _advice(rule, grade, text)
    if not rule.about.search(text):
        return f"is not about {attribute}"
    other = foreign(attribute, text)
    if other:
        return f"speaks of {other}"
    if kind == "answer":
        left = grades(attribute, text)
        if left != {grade}:
            said = f"may mean grade {' or '.join(map(str, sorted(left)))}" if left else "contradicts itself"
            return f"{said}, not clearly grade {grade}"
    elif kind != "question" and direction(attribute, text) != kind.removesuffix("_answer"):
        return f"does not clearly ask or tell which has {kind.removesuffix('_answer')}"
    return ""


def advises(attribute: str, grade: int, text: str) -> bool:
    """Whether advice in anybody's words names what undoes a flaw, and not its opposite; its strength is nothing."""
    rule, text = rules()[attribute], _plain(text)
    remedy = rule.remedies.get(grade)
    if remedy is None or not remedy.search(text) or not rule.about.search(text):
        return False
    opposite = rule.remedies.get(2 - grade) if rule.remedies.keys() == {0, 2} else None
    return opposite is None or not opposite.search(remedy.sub(" ", text))


def _advice(rule: Rule, grade: int, text: str) -> str:
    """An opposite remedy, or for flaws of one kind one of another strength, makes advice wrong."""
    if not rule.remedies[grade].search(text):
        return "asks for nothing that undoes the flaw"
    rest = rule.remedies[grade].sub(" ", text)
    if rule.remedies.keys() == {0, 2} and rule.remedies[2 - grade].search(rest):
        return "asks for the opposite as well"
    strength = {1: "strong, strongly, heavy, heavily, far, much, severe",
                2: "a little, slight, slightly, a bit, a touch, mild, gentle"}
    if rule.remedies.keys() == {1, 2} and _words(strength[grade]).search(text):
        return "has the strength of another grade"
    return ""
