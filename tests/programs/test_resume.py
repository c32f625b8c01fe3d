"""A training run that is killed, terminated or damaged anywhere and started again ends bit for bit as an unbroken one.

Real processes of the training program on the demo dataset, with a model so small that a restart costs seconds.
"""

from __future__ import annotations

import logging
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import jax
import miniature
import numpy as np
import orbax.checkpoint as ocp
import pytest

from calm_jax import config as config_lib
from calm_jax.checkpoints import locate, on_disk
from calm_jax.checkpoints.meta import ARRAYS, Saved
from calm_jax.checkpoints.store import Checkpoints
from calm_jax.errors import CheckpointError
from calm_jax.training import logging as logs

STEPS = miniature.SMALL["processes"]["generic"]["steps"]
KILLS = 10 if miniature.THOROUGH else 5
SPEED = ("examples_per_s", "tokens_per_s")


@pytest.fixture(scope="module")
def env(tmp_path_factory) -> dict[str, str]:
    return miniature.environment(tmp_path_factory.getbasetemp() / "compiled")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, env) -> Path:
    """The workdir of a run that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    finish(workdir, env)
    return workdir


def folder(workdir: Path) -> Path:
    return workdir / "checkpoints" / "generic"


def finish(workdir: Path, env) -> subprocess.CompletedProcess:
    done = miniature.run(miniature.command(workdir), env)
    assert done.returncode == 0, done.stderr
    return done


def begin(workdir: Path, env) -> subprocess.Popen:
    return subprocess.Popen(miniature.command(workdir), cwd=miniature.ROOT, env=env, text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def wait_for(process: subprocess.Popen, happened, pause: float = 0.01) -> bool:
    """False when the process ended before."""
    while process.poll() is None:
        if happened():
            return True
        time.sleep(pause)
    return False


def grows(workdir: Path):
    """A function that says whether a step was logged since its last call; lines cut at the start do not confuse it."""
    path = workdir / "metrics.jsonl"
    size = lambda: path.stat().st_size if path.is_file() else 0  # noqa: E731
    known = [size()]

    def happened():
        before, known[0] = known[0], size()
        return known[0] > before

    return happened


def reaches(workdir: Path, step: int):
    """A function that says whether that step is logged."""
    return lambda: f'"step": {step},' in ((workdir / "metrics.jsonl").read_text()
                                          if (workdir / "metrics.jsonl").is_file() else "")


def saving(workdir: Path):
    """A function that says whether a checkpoint is being written now."""
    return lambda: any(not on_disk.is_complete(path) for path in on_disk.folders(folder(workdir)))


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the last checkpoint, parameters and optimizer state, by its path."""
    saved = on_disk.read(folder(workdir) / f"{STEPS:08d}")
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as orbax:
        tree = orbax.restore(saved.path / ARRAYS)
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def records(workdir: Path) -> list[dict]:
    return [{name: value for name, value in record.items() if name not in SPEED}
            for record in logs.read(workdir / "metrics.jsonl")]


def assert_identical(workdir: Path, straight: Path) -> None:
    ours, theirs = arrays(workdir), arrays(straight)
    assert ours.keys() == theirs.keys() and len(ours) > 200
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and value.tobytes() == theirs[name].tobytes(), name
    assert records(workdir) == records(straight)
    trained = [record["step"] for record in records(workdir) if record["kind"] == "train"]
    assert trained == list(range(1, STEPS + 1))
    assert on_disk.best_step(folder(workdir)) == on_disk.best_step(folder(straight))


def test_an_unbroken_run_learns_and_keeps_what_it_should(straight):
    losses = [record["loss"] for record in records(straight) if record["kind"] == "train"]
    assert np.mean(losses[-3:]) < np.mean(losses[:3]) - 1
    best = on_disk.best_step(folder(straight))
    assert {path.name for path in on_disk.folders(folder(straight))} == {
        f"{step:08d}" for step in (28, STEPS, best)}
    assert locate.find(straight).step == best


def test_a_run_killed_after_ten_steps_ends_like_an_unbroken_one(straight, env, tmp_path):
    process = begin(tmp_path / "run", env)
    assert wait_for(process, reaches(tmp_path / "run", 10))
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert not (folder(tmp_path / "run") / f"{STEPS:08d}").exists()
    done = finish(tmp_path / "run", env)
    assert "resumes after step" in done.stdout
    assert_identical(tmp_path / "run", straight)


@pytest.mark.slow
def test_random_kills_also_while_checkpoints_are_written_leave_no_trace(straight, env, tmp_path):
    rng = random.Random(0)
    number, killed, during, reached = 0, 0, 0, []
    workdir = tmp_path / "run0"
    while killed < KILLS:
        process = begin(workdir, env)
        # Not while Python still imports, which says little; every kill some steps behind the one before it.
        alive = wait_for(process, grows(workdir))
        step = min((STEPS // KILLS - 1) * killed + rng.randint(1, 6), STEPS - 2)
        alive = alive and wait_for(process, reaches(workdir, step))
        if alive and killed % 2:
            alive = wait_for(process, saving(workdir), pause=0.002)
        if alive:
            time.sleep(rng.uniform(0, 0.3))
            alive = process.poll() is None
        process.kill()
        if process.wait() == -signal.SIGKILL and alive:
            killed += 1
            during += saving(workdir)()
            reached.append(records(workdir)[-1]["step"])
        else:  # it was complete before it could be killed: go on in another workdir
            assert process.returncode == 0, process.stderr.read()
            assert_identical(workdir, straight)
            number += 1
            workdir = tmp_path / f"run{number}"
    print(f"{killed} kills at steps {reached}, {during} while a checkpoint was written, {number + 1} workdir(s)")
    assert during >= 1 and max(reached) > STEPS / 2
    finish(workdir, env)
    assert_identical(workdir, straight)
    assert all(on_disk.is_complete(path) for path in on_disk.folders(folder(workdir)))


def test_sigterm_saves_says_where_and_exits_with_143(straight, env, tmp_path):
    workdir = tmp_path / "run"
    process = begin(workdir, env)
    assert wait_for(process, reaches(workdir, 5))
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    saved = on_disk.folders(folder(workdir))[-1]
    assert on_disk.is_complete(saved)
    assert f"SIGTERM: saved step {int(saved.name)} in {folder(workdir)}" in stderr
    assert "the same command resumes there" in stderr and "Traceback" not in stderr
    done = finish(workdir, env)
    assert f"resumes after step {int(saved.name)} from {saved}" in done.stdout
    assert_identical(workdir, straight)


def test_a_damaged_newest_checkpoint_is_named_and_the_one_before_it_used(straight, env, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(straight, workdir)
    victim = max((path for path in (folder(workdir) / f"{STEPS:08d}" / "arrays").rglob("d/*")),
                 key=lambda path: path.stat().st_size)
    flip(victim, victim.stat().st_size // 2)
    done = finish(workdir, env)
    assert f"{STEPS:08d} is damaged" in done.stderr and f"{victim.name} was changed" in done.stderr
    assert "resumes after step 28" in done.stdout
    assert_identical(workdir, straight)
    again = finish(workdir, env)  # and once complete, the same command changes nothing
    assert f"complete ({STEPS} steps)" in again.stdout
    assert_identical(workdir, straight)


# ---- every kind of damage, in this process ----------------------------------------------------------------------


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def latest(where: Path) -> Saved | None:
    store = Checkpoints(where, config_lib.Checkpoint())
    try:
        return store.latest()
    finally:
        store.close()


@pytest.fixture
def two(straight, tmp_path) -> Path:
    """A copy of the process's folder with its two newest checkpoints."""
    where = tmp_path / "generic"
    for step in (28, STEPS):
        shutil.copytree(folder(straight) / f"{step:08d}", where / f"{step:08d}")
    return where


def test_one_flipped_byte_in_any_file_is_found(two):
    newest = two / f"{STEPS:08d}"
    files = [path for path in newest.rglob("*") if path.is_file() and path.stat().st_size]
    assert {"COMPLETE.json", "meta.json", "manifest.ocdbt", "_METADATA"} <= {path.name for path in files}
    for path in files:
        size = path.stat().st_size
        for at in {0, size // 2, size - 1} | (set(range(0, size, 101)) if path.name == "COMPLETE.json" else set()):
            flip(path, at)
            with pytest.raises(CheckpointError, match=str(newest)):
                on_disk.read(newest)
            flip(path, at)
    assert on_disk.read(newest).step == STEPS


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(("file", "harm", "said"), [
    ("COMPLETE.json", truncate, "incomplete or its COMPLETE.json is damaged"),
    ("COMPLETE.json", lambda path: path.write_text("{}"), "incomplete or its COMPLETE.json is damaged"),
    ("meta.json", lambda path: flip(path, 40), "meta.json was changed"),
    ("meta.json", Path.unlink, "meta.json is missing"),
    ("arrays/manifest.ocdbt", truncate, "arrays/manifest.ocdbt has [0-9]+ bytes instead of [0-9]+"),
    ("arrays/_METADATA", lambda path: path.write_text(""), "arrays/_METADATA has 0 bytes"),
    ("arrays", lambda path: shutil.rmtree(path / "d"), "arrays/d/[0-9a-f]+ is missing"),
])
def test_damage_is_named_and_the_checkpoint_before_it_used(two, caplog, file, harm, said):
    harm(two / f"{STEPS:08d}" / file)
    with pytest.raises(CheckpointError, match=said):
        on_disk.read(two / f"{STEPS:08d}")
    with pytest.raises(CheckpointError, match=said):
        locate.find(two)
    with caplog.at_level(logging.WARNING):
        assert latest(two).step == 28
    assert str(two / f"{STEPS:08d}") in caplog.text and "trying the one before it" in caplog.text
    assert len(list(two.glob(f"{STEPS:08d}.damaged-*"))) == 1


def test_a_checkpoint_without_its_marker_does_not_exist(two):
    (two / f"{STEPS:08d}" / "COMPLETE.json").unlink()
    assert locate.find(two).step == 28
    assert latest(two).step == 28
    assert not (two / f"{STEPS:08d}").exists()
    (two / "00000028" / "COMPLETE.json").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint"):
        locate.find(two)
    assert latest(two) is None  # nothing was ever complete: the process starts at its beginning


def test_when_every_checkpoint_is_damaged_the_run_stops_and_nothing_is_deleted(two):
    for path in on_disk.folders(two):
        flip(path / "meta.json", 0)
    for _ in range(2):  # the second try must not take the empty folder for a fresh start
        with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged; they were set aside"):
            latest(two)
    assert len(list(two.glob("*.damaged-*"))) == 2


def test_a_best_mark_lost_in_a_crash_is_written_again(two, straight):
    newest = on_disk.read(two / f"{STEPS:08d}")
    assert not (two / "best.json").exists()
    assert latest(two).step == STEPS
    assert (on_disk.best_step(two) == STEPS) == newest.meta["is_best"]
    (two / "best.json").write_text("{")
    assert locate.find(two).step == STEPS  # a damaged mark: the newest
