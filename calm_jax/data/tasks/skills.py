"""What programs ask a model for, and which tasks teach it: one table, for everything that chooses a checkpoint.

A model knows what its last process taught it. What an earlier process taught counts as unlearned unless the last one
kept a share of it: 450 steps of scores alone are enough for a model to answer every question with a score.
"""

from __future__ import annotations

import dataclasses
import types
from collections.abc import Mapping

from calm_jax import config as config_lib
from calm_jax.data.tasks import instructions

WORDS = ("attributes", "comparisons", "measured", "measured_pair", "caption", "comment", "question")
TAUGHT, ZERO_SHOT, UNTAUGHT = "taught", "zero-shot", "untaught"


@dataclasses.dataclass(frozen=True)
class Skill:
    """What a program can ask a model for.

    Attributes:
      what: a plural, to stand behind "learned".
      tasks: each of these in a process's mixture teaches it.
      recipe: what teaches it, as arguments of `calm train`.
      zero_shot: a process that learned one of these may be asked for it unlearned, as long as that is said.
      head: one of the heads `score_head` and `light_head` must have learned, too.
    """

    what: str
    tasks: tuple[str, ...]
    recipe: str
    zero_shot: tuple[str, ...] = ()
    head: str = ""


SKILLS: Mapping[str, Skill] = types.MappingProxyType({
    "score": Skill("scores", ("score",), "--config finetune"),
    "levels": Skill("rating words", ("level",), "--config finetune "
                    "--config.processes.scores.tasks='{\"score\": 0.5, \"level\": 0.5}'"),
    "head": Skill("scores by a regression head", ("score",), "--config finetune:tiny+head", head="score_head"),
    "light": Skill("scores by the light head", ("score",), "--config laptop", head="light_head"),
    "comment": Skill("comments", ("comment",), "--config finetune"),
    "suggest": Skill("suggestions", ("suggestion",), "--config finetune", zero_shot=WORDS),
    "attributes": Skill("attributes", ("attributes",), "--config pretrain"),
    "personalise": Skill("personal scores", ("personal",), "--config first_look:all_tasks"),
    "ask": Skill("answers to free questions", ("question",), "--config finetune "
                 "--config.processes.comments.tasks='{\"comment\": 0.5, \"qa:question\": 0.5}'", zero_shot=WORDS),
})


def for_reader(reader: str) -> str:
    """The skill that a reader of scores, one of `scale.READERS`, needs."""
    return reader if reader in ("levels", "head", "light") else "score"


# What gives generic scores beside a person's ratings: skill -> the reader that asks for it; the first that was learned.
GENERIC: Mapping[str, str] = types.MappingProxyType({"score": "expectation", "light": "light"})


def for_question(question: str) -> str:
    """The skill that a question in words needs: that of the task which asks so, or else `ask`."""
    known = {"score": instructions.SCORE, "levels": instructions.LEVEL, "suggest": instructions.SUGGEST,
             "comment": (*instructions.COMMENT, *instructions.ASPECTS.values()), "personalise": instructions.PERSONAL}
    return next((skill for skill, questions in known.items() if question in questions), "ask")


def learned(process: config_lib.Process, *, words: bool = True) -> tuple[str, ...]:
    """The tasks that a process taught, each once; none where labels were shuffled, for that teaches nothing true.

    Args:
      words: to the language model, which may have been left out; else to the heads, too.
    """
    if process.shuffle_labels or (words and not process.words):
        return ()
    return tuple(dict.fromkeys(task for _, task in process.mixture))


def state(process: config_lib.Process, skill: str) -> str:
    """Whether a model that a process has just trained can be asked for a skill: TAUGHT, ZERO_SHOT or UNTAUGHT."""
    wanted = SKILLS[skill]
    tasks = set(learned(process, words=wanted.head != "light_head"))
    if tasks & set(wanted.tasks) and (not wanted.head or getattr(process, wanted.head) > 0):
        return TAUGHT
    return ZERO_SHOT if tasks & set(wanted.zero_shot) else UNTAUGHT
