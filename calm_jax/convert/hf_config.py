"""The config.json of a Hugging Face model: read, and refused in one sentence where CALM cannot compute it.

What this project does not compute (another activation, scaled rotary frequencies, biases) is refused, never ignored.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping

from calm_jax import config as config_lib
from calm_jax import json_files
from calm_jax.errors import ConfigError

# No model comes near these; what is beyond them is damaged, and would take for ever.
CHANNELS, BLOCKS, PIXELS, TOKENS = 1 << 18, 1 << 10, 1 << 14, 1 << 26


class GeometryError(ConfigError):
    """A model that CALM cannot be assembled from; one sentence with every reason."""


def read(folder: pathlib.Path) -> json_files.Table:
    """The config.json of a folder, or of the folder of a weight file.

    Raises:
      GeometryError: it is missing or damaged, or is of weights that were quantised.
    """
    path = (folder if folder.is_dir() else folder.parent) / "config.json"
    found = json_files.table(path, error=GeometryError, remedy="it says what the weights beside it are: fetch it again")
    if "model_type" not in found:
        raise GeometryError(f"{path} names no model_type; it is no config of a transformers model")
    found.text("model_type")
    if "quantization_config" in found:
        raise GeometryError(f"{path} has a quantization_config: these weights were rounded to few bits; give the model "
                            "as it was before that, in float32, float16 or bfloat16")
    return found


def normalised(encoder: config_lib.Encoder, folder: pathlib.Path) -> config_lib.Encoder:
    """The encoder with the mean and standard deviation by which the preprocessor_config.json of its folder, or of the
    folder of its weight file, normalises images; some CLIP models have others than CLIP's own. Without such a file it
    is as it was.

    Raises:
      GeometryError: the file is damaged, or the family is bound to other numbers.
    """
    path = (folder if folder.is_dir() else folder.parent) / "preprocessor_config.json"
    if not path.is_file():
        return encoder
    found = json_files.table(path, error=GeometryError, remedy="it says how images are normalised: fetch it again")
    said = {name: tuple(map(float, found.numbers(f"image_{name}", list(getattr(encoder, name)))))
            for name in ("mean", "std")} if found.flag("do_normalize", True) else {
            "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
    if any(len(values) != 3 for values in said.values()) or min(said["std"]) <= 0:
        raise found.refuse(f"image_mean {said['mean']} and image_std {said['std']} are not three numbers each, of "
                           "which the last are above 0")
    if all(said[name] == tuple(getattr(encoder, name)) for name in said):
        return encoder
    if not said.keys() <= {field.name for field in dataclasses.fields(encoder)}:
        raise found.refuse(f"images are normalised by the mean {said['mean']} and the standard deviation "
                           f"{said['std']}, and an encoder of the family {encoder.family!r} by others")
    return dataclasses.replace(encoder, **said)


def heads(cfg: Mapping[str, int]) -> tuple[bool, str]:
    """A check for `require`: width divides among heads."""
    return (cfg["width"] % cfg["heads"] == 0,
            f"hidden_size {cfg['width']} is no multiple of num_attention_heads {cfg['heads']}")


def require(found: json_files.Table, what: str, checks: list[tuple[bool, str]]) -> None:
    """Raises GeometryError with the reason of every check that does not hold."""
    wrong = [reason for holds, reason in checks if not holds]
    if wrong:
        raise refused(found, what, "; ".join(wrong))


def refused(found: json_files.Table, what: str, reason: str) -> GeometryError:
    """The error of a part that CALM does not compute."""
    return GeometryError(f"{found.name}: this {what} is not of a kind that CALM computes: {reason}; give another model")
