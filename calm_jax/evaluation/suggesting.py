"""A model and photographs in; suggestions about flaws that were put into them, and how often they are right, out.

The protocol is ours, as none is published (the paper's suggestions are zero-shot and shown by example). Each photograph
gets flaws of known kind (`degradations`, which share no code with training), and the model is asked what would improve
it. A suggestion is right when it names what undoes the flaw, in the words of the bank or in anybody's. It is also
judged against all other photographs with other flaws: advice that fits everything gains nothing by that.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm

from calm_jax.data import attributes, pictures
from calm_jax.data.cues import CUES, normal, rules
from calm_jax.data.samples import Answer, Dataset, ImageRef, Mention, Sample, Turn
from calm_jax.data.tasks import instructions
from calm_jax.evaluation import metrics
from calm_jax.evaluation.degradations import FLAWS, Flaw, degrade
from calm_jax.inference.generate import Generator

SEED = 104_729
VISIBLE = 3.0  # mean absolute change, grey levels, below which a flaw is not counted as one
LIMIT = 64  # tokens of a suggestion


@dataclasses.dataclass(frozen=True)
class Suggested:
    """A suggestion about a photograph with a flaw.

    Attributes:
      flaw: its name, as `kind` gives it; grade: the attribute's grade that was made.
      group: the photograph, for intervals; key: the record.
      named: the flaws that the suggestion undoes.
      elsewhere: how many of the other photographs with other flaws it is right for, as a share.
    """

    flaw: str
    grade: int
    group: str
    key: str
    text: str
    named: tuple[str, ...]
    elsewhere: float = 0.0

    @property
    def right(self) -> bool:
        return self.flaw in self.named


def kind(flaw: Flaw) -> str:
    """The name of a flaw: the direction where an attribute has two, and never the strength."""
    attribute, grade = flaw
    both = {0, 2} == set(CUES[attribute].advice)
    return f"{attribute}: {attributes.get(attribute).grades[grade]}" if both else attribute


def undone(text: str) -> tuple[str, ...]:
    """The names of all flaws that a suggestion undoes; every sentence is read by itself."""
    found: dict[str, None] = {}
    for sentence in re.split(r"(?<=[.!?;])\s+", text.strip()):
        known = _bank().get(normal(sentence))
        found |= dict.fromkeys([kind(known)] if known else [
            kind((name, grade)) for name, cues in CUES.items() for grade in cues.advice
            if rules.advises(name, grade, sentence)])
    return tuple(found)


@functools.cache
def _bank() -> Mapping[str, Flaw]:
    return {normal(text): (name, grade) for name, cues in CUES.items() for grade, texts in cues.advice.items()
            for text in texts}


def suggesting(generator: Generator, dataset: Dataset, indices: Sequence[int], *, draws: int = 3) -> list[Suggested]:
    """Asks for a suggestion about each of these records, with `draws` different flaws.

    A flaw is left out where the untouched photograph may have it already (`Record.unfit`) or where it does not show.
    """
    asked: list[tuple[int, Flaw]] = []
    for index in map(int, indices):
        rng, record, taken = np.random.default_rng([SEED, index]), dataset.record(index), 0
        small = pictures.fit(dataset.pixels(index), generator.size)
        for place in rng.permutation(len(FLAWS)):
            flaw = list(FLAWS)[place]
            if taken < draws and flaw[0] not in record.unfit and _shows(small, degrade(small, flaw, SEED + index)):
                asked.append((index, flaw))
                taken += 1

    def pixels(number):
        index, flaw = asked[number]
        return degrade(pictures.fit(dataset.pixels(index), generator.size), flaw, SEED + index)

    prompt = (Mention(0, generator.layout.parts), f" {instructions.SUGGEST[0]}")
    questions = [(Sample((ImageRef(number),), (Turn(prompt, Answer("")),)), 0) for number in range(len(asked))]
    answers = generator.answers(questions, pixels, limit=LIMIT)
    texts = list(tqdm.tqdm(answers, total=len(asked), desc="suggesting", unit="answer", mininterval=0.5))
    found = []
    for (index, flaw), text in zip(asked, texts, strict=True):
        record = dataset.record(index)
        found.append(Suggested(kind(flaw), flaw[1], record.group or record.key, record.key, text, undone(text)))
    return [dataclasses.replace(item, elsewhere=_elsewhere(item, found)) for item in found]


def _shows(before: np.ndarray, after: np.ndarray) -> bool:
    if before.shape != after.shape:  # a turned picture is cut
        return True
    return float(np.abs(before.astype(np.int16) - after).mean()) >= VISIBLE


def _elsewhere(item: Suggested, all_of_them: Sequence[Suggested]) -> float:
    others = [other.flaw in item.named for other in all_of_them if other.flaw != item.flaw]
    return sum(others) / max(len(others), 1)


def suggestion_table(found: Sequence[Suggested], control: Sequence[Suggested] = ()) -> list[dict]:
    """A row a flaw, and one of all with every flaw counting alike.

    Each has `n`, the share that is `right`, the same suggestions judged `elsewhere`, and the `gain` over that with a
    95 % interval over photographs; with a `control` model, its share and the gain over it.
    """
    names = sorted({item.flaw for item in found}, key=[kind(flaw) for flaw in FLAWS].index)
    theirs = {(item.key, item.flaw, item.grade): item.right for item in control}
    weight = {name: len(found) / len(names) / sum(item.flaw == name for item in found) for name in names}
    rows = []
    for name in (*names, "all"):
        items = [item for item in found if name in (item.flaw, "all")]
        share = np.asarray([weight[item.flaw] if name == "all" else 1.0 for item in items])
        right, elsewhere = (share * np.asarray([float(getattr(item, key)) for item in items])
                            for key in ("right", "elsewhere"))
        groups = [item.group for item in items]
        row = {"flaw": name, "n": len(items), "right": right.mean(), "elsewhere": elsewhere.mean(),
               "gain": (right - elsewhere).mean(), "gain_interval": metrics.mean_interval(right - elsewhere, groups),
               "distinct": len({item.text for item in items})}
        if control:
            other = share * np.asarray([float(theirs[item.key, item.flaw, item.grade]) for item in items])
            row |= {"control": other.mean(), "control_gain": (right - other).mean(),
                    "control_gain_interval": metrics.mean_interval(right - other, groups)}
        rows.append(row)
    return rows
