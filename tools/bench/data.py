"""A config in; how many pictures a second its data pipeline prepares, beside a torch DataLoader in the same run, out.

Part of `python -m tools.bench data`. The pictures are windows of the demo's photographs at 512 pixels, as JPEG files
and as a prepared dataset. Both sides decode, fit to the model's square, edit, tokenise and lay out the conversations of
the same process. The torch side is what its users would write: a map-style Dataset over the files that edits with
Pillow and NumPy, the same SentencePiece tokenizer, float32 pixels normalised in the worker, conversations padded to
the longest of the batch. Both sides have as many worker processes as there are cores, and batches of about 16
pictures. Each side runs in a process of its own, in turns.
"""

from __future__ import annotations

import dataclasses
import io
import json
import multiprocessing
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import numpy as np
from PIL import Image

from calm_jax import config as config_lib
from calm_jax.data import attributes, builders, images, pipeline
from calm_jax.data.samples import Edit, ImageRef
from calm_jax.errors import ConfigError
from calm_jax.models.encoders.clip import MEAN, STD
from calm_jax.text import chat as chat_lib
from calm_jax.text.templates import vicuna

PICTURES = 300
SIDE = 512
ROWS = 8  # packed rows a batch of ours, and ...
CONVERSATIONS = 16  # ... conversations a batch of torch's: about as many pictures
PEAK = {"v5e-16": 16 * 197e12, "8xA100": 8 * 312e12}  # bfloat16 FLOP/s by their makers
MFU = 0.5  # of the peak, assumed
SECTION = "Data"  # of docs/benchmarks.md, and the columns of its table
COLUMNS = ("calm_jax", "torch", "ratio")


def measure(config: config_lib.Config, process: config_lib.Process, scratch: pathlib.Path, *, against: bool,
            rounds: int, seconds: float = 8.0, pictures: int = PICTURES) -> dict:
    """Pictures a second of each side, in turns, over so many pictures; `scratch` is emptied."""
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        write_pictures(scratch / "files", pictures)
        prepare(scratch / "files", scratch / "data")
        sides = ["calm_jax", *(["torch"] if against else [])]
        rates: dict[str, list[float]] = {side: [] for side in sides}
        for number in range(rounds):
            for side in sides:
                text = json.dumps({"model": dataclasses.asdict(config.model), "process": dataclasses.asdict(process)})
                done = subprocess.run([sys.executable, "-m", "tools.bench.data", side, str(scratch), str(seconds),
                                       text], capture_output=True, text=True)
                if done.returncode:
                    raise ConfigError(f"{side} failed: {done.stderr[-2000:]}")
                rates[side].append(float(done.stdout.splitlines()[-1]))
                print(f"  round {number + 1}: {side:<10}{rates[side][-1]:>8.1f} pictures/s", flush=True)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    results = {side: {"median": statistics.median(values), "min": min(values), "max": max(values)}
               for side, values in rates.items()}
    return {"what": "data", "cores": os.cpu_count(), "size": config.model.encoder.image_size,
            "needs": needs(config.model, process), "results": results}


def show(result: dict) -> str:
    """The result as aligned text."""
    lines = [f"data: {SIDE} px JPEG to {result['size']} px, {result['cores']} cores",
             f"  {'':<12}{'pictures/s':>12}{'min':>8}{'max':>8}{'a core':>8}"]
    for side, row in result["results"].items():
        lines.append(f"  {side:<12}{row['median']:>12.1f}{row['min']:>8.1f}{row['max']:>8.1f}"
                     f"{row['median'] / result['cores']:>8.1f}")
    if "torch" in result["results"]:
        ratio = result["results"]["calm_jax"]["median"] / result["results"]["torch"]["median"]
        lines.append(f"  calm_jax / torch: {ratio:.2f}")
    lines.append("  a step of this process would ask for " + ", ".join(
        f"{rate:.0f} pictures/s on {name}" for name, rate in result["needs"].items()) + f" at {MFU:.0%} MFU")
    return "\n".join(lines)


def cells(result: dict) -> list[list[str]]:
    """The row of the table, without its common columns."""
    rows = [result["results"].get(side) for side in COLUMNS[:2]]
    found = ["" if row is None else f"{row['median']:.1f} ({row['min']:.1f} to {row['max']:.1f}), "
             f"{row['median'] / result['cores']:.1f} a core" for row in rows]
    return [[*found, "" if rows[1] is None else f"{rows[0]['median'] / rows[1]['median']:.2f}"]]


def needs(model: config_lib.Model, process: config_lib.Process) -> dict[str, float]:
    """Pictures a second that a machine would consume at MFU of its peak: full rows, see `flops.a_row`."""
    from calm_jax.models import flops
    from calm_jax.models.parameters import Geometry
    from calm_jax.training import filters
    learns = filters.trainable(Geometry.of(model).shapes, process)
    row = sum(flops.a_row(model, process, learns).values())
    return {name: MFU * peak / row * process.row.images for name, peak in PEAK.items()}


def write_pictures(folder: pathlib.Path, count: int) -> None:
    """JPEG files of quality 90 whose longest side is SIDE: windows of the demo's photographs."""
    folder.mkdir(parents=True)
    demo = builders.load("demo")
    for number in range(count):
        record = demo.record(number * 3 % len(demo))
        pixels = images.fit(demo.pixels(record.image.index), ImageRef(0, record.image.window), SIDE)
        Image.fromarray(pixels).save(folder / f"{number:04d}.jpg", quality=90)


def prepare(files: pathlib.Path, data_dir: pathlib.Path) -> None:
    """The files as the dataset `folder`."""
    subprocess.run([sys.executable, "-m", "tools.prepare_data", "--dataset", "folder", "--source", str(files),
                    "--data_dir", str(data_dir), "--shares", "0.9,0.05,0.05"], check=True,
                   stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


# ---- one side -------------------------------------------------------------------------------------------------------


def ours(model: config_lib.Model, process: config_lib.Process, scratch: pathlib.Path) -> Iterator[int]:
    """Pictures of each batch of the project's pipeline."""
    dataset = builders.load("folder", str(scratch / "data"))
    rows = pipeline.Rows(process, {"folder": dataset}, chat_lib.load(), model, seed=0, split="train")
    data = config_lib.Data(workers=os.cpu_count() or 1)
    for batch in pipeline.batches(rows, data, batch=ROWS, start=0, stop=1_000_000):
        yield int((batch["images"].reshape(*batch["images"].shape[:2], -1).max(-1) > 0).sum())


def theirs(model: config_lib.Model, process: config_lib.Process, scratch: pathlib.Path) -> Iterator[int]:
    """Pictures of each batch of a torch DataLoader."""
    import torch
    dataset = builders.load("folder", str(scratch / "data"))
    rows = pipeline.Rows(process, {"folder": dataset}, chat_lib.load(), model, seed=0, split="train")
    files = sorted((scratch / "files").glob("*.jpg"))
    loader = torch.utils.data.DataLoader(
        Files(files, rows, model.encoder.image_size), batch_size=CONVERSATIONS, shuffle=True, collate_fn=collate,
        num_workers=os.cpu_count() or 1, prefetch_factor=2, persistent_workers=True)
    while True:
        for batch in loader:
            yield len(batch["pixel_values"])


class Files:
    """A map-style torch Dataset: item i is a conversation about picture i and its edited versions."""

    def __init__(self, files: list[pathlib.Path], rows: pipeline.Rows, size: int):
        self.files, self.rows, self.size = files, rows, size

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> dict:
        import torch
        source = self.rows.sources[0]
        # The same questions and edits as ours: drawing them is cheap beside the pixels.
        example = pipeline.Example(0, int(source.indices[index % len(source.indices)]), source.tasks[0])
        sample = self.rows.sample(example)
        picture = Image.open(self.files[index]).convert("RGB")
        pixels = [self._prepared(picture, ref.edits, index) for ref in sample.images]
        text = " ".join([vicuna.SYSTEM, *(f"USER: {_said(turn)} ASSISTANT: {turn.answer.text}</s>"
                                           for turn in sample.turns)])
        return {"ids": torch.tensor(self.rows.chat.tokenizer.encode(text)), "pixels": torch.stack(pixels)}

    def _prepared(self, picture: Image.Image, edits: tuple[Edit, ...], seed: int):
        import torch
        scale = self.size / max(picture.size)
        fitted = picture.resize((max(1, round(picture.width * scale)), max(1, round(picture.height * scale))),
                                Image.Resampling.BICUBIC)
        for edit in edits:
            fitted = PILLOW[edit.attribute](fitted, edit.grade, np.random.default_rng(seed))
        square = Image.new("RGB", (self.size, self.size), tuple(round(255 * mean) for mean in MEAN))
        square.paste(fitted, ((self.size - fitted.width) // 2, (self.size - fitted.height) // 2))
        values = torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255
        return (values - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


def _said(turn) -> str:
    return " ".join(piece if isinstance(piece, str) else "<image>" for piece in turn.prompt)


def collate(items: list[dict]) -> dict:
    """Ids padded to the longest, pictures of all conversations one after the other."""
    import torch
    return {"input_ids": torch.nn.utils.rnn.pad_sequence([item["ids"] for item in items], batch_first=True),
            "pixel_values": torch.cat([item["pixels"] for item in items])}


def _pil(operation: Callable) -> Callable:
    return lambda picture, grade, rng: Image.fromarray(operation(np.array(picture), grade, rng).astype(np.uint8))


def _blur(picture, grade, rng):
    from PIL import ImageFilter
    return picture.filter(ImageFilter.GaussianBlur((0, 0.013, 0.036)[grade] * max(picture.size)))


def _jpeg(picture, grade, rng):
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=(95, 15, 6)[grade])
    return Image.open(file).convert("RGB")


def _enhance(kind: str, factors: tuple[float, ...]) -> Callable:
    from PIL import ImageEnhance
    return lambda picture, grade, rng: getattr(ImageEnhance, kind)(picture).enhance(factors[grade])


def _noise(pixels, grade, rng):
    return np.clip(pixels + rng.normal(0, (0, 14, 42)[grade], pixels.shape), 0, 255)


def _cast(gains: tuple[tuple[float, float, float], ...]) -> Callable:
    return _pil(lambda pixels, grade, rng: np.clip(pixels * np.asarray(gains[grade]), 0, 255))


def _vignette(pixels, grade, rng):
    height, width, _ = pixels.shape
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    return pixels * (1 - (0, 0.42, 0.88)[grade] * (x * x + y * y) / 2)[..., None]


def _cover(pixels, grade, rng):
    height, width, _ = pixels.shape
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    inside = np.hypot(y - 0.5, x) < (0, 0.25, 0.55)[grade]
    return np.where(inside[..., None], np.array([28, 26, 30]), pixels)


def _crop(shares: tuple[float, ...]) -> Callable:
    def crop(picture, grade, rng):
        width, height = (shares[grade] * side for side in picture.size)
        left, top = (picture.width - width) / 2, (picture.height - height) / 2
        return picture.crop((left, top, left + width, top + height)).resize(picture.size, Image.Resampling.BICUBIC)
    return crop


PILLOW: dict[str, Callable] = {
    "sharpness": _blur, "noise": _pil(_noise), "compression": _jpeg, "exposure": _enhance("Brightness", (0.5, 1, 1.7)),
    "contrast": _enhance("Contrast", (0.38, 1, 2.3)), "saturation": _enhance("Color", (0, 0.38, 1)),
    "temperature": _cast(((0.8, 1, 1.3), (1, 1, 1), (1.3, 1, 0.8))),
    "tint": _cast(((1.1, 0.9, 1.1), (1, 1, 1), (0.9, 1.1, 0.9))), "vignetting": _pil(_vignette),
    "tilt": lambda picture, grade, rng: picture.rotate((11, 0, -11)[grade], Image.Resampling.BILINEAR),
    "orientation": lambda picture, grade, rng: picture.rotate(180), "occlusion": _pil(_cover),
    "framing": _crop((1, 0.72, 0.48)), "aspect": _crop((0.8, 1, 0.8)),
}
assert PILLOW.keys() == attributes.ATTRIBUTES.keys()


def main(side: str, scratch: str, seconds: str, text: str) -> None:
    """One side for so many seconds, after its first batches; prints pictures a second."""
    given = json.loads(text)
    config = config_lib.from_config_dict({"model": given["model"], "processes": {"p": given["process"]}, "run": ["p"]})
    batches = (ours if side == "calm_jax" else theirs)(config.model, config.processes["p"], pathlib.Path(scratch))
    for _ in range(6):  # workers start, files are in memory
        next(batches)
    begin, pictures = time.perf_counter(), 0
    while time.perf_counter() - begin < float(seconds):
        pictures += next(batches)
    print(pictures / (time.perf_counter() - begin), flush=True)
    for child in multiprocessing.active_children():
        child.kill()
    os._exit(0)  # the prefetching threads would go on


if __name__ == "__main__":
    main(*sys.argv[1:])
