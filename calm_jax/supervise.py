"""A command in; the same command as the processes of one job, started again after a crash, out.

    python -m calm_jax.supervise [--processes N] [--restarts 5] -- -m calm_jax.train --config configs/finetune.py:7b

What stands behind `--` is given to this Python. On one host the N processes are joined over loopback; on a host of a
larger job (SLURM, GKE, a TPU pod) one process is watched, which finds the others by its environment. A process that
dies is named, the others are stopped, and all begin again: training goes on from its last checkpoint. SIGTERM and
Ctrl-C are passed on, once; the processes save one and the same step. Exit codes: 0 done, 143 stopped and saved, 2 what
was asked for is wrong, 1 given up.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence

STOPPED = (128 + signal.SIGTERM, 128 + signal.SIGINT)
SETTLE = 3.0  # seconds in which the deaths that follow from one death are seen
HEALTHY = 600.0  # seconds after which earlier crashes no longer count
TAIL = 200  # last lines of a process that are kept, to find out which peer it missed
MISSED = re.compile(r"/task:(\d+)")

# Threads of XLA's CPU programs where several processes share a host. A collective keeps the thread that waits in it:
# with no more threads than cores or devices all of them come to wait, and what they wait for never runs.
THREADS = 64


class Log:
    """The supervisor's stderr, which all threads write to: whole lines begin at the left, also where a progress bar,
    which ends without a newline, was the last that was written."""

    def __init__(self):
        self._lock = threading.Lock()
        self._at_left = True

    def raw(self, data: bytes) -> None:
        with self._lock:
            self._write(data)

    def line(self, text: str) -> None:
        with self._lock:
            self._write((b"" if self._at_left else b"\n") + text.encode(errors="replace") + b"\n")

    def _write(self, data: bytes) -> None:
        sys.stderr.buffer.write(data)
        sys.stderr.buffer.flush()
        self._at_left = data.endswith(b"\n")


LOG = Log()


class Process:
    """One process of the job: what it writes is passed on, with its number before it where there are several."""

    def __init__(self, number: int, count: int, command: Sequence[str], environment: dict[str, str]):
        self.number, self.count = number, count
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        # A group of its own: Ctrl-C reaches the supervisor alone, which passes it on once.
        self.child = subprocess.Popen([sys.executable, *command], env=environment, stdout=subprocess.PIPE,
                                      stderr=subprocess.STDOUT, start_new_session=True)
        self._pump = threading.Thread(target=self._pass_on, daemon=True)
        self._pump.start()

    def _pass_on(self) -> None:
        """The first process's output as it is, progress bars included; of the others whole lines."""
        stream, rest = self.child.stdout, b""
        assert stream is not None
        while data := stream.read1(1 << 16):
            if self.number == 0:
                LOG.raw(data)
            *lines, rest = re.split(rb"[\r\n]", rest + data)
            for line in lines:
                self.tail.append(line.decode(errors="replace"))
                if self.number and line.strip():
                    LOG.line(f"[process {self.number}] {self.tail[-1]}")

    @property
    def code(self) -> int | None:
        return self.child.poll()

    def send(self, number: int) -> None:
        if self.code is None:
            self.child.send_signal(number)

    def end(self) -> None:
        """Kills it, if it still is there, and waits for its last words."""
        if self.code is None:
            self.child.kill()
        self.child.wait()
        self._pump.join(timeout=5)

    def how(self) -> str:
        """How it ended, in words."""
        code = self.child.returncode
        what = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"process {self.number} of {self.count} (pid {self.child.pid}) {what}"


class Supervisor:
    """Runs the job until it is done, stopped, wrong, or has crashed too often; `run` returns the exit code."""

    def __init__(self, command: Sequence[str], processes: int, restarts: int, grace: float):
        self.command, self.count, self.restarts, self.grace = command, processes, restarts, grace
        self.told = 0  # the signal that was passed on
        self.processes: list[Process] = []

    def run(self) -> int:
        crashes = 0
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._tell)
        while True:
            begin = time.monotonic()
            self._start()
            code = self._watch()
            if code is not None:
                return code
            crashes = 1 if time.monotonic() - begin > HEALTHY else crashes + 1
            if self.told:
                say("stopped while starting again")
                return 128 + self.told
            if crashes > self.restarts:
                say(f"given up after {crashes} crashes within {HEALTHY / 60:.0f} minutes of each start; the messages "
                    "above say why, and the same command goes on from the last checkpoint")
                return 1
            say(f"all processes begin again (crash {crashes}, {self.restarts - crashes} more are accepted)")

    def _start(self) -> None:
        shared = dict(os.environ)
        if self.count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared |= {"CALM_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "CALM_PROCESSES": str(self.count),
                           "PJRT_NPROC": str(THREADS), "NPROC": str(THREADS)}
        self.processes = []
        for number in range(self.count):
            own = {"CALM_PROCESS": str(number)} if self.count > 1 else {}
            self.processes.append(Process(number, self.count, self.command, shared | own))

    def _watch(self) -> int | None:
        """The exit code of the job, or None where it has to begin again. Nothing of it runs when this returns."""
        deadline = None
        try:
            while True:
                ended = [process for process in self.processes if process.code is not None]
                failed = [process for process in ended if process.code != 0]
                if len(ended) == self.count and not failed:
                    return 0
                if failed:
                    return self._judge()
                if self.told and deadline is None:
                    deadline = time.monotonic() + self.grace
                if deadline is not None and time.monotonic() > deadline:
                    say(f"not all was saved within {self.grace:.0f} seconds; the last complete checkpoint counts")
                    return 128 + self.told
                time.sleep(0.1)
        finally:
            for process in self.processes:
                process.end()

    def _judge(self) -> int | None:
        """What to do when one has failed, after the others had time to follow."""
        begin = time.monotonic()
        while any(process.code is None for process in self.processes):
            saving = any(process.code in STOPPED for process in self.processes)
            if time.monotonic() > begin + (self.grace if saving else SETTLE):
                break
            time.sleep(0.1)
        failed = [process for process in self.processes if process.code not in (None, 0)]
        for code in (2, *STOPPED):
            if any(process.code == code for process in failed):
                if code in STOPPED:
                    say(f"stopped: {'; '.join(process.how() for process in failed)}")
                return code
        # One that a signal killed is the cause; those that ended with an error missed it.
        killed = [process for process in failed if process.code < 0] or failed
        waiting = [process for process in self.processes if process.code is None]
        say(f"{'; '.join(process.how() for process in killed)}"
            + (f"; stopping {len(waiting)} more" if waiting else ""))
        behind = [" ".join(process.tail).partition("heartbeat")[2] for process in failed]
        missed = sorted({found for text in behind for found in MISSED.findall(text)}, key=int)
        if self.count == 1 and missed:
            say(f"it missed process {', '.join(missed)} of its job: look at the log of that host")
        return None

    def _tell(self, number: int, _) -> None:
        if self.told:  # asked twice: do not wait
            for process in self.processes:
                process.send(signal.SIGKILL)
            return
        self.told = number
        for process in self.processes:
            process.send(signal.SIGTERM)


def say(text: str) -> None:
    LOG.line(f"supervisor: {text}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m calm_jax.supervise", description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=1, help="processes on this host, joined over loopback")
    parser.add_argument("--restarts", type=int, default=5, help="crashes in a row that are answered by a new start")
    parser.add_argument("--grace", type=float, default=600.0, help="seconds to save in when told to stop")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and what to give to Python")
    given = parser.parse_args(argv)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("nothing to run; write it behind --, as in: -- -m calm_jax.train --config configs/finetune.py")
    if given.processes < 1 or given.restarts < 0:
        parser.error("--processes is at least 1 and --restarts at least 0")
    return Supervisor(command, given.processes, given.restarts, given.grace).run()


if __name__ == "__main__":
    sys.exit(main())
