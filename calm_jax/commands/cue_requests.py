"""What a model has answered so far in, what to ask it next out; no request is sent here.

A request asks for phrasings of one place of the bank (an attribute's grade, its question, comparison or advice), or has
phrases of an attribute classified by somebody who does not know what they were meant to say. All that is known follows
from the replies in the order of their arrival, so a journal of replies is the whole state.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from calm_jax.data import attributes
from calm_jax.data import cues as cues_lib
from calm_jax.data.cues import rules as cue_rules
from calm_jax.data.cues import stored

LETTERS = "ABCDEFGH"
NEITHER = "N"
SHOWN = 3  # written phrases that explain a grade
LONGEST = 200  # characters of a rejected phrase that are kept
AVOIDED = 40  # phrases that a prompt says not to repeat
TOKENS_A_PHRASE, CHARACTERS_A_TOKEN, JUDGED = 16, 4, 300  # for estimates; tokens of a verification without phrases
SYSTEM = ("You write short English phrases for a data set that teaches a model to judge the quality of photographs. "
          "You answer with JSON only.")
JUDGE = "You classify short phrases about photographs. You answer with JSON only."
# Kinds that one verification holds, with what it asks.
FAMILIES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "answers": (("answer",), "Which of these does a phrase say about a picture?"),
    "comparisons": (("more", "more_answer", "less", "less_answer"),
                    "Two pictures are compared. Which of these does a phrase ask or say? The place {which} stands for "
                    "the picture that is chosen."),
    "advice": (("advice",), "Which of these flaws does the advice in a phrase undo?"),
}
_WANTED = {
    "question": "ask how the picture is in this respect, without suggesting an answer",
    "answer": "state of a picture that it is so, and only this",
    "more": "ask which of two pictures has the higher grade",
    "more_answer": "answer which of two pictures has the higher grade, with the placeholder {which}, which stands for "
                   "`first` or `second`, exactly once in each",
    "less": "ask which of two pictures has the lower grade",
    "less_answer": "answer which of two pictures has the lower grade, with the placeholder {which}, which stands for "
                   "`first` or `second`, exactly once in each",
    "advice": "advise the photographer how to undo this flaw, in the right strength",
}


@dataclasses.dataclass(frozen=True)
class Request:
    """One thing to ask. `key` and `attempt` name it for ever; `shown` are the phrases that it has classified."""

    key: str
    attempt: int
    system: str
    user: str
    shown: tuple[str, ...] = ()

    @property
    def messages(self) -> list[dict[str, str]]:
        return [{"role": "system", "content": self.system}, {"role": "user", "content": self.user}]

    @property
    def hash(self) -> str:
        """Of the prompt, for the record."""
        return hashlib.sha256(json.dumps(self.messages).encode()).hexdigest()[:16]


@dataclasses.dataclass
class Phrase:
    """One phrase that was offered: from which reply, verified by which, rejected why (empty while it is not)."""

    place: stored.Place
    text: str
    request: str
    verified: str = ""
    reason: str = ""


class Harvest:
    """All phrases of a journal, and what is missing.

    Args:
      wanted: phrases for each place.
      attempts: requests for a place, or verifications in a row that bring nothing, after which it is given up.
      verify: whether phrases count only when the second request agrees.
      names: the attributes to ask about.
    """

    def __init__(self, *, wanted: int, attempts: int, verify: bool, names: Sequence[str]):
        self.wanted, self.attempts, self.verify = wanted, attempts, verify
        self.malformed = 0
        self._phrases: dict[stored.Place, list[Phrase]] = collections.defaultdict(list)
        self._written = {place: texts for place, texts in stored.places(cues_lib.CUES) if place[0] in names}
        self._known = {cues_lib.normal(text) for _, texts in stored.places(cues_lib.CUES) for text in texts}
        self._asked: collections.Counter[str] = collections.Counter()
        self._fruitless: collections.Counter[str] = collections.Counter()
        self._families: dict[str, list[stored.Place]] = collections.defaultdict(list)
        for place in self._written:
            self._families[_family(place)].append(place)

    @property
    def phrases(self) -> list[Phrase]:
        """All that were offered, place by place: replies come in any order, the result does not show it."""
        return [phrase for place in self._written for phrase in self._phrases[place]]

    def open(self, in_flight: Sequence[str] = ()) -> Iterator[Request]:
        """Everything that can be asked now, beside the keys `in_flight`."""
        busy = set()
        for place in self._written:
            key = _key(place)
            family = _family(place)
            if key in in_flight:
                busy.add(family)
            elif self._wants(place):
                busy.add(family)
                yield self._ask(place, self.missing(place))
        for family in self._families:
            waiting = self.waiting(family)
            if waiting and family not in busy and family not in in_flight and self._fruitless[family] < self.attempts:
                yield self._verification(family, waiting)

    def _wants(self, place: stored.Place) -> bool:
        return (self.missing(place) > 0 and self._asked[_key(place)] < self.attempts
                and self._fruitless[_family(place)] < self.attempts)

    def missing(self, place: stored.Place) -> int:
        """How many phrases a place lacks; those that wait for verification count."""
        return max(self.wanted - sum(not phrase.reason for phrase in self._phrases[place]), 0)

    def waiting(self, family: str) -> list[Phrase]:
        """Accepted phrases that are yet to be classified; questions say no grade, so that none of them is."""
        return self._unjudged(family) if self.verify and family in _FAMILY_KEYS else []

    def _unjudged(self, family: str) -> list[Phrase]:
        return [phrase for place in self._families[family] for phrase in self._phrases[place]
                if not phrase.reason and not phrase.verified]

    def usable(self) -> list[Phrase]:
        """The phrases that passed everything."""
        return [phrase for phrase in self.phrases if not phrase.reason
                and (phrase.verified or not self.verify or phrase.place[1] == "question")]

    def short(self) -> dict[str, int]:
        """Places with fewer usable phrases than wanted: key -> how many there are."""
        counts = collections.Counter(_key(phrase.place) for phrase in self.usable())
        return {_key(place): counts[_key(place)] for place in self._written if counts[_key(place)] < self.wanted}

    def expected(self) -> tuple[int, int, int]:
        """Requests, prompt tokens and completion tokens if every reply is right at once; an estimate."""
        asks = [self._ask(place, self.missing(place)) for place in self._written if self._wants(place)]
        sent = sum(len(request.system + request.user) for request in asks) // CHARACTERS_A_TOKEN
        received = sum(self.missing(place) for place in self._written if self._wants(place)) * TOKENS_A_PHRASE
        for family in self._to_verify():
            count = len(self.waiting(family)) + sum(self.missing(place) for place in self._families[family])
            sent, received = sent + JUDGED + count * (TOKENS_A_PHRASE + 2), received + count * 6
        return self.remaining(), sent, received

    def remaining(self) -> int:
        """Requests to go if every reply is right at once."""
        return sum(map(self._wants, self._written)) + len(self._to_verify())

    def _to_verify(self) -> list[str]:
        return [family for family, places in self._families.items()
                if self.verify and family in _FAMILY_KEYS and self._fruitless[family] < self.attempts
                and (self.waiting(family) or any(map(self._wants, places)))]

    # ---- replies ----------------------------------------------------------------------------------------------------

    def take(self, entry: Mapping[str, Any]) -> None:
        """Counts one reply in, as the journal holds it: `key`, `attempt`, `text` and, of a verification, `shown`."""
        key, name = entry["key"], f"{entry['key']}#{entry['attempt']}"
        self._asked[key] = max(self._asked[key], entry["attempt"])
        if key in _FAMILY_KEYS:
            self._classify(key, name, entry)
        elif key in _PLACE_KEYS:
            self._gather(_PLACE_KEYS[key], name, entry["text"])

    def _gather(self, place: stored.Place, name: str, text: str) -> None:
        value = _json(text)
        offered = value.get("phrases") if isinstance(value, dict) else value
        if not isinstance(offered, list) or not offered:
            self.malformed += 1
            return
        attribute, kind, grade = place
        for phrase in offered:
            reason = cue_rules.objection(attribute, kind, grade, phrase)
            if not reason and cues_lib.normal(phrase) in self._known:
                reason = "is there already"
            if not reason:
                self._known.add(cues_lib.normal(phrase))
            self._phrases[place].append(Phrase(place, str(phrase)[:LONGEST], name, reason=reason))

    def _classify(self, family: str, name: str, entry: Mapping[str, Any]) -> None:
        value = _json(entry["text"])
        value = value.get("classes", value) if isinstance(value, dict) else {}
        said = {str(number): str(letter).strip().upper() for number, letter in value.items()} \
            if isinstance(value, dict) else {}
        classes = [places for places, _ in _classes(family)]
        letters = {*LETTERS[:len(classes)], NEITHER}
        waiting = {phrase.text: phrase for phrase in self._unjudged(family)}  # texts are distinct
        settled = 0
        for number, text in enumerate(entry.get("shown", ()), 1):
            letter = said.get(str(number))
            if letter not in letters or text not in waiting:
                continue
            phrase = waiting[text]
            settled += 1
            if letter != NEITHER and phrase.place in classes[LETTERS.index(letter)]:
                phrase.verified = name
            else:
                phrase.reason = "was classified as none of them" if letter == NEITHER else \
                    f"was classified as {_meaning(classes[LETTERS.index(letter)][0])}"
        self.malformed += not settled
        self._fruitless[family] = 0 if settled else self._fruitless[family] + 1

    # ---- requests ---------------------------------------------------------------------------------------------------

    def _ask(self, place: stored.Place, missing: int) -> Request:
        attribute, kind, grade = place
        about = attributes.get(attribute)
        lines = [f"Attribute of a photograph: {attribute}. Its grades, from low to high:"]
        lines += [f'grade {number} ("{about.grades[number]}"): {" ".join(texts[:SHOWN])}'
                  for number, texts in enumerate(about.cues.answers)]
        lines.append("")
        subject = "" if grade is None else f" About grade {grade} only."
        lines.append(f"Write {missing} phrases that {_WANTED[kind]}.{subject}")
        lines.append(
            "Each is one plain English sentence of at most 14 words that begins with a capital letter and ends with "
            f"{'a question mark' if kind in ('question', 'more', 'less') else 'a full stop'}, stands alone, names no "
            "other quality of the picture and nothing that is shown in it. Vary words, sentence structure and the "
            "place of the key word. No numbering, no quotation marks.")
        mine = [phrase.text for phrase in self._phrases[place]]
        lines.append("Do not repeat any of these:")
        lines += [f"- {text}" for text in [*self._written[place], *mine][-AVOIDED:]]
        lines.append(f'Answer with {{"phrases": [...]}}, a JSON object with a list of {missing} strings.')
        key = _key(place)
        return Request(key, self._asked[key] + 1, SYSTEM, "\n".join(lines))

    def _verification(self, family: str, waiting: Sequence[Phrase]) -> Request:
        attempt = self._asked[family] + 1
        shown = [phrase.text for phrase in waiting]
        random.Random(f"{family}#{attempt}").shuffle(shown)
        attribute, group = family.split("/")[1:]
        lines = [f"The subject is the {attribute} of photographs. {FAMILIES[group][1]}"]
        lines += [f"{letter}: {example}" for letter, (_, example) in zip(LETTERS, _classes(family), strict=False)]
        lines += [f"{NEITHER}: none of these, or more than one of them, or something else", "", "The phrases:"]
        lines += [f"{number}. {text}" for number, text in enumerate(shown, 1)]
        lines.append('Answer with {"1": "A", "2": ...}, a JSON object with the letter of every phrase.')
        return Request(family, attempt, JUDGE, "\n".join(lines), tuple(shown))


def _key(place: stored.Place) -> str:
    return "/".join(map(str, place[:2] if place[2] is None else place))


def _family(place: stored.Place) -> str:
    group = next((name for name, (kinds, _) in FAMILIES.items() if place[1] in kinds), "questions")
    return f"verify/{place[0]}/{group}"


def _classes(family: str) -> list[tuple[list[stored.Place], str]]:
    """What a verification can say: the places that each class stands for, and the words that explain it."""
    attribute, group = family.split("/")[1:]
    cues = cues_lib.CUES[attribute]
    if group == "comparisons":
        return [([(attribute, kind, None), (attribute, f"{kind}_answer", None)], " ".join(getattr(cues, kind)[:SHOWN]))
                for kind in ("more", "less")]
    if group == "advice":
        return [([(attribute, "advice", grade)], " ".join(cues.answers[grade][:SHOWN])) for grade in cues.advice]
    return [([(attribute, "answer", grade)], " ".join(texts[:SHOWN])) for grade, texts in enumerate(cues.answers)]


def _meaning(place: stored.Place) -> str:
    return f"`{place[1]}`" if place[2] is None else f"grade {place[2]}"


_PLACE_KEYS = {_key(place): place for place, _ in stored.places(cues_lib.CUES)}
_FAMILY_KEYS = {_family(place) for place in _PLACE_KEYS.values() if place[1] != "question"}


def _json(text: str) -> Any:
    """The JSON value in a reply, which may stand between words or in a code block; None where there is none."""
    for match in re.finditer(r"[{\[]", text):
        try:
            return json.JSONDecoder().raw_decode(text, match.start())[0]
        except ValueError:
            continue
    return None
