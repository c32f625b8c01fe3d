"""Several processes of one job, as the launchers start them: what one process learns, and what a killed one costs."""

from __future__ import annotations

import copy
import pathlib
import shutil
import subprocess
import sys
import time

import miniature
import numpy as np
import psutil
import pytest

from calm_jax.checkpoints import array_io, on_disk
from calm_jax.errors import ConfigError
from calm_jax.training import logging as logs
from calm_jax.training import processes

VALUES = copy.deepcopy(miniature.SMALL)
STEPS = 12
VALUES["processes"]["generic"] |= {"batch": 8, "steps": STEPS, "eval_every": STEPS // 2}
MESHES = [(4, ("--config.mesh.fsdp=2", "--config.mesh.tensor=2"))]  # devices of one process, and how they lie
if miniature.THOROUGH:
    MESHES += [(1, ()), (2, ()), (8, ("--config.mesh.data=2", "--config.mesh.fsdp=-1"))]
SPEED = ("examples_per_s", "tokens_per_s")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.getbasetemp() / "compiled"


def supervised(workdir: pathlib.Path, *, count: int = 2) -> list[str]:
    return [sys.executable, "-m", "calm_jax.supervise", "--processes", str(count), "--",
            *miniature.command(workdir, values=VALUES)[1:]]


def started(arguments: list[str], cache: pathlib.Path, devices: int = 4) -> subprocess.Popen:
    return subprocess.Popen(arguments, cwd=miniature.ROOT, env=miniature.environment(cache, devices), text=True,
                            stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def learned(workdir: pathlib.Path) -> list[dict]:
    """All metrics but speeds."""
    return [{name: value for name, value in row.items() if name not in SPEED}
            for row in logs.read(workdir / "metrics.jsonl")]


def parameters(workdir: pathlib.Path) -> dict[str, np.ndarray]:
    saved = on_disk.read(on_disk.folders(workdir / "checkpoints" / "generic")[-1])
    return {path: np.asarray(array.read().result()) for path, array in array_io.stored(saved).items()}


def child(supervisor: subprocess.Popen, number: int) -> psutil.Process:
    return next(process for process in psutil.Process(supervisor.pid).children()
                if process.environ().get(processes.INDEX) == str(number))


def wait_for_step(process: subprocess.Popen, workdir: pathlib.Path, step: int) -> None:
    """Until that many steps are logged and a checkpoint is complete."""
    end = time.monotonic() + 300
    while time.monotonic() < end:
        assert process.poll() is None, process.stderr.read()
        path = workdir / "metrics.jsonl"
        if path.is_file() and path.read_text().count('"train"') >= step and any(
                map(on_disk.is_complete, on_disk.folders(workdir / "checkpoints" / "generic"))):
            return
        time.sleep(0.02)
    raise AssertionError("nothing was trained")


@pytest.fixture(scope="module")
def straight(tmp_path_factory, cache) -> pathlib.Path:
    """The workdir of two processes that nothing disturbed."""
    workdir = tmp_path_factory.mktemp("straight") / "run"
    done = miniature.run(supervised(workdir), miniature.environment(cache, 4))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "8 x cpu of 2 process(es)" in done.stderr
    return workdir


def test_two_processes_learn_what_one_learns(straight, tmp_path, cache):
    done = miniature.run(miniature.command(tmp_path / "one", values=VALUES), miniature.environment(cache, 8))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = learned(tmp_path / "one"), learned(straight)
    assert len(one) == len(two) == STEPS + 2
    for a, b in zip(one, two, strict=True):
        assert (a["step"], a["kind"]) == (b["step"], b["kind"])
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5) and a.get("tokens") == b.get("tokens")


@pytest.mark.slow
def test_a_killed_process_is_named_and_the_run_resumes_exactly(straight, tmp_path, cache):
    workdir = tmp_path / "run"
    running = started(supervised(workdir), cache)
    wait_for_step(running, workdir, 6)
    victim = child(running, 1)
    begin = time.monotonic()
    victim.kill()
    lines = []
    for line in running.stderr:
        lines.append(line)
        if line.startswith("supervisor:"):
            break
    assert time.monotonic() - begin < 60
    assert f"process 1 of 2 (pid {victim.pid}) was killed by SIGKILL" in lines[-1], "".join(lines[-20:])
    rest = running.communicate(timeout=600)[1]
    assert running.returncode == 0, rest[-3000:]
    assert "all processes begin again (crash 1, 4 more are accepted)" in rest and "resumes after step" in rest
    assert learned(workdir) == learned(straight)
    for path, value in parameters(straight).items():
        np.testing.assert_array_equal(parameters(workdir)[path], value, err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["one", "supervisor"])
def test_a_signal_to_stop_makes_all_save_the_same_step(straight, tmp_path, cache, whom):
    workdir = tmp_path / "run"
    running = started(supervised(workdir), cache)
    wait_for_step(running, workdir, 5)
    (child(running, 1) if whom == "one" else psutil.Process(running.pid)).terminate()
    text = running.communicate(timeout=600)[1]
    assert running.returncode == 143, text[-3000:]
    saved = on_disk.read(on_disk.folders(workdir / "checkpoints" / "generic")[-1])
    assert 5 <= saved.step < STEPS and f"saved step {saved.step}" in text
    assert max(row["step"] for row in learned(workdir)) == saved.step
    done = miniature.run(supervised(workdir), miniature.environment(cache, 4))
    assert done.returncode == 0, done.stderr[-3000:]
    assert learned(workdir) == learned(straight)


@miniature.sweeps
def test_what_one_mesh_saved_another_goes_on_with(straight, tmp_path, cache):
    """Two processes of four devices saved step 8; one process of 1 to 8 devices, and other meshes, go on."""
    whole = {row["step"]: row["loss"] for row in learned(straight) if row["kind"] == "train"}
    for devices, mesh in MESHES:
        workdir = tmp_path / f"{devices}"
        shutil.copytree(straight, workdir)
        for folder in on_disk.folders(workdir / "checkpoints" / "generic"):
            if int(folder.name) > 8:
                shutil.rmtree(folder)
        assert on_disk.folders(workdir / "checkpoints" / "generic")
        done = miniature.run(miniature.command(workdir, *mesh, values=VALUES), miniature.environment(cache, devices))
        assert done.returncode == 0, done.stderr[-3000:]
        assert "resumes after step 8" in done.stdout
        again = {row["step"]: row["loss"] for row in learned(workdir) if row["kind"] == "train"}
        assert again.keys() == whole.keys()
        assert all(again[step] == pytest.approx(whole[step], abs=2e-5) for step in whole)


# ---- the environment ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("environment", "found"), [
    ({}, ""), ({"CALM_COORDINATOR": "a:1", "CALM_PROCESSES": "2", "CALM_PROCESS": "1"}, "CALM_COORDINATOR"),
    ({"CALM_COORDINATOR": "a:1", "CALM_PROCESSES": "1", "CALM_PROCESS": "0"}, ""),
    ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4"}, "SLURM"),
    ({"SLURM_NTASKS": "4"}, ""),  # the batch script itself, not a task
    ({"SLURM_NTASKS": "1", "SLURM_PROCID": "0"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, "TPU_WORKER_HOSTNAMES"), ({"TPU_WORKER_HOSTNAMES": "localhost"}, ""),
    ({"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_COORDINATOR_ADDRESS": "b"}, "MEGASCALE")])
def test_jobs_are_found_in_the_environment(environment, found):
    assert processes.described(environment) == found


@pytest.mark.parametrize("environment", [
    {"CALM_PROCESSES": "2"}, {"CALM_COORDINATOR": "a:1", "CALM_PROCESSES": "2", "CALM_PROCESS": "2"},
    {"CALM_COORDINATOR": "a:1", "CALM_PROCESSES": "two", "CALM_PROCESS": "0"}])
def test_a_half_described_job_is_refused(environment):
    with pytest.raises(ConfigError, match="go together"):
        processes.described(environment)
    assert processes.join("off", environment) == ""



# ---- beginning from other adapters -------------------------------------------------------------------------------


@pytest.mark.slow
def test_several_processes_merge_the_adapters_that_one_has_trained(tmp_path, cache):
    """Two processes of four devices learn from a base what one device learns, and both read the same model later."""
    values = copy.deepcopy(VALUES)
    values["processes"]["generic"] |= {"steps": 2, "eval_every": 0}
    values["model"]["lora"] = {"rank": 2, "alpha": 40.0}
    done = miniature.run(miniature.command(tmp_path / "base", values=values), miniature.environment(cache))
    assert done.returncode == 0, done.stderr[-3000:]
    values["model"]["lora"] = {"rank": 3, "alpha": 6.0, "dropout": 0.0}
    values["init"] = str(tmp_path / "base")
    values["processes"]["generic"] |= {"train": (r".*/lora/(a|b)",), "freeze": (
        r"encoder/.*", r"mfam/.*", r"decoder/(?!.*/lora/).*")}
    command = miniature.command(tmp_path / "one", values=values)
    one = miniature.run(command, miniature.environment(cache))
    many = miniature.run([command[0], "-m", "calm_jax.supervise", "--processes", "2", "--", *miniature.command(
        tmp_path / "two", values=values)[1:]], miniature.environment(cache, 4))
    for done in (one, many):
        assert done.returncode == 0, done.stderr[-3000:]
        assert (done.stdout + done.stderr).count("merged into") == 1
    alone, together = parameters(tmp_path / "one"), parameters(tmp_path / "two")
    assert alone.keys() == together.keys() and all("/lora/" in path for path in alone)
    for path, value in alone.items():
        np.testing.assert_allclose(together[path], value, atol=1e-4, err_msg=path)
