"""Faults are injected into every program that writes: kills, full disks, closed pipes, folders that are read only.

Nothing complete is harmed, nothing incomplete is accepted, no traceback reaches a user, and the same command then ends
as if nothing had happened. CALM_THOROUGH=1: 200 kills; else 20.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import hashlib
import json
import pathlib
import random
import subprocess
import sys
import time
from collections.abc import Callable

import miniature
import numpy as np
import pytest
from PIL import Image

from calm_jax import config as config_lib
from calm_jax.checkpoints import array_io, locate, on_disk
from calm_jax.checkpoints.meta import MARKER
from calm_jax.convert import torch_files
from calm_jax.data.builders import stored
from calm_jax.errors import ConfigError

pytestmark = pytest.mark.slow
KILLS = (200 if miniature.THOROUGH else 20) // 5  # of each of the five programs
PICTURES = 60


@dataclasses.dataclass(frozen=True)
class Case:
    """A program that writes.

    Attributes:
      command: what starts it, writing to a place in a folder.
      check: raises where something incomplete in that folder would be accepted by a reader.
      content: of a complete result, to compare.
    """

    command: Callable[[pathlib.Path], list[str]]
    check: Callable[[pathlib.Path], None]
    content: Callable[[pathlib.Path], dict[str, bytes]]


def arrays(place: pathlib.Path) -> dict[str, bytes]:
    saved = locate.find(place)
    return {path: np.asarray(array.read().result()).tobytes() for path, array in array_io.stored(saved).items()}


def whole_checkpoints(folder: pathlib.Path) -> None:
    for marker in folder.rglob(MARKER):
        if ".partial" not in str(marker):
            on_disk.read(marker.parent)
    for log in folder.rglob("metrics.jsonl"):
        for line in log.read_text().split("\n")[:-1]:
            json.loads(line)


def whole_scores(folder: pathlib.Path) -> None:
    if (folder / "out.csv").exists():
        with open(folder / "out.csv", newline="") as stream:
            assert len([row for row in csv.DictReader(stream) if row["score"]]) == PICTURES
    if (folder / "out.csv.journal").exists():
        for line in (folder / "out.csv.journal").read_bytes().split(b"\n")[:-1]:
            json.loads(line)


def whole_data(folder: pathlib.Path) -> None:
    with contextlib.suppress(ConfigError):  # nothing that a reader accepts
        data = stored.Stored("folder", folder / "data")
        assert len(data) == PICTURES
        for index in range(len(data)):
            data.record(index)
            data.pixels(index)


def whole_export(folder: pathlib.Path) -> None:
    if (folder / "hf").exists():
        assert (folder / "hf" / "config.json").is_file()
        for tensor in torch_files.tensors(folder / "hf").values():
            tensor.read()


def bytes_below(folder: pathlib.Path, *patterns: str) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).digest()
            for pattern in patterns for path in sorted(folder.rglob(pattern)) if path.is_file()}


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """What the programs read: pictures, a checkpoint, and a folder of weights."""
    folder = tmp_path_factory.mktemp("sources")
    (folder / "photos").mkdir()
    for number in range(PICTURES):
        rng = np.random.default_rng(number)
        Image.fromarray(rng.integers(0, 255, (60, 70, 3), np.uint8)).save(folder / "photos" / f"{number:03d}.png")
    miniature.saved(folder / "run", config_lib.PARTS)
    import test_conversion  # here: it needs torch
    test_conversion.parts(folder)
    return folder


@pytest.fixture(scope="module")
def env(tmp_path_factory):
    return miniature.environment(tmp_path_factory.getbasetemp() / "compiled")


def cases(sources: pathlib.Path) -> dict[str, Case]:
    python = [sys.executable, "-m"]
    return {
        "train": Case(lambda to: miniature.command(to / "work"), whole_checkpoints, lambda to: arrays(to / "work")),
        "score": Case(lambda to: [*python, "calm_jax", "score", str(sources / "photos"), "--format", "csv",
                                  "--checkpoint", str(sources / "run"), "--batch", "4", "--out", str(to / "out.csv")],
                      whole_scores, lambda to: {"csv": (to / "out.csv").read_bytes()}),
        "prepare": Case(lambda to: [*python, "tools.prepare_data", "--dataset", "folder", "--source",
                                    str(sources / "photos"), "--data_dir", str(to / "data")],
                        whole_data, lambda to: bytes_below(to / "data", "*.array_record-*", "labels/*")),
        "convert": Case(lambda to: [*python, "tools.convert_from_hf", "--vit", str(sources / "vit"), "--llm",
                                    str(sources / "llm"), "--out", str(to / "calm")],
                        whole_checkpoints, lambda to: arrays(to / "calm")),
        "export": Case(lambda to: [*python, "tools.export_to_hf", "--checkpoint", str(sources / "run"), "--out",
                                   str(to / "hf")], whole_export, lambda to: bytes_below(to / "hf", "*")),
    }


NAMES = ("train", "score", "prepare", "convert", "export")


@pytest.fixture(scope="module")
def unbroken(sources, env, tmp_path_factory):
    """name -> (seconds, content, bytes on disk) of a run that nothing happened to."""
    known = {}

    def ask(name):
        if name not in known:
            for _ in range(2):  # the second finds its programs compiled
                folder = tmp_path_factory.mktemp(name)
                began = time.monotonic()
                done = miniature.run(cases(sources)[name].command(folder), env)
                assert done.returncode == 0, done.stderr
            size = sum(path.stat().st_blocks * 512 for path in folder.rglob("*") if path.is_file())
            known[name] = time.monotonic() - began, cases(sources)[name].content(folder), size
        return known[name]

    return ask


def sentences(text: str, code: int) -> None:
    """No traceback; and where it failed, an error is said.

    Of one kind alone there may be some: TensorStore writes them itself, past every hook of Python and several at once,
    where a write ends after another has failed on a full disk and Orbax has closed its loop. To be mended there.
    """
    assert text.count("Traceback") <= text.count("in call_soon_threadsafe"), text
    assert "Exception ignored" not in text, text
    assert code == 0 or "error: " in text, text


def there(folder: pathlib.Path) -> bool:
    """Whether a result is in its place that is put there whole, by its last step, and never overwritten."""
    return (folder / "calm").exists() or (folder / "hf").exists()


@pytest.mark.parametrize("name", NAMES)
def test_kills_at_any_time_leave_no_trace(name, sources, env, unbroken, tmp_path):
    case, (seconds, content, _) = cases(sources)[name], unbroken(name)
    rng, killed, finished, turn = random.Random(name), 0, 0, 0
    while killed < KILLS:
        folder = tmp_path / f"{turn}"
        folder.mkdir(exist_ok=True)
        process = subprocess.Popen(case.command(folder), cwd=miniature.ROOT, env=env, stdout=subprocess.DEVNULL,
                                   stderr=subprocess.PIPE, text=True, start_new_session=True)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=rng.uniform(0.3, 0.9) * seconds)
        process.kill()
        process.communicate()
        case.check(folder)
        killed += process.returncode != 0
        if process.returncode == 0 or there(folder):
            assert case.content(folder) == content
            finished += 1
            turn += 1
    folder.mkdir(exist_ok=True)
    if not there(folder):
        done = miniature.run(case.command(folder), env)
        assert done.returncode == 0, done.stderr
        sentences(done.stderr, 0)
    assert case.content(folder) == content
    print(f"{name}: {killed} kills, {finished} runs that came to their end between them")


@contextlib.contextmanager
def disk(folder: pathlib.Path, size: int):
    """A file system of its own in a folder, of so many bytes; gives a function that mounts it anew with options."""
    folder.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    if mount.returncode:
        pytest.skip(f"no file system can be mounted here: {mount.stderr.decode().strip()}")
    try:
        yield lambda how: subprocess.run(["mount", "-o", f"remount,{how}", str(folder)], check=True)
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_said_and_the_same_command_goes_on(name, sources, env, unbroken, tmp_path):
    case, (_, content, size) = cases(sources)[name], unbroken(name)
    full = 0
    for number, share in enumerate((0.02, 0.3, 0.6, 0.9) if miniature.THOROUGH else (0.02, 0.6)):
        folder = tmp_path / f"{number}"
        with disk(folder, max(int(share * size), 8192)) as again:
            done = miniature.run(case.command(folder), env)
            sentences(done.stderr, done.returncode)
            full += done.returncode != 0
            case.check(folder)
            again("size=1g")
            done = miniature.run(case.command(folder), env)
            assert done.returncode == 0, done.stderr
            assert case.content(folder) == content
    assert full


@pytest.mark.parametrize("name", NAMES)
def test_a_place_that_is_read_only_is_said(name, sources, env, tmp_path):
    with disk(tmp_path / "disk", 1 << 20) as again:
        again("ro")
        done = miniature.run(cases(sources)[name].command(tmp_path / "disk"), env)
        assert done.returncode not in (0, -6, -11) and str(tmp_path / "disk") in done.stderr
        sentences(done.stderr, done.returncode)
        assert not list((tmp_path / "disk").iterdir())


@pytest.mark.parametrize("name", NAMES)
def test_nobody_who_listens_is_no_reason_to_hang_or_to_harm(name, sources, env, unbroken, tmp_path):
    case, (seconds, content, _) = cases(sources)[name], unbroken(name)
    process = subprocess.Popen(case.command(tmp_path), cwd=miniature.ROOT, env=env, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)
    process.stdout.close()
    process.stderr.close()
    process.wait(timeout=30 + 10 * seconds)
    case.check(tmp_path)
    if not there(tmp_path):
        assert miniature.run(case.command(tmp_path), env).returncode == 0
    assert case.content(tmp_path) == content
