"""tools.bench.pack: a pack has what the benchmarks need and what fits, and its script installs it without an index."""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import tarfile

import miniature
import pytest
from packaging.requirements import Requirement

from calm_jax.errors import ConfigError
from tools.bench import pack


@pytest.fixture
def wheels(tmp_path) -> pathlib.Path:
    folder = tmp_path / "packed" / "wheels"
    folder.mkdir(parents=True)
    return folder


def unpacked(tmp_path, wheels) -> pathlib.Path:
    pack.pack(tmp_path / "pack.tar", wheels, 60e6)
    with tarfile.open(tmp_path / "pack.tar") as archive:
        archive.extractall(tmp_path / "there", filter="tar")
    return tmp_path / "there" / pack.NAME


def start(folder: pathlib.Path, *words: str) -> subprocess.CompletedProcess:
    """run.sh with the Python of the tests as that of the machine."""
    environment = miniature.environment() | {"PYTHON": sys.executable}
    del environment["PYTHONPATH"]
    return subprocess.run([str(folder / "run.sh"), *words], text=True, capture_output=True, env=environment)


def normal(name: str) -> str:
    return name.lower().replace("_", "-")


def test_what_is_carried_and_assumed_is_all_that_the_benchmarks_load():
    """By the modules that are loaded, and by what the carried packages say of themselves."""
    pytest.importorskip("peft", reason="peft is not here; make test has it")
    known = {*pack.CARRIED, *pack.ASSUMED}
    code = ("import sys, tools.bench, tools.bench.gpu, calm_jax.convert.hf_export, calm_jax.models.flops, "
            "calm_jax.training.setup, calm_jax.checkpoints.restore, calm_jax.inference.generate; "
            "import importlib.metadata as m; "
            "owners = m.packages_distributions(); "
            "print(*{owner for name in sys.modules for owner in owners.get(name.split('.')[0], ())})")
    loaded = miniature.run([sys.executable, "-c", code], miniature.environment()).stdout.split()
    loaded = set(map(normal, loaded)) - {"calm-jax", "pip", "flatbuffers"}  # the last by JAX, where it is there
    assert {"grain", "flax", "ml-collections"} <= loaded <= known, loaded - known
    for name in pack.CARRIED:
        for requirement in map(Requirement, importlib.metadata.requires(name) or []):
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                assert normal(requirement.name) in known, f"{name} needs {requirement}"
    assert not set(pack.CARRIED) & set(pack.ASSUMED)


def test_versions_are_those_of_the_lock_files_and_ranges_those_of_the_package(wheels):
    assert {"ml_collections>=1.0", "peft>=0.17", "tensorstore"} <= set(pack.needs(wheels))
    lines = list(map(Requirement, pack.needs(wheels)))
    assert {normal(line.name) for line in lines} == set(pack.CARRIED)
    for python in ("3.11", "3.12", "3.13.2"):
        pins = pack.pins(python)
        for line in lines:
            if line.marker is None or line.marker.evaluate({"python_version": python[:4]}):
                assert line.specifier.contains(pins[normal(line.name)]), (line, python)


def test_what_reads_the_inside_of_jax_is_as_new_as_the_machines_jax_may_be(wheels):
    """It may be newer than the lock file's, and than what the lock file's flax can read."""
    (wheels / "flax-0.99.1-py3-none-any.whl").touch()
    assert [line for line in pack.needs(wheels) if line.startswith("flax")] == ["flax>=0.99.1"]


def test_pip_is_asked_for_wheels_of_the_other_machine(tmp_path, monkeypatch):
    asked = []

    def run(command, **_):
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, stderr="WARNING: x\nERROR: No matching distribution for y\nz")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(ConfigError, match="the wheels: ERROR: No matching distribution for y"):
        pack.download(tmp_path, "3.12", "aarch64", 30)
    [command] = asked
    assert "--no-deps" in command and "--only-binary=:all:" in command
    assert command[command.index("--python-version") + 1] == "3.12"
    platforms = {after for word, after in itertools.pairwise(command) if word == "--platform"}
    assert {"manylinux_2_30_aarch64", "manylinux_2_17_aarch64", "manylinux2014_aarch64"} <= platforms
    assert "manylinux_2_31_aarch64" not in platforms and f"grain=={pack.pins('3.12')['grain']}" in command
    assert "flax" in command and not any(word.startswith("flax==") for word in command)


def test_a_pack_has_the_working_tree_and_the_wheels(tmp_path, wheels):
    (wheels / "a-1-py3-none-any.whl").write_bytes(b"wheel")
    folder = unpacked(tmp_path, wheels)
    assert (folder / "wheels" / "a-1-py3-none-any.whl").read_bytes() == b"wheel"
    for file in ("calm_jax/train.py", "tools/bench/pack.py", "configs/finetune.py",
                 "calm_jax/text/tokenizer_small.model"):
        assert (folder / file).read_bytes() == (miniature.ROOT / file).read_bytes()
    assert (folder / "run.sh").read_bytes() == (miniature.ROOT / "launch" / "gpu_bench.sh").read_bytes()
    assert os.access(folder / "run.sh", os.X_OK)
    assert (folder / "needs.txt").read_text().splitlines() == pack.needs(wheels)
    assert not (folder / ".git").exists() and not (folder / "runs").exists()


def test_a_pack_that_is_too_large_names_what_is_large_and_leaves_nothing(tmp_path, wheels):
    for number, size in enumerate((3, 7, 5, 1)):
        (wheels / f"{number}.whl").write_bytes(bytes(size * 10**6))
    with pytest.raises(ConfigError) as error:
        pack.pack(tmp_path / "pack.tar", wheels, 10e6)
    assert "of at most 10.0; the largest of it: wheels/1.whl (7.0 MB), wheels/2.whl (5.0 MB), wheels/0.whl (3.0 MB)" \
        in str(error.value)
    assert not (tmp_path / "pack.tar").exists()


def test_outside_of_a_working_tree_there_is_nothing_to_pack(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    with pytest.raises(ConfigError, match="is no git working tree"):
        pack.code(tmp_path)


def test_shellcheck_finds_nothing():
    checker = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    done = subprocess.run([checker, str(miniature.ROOT / "launch" / "gpu_bench.sh"),
                           str(miniature.ROOT / "tools" / "pythons.sh")], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout


def test_the_script_runs_the_benchmarks_in_an_environment_that_shares_the_machines_packages(tmp_path, wheels):
    pytest.importorskip("peft", reason="peft is not here; make test has it")
    folder = unpacked(tmp_path, wheels)
    done = start(folder, "--only", "something")
    assert done.returncode == 2 and "there is no such benchmark" in done.stderr, done.stderr
    (folder / "needs.txt").write_text("absl-py\na-package-that-is-nowhere\n")
    done = start(folder)
    assert done.returncode == 1 and "a-package-that-is-nowhere" in done.stderr
