"""A command line in; a validated config and exit codes, with one clear sentence for whatever is wrong, out."""

from __future__ import annotations

import contextlib
import errno
import os
import pathlib
import runpy
import signal
import sys
import threading
from collections.abc import Callable

from absl import app, flags, logging
from ml_collections import config_flags

from calm_jax import config as config_lib
from calm_jax import terminal
from calm_jax.errors import ConfigError
from calm_jax.terminal import shown

ADDRESSES = ("base_url",)  # flags whose value is one
LONGEST = 3000  # characters of a sentence


def define_config() -> flags.FlagHolder:
    """Defines `--config FILE[:VARIANT]` with its `--config.a.b=value` overrides."""
    return config_flags.DEFINE_config_file(
        "config", None, "configuration file, with a variant after a colon: configs/finetune.py:small", lock_config=True)


def config(holder: flags.FlagHolder) -> config_lib.Config:
    """The validated config of the command line."""
    if holder.value is None:
        raise ConfigError("name a configuration: --config configs/finetune.py")
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
            raise ConfigError(f"--{name} is missing: {flags.FLAGS[name].help}")
    return flags.FLAGS


def run(main: Callable[..., int | None], *, words: bool = False) -> None:
    """Parses the flags, runs `main`, and turns the project's errors into one sentence and an exit code: 2 (use), 1, or
    3 (training cannot go on, and would end here again).

    Args:
      words: `main` takes the words of the command line that are no flags; else there must be none.
    """

    terminal.protect()
    logging.get_absl_handler().python_handler.stream = sys.stderr  # it took the unprotected one when it was made
    threading.excepthook = _in_a_thread

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
        except ConfigError as error:
            _fail(str(error), 2)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            _fail(str(error).splitlines()[0], 2)

    def guarded(argv):
        try:
            if not words and len(argv) > 1:
                raise ConfigError(f"{argv[1]!r} is no flag; flags begin with two dashes")
            code = main(argv[1:]) if words else main()
            sys.stdout.flush()  # a full disk or a closed pipe is met here at the latest
            sys.exit(code)
        except KeyboardInterrupt:
            _fail("interrupted", 128 + signal.SIGINT)
        except BrokenPipeError:  # whoever read the output has read enough
            _quietly()
            sys.exit(128 + signal.SIGPIPE)
        except OSError as error:
            _quietly()
            _fail(_of_system(error), 1)
        except Exception as error:
            code = getattr(error, "exit_code", None)  # of `errors`, and of a bad picture
            if code is None:
                raise
            _fail(str(error), code)

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
        raise ConfigError(f"there is no configuration file {path}; ours are configs/pretrain.py and "
                          "configs/finetune.py, with a variant behind a colon")
    try:
        values = runpy.run_path(path)["get_config"](*[variant] if variant else [])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(f"the configuration {given[-1]} fails: {error!r}") from None
    for word in words:
        if word.startswith("config."):
            node, known = values, "config"
            for piece in word.partition("=")[0].split(".")[1:]:
                names = list(node.keys()) if hasattr(node, "keys") else []
                if piece not in names:
                    raise ConfigError(f"{known}.{piece} is not a field"
                                      + (config_lib.nearest(piece, names) if names else ""))
                node, known = node[piece], f"{known}.{piece}"


REMEDIES = {  # what the system says, by its number -> what to do about it
    errno.ENOSPC: "free some space, and run the same command again",
    errno.EDQUOT: "free some space, and run the same command again",
    errno.EACCES: "give this user the right, or name another place",
    errno.EPERM: "give this user the right, or name another place",
    errno.EROFS: "name a place that can be written",
    errno.ENOENT: "check the name",
    errno.EISDIR: "name a file",
    errno.ENOTDIR: "name a place that does not lie below a file",
    errno.EEXIST: "name another place, or move it away",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.EMFILE: "allow more open files (ulimit -n)",
}


def _of_system(error: OSError) -> str:
    """An error of the operating system as a sentence with a remedy."""
    what = error.strerror or " ".join(str(error).split()) or type(error).__name__
    where = f"{os.fsdecode(error.filename)}: " if isinstance(error.filename, (str, bytes)) else ""
    remedy = REMEDIES.get(error.errno or 0, "")
    return f"{where}{what[:1].lower() + what[1:] if where else what}{f'; {remedy}' if remedy else ''}"


def _in_a_thread(happened: threading.ExceptHookArgs) -> None:
    """A thread of a library, such as the writer of TensorBoard's files, has met an error that is nobody else's."""
    if isinstance(happened.exc_value, OSError):
        with contextlib.suppress(OSError):
            print(f"warning: {shown(_of_system(happened.exc_value))}", file=sys.stderr, flush=True)
    else:
        threading.__excepthook__(happened)


def _quietly() -> None:
    """What still waits to be written to standard output cannot be, and is not tried again when Python ends."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _fail(sentence: str, code: int) -> None:
    with contextlib.suppress(OSError):
        print(f"error: {_short(shown(sentence))}", file=sys.stderr, flush=True)
    sys.exit(code)


def _short(sentence: str) -> str:
    """A sentence that quotes something endless, such as a name in a damaged file, without its middle: at its end is
    the remedy."""
    return sentence if len(sentence) <= LONGEST else f"{sentence[:LONGEST - 800]} [...] {sentence[-700:]}"
