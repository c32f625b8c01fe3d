"""The start of a program in; its compiled programs kept for the next start, and what the time went to, out."""

from __future__ import annotations

import collections
import contextlib
import os
import pathlib
import time

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"  # also counts programs that the cache gave
FOUND = "/jax/compilation_cache/cache_hits"
MISSED = "/jax/compilation_cache/cache_misses"


QUICK = 0.1  # seconds of compilation from which on a program is kept; JAX's second leaves a start many that take less


def keep_programs() -> None:
    """Compiled programs are kept, for this program's next start, in JAX_COMPILATION_CACHE_DIR (empty = nowhere) or else
    in `calm_jax` in the user's cache folder; those that took JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS, or else QUICK.
    JAX tells programs, versions and devices apart."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        home = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
        jax.config.update("jax_compilation_cache_dir", str(pathlib.Path(home) / "calm_jax"))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", QUICK)


class Startup:
    """Where the time goes between the start of this process and its first training step.

    Attributes:
      seconds: phase -> its wall time, in order.
    """

    def __init__(self):
        self.seconds: dict[str, float] = {"imports": _age()}
        self._compiling, self._counts = 0.0, collections.Counter()
        self._last = time.monotonic()
        jax.monitoring.register_event_duration_secs_listener(self._took)
        jax.monitoring.register_event_listener(self._happened)

    def _took(self, event: str, seconds: float, **_) -> None:
        if event == COMPILED:
            self._compiling += seconds

    def _happened(self, event: str, **_) -> None:
        self._counts[event] += 1

    def reached(self, phase: str) -> None:
        """Everything since the phase before, or since the start, was `phase`."""
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now

    def report(self) -> str:
        """One line about all phases so far; nothing is watched any more."""
        for unregister, listener in ((jax.monitoring.unregister_event_duration_listener, self._took),
                                     (jax.monitoring.unregister_event_listener, self._happened)):
            with contextlib.suppress(ValueError):  # somebody has cleared all listeners
                unregister(listener)
        phases = ", ".join(f"{phase} {seconds:.1f}" for phase, seconds in self.seconds.items())
        cache = jax.config.jax_compilation_cache_dir or "(off)"
        return (f"start-up: first step after {sum(self.seconds.values()):.1f} s ({phases}); {self._compiling:.1f} s of "
                f"it for programs: {self._counts[MISSED]} compiled, {self._counts[FOUND]} from the cache {cache}")


def _age() -> float:
    """Seconds since this process was started; 0 where the system does not tell."""
    with contextlib.suppress(OSError, ValueError, IndexError, AttributeError):
        began = float(pathlib.Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return time.clock_gettime(time.CLOCK_BOOTTIME) - began / os.sysconf("SC_CLK_TCK")
    return 0.0
