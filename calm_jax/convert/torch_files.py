"""A Hugging Face folder, hub id or weight file in; names, shapes and one tensor at a time as NumPy, bit for bit, out;
and the way back, `save`.

Nothing is read before it is asked for, and nothing is kept: safetensors files are mapped by their library, `.bin` and
`.pth` files by torch (which is imported for them alone). bfloat16 is ml_dtypes' NumPy type.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from calm_jax import config as config_lib

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "README.md")
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


class FileError(config_lib.ConfigError):
    """Weights that cannot be read; one sentence that names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is not in memory: its name, shape and NumPy dtype, and how to read it."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def locate(where: str) -> pathlib.Path:
    """The local folder or file of `where`: a path, or a hub id such as `lmsys/vicuna-7b-v1.5`, which is fetched.

    Raises:
      FileError: it is neither, or the hub cannot be reached.
    """
    path = pathlib.Path(where).expanduser()
    if path.exists():
        return path
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", where):
        raise FileError(f"{where} does not exist; give a folder, a weight file or a hub id such as "
                        "lmsys/vicuna-7b-v1.5")
    import huggingface_hub
    try:
        folder = pathlib.Path(huggingface_hub.snapshot_download(where, allow_patterns=HUB_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = pathlib.Path(huggingface_hub.snapshot_download(where, allow_patterns=(*HUB_FILES, "*.bin")))
    except Exception as error:  # the hub's client raises a dozen kinds, from DNS to a gated repository
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise FileError(f"{where} is no folder here, and could not be fetched from the hub ({reason}); download it "
                        "elsewhere and give its folder") from None
    return folder


def licence(path: pathlib.Path) -> str:
    """The `license` in the front matter of the README.md of a folder, or of a file's folder; empty where it is not
    said."""
    import huggingface_hub
    import yaml
    card = (path if path.is_dir() else path.parent) / "README.md"
    try:
        said = (huggingface_hub.metadata_load(card) or {}).get("license")
    except (OSError, ValueError, yaml.YAMLError):  # none there, or one that only people can read
        return ""
    return ", ".join(map(str, said)) if isinstance(said, list) else str(said or "")


def tensors(path: pathlib.Path) -> dict[str, Tensor]:
    """All tensors of a folder (single file or sharded, safetensors before `.bin`) or of one file.

    Raises:
      FileError: there are no weights, a shard is missing, a file is truncated or is no weight file, or the index and
        the shards disagree.
    """
    if path.is_file():
        return {tensor.name: tensor for tensor in _of_file(path)}
    for name in (INDICES[0], SINGLE[0], INDICES[1], SINGLE[1]):
        if (path / name).is_file():
            return _of_index(path / name) if name in INDICES else tensors(path / name)
    raise FileError(f"{path} holds no weights: none of {', '.join((*INDICES, *SINGLE))} is there")


def _of_index(index: pathlib.Path) -> dict[str, Tensor]:
    try:
        places: Mapping[str, str] = json.loads(index.read_text())["weight_map"]
        shards = sorted(set(places.values()))
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileError(f"{index} is damaged: it holds no table weight_map; fetch it again") from None
    missing = [shard for shard in shards if not (index.parent / shard).is_file()]
    if missing:
        raise FileError(f"{index.parent} lacks {len(missing)} of its {len(shards)} shards: {', '.join(missing)}; fetch "
                        "them again")
    found: dict[str, Tensor] = {}
    for shard in shards:
        for tensor in _of_file(index.parent / shard):
            if places.get(tensor.name) == shard:
                found[tensor.name] = tensor
    lost = [name for name in places if name not in found]
    if lost:
        raise FileError(f"{index} promises {lost[0]} in {places[lost[0]]}, where it is not"
                        + (f" (and {len(lost) - 1} more)" if len(lost) > 1 else "") + "; fetch the folder again")
    return found


def _of_file(path: pathlib.Path) -> Iterator[Tensor]:
    return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)


def _safetensors(path: pathlib.Path) -> Iterator[Tensor]:
    import safetensors
    try:
        file = safetensors.safe_open(path, "np")
        for name in file.keys():  # noqa: SIM118  (no mapping: it has no iterator)
            part = file.get_slice(name)
            kind = part.get_dtype()
            if kind not in DTYPES and "F" in kind:
                raise FileError(f"{name} in {path} is {kind}; weights are read as float32, float16 or bfloat16: "
                                "convert the file first")
            dtype = DTYPES.get(kind, np.dtype(np.int64))  # buffers such as position ids: named, never read
            yield Tensor(name, tuple(part.get_shape()), dtype, lambda name=name: file.get_tensor(name))
    except safetensors.SafetensorError as error:
        raise FileError(f"{path} is truncated or no safetensors file ({error}); fetch it again") from None


def _pickled(path: pathlib.Path) -> Iterator[Tensor]:
    import pickle

    import torch
    try:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError as error:
            if "mmap can only be used" not in str(error):
                raise
            content = torch.load(path, map_location="cpu", weights_only=True)  # the format before 2020 has no map
    except pickle.UnpicklingError:
        raise FileError(f"{path} is a pickle of other things than weights, and is not opened: it could run any code; "
                        "save it as safetensors where it comes from") from None
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0]
        raise FileError(f"{path} is truncated or no weight file ({reason}); fetch it again") from None
    while isinstance(content, Mapping) and len(content) <= 8 and isinstance(content.get("model"), Mapping):
        content = content["model"]  # LAVIS keeps the weights beside its training config
    if not isinstance(content, Mapping) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise FileError(f"{path} holds no table of tensors; give a checkpoint's weights")
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            yield _of_torch(name, value)


def _of_torch(name, value) -> Tensor:
    import torch

    def read() -> np.ndarray:
        tensor = value.detach().contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type of its own
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    dtype = DTYPES["BF16"] if value.dtype == torch.bfloat16 else np.dtype(str(value.dtype).removeprefix("torch."))
    return Tensor(name, tuple(value.shape), dtype, read)


def save(folder: pathlib.Path, tensors: Sequence[Tensor], *, name: str = SINGLE[0], shard: int = 5 * 10**9,
         progress: Callable[[int], None] = lambda _: None) -> None:
    """Writes a safetensors file into an existing folder, tensor by tensor, or shards of it and their index.

    Memory holds two tensors (one is read while the one before is written); the library would want a whole file.

    Args:
      tensors: what to write, in this order.
      shard: bytes of a file at most, of which a single larger tensor has one of its own.
      progress: called with the bytes of every tensor that is written.
    """
    shards: list[list[Tensor]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(other.nbytes for other in shards[-1]) + tensor.nbytes > shard:
            shards.append([])
        shards[-1].append(tensor)
    stem = name.removesuffix(".safetensors")
    files = [name] if len(shards) == 1 else [f"{stem}-{number:05d}-of-{len(shards):05d}.safetensors"
                                             for number in range(1, len(shards) + 1)]
    with concurrent.futures.ThreadPoolExecutor(1) as ahead:
        for file, content in zip(files, shards, strict=True):
            with (folder / file).open("wb") as stream:
                stream.write(header({tensor.name: (tensor.dtype, tensor.shape) for tensor in content}))
                coming = ahead.submit(content[0].read)
                for index, tensor in enumerate(content):
                    value = coming.result()
                    if index + 1 < len(content):
                        coming = ahead.submit(content[index + 1].read)
                    assert value.shape == tensor.shape and value.dtype == tensor.dtype, tensor.name
                    stream.write(np.ascontiguousarray(value).view(np.uint8).data)
                    progress(tensor.nbytes)
    if len(shards) > 1:
        places = {tensor.name: file for file, content in zip(files, shards, strict=True) for tensor in content}
        total = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / f"{name}.index.json").write_text(json.dumps(index, indent=1))


def header(tensors: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """The beginning of a safetensors file whose tensors follow in this order without gaps."""
    kinds = {dtype: name for name, dtype in DTYPES.items()}
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape) in tensors.items():
        stop = start + int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        table[name] = {"dtype": kinds[dtype], "shape": list(shape), "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(table).encode()
    text += b" " * (-len(text) % 8)  # the values begin at a multiple of eight
    return len(text).to_bytes(8, "little") + text
