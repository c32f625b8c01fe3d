"""A model that answers and a dataset split in, every answer beside its truth, and tables of figures, out.

Attributes (ours): questions of the pseudo-labels on held-out pictures, each asked alone; an answer counts when it is
one of the known phrasings of the right grade. Scoring (paper): PLCC and SRCC of the score read from the text.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence

import numpy as np
import tqdm
from jaxtyping import Float

from calm_jax import config as config_lib
from calm_jax.data import attributes as attributes_lib
from calm_jax.data import cues as cues_lib
from calm_jax.data import images, tasks
from calm_jax.data.samples import Dataset, ImageRef, Mention, Sample, Turn
from calm_jax.data.scale import read_score
from calm_jax.data.tasks import instructions
from calm_jax.data.tasks.context import Context
from calm_jax.errors import ConfigError
from calm_jax.evaluation import captions, metrics
from calm_jax.inference.generate import Generator

SEED = 7919  # of the questions asked; training draws from other streams


@dataclasses.dataclass(frozen=True)
class Answered:
    """One question and its answer.

    Attributes:
      subject: attribute, `comment` or `score`.
      kind: grade, comparison, comment or score.
      group: the photograph, for intervals; key: the record.
      images: what was shown.
      question: in words.
      true: the right grade, `first`/`second`, reference text or score, as text.
      text: what the model said; said: the grade, choice or score read from it, or "" when there is none.
    """

    subject: str
    kind: str
    group: str
    key: str
    images: tuple[ImageRef, ...]
    question: str
    true: str
    text: str
    said: str

    @property
    def right(self) -> bool:
        return self.said == self.true


def _alone(sample: Sample) -> list[Sample]:
    """Each turn as a conversation of its own, with the visual tokens that an earlier turn of its level brought."""
    alone, mentions = [], ()
    for turn in sample.turns:
        if any(isinstance(piece, Mention) for piece in turn.prompt):
            mentions = tuple(piece for piece in turn.prompt[:-1])
        else:
            turn = Turn((*mentions, " " + turn.prompt[-1]), turn.answer, turn.label)
        alone.append(Sample(sample.images, (turn,), sample.target, sample.name))
    return alone


def _ask(generator: Generator, dataset: Dataset, samples: Sequence[Sample], limit: int, what: str) -> list[str]:
    answers = generator.answers([(sample, 0) for sample in samples], dataset.pixels, limit=limit)
    return list(tqdm.tqdm(answers, total=len(samples), desc=what, unit="answer", mininterval=0.5))


def attributes(generator: Generator, dataset: Dataset, indices: Sequence[int], *, draws: int = 3,
               comparisons: bool = True, cues: str = "", phrasings: int = 0) -> list[Answered]:
    """Asks about these records, at the levels the generator computes.

    Args:
      draws: how often, each time with other edits; single pictures and comparisons alternate, single ones first.
      comparisons: without them, of the draws only those of single pictures, which are the same.
      cues, phrasings: the phrases asked with and understood, as in the config of the process that trained it.
    """
    asked: list[tuple[Sample, int]] = []
    for index in indices:
        for draw in range(0, draws, 1 if comparisons else 2):
            rng = np.random.default_rng([SEED, int(index), draw])
            sample = tasks.make(("attributes", "comparisons")[draw % 2], dataset, int(index), rng,
                                Context(generator.layout.parts, cues_lib.bank(cues, phrasings)))
            fitter = images.Fitter(dataset.pixels(int(index)))
            doubtful = set().union(*(images.render_noting(fitter, ref, generator.size)[1] for ref in sample.images))
            asked += [(alone, int(index)) for alone in _alone(sample) if alone.turns[0].subject not in doubtful]
    texts = _ask(generator, dataset, [sample for sample, _ in asked], 24, "attributes")
    answered = []
    for (sample, index), text in zip(asked, texts, strict=True):
        subject, kind, true = re.fullmatch(r"(\w+)([=:])(\w+)", sample.turns[0].label).groups()
        record = dataset.record(index)
        said = (attributes_lib.grade_of if kind == "=" else attributes_lib.choice_of)(subject, text, cues)
        answered.append(Answered(subject, "grade" if kind == "=" else "comparison", record.group or record.key,
                                 record.key, sample.images, str(sample.turns[0].prompt[-1]).strip(), true, text,
                                 "" if said is None else str(said)))
    return answered


def _asking(sample: Sample, question: str) -> Sample:
    """The sample with other words behind the picture of its only question."""
    turn, = sample.turns
    return dataclasses.replace(sample, turns=(dataclasses.replace(turn, prompt=(*turn.prompt[:-1], f" {question}")),))


def opinions(generator: Generator, dataset: Dataset, indices: Sequence[int], task: str, reader: str = "text"
             ) -> list[Answered]:
    """Asks for a `comment` or a `score` on each of these records, once, all in the words that programs ask in: how a
    question is put moves an answer too, and would stand in the scores beside what the pictures move (ours).

    Args:
      reader: of scores, one of `scale.READERS`.
    """
    made = "level" if (task, reader) == ("score", "levels") else task
    question = instructions.for_reader(reader) if task == "score" else instructions.COMMENT[0]
    samples = [_asking(tasks.make(made, dataset, int(index), np.random.default_rng([SEED, int(index)]),
                                  Context(generator.layout.parts)), question) for index in indices]
    if task == "score":
        found = generator.scores([(sample, 0) for sample in samples], dataset.pixels, reader=reader)
        found = tqdm.tqdm(found, total=len(samples), desc=task, unit="answer", mininterval=0.5)
        texts = [(score.text, f"{score.value:.4f}" if score.parsed else "") for score in found]
    else:
        texts = [(text, text) for text in _ask(generator, dataset, samples, 64, task)]
    answered = []
    for index, sample, (text, said) in zip(indices, samples, texts, strict=True):
        record = dataset.record(int(index))
        # A score as it is known, not as it would be said: rounding to a tenth costs a thousandth of correlation.
        true = sample.turns[0].answer.text if sample.target is None else f"{sample.target:.4f}"
        answered.append(Answered(task, task, record.group or record.key, record.key, sample.images,
                                 str(sample.turns[0].prompt[-1]).strip(), true, text, said))
    return answered


def comment_table(answered: Sequence[Answered], dataset: Dataset, spice: bool | None = None) -> dict[str, object]:
    """How many comments there are, how many different ones, and the caption metrics (`captions`) with intervals.

    Args:
      spice: as `captions.measure`; where it is true, what cannot be computed is an error.
    """
    row: dict[str, object] = {"n": len(answered), "distinct": len({item.text for item in answered})}
    references = [dataset.record(item.images[0].index).comments or (item.true,) for item in answered]
    try:
        measured = captions.measure([item.text for item in answered], references, spice=spice)
    except ConfigError as error:
        if spice:
            raise
        return row | {"not computed": str(error)}
    for name, value in measured.corpus.items():
        row[name] = value
        if name in measured.intervals:
            row[f"{name}_interval"] = measured.intervals[name]
    return row | ({"SPICE": f"not computed: {measured.missing}"} if measured.missing else {})


def attribute_table(answered: Sequence[Answered], control: Sequence[Answered] = ()) -> list[dict]:
    """One row an attribute and kind of question, in the order of the levels.

    Each has `n`, `accuracy`, `majority` (that of always giving the one answer that is right most often here: the best
    that can be had without looking), `gain` over it; where there are several photographs `elsewhere`, the accuracy of
    what the model said about other photographs, asked about the same attribute, and `elsewhere_gain` over that; and,
    where the same questions were put to a `control` model, its accuracy and the gain over that. 95 % intervals are over
    photographs.
    """
    others = {_place(item): item for item in control}
    order = {name: (config_lib.PARTS.index(attribute.level), name)
             for name, attribute in attributes_lib.ATTRIBUTES.items()}
    keys = sorted({(item.kind, item.subject) for item in answered}, key=lambda key: (key[0] != "grade", order[key[1]]))
    rows = []
    for kind, subject in keys:
        items = [item for item in answered if (item.kind, item.subject) == (kind, subject)]
        right = np.asarray([item.right for item in items], float)
        constant = metrics.majority([item.true for item in items])
        blind = np.asarray([item.true == constant for item in items], float)
        groups = [item.group for item in items]
        row = {"kind": kind, "subject": subject, "level": attributes_lib.get(subject).level, "n": len(items),
               "accuracy": right.mean(), "accuracy_interval": metrics.mean_interval(right, groups),
               "majority": blind.mean(), "gain": (right - blind).mean(),
               "gain_interval": metrics.mean_interval(right - blind, groups),
               "photographs": {g: right[np.asarray(groups) == g].mean() for g in sorted(set(groups))}}
        if len(set(groups)) > 1:
            beside = _elsewhere(items)
            row |= {"elsewhere": beside.mean(), "elsewhere_gain": (right - beside).mean(),
                    "elsewhere_gain_interval": metrics.mean_interval(right - beside, groups)}
        if others:
            theirs = np.asarray([others[_place(item)].right for item in items], float)
            row |= {"control": theirs.mean(), "control_gain": (right - theirs).mean(),
                    "control_gain_interval": metrics.mean_interval(right - theirs, groups)}
        rows.append(row)
    return rows


def _elsewhere(items: Sequence[Answered]) -> Float[np.ndarray, "n"]:
    """Of each question the share of the answers to the others of its kind, about other photographs, that would be right
    here: what the model is worth that is shown another photograph. Without any: nan."""
    groups = np.asarray([item.group for item in items])
    same = np.asarray([item.said for item in items])[None] == np.asarray([item.true for item in items])[:, None]
    apart = groups[None] != groups[:, None]
    return (same & apart).sum(1) / apart.sum(1)


def _place(item: Answered) -> tuple:
    return item.kind, item.subject, item.key, item.images, item.question


def score_table(answered: Sequence[Answered], threshold: float = 5.0) -> Mapping[str, object]:
    """PLCC, SRCC, MAE and the two accuracies of the scores that could be read, with intervals, and the share that could
    not.

    Args:
      threshold: on the scale 1-10, above which a picture is good (5 in the AVA protocol).
    """
    parsed = [item for item in answered if item.said]
    said = np.asarray([float(item.said) for item in parsed])
    true = np.asarray([read_score(item.true) for item in parsed])
    groups = [item.group for item in parsed]
    row = {"n": len(answered), "parse_failures": 1 - len(parsed) / max(len(answered), 1)}
    sides = {"accuracy": metrics.accuracy, "balanced_accuracy": metrics.balanced_accuracy}
    for name, function in {"plcc": metrics.plcc, "srcc": metrics.srcc, "mae": metrics.mae, **{
            name: functools.partial(function, threshold=threshold) for name, function in sides.items()}}.items():
        row[name] = function(said, true)
        if parsed:
            row[f"{name}_interval"] = metrics.interval(lambda i, f=function: f(said[i], true[i]), groups)
    return row
