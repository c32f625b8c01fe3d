"""Hugging Face checkpoints of the parts in; one CALM checkpoint to train from, out.

Each part is a folder, a weight file or a hub id. One Q-Former serves all three levels, three are low, middle and high;
without any, the Q-Formers are initialised at random, as the fully connected layer does in any case. A Q-Former may be
a file of LAVIS, such as blip2_pretrained.pth: without a config.json beside it, its tensors tell the geometry. Every
value is kept bit for bit in its stored dtype. Memory holds a few tensors, whatever the size of the model. The
checkpoint's meta.json names every source and the licence that its README.md or its provenance.json states.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping

import numpy as np
import tqdm

from calm_jax import config as config_lib
from calm_jax.checkpoints import streaming
from calm_jax.convert import families, hf_config, mfam, parts, tables, torch_files
from calm_jax.errors import ConfigError
from calm_jax.models.parameters import Geometry
from calm_jax.text import tokenizers
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
            say: Callable[[str], None] = print) -> pathlib.Path:
    """Writes the checkpoint `out` and returns its path.

    Args:
      vit, llm, qformers: folders, weight files or hub ids.
      template: name of the chat template; empty = what the special tokens of the tokenizer tell, else Vicuna's.

    Raises:
      ConfigError: a part cannot be read or is of another kind than CALM computes; or the tokenizer does not fit.
      CheckpointError: `out` exists, or cannot be written.
    """
    if len(qformers) not in (0, 1, 3):
        raise ConfigError(f"--qformer takes one Q-Former for all levels or three, not {len(qformers)}")
    places = {"vit": torch_files.locate(vit), "llm": torch_files.locate(llm)}
    sources = [torch_files.locate(name) for name in qformers]
    found = [torch_files.tensors(path) for path in sources]
    model = _model(places["vit"], places["llm"], [_qformer(path, tensors) for path, tensors in
                                                  zip(sources, found, strict=True)])
    chat = _chat(places["llm"], model.decoder, template)
    config = config_lib.Config(seed=seed, model=model, chat=chat.template)
    shapes = {path: leaf.shape for path, leaf in Geometry.of(model).shapes.items()}
    pieces: Pieces = {}
    for prefix, cfg, place, found_there in (
            ("encoder/", model.encoder, places["vit"], torch_files.tensors(places["vit"])),
            ("decoder/", model.decoder, places["llm"], _untied(torch_files.tensors(places["llm"]), places["llm"]))):
        _add(pieces, prefix, families.of(cfg).table(cfg), place, found_there, shapes)
    if found:
        every = 3 // len(found)
        _add_qformers(pieces, model, sources * every, found * every, shapes, say)
    leaves = {path: streaming.Leaf(shapes[path], np.result_type(*(tensor.dtype for _, tensor, _ in parts)),
                                   tuple((index, _reader(tensor, transform)) for index, tensor, transform in parts))
              for path, parts in pieces.items()}
    groups = {"/".join(path.split("/")[:2]) for path in shapes} - {"/".join(path.split("/")[:2]) for path in leaves}
    for group in sorted(groups):
        say(f"left to random numbers: {group}")
    meta = {"process": "", "rows": 0, "best": None, "trained": [], "base": "", "seed": seed,
            "config": dataclasses.asdict(config), "tokenizer": chat.tokenizer.fingerprint,
            "sources": {"vit": _source(vit, places["vit"]), "llm": _source(llm, places["llm"]),
                        "qformer": [_source(*pair) for pair in zip(qformers, sources, strict=True)]}}
    with tqdm.tqdm(total=sum(leaf.nbytes for leaf in leaves.values()), unit="B", unit_scale=True, desc="converting",
                   mininterval=0.5) as bar:
        return streaming.save(out, leaves, meta, files=chat.tokenizer.files, progress=bar.update)


def _source(name: str, place: pathlib.Path) -> dict[str, str]:
    return parts.source(name, place)


def _model(vit: pathlib.Path, llm: pathlib.Path, qformers: list[config_lib.QFormer]) -> config_lib.Model:
    """The geometry of the parts; what no part decides is that of `7b`."""
    model = dataclasses.replace(config_lib.model("7b"), encoder=families.read(hf_config.read(vit), "encoder"),
                                decoder=families.read(hf_config.read(llm), "language model"))
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


def _chat(llm: pathlib.Path, cfg: config_lib.Decoder, template: str) -> Chat:
    """The tokenizer beside a language model, and the chat template that is named or that its special tokens tell."""
    folder = llm if llm.is_dir() else llm.parent
    tokenizer = tokenizers.load(str(folder), remedy="it belongs to the language model beside it, as tokenizer.model or "
                                "tokenizer.json: fetch it into that folder")
    if not template:
        template = next((name for name, token in TOLD.items() if tokenizer.special(token) is not None), "vicuna")
    chat = Chat.of(tokenizer, template)
    if not chat.fits(cfg.vocab):
        raise ConfigError(f"{tokenizer.name} has {tokenizer.vocab} pieces and the language model beside it "
                          f"{cfg.vocab}; they do not belong together: fetch both from one place")
    return chat


def _untied(found: Tensors, llm: pathlib.Path) -> Tensors:
    """A language model whose head is its embedding keeps one tensor for both; CALM's head is a leaf of its own."""
    tied = hf_config.read(llm).flag("tie_word_embeddings", False) and "lm_head.weight" not in found
    both = found.get("model.embed_tokens.weight") if tied else None
    return {**found, "lm_head.weight": both} if both else found


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
