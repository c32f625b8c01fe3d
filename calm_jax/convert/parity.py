"""A checkpoint and its export in; whether both compute the same, stage by stage, out.

Conversations about none, one and three pictures, alone and in one batch of four, go through JAX here and through torch
in a process of its own, whose interpreter may have another version of transformers. Compared are the ids, the output
of every block, the logits (difference, KL divergence), answers (greedy and by beam search), and the scores of the
picture files. The exit code is 0 when all agree within the tolerance. In float32 each side takes 4 bytes a parameter,
one side after the other.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from PIL import Image

from calm_jax import config as config_lib
from calm_jax.checkpoints import restore
from calm_jax.convert import huggingface
from calm_jax.data import pictures
from calm_jax.data.samples import Answer, ImageRef, Mention, Sample, Turn
from calm_jax.data.tasks import instructions
from calm_jax.errors import ConfigError
from calm_jax.inference.decoding import Sampling
from calm_jax.inference.generate import Generator, bucket
from calm_jax.models import layers, vit
from calm_jax.models.calm import Calm
from calm_jax.models.decoders.llama import rotary
from calm_jax.models.encoders import Feature
from calm_jax.text.prompts import Layout

QUESTIONS = ("What is wrong with the light here, and what would you do about it?", "Describe the picture.",
             "Which of them is the best, and why?", "Please comment on sharpness and noise.")
SCORE_TOLERANCE = 1e-3
BEAMS = 3


@dataclasses.dataclass
class Stage:
    """What both sides compute of one thing: largest difference, and the largest value to judge it by."""

    name: str
    difference: float = 0.0
    scale: float = 0.0

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        self.difference = max(self.difference, float(np.max(np.abs(ours - theirs), initial=0)))
        self.scale = max(self.scale, float(np.max(np.abs(theirs), initial=0)))


@dataclasses.dataclass(frozen=True)
class Result:
    """Attributes:
      report: versions, loading problems and first words of comments from the torch side.
      ids: whether all prompts have the same ids and visual tokens.
      stages: in the order in which they are computed; the last is the logits.
      kl: largest KL divergence of a next-token distribution, nats.
      answers, agree: greedy answers, and how many of them are token by token the same.
      searched: of as many answers by beam search, how many are the same.
      scores: the largest difference of a score or its spread (1-10), by any reader that both have.
      differs: the first stage whose difference is above `tolerance` times its largest value, or "".
    """

    report: dict
    ids: bool
    stages: list[Stage]
    kl: float
    answers: int
    agree: int
    searched: int
    scores: float
    tolerance: float

    @property
    def differs(self) -> str:
        return next((stage.name for stage in self.stages if not stage.difference <= self.tolerance * stage.scale), "")

    @property
    def logits(self) -> float:
        return self.stages[-1].difference

    def holds(self) -> bool:
        return (self.ids and self.logits <= self.tolerance and self.agree == self.searched == self.answers
                and self.scores <= SCORE_TOLERANCE and not any(self.report[name] for name in (
                    "missing_keys", "unexpected_keys", "mismatched_keys")))


def check(source: str, hf: str, **options: Any) -> Result:
    """Runs both sides of one checkpoint and its export and compares them; else as `check_all`."""
    return check_all([(source, hf)], **options)[0]


def check_all(pairs: Sequence[tuple[str, str]], *, images: tuple[str, ...] = (), python: str = sys.executable,
              dtype: str = "float32", tolerance: float = 1e-4, new_tokens: int = 64) -> list[Result]:
    """Runs both sides of every (checkpoint, export) and compares them; one process of torch serves all.

    Args:
      images: files; without any, three that are made here.
      python: interpreter of the torch side.
      dtype: of the computation on both sides.
      tolerance: of logits, and of every stage as a share of its largest value.
      new_tokens: most tokens of an answer.

    Raises:
      ConfigError: a folder is none that was exported, or the torch side fails.
      CheckpointError: as `restore.model`.
    """
    for _, hf in pairs:
        if not (pathlib.Path(hf) / "processor_config.json").is_file():
            raise ConfigError(f"{hf} is no folder that calm export wrote: it has no processor_config.json")
    with tempfile.TemporaryDirectory() as scratch:
        place = pathlib.Path(scratch)
        files = [str(pathlib.Path(file).absolute()) for file in images] or made(place)
        sides = []
        for number, (source, _) in enumerate(pairs):
            model = restore.model(source)
            cfg = model.config.model
            generator = Generator(cfg, model.parameters, model.chat, dtype=jnp.dtype(dtype))
            del model  # the generator holds its weights in arrays of its own
            cases, readers, folder = _cases(cfg, files), _readers(cfg), place / str(number)
            folder.mkdir()
            (folder / "request.json").write_text(json.dumps({
                "dtype": dtype, "new_tokens": new_tokens, "beams": BEAMS, "score": files, "readers": readers, "cases": [
                    {"images": [[files[n] for n in row] for row in rows], "parts": parts,
                     "text": list(QUESTIONS[:len(rows)])} for rows, parts in cases]}))
            sides.append((generator, cases, files, readers, folder))
        _torch(python, [hf for _, hf in pairs], [side[-1] for side in sides], place)
        return [_compare(*side, tolerance, new_tokens) for side in sides]


def made(folder: pathlib.Path) -> list[str]:
    """Three JPEG files of different shapes: something to look at, the same everywhere."""
    files = []
    for number, (height, width) in enumerate(((96, 144), (150, 100), (64, 64))):
        y, x = np.mgrid[0:height, 0:width]
        waves = np.stack([np.sin(x / (7 + number)) + np.cos(y / 11), np.sin((x + y) / 19), np.cos(x * y / 900)], -1)
        grain = np.random.default_rng(number).normal(0, 12, (height, width, 3))
        Image.fromarray(np.clip(127 + 60 * waves + grain, 0, 255).astype(np.uint8)).save(folder / f"{number}.jpg")
        files.append(str(folder / f"{number}.jpg"))
    return files


def _readers(model: config_lib.Model) -> list[str]:
    """Those that the exported `score` has too."""
    return ["expectation", "levels", *(["head"] if model.score_head.width else [])]


def _cases(model: config_lib.Model, files: list[str]) -> list[tuple[list[list[int]], tuple[str, ...]]]:
    """Pictures of each row and the parts that are mentioned: rows of 0, 1 and 3 pictures alone, then four together.
    Where three whole pictures do not fit the positions, their Q-Former tokens must do."""
    three = [n % len(files) for n in range(3)]
    whole = sum(model.visual_tokens(part) for part in config_lib.PARTS)
    parts = config_lib.PARTS if 3 * whole + 256 <= model.decoder.positions else config_lib.LEVELS
    return [([[]], parts), ([[0]], parts), ([three], parts), ([[], [three[1]], three, [0]], parts)]


def _torch(python: str, exports: list[str], folders: list[pathlib.Path], scratch: pathlib.Path) -> None:
    """Each of `folders` holds the request of one of the exports, and what torch computes of it after that."""
    script = pathlib.Path(huggingface.__file__).with_name("parity_torch.py")
    # Modules of an exported folder are cached by its name: a cache of its own cannot hold another export's.
    environment = {**os.environ, "HF_MODULES_CACHE": str(scratch / "modules"), "HF_HUB_OFFLINE": "1"}
    jobs = [(str(pathlib.Path(hf).absolute()), str(folder / "request.json"), str(folder))
            for hf, folder in zip(exports, folders, strict=True)]
    done = subprocess.run([python, str(script), *(word for job in jobs for word in job)], env=environment, text=True,
                          stderr=subprocess.PIPE)
    if done.returncode:
        raise ConfigError(f"the torch side failed under {python}:\n{done.stderr[-3000:]}")


def _compare(generator: Generator, cases, files, readers, folder, tolerance, new_tokens) -> Result:
    """`folder` holds what the torch side wrote."""
    theirs = np.load(folder / "rest.npz")
    run = _Stages(generator.geometry.bind(generator.parameters), generator.dtype)
    pixels = [pictures.read(file) for file in files]
    stages: dict[str, Stage] = {}
    kl, answers, agree, same = 0.0, 0, {"said": 0, "searched": 0}, True
    width = bucket(int(theirs["longest"]))
    for number, (rows, parts) in enumerate(cases):
        samples = [(_sample(row, parts, question), 0) for row, question in zip(rows, QUESTIONS, strict=False)]
        batch = _padded(generator.arrays(samples, pixels.__getitem__, new_tokens), width, 3)
        case = np.load(folder / f"{number}.npz")  # read one array at a time
        for row, length in enumerate(batch["lengths"]):
            same &= case["attention_mask"][row].sum() == length and all(
                np.array_equal(batch[mine][row, :length], case[other][row, -length:])
                for mine, other in (("tokens", "input_ids"), ("visual", "visual")))
        slots = max(map(len, rows))
        for name, value in run(batch) if same else ():
            stage = stages.setdefault(name, Stage(name))
            of_words = name == "logits" or name.startswith("LLM")
            for row, length in enumerate(batch["lengths"]):
                shown = len(rows[row])
                if of_words:
                    stage.add(value[row, :length], case[name][row, -length:])
                elif shown:  # else there is nothing to see in this row
                    stage.add(value[row, :shown], case[name][row * slots:row * slots + shown])
                if name == "logits":
                    kl = max(kl, _kl(value[row, :length], case[name][row, -length:]))
        for name, beams in (("said", 1), ("searched", BEAMS)):
            mine = generator.ids(batch, new_tokens, Sampling(beams=beams))
            agree[name] += sum(_agree(*both, generator.chat.stop) for both in zip(mine, case[name], strict=True))
        answers += len(mine)
    scores = np.asarray([[(score.value, score.spread) for score in generator.scores(
        [(_sample([n], config_lib.PARTS, instructions.for_reader(reader)), 0) for n in range(len(files))],
        pixels.__getitem__, reader=reader, batch=len(files))] for reader in readers])
    return Result(json.loads(str(theirs["report"])), same, list(stages.values()), kl, answers, agree["said"],
                  agree["searched"], float(np.abs(scores - theirs["scores"]).max()), tolerance)


def _padded(batch: dict[str, np.ndarray], width: int, slots: int) -> dict[str, np.ndarray]:
    """The same prompts in rows of at least so many tokens and pictures, so that few programs are compiled."""
    room = max(0, width - batch["tokens"].shape[1])
    images = max(0, slots - batch["images"].shape[1])
    return batch | {"tokens": np.pad(batch["tokens"], ((0, 0), (0, room))),
                    "visual": np.pad(batch["visual"], ((0, 0), (0, room)), constant_values=-1),
                    "images": np.pad(batch["images"], ((0, 0), (0, images), *((0, 0),) * 3))}


def _sample(row: list[int], parts: tuple[str, ...], question: str) -> Sample:
    mentions = tuple(Mention(n, parts) for n in range(len(row)))
    text = f" {question}" if row else question
    return Sample(tuple(ImageRef(n) for n in row), (Turn((*mentions, text), Answer("")),))


class _Stages:
    """The model in pieces that are compiled once. Blocks run one by one, so that no more than a stage is held."""

    def __init__(self, model: Calm, dtype):
        self.cfg = model.cfg
        self.taps = {part: self.cfg.depths.block(part, self.cfg.encoder.depth) for part in config_lib.PARTS}
        self._begin = _jit(model.encoder, lambda encoder, images: encoder.hidden_states(
            vit.normalise(images, encoder.cfg, dtype), (0,))[0])
        self._see = _jit(model.encoder.blocks, lambda blocks, n, x: layers.unstack(blocks, n)(x))
        self._align = _jit(model.mfam, lambda mfam, states: mfam({
            part: Feature(x, self.cfg.encoder.part(part).prefix) for part, x in states.items()}))
        self._embed = _jit(model, lambda model, *arguments: model.embed(*arguments))
        self._turn = jax.jit(lambda positions: rotary(positions, self.cfg.decoder, positions.shape[1]))
        split = [nnx.split(block) for block in model.decoder.blocks]
        say = jax.jit(lambda state, *arguments: nnx.merge(split[0][0], state)(*arguments))  # one program for all
        self._say = [functools.partial(say, state) for _, state in split]
        self._norm = _jit(model.decoder.norm, lambda norm, x: norm(x))
        self._logits = _jit(model.decoder, lambda llama, x: llama.logits(x))

    def __call__(self, batch: dict[str, np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
        """Every stage by name, in order: of pictures `[B, I, ...]`, of words `[B, T, ...]`, float32."""
        rows = len(batch["tokens"])

        def of_pictures(x):
            return np.asarray(rearrange(x, "(b i) n d -> b i n d", b=rows), np.float32)

        x = self._begin(rearrange(batch["images"], "b i h w c -> (b i) h w c"))
        encoded = {0: x}
        yield "encoder 0", of_pictures(x)
        for n in range(max(self.taps.values())):
            encoded[n + 1] = x = self._see(n, x)
            yield f"encoder {n + 1}", of_pictures(x)
        tokens = self._align({part: encoded[tap] for part, tap in self.taps.items()})
        for part, (first, count) in Layout.of(self.cfg, config_lib.PARTS).spans.items():
            yield "thematic" if part == "thematic" else f"Q-Former {part}", of_pictures(tokens[:, first:first + count])
        x = self._embed(batch["tokens"], batch["visual"], rearrange(tokens, "(b i) n d -> b (i n) d", b=rows))
        positions = np.broadcast_to(np.arange(x.shape[1], dtype=np.int32), x.shape[:2])
        segments, angles = (positions < batch["lengths"][:, None]).astype(np.int32), self._turn(positions)
        for n in range(self.cfg.decoder.depth):
            x = self._say[n](x, angles, segments)
            yield f"LLM {n + 1}", np.asarray(x, np.float32)
        x = self._norm(x)
        yield "LLM norm", np.asarray(x, np.float32)
        yield "logits", np.asarray(self._logits(x))


def _jit(module: nnx.Module, function):
    """`function(module, ...)` compiled, with the module's parameters as arguments of the program."""
    graphdef, state = nnx.split(module)
    return functools.partial(jax.jit(lambda state, *arguments: function(nnx.merge(graphdef, state), *arguments)), state)


def _kl(ours: np.ndarray, theirs: np.ndarray) -> float:
    p, q = (np.asarray(jax.nn.log_softmax(jnp.asarray(x, jnp.float32))) for x in (theirs, ours))
    return float((np.exp(p) * (p - q)).sum(-1).max())


def _agree(ours: np.ndarray, theirs: np.ndarray, stop: int) -> bool:
    """The same tokens; behind the end, one side repeats it and the other pads or stops."""
    def ended(ids):
        ids = ids.tolist()
        return ids[:ids.index(stop)] if stop in ids else ids
    return ended(ours) == ended(theirs)


def show(result: Result) -> str:
    """The result as text."""
    lines = [f"torch {result.report['torch']}, transformers {result.report['transformers']}; loading: "
             + ", ".join(f"{len(result.report[name])} {name.replace('_', ' ')}" for name in (
                 "missing_keys", "unexpected_keys", "mismatched_keys")),
             f"  {'stage':<18}{'difference':>12}{'largest value':>15}"]
    lines += [f"  {stage.name:<18}{stage.difference:>12.2e}{stage.scale:>15.3g}" for stage in result.stages]
    lines += [f"ids and visual tokens: {'the same' if result.ids else 'DIFFERENT'}",
              f"largest KL divergence of a next token: {result.kl:.2e} nats",
              f"greedy answers token by token the same: {result.agree} of {result.answers}",
              f"answers by beam search token by token the same: {result.searched} of {result.answers}",
              f"largest difference of a score: {result.scores:.2e} (scale 1-10)",
              f"first differing layer: {result.differs or 'none'}",
              "the export computes what the checkpoint computes" if result.holds() else "THE TWO DO NOT AGREE"]
    return "\n".join(lines)
