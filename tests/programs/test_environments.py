"""Lock files serve every Python that the package does; the Makefile chooses the newest Python that will do."""

from __future__ import annotations

import configparser
import os
import pathlib
import re
import shutil
import subprocess

import miniature
import pytest
from packaging.requirements import Requirement
from packaging.version import Version

LOCKS = ("requirements.lock", "requirements-test.lock", "requirements-parity.lock")
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
PYTHONS_SH = miniature.ROOT / "tools" / "pythons.sh"


def settings() -> configparser.ConfigParser:
    found = configparser.ConfigParser()
    found.read(miniature.ROOT / "setup.cfg")
    return found


def locked(file: str, python: str) -> dict[str, Version]:
    """package -> version on Linux with that Python; each is named once."""
    machine = {"python_version": python, "python_full_version": f"{python}.1", "sys_platform": "linux",
               "platform_machine": "x86_64", "extra": ""}
    found = {}
    for line in map(Requirement, (miniature.ROOT / file).read_text().splitlines()):
        if line.marker is None or line.marker.evaluate(machine):
            assert line.name not in found, f"{file} has two versions of {line.name} for {python}"
            [exact] = line.specifier
            assert exact.operator == "=="
            found[line.name] = Version(exact.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
def test_a_lock_file_has_one_version_of_each_package_for_every_python(python):
    listed = list(map(Requirement, filter(lambda line: line and line[0] != "#", map(
        str.strip, settings()["options"]["install_requires"].splitlines()))))
    whole = locked(LOCKS[-1], python)
    for file in LOCKS:
        found = locked(file, python)
        assert found.items() <= whole.items()  # what is used and what is tested are the same
        for line in listed:
            if line.marker is None or line.marker.evaluate({"python_version": python}):
                assert line.specifier.contains(found[line.name.lower().replace("_", "-")]), (file, line)
    assert {"torch", "peft"} <= whole.keys() and not {"torch", "peft"} & locked(LOCKS[1], python).keys()
    newest = python != "3.11"  # jax 0.11 and later need Python 3.12
    assert (whole["jax"] >= Version("0.12")) == newest and (whole["flax"] >= Version("0.12.12")) == newest
    assert not [name for name in whole if name.startswith(("nvidia-", "cuda-"))]


def test_the_pythons_that_are_promised_are_those_that_are_looked_for():
    own = settings()
    promised = [line.rsplit(" ", 1)[1] for line in own["metadata"]["classifiers"].splitlines() if "Python ::" in line]
    searched = re.search(r"^versions=\((.*)\)$", PYTHONS_SH.read_text(), re.MULTILINE)[1].split()
    assert tuple(promised) == PYTHONS == tuple(reversed(searched))
    assert own["options"]["python_requires"] == f">={PYTHONS[0]}"


@pytest.fixture
def machine(tmp_path):
    """Runs pythons.sh where these Pythons are in reach, and nothing else; `uv` says what torch needs on each."""
    folder = tmp_path / "bin"
    folder.mkdir()

    def python(version: str, works: bool = True, name: str = "") -> pathlib.Path:
        file = folder / (name or f"python{version}")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/bash\n[[ {int(works)} == 1 ]] || exit 127\n"
                        f"case $2 in *sys.executable*) echo {file};; *) [[ $2 == *\"'{version}'\"* ]];; esac\n")
        file.chmod(0o755)
        return file

    def choose(*requirements: str, cuda: tuple[str, ...] = (), none: tuple[str, ...] = ()) -> str:
        uv = folder / "uv-of-the-project"
        uv.write_text(f"""#!/bin/bash
echo "$(cat)" >&2
for name in {' '.join(none)}; do [[ "$*" == *$name\\ * ]] && exit 1; done
echo torch==9.0
for name in {' '.join(cuda)}; do [[ "$*" == *$name\\ * ]] && echo nvidia-cublas==1.0; done
exit 0
""")
        uv.chmod(0o755)
        words = [str(uv), *requirements] if requirements else []
        done = subprocess.run(["bash", str(PYTHONS_SH), *words], text=True, capture_output=True, env={
            "PATH": f"{folder}{os.pathsep}{tmp_path / 'system'}", "HOME": str(tmp_path / "home")})
        return done.stdout.strip()

    (tmp_path / "system").mkdir()
    for tool in ("bash", "cat", "env", "find", "grep", "sort"):
        (tmp_path / "system" / tool).symlink_to(shutil.which(tool))
    return tmp_path, python, choose


def test_the_newest_python_that_starts_is_taken(machine):
    home, python, choose = machine
    assert choose() == ""
    python("3.10")
    python("3.11", name="python3")
    assert choose().endswith("/python3")
    old = python("3.12")
    python("3.13", works=False)  # a shim of a version that is not there
    assert choose() == str(old)
    kept = python("3.13", name=str(home / "home" / ".pyenv" / "versions" / "3.13.0" / "bin" / "python"))
    assert choose() == str(kept)


def test_of_the_pythons_the_newest_without_cudas_libraries_is_taken_for_torch(machine):
    _, python, choose = machine
    files = {version: str(python(version)) for version in PYTHONS}
    assert choose("torch==9.0") == files["3.14"]
    assert choose("torch==9.0", none=("python3.14",)) == files["3.13"]
    assert choose("torch==9.0", none=("python3.14",), cuda=("python3.13", "python3.12")) == files["3.11"]
    assert choose("torch==9.0", none=("python3.14",), cuda=("python3.13", "python3.12", "python3.11")) == files["3.13"]
    assert choose("torch==9.0", none=tuple(f"python{version}" for version in PYTHONS)) == ""
