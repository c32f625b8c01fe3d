"""A command in; the same command as the processes of one job, started again after a crash or a standstill, out.

    python -m calm_jax.supervise [--processes N] [--restarts 5] -- -m calm_jax.train --config configs/finetune.py:7b

What stands behind `--` is given to this Python. On one host the N processes are joined over loopback; on a host of a
larger job (SLURM, GKE, a TPU pod) one process is watched, which finds the others by its environment. A process that
dies is named, the others are stopped, and all begin again: training goes on from its last checkpoint. One that does no
step for `--stall` seconds, or no first step within `--startup`, is made to show the stacks of its threads, and ends in
the same way. SIGTERM, SIGHUP and Ctrl-C are passed on, once; the processes save one and the same step.

Exit codes: 0 done; 143 (129, 130) stopped and saved; 2 what was asked for is wrong, and 3 training itself cannot go on,
such as a loss that is not finite: neither is tried again, as the same would come of it; 1 given up, after so many
restarts without a new checkpoint between them.
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
import tempfile
import threading
import time
from collections.abc import Sequence

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # that ask to stop
STOPPED = tuple(128 + number for number in SIGNALS)
POINTLESS = (2, 3)  # exit codes of what would end in the same way if it were started again
SETTLE = 3.0  # seconds in which the deaths that follow from one death are seen
DUMPING = 1.0  # seconds to write the stacks of all threads in
TICK = 0.1  # seconds between two looks at the processes
TAIL = 200  # last lines of a process that are kept, to find out which peer it missed
MISSED = re.compile(r"/task:(\d+)")

# Threads of XLA's CPU programs where several processes share a host. A collective keeps the thread that waits in it:
# with no more threads than cores or devices all of them come to wait, and what they wait for never runs.
THREADS = 64


class Log:
    """The supervisor's stderr, which all threads write to: whole lines begin at the left, also where a progress bar,
    which ends without a newline, was the last that was written. When its reader is gone, the processes go on unheard.
    """

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
        try:
            sys.stderr.buffer.write(data)
            sys.stderr.buffer.flush()
        except OSError:
            # What still is in the buffer, and all that follows, goes nowhere, instead of failing again.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        self._at_left = data.endswith(b"\n")


LOG = Log()


class Process:
    """One process of the job: what it writes is passed on, with its number before it where there are several.

    To be made in the main thread: the kernel tells the process when the thread that made it is gone.
    """

    def __init__(self, number: int, count: int, command: Sequence[str], environment: dict[str, str], folder: str):
        self.number, self.count = number, count
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL)
        self._progress = os.path.join(folder, f"progress-{number}")
        self._seen, self._when = b"", time.monotonic()  # the last of its words about progress, and when they came
        environment = environment | {"CALM_SUPERVISOR": str(os.getpid()), "CALM_PROGRESS": self._progress}
        with open(self._progress, "wb"):
            pass  # what an earlier process wrote does not count
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

    def look(self) -> None:
        """Notes whether it has got on."""
        with open(self._progress, "rb") as file:
            now = file.read()
        if now != self._seen:
            self._seen, self._when = now, time.monotonic()

    def _words(self) -> tuple[int, int, int] | None:
        words = self._seen.split()
        return tuple(map(int, words[:3])) if len(words) == 4 else None

    @property
    def began(self) -> tuple[int, int]:
        """(number of the training process, step of the checkpoint) from which it went on, for one to follow another."""
        words = self._words()
        return words[:2] if words else (-1, 0)

    def stands(self, startup: float, stall: float) -> str:
        """In words, for how long it has done nothing, if that is too long; a limit of 0 is none."""
        words = self._words()
        training = words is not None and words[2] > words[1]
        limit, silence = stall if training else startup, time.monotonic() - self._when
        if not limit or silence <= limit:
            return ""
        return (f"has done no step for {silence:.0f} seconds, the last was {words[2]}" if training else
                f"has not come to its first step within {silence:.0f} seconds")

    def send(self, number: int) -> None:
        if self.code is None:
            self.child.send_signal(number)

    def end(self) -> None:
        """Kills it, if it still is there, and waits for its last words."""
        if self.code is None:
            self.child.kill()
        self.child.wait()
        self._pump.join(timeout=5)

    @property
    def name(self) -> str:
        return f"process {self.number} of {self.count} (pid {self.child.pid})"

    def how(self) -> str:
        """How it ended, in words."""
        code = self.child.returncode
        return f"{self.name} {f'was killed by {_signal(-code)}' if code < 0 else f'ended with exit code {code}'}"


def _signal(number: int) -> str:
    return next((known.name for known in signal.Signals if known == number), f"signal {number}")


class Supervisor:
    """Runs the job until it is done, stopped, wrong, or has crashed too often; `run` returns the exit code.

    Args:
      restarts: crashes that are answered by a new start, without a new checkpoint between them.
      grace: seconds to save in when told to stop.
      startup, stall: seconds without a first step, and without another one, after which it counts as crashed; 0 =
        never.
    """

    def __init__(self, command: Sequence[str], processes: int, restarts: int, grace: float, startup: float,
                 stall: float):
        self.command, self.count, self.restarts, self.grace = command, processes, restarts, grace
        self.startup, self.stall = startup, stall
        self.told: list[int] = []  # the signals that came
        self._passed = 0  # how many of them were passed on
        self.processes: list[Process] = []

    def run(self) -> int:
        note = lambda number, _: self.told.append(number)  # noqa: E731
        before = {number: signal.signal(number, note) for number in SIGNALS
                  if signal.getsignal(number) != signal.SIG_IGN}  # nohup wants to be ignored
        try:
            return self._run()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _run(self) -> int:
        crashes, best = 0, (-1, 0)
        with tempfile.TemporaryDirectory(prefix="calm-supervise-") as folder:
            while True:
                self._start(folder)
                code = self._watch()
                if code is not None:
                    return code
                if self.told:
                    say("stopped while starting again")
                    return 128 + self.told[0]
                began = max(process.began for process in self.processes)
                crashes, best = (1, began) if began > best else (crashes + 1, best)
                if crashes > self.restarts:
                    say(f"given up after {crashes} crashes without a new checkpoint between them; the messages above "
                        "say why, and the same command goes on from the last checkpoint")
                    return 1
                say(f"all processes begin again (crash {crashes}, {self.restarts - crashes} more are accepted)")

    def _start(self, folder: str) -> None:
        shared = dict(os.environ)
        if self.count > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                shared |= {"CALM_COORDINATOR": f"127.0.0.1:{free.getsockname()[1]}", "CALM_PROCESSES": str(self.count),
                           "PJRT_NPROC": str(THREADS), "NPROC": str(THREADS)}
        self.processes, self._passed = [], 0
        for number in range(self.count):
            own = {"CALM_PROCESS": str(number)} if self.count > 1 else {}
            self.processes.append(Process(number, self.count, self.command, shared | own, folder))

    def _tick(self) -> None:
        """Waits a little, looks for progress and passes signals on: the first as SIGTERM, a second one kills. Handlers
        only note them, so that none is lost that comes while processes are being started."""
        time.sleep(TICK)
        for process in self.processes:
            process.look()
        if len(self.told) > self._passed:
            for process in self.processes:
                process.send(signal.SIGTERM if len(self.told) == 1 else signal.SIGKILL)
            self._passed = len(self.told)

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
                    return 128 + self.told[0]
                if deadline is None and self._stands():
                    return None
                self._tick()
        finally:
            for process in self.processes:
                process.end()

    def _stands(self) -> bool:
        """Whether a process has stood still for too long; if so, all have shown their stacks."""
        standing = [(process, process.stands(self.startup, self.stall)) for process in self.processes]
        if not any(words for _, words in standing):
            return False
        found = "; ".join(f"{process.name} {words}" for process, words in standing if words)
        say(f"{found}; the stacks of all threads follow")
        for process in self.processes:
            process.send(signal.SIGUSR1)
        time.sleep(DUMPING)
        return True

    def _judge(self) -> int | None:
        """What to do when one has failed, after the others had time to follow."""
        begin = time.monotonic()
        while any(process.code is None for process in self.processes):
            saving = any(process.code in STOPPED for process in self.processes)
            if time.monotonic() > begin + (self.grace if saving else SETTLE):
                break
            self._tick()
        failed = [process for process in self.processes if process.code not in (None, 0)]
        for code in (*POINTLESS, *STOPPED):
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


def say(text: str) -> None:
    LOG.line(f"supervisor: {text}")


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds")
    return value


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m calm_jax.supervise", description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=1, help="processes on this host, joined over loopback")
    parser.add_argument("--restarts", type=int, default=5,
                        help="crashes that are answered by a new start, without a new checkpoint between them")
    parser.add_argument("--grace", type=_seconds, default=600.0, help="seconds to save in when told to stop")
    parser.add_argument("--stall", type=_seconds, default=1800.0,
                        help="seconds without a step after which it is started again; 0 = never")
    parser.add_argument("--startup", type=_seconds, default=7200.0,
                        help="seconds to come to a first step in, compilation included; 0 = as long as it takes, for "
                        "programs other than calm_jax.train")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and what to give to Python")
    given = parser.parse_args(argv)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not command:
        parser.error("nothing to run; write it behind --, as in: -- -m calm_jax.train --config configs/finetune.py")
    if given.processes < 1 or given.restarts < 0:
        parser.error("--processes is at least 1 and --restarts at least 0")
    return Supervisor(command, given.processes, given.restarts, given.grace, given.startup, given.stall).run()


if __name__ == "__main__":
    sys.exit(main())
