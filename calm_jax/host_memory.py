"""A command that computes on CPU in; the same command, its memory in large pages, out (Linux, glibc from 2.35 on).

XLA's CPU backend allocates its working memory anew in every step, and the kernel clears it again: in pages of 4 kB, a
step of `laptop` is interrupted 400,000 times. In large pages, where Linux grants them on request, it took 2.35 s
instead of 2.63 on two cores of an AMD EPYC. glibc reads the setting when a program starts, so it starts itself again.
"""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections.abc import Mapping

VARIABLE = "GLIBC_TUNABLES"
PREFIX, SETTING = "glibc.malloc.", "glibc.malloc.hugetlb=1"
# Where there is one of these, an accelerator holds what a step works on, and the host's memory stays as it is.
ACCELERATORS = ("/dev/nvidia[0-9]*", "/dev/kfd", "/dev/accel*", "/dev/vfio/[0-9]*")


def settings(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to add to an environment; none where its user made settings of malloc, or where ours would change
    nothing."""
    given = environment.get(VARIABLE, "")
    if PREFIX in given or not _glibc() or any(map(glob.glob, ACCELERATORS)):
        return {}
    return {VARIABLE: ":".join(filter(None, (given, SETTING)))}


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
