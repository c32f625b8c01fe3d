"""The package as its users install it: a wheel, in an environment and a folder that know nothing of the repository."""

from __future__ import annotations

import os
import pathlib
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
import zipfile

import miniature
import numpy as np
import pytest
from PIL import Image

PARTS = {"vit": "clip", "llm": "llama"}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built as pip does it, without fetching anything, from a copy: a build leaves files beside its sources, and takes
    what an earlier one has left."""
    place, sources = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("sources") / "calm_jax"
    ignored = shutil.ignore_patterns(".*", "build", "*.egg-info", "__pycache__", "runs")
    shutil.copytree(miniature.ROOT, sources, symlinks=True, ignore=ignored)
    done = miniature.run([sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation",
                          "--wheel-dir", str(place), str(sources)], dict(os.environ))
    assert done.returncode == 0, done.stderr
    (found,) = place.glob("calm_jax-*.whl")
    return found


@pytest.fixture(scope="module")
def calm(wheel, tmp_path_factory):
    """Runs the program `calm` of a fresh environment, in a folder of its own. The environment holds the wheel; its
    dependencies are those of this one, of which the package itself is no part."""
    place, work = tmp_path_factory.mktemp("environment"), tmp_path_factory.mktemp("work")
    subprocess.run([sys.executable, "-m", "venv", str(place)], check=True)
    inside = pathlib.Path(sysconfig.get_path("purelib", vars={"base": str(place), "platbase": str(place)}))
    python = place / "bin" / "python"
    subprocess.run([str(python), "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], check=True)
    (inside / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    base = {name: value for name, value in miniature.environment().items() if name != "PYTHONPATH"}

    def run(*words, start=False, **options):
        command = [str(place / "bin" / "calm"), *map(str, words)]
        if start:
            return subprocess.Popen(command, cwd=work, env=base, text=True, stdout=subprocess.PIPE,
                                    stderr=subprocess.STDOUT, **options)
        return miniature.run(command, base, cwd=work)

    run.work, run.python, run.env = work, python, base
    return run


def test_the_wheel_holds_what_is_run_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if not name.startswith("calm_jax-")} == {"calm_jax"}
    for needed in ("calm_jax/configs/finetune.py", "calm_jax/text/tokenizer_small.model",
                   "calm_jax/data/cues/rules.toml", "calm_jax/commands/samples.html",
                   "calm_jax/commands/predict/contact_sheet.html",
                   "calm_jax/evaluation/report.html", "calm_jax/convert/huggingface/modeling_calm.py",
                   "calm_jax/convert/huggingface/parity_torch.py"):
        assert needed in names
    repository = {str(path.relative_to(miniature.ROOT)) for path in (miniature.ROOT / "calm_jax").rglob("*.py")
                  if "configs" not in path.relative_to(miniature.ROOT).parts}
    assert repository == {name for name in names if name.endswith(".py") and "/configs/" not in name}


@pytest.mark.slow
def test_everything_a_user_runs_works_outside_of_the_repository(calm, tmp_path):
    """One life of a model: data, weights of others, training that is killed and resumed, photos, export, parity."""
    pytest.importorskip("torch", reason="torch is not here; make test has it")
    code = "import calm_jax, sys; print(calm_jax.__file__)"
    where = subprocess.run([str(calm.python), "-c", code], cwd=calm.work, env=calm.env, text=True, capture_output=True)
    assert str(miniature.ROOT) not in where.stdout, where
    shown = calm("--help")
    assert shown.returncode == 0 and "personalise" in shown.stdout, shown.stderr

    photos = calm.work / "photos"
    photos.mkdir()
    rng = np.random.default_rng(0)
    lines = ["image,score"]
    for number in range(24):
        Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(photos / f"{number}.jpg")
        lines.append(f"photos/{number}.jpg,{1 + number % 9}")
    (calm.work / "scores.csv").write_text("\n".join(lines) + "\n")
    done = calm("prepare", "--dataset", "csv", "--source", "scores.csv", "--scale", "1,10", "--name", "mine",
                "--data-dir", "data")
    assert done.returncode == 0, done.stderr

    folder = tmp_path / "hub"
    miniature.run([sys.executable, str(miniature.ROOT / "tests" / "hf_client.py"), "write", str(folder)],
                  dict(os.environ))
    (folder / "llm" / "tokenizer.model").write_bytes(
        (miniature.ROOT / "calm_jax" / "text" / "tokenizer_small.model").read_bytes())
    done = calm("convert", "--vit", folder / "vit", "--llm", folder / "llm", "--out", "converted")
    assert done.returncode == 0, done.stderr

    train = ("train", "--config", "finetune", "--config.data.dir=data", "--config.log_every=1",
             *(f"--config.processes.{name}.{field}={value}" for name in ("comments", "scores") for field, value in {
                 "steps": 30, "eval_every": 0, "eval_batches": 1}.items()),
             "--config.checkpoint.every_steps=2", '--config.processes.scores.tasks={"score": 0.7, "mine:score": 0.3}')
    running = calm(*train, start=True)
    begun = calm.work / "runs" / "finetune" / "checkpoints" / "comments"
    end = time.monotonic() + 600
    while not any(begun.glob("*/COMPLETE.json")) and running.poll() is None and time.monotonic() < end:
        time.sleep(0.1)
    running.send_signal(signal.SIGKILL)
    said = running.communicate()[0]
    assert running.returncode == -signal.SIGKILL, said
    done = calm(*train)
    assert done.returncode == 0 and "resum" in done.stdout + done.stderr, done.stdout + done.stderr

    scored = calm("score", "photos", "--checkpoint", "runs/finetune", "--format", "csv")
    assert scored.returncode == 0 and len(scored.stdout.splitlines()) == 25, scored.stderr
    said = calm("comment", "photos/1.jpg", "--checkpoint", "runs/finetune", "--tokens", "8", "--format", "jsonl")
    assert said.returncode == 0 and '"comment"' in said.stdout, said.stderr
    done = calm("export", "--checkpoint", "runs/finetune", "--out", "hf")
    assert done.returncode == 0, done.stderr
    done = calm("parity", "--checkpoint", "runs/finetune", "--hf", "hf", "--new-tokens", "8")
    assert done.returncode == 0 and "first differing layer: none" in done.stdout, done.stdout + done.stderr


@pytest.mark.slow
def test_the_demo_begins_and_stops_when_it_is_told_to(calm):
    running = calm("demo", "--quick", "--workdir", "runs/demo", start=True, start_new_session=True)
    metrics = calm.work / "runs" / "demo" / "pretrain" / "metrics.jsonl"
    end = time.monotonic() + 600
    while not metrics.exists() and running.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
    assert running.poll() is None and metrics.exists()
    os.killpg(running.pid, signal.SIGINT)  # Ctrl-C
    said = running.communicate(timeout=300)[0]
    assert running.returncode == 130 and "Traceback" not in said, said
    assert "calm_jax.train --config pretrain " in said
