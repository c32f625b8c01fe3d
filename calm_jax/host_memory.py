"""A command that computes on CPU in; the same command, its memory kept from one step to the next, out (Linux, glibc).

XLA's CPU backend allocates its working memory anew in every step. By default glibc gives so much of it back at once,
and the kernel clears it again page by page; a virtual machine may have given it to its host meanwhile. Kept by one
arena, in large pages, it is cleared once: on two cores of an AMD EPYC a training step of `laptop` took 2.40 s instead
of 2.63, and 10.4 pictures a second were scored instead of 8.8. glibc reads these settings when a program starts, so it
starts itself again.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
SETTINGS = {"hugetlb": 1,  # large pages, where Linux grants them on request (from glibc 2.35 on)
            "mmap_max": 0, "trim_threshold": 1 << 40,  # nothing is given back
            "arena_max": 1}  # what one thread freed, another finds
PREFIX = "glibc.malloc."
# Where there is one of these, an accelerator holds what a step works on, and the host's memory stays as it is.
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to an environment; none where malloc's settings were made by its user, or where these would
    change nothing."""
    given = environment.get(VARIABLE, "")
    if PREFIX in given or not _glibc() or any(map(glob.glob, ACCELERATORS)):
        return {}
    ours = (f"{PREFIX}{name}={value}" for name, value in SETTINGS.items())
    return {VARIABLE: ":".join(filter(None, (given, *ours)))}


def settle() -> None:
    """Starts this program again with `settings`, in the same process, with the same arguments; returns where there are
    none to make."""
    if sys.argv[:1] not in ([""], ["-"]) and (more := settings(os.environ)):  # not a script on standard input
        with contextlib.suppress(OSError):
            os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], os.environ | more)


def _glibc() -> bool:
    try:
        return "glibc" in (os.confstr("CS_GNU_LIBC_VERSION") or "")
    except (ValueError, AttributeError, OSError):  # another system or library
        return False
