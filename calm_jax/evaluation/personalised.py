"""A model and people's ratings in; how well it tells a stranger's taste from a few rated pictures, out.

After the FLICKR-AES protocol (paper.md): for each rater some rated pictures are shown (`shots`), and the scores of the
other pictures are correlated with that rater's own. Raters are those that training never sees (`opinions.held_out`),
and the pictures in question are those of a held-out split; the rated pictures shown come from another split (ours:
a rater of OASIS has rated too few pictures of one small split for both).

Ratings are used in one of two ways: shown to the model before the question (`InContext`, paper), or in closed form
(`ByRidge`, ours). Beside them stand the mean score of the raters seen in training (the crowd) and the rater's own mean;
and a control in which the scores shown are dealt to the wrong pictures, which should be worth no more than no pictures
at all.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
import tqdm

from calm_jax.data.samples import Answer, Dataset, Mention, Sample, Turn
from calm_jax.data.scale import mapped
from calm_jax.data.tasks import instructions
from calm_jax.data.tasks.opinions import contexts, held_out, in_context
from calm_jax.errors import ConfigError
from calm_jax.evaluation import metrics
from calm_jax.inference import taste
from calm_jax.inference.generate import Generator

SEED = 15_485_863
SHOTS = (0, 2, 5, 10, 20)
FEWEST = 5  # pictures in question of a rater: fewer give no correlation to speak of


@dataclasses.dataclass(frozen=True)
class Verdict:
    """What a rater said of a picture, and what was foretold, on the scale 1-10.

    Attributes:
      shots: rated pictures shown; arm: `own` (their true scores), `permuted`, `crowd` or `mean`.
    """

    rater: str
    key: str
    shots: int
    arm: str
    true: float
    said: float


# (record, score on 1-10) of rated pictures, records in question -> what the rater would say of those, or None: nothing
Foretell = Callable[[Sequence[tuple[int, float]], Sequence[int]], Sequence[float] | None]


@dataclasses.dataclass(frozen=True)
class InContext:
    """The rated pictures come before the question.

    Attributes:
      most: rated pictures before a question; 0 = as many as fit. More are several contexts, each with its share of
        them, and a score is the mean over them.
    """

    generator: Generator
    dataset: Dataset
    most: int = 0
    batch: int = 16

    def __call__(self, rated: Sequence[tuple[int, float]], queries: Sequence[int]) -> list[float]:
        """Raises ConfigError where a context does not fit the model's positions."""
        generator, dataset = self.generator, self.dataset
        support = [(dataset.record(index).image, score) for index, score in rated]
        parts, found = generator.layout.parts, []
        image = dataset.record(queries[0]).image
        for places in contexts(len(support), self.most, lambda shown: generator.fits(Sample(*in_context(
                support[:shown], image, parts)))):
            shown = [support[place] for place in places]
            questions = [(Sample(*in_context(shown, dataset.record(index).image, parts)), len(shown))
                         for index in queries]
            memory = generator.remember(questions[0][0], len(shown), dataset.pixels) if shown else None
            found.append([score.value for score in generator.scores(questions, dataset.pixels, batch=self.batch,
                                                                    memory=memory)])
        return np.mean(found, 0).tolist()


class ByRidge:
    """The ratings in closed form, see `inference.taste`; each picture is looked at once for all raters.

    Args:
      indices: all records in question or shown.
      reader: score readout for the generic scores; empty: the model has none, and nothing is predicted without ratings.
    """

    def __init__(self, generator: Generator, dataset: Dataset, indices: Sequence[int], *, reader: str, batch: int = 16
                 ):
        refs = [dataset.record(int(index)).image for index in indices]
        self._places = {int(index): place for place, index in enumerate(indices)}
        self._seen = taste.features(generator.statistics(refs, dataset.pixels))
        self._generic: np.ndarray | None = None
        if reader:
            question = f" {instructions.for_reader(reader)}"
            asked = ((Sample((ref,), (Turn((Mention(0, generator.layout.parts), question), Answer("")),)), 0)
                     for ref in refs)
            scores = generator.scores(asked, dataset.pixels, reader=reader, batch=batch)
            self._generic = np.asarray([score.value for score in tqdm.tqdm(
                scores, desc="generic scores", total=len(refs), unit="answer")])

    def __call__(self, rated: Sequence[tuple[int, float]], queries: Sequence[int]) -> list[float] | None:
        places = [self._places[int(index)] for index in queries]
        generic = None if self._generic is None else self._generic[places]
        if not rated:
            return None if generic is None else generic.tolist()
        known = [self._places[int(index)] for index, _ in rated]
        own = taste.Taste.of(self._seen[known], [score for _, score in rated],
                             None if self._generic is None else self._generic[known])
        return [score.value for score in own.scores(self._seen[places], generic)]


def personalised(foretell: Foretell, dataset: Dataset, asked: Sequence[int], shown: Sequence[int], *,
                 shots: Sequence[int] = SHOTS, raters: int = 0) -> list[Verdict]:
    """Foretells the scores of held-out raters.

    Args:
      asked: records whose scores are foretold.
      shown: records from which the rated pictures are drawn.
      raters: how many people at most; 0 = all who have rated enough.

    Raises:
      ConfigError: nobody has rated enough; or as `foretell`.
    """
    own, crowd = _ratings(dataset, asked)
    known, _ = _ratings(dataset, shown)
    people = sorted(rater for rater in own if len(own[rater]) >= FEWEST and len(known.get(rater, {})) >= max(shots))
    if not people:
        raise ConfigError(f"no held-out rater of {dataset.name} has rated {FEWEST} of the pictures in "
                          f"question and {max(shots)} others")
    count = min(raters or len(people), len(people))
    people = [people[place] for place in np.linspace(0, len(people) - 1, count).round().astype(int)]
    found: list[Verdict] = []
    for rater in tqdm.tqdm(people, desc="personalised", unit="rater"):
        rng = np.random.default_rng([SEED, *rater.encode()])
        queries = sorted(own[rater])
        order = rng.permutation(sorted(known[rater]))[:max(shots)]

        def add(count, arm, said, rater=rater, queries=queries):
            found.extend(Verdict(rater, dataset.record(index).key, count, arm, own[rater][index], float(value))
                         for index, value in zip(queries, said, strict=True))

        add(0, "crowd", [crowd[index] for index in queries])
        for count in shots:
            rated = [(int(index), known[rater][index]) for index in order[:count]]
            if (said := foretell(rated, queries)) is not None:
                add(count, "own", said)
            if count:
                dealt = [(index, float(score)) for (index, _), score in zip(
                    rated, rng.permutation([score for _, score in rated]), strict=True)]
                add(count, "permuted", foretell(dealt, queries))
                add(count, "mean", [np.mean([score for _, score in rated])] * len(queries))
    return found


def _ratings(dataset: Dataset, indices: Sequence[int]) -> tuple[dict[str, dict[int, float]], dict[int, float]]:
    """Held-out rater -> record -> score, and record -> mean score of the other raters; on the scale 1-10."""
    own: dict[str, dict[int, float]] = collections.defaultdict(dict)
    crowd = {}
    for index in map(int, indices):
        record = dataset.record(index)
        others = [score for rater, score in record.ratings.items() if not held_out(rater)]
        if not others:
            continue
        crowd[index] = mapped(float(np.mean(others)), record.scale)
        for rater, score in record.ratings.items():
            if held_out(rater):
                own[rater][index] = mapped(score, record.scale)
    return own, crowd


def personal_table(found: Sequence[Verdict]) -> list[dict]:
    """A row an arm and number of shots: mean over raters of SRCC, PLCC and MAE, with intervals over raters; and the
    gain in SRCC of true scores over permuted ones, and over no ratings. Raters of whom a correlation is not defined do
    not count in it."""
    groups: dict[tuple[str, int], dict[str, list[Verdict]]] = {}
    for item in found:
        groups.setdefault((item.arm, item.shots), {}).setdefault(item.rater, []).append(item)
    rows, correlations = [], {}
    for (arm, count), people in sorted(groups.items(), key=lambda group: (group[0][1], group[0][0])):
        said, true = ([[getattr(item, name) for item in items] for items in people.values()]
                      for name in ("said", "true"))
        values = {"srcc": [metrics.srcc(*pair) for pair in zip(said, true, strict=True)],
                  "plcc": [metrics.plcc(*pair) for pair in zip(said, true, strict=True)],
                  "mae": [float(np.abs(np.subtract(*pair)).mean()) for pair in zip(said, true, strict=True)]}
        correlations[arm, count] = dict(zip(people, values["srcc"], strict=True))
        row = {"shots": count, "arm": arm, "raters": len(people), "n": sum(map(len, said))}
        for name, each in values.items():
            row |= _mean(name, np.asarray(each))
        rows.append(row)
    for row in rows:
        for name, key in (("gain", ("permuted", row["shots"])), ("over_none", ("own", 0))):
            if row["arm"] == "own" and row["shots"] and (other := correlations.get(key)):
                mine = correlations["own", row["shots"]]
                row |= _mean(name, np.asarray([mine[rater] - other[rater] for rater in mine]))
    return rows


def _mean(name: str, each: np.ndarray) -> dict:
    each = each[np.isfinite(each)]
    if not len(each):
        return {name: float("nan")}
    groups = [str(number) for number in range(len(each))]
    return {name: float(each.mean()), f"{name}_interval": metrics.mean_interval(each, groups)}
