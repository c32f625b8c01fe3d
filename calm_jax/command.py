"""A command line in; a validated config and exit codes, with one clear sentence for whatever is wrong, out."""

from __future__ import annotations

import sys
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from calm_jax import config as config_lib


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


def run(main: Callable[[], int | None]) -> None:
    """Parses the flags, runs `main`, and turns the project's errors into one sentence and exit code 2 (use) or 1."""

    def parse(argv):
        try:
            rest = flags.FLAGS(argv)
            if flags.FLAGS["verbosity"].using_default_value:
                flags.FLAGS.verbosity = logging.WARNING  # absl would take INFO, where Orbax tells every file it writes
            return rest
        except flags.UnrecognizedFlagError as error:
            hint = config_lib.nearest(error.flagname, list(flags.FLAGS)) if "." not in error.flagname else ""
            _fail(f"there is no flag --{error.flagname}{hint}", 2)
        except flags.Error as error:
            _fail(str(error), 2)
        except (AttributeError, KeyError) as error:
            _fail(_unknown_field(argv, error), 2)
        except (TypeError, ValueError, FileNotFoundError, config_lib.ConfigError) as error:
            _fail(str(error).splitlines()[0], 2)

    def guarded(_):
        # Imported late: parsing errors should not wait for JAX and Orbax.
        from calm_jax.data.samples import BadRecord
        from calm_jax.training.checkpoint import CheckpointError
        from calm_jax.training.loop import TrainingError
        try:
            sys.exit(main())
        except config_lib.ConfigError as error:
            _fail(str(error), 2)
        except (BadRecord, CheckpointError, TrainingError) as error:
            _fail(str(error), 1)

    app.run(guarded, flags_parser=parse)


def _unknown_field(argv: list[str], error: Exception) -> str:
    """ml_collections knows that a field is missing, not which names are near: walk the overrides ourselves."""
    values = flags.FLAGS["config"].value if "config" in flags.FLAGS else None
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=")[0]
        if not name.startswith("config.") or values is None:
            continue
        node = values
        path = "config"
        for piece in name.split(".")[1:]:
            known = list(node.keys()) if hasattr(node, "keys") else []
            if piece not in known:
                return f"{path}.{piece} is not a field{config_lib.nearest(piece, known)}"
            node, path = node[piece], f"{path}.{piece}"
    return str(error)


def _fail(sentence: str, code: int) -> None:
    print(f"error: {sentence}", file=sys.stderr, flush=True)
    sys.exit(code)
