"""A model and photographs in; suggestions about flaws that were put into them, and how often they are right, out.

The protocol is ours, as none is published (the paper's suggestions are zero-shot and shown by example). Each photograph
gets flaws of known kind (`degradations`, which share no code with training), and the model is asked what would improve
it. A suggestion is right when it names what undoes the flaw, in the words of the bank or in anybody's. How often the
same is advised to photographs with other flaws stands beside it: advice that is given to everything gains nothing.
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
    """

    flaw: str
    grade: int
    group: str
    key: str
    text: str
    named: tuple[str, ...]

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
    return found


def _shows(before: np.ndarray, after: np.ndarray) -> bool:
    if before.shape != after.shape:  # a turned picture is cut
        return True
    return float(np.abs(before.astype(np.int16) - after).mean()) >= VISIBLE


def suggestion_table(found: Sequence[Suggested], control: Sequence[Suggested] = ()) -> list[dict]:
    """A row a flaw, and one of all with every flaw counting alike.

    Each has `n`, the share that is `right`, the share of photographs with other flaws that are advised the same,
    `elsewhere`, and the `gain` of the one over the other with a 95 % interval over photographs; with a `control` model,
    its share and the gain over it. `distinct` counts different texts.
    """
    names = sorted({item.flaw for item in found}, key=[kind(flaw) for flaw in FLAWS].index)
    theirs = {(item.key, item.flaw, item.grade): item.right for item in control}
    groups = [item.group for item in found]
    has = np.asarray([[item.flaw == name for name in names] for item in found])  # [n, flaws]
    said = np.asarray([[name in item.named for name in names] for item in found])
    others = np.asarray([theirs.get((item.key, item.flaw, item.grade), False) for item in found])

    def figures(indices):
        """`[3, flaws + 1]`: right, elsewhere and the control's share, of each flaw and of their mean."""
        mine, asked, beside = has[indices], said[indices], others[indices, None]
        with np.errstate(invalid="ignore"):  # a resample may lack a flaw
            rows = np.asarray([(mine & asked).sum(0) / mine.sum(0), (~mine & asked).sum(0) / (~mine).sum(0),
                               (mine & beside).sum(0) / mine.sum(0)])
        return np.concatenate([rows, np.nanmean(rows, 1, keepdims=True)], 1)

    def gains(indices):
        right, elsewhere, beside = figures(indices)
        return np.concatenate([right - elsewhere, right - beside])

    right, elsewhere, beside = figures(np.arange(len(found)))
    low, high = metrics.intervals(gains, groups).reshape(2, 2, -1)
    rows = []
    for place, name in enumerate((*names, "all")):
        items = [item for item in found if name in (item.flaw, "all")]
        row = {"flaw": name, "n": len(items), "right": right[place], "elsewhere": elsewhere[place],
               "gain": right[place] - elsewhere[place], "gain_interval": (low[0, place], high[0, place]),
               "distinct": len({item.text for item in items})}
        if control:
            row |= {"control": beside[place], "control_gain": right[place] - beside[place],
                    "control_gain_interval": (low[1, place], high[1, place])}
        rows.append(row)
    return rows
