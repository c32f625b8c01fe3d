"""This working tree in; one file that brings it and what a GPU machine lacks to where no package index is, out.

    python -m tools.bench.pack --out pack.tar [--python 3.12] [--arch x86_64] [--glibc 35] [--limit 60]
    tar xf pack.tar && calm_jax-pack/run.sh --size 7b              # there; run.sh is launch/gpu_bench.sh

The pack holds the files that git knows or would add, as they are now, and wheels in the versions of the lock file. A
GPU machine is taken to have a Python with jax, torch and transformers, what those need, and pip (ASSUMED); what the
benchmarks need besides (CARRIED) travels, and is installed there only where it is missing or too old. What follows
jax's inner interfaces (NEWEST) is the newest for that Python instead of the locked one. Wheels come from wherever pip
finds packages on this machine.
"""

from __future__ import annotations

import configparser
import pathlib
import subprocess
import sys
import tarfile
import tempfile
from typing import Annotated

import typer
from packaging.requirements import Requirement

from calm_jax import cli, files
from calm_jax.errors import ConfigError

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAME = "calm_jax-pack"  # the folder inside
ASSUMED = ("filelock", "fsspec", "hf-xet", "huggingface-hub", "jax", "jaxlib", "ml-dtypes", "numpy", "opt-einsum",
           "packaging", "pillow", "psutil", "pyyaml", "regex", "requests", "safetensors", "scipy", "setuptools",
           "tokenizers", "torch", "tqdm", "transformers", "typing-extensions")
CARRIED = ("absl-py", "accelerate", "aiofiles", "annotated-doc", "annotated-types", "array-record", "attrs",
           "cloudpickle", "einops", "etils", "flax", "googleapis-common-protos", "grain", "humanize", "jaxtyping",
           "markdown-it-py", "mdurl", "ml-collections", "msgpack", "optax", "orbax-checkpoint", "peft", "portpicker",
           "prometheus-client", "protobuf", "pydantic", "pydantic-core", "pygments", "rich", "sentencepiece",
           "shellingham", "simplejson", "tensorstore", "treescope", "typer", "typing-inspection", "uvloop",
           "wadler-lindig", "zipp")
NEWEST = ("flax",)  # reads what jax keeps to itself: the locked one knows the locked jax, the machine's may be newer


def pins(python: str, arch: str = "x86_64") -> dict[str, str]:
    """package -> its version in the lock file, on Linux with such a Python ("3.12") and processor."""
    minor = ".".join(python.split(".")[:2])
    machine = {"python_version": minor, "python_full_version": python if python.count(".") == 2 else f"{python}.0",
               "sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": arch,
               "platform_python_implementation": "CPython", "implementation_name": "cpython"}
    lines = map(Requirement, (ROOT / "requirements-parity.lock").read_text().splitlines())
    return {line.name: str(line.specifier).removeprefix("==") for line in lines
            if line.marker is None or line.marker.evaluate(machine)}


def needs(wheels: pathlib.Path) -> list[str]:
    """Requirements that the machine must meet, lines for pip: of CARRIED, with the ranges of setup.cfg where it names
    them; of NEWEST at least what lies in `wheels`."""
    settings = configparser.ConfigParser()
    settings.read(ROOT / "setup.cfg")
    listed = settings["options"]["install_requires"] + "".join(settings["options.extras_require"].values())
    ranges: dict[str, list[str]] = {}  # a package may have several, for different Pythons
    for line in filter(None, map(str.strip, listed.splitlines())):
        if line[0] != "#":
            ranges.setdefault(Requirement(line).name.lower().replace("_", "-"), []).append(line)
    ranges |= {name: [f"{name}>={file.name.split('-')[1]}"] for name in NEWEST for file in wheels.glob(f"{name}-*.whl")}
    return [line for name in CARRIED for line in ranges.get(name, [name])]


def download(folder: pathlib.Path, python: str, arch: str, glibc: int) -> None:
    """The wheels of CARRIED for another machine.

    Raises:
      ConfigError: the lock file lacks one, or pip finds no such wheel.
    """
    known = pins(python, arch)
    missing = [name for name in CARRIED if name not in known]
    if missing:
        raise ConfigError(f"the lock file has no version of {', '.join(missing)}; run: make lock")
    platforms = [f"manylinux_2_{minor}_{arch}" for minor in range(glibc, 4, -1)]
    platforms += [f"manylinux{year}_{arch}" for year in ("2014", "2010", "1")]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
         "--only-binary=:all:", "--implementation", "cp", "--python-version", python,
         *(word for name in platforms for word in ("--platform", name)), "--dest", str(folder),
         *(name if name in NEWEST else f"{name}=={known[name]}" for name in CARRIED)],
        text=True, stderr=subprocess.PIPE)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise ConfigError(f"pip could not fetch the wheels: {errors[-1] if errors else 'it said nothing'}")


def code(root: pathlib.Path) -> list[str]:
    """Paths of the files that git knows or would add.

    Raises:
      ConfigError: this is no working tree.
    """
    done = subprocess.run(["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=root, text=True,
                          capture_output=True)
    if done.returncode:
        raise ConfigError(f"{root} is no git working tree: {done.stderr.strip()}")
    return sorted(path for path in set(done.stdout.split("\0")) if path and (root / path).is_file())


def pack(out: pathlib.Path, wheels: pathlib.Path, limit: float) -> int:
    """Writes the pack from this tree and a folder of wheels; returns its bytes.

    Raises:
      ConfigError: it is larger than `limit` bytes; with the largest files.
    """
    members = {path: ROOT / path for path in code(ROOT) if (ROOT / path).resolve() != out.resolve()}
    members |= {f"wheels/{file.name}": file for file in sorted(wheels.iterdir())}
    members["run.sh"] = ROOT / "launch" / "gpu_bench.sh"
    text = wheels.parent / "needs.txt"
    text.write_text("".join(f"{line}\n" for line in needs(wheels)))
    members["needs.txt"] = text
    packed = wheels.parent / "pack.tar"
    with tarfile.open(packed, "w") as archive:
        for name, file in members.items():
            archive.add(file, f"{NAME}/{name}")
    size = packed.stat().st_size
    if size > limit:
        largest = sorted(members.items(), key=lambda item: -item[1].stat().st_size)[:3]
        raise ConfigError(
            f"the pack would take {size / 1e6:.1f} MB of at most {limit / 1e6:.1f}; the largest of it: "
            + ", ".join(f"{name} ({file.stat().st_size / 1e6:.1f} MB)" for name, file in largest)
            + "; take something out, or raise --limit")
    files.write(out, packed.read_bytes())
    return size


def ours(path: pathlib.Path) -> bool:
    """Whether a file is a pack."""
    try:
        with tarfile.open(path) as archive:
            first = archive.next()
            return first is not None and first.name.startswith(f"{NAME}/")
    except tarfile.TarError:
        return False


def main(
        out: Annotated[str, typer.Option(help="The file to write.")],
        python: Annotated[str, typer.Option(help="Version of the machine's Python.")] = "3.12",
        arch: Annotated[str, typer.Option(help="The machine's processor, as in the names of wheels.")] = "x86_64",
        glibc: Annotated[int, typer.Option(min=5, help="The machine's C library is 2.N, at least.")] = 35,
        limit: Annotated[float, typer.Option(min=0.0, help="Megabytes that the pack may take.")] = 60.0) -> None:
    place = files.output(out, ours=ours)
    with tempfile.TemporaryDirectory() as folder:
        wheels = pathlib.Path(folder) / "wheels"
        wheels.mkdir()
        download(wheels, python, arch, glibc)
        count = len(list(wheels.iterdir()))
        size = pack(place, wheels, limit * 1e6)
    print(f"{place}: {size / 1e6:.1f} MB, {count} wheels for Python {python}; there: tar xf {place.name} && "
          f"{NAME}/run.sh --size 7b")


if __name__ == "__main__":
    cli.single(main)
