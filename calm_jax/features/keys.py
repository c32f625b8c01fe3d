"""What the features of a picture depend on, in; the key under which they are kept, out.

Keys name content, not places: the bytes of the picture, its window and edits, the parameters and the geometry that
compute, and the code that renders and computes. A change of any of them is another key, so nothing stale is ever found.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import PIL
from jaxtyping import UInt8

from calm_jax.data import attributes, images, pictures
from calm_jax.data.samples import ImageRef
from calm_jax.models.parameters import Parameters

PACKAGE = Path(images.__file__).parents[1]


@functools.cache
def code() -> str:
    """A digest of the code that renders pictures and computes models, with Pillow's version."""
    digest = hashlib.sha256(PIL.__version__.encode())
    rendering = [Path(module.__file__) for module in (attributes, images, pictures)]
    for path in [*sorted((PACKAGE / "models").rglob("*.py")), *rendering]:
        digest.update(path.read_bytes())
    return digest.hexdigest()


def of_parameters(parameters: Parameters) -> str:
    """A digest of names, types and values of parameters that this process can read."""
    digest = hashlib.sha256()
    for path in sorted(parameters):
        value = np.ascontiguousarray(parameters[path])
        digest.update(f"{path} {value.dtype} {value.shape}\n".encode())
        digest.update(value.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def of_facts(facts: Mapping[str, Any]) -> bytes:
    """A digest of JSON values."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).digest()


def of_picture(encoding: bytes, content: bytes, ref: ImageRef) -> bytes:
    """The key of what an encoding makes of a picture of this content, cut and edited as `ref` says."""
    edits = [dataclasses.astuple(edit) for edit in ref.edits]
    return hashlib.sha256(encoding + content + json.dumps([ref.window, edits]).encode()).digest()


def of_source(picture: object) -> bytes | None:
    """The content of a file, of a path or its bytes; None of anything else, and of what cannot be read."""
    if not isinstance(picture, (str, os.PathLike, bytes)):
        return None
    try:
        with pictures.opened(picture) as stream:
            return hashlib.file_digest(stream, "sha256").digest()
    except (OSError, pictures.BadRecord):
        return None


def of_square(square: UInt8[np.ndarray, "S S 3"]) -> bytes:
    """The content of a picture of which nothing but the finished square is known."""
    return hashlib.sha256(square.tobytes()).digest()
