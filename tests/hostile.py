"""A seed in; damaged and hostile files for every public reader, and what each reader made of them, out.

    python tests/hostile.py COUNT [SEED]     reads COUNT items and prints {items, kinds, failures, peak_bytes} as JSON

An item is a small folder as a user might bring it, in which one thing is wrong: a file cut short, bits turned, another
type or size, a pipe, a loop of links, a path that leads out. A reader may use it, or raise one of this project's errors
with one sentence; anything else, waiting for ever, and touching a file outside of the item's folder are failures.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import pickle
import random
import shutil
import signal
import struct
import sys
import tempfile
import traceback
import warnings
import zipfile
from collections.abc import Callable, Iterator
from typing import Any

import miniature
import numpy as np
from PIL import Image

from calm_jax import config as config_lib
from calm_jax.checkpoints import locate, on_disk, restore
from calm_jax.commands.predict.ratings import read_ratings
from calm_jax.convert import hf_import, mfam, tables, torch_files
from calm_jax.convert.families import clip, llama
from calm_jax.data import builders, cues, pictures
from calm_jax.data.builders import store, stored
from calm_jax.data.cues import stored as stored_cues
from calm_jax.data.samples import BadRecord
from calm_jax.errors import CheckpointError, ConfigError
from calm_jax.models.parameters import Geometry
from calm_jax.text import tokenizers
from calm_jax.text.tokenizers import SHIPPED

PATIENCE = 20  # seconds for one item
LONGEST = 8_000  # characters of a message
# An error of the system is made a sentence where programs end (calm_jax.guard).
SENTENCES = (ConfigError, BadRecord, CheckpointError, OSError)
Rng = random.Random


@dataclasses.dataclass(frozen=True)
class Item:
    """One damaged folder: how it is made, and how it is read. `outside` is a folder that nobody may touch."""

    name: str
    make: Callable[[pathlib.Path, pathlib.Path], None]
    read: Callable[[pathlib.Path], None]


@dataclasses.dataclass(frozen=True)
class Failure:
    """What a reader did that it must not."""

    item: str
    what: str


# ---- what is wrong with bytes, with text, and with places -----------------------------------------------------------


def damaged(content: bytes, rng: Rng) -> bytes:
    """The same bytes with one of the faults that disks, networks and editors make."""
    size = max(len(content), 1)
    at = rng.randrange(size)
    return rng.choice([
        lambda: content[:at], lambda: content[:-rng.randint(1, 8)], lambda: b"",
        lambda: rng.randbytes(rng.randint(1, 999)),
        lambda: flipped(content, rng, 1), lambda: flipped(content, rng, 40),
        lambda: content[:at] + bytes(rng.randint(1, 64)) + content[at:], lambda: content[:at] + content[at // 2:],
        lambda: content[:at] + bytes(min(256, size - at)) + content[at + 256:],
        lambda: b"\xef\xbb\xbf" + content, lambda: content.decode("latin-1").encode("utf-16"),
        lambda: content.replace(b"\n", b"\r"), lambda: content.replace(b"\n", b"\r\r\n"), lambda: content + content,
        lambda: content[::-1], lambda: b"\x1f\x8b" + content, lambda: content[:at] + b"\xff\xfe\x80" + content[at:],
    ])()


def flipped(content: bytes, rng: Rng, count: int) -> bytes:
    values = bytearray(content)
    for _ in range(count if values else 0):
        values[rng.randrange(len(values))] ^= 1 << rng.randrange(8)
    return bytes(values)


# What may stand in the place of any value of a JSON file: as JSON text, for some is none.
VALUES = ("null", "true", "false", "0", "-1", "-0.0", "1.5", "1e400", "-1e400", "NaN", "Infinity", "1" + "0" * 30,
          "9" * 5000,
          '""', '"x"', '"12"', '"../../outside"', '"/dev/zero"', r'"a\u0000b"', r'"\u001b[31m\n\r"', r'"\ud800"',
          '"' + "n" * 5000 + '"', "[]", "[1]", "[null]", "[[]]", "{}", '{"a": 1}', "[" * 100_000, '{"a":' * 50_000,
          "9007199254740993", "2147483648", "1e-400", '"<|endoftext|>"', "01", "'x'", "+1", "")


def altered(text: str, rng: Rng) -> str:
    """A JSON text with another value, a name missing or twice, or other bytes somewhere in it."""
    value = json.loads(text)
    places = []

    def walk(node, path):
        for name, below in (node.items() if isinstance(node, dict) else enumerate(node)):
            places.append((*path, name))
            if isinstance(below, (dict, list)):
                walk(below, (*path, name))

    walk(value, ())
    *above, last = rng.choice(places)
    node = functools.reduce(lambda node, name: node[name], above, value)
    kind = rng.randrange(10)
    if kind == 0:
        del node[last]
        return json.dumps(value)
    if kind == 1 and isinstance(node, dict):
        old = node.pop(last)
        node["@twice@"], node["@again@"] = old, None
        name = json.dumps(last)
        return json.dumps(value).replace('"@twice@"', name).replace('"@again@"', name)
    if kind == 2:
        return rng.choice(VALUES)
    node[last] = "@here@"
    return json.dumps(value).replace('"@here@"', rng.choice(VALUES))


def misplaced(path: pathlib.Path, rng: Rng) -> None:
    """Something that is no regular file in the place of a file."""
    path.unlink()
    rng.choice([
        lambda: None, lambda: path.mkdir(), lambda: os.mkfifo(path), lambda: path.symlink_to(path.name),
        lambda: path.symlink_to(path.with_name("nowhere")), lambda: path.symlink_to(path.parent),
        lambda: path.symlink_to(os.devnull)])()


def harm(path: pathlib.Path, rng: Rng) -> None:
    """One fault of any kind in a file."""
    kind = rng.randrange(10)
    if kind == 0:
        misplaced(path, rng)
    elif kind < 6 and path.suffix == ".json":
        path.write_text(altered(path.read_text(), rng), errors="surrogatepass")
    else:
        path.write_bytes(damaged(path.read_bytes(), rng))


# Names of pictures and files that a label file may hold.
NAMES = ("../../outside/secret.jpg", "/proc/self/mem", "/dev/zero", "a/../../../outside/secret.jpg", "", ".", "..",
         "\0", "a\0.jpg", "n" * 300 + ".jpg", "n/" * 3000, "\x1b[2J.jpg", "new\nline.jpg", "~/secret.jpg", "file:///etc/passwd",
         "http://localhost/a.jpg", "C:\\a.jpg", "a.jpg/", "./a.jpg", "\udcff.jpg", "﷽.jpg", "pipe.jpg", "loop.jpg")


# ---- sound folders --------------------------------------------------------------------------------------------------


def photograph(size: tuple[int, int] = (24, 16), kind: str = "JPEG", mode: str = "RGB", **options: Any) -> bytes:
    values = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), np.uint8)
    stream = io.BytesIO()
    Image.fromarray(values).convert(mode).save(stream, kind, **options)
    return stream.getvalue()


def photographs(folder: pathlib.Path) -> None:
    """a.jpg to d.jpg, a pipe and a loop of links."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in "abcd":
        (folder / f"{name}.jpg").write_bytes(photograph((24 + ord(name), 16)))
    os.mkfifo(folder / "pipe.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")


def quoted(value: object) -> str:
    return '"' + str(value).replace('"', '""') + '"'


def csv_text(*rows: tuple) -> str:
    return "".join(",".join(map(quoted, row)) + "\n" for row in rows)


def csv_folder(folder: pathlib.Path, rng: Rng) -> pathlib.Path:
    photographs(folder)
    rows = [(f"{name}.jpg", score, user, "A fine picture", "") for name in "abcd"
            for user, score in (("u", 3), ("v", 7))]
    (folder / "scores.csv").write_text(csv_text(("image", "score", "user", "comment", "split"), *rows))
    return folder / "scores.csv"


def qa_folder(folder: pathlib.Path, rng: Rng) -> pathlib.Path:
    photographs(folder)
    (folder / "talk.json").write_text(json.dumps([
        {"id": name, "image": f"{name}.jpg", "conversations": [{"from": "human", "value": "<image>\nWhat is it?"},
                                                               {"from": "gpt", "value": "A picture."}]}
        for name in "abcd"]))
    return folder / "talk.json"


def oasis_folder(folder: pathlib.Path, rng: Rng) -> pathlib.Path:
    photographs(folder / "images")
    (folder / "ratings.csv").write_text(csv_text(
        ("userId", "imageName", "category", "beauty"), *((user, f"{name}.jpg", "Person", 3 + user) for name in "abcd"
                                                         for user in range(3))))
    return folder / "ratings.csv"


def para_folder(folder: pathlib.Path, rng: Rng) -> pathlib.Path:
    photographs(folder / "imgs" / "session1")
    (folder / "annotation").mkdir()
    aspects = ("qualityScore", "compositionScore", "colorScore", "dofScore", "lightScore", "contentScore")
    (folder / "annotation" / "PARA-Images.csv").write_text(csv_text(
        ("sessionId", "imageName", "userId", "imageEmotion", "semantic", "aestheticScore", *aspects),
        *(("session1", f"{name}.jpg", user, "awe", "portrait", 3.5, *(3,) * 6) for name in "abcd" for user in "uv")))
    for split, names in (("Train", "abc"), ("Test", "d")):
        (folder / "annotation" / f"PARA-Giaa{split}.csv").write_text(csv_text(
            ("imageName",), *((f"{name}.jpg",) for name in names)))
    return folder / "annotation" / rng.choice(["PARA-Images.csv", "PARA-Images.csv", "PARA-GiaaTrain.csv"])


def ava_folder(folder: pathlib.Path, rng: Rng) -> pathlib.Path:
    (folder / "images").mkdir(parents=True)
    for number in range(1, 5):
        (folder / "images" / f"{number}.jpg").write_bytes(photograph((30 + number, 20)))
    (folder / "AVA.txt").write_text("".join(f"{n} {n} 0 1 5 20 40 30 10 5 2 1 1 2 99\n" for n in range(1, 5)))
    (folder / "test.txt").write_text("4\n")
    (folder / "tags.txt").write_text("1 Portrait\n2 Landscape\n")
    comments = {"images": [{"filename": "1.jpg", "sentences": [{"raw": "nice"}]}]}
    (folder / "CLEAN_AVA_FULL_AFTER_SUBJECTIVE_CLEANING.json").write_text(json.dumps(comments))
    return folder / rng.choice(["AVA.txt", "AVA.txt", "test.txt", "tags.txt",
                                "CLEAN_AVA_FULL_AFTER_SUBJECTIVE_CLEANING.json"])


MODEL = dataclasses.replace(
    config_lib.model("7b"),
    encoder=config_lib.encoder("clip", image_size=28, patch=7, width=24, depth=4, heads=2, mlp_width=40),
    qformer=config_lib.QFormer(width=16, depth=2, heads=2, mlp_width=24, cross_every=2, queries=3),
    decoder=config_lib.decoder("llama", vocab=2048, width=16, depth=2, heads=4, kv_heads=2, mlp_width=24,
                               positions=512))
CONFIGS = {
    "vit": {"model_type": "clip_vision_model", "hidden_act": "quick_gelu", "image_size": 28, "patch_size": 7,
            "hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 40},
    "llm": {"model_type": "llama", "hidden_act": "silu", "vocab_size": 2048, "hidden_size": 16, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24, "max_position_embeddings": 512,
            "rms_norm_eps": 1e-5, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}, "rope_scaling": None,
            "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False},
    "qformer": {"model_type": "blip-2", "num_query_tokens": 3, "qformer_config": {
        "hidden_act": "gelu", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 24, "cross_attention_frequency": 2, "layer_norm_eps": 1e-12}}}


@functools.cache
def tensors(part: str) -> dict[str, np.ndarray]:
    """The torch tensors of a part of MODEL, of zeros."""
    prefix, table = {"vit": ("encoder/", clip.table(MODEL.encoder)), "llm": ("decoder/", llama.table(MODEL.decoder)),
                     "qformer": ("mfam/qformers/", mfam.qformer_table(MODEL.qformer))}[part]
    shapes = {path.removeprefix(prefix): leaf.shape for path, leaf in Geometry.of(MODEL).shapes.items()
              if path.startswith(prefix)}
    return tables.to_torch(table, {path: np.zeros(shape[1:] if part == "qformer" else shape, np.float32)
                                   for path, shape in shapes.items()})


def write_safetensors(folder: pathlib.Path, content: dict[str, np.ndarray], shard: int = 1 << 30) -> None:
    torch_files.save(folder, [torch_files.Tensor(name, value.shape, value.dtype, lambda value=value: value)
                              for name, value in content.items()], shard=shard)


@functools.cache
def hub() -> pathlib.Path:
    """Sound Hugging Face folders vit, llm (in shards) and qformer, made once."""
    root = _scratch() / "hub"
    for part, values in CONFIGS.items():
        (root / part).mkdir(parents=True)
        (root / part / "config.json").write_text(json.dumps(values))
        (root / part / "README.md").write_text("---\nlicense: mit\ntags: [a, b]\n---\n# A model\n")
        write_safetensors(root / part, tensors(part), 40_000 if part == "llm" else 1 << 30)
    shutil.copyfile(SHIPPED, root / "llm" / "tokenizer.model")
    assert (root / "llm" / "model.safetensors.index.json").is_file()
    return root


@functools.cache
def saved() -> pathlib.Path:
    """A sound workdir with one checkpoint."""
    root = _scratch() / "workdir"
    miniature.saved(root / "checkpoints" / "only")
    (root / "config.json").write_text(json.dumps(dataclasses.asdict(miniature.config())))
    on_disk.write_json(root / "checkpoints" / "only" / "best.json", {"step": 3})
    return root


@functools.cache
def prepared() -> pathlib.Path:
    """A sound folder of prepared data sets with one of them."""
    root = _scratch() / "prepared"
    csv_folder(root / "source", Rng(0))
    quietly(store.prepare, builders.source("csv")(root / "source", scale=(1, 10)), root / "data")
    return root / "data"


@functools.cache
def _scratch() -> pathlib.Path:
    made = tempfile.TemporaryDirectory(prefix="calm_jax-hostile-")
    _scratch.kept = made  # removed with the process
    return pathlib.Path(made.name)


def quietly(function: Callable, *arguments: Any, **options: Any) -> Any:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()), \
            warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*arguments, **options)


# ---- readers --------------------------------------------------------------------------------------------------------


def read_picture(folder: pathlib.Path) -> None:
    values = pictures.read(folder / "picture")
    assert values.dtype == np.uint8 and values.ndim == 3 and values.shape[2] == 3 and values.size
    pictures.square(values, 32)


def prepare(name: str, folder: pathlib.Path) -> None:
    scale = {"scale": (1.0, 10.0)} if name == "csv" else {}
    source = builders.source(name)(folder, **scale)
    store.prepare(source, folder.with_name("out"), say=lambda _: None, workers=1, longest_side=32,
                  max_bad_share=0.9)
    dataset = builders.load(name, str(folder.with_name("out")))
    for index in range(len(dataset)):
        dataset.record(index)


def convert(folder: pathlib.Path) -> None:
    out = folder.with_name("out")
    hf_import.convert(str(folder / "vit"), str(folder / "llm"), [str(folder / "qformer")], str(out),
                            say=lambda _: None)
    locate.find(out)


def convert_file(folder: pathlib.Path) -> None:
    """A `.bin` in the place of the encoder's weights."""
    out = folder.with_name("out")
    hf_import.convert(str(folder / "vit"), str(hub() / "llm"), [], str(out), say=lambda _: None)


def read_checkpoint(folder: pathlib.Path) -> None:
    found = locate.find(folder)
    config_lib.from_config_dict(found.meta["config"])
    restore.chat(found)
    for leaf in restore.lazily(found).values():
        if leaf.shape:
            leaf.read((0,))


def read_prepared(folder: pathlib.Path) -> None:
    dataset = builders.load("csv", str(folder))
    for index in range(len(dataset)):
        with contextlib.suppress(BadRecord):
            dataset.record(index)
        with contextlib.suppress(BadRecord):
            dataset.pixels(index)


# ---- items ----------------------------------------------------------------------------------------------------------


def picture_items() -> dict[str, Callable]:
    def png(width, height, depth=8, colour=2, data=b""):
        def chunk(name, body):
            import zlib
            return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))
        head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", data) + chunk(b"IEND", b"")

    def ready(content):
        return lambda folder, outside, rng: (folder / "picture").write_bytes(content)

    return {
        "postscript": ready(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(../../outside/secret.jpg) run\n"),
        "bomb": ready(png(60_000, 60_000)), "wide": ready(png(2**31 - 1, 1)), "empty picture": ready(png(0, 5)),
        "svg": ready(b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>'),
        "tall bmp": ready(b"BM" + struct.pack("<IHHIIiiHHIIiiII", 99, 0, 0, 54, 40, 4, -2**31, 1, 24, *[0] * 6)),
        "pbm of text": ready(b"P1\n99999 99999\n0 1"), "ppm": ready(b"P6 9 9 255 "),
        "numbers": ready(b"P2 2 2 99999\n9 9 9 9"),
        "mode 1": ready(photograph(kind="PNG", mode="1")), "mode P": ready(photograph(kind="GIF", mode="P")),
        "mode CMYK": ready(photograph(kind="TIFF", mode="CMYK")), "mode YCbCr": ready(photograph(mode="YCbCr")),
        "mode F": ready(photograph(kind="TIFF", mode="F")), "mode I": ready(photograph(kind="TIFF", mode="I")),
        "pipe": lambda folder, outside, rng: os.mkfifo(folder / "picture"),
        "folder": lambda folder, outside, rng: (folder / "picture").mkdir(),
        "loop": lambda folder, outside, rng: (folder / "picture").symlink_to("picture"),
        "device": lambda folder, outside, rng: (folder / "picture").symlink_to("/dev/zero"),
    }


def random_picture(folder, outside, rng):
    kind, mode = rng.choice([("JPEG", "RGB"), ("JPEG", "L"), ("PNG", "RGBA"), ("PNG", "P"), ("WEBP", "RGB"),
                             ("GIF", "P"), ("TIFF", "RGB"), ("BMP", "RGB"), ("JPEG2000", "RGB"), ("JPEG", "CMYK")])
    (folder / "picture").write_bytes(damaged(photograph((rng.randint(1, 60), rng.randint(1, 60)), kind, mode), rng))


def dataset(make: Callable, column: int | None) -> tuple[dict[str, Callable], Callable]:
    """Items of a label file: hostile names of pictures in one column of it, and any fault."""
    def named(name):
        def item(folder, outside, rng):
            path = make(folder, Rng(0))
            if path.suffix == ".json":
                value = json.loads(path.read_text())
                value[1]["image"] = name
                path.write_text(json.dumps(value))
            else:
                lines = path.read_text().splitlines(keepends=True)
                fields = lines[1].rstrip("\n").split(",")
                fields[column] = quoted(name)
                lines[1] = ",".join(fields) + "\n"
                path.write_bytes("".join(lines).encode("utf-8", "surrogateescape"))
        return item

    def harmed(folder, outside, rng):
        harm(make(folder, rng), rng)
        if rng.random() < 0.2:
            with contextlib.suppress(OSError):
                harm(next(path for path in folder.rglob("*.jpg") if path.is_file()), rng)

    return {f"picture {name[:30]!r}": named(name) for name in NAMES if column is not None}, harmed


def folder_items() -> tuple[dict[str, Callable], Callable]:
    def names(folder, outside, rng):
        photographs(folder)
        for name in (b"\xff\xfe.jpg", b"new\nline.jpg", b"\x1b[2J.jpg", b" .jpg", b"-rf.jpg", b"a b'\"$(x).jpg"):
            (folder / os.fsdecode(name)).write_bytes(photograph())

    def links(folder, outside, rng):
        photographs(folder)
        (folder / "deep").mkdir()
        (folder / "deep" / "up").symlink_to("..")
        (folder / "deep" / "e.jpg").write_bytes(photograph())

    def harmed(folder, outside, rng):
        photographs(folder)
        (folder / "pipe.jpg").unlink(), (folder / "loop.jpg").unlink()
        for path in rng.sample(sorted(folder.glob("*.jpg")), rng.randint(1, 4)):
            harm(path, rng)

    return {"odd names": names, "links": links, "pipe and loop": lambda folder, outside, rng: photographs(folder),
            "empty": lambda folder, outside, rng: folder.mkdir(exist_ok=True)}, harmed


def cue_items() -> tuple[dict[str, Callable], Callable]:
    def text():
        (name, kind, grade), _ = next(stored_cues.places(cues.CUES))
        return json.dumps({"format": stored_cues.FORMAT, "requests": {}, "phrases": [
            {"attribute": name, "kind": kind, "grade": grade, "text": f"Would number {n} be a question?"}
            for n in range(3)]})

    def harmed(folder, outside, rng):
        (folder / "cues.json").write_text(text())
        harm(folder / "cues.json", rng)

    return {"pipe": lambda folder, outside, rng: os.mkfifo(folder / "cues.json")}, harmed


def tokenizer_items() -> tuple[dict[str, Callable], Callable]:
    def ready(content):
        return lambda folder, outside, rng: (folder / "tokenizer.model").write_bytes(content)

    def harmed(folder, outside, rng):
        shutil.copyfile(SHIPPED, folder / "tokenizer.model")
        harm(folder / "tokenizer.model", rng)

    return {"empty": ready(b""), "folder": lambda folder, outside, rng: (folder / "tokenizer.model").mkdir(),
            "pipe": lambda folder, outside, rng: os.mkfifo(folder / "tokenizer.model"),
            "one piece": ready(b"\n\x0a\n\x01a\x15\0\0\0\0\x18\x01"), "json": ready(b'{"model": {}}')}, harmed


def read_tokenizer(folder: pathlib.Path) -> None:
    found = tokenizers.load(str(folder / "tokenizer.model"))
    found.decode(found.encode("A picture of 7.25 points"))


def config_items() -> tuple[dict[str, Callable], Callable]:
    def changed(part, text, file="config.json"):
        def item(folder, outside, rng):
            copied(folder)
            values = dict(CONFIGS[part])
            name, _, value = text.partition("=")
            old = json.dumps(values)[:-1] if name not in values else json.dumps(
                {other: kept for other, kept in values.items() if other != name})[:-1]
            (folder / part / file).write_text(f'{old}, "{name}": {value}}}' if value else old + "}")
        return item

    fields = {"vit": ("hidden_size", "num_hidden_layers", "patch_size", "image_size", "num_attention_heads"),
              "llm": ("vocab_size", "hidden_size", "num_hidden_layers", "rms_norm_eps", "max_position_embeddings"),
              "qformer": ("num_query_tokens", "qformer_config")}
    found = {"llm vocab_size absent": changed("llm", "vocab_size=")}
    for text in ("rope_scaling=[1]", 'rope_scaling={"type": "linear", "factor": 2}', 'rope_scaling={"rope_type": 3}',
                 "rope_theta=-1", "head_dim=7", "num_key_value_heads=3", "quantization_config={}", "hidden_act=5",
                 "attention_bias=\"no\"", "partial_rotary_factor=0.5", "model_type=[]"):
        found[f"llm {text}"] = changed("llm", text)
    for part, names in fields.items():
        for name in names:
            for value in ("-1", "0", "true", '"24"', "1" + "0" * 30, "1e400", "NaN", "[" * 100_000):
                found[f"{part} {name}={value[:12]}"] = changed(part, f"{name}={value}")
    order = sorted(found, key=lambda name: Rng(name).random())

    def harmed(folder, outside, rng):
        copied(folder)
        part, file = rng.choice(["vit", "llm", "qformer"]), rng.choice(["config.json", "config.json", "README.md"])
        harm(folder / part / file, rng)

    return {name: found[name] for name in order}, harmed


def copied(folder: pathlib.Path) -> None:
    shutil.copytree(hub(), folder, dirs_exist_ok=True)


def safetensors_items() -> tuple[dict[str, Callable], Callable]:
    def header(change):
        def item(folder, outside, rng):
            copied(folder)
            path = folder / "vit" / "model.safetensors"
            content = path.read_bytes()
            size = int.from_bytes(content[:8], "little")
            table = json.loads(content[8:8 + size])
            name = next(name for name in table if name.endswith("class_embedding"))
            text = change(table, name) or json.dumps(table)
            text = text if isinstance(text, bytes) else text.encode()
            path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size:])
        return item

    def size(value):
        def item(folder, outside, rng):
            copied(folder)
            path = folder / "vit" / "model.safetensors"
            path.write_bytes(value.to_bytes(8, "little") + path.read_bytes()[8:])
        return item

    def harmed(folder, outside, rng):
        copied(folder)
        harm(rng.choice([folder / "vit" / "model.safetensors", folder / "qformer" / "model.safetensors",
                         *sorted((folder / "llm").glob("model-*.safetensors"))]), rng)

    made = {"offsets overlap": header(lambda t, n: t[n].update(data_offsets=[0, 96])),
            "offsets beyond": header(lambda t, n: t[n].update(data_offsets=[0, 1 << 62])),
            "offsets backwards": header(lambda t, n: t[n].update(data_offsets=[96, 0])),
            "huge shape": header(lambda t, n: t[n].update(shape=[1 << 40, 1 << 40])),
            "negative shape": header(lambda t, n: t[n].update(shape=[-24])),
            "other dtype": header(lambda t, n: t[n].update(dtype="I32")),
            "unknown dtype": header(lambda t, n: t[n].update(dtype="Q4_0")),
            "complex": header(lambda t, n: t[n].update(dtype="C64", shape=[12])),
            "deep": header(lambda t, n: "[" * 100_000), "no table": header(lambda t, n: "[]"),
            "twice": header(lambda t, n: json.dumps(t)[:-1] + f', "{n}": {json.dumps(t[n])}}}'),
            "control name": header(lambda t, n: t.update({"\x1b[31m\n": t.pop(n)})),
            "metadata": header(lambda t, n: t.update(__metadata__={"a": 1})),
            "not utf-8": header(lambda t, n: json.dumps(t).encode().replace(b"class_embedding", b"class\xff\xfe")),
            **{f"header of {value}": size(value) for value in (0, 1, 1 << 20, 1 << 40, (1 << 64) - 1)}}
    return made, harmed


def index_items() -> tuple[dict[str, Callable], Callable]:
    def places(change):
        def item(folder, outside, rng):
            copied(folder)
            path = folder / "llm" / "model.safetensors.index.json"
            value = json.loads(path.read_text())
            names = list(value["weight_map"])
            path.write_text(json.dumps(change(value, names, outside)), errors="surrogatepass")
        return item

    def at(shard):
        return places(lambda value, names, outside: value | {"weight_map": value["weight_map"] | {
            names[0]: shard.format(outside=outside)}})

    def harmed(folder, outside, rng):
        copied(folder)
        harm(folder / "llm" / "model.safetensors.index.json", rng)

    def adapter(folder, outside, rng):
        copied(folder)
        for file in (folder / "llm").iterdir():
            file.unlink()
        (folder / "llm" / "adapter_config.json").write_text('{"base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}')
        write_safetensors(folder / "llm", {"a": np.zeros(3, np.float32)})
        (folder / "llm" / "model.safetensors").rename(folder / "llm" / "adapter_model.safetensors")

    def without(name):
        def item(folder, outside, rng):
            copied(folder)
            (folder / "llm" / name).unlink()
        return item

    names = ("../../../outside/secret.safetensors", "{outside}/secret.safetensors", "../vit/model.safetensors", "",
             ".", "..", "\0", "a/b.safetensors", "n" * 300, "/dev/zero", "C:\\a", "\ud800", "a\nb.safetensors")
    wrong = (None, [], "x", 3, {}, {"a": 1}, {"a": None}, {"a": ["b"]}, {"a": {}})
    return {**{f"shard {name[:40]!r}": at(name) for name in names}, "adapter": adapter,
            "no tokenizer": without("tokenizer.model"), "no config": without("config.json"),
            **{f"weight_map {value!r}": places(lambda v, n, o, value=value: v | {"weight_map": value})
               for value in wrong},
            **{f"all {value!r}": places(lambda v, n, o, value=value: value) for value in (None, [], "x", 3)}}, harmed


class Evil:
    """A pickle that would write a file."""

    def __reduce__(self):
        return (os.system, ("touch ../../outside/secret.written",))


def bin_items() -> tuple[dict[str, Callable], Callable]:
    import torch

    def base():
        return {name: torch.from_numpy(value) for name, value in tensors("vit").items()}

    def put(folder, content, **options):
        (folder / "vit").mkdir(parents=True)
        (folder / "vit" / "config.json").write_text(json.dumps(CONFIGS["vit"]))
        path = folder / "vit" / "pytorch_model.bin"
        path.write_bytes(content) if isinstance(content, bytes) else quietly(torch.save, content, path, **options)
        return path

    def one(change):
        def item(folder, outside, rng):
            state = base()
            name = next(name for name in state if name.endswith("class_embedding"))
            state[name] = change(state[name])
            put(folder, state)
        return item

    def zipped(method, **files):
        stream = io.BytesIO()
        with zipfile.ZipFile(stream, "w", method) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
        return stream.getvalue()

    def ready(content):
        return lambda folder, outside, rng: put(folder, content() if callable(content) else content)

    def itself():
        state = {}
        state["model"] = state
        return state

    def harmed(folder, outside, rng):
        path = put(folder, base(), _use_new_zipfile_serialization=rng.random() < 0.6)
        harm(path, rng)

    made = {"sparse": one(lambda t: t.to_sparse()), "csr": one(lambda t: quietly(t[None].to_sparse_csr)),
            "meta": one(lambda t: t.to("meta")), "float64": one(lambda t: t.double()), "int64": one(lambda t: t.long()),
            "bool": one(lambda t: t.bool()), "complex": one(lambda t: t.to(torch.complex64)),
            "quantised": one(lambda t: quietly(torch.quantize_per_tensor, t, 0.1, 0, torch.qint8)),
            "float8": one(lambda t: t.to(torch.float8_e4m3fn)), "repeated": one(lambda t: t[:1].expand(24)),
            "grad": one(lambda t: t.clone().requires_grad_()), "parameter": one(torch.nn.Parameter),
            "no tensor": one(lambda t: "a text"), "evil": ready(lambda: {"a": Evil()}),
            "evil pickle": ready(pickle.dumps(Evil())), "a list": ready(lambda: [torch.zeros(3)]),
            "numbered": ready(lambda: {3: torch.zeros(3)}), "itself": ready(itself), "nested": ready(
                lambda: functools.reduce(lambda v, _: {"model": v}, range(400), base())),
            "zip of texts": ready(lambda: zipped(zipfile.ZIP_STORED, **{"a.txt": "b"})),
            "compressed": ready(lambda: zipped(zipfile.ZIP_DEFLATED, **{"a/data.pkl": bytes(1 << 26)})),
            "zip of nothing": ready(lambda: zipped(zipfile.ZIP_STORED)),
            "zip that leads out": ready(lambda: zipped(zipfile.ZIP_STORED, **{"../../outside/data.pkl": "b"})),
            "tar": ready(b"data.pkl".ljust(257, b"\0") + b"ustar".ljust(1000, b"\0")), "text": ready(b"not found\n"),
            "git-lfs": ready(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
            "html": ready(b"<!DOCTYPE html><html><body>404</body></html>")}
    return made, harmed


@functools.cache
def gguf_file() -> bytes:
    """A sound GGUF file of a small LLaMA."""
    import gguf
    path = _scratch() / "sound.gguf"
    cfg, words = MODEL.decoder, [chr(0x100 + number) for number in range(MODEL.decoder.vocab)]
    writer = gguf.GGUFWriter(str(path), "llama")
    for add, value in (("block_count", cfg.depth), ("context_length", 64), ("embedding_length", cfg.width),
                       ("feed_forward_length", cfg.mlp_width), ("head_count", cfg.heads), ("layer_norm_rms_eps", 1e-5),
                       ("head_count_kv", cfg.kv_heads), ("tokenizer_model", "gpt2"), ("tokenizer_pre", "smollm"),
                       ("token_list", words), ("token_types", [1] * len(words)), ("bos_token_id", 1),
                       ("eos_token_id", 2), ("token_merges", [])):
        getattr(writer, f"add_{add}")(value)
    names = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
             "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
             "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
             "model.layers": "blk"}
    for name, value in tensors("llm").items():
        for theirs, other in names.items():
            name = name.replace(theirs, other)
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path.read_bytes()


def gguf_items() -> tuple[dict[str, Callable], Callable]:
    content = gguf_file()

    def ready(made):
        return lambda folder, outside, rng: (folder / "model.gguf").write_bytes(made)

    def harmed(folder, outside, rng):
        # Most of a file is values, which may be anything; faults shall meet its header.
        head = content.rindex(b"output.weight") + 64
        (folder / "model.gguf").write_bytes(damaged(content[:head], rng) + content[head:] if rng.random() < 0.8
                                            else damaged(content, rng))

    def size(at, value):
        return ready(content[:at] + value.to_bytes(8, "little") + content[at + 8:])

    return {"sound": ready(content), "magic alone": ready(b"GGUF"), "empty": ready(b""),
            "many tensors": size(8, (1 << 64) - 1), "many fields": size(16, 1 << 40), "long name": size(24, 1 << 62),
            "pipe": lambda folder, outside, rng: os.mkfifo(folder / "model.gguf"),
            "folder": lambda folder, outside, rng: (folder / "model.gguf").mkdir()}, harmed


def read_gguf(folder: pathlib.Path) -> None:
    hf_import.convert(str(hub() / "vit"), str(folder / "model.gguf"), [], str(folder.with_name("out")),
                      say=lambda _: None)


@functools.cache
def onnx_file() -> bytes:
    """A file of a DINOv2 encoder of one block, as far as it is read; it cannot be run."""
    import onnx
    constants, nodes, width = {}, [], 4

    def node(name, kind, *inputs, output="x", **options):
        for value in inputs:
            if isinstance(value, np.ndarray):
                constants[f"c{len(constants)}"] = value
        names = [next(key for key, held in constants.items() if held is value) if isinstance(value, np.ndarray)
                 else value for value in inputs]
        nodes.append(onnx.helper.make_node(kind, names, [f"{output}{len(nodes)}"], name=name, **options))
        return nodes[-1].output[0]

    def full(*shape):
        return np.ones(shape, np.float32)

    embeddings, layer = "/backbone/embeddings", "/backbone/encoder/layer.0"
    node(f"{embeddings}/patch_embeddings/projection/Conv", "Conv", "images", full(width, 3, 2, 2), full(width),
         strides=[2, 2])
    node(f"{embeddings}/Expand", "Expand", full(1, 1, width), "x")
    grid = node(f"{embeddings}/Reshape", "Reshape", full(1, 9, width), "x")
    grid = node(f"{embeddings}/Resize", "Resize", grid, "", "", "x", mode="cubic")
    node(f"{embeddings}/Concat", "Concat", full(1, 1, width), grid, axis=1)
    for norm in ("norm1", "norm2"):
        node(f"{layer}/{norm}/LayerNormalization", "LayerNormalization", "x", full(width), full(width), epsilon=1e-6)
    shape = np.array([1, -1, 2, 2])
    node(f"{layer}/attention/attention/Reshape", "Reshape", "x", shape)
    node(f"{layer}/attention/attention/Mul", "Mul", "x", np.full((), 2 ** -0.5, np.float32))
    for place, out, into in (("attention/attention/query", width, width), ("attention/attention/key", width, width),
                             ("attention/attention/value", width, width), ("attention/output/dense", width, width),
                             ("mlp/fc1", 16, width), ("mlp/fc2", width, 16)):
        node(f"{layer}/{place}/MatMul", "MatMul", "x", full(into, out))
        node(f"{layer}/{place}/Add", "Add", full(out), "x")
    node(f"{layer}/mlp/activation/Erf", "Erf", "x")
    for scale in ("layer_scale1", "layer_scale2"):
        node(f"{layer}/{scale}/Mul", "Mul", "x", full(width))
    graph = onnx.helper.make_graph(nodes, "g", [], [], [
        onnx.numpy_helper.from_array(value, name) for name, value in constants.items()])
    return onnx.helper.make_model(graph).SerializeToString()


def changed_graph(content: bytes, rng: Rng) -> bytes:
    """A sound message of a graph in which one node or constant is not as its kind has to be."""
    import onnx
    model = onnx.load_from_string(content)
    node, constant = rng.choice(model.graph.node), rng.choice(model.graph.initializer)
    attributes = [attribute for other in model.graph.node for attribute in other.attribute]
    attribute = rng.choice(attributes)

    def another_type():
        name = attribute.name
        attribute.CopyFrom(onnx.helper.make_attribute(name, rng.choice([1, 0.5, b"x", [1, 2], [0.5], [b"a", b"b"]])))

    def of_attribute():
        attribute.type = rng.choice([0, 1, 2, 3, 4, 5, 6, 7])

    rng.choice([
        lambda: node.ClearField("input"), lambda: node.input.append(rng.choice(["", "x", constant.name])),
        lambda: node.input.reverse(), lambda: node.ClearField("output"), lambda: node.ClearField("attribute"),
        lambda: node.output.__setitem__(0, constant.name), lambda: setattr(node, "name", "/" * rng.randint(0, 9)),
        lambda: setattr(node, "op_type", rng.choice([other.op_type for other in model.graph.node])),
        lambda: setattr(constant, "raw_data", constant.raw_data[:rng.randrange(len(constant.raw_data))]),
        lambda: setattr(constant, "data_type", rng.randrange(24)), lambda: constant.ClearField("dims"),
        lambda: constant.dims.append(rng.choice([-1, 0, 1 << 62])),
        lambda: setattr(constant, "name", rng.choice(model.graph.initializer).name),
        lambda: model.graph.node.append(node), another_type, of_attribute])()
    return model.SerializeToString()


def onnx_items() -> tuple[dict[str, Callable], Callable]:
    content = onnx_file()

    def ready(made):
        return lambda folder, outside, rng: (folder / "model.onnx").write_bytes(made)

    def harmed(folder, outside, rng):
        made = changed_graph(content, rng) if rng.random() < 0.6 else damaged(content, rng)
        (folder / "model.onnx").write_bytes(made)

    return {"sound": ready(content), "empty": ready(b""), "text": ready(b"not found\n"),
            "pipe": lambda folder, outside, rng: os.mkfifo(folder / "model.onnx"),
            "folder": lambda folder, outside, rng: (folder / "model.onnx").mkdir()}, harmed


def read_onnx(folder: pathlib.Path) -> None:
    hf_import.convert(str(folder / "model.onnx"), str(hub() / "llm"), [], str(folder.with_name("out")),
                      say=lambda _: None)


def checkpoint_items() -> tuple[dict[str, Callable], Callable]:
    def meta(change):
        """A checkpoint whose marker fits its changed meta data, as one who means harm would make it."""
        def item(folder, outside, rng):
            shutil.copytree(saved(), folder, dirs_exist_ok=True)
            place = folder / "checkpoints" / "only" / "00000003"
            text = change((place / "meta.json").read_text(), rng, outside)
            (place / "meta.json").write_text(text, errors="surrogatepass")
            on_disk.write_marker(place)
        return item

    def marker(change):
        def item(folder, outside, rng):
            shutil.copytree(saved(), folder, dirs_exist_ok=True)
            path = folder / "checkpoints" / "only" / "00000003" / "COMPLETE.json"
            value = json.loads(path.read_text())
            files = change(value["files"], outside)
            import hashlib
            digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
            path.write_text(json.dumps({"files": files, "digest": digest}))
        return item

    def field(name, value):
        return meta(lambda text, rng, outside: json.dumps(json.loads(text) | {name: value}))

    def odd(folder, outside, rng):
        shutil.copytree(saved(), folder, dirs_exist_ok=True)
        for name in ("²", "٣", "999999999999999999999", "-1"):
            (folder / "checkpoints" / "only" / name).mkdir()

    def workdir(value):
        def item(folder, outside, rng):
            shutil.copytree(saved(), folder, dirs_exist_ok=True)
            (folder / "config.json").write_text(value)
        return item

    def harmed(folder, outside, rng):
        kind = rng.randrange(6)
        if kind == 0:
            return meta(lambda text, rng, outside: altered(text, rng))(folder, outside, rng)
        shutil.copytree(saved(), folder, dirs_exist_ok=True)
        place = folder / "checkpoints" / "only"
        inside = place / "00000003"
        arrays = sorted(path for path in (inside / "arrays").rglob("*") if path.is_file())
        path = rng.choice([folder / "config.json", place / "best.json", inside / "meta.json", inside / "COMPLETE.json",
                           *arrays])
        harm(path, rng)
        if kind == 1 and (inside / "meta.json").is_file():
            on_disk.write_marker(inside)
        return None

    secret = "../../../../../outside/secret.json"
    made = {"marker leads out": marker(lambda files, outside: files | {secret: [3, "0"]}),
            "marker absolute": marker(lambda files, outside: files | {f"{outside}/secret.json": [3, "0"]}),
            "marker without files": marker(lambda files, outside: {}),
            "marker of texts": marker(lambda files, outside: dict.fromkeys(files, "x")),
            "marker list": marker(lambda files, outside: list(files)), "odd folders": odd,
            **{f"workdir {text[:20]}": workdir(text) for text in (
                "[]", "{}", '{"run": 3}', '{"run": [3]}', '{"run": ["../../outside"]}', '{"run": "only"}',
                "[" * 100_000, '{"run": [".."]}', '{"run": ["/"]}')},
            **{f"meta {name}={value!r:.30}": field(name, value) for name, value in (
                ("step", "3"), ("step", -1), ("step", True), ("config", []), ("config", {}), ("base", 3),
                ("base", {"path": 3}), ("base", {"path": "../../outside", "step": 1, "digest": "0", "more": 1}),
                ("tokenizer", None), ("borrowed", []), ("borrowed", {"checkpoints": [3], "parameters": {}}),
                ("borrowed", {"checkpoints": [], "parameters": {"encoder/cls": {"of": 7}}}), ("sources", {"vit": 3}),
                ("process", "nobody"), ("trained", 3), ("seed", "0"))}}
    return made, harmed


def prepared_items() -> tuple[dict[str, Callable], Callable]:
    def harmed(folder, outside, rng):
        shutil.copytree(prepared(), folder, dirs_exist_ok=True)
        place = folder / "csv" / stored.VERSION
        harm(rng.choice([place / "manifest.json", *sorted((place / "labels").iterdir()),
                         *sorted(place.glob("*array_record*"))]), rng)

    return {}, harmed


def ratings_items() -> tuple[dict[str, Callable], Callable]:
    return dataset(csv_folder, 0)


def kinds() -> dict[str, tuple[tuple[dict[str, Callable], Callable], Callable[[pathlib.Path], None]]]:
    """Kind -> its special items, the maker of any number of others, and the reader. `.bin` files need torch."""
    found = {
        "picture": ((picture_items(), random_picture), read_picture),
        "config": (config_items(), convert), "index": (index_items(), convert),
        "safetensors": (safetensors_items(), convert), "gguf": (gguf_items(), read_gguf),
        "onnx": (onnx_items(), read_onnx), "checkpoint": (checkpoint_items(), read_checkpoint),
        **{name: (dataset(make, column), functools.partial(prepare, name)) for name, make, column in (
            ("csv", csv_folder, 0), ("qa", qa_folder, 0), ("oasis", oasis_folder, 1), ("para", para_folder, 1),
            ("ava", ava_folder, None))},
        "folder": (folder_items(), functools.partial(prepare, "folder")),
        "ratings": (ratings_items(), lambda folder: read_ratings(str(folder / "scores.csv"), "u", ("1", "10"))),
        "cues": (cue_items(), lambda folder: cues.bank(str(folder / "cues.json"))),
        "tokenizer": (tokenizer_items(), read_tokenizer), "prepared": (prepared_items(), read_prepared)}
    with contextlib.suppress(ImportError):
        found["bin"] = (bin_items(), convert_file)
    return found


def items(count: int, seed: int = 0) -> Iterator[Item]:
    """So many items, of all kinds in turn: first the special ones of each, then faults drawn from the seed."""
    every = kinds()
    for number in range(count):
        kind = list(every)[number % len(every)]
        (special, other), read = every[kind]
        place = number // len(every)
        what = list(special)[place] if place < len(special) else f"fault {place - len(special)}"
        name = f"{number} {kind}: {what}"
        maker = special.get(what, other)
        yield Item(name, functools.partial(_make, maker, f"{seed}:{name}"), read)


def _make(maker: Callable, seed: str, folder: pathlib.Path, outside: pathlib.Path) -> None:
    maker(folder, outside, Rng(seed))


# ---- the run --------------------------------------------------------------------------------------------------------


class Watch:
    """Files below a folder that nobody may read, write or add to; reads are seen by Python's audit, and by the time of
    access where the file system keeps that."""

    _watched: list[str] = []  # noqa: RUF012  one hook a process: it cannot be taken off
    _seen: list[str] = []  # noqa: RUF012

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        folder.mkdir(parents=True)
        for name in ("secret.jpg", "secret.json", "secret.csv", "secret.safetensors", "data.pkl"):
            (folder / name).write_bytes(photograph() if name.endswith("jpg") else b"{}\n")
            os.utime(folder / name, (1, 2))
        probe = folder / "probe"
        probe.write_bytes(b"x")
        os.utime(probe, (1, 2))
        probe.read_bytes()
        self.timed = probe.stat().st_atime > 1
        probe.unlink()
        self.before = self._state()
        if not Watch._watched:
            sys.addaudithook(Watch._hook)
        Watch._watched[:] = [os.path.realpath(folder)]

    @staticmethod
    def _hook(event: str, arguments: tuple) -> None:
        watched = ("open", "os.listdir", "os.scandir", "os.remove", "os.rename", "os.mkdir")
        if event in watched and arguments and isinstance(arguments[0], (str, bytes)):
            place = os.path.realpath(os.fsdecode(arguments[0]).replace("\0", "?"))
            if any(place.startswith(watched) for watched in Watch._watched):
                Watch._seen.append(place)

    def _state(self) -> dict[str, tuple]:
        with os.scandir(self.folder) as entries:
            found = {entry.name: entry.stat() for entry in entries}
        return {name: (stat.st_size, stat.st_mtime_ns, stat.st_atime_ns if self.timed else 0)
                for name, stat in found.items()}

    def touched(self) -> list[str]:
        """What has been read or changed since the last time."""
        seen, Watch._seen[:] = list(Watch._seen), []
        now = self._state()
        Watch._seen[:] = []
        changed = sorted(name for name in {*now, *self.before} if now.get(name) != self.before.get(name))
        self.before = now
        return [*seen, *changed]


class Waits(BaseException):
    """A reader that waits for ever; no error that a reader might take for one of the system's."""


def _too_long(*_: Any) -> None:
    raise Waits


def run(chosen: Iterator[Item], root: pathlib.Path) -> tuple[list[Failure], collections.Counter]:
    """Reads every item; returns what went wrong, and how many of each kind were read or refused.

    Args:
      root: an empty folder to work in.
    """
    hub(), saved(), prepared()
    failures: list[Failure] = []
    counts: collections.Counter = collections.Counter()
    watch = Watch(root / "outside")
    before = signal.signal(signal.SIGALRM, _too_long)
    try:
        for item in chosen:
            folder = root / "work" / "given"
            shutil.rmtree(root / "work", ignore_errors=True)
            folder.mkdir(parents=True)
            item.make(folder, watch.folder)
            watch.touched()
            kind = item.name.split(":")[0].split()[1]
            signal.alarm(PATIENCE)
            try:
                quietly(item.read, folder)
                counts[f"{kind} read"] += 1
            except SENTENCES as error:
                counts[f"{kind} refused"] += 1
                failures += [Failure(item.name, f"says {str(error)[:300]!r}")] if not _is_sentence(error) else []
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                failures.append(Failure(item.name, f"{error!r:.300} at {traceback.format_exc()[-700:]}"))
            finally:
                signal.alarm(0)
            failures += [Failure(item.name, f"touched {place}") for place in watch.touched()]
    finally:
        signal.signal(signal.SIGALRM, before)
        shutil.rmtree(root / "work", ignore_errors=True)
    return failures, counts


def _is_sentence(error: Exception) -> bool:
    """One line, or for weights that do not fit a line each; of some length; and no trace of the program's insides. A
    name with an end of line in it is spelled out where it is printed."""
    text = str(error)
    lines = text.replace("new\nline", "").replace("a\nb", "").replace("\x1b[31m\n", "").splitlines()
    many = isinstance(error, tables.WeightError)
    return bool(text.strip()) and len(text) < LONGEST and "Traceback" not in text and (many or len(lines) == 1)


def main(count: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        failures, counts = run(items(count, seed), pathlib.Path(folder))
    print(json.dumps({"items": count, "kinds": counts, "failures": [dataclasses.asdict(one) for one in failures],
                      "peak_bytes": 1024 * eval(miniature.PEAK)}, indent=1))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 0)
