"""What a checkpoint says of itself: its name for ever, and the content of its meta.json, checked."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

from calm_jax import config as config_lib
from calm_jax import json_files
from calm_jax.errors import CheckpointError, ConfigError

MARKER, META, ARRAYS, BEST, NEEDED = "COMPLETE.json", "meta.json", "arrays", "best.json", "needed_by"


@dataclasses.dataclass(frozen=True)
class Pin:
    """The name of one checkpoint for ever: the folder where it was, its step, and the digest of its marker, which
    stands for all of its bytes. Its fields are JSON values."""

    path: str
    step: int
    digest: str

    def __str__(self) -> str:
        return f"{self.path} (step {self.step}, digest {self.digest[:12]})"


@dataclasses.dataclass(frozen=True)
class Saved:
    """A checkpoint whose checksums hold. `digest` is that of its marker."""

    path: pathlib.Path
    meta: dict[str, Any]
    digest: str

    @property
    def step(self) -> int:
        return self.meta["step"]

    @property
    def config(self) -> config_lib.Config:
        return config_of(self.path, self.meta)

    @property
    def pin(self) -> Pin:
        return Pin(str(self.path.resolve()), self.step, self.digest)


def config_of(path: pathlib.Path, meta: Mapping[str, Any]) -> config_lib.Config:
    """The config with which the checkpoint in a folder was trained, from its meta data.

    Raises:
      CheckpointError: it is none of today's.
    """
    try:
        return config_lib.from_config_dict(meta["config"])
    except ConfigError as error:
        raise CheckpointError(f"{path / META}: {error}; use another checkpoint, or the version of this program that "
                              "wrote it") from None


def read_meta(path: pathlib.Path) -> dict[str, Any]:
    """The meta data of a checkpoint, with everything in it that readers rely on.

    Raises:
      CheckpointError: names what is not as it should be.
    """
    found = json_files.table(path / META, remedy="use another checkpoint", error=CheckpointError, nan=True)
    found.whole("step", least=0), found.whole("seed", least=0), found.table("config")
    found.text("process"), found.text("tokenizer"), found.names("trained")
    pins = [found.table("base")] if isinstance(found.values.get("base"), dict) else []
    if not pins:
        found.text("base")
    if "borrowed" in found:
        borrowed = found.table("borrowed")
        borrowed.table("parameters")
        listed = borrowed.values.get("checkpoints")
        if not isinstance(listed, list) or not all(isinstance(pin, dict) for pin in listed):
            raise borrowed.refuse("checkpoints is no list of tables")
        pins += [dataclasses.replace(found, values=pin, name=f"{borrowed.name}: checkpoints") for pin in listed]
    for pin in pins:
        pin.text("path"), pin.whole("step", least=0), pin.text("digest")
        if len(pin.values) != 3:
            raise pin.refuse("a checkpoint is named by path, step and digest alone")
    if "sources" in found:
        sources = found.table("sources")
        qformers = sources.values.get("qformer")
        if not isinstance(qformers, list) or not all(isinstance(source, dict) for source in qformers):
            raise sources.refuse("qformer is no list of tables")
        for source in (sources.table("vit"), sources.table("llm"), *(dataclasses.replace(
                sources, values=source, name=f"{sources.name}: qformer") for source in qformers)):
            source.text("name"), source.text("licence")
            for field in ("version", "sha256", "statement"):
                source.text(field, "")
    return dict(found.values)


def unpinned(meta: Mapping[str, Any]) -> bool:
    """Whether a checkpoint names its base by a path alone, as those of before 2026-11-27 do."""
    return isinstance(meta.get("base"), str) and bool(meta["base"])
