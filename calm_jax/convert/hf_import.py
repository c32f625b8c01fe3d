"""Published checkpoints of the parts in; one CALM checkpoint to train from, out.

Each part is a Hugging Face folder, a weight file or a hub id; the language model may be a GGUF file and the encoder an
ONNX file (`convert.sources`). One Q-Former serves all three levels, three are low, middle and high; without any, the
Q-Formers are initialised at random, as the fully connected layer is in any case. A Q-Former may be a file of LAVIS,
such as blip2_pretrained.pth: without a config.json beside it, its tensors tell the geometry. Every value is kept bit
for bit in its stored dtype; quantised ones become float32. Memory holds a few tensors, whatever the size of the model;
an ONNX file, of 2 GB at most, is read whole. The checkpoint's meta.json names every source and the licence it states.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import tqdm

from calm_jax import config as config_lib
from calm_jax.checkpoints import streaming
from calm_jax.convert import families, hf_config, mfam, sources, tables, torch_files
from calm_jax.convert import parts as parts_lib
from calm_jax.convert.sources import Source
from calm_jax.errors import ConfigError
from calm_jax.models.parameters import Geometry
from calm_jax.text.chat import Chat

Tensors = Mapping[str, torch_files.Tensor]
Pieces = dict[str, list[tuple[tuple[int, ...], torch_files.Tensor, tables.Rearrange]]]

# A special token that tells the chat template -> its name.
TOLD = {"<|start_header_id|>": "llama3", "<|im_start|>": "chatml"}
# Leaves of a Q-Former whose shape follows its neighbours: those of another encoder or language model are of no use.
FITTED = {
    "keys and values of its cross-attention": r"groups/blocks/0/cross/(k|v)/kernel",
    "norm of the encoder's features": r"context_norm/(scale|bias)",
    "projection to the language model": r"project/(kernel|bias)",
}


def convert(vit: str, llm: str, qformers: list[str], out: str, seed: int = 0, *, template: str = "",
            image_size: int = 0, say: Callable[[str], None] = print) -> pathlib.Path:
    """Writes the checkpoint `out` and returns its path.

    Args:
      vit, llm, qformers: folders, weight files or hub ids.
      template: name of the chat template; empty = what the special tokens of the tokenizer tell, else Vicuna's.
      image_size: side of the images that the encoder is to see, pixels; 0 = as it was trained.

    Raises:
      ConfigError: a part cannot be read or is of another kind than CALM computes; or the tokenizer does not fit.
      CheckpointError: `out` exists, or cannot be written.
    """
    if len(qformers) not in (0, 1, 3):
        raise ConfigError(f"--qformer takes one Q-Former for all levels or three, not {len(qformers)}")
    eyes, words = sources.find(vit), sources.find(llm)
    places = [torch_files.locate(name) for name in qformers]
    found = [torch_files.tensors(path) for path in places]
    model = _model(_encoder(eyes, image_size), words, [_qformer(path, tensors) for path, tensors in
                                                       zip(places, found, strict=True)])
    chat = _chat(words, model.decoder, template)
    config = config_lib.Config(seed=seed, model=model, chat=chat.template)
    shapes = {path: leaf.shape for path, leaf in Geometry.of(model).shapes.items()}
    pieces: Pieces = {}
    for prefix, cfg, source in (("encoder/", model.encoder, eyes), ("decoder/", model.decoder, words)):
        _add(pieces, prefix, families.of(cfg).table(cfg), source.path, source.tensors(), shapes)
        for note in source.notes:
            say(note)
    if found:
        every = 3 // len(found)
        _add_qformers(pieces, model, places * every, found * every, shapes, say)
    leaves = {path: streaming.Leaf(shapes[path], np.result_type(*(tensor.dtype for _, tensor, _ in parts)),
                                   tuple((index, _reader(tensor, transform)) for index, tensor, transform in parts))
              for path, parts in pieces.items()}
    config = dataclasses.replace(config, model=dataclasses.replace(model, visual_rms=_rms(leaves, say)))
    groups = {"/".join(path.split("/")[:2]) for path in shapes} - {"/".join(path.split("/")[:2]) for path in leaves}
    for group in sorted(groups):
        say(f"left to random numbers: {group}")
    meta = {"process": "", "rows": 0, "best": None, "trained": [], "base": "", "seed": seed,
            "config": dataclasses.asdict(config), "tokenizer": chat.tokenizer.fingerprint,
            "sources": {"vit": _told(vit, eyes), "llm": _told(llm, words),
                        "qformer": [parts_lib.source(*pair) for pair in zip(qformers, places, strict=True)]}}
    with tqdm.tqdm(total=sum(leaf.nbytes for leaf in leaves.values()), unit="B", unit_scale=True, desc="converting",
                   mininterval=0.5) as bar:
        return streaming.save(out, leaves, meta, files=chat.tokenizer.files, progress=bar.update)


def _rms(leaves: Mapping[str, streaming.Leaf], say: Callable[[str], None]) -> float:
    """The root mean square of the word embeddings, to four digits: fresh visual tokens begin at that of words. 0 where
    a family keeps them elsewhere than ours do, and, which is said, where it is no number that a config can hold."""
    leaf = leaves.get("decoder/embedding")
    if leaf is None:
        return 0.0
    with np.errstate(all="ignore"):  # they are somebody else's, and are kept bit for bit whatever they are
        total = sum(np.square(rows, dtype=np.float64).sum() for _, read in leaf.pieces
                    for rows in np.array_split(np.asarray(read(), np.float32), 16))
        rms = float(f"{(total / np.prod(leaf.shape)) ** 0.5:.4g}")
    if rms and not config_lib.SMALLEST <= rms <= config_lib.LARGEST:  # NaN is not, either
        say(f"the root mean square of the word embeddings is {rms:g}: fresh visual tokens begin at 1 instead")
        return 0.0
    return rms


def _told(name: str, source: Source) -> dict[str, str]:
    """What the checkpoint says of a part; its licence, where no provenance tells it, is what the part itself states."""
    told = parts_lib.source(name, source.path)
    return told if told["licence"] else told | {"licence": source.licence()}


def _encoder(vit: Source, image_size: int) -> config_lib.Encoder:
    """As its config.json has it, for images of `image_size` pixels a side; 0 = as it was trained."""
    encoder = hf_config.normalised(families.read(vit.config(), "encoder"), vit.path)
    return encoder.resized(image_size) if image_size else encoder


def _model(encoder: config_lib.Encoder, llm: Source, qformers: list[config_lib.QFormer]) -> config_lib.Model:
    """The geometry of the parts; what no part decides is that of `7b`."""
    model = dataclasses.replace(config_lib.model("7b"), encoder=encoder,
                                decoder=families.read(llm.config(), "language model"))
    if qformers:
        if any(kind != qformers[0] for kind in qformers):
            raise ConfigError("the Q-Formers of the three levels differ in geometry; CALM's are alike")
        model = dataclasses.replace(model, qformer=qformers[0])
    return model


def _qformer(path: pathlib.Path, found: Tensors) -> config_lib.QFormer:
    """By its config.json, or by the tensors of a file that has none beside it."""
    if path.is_dir() or (path.parent / "config.json").exists():
        return mfam.qformer(hf_config.read(path))
    try:
        return mfam.qformer_of({name: tensor.shape for name, tensor in found.items()})
    except ConfigError as error:
        raise hf_config.GeometryError(f"{path}: {error}") from None


def _chat(llm: Source, cfg: config_lib.Decoder, template: str) -> Chat:
    """The tokenizer of a language model, and the chat template that is named or that its special tokens tell."""
    tokenizer = llm.tokenizer()
    if not template:
        template = next((name for token, name in TOLD.items() if tokenizer.special(token) is not None), "vicuna")
    chat = Chat.of(tokenizer, template)
    if not chat.fits(cfg.vocab):
        raise ConfigError(f"{tokenizer.name} has {tokenizer.vocab} pieces and the language model beside it "
                          f"{cfg.vocab}; they do not belong together: fetch both from one place")
    return chat


def _add(pieces: Pieces, prefix: str, table: tables.Table, source: pathlib.Path, found: Tensors,
         shapes: tables.Shapes, lead: tuple[int, ...] = ()) -> None:
    """Puts the place of every tensor of a part into `pieces`; `lead` is the index in front of the part's own axes."""
    own = {path.removeprefix(prefix): shape[len(lead):] for path, shape in shapes.items() if path.startswith(prefix)}
    try:
        entries = tables.match(table, {name: tensor.shape for name, tensor in found.items()}, own)
    except tables.WeightError as error:
        raise torch_files.FileError(f"{source}: {error}; the config and the weights belong together: fetch both from "
                                    "one place") from None
    for name, entry in entries.items():
        if found[name].unusable:
            raise torch_files.FileError(found[name].unusable)
        pieces.setdefault(prefix + entry.path, []).append(((*lead, *entry.index), found[name], entry.transform))
    for name, other, sentence in tables.copies(table, found):
        if found[name].unusable or not np.array_equal(found[name].read(), found[other].read()):
            raise torch_files.FileError(f"{source}: {sentence}")


def _add_qformers(pieces: Pieces, model: config_lib.Model, sources: list[pathlib.Path], found: list[Tensors],
                  shapes: tables.Shapes, say: Callable[[str], None]) -> None:
    """All levels. What belongs to a Q-Former's former neighbours, and is absent or of other widths, stays random; in
    all levels, as they share their leaves."""
    prefix, table = "mfam/qformers/", mfam.qformer_table(model.qformer)
    own = {path.removeprefix(prefix): shape[1:] for path, shape in shapes.items() if path.startswith(prefix)}
    for what, pattern in FITTED.items():
        if not all(tables.fits(table, {name: tensor.shape for name, tensor in level.items()}, own, pattern)
                   for level in found):
            table = table.without(pattern, f"the {what} is of another width, or absent")
            say(f"the Q-Former's {what} is absent or of another width: it is left to random numbers")
    for level, (source, tensors) in enumerate(zip(sources, found, strict=True)):
        _add(pieces, prefix, table, source, tensors, shapes, lead=(level,))


def _reader(tensor: torch_files.Tensor, transform: tables.Rearrange) -> Callable[[], np.ndarray]:
    return lambda: transform.to_jax(tensor.read())
