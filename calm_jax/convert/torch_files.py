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
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from calm_jax import json_files
from calm_jax.errors import ConfigError

SINGLE = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
HUB_FILES = ("*.json", "*.safetensors", "tokenizer.model", "README.md")
OTHERS = ("*.gguf", "*.pth", "*.h5", "*.msgpack", "*.onnx")  # weights that are not read from a folder
CARD = 1 << 20  # bytes of a README.md at most
DTYPES = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}


class FileError(ConfigError):
    """Weights that cannot be read; one sentence that names the file and the remedy."""


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is not in memory: its name, shape and NumPy dtype, and how to read it.

    Files hold tensors that no model needs, in every dtype and form; `unusable` is the sentence that says why one that
    is needed could not be read, or "".
    """

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]
    unusable: str = ""

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def locate(where: str) -> pathlib.Path:
    """The local folder or file of `where`: a path, or a hub id such as `lmsys/vicuna-7b-v1.5`, which is fetched.

    Raises:
      FileError: it is neither, or the hub cannot be reached, or it is an adapter of another model.
    """
    try:
        path = pathlib.Path(where).expanduser()
        there = path.exists()
    except (OSError, RuntimeError, ValueError) as error:  # a name that is too long, or of a user that there is not
        raise FileError(f"{where} cannot be opened ({getattr(error, 'strerror', None) or error}); give a folder, a "
                        "weight file or a hub id such as lmsys/vicuna-7b-v1.5") from None
    return _no_adapter(path if there else _fetched(where))


def _fetched(where: str) -> pathlib.Path:
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


def _no_adapter(path: pathlib.Path) -> pathlib.Path:
    """The same path, unless what lies there is a PEFT adapter, which is small and computes nothing by itself."""
    folder = path if path.is_dir() else path.parent
    config = folder / "adapter_config.json"
    whole = any((folder / name).is_file() for name in (*INDICES, *SINGLE)) if path.is_dir() else (
        not path.name.startswith("adapter_"))
    if whole or not config.is_file():
        return path
    base = json_files.table(config, error=FileError, remedy="fetch it again").text("base_model_name_or_path", "")
    raise FileError(f"{path} is a LoRA adapter and no whole model ({config} says so); merge it into the model that it "
                    f"was trained on{f', {base}' if base else ''}, with PEFT's merge_and_unload and save_pretrained, "
                    "and give the folder that this writes")


def licence(path: pathlib.Path) -> str:
    """The `license` in the front matter of the README.md of a folder, or of a file's folder: a short line of text, or
    empty where none is said."""
    import huggingface_hub
    card = (path if path.is_dir() else path.parent) / "README.md"
    try:
        if not card.is_file() or card.stat().st_size > CARD:
            return ""
        said = (huggingface_hub.metadata_load(card) or {}).get("license")
    except Exception:  # one that only people can read: YAML has many ways to be wrong
        return ""
    said = said if isinstance(said, list) else [said]
    if not all(isinstance(name, str) for name in said):
        return ""
    line = " ".join("".join(c if c.isprintable() else " " for c in ", ".join(said[:8])).split())
    return line if len(line) <= 200 else f"{line[:200]}..."


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
    others = sorted(file.name for pattern in OTHERS for file in path.glob(pattern))
    raise FileError(f"{path} holds no weights: none of {', '.join((*INDICES, *SINGLE))} is there"
                    + (f", but {others[0]}, of another kind; name that file itself if it is torch's (.pth), or save "
                       "the model with transformers' save_pretrained" if others else "; fetch them"))


def _of_index(index: pathlib.Path) -> dict[str, Tensor]:
    table = json_files.table(index, error=FileError, remedy="fetch it again").table("weight_map")
    places: dict[str, str] = {name: table.text(name) for name in table.values}
    if not places:
        raise table.refuse("it is empty")
    shards = sorted(set(places.values()))
    for shard in shards:  # of a file that anybody may have written: nothing outside of the folder is touched
        if shard in ("", ".", "..") or re.search(r"[/\\\0]", shard):
            raise table.refuse(f"{shard[:200]!r} is no name of a file beside it")
    missing = [shard for shard in shards if not _is_file(index.parent / shard)]
    if missing:
        named = ", ".join(shard.encode("unicode_escape").decode() for shard in missing[:20])
        raise FileError(f"{index.parent} lacks {len(missing)} of its {len(shards)} shards: {named}"
                        f"{', ...' if len(missing) > 20 else ''}; fetch them again")
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


def _is_file(path: pathlib.Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _of_file(path: pathlib.Path) -> Iterator[Tensor]:
    return _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)


def _safetensors(path: pathlib.Path) -> Iterator[Tensor]:
    import safetensors
    try:
        file = safetensors.safe_open(path, "np")
        for name in file.keys():  # noqa: SIM118  (no mapping: it has no iterator)
            part = file.get_slice(name)
            kind, shape = part.get_dtype(), tuple(part.get_shape())
            if kind in DTYPES:
                yield Tensor(name, shape, DTYPES[kind], lambda name=name: file.get_tensor(name))
            else:
                yield _unusable(path, name, shape, f"is {kind}")
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise FileError(f"{path} is truncated or no safetensors file ({reason(error)}); fetch it again") from None


def _pickled(path: pathlib.Path) -> Iterator[Tensor]:
    import pickle

    import torch
    _check_archive(path)
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
    except Exception as error:  # torch and pickle raise what they like on damaged files
        raise FileError(f"{path} is truncated or no weight file ({reason(error)}); fetch it again") from None
    for _ in range(4):  # LAVIS keeps the weights beside its training config; a table may hold itself
        if isinstance(content, Mapping) and len(content) <= 8 and isinstance(content.get("model"), Mapping):
            content = content["model"]
    if not isinstance(content, Mapping) or not any(isinstance(value, torch.Tensor) for value in content.values()):
        raise FileError(f"{path} holds no table of tensors; give a checkpoint's weights")
    for name, value in content.items():
        if isinstance(value, torch.Tensor):
            if not isinstance(name, str):
                raise FileError(f"{path} holds a tensor that is called {str(name)[:80]!r}, which is no text; give a "
                                "checkpoint's weights")
            yield _of_torch(path, name, value)


def _check_archive(path: pathlib.Path) -> None:
    """Raises FileError for an archive that torch did not write: it never compresses, so that nothing in its files is
    larger than they are."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError) as error:
        raise FileError(f"{path} is a damaged archive ({reason(error)}); fetch it again") from None
    if not any(re.fullmatch(r"[^/]*/data\.pkl", entry.filename) for entry in entries) or any(
            entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise FileError(f"{path} is an archive (zip) of other things than torch's weights; unpack it, and give "
                        "what is in it")


def _of_torch(path: pathlib.Path, name: str, value) -> Tensor:
    import torch

    kind = str(value.dtype).removeprefix("torch.")
    if value.is_meta:
        flaw = "lies on the device `meta`, without values"
    elif value.is_nested or value.layout != torch.strided:
        flaw = f"is sparse or nested ({str(value.layout).removeprefix('torch.')})"
    elif value.is_quantized:
        flaw = f"is quantised ({kind})"
    elif value.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        flaw = f"is {kind}"
    elif value.untyped_storage().nbytes() < value.numel() * value.element_size():
        flaw = "is a few values many times over"
    else:
        flaw = ""
    if flaw:
        return _unusable(path, name, () if value.is_nested else tuple(value.shape), flaw)

    def read() -> np.ndarray:
        tensor = value.detach().resolve_neg().contiguous()
        if tensor.dtype == torch.bfloat16:  # NumPy has no such type of its own
            return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return tensor.numpy()

    return Tensor(name, tuple(value.shape), DTYPES["BF16"] if kind == "bfloat16" else np.dtype(kind), read)


def _unusable(path: pathlib.Path, name: str, shape: tuple[int, ...], flaw: str) -> Tensor:
    """A tensor that is named and never read, such as position ids; where a model needs it, `unusable` says why not."""
    sentence = (f"{name} in {path} {flaw}; weights are plain tensors of float32, float16 or bfloat16: convert the file "
                "first")

    def read() -> np.ndarray:
        raise FileError(sentence)

    return Tensor(name, shape, np.dtype(np.int64), read, sentence)


def reason(error: Exception) -> str:
    """The first line of what an error says."""
    return (str(error).strip().splitlines() or [repr(error)])[0][:300]


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
