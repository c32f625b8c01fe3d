"""A program's work in; an exit code out, and one clear sentence for whatever is wrong."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import logging
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import NoReturn

from calm_jax import terminal
from calm_jax.terminal import shown

LONGEST = 3000  # characters of a sentence


def run(work: Callable[[], int | None]) -> NoReturn:
    """Does the work of a program and ends it: 0 or what `work` returns; 2 for wrong use, 1 where something failed, 3
    where training cannot go on and would end so again; 128 and the signal's number where one stopped it."""
    terminal.protect()
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(levelname)s: %(message)s")
    threading.excepthook = _in_a_thread
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error is closed, or no file
        faulthandler.enable()  # a crash of native code shows where Python was
    try:
        code = work()
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
        code = getattr(error, "exit_code", None)  # of `errors`, of a bad picture, and of what is wrong with arguments
        if code is None:
            raise
        _fail(_sentence(error), code)


def _sentence(error: Exception) -> str:
    """The library of the command line gives the text of its errors by a method, and begins it with a capital."""
    words = getattr(error, "format_message", None)
    if words is None:
        return str(error)
    kind, parameter = type(error).__name__, getattr(error, "param", None)
    if kind == "MissingParameter" and parameter is not None:
        return f"{parameter.opts[0]} is missing: {parameter.help}".rstrip(".")
    if kind == "NoSuchOption":
        near = getattr(error, "possibilities", None)
        return f"there is no option {error.option_name}" + (f"; the nearest is {near[0]!r}" if near else "")
    text = " ".join(words().split()).rstrip(".")
    return text[:1].lower() + text[1:] + ("; calm --help lists them all" if text.startswith("No such command") else "")


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
