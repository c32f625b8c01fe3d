"""Commands of contenders in; their replies to the same questions, side by side on one machine, out. For `tools.bench`.

Every contender is a process of its own, so that its peak memory is its own. On CPU all of them live at once and take
turns question by question, so that whatever else the machine does meets all alike. On an accelerator one ends before
the next begins: its memory need not hold two models.

On a CPU all have their memory in large pages, as our own commands do (calm_jax/host_memory.py).

A contender says lines of JSON: what it runs on, what it has built, and a reply to each question that it is sent. One
that runs out of memory says so, which is a result like any other.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import pathlib
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from calm_jax import host_memory
from calm_jax.errors import ConfigError

# Unless the caller's environment says otherwise: JAX takes nearly all of a GPU's memory at once, so that nothing is
# lost to pieces between the buffers, and torch joins its pieces.
ENVIRONMENT = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95", "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True"}
OUT_OF_MEMORY = "out of memory"
SIGNS = ("resource_exhausted", OUT_OF_MEMORY, "can't allocate memory")


@dataclasses.dataclass
class Played:
    """What came of a contender: its `device`, what it has `built`, its replies by round and question; or its `error`,
    after which it was asked no more."""

    device: dict[str, Any]
    built: dict[str, Any] = dataclasses.field(default_factory=dict)
    rounds: list[list[dict]] = dataclasses.field(default_factory=list)
    error: str = ""


def compete(commands: Mapping[str, Sequence[str]], questions: Sequence[Any], rounds: int,
            say: Callable[[str], None] = print, *, twice: bool = False) -> dict[str, Played]:
    """Asks every contender all questions, round by round.

    Args:
      commands: name -> command line of its process, which runs `serve`.
      questions: JSON values, the arguments of what `serve` has built.
      twice: each is asked twice in a row, and the second reply counts, as in work without pauses: a virtual machine
        may have given the memory of who waited for seconds to its host, and clears it anew.

    Raises:
      ConfigError: a contender died of something else than memory, or two run on different devices.
    """
    found: dict[str, Played] = {}
    waiting = dict(commands)
    while waiting:
        workers: dict[str, _Worker] = {}
        try:
            for name in list(waiting):
                workers[name] = worker = _Worker(name, waiting.pop(name))
                found[name] = Played(worker.read())
                _same_device(found)
                _note(found[name], found[name].built, worker.read())
                if found[name].device["platform"] != "cpu":
                    break
            for number in range(rounds):
                for name in workers:
                    found[name].rounds.append([])
                for question in questions:
                    for name, worker in workers.items():
                        if not found[name].error:
                            reply: dict = {}
                            for _ in range(1 + twice):
                                if not found[name].error:
                                    _note(found[name], reply, worker.ask(question))
                            found[name].rounds[-1].append(reply)
                for name in workers:
                    took = sum(reply.get("seconds", 0.0) for reply in found[name].rounds[-1])
                    say(f"  round {number} of {rounds - 1}: {name:<10}" + (found[name].error or f"{took:>8.2f} s"))
        finally:
            for worker in workers.values():
                worker.end()
    return found


def _note(played: Played, into: dict, said: dict) -> None:
    into |= said
    played.error = said.get("error", "")


def _same_device(found: Mapping[str, Played]) -> None:
    kinds = {name: f"{played.device['count']} {played.device['platform']}" for name, played in found.items()}
    if len(set(kinds.values())) > 1:
        raise ConfigError(
            "contenders must share their device, and " + ", ".join(f"{name} has {kind}" for name, kind in kinds.items())
            + "; install both for the same one, and show one device alone (CUDA_VISIBLE_DEVICES=0)")


class _Worker:
    def __init__(self, name: str, command: Sequence[str]):
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                        env=ENVIRONMENT | os.environ | host_memory.settings(os.environ))

    def ask(self, question: Any) -> dict:
        with contextlib.suppress(BrokenPipeError):  # it has ended, and `read` says how
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
        return self.read()

    def read(self) -> dict:
        text = self.process.stdout.readline()
        if text:
            return json.loads(text)
        if self.process.wait() == -9:  # by the system: nobody else kills it while it is read from
            return {"error": OUT_OF_MEMORY}
        raise ConfigError(f"the contender {self.name} died; its message is above")

    def end(self) -> None:
        """Returns when its memory is free again."""
        self.process.kill()
        self.process.wait()
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.stdout.close()


# ---- inside a contender --------------------------------------------------------------------------------------------


def serve(side: str, build: Callable[[], tuple[Callable[..., Any], dict[str, Any]]]) -> None:
    """A contender's process: says its device, builds, and answers each line of standard input.

    Args:
      side: jax or torch.
      build: gives what answers a question's values with a JSON value, and facts about it.
    """
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no reply

    def tell(**values):
        print(json.dumps(values), file=replies, flush=True)

    tell(**device(side))
    try:
        begin = time.perf_counter()
        run, facts = build()
        tell(seconds=time.perf_counter() - begin, **facts)
        for line in sys.stdin:
            begin = time.perf_counter()
            value = run(*json.loads(line))
            tell(seconds=time.perf_counter() - begin, value=value, peak=peak(side))
    except Exception as error:
        if not isinstance(error, MemoryError) and not any(sign in str(error).lower() for sign in SIGNS):
            raise
        tell(error=OUT_OF_MEMORY)


def device(side: str) -> dict[str, Any]:
    """`platform` (cpu, gpu or tpu), `kind`, `count`, and `memory` that a program can use, bytes (None: not known)."""
    if side == "torch":
        import torch
        if torch.cuda.is_available():
            return {"platform": "gpu", "kind": torch.cuda.get_device_name(0), "count": torch.cuda.device_count(),
                    "memory": torch.cuda.get_device_properties(0).total_memory}
        return {"platform": "cpu", "kind": "cpu", "count": 1, "memory": None}
    import jax
    first = jax.devices()[0]
    count = 1 if first.platform == "cpu" else jax.device_count()
    return {"platform": first.platform, "kind": first.device_kind, "count": count,
            "memory": (first.memory_stats() or {}).get("bytes_limit")}


def peak(side: str) -> int:
    """The most memory that this process held, bytes: of the accelerator, else of the process."""
    if side == "torch":
        import torch
        if torch.cuda.is_available():
            return torch.cuda.max_memory_allocated()
    else:
        import jax
        stats = jax.devices()[0].memory_stats() or {}
        if "peak_bytes_in_use" in stats:
            return stats["peak_bytes_in_use"]
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# ---- outside -------------------------------------------------------------------------------------------------------


def probe() -> dict[str, Any]:
    """JAX's device, as a contender would say it, asked in a process that ends and holds nothing.

    Raises:
      ConfigError: JAX finds none.
    """
    code = "import json; from tools.bench import contenders; print(json.dumps(contenders.device('jax')))"
    done = subprocess.run([sys.executable, "-c", code], text=True, stdout=subprocess.PIPE, env=ENVIRONMENT | os.environ)
    if done.returncode:
        raise ConfigError("JAX finds no device; its message is above")
    return json.loads(done.stdout.splitlines()[-1])


def stay_on_cpu() -> None:
    """For the program that asks: what it counts itself, it counts on CPU, and the devices are the contenders'."""
    import jax
    jax.config.update("jax_platforms", "cpu")


def machine(device: Mapping[str, Any]) -> str:
    """What a table calls the machine."""
    if device["platform"] != "cpu":
        return (f"{device['count']} x " if device["count"] > 1 else "") + device["kind"]
    info = pathlib.Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")
             ] if info.is_file() else []
    return f"{os.cpu_count()} cores of {names[0] if names else platform.processor() or platform.machine()}"
