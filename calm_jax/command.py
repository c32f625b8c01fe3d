"""A command line in; a validated config and exit codes, with one clear sentence for whatever is wrong, out."""

from __future__ import annotations

import pathlib
import runpy
import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from calm_jax import config as config_lib

ADDRESSES = ("base_url",)  # flags whose value is one
POINTLESS = 3  # exit code: it cannot go on, and would end in the same way if it were started again


def define_config() -> flags.FlagHolder:
    """Defines `--config FILE[:VARIANT]` with its `--config.a.b=value` overrides."""
    return config_flags.DEFINE_config_file(
        "config", None, "configuration file, with a variant after a colon: configs/finetune.py:small", lock_config=True)


def config(holder: flags.FlagHolder) -> config_lib.Config:
    """The validated config of the command line."""
    if holder.value is None:
        raise config_lib.ConfigError("name a configuration: --config configs/finetune.py")
    return config_lib.from_config_dict(holder.value)


def config_file() -> str:
    """The value of --config as given, such as `configs/finetune.py:small`."""
    return config_flags.get_config_filename(flags.FLAGS["config"])


def require(*names: str) -> flags.FlagValues:
    """All flags, of which these must have been given.

    Raises:
      ConfigError: one was not.
    """
    for name in names:
        if not flags.FLAGS[name].value:
            raise config_lib.ConfigError(f"--{name} is missing: {flags.FLAGS[name].help}")
    return flags.FLAGS


def run(main: Callable[..., int | None], *, words: bool = False) -> None:
    """Parses the flags, runs `main`, and turns the project's errors into one sentence and an exit code: 2 (use), 1, or
    3 (training cannot go on, and would end here again).

    Args:
      words: `main` takes the words of the command line that are no flags; else there must be none.
    """

    def parse(argv):
        try:
            if "config" in flags.FLAGS:
                _check_config(argv)
            rest = flags.FLAGS(argv)
            if flags.FLAGS["verbosity"].using_default_value:
                flags.FLAGS.verbosity = logging.WARNING  # absl would take INFO, where Orbax tells every file it writes
            _check_values(rest[1:])
            return rest
        except flags.UnrecognizedFlagError as error:
            hint = config_lib.nearest(error.flagname, list(flags.FLAGS)) if "." not in error.flagname else ""
            _fail(f"there is no flag --{error.flagname}{hint}", 2)
        except flags.Error as error:
            _fail(str(error), 2)
        except config_lib.ConfigError as error:
            _fail(str(error), 2)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _fail(str(error).splitlines()[0], 2)

    def guarded(argv):
        try:
            if words:
                sys.exit(main(argv[1:]))
            if len(argv) > 1:
                raise config_lib.ConfigError(f"{argv[1]!r} is no flag; flags begin with two dashes")
            sys.exit(main())
        except config_lib.ConfigError as error:
            _fail(str(error), 2)
        except Exception as error:
            # Imported late: programs that need no JAX and Orbax should not wait for them.
            from calm_jax.data.samples import BadRecord
            from calm_jax.training.checkpoint import CheckpointError
            from calm_jax.training.loop import TrainingError
            if not isinstance(error, (BadRecord, CheckpointError, TrainingError)):
                raise
            # The code that tells a supervisor that to try again is pointless.
            _fail(str(error), POINTLESS if isinstance(error, TrainingError) else 1)

    app.run(guarded, flags_parser=parse)


def _check_values(words: list[str]) -> None:
    """Looks at what absl does not: a bound of a flag lets `nan` pass, and a path may be the address of a bucket.

    Raises:
      ConfigError: names the flag, or the word that is no flag.
    """
    for flag in map(flags.FLAGS.__getitem__, flags.FLAGS):
        for value in flag.value if isinstance(flag.value, list) else [flag.value]:
            if isinstance(value, float):
                config_lib.check_number(f"--{flag.name}", value, {})
            elif isinstance(value, str) and flag.name not in ADDRESSES:
                config_lib.check_local(f"--{flag.name}", value)
    for word in words:
        config_lib.check_local("argument", word)


def _check_config(argv: list[str]) -> None:
    """Looks at --config and its overrides before ml_collections does, whose errors are tracebacks without a remedy.

    Raises:
      ConfigError: there is no such file, it fails, or an override names an unknown field (the nearest is given).
    """
    words = [word.lstrip("-") if word.startswith("-") else word for word in argv[1:]]
    given = [word.partition("=")[2] for word in words if word.startswith("config=")]
    given += [words[i + 1] for i, word in enumerate(words[:-1]) if word == "config"]
    if not given:
        return
    path, _, variant = given[-1].partition(":")
    if not pathlib.Path(path).is_file():
        raise config_lib.ConfigError(f"there is no configuration file {path}; ours are configs/pretrain.py and "
                                     "configs/finetune.py, with a variant behind a colon")
    try:
        values = runpy.run_path(path)["get_config"](*[variant] if variant else [])
    except config_lib.ConfigError:
        raise
    except Exception as error:
        raise config_lib.ConfigError(f"the configuration {given[-1]} fails: {error!r}") from None
    for word in words:
        if word.startswith("config."):
            node, known = values, "config"
            for piece in word.partition("=")[0].split(".")[1:]:
                names = list(node.keys()) if hasattr(node, "keys") else []
                if piece not in names:
                    raise config_lib.ConfigError(f"{known}.{piece} is not a field"
                                                 + (config_lib.nearest(piece, names) if names else ""))
                node, known = node[piece], f"{known}.{piece}"


def _fail(sentence: str, code: int) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(code)
