"""A workdir in, and what its model shall be asked for; the process that learned it, or a refusal, out."""

from __future__ import annotations

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping

from calm_jax import config as config_lib
from calm_jax.checkpoints import locate
from calm_jax.checkpoints.meta import config_of
from calm_jax.data.tasks import skills
from calm_jax.errors import CheckpointError, ConfigError, nearest


@dataclasses.dataclass(frozen=True)
class Choice:
    """A checkpoint to be asked for a skill.

    Attributes:
      path: for `locate.find`.
      process: that it is of.
      state: one of `skills.TAUGHT`, `ZERO_SHOT` and `UNTAUGHT`.
      line: says so, in one sentence.
    """

    path: pathlib.Path
    process: str
    state: str
    line: str


@dataclasses.dataclass(frozen=True)
class _Candidate:
    path: pathlib.Path
    process: config_lib.Process | None  # None: converted, never trained
    init: str


def choose(path: str | os.PathLike, skill: str, *, process: str = "", as_it_is: bool = False) -> Choice:
    """The latest process of a workdir, in the order of its run, that learned a skill; else one to ask zero-shot.

    Args:
      path: a workdir, or the folder of a process or a checkpoint, which leaves nothing to choose.
      skill: one of `skills.SKILLS`.
      process: is taken whatever it learned.
      as_it_is: where none learned it, the last is taken all the same.

    Raises:
      CheckpointError: there is no checkpoint.
      ConfigError: none learned it; says what they learned instead, where it was learned, and what teaches it.
    """
    given = pathlib.Path(path)
    found = _candidates(given, process)
    for candidate in found.values():
        if candidate.process is None:
            raise ConfigError(f"{given} was converted and never trained; train from it first")
    for state in (skills.TAUGHT, skills.ZERO_SHOT, *((skills.UNTAUGHT,) if process or as_it_is else ())):
        for name in (process,) if process else reversed(found):
            if skills.state(found[name].process, skill) == state:
                return Choice(found[name].path, name, state, _line(given, name, found[name], state, skill))
    raise ConfigError(_refusal(given, skill, found))


def seeing(path: str | os.PathLike, process: str = "") -> Choice:
    """The last process of a workdir, or a conversion, which has learned nothing: any has an encoder that sees.

    Raises:
      CheckpointError, ConfigError: as `processes`.
    """
    found = _candidates(pathlib.Path(path), process)
    name = process or next(reversed(found))
    return Choice(found[name].path, name, skills.UNTAUGHT, f"{found[name].path} is asked for what its encoder sees")


def processes(path: str | os.PathLike, process: str = "") -> dict[str, str]:
    """Skill -> the process that `choose` takes for it, without the skills that nothing there was taught.

    Args:
      process: the only one to be taken.

    Raises:
      CheckpointError: there is no checkpoint.
      ConfigError: there is none of that process.
    """
    found = {name: candidate.process for name, candidate in _candidates(pathlib.Path(path), process).items()
             if candidate.process and name == (process or name)}
    taken = {}
    for skill in skills.SKILLS:
        for state in (skills.TAUGHT, skills.ZERO_SHOT):
            able = [name for name, of in found.items() if skills.state(of, skill) == state]
            if able:
                taken[skill] = able[-1]
                break
    return taken


def _candidates(path: pathlib.Path, process: str = "") -> dict[str, _Candidate]:
    found = {}
    for name, (place, meta) in locate.offered(path).items():
        config = config_of(place, meta)
        found[name] = _Candidate(place, config.processes.get(name), config.init)
    if process and process not in found:
        raise ConfigError(f"{path} has no checkpoint of a process {process!r}"
                          f"{nearest(process, found)}")
    return found


def _line(given: pathlib.Path, name: str, candidate: _Candidate, state: str, skill: str) -> str:
    knows = f"it learned {_tasks(candidate)}"
    if state == skills.TAUGHT:
        return f"the process {name} of {given} answers: {knows}"
    how = {skills.UNTAUGHT: "asked on purpose", skills.ZERO_SHOT: "zero-shot"}[state]
    if (skill, state) == ("suggest", skills.ZERO_SHOT):
        how += ", as in the paper"
    return f"{how}: the process {name} of {given} never learned {skills.SKILLS[skill].what}; {knows}"


def _refusal(given: pathlib.Path, skill: str, found: Mapping[str, _Candidate]) -> str:
    wanted = skills.SKILLS[skill]
    has = ", ".join(f"the process {name} learned {_tasks(candidate)}" for name, candidate in found.items())
    where = next((f"the process {name} of {place} did: give {folder}" for place, name, folder in _elsewhere(
        given, skill, found)), None)
    remedies = [where, f"`calm train {wanted.recipe}` teaches it",
                f"--process {next(reversed(found))} asks all the same"]
    return f"{given} never learned {wanted.what}: {has}; {'; '.join(filter(None, remedies))}"


def _elsewhere(given: pathlib.Path, skill: str, found: Mapping[str, _Candidate]) -> Iterator[tuple[str, str, str]]:
    """Workdir, process and folder of what learned a skill: beside a checkpoint, then where it began."""
    beside = next((folder for folder in given.absolute().parents if locate.is_workdir(folder)), None)
    for place, others in [*([(beside, _candidates(beside))] if beside else []), *_before(found)]:
        for name, candidate in reversed(others.items()):
            if candidate.process and skills.state(candidate.process, skill) == skills.TAUGHT:
                yield str(place), name, str(candidate.path)


def _before(found: Mapping[str, _Candidate]) -> Iterator[tuple[str, Mapping[str, _Candidate]]]:
    """The workdirs from which these checkpoints were trained, as far as they are still where they were."""
    seen: set[str] = set()
    while (init := next(reversed(found.values())).init) and init not in seen:
        seen.add(init)
        try:
            found = _candidates(pathlib.Path(init))
        except (CheckpointError, ConfigError):
            return
        yield init, found


def _tasks(candidate: _Candidate) -> str:
    return ", ".join(skills.learned(candidate.process)) or (
        "nothing true, as its labels were shuffled" if candidate.process.shuffle_labels else "nothing to say")
