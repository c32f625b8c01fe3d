"""How each family of encoders and of language models lies in Hugging Face folders: one file a family, under its name.

To add one: a file here, named as the family's own file in `models.encoders` or `models.decoders`, that assigns a
`Family` to FAMILY; or an entry point in the group `calm_jax.weights`. A family without one trains and answers like any
other, and is neither converted nor exported. A whole CALM is exported if `huggingface/modeling_calm.py`, too, computes
its families (`hf_export.ENCODERS`, `hf_export.DECODERS`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from calm_jax import config as config_lib
from calm_jax import json_files
from calm_jax.convert import hf_config, tables
from calm_jax.errors import ConfigError
from calm_jax.registry import WEIGHTS


@dataclasses.dataclass(frozen=True)
class Family:
    """A family's weights, both ways.

    Attributes:
      what: `encoder` or `language model`.
      model_types: of the config.json files that `config` reads.
      config: the config.json of a published model -> the family's config. It raises GeometryError for what the family
        does not compute.
      table: a config -> its weight table; paths are those of the part alone.
      published: (config, special token ids, None where there is none) -> the config.json of the part alone, or None
        where its published class cannot hold it.
      prefix: of the tensors' names in a folder of the part alone, before those in the table.
      image_processor: of an encoder with a published class, that of transformers which prepares its images.
    """

    what: str
    model_types: tuple[str, ...]
    config: Callable[[json_files.Table], Any]
    table: Callable[[Any], tables.Table]
    published: Callable[[Any, dict[str, int | None]], dict[str, Any] | None]
    prefix: str = ""
    image_processor: str = ""


def of(cfg: config_lib.Encoder | config_lib.Decoder) -> Family:
    """The weights of a config's family.

    Raises:
      ConfigError: nobody has written down how they correspond to torch's.
    """
    if cfg.family not in WEIGHTS:
        raise ConfigError(f"the family {cfg.family!r} has no weight table, so that it can be neither converted nor "
                          f"exported; there are tables of {', '.join(WEIGHTS.names())}")
    return WEIGHTS.get(cfg.family)


def read(found: json_files.Table, what: str) -> config_lib.Encoder | config_lib.Decoder:
    """The config of the encoder or language model that a config.json describes.

    Raises:
      GeometryError: no family of that kind reads it.
    """
    known = [family for family in map(WEIGHTS.get, WEIGHTS.names()) if family.what == what]
    kind = found.text("model_type")
    for family in known:
        if kind in family.model_types:
            return family.config(found)
    names = sorted({name for family in known for name in family.model_types})
    raise hf_config.refused(found, what, f"model_type is {kind!r} instead of {_either(names)}")


def _either(names: Sequence[str]) -> str:
    *others, last = names
    return f"{', '.join(others)} or {last}" if others else last
