"""A recipe by its name or path, with a variant and overrides of single fields; the validated config, out.

A recipe is a file that defines `get_config(variant)`, such as configs/finetune.py. Those that come with this package
are found by their name alone: `finetune:7b`.
"""

from __future__ import annotations

import dataclasses
import pathlib
import runpy
from collections.abc import Sequence

import ml_collections
from absl import flags
from ml_collections import config_flags

from calm_jax import config as config_lib
from calm_jax.errors import ConfigError, nearest

FOLDER = pathlib.Path(__file__).parent / "configs"  # in the repository a link to configs/, in the wheel a folder


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A config, and the recipe that it came from, as it was given: `configs/finetune.py:small`."""

    config: config_lib.Config
    given: str

    @property
    def name(self) -> str:
        """`finetune-small`: of its workdir, if it has no other."""
        return "-".join(pathlib.Path(piece).stem for piece in self.given.split(":"))


def names() -> list[str]:
    """Those that come with this package."""
    return sorted(path.stem for path in FOLDER.glob("*.py"))


def load(given: str, overrides: Sequence[str] = ()) -> Recipe:
    """The config of a recipe.

    Args:
      given: `NAME` or `FILE`, with `:VARIANT` or without.
      overrides: words of a command line, such as `--config.log_every=5`, or two of them, `--config.log_every` and `5`.

    Raises:
      ConfigError: there is no such recipe, it fails, an override names no field (the nearest is given) or cannot be
        its value, or the config does not fit together.
    """
    name, _, variant = given.partition(":")
    config_lib.check_local("--config", name)
    try:
        values = runpy.run_path(str(_file(name)))["get_config"](*[variant] if variant else [])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"the configuration {given} fails: {error!r}") from None
    for word in _fields(overrides):
        node, known = values, "config"
        for piece in word.split(".")[1:]:
            fields = list(node.keys()) if hasattr(node, "keys") else []
            if piece not in fields:
                raise ConfigError(f"{known}.{piece} is not a field" + (nearest(piece, fields) if fields else ""))
            node, known = node[piece], f"{known}.{piece}"
    return Recipe(config_lib.from_config_dict(_overridden(values, overrides)), given)


def _file(name: str) -> pathlib.Path:
    for path in (pathlib.Path(name), FOLDER / f"{name}.py"):
        if path.is_file():
            return path
    raise ConfigError(f"there is no configuration file {name}, nor a recipe of this name; ours are "
                      f"{', '.join(names())}, with a variant after a colon: finetune:7b")


def _fields(overrides: Sequence[str]) -> list[str]:
    """The fields that words of a command line set.

    Raises:
      ConfigError: a word is neither an override nor the value of the one before it.
    """
    found, waiting = [], False
    for word in overrides:
        if word.startswith("--config."):
            field, has_value, _ = word[2:].partition("=")
            found.append(field)
            waiting = not has_value
        elif waiting:
            waiting = False
        else:
            raise ConfigError(f"{word!r} is no flag; a field of the config is set by --config.FIELD=VALUE")
    return found


def _overridden(values: ml_collections.ConfigDict, overrides: Sequence[str]) -> ml_collections.ConfigDict:
    words, known = ["calm", *overrides], flags.FlagValues()
    holder = config_flags.DEFINE_config_dict("config", values, flag_values=known, sys_argv=words)
    try:
        known(words)
        return holder.value
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(str(error).splitlines()[0]) from None
