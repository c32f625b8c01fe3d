"""A checkpoint in; a Hugging Face folder that transformers loads without this package, out.

    model = AutoModelForCausalLM.from_pretrained("calm-hf", trust_remote_code=True)
    model.score(["a.jpg", "b.jpg"]); model.comment(["a.jpg"])

Weights keep their stored dtype, bit for bit, unless --dtype says otherwise. --parts also writes each part alone, under
its own published class, into `parts/`. LoRA adapters stay apart (in PEFT's names) unless they are merged. Memory
holds a few tensors, whatever the size of the model; until all is written the folder has another name, which ends in
`.partial`, and no config.json, without which nothing loads it.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np
import tqdm

from calm_jax import config as config_lib
from calm_jax import files
from calm_jax.checkpoints import locate, restore
from calm_jax.checkpoints.meta import Saved
from calm_jax.convert import families, huggingface, mfam, model_card, tables, torch_files, whole
from calm_jax.data import pictures
from calm_jax.data.tasks import instructions, skills
from calm_jax.errors import CheckpointError, ConfigError
from calm_jax.text.chat import Chat
from calm_jax.text.tokenizers import Tokenizer
from calm_jax.text.tokenizers.hugging_face import HuggingFaceTokenizer
from calm_jax.text.tokenizers.sentence_piece import SentencePieceTokenizer

DTYPES = {"float32": np.dtype(np.float32), "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
CLASSES = {"AutoConfig": "configuration_calm.CalmConfig", "AutoModelForCausalLM": "modeling_calm.CalmForCausalLM",
           "AutoProcessor": "processing_calm.CalmProcessor"}
# What the files in huggingface/ compute: families of encoders and language models, and kinds of tokenizers.
ENCODERS, DECODERS = ("clip", "dinov2", "siglip"), ("llama",)
TOKENIZERS = (SentencePieceTokenizer, HuggingFaceTokenizer)
# What the torch model has to know of an encoder besides the fields of its config: properties of its family.
TRAITS = ("activation", "cls", "registers", "pre_norm", "stem_bias", "layer_scale", "antialias")
Leaves = Mapping[str, restore.Lazy]


@dataclasses.dataclass(frozen=True)
class Folder:
    """A Hugging Face folder to be written: its place under the whole, its tensors, and its small files by name."""

    place: str
    tensors: Sequence[torch_files.Tensor]
    texts: Mapping[str, Any]  # name -> JSON value or text
    copies: Mapping[str, pathlib.Path] = dataclasses.field(default_factory=dict)
    weights: str = "model.safetensors"


def export(source: str, out: str, *, merge_lora: bool = False, parts: bool = False, dtype: str = "stored",
           say: Callable[[str], None] = print) -> pathlib.Path:
    """Writes the folder `out` and returns its path.

    Raises:
      CheckpointError: the checkpoint cannot be read, `out` exists, or cannot be written.
      ConfigError: there is something that torch's classes cannot hold.
    """
    path = pathlib.Path(out).absolute()
    if path.exists():
        raise CheckpointError(f"{path} exists already; choose another folder, or remove it first")
    saved = locate.find(source)
    model = saved.config.model
    for what, family, computed in (("encoder", model.encoder.family, ENCODERS),
                                   ("language model", model.decoder.family, DECODERS)):
        if family not in computed:
            raise ConfigError(f"the {what} of {saved.path} is of the family {family!r}, and the torch model of exports "
                              f"computes {', '.join(computed)} alone; such a model can be used here alone")
    chat = restore.chat(saved)
    if type(chat.tokenizer) not in TOKENIZERS:
        raise ConfigError(f"the tokenizer of {saved.path}, {chat.tokenizer.name}, is of a kind of its own, and the "
                          f"processor of exports knows {' and '.join(kind.FILES[0] for kind in TOKENIZERS)} alone; "
                          "such a model can be used here alone")
    leaves = restore.lazily(saved)
    if model.light_head.grades:  # nothing is read from it
        model = dataclasses.replace(model, light_head=config_lib.LightHead())
        leaves = {name: leaf for name, leaf in leaves.items() if not name.startswith("light_head/")}
    if merge_lora:
        if not model.lora.rank:
            raise ConfigError(f"{saved.path} has no low-rank updates to merge; leave --merge-lora out")
        leaves = merged(leaves, model.lora)
        model = dataclasses.replace(model, lora=dataclasses.replace(model.lora, rank=0))
    if dtype != "stored":
        leaves = {name: cast(leaf, DTYPES[dtype]) for name, leaf in leaves.items()}
    folders = [*(_parts(model, leaves, chat, say) if parts else ()), everything(saved, model, leaves, chat)]
    try:
        with files.whole_folder(path) as partial, tqdm.tqdm(
                total=sum(tensor.nbytes for folder in folders for tensor in folder.tensors), unit="B",
                unit_scale=True, desc="exporting", mininterval=0.5) as bar:
            for folder in folders:  # the whole comes last: its config.json makes the folder one
                _write(partial / folder.place, folder, bar.update)
    except OSError as error:
        raise CheckpointError(f"{path} could not be written: {error}; free some space or choose another "
                              "place, and run the same command again") from error
    return path


def _write(place: pathlib.Path, folder: Folder, progress: Callable[[int], None]) -> None:
    place.mkdir(parents=True, exist_ok=True)
    torch_files.save(place, folder.tensors, name=folder.weights, progress=progress)
    for name, file in folder.copies.items():
        shutil.copyfile(file, place / name)
    # Without its config no reader accepts a folder: it comes last.
    for name in sorted(folder.texts, key=lambda name: name == "config.json"):
        value = folder.texts[name]
        (place / name).write_text(value if isinstance(value, str) else json.dumps(value, indent=2) + "\n")


def merged(leaves: Leaves, lora: config_lib.Lora) -> dict[str, restore.Lazy]:
    """Every update added to its kernel in float32, as `models.lora.merge` does it, kept in the kernel's dtype."""
    result = {}
    for path, leaf in _plain(leaves).items():
        above = path.removesuffix("/kernel")
        if f"{above}/lora/a" in leaves:
            leaf = _merge(leaf, leaves[f"{above}/lora/a"], leaves[f"{above}/lora/b"], lora.alpha / lora.rank)
        result[path] = leaf
    return result


def _merge(leaf: restore.Lazy, a: restore.Lazy, b: restore.Lazy, scale: float) -> restore.Lazy:
    def read(index):
        update = (a.read(index).astype(np.float32) @ b.read(index).astype(np.float32)) * scale
        return (leaf.read(index).astype(np.float32) + update).astype(leaf.dtype)
    return dataclasses.replace(leaf, read=read)


def cast(leaf: restore.Lazy, dtype: np.dtype) -> restore.Lazy:
    """The same values rounded to another dtype."""
    return restore.Lazy(leaf.shape, dtype, lambda index: leaf.read(index).astype(dtype))


def tensors(table: tables.Table, leaves: Leaves, prefix: str = "") -> list[torch_files.Tensor]:
    """The torch tensors of a table over the leaves under `prefix`, each ready to be read, in the table's order.

    Raises:
      WeightError: leaves and table do not correspond.
    """
    own = {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}
    entries, problems = tables.expand(table, {path: leaf.shape for path, leaf in own.items()})
    if problems:
        raise tables.WeightError(problems)
    found = {entry.key: _tensor(entry, own[entry.path]) for entry in entries}
    for constant in table.constants:
        like = found[constant.like]
        shape = constant.shape(like.shape)
        found[constant.key] = torch_files.Tensor(
            constant.key, shape, like.dtype,
            lambda shape=shape, value=constant.value, dtype=like.dtype: np.full(shape, value, dtype))
    return list(found.values())


def _tensor(entry: tables.Entry, leaf: restore.Lazy) -> torch_files.Tensor:
    return torch_files.Tensor(entry.key, entry.shape, leaf.dtype,
                              lambda: tables.contiguous(entry.transform.to_torch(leaf.read(entry.index))))


# ---- the whole ------------------------------------------------------------------------------------------------------


def everything(saved: Saved, model: config_lib.Model, leaves: Leaves, chat: Chat) -> Folder:
    """The model under its own class, with the files that compute it."""
    table = whole.table(model)
    updates = tables.lora(table, leaves)
    table = dataclasses.replace(table, rows=table.rows + updates)
    content = tensors(table, leaves)
    targets = sorted(tensor.name.removesuffix(".lora_A.weight") for tensor in content
                     if tensor.name.endswith(".lora_A.weight"))
    vit = {"stem": "patch", **dataclasses.asdict(model.encoder), **{
        trait: getattr(model.encoder, trait) for trait in TRAITS}}
    config = {
        "architectures": [CLASSES["AutoModelForCausalLM"].split(".")[1]], "model_type": "calm", "auto_map": CLASSES,
        "vit": vit, "qformer": dataclasses.asdict(model.qformer), "llama": dataclasses.asdict(model.decoder),
        "thematic": dataclasses.asdict(model.thematic),
        "taps": {part: model.depths.block(part, model.encoder.depth) for part in config_lib.PARTS},
        "lora": {"rank": model.lora.rank, "alpha": model.lora.alpha, "targets": targets},
        "score_head": dataclasses.asdict(model.score_head), "taught": taught(saved),
        "tie_word_embeddings": model.decoder.tied,
        **_special(chat), **_dtype(content)}
    processor = {
        "auto_map": {"AutoProcessor": CLASSES["AutoProcessor"]}, "processor_class": "CalmProcessor",
        "tokenizer": _file(chat.tokenizer), "chat": _chat(chat),
        "image_size": model.encoder.image_size, "mean": model.encoder.mean, "std": model.encoder.std,
        "padding": model.encoder.padding,
        "tokens": {part: model.visual_tokens(part) for part in config_lib.PARTS},
        "instructions": {"score": instructions.SCORE[0], "level": instructions.LEVEL[0],
                         "comment": instructions.COMMENT[0]}}
    here = pathlib.Path(huggingface.__file__).parent
    files = {f"{name}_calm.py": here / f"{name}_calm.py" for name in ("configuration", "modeling", "processing")}
    files |= {"pictures.py": pathlib.Path(pictures.__file__), _file(chat.tokenizer): chat.tokenizer.files[0]}
    return Folder("", content, {
        "README.md": model_card.card(saved, model, content, config["taught"], _file(chat.tokenizer)),
        "generation_config.json": _generation(chat, model.decoder),
        "tokenizer_config.json": _tokenizer_config(model, chat, processor=True), "processor_config.json": processor,
        "config.json": config}, files)


def taught(saved: Saved) -> dict[str, Any]:
    """What a checkpoint's own process taught it, as JSON values; what came before counts as unlearned."""
    process = config_lib.from_config_dict(saved.meta["config"]).processes.get(saved.meta["process"])
    return {"process": saved.meta["process"], "tasks": [*skills.learned(process)] if process else [],
            "skills": [skill for skill in skills.SKILLS if process and skills.state(process, skill) == skills.TAUGHT]}


def _dtype(content: Sequence[torch_files.Tensor]) -> dict[str, str]:
    """The widest stored dtype, under the names that older and newer transformers read."""
    name = np.result_type(*(tensor.dtype for tensor in content)).name
    return {"torch_dtype": name, "dtype": name}


def _file(tokenizer: Tokenizer) -> str:
    """The name of a tokenizer's file in an export."""
    return tokenizer.FILES[0]


def _chat(chat: Chat) -> dict[str, Any]:
    """How conversations are written, as the processor takes it: by ids, for nothing can spell those otherwise."""
    return {"template": chat.template, "begin": chat.begin, "user": chat.user, "assistant": chat.assistant,
            "end": chat.end, "bos": chat.tokenizer.bos, "pad": chat.pad, "markers": chat.markers}


def _special(chat: Chat) -> dict[str, int | None]:
    return {"bos_token_id": chat.tokenizer.bos, "eos_token_id": chat.stop, "pad_token_id": chat.pad}


def _generation(chat: Chat, cfg: config_lib.Decoder) -> dict[str, Any]:
    """What `generate` does unless it is told otherwise: it takes the most probable token, and none of those with which
    a vocabulary is padded."""
    padding = [*range(chat.tokenizer.vocab, cfg.vocab)]
    return {"do_sample": False, **_special(chat), **({"suppress_tokens": padding} if padding else {})}


def _tokenizer_config(model: config_lib.Model, chat: Chat, *, processor: bool) -> dict[str, Any]:
    """For LLaMA's own tokenizer class, or the class of any tokenizer.json. What it makes of a whole prompt is not what
    CALM was trained on: there every stretch of text is encoded by itself, which the processor does."""
    tokenizer = chat.tokenizer
    found = {"tokenizer_class": "PreTrainedTokenizerFast"} if isinstance(tokenizer, HuggingFaceTokenizer) else {
        "tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "add_eos_token": False, "legacy": True}
    named = {"bos_token": tokenizer.bos, "eos_token": tokenizer.eos, "unk_token": tokenizer.unknown,
             "pad_token": chat.pad}
    found |= {name: None if token is None else tokenizer.pieces([token])[0] for name, token in named.items()}
    found |= {"clean_up_tokenization_spaces": False, "model_max_length": model.decoder.positions,
              "padding_side": "left"}
    return found | ({"auto_map": {"AutoProcessor": CLASSES["AutoProcessor"]}} if processor else {})


# ---- each part alone ------------------------------------------------------------------------------------------------


def _parts(model: config_lib.Model, leaves: Leaves, chat: Chat, say: Callable[[str], None]) -> list[Folder]:
    """Each part under its published class, and its LoRA adapters, if any, in PEFT's form beside it."""
    folders: list[Folder] = []
    tables.lora(whole.table(model), leaves)  # says now what no adapter can hold
    family = families.of(model.encoder)
    published, table = family.published(model.encoder, {}), family.table(model.encoder)
    if published is None:
        say(f"not written alone: the encoder, which no published class of the family {model.encoder.family} can hold")
    else:
        content = [dataclasses.replace(tensor, name=family.prefix + tensor.name)
                   for tensor in tensors(table, _plain(leaves), "encoder/")]
        folders += [Folder("parts/vision_tower", content, {
            "preprocessor_config.json": _preprocessor(model.encoder, family.image_processor),
            "config.json": published | _dtype(content)}),
                    *_adapter(table, leaves, "encoder/", "vision_tower", model.lora)]
    for number, level in enumerate(config_lib.LEVELS):
        table = mfam.qformer_table(model.qformer)
        own = {path: _at(leaf, number) for path, leaf in leaves.items() if path.startswith("mfam/qformers/")}
        content = tensors(table, _plain(own), "mfam/qformers/")
        inside = [dataclasses.replace(tensor, name=tensor.name.removeprefix("qformer.")) for tensor in content
                  if tensor.name.startswith("qformer.")]
        beside = [tensor for tensor in content if not tensor.name.startswith("qformer.")]
        place = f"parts/qformer_{level}"
        folders += [Folder(place, beside, {}, weights="queries_and_projection.safetensors"),
                    Folder(place, inside, {"config.json": mfam.published(model, level) | _dtype(inside),
                                           "README.md": model_card.qformer(level, model)}),
                    *_adapter(table, own, "mfam/qformers/", f"qformer_{level}", model.lora, "qformer.")]
    folders.append(Folder("parts/thematic", tensors(mfam.thematic_table(model.thematic), _plain(leaves),
                                                    "mfam/thematic/"), {}))
    family = families.of(model.decoder)
    published, table = family.published(model.decoder, _special(chat)), family.table(model.decoder)
    if published is None:
        say("not written alone: the language model, which no published class can hold")
        return folders
    content = tensors(table, _plain(leaves), "decoder/")
    folders += [Folder("parts/language_model", content, {
        "config.json": published | _dtype(content),
        "generation_config.json": _generation(chat, model.decoder),
        "tokenizer_config.json": _tokenizer_config(model, chat, processor=False)},
        {_file(chat.tokenizer): chat.tokenizer.files[0]}),
        *_adapter(table, leaves, "decoder/", "language_model", model.lora)]
    return folders


def _preprocessor(cfg: config_lib.Encoder, kind: str) -> dict[str, Any]:
    """The preprocessor_config.json of an encoder alone: the size, mean and standard deviation that it was used with
    here. The published classes squash what is no square; CALM pads it before, which they cannot."""
    return {"image_processor_type": kind, "do_convert_rgb": True, "do_resize": True,
            "size": {"height": cfg.image_size, "width": cfg.image_size}, "resample": 3, "do_center_crop": False,
            "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True,
            "image_mean": cfg.mean, "image_std": cfg.std}


def _at(leaf: restore.Lazy, level: int) -> restore.Lazy:
    """One level's part of a leaf that all Q-Formers share."""
    return restore.Lazy(leaf.shape[1:], leaf.dtype, lambda index: leaf.read((level, *index)))


def _plain(leaves: Leaves) -> Leaves:
    return {path: leaf for path, leaf in leaves.items() if "/lora/" not in path}


def _adapter(table: tables.Table, leaves: Leaves, prefix: str, base: str, lora: config_lib.Lora,
             without: str = "") -> list[Folder]:
    """A PEFT adapter of the part `base`, if any of its leaves has an update; names of modules lose `without` in front.

    They are the names of today's transformers, which in CLIPVisionModel differ from those before 5.6.
    """
    own = {path.removeprefix(prefix): leaf for path, leaf in leaves.items() if path.startswith(prefix)}
    rows = tables.lora(table, own)
    if not rows:
        return []
    updates = {path: leaf for path, leaf in own.items() if "/lora/" in path}
    named = [dataclasses.replace(tensor, name=tensor.name.removeprefix(without))
             for tensor in tensors(tables.Table(rows=rows), updates)]
    modules = sorted({re.sub(r"\.lora_[AB]\.weight$", "", tensor.name) for tensor in named})
    config = {"peft_type": "LORA", "r": lora.rank, "lora_alpha": lora.alpha, "lora_dropout": lora.dropout,
              "target_modules": modules, "bias": "none", "fan_in_fan_out": False, "inference_mode": True,
              "task_type": "CAUSAL_LM" if base == "language_model" else None, "base_model_name_or_path": f"../{base}"}
    return [Folder(f"parts/{base}_lora", [dataclasses.replace(tensor, name=f"base_model.model.{tensor.name}")
                                          for tensor in named], {"adapter_config.json": config},
                   weights="adapter_model.safetensors")]
