"""The supervisor: what it starts again and what it does not, standstills, signals, and readers that go away."""

from __future__ import annotations

import os
import pathlib
import signal
import subprocess
import sys
import time

import miniature
import psutil
import pytest

from calm_jax import supervise as program
from calm_jax.training import logging
from calm_jax.training import workdir as workdirs


def supervise(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "calm_jax.supervise", *words], cwd=miniature.ROOT, text=True,
                          capture_output=True, timeout=120, **options)


def test_what_is_wrong_is_not_tried_again():
    done = supervise("--processes", "2", "--", "-m", "calm_jax.train", "--config", "configs/nothing.py",
                     env=miniature.environment())
    assert done.returncode == 2 and done.stderr.count("there is no configuration file") == 2
    assert "begin again" not in done.stderr
    for words in ((), ("--",), ("--processes", "0", "--", "-c", "1")):
        assert supervise(*words).returncode == 2


def test_a_job_that_always_crashes_is_given_up():
    done = supervise("--restarts", "2", "--", "-c", "import os; os.abort()")
    assert done.returncode == 1 and done.stderr.count("process 0 of 1 (pid ") == 3
    assert "was killed by SIGABRT" in done.stderr and "given up after 3 crashes" in done.stderr


def test_a_host_of_a_larger_job_says_which_peer_it_missed():
    words = "E0101 coordination_service.cc: The following tasks are unhealthy (stopped sending heartbeats):\\n" \
            "/job:jax_worker/replica:0/task:3"
    done = supervise("--restarts", "0", "--", "-c",
                     f"import os, sys; print('''{words}''', file=sys.stderr, flush=True); os.abort()")
    assert done.returncode == 1 and "it missed process 3 of its job" in done.stderr


def test_a_line_is_not_written_behind_a_progress_bar():
    """A bar ends without a newline; what another process and the supervisor say still begins at the left."""
    program = ("import os, sys, time; first = os.environ['CALM_PROCESS'] == '0'; "
               "sys.stderr.write('\\r 42%|####' if first else ''); sys.stderr.flush(); time.sleep(1); "
               "first or print('a word', file=sys.stderr, flush=True); first or os.abort(); time.sleep(100)")
    done = supervise("--processes", "2", "--restarts", "0", "--", "-c", program)
    lines = done.stderr.splitlines()
    assert done.returncode == 1 and " 42%|####" in lines and "[process 1] a word" in lines
    assert any(line.startswith("supervisor: process 1 of 2 (pid ") for line in lines)


# ---- programs that take the place of training -----------------------------------------------------------------------

# What a training process says of itself: where it is, from which step it began, and the step it is in.
SAYS = "import os, sys, time\ndef says(line): open(os.environ['CALM_PROGRESS'], 'w').write(line)\n"


def wait_for(path: pathlib.Path) -> str:
    """The content of a file, when it has some."""
    end = time.monotonic() + 60
    while not (path.is_file() and path.read_text()):
        assert time.monotonic() < end, path
        time.sleep(0.02)
    return path.read_text()


@pytest.mark.parametrize(("says", "limit"), [("says('0 0 1 7')", "--stall=1"), ("says('0 4 4 7')", "--startup=4")])
def test_one_that_stands_still_shows_where_and_ends(says, limit):
    child = (f"{SAYS}import faulthandler, signal\nfaulthandler.register(signal.SIGUSR1)\n"
             f"def stuck_here(): {says}; time.sleep(100)\nstuck_here()")
    begin = time.monotonic()
    done = supervise("--restarts", "0", "--startup", "50", "--stall", "50", limit, "--", "-c", child)
    assert done.returncode == 1 and time.monotonic() - begin < 40
    assert "process 0 of 1 (pid " in done.stderr and "in stuck_here" in done.stderr


def test_one_that_gets_on_is_left_alone():
    child = f"{SAYS}for n in range(16): says(f'0 0 {{n}} {{n}}'); time.sleep(0.25)"
    assert supervise("--restarts", "0", "--stall", "3", "--", "-c", child).returncode == 0


def test_restarts_are_counted_anew_behind_a_new_checkpoint_and_bounded_without(tmp_path):
    """It crashes at every start; one in which each start goes on from a later step may do so more often."""
    child = (f"{SAYS}path = sys.argv[1]; n = int(open(path).read() or 0) + 1; open(path, 'w').write(str(n))\n"
             "says(f'0 {n * int(sys.argv[2])} {n * 10} 1'); time.sleep(0.3); n < 5 and os.abort()")
    for gain, code, starts in (("3", 0, 5), ("0", 1, 3)):
        (tmp_path / gain).touch()
        done = supervise("--restarts", "2", "--", "-c", child, str(tmp_path / gain), gain)
        assert done.returncode == code and (tmp_path / gain).read_text() == str(starts), done.stderr
    assert "given up" in done.stderr


@pytest.mark.parametrize("code", [2, 3])
def test_what_would_end_in_the_same_way_is_not_tried_again(tmp_path, code):
    child = f"import sys; open({str(tmp_path / 'starts')!r}, 'a').write('x'); sys.exit({code})"
    assert supervise("--", "-c", child).returncode == code
    assert (tmp_path / "starts").read_text() == "x"


def test_a_reader_that_goes_away_stops_nothing(tmp_path):
    child = (f"import sys, time\nfor _ in range(30): print('x' * 50_000, file=sys.stderr, flush=True)\n"
             f"open({str(tmp_path / 'end')!r}, 'w').write('done')")
    running = subprocess.Popen([sys.executable, "-m", "calm_jax.supervise", "--", "-c", child], cwd=miniature.ROOT,
                               stderr=subprocess.PIPE)
    running.stderr.read(10)
    running.stderr.close()
    assert running.wait(timeout=60) == 0 and (tmp_path / "end").read_text() == "done"


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM, signal.SIGINT])
def test_signals_that_ask_to_stop_reach_the_process_as_sigterm(tmp_path, number):
    child = ("import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(143)); "
             f"open({str(tmp_path / 'there')!r}, 'w').write('x'); time.sleep(100)")
    running = subprocess.Popen([sys.executable, "-m", "calm_jax.supervise", "--", "-c", child], cwd=miniature.ROOT,
                               stderr=subprocess.PIPE, text=True)
    wait_for(tmp_path / "there")
    running.send_signal(number)
    said = running.communicate(timeout=60)[1]
    assert running.returncode == 143 and "begin again" not in said


def test_a_signal_while_a_process_is_being_started_is_not_lost(monkeypatch, capfd):
    real, children = subprocess.Popen, []

    def signalled(*words, **options):
        os.kill(os.getpid(), signal.SIGTERM)
        children.append(real(*words, **options))
        return children[-1]

    monkeypatch.setattr(program.subprocess, "Popen", signalled)
    begin = time.monotonic()
    assert program.main(["--grace", "30", "--", "-c", "import time; time.sleep(100)"]) == 143
    assert time.monotonic() - begin < 20 and children[0].poll() is not None
    assert "begin again" not in capfd.readouterr().err


@pytest.mark.parametrize("count", [1, 2])
def test_processes_do_not_outlive_their_supervisor(tmp_path, count):
    """Children of a supervisor that was killed with -9 are told to stop."""
    child = ("import os, sys, time; from calm_jax.training import processes; processes.supervised(); "
             "open(sys.argv[1] + os.environ.get('CALM_PROCESS', '0'), 'w').write(str(os.getpid())); time.sleep(100)")
    running = subprocess.Popen([sys.executable, "-m", "calm_jax.supervise", "--processes", str(count), "--", "-c",
                                child, f"{tmp_path}/"], cwd=miniature.ROOT, env=miniature.environment())
    children = [int(wait_for(tmp_path / str(number))) for number in range(count)]
    running.kill()
    running.wait()
    gone(children)


def gone(children: list[int]) -> None:
    """Waits until these processes are not there any more."""
    end = time.monotonic() + 30
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in children):
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for_checkpoint(running: subprocess.Popen, checkpoints: pathlib.Path) -> None:
    end = time.monotonic() + 300
    while not list(checkpoints.glob("*/COMPLETE.json")):
        assert running.poll() is None and time.monotonic() < end, running.stderr.read()
        time.sleep(0.05)


# ---- training -------------------------------------------------------------------------------------------------------


def test_training_under_a_supervisor(tmp_path):
    """Nobody else may train in its workdir; it shows its stacks; it saves when its supervisor is killed."""
    workdir, environment = tmp_path / "run", miniature.environment()
    command = miniature.command(workdir, "--config.processes.generic.steps=5000")
    running = subprocess.Popen([sys.executable, "-m", "calm_jax.supervise", "--", *command[1:]], cwd=miniature.ROOT,
                               env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    checkpoints = workdir / "checkpoints" / "generic"
    wait_for_checkpoint(running, checkpoints)
    [child] = psutil.Process(running.pid).children()
    second = miniature.run(command, environment)
    assert second.returncode == 2 and second.stderr.count("\n") == 1, second.stderr
    assert str(workdir) in second.stderr and f"pid {child.pid} " in second.stderr
    child.send_signal(signal.SIGUSR1)
    lines = []
    while not any("in run_process" in line for line in lines):
        lines.append(running.stderr.readline())
        assert lines[-1], lines
    running.kill()
    running.wait()
    gone([child.pid])
    newest = max(int(path.parent.name) for path in checkpoints.glob("*/COMPLETE.json"))
    assert newest == max(row["step"] for row in logging.read(workdir / "metrics.jsonl") if row["kind"] == "train")
    with workdirs.held(workdir):  # the lock has not outlived its holder
        pass


@pytest.mark.parametrize(("main", "frame"), [
    ("def main_is_here(): print('ready', flush=True); time.sleep(100)\nmain_is_here()", "in main_is_here"),
    ("async def main():\n  asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, print)\n"
     "  print('ready', flush=True); await asyncio.sleep(100)\nasyncio.run(main())", "in run_forever")],
    ids=["native", "loop"])
def test_asking_for_stacks_shows_them_and_ends_no_process(main, frame):
    """Once for each time, whatever the main thread does: native code, or an event loop that hears of signals itself.
    Threads that call and return all the time are read while they stand still."""
    child = ("import asyncio, signal, threading, time\nfrom calm_jax.training import processes\n"
             "processes.supervised()\ndef deep(n): return n and deep(n - 1)\n"
             "def busy():\n  while True: deep(900)\n"
             f"for _ in range(3): threading.Thread(target=busy, daemon=True).start()\n{main}")
    running = subprocess.Popen([sys.executable, "-c", child], cwd=miniature.ROOT, env=miniature.environment(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert running.stdout.readline() == "ready\n"
    for _ in range(40):
        running.send_signal(signal.SIGUSR1)
        while frame not in (line := running.stderr.readline()):
            assert line, running.wait()
    assert running.poll() is None
    running.kill()
    said = running.communicate()[1]
    assert frame not in said


def test_training_that_cannot_go_on_has_an_exit_code_of_its_own():
    child = ("from calm_jax import guard; from calm_jax.errors import TrainingError\n"
             "def main(): raise TrainingError('the loss is nan')\nguard.run(main)")
    done = supervise("--", "-c", child, env=miniature.environment())
    assert done.returncode == 3 and done.stderr == "error: the loss is nan\n"


@pytest.mark.slow
def test_training_that_stands_still_is_started_again_and_goes_on(tmp_path):
    workdir = tmp_path / "run"
    words = ["--stall", "20", "--startup", "200", "--", *miniature.command(workdir)[1:]]
    running = subprocess.Popen([sys.executable, "-m", "calm_jax.supervise", *words], cwd=miniature.ROOT, text=True,
                               env=miniature.environment(), stderr=subprocess.PIPE)
    wait_for_checkpoint(running, workdir / "checkpoints" / "generic")
    [child] = psutil.Process(running.pid).children()
    child.send_signal(signal.SIGSTOP)
    said = running.communicate(timeout=600)[1]
    assert running.returncode == 0, said
    assert f"process 0 of 1 (pid {child.pid})" in said and "resumes after step" in said
    steps = [row["step"] for row in logging.read(workdir / "metrics.jsonl") if row["kind"] == "train"]
    assert steps == list(range(1, miniature.SMALL["processes"]["generic"]["steps"] + 1))
