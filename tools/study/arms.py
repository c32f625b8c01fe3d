"""What is trained to answer which question: arms as data.

Every arm is the recipe configs/laptop.py with some of its fields changed, on PARA. Most are judged through the light
head: they compare what the MFAM makes of photographs, and take minutes. Questions are numbered as in
docs/experiments.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from calm_jax import config as config_lib

RECORDS = 7_500  # PARA's training photographs here
SEEDS = (0, 1, 2)
# Scores that are learned from -> steps: all of them for 12 epochs, fewer for more, in less time.
STEPS = {75: 150, 250: 300, 750: 500, 2_500: 900, 7_500: 1_400}
SECONDS = 0.33  # of a step of 64 photographs on two cores of an AMD EPYC


@dataclasses.dataclass(frozen=True)
class Arm:
    """A training, and what it is for.

    Attributes:
      question: its number and name.
      title: what is different about it.
      scores: how many photographs' scores it learns; 0 = none, for it is what others begin from.
      steps: of its only process; 0 = as STEPS says for its scores.
      start: the arm whose MFAM it begins from; "" = the converted parts.
      process, model: fields of the process and of the model that are changed.
      seeds: of which it is trained with each; an arm that others begin from has one.
      words: it goes through the language model: both processes of the recipe.
    """

    question: str
    title: str
    scores: int
    steps: int = 0
    start: str = ""
    process: Mapping[str, object] = dataclasses.field(default_factory=dict)
    model: Mapping[str, object] = dataclasses.field(default_factory=dict)
    seeds: tuple[int, ...] = SEEDS
    words: bool = False

    @property
    def length(self) -> int:
        """Steps of the first process."""
        return self.steps or STEPS[self.scores]

    @property
    def minutes(self) -> float:
        """Expected of one seed."""
        return self.length * SECONDS / 60 + (35 if self.words else 0)


SCORING, TEACHING, LEVELS = "1 scoring", "2 self-supervision", "3 levels"
# The grades of edits, on a third of the photographs, each edited once: that is what they cost to encode. Rows are as
# long as such conversations.
EDITS = {"tasks": {"attributes": 1.0}, "mixup": 0.0, "versions": 1, "train_share": 1 / 3,
         "row": config_lib.Row(tokens=3072, images=8, answers=1024)}


def _taught(start: str, title: str) -> dict[str, Arm]:
    """Half of the steps for what `start` teaches, half for the scores."""
    return {f"{start}-{scores}": Arm(TEACHING, f"{title}, then {scores} scores", scores, STEPS[scores] // 2, start)
            for scores in (750, 7_500)}


ARMS: Mapping[str, Arm] = {
    **{f"scores-{count}": Arm(SCORING, f"{count} scores alone", count) for count in STEPS},
    "edits": Arm(TEACHING, "grades of edits", 0, 700, process=EDITS, seeds=(0,)),
    "shuffled": Arm(TEACHING, "grades of edits, shuffled", 0, 700, process=EDITS | {"shuffle_labels": True},
                    seeds=(0,)),
    **_taught("edits", "grades of edits"),
    **_taught("shuffled", "shuffled grades"),
    "no-thematic": Arm(LEVELS, "low, middle and high level", 2_500, process={"parts": config_lib.LEVELS}),
    "thematic": Arm(LEVELS, "the thematic part alone", 2_500, process={"parts": ("thematic",)}),
    **{part: Arm(LEVELS, f"the {part} level alone, a third of the tokens", 2_500, process={"parts": (part,)})
       for part in config_lib.LEVELS},
    "main": Arm(SCORING, "the recipe: all scores, then words", 7_500, seeds=(0,), words=True),
}


def get(name: str) -> Arm:
    """The arm of a name.

    Raises:
      ConfigError: there is none; the nearest is given.
    """
    if name not in ARMS:
        from calm_jax.errors import ConfigError, nearest
        raise ConfigError(f"there is no arm {name!r}{nearest(name, tuple(ARMS))}")
    return ARMS[name]
