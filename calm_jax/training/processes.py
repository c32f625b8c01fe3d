"""The environment of a process in; a place among the processes of one job out (jax.distributed), and what its
supervisor sees of it.

A job is described by our own variables (calm_jax.supervise sets them), by SLURM, by GKE and Cloud TPU, or not at all:
then this process is all there is. On a TPU pod one process runs on each host and owns its devices; on GPUs one process
a host as well, which owns all GPUs of it.
"""

from __future__ import annotations

import ctypes
import faulthandler
import functools
import os
import signal
import sys
import threading
from collections.abc import Mapping

import jax

from calm_jax.errors import ConfigError

COORDINATOR, COUNT, INDEX = "CALM_COORDINATOR", "CALM_PROCESSES", "CALM_PROCESS"
SUPERVISOR, PROGRESS = "CALM_SUPERVISOR", "CALM_PROGRESS"  # its pid, and the file in which it looks for progress
DUMP = signal.SIGUSR1  # makes a training process write the stacks of all its threads to stderr
HEARTBEAT = 30  # seconds of silence after which a process counts as gone, and the others end
JOINING = 900  # seconds that a process waits for the others: hosts of a slice do not begin at the same time
MODES = ("auto", "on", "off")


def join(mode: str = "auto", environment: Mapping[str, str] = os.environ) -> str:
    """Joins the job that the environment describes; before anything else is done with JAX.

    Args:
      mode: `auto` joins where the environment names several processes; `on` asks JAX to find the others, as on Cloud
        TPU hosts whose environment says nothing; `off` stays alone.

    Returns:
      How the job was found, for the log; empty for a process alone.

    Raises:
      ConfigError: the environment contradicts itself, or the others did not come.
    """
    found = "" if mode == "off" else described(environment)
    if not found and mode != "on":
        return ""
    shared = {"heartbeat_timeout_seconds": HEARTBEAT, "initialization_timeout": JOINING}
    try:
        if found == COORDINATOR:
            jax.distributed.initialize(environment[COORDINATOR], int(environment[COUNT]), int(environment[INDEX]),
                                       **shared)
        elif found == "SLURM":
            # One task a node owns all its GPUs; JAX would give it the first alone.
            gpus = environment.get("SLURM_GPUS_ON_NODE", "")
            alone = environment.get("SLURM_NTASKS") == environment.get("SLURM_JOB_NUM_NODES")
            jax.distributed.initialize(local_device_ids=list(range(int(gpus))) if alone and gpus.isdigit() else None,
                                       cluster_detection_method="slurm", **shared)
        else:
            jax.distributed.initialize(**shared)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"this process could not join its job ({found or 'asked for by --distributed on'}"
                          f"): {str(error).splitlines()[0]}") from error
    return found or "JAX"


def described(environment: Mapping[str, str]) -> str:
    """What in the environment says that there are several processes; empty for nothing.

    Raises:
      ConfigError: our own variables are not all there, or are no numbers that fit each other.
    """
    given = [name for name in (COORDINATOR, COUNT, INDEX) if environment.get(name)]
    if given:
        values = [environment.get(name, "") for name in (COUNT, INDEX)]
        if len(given) < 3 or not all(value.isdigit() for value in values) or int(values[1]) >= int(values[0]):
            raise ConfigError(f"{COORDINATOR}=HOST:PORT, {COUNT}=N and {INDEX}=0..N-1 go together; there is "
                              f"{', '.join(f'{name}={environment[name]}' for name in given)} alone")
        return COORDINATOR if int(values[0]) > 1 else ""
    if int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1")) or 1) > 1 and \
            "SLURM_PROCID" in environment:
        return "SLURM"
    if "," in environment.get("TPU_WORKER_HOSTNAMES", ""):
        return "TPU_WORKER_HOSTNAMES"
    return "MEGASCALE" if environment.get("MEGASCALE_COORDINATOR_ADDRESS") else ""


def supervised(environment: Mapping[str, str] = os.environ) -> None:
    """To be called first, from the main thread: on SIGUSR1 the stacks of all threads go to stderr; and a process whose
    supervisor is gone is told to stop, by SIGTERM, for nobody else would."""
    _stacks_on_signal()
    parent = environment.get(SUPERVISOR, "")
    if parent.isdigit() and sys.platform == "linux":
        # The kernel sends it when the thread ends that started this process: the supervisor's main thread.
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):  # it went before this line
            os.kill(os.getpid(), signal.SIGTERM)


def _stacks_on_signal() -> None:
    """DUMP writes the stacks of all threads, whatever the main thread is doing.

    faulthandler's own handler would read the frames of threads that run on meanwhile, and so end the process now and
    then (SIGSEGV in one of some dozens of calls). Here a thread that waits for the signal writes them, and holds the
    interpreter's lock while it does; only native code that never gives that lock back stays unseen.
    """
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    show = functools.partial(faulthandler.dump_traceback, all_threads=True)

    def wait():
        while received := os.read(reader, 1):
            if received[0] == DUMP:
                show()

    def handler(*_):
        told = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        if told != writer:  # an event loop in the main thread, which hears of signals for a while instead
            signal.set_wakeup_fd(told, warn_on_full_buffer=False)
            show()

    threading.Thread(target=wait, name="stacks", daemon=True).start()
    signal.signal(DUMP, handler)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)


class Progress:
    """What a supervisor sees of a training process: a line in the file that it names in the environment, or nothing.

    The line holds `place`, the number of the training process in the run; `start`, the step that it began behind;
    `step`, the last one that was begun; and a count, so that every call is seen. It costs some microseconds.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ):
        path = environment.get(PROGRESS)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600) if path else None
        self._where, self._count = (0, 0, 0), 0

    def __call__(self, place: int | None = None, start: int = 0, step: int = 0) -> None:
        """The process is there; without arguments where it was before."""
        if self._file is None:
            return
        if place is not None:
            self._where = place, start, step
        self._count += 1
        os.pwrite(self._file, f"{' '.join(map(str, self._where))} {self._count}\n".ljust(80).encode(), 0)
