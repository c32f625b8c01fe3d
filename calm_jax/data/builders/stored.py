"""A folder that `store.prepare` wrote in, a Dataset out: records from the labels alone, pictures when asked for."""

from __future__ import annotations

import concurrent.futures
import functools
import hashlib
import json
import mmap
import tokenize
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from jaxtyping import Int64, UInt8

from calm_jax import files, json_files
from calm_jax.data import pictures
from calm_jax.data.builders.labels import SPLITS
from calm_jax.data.samples import BadRecord, ImageRef, Record
from calm_jax.errors import ConfigError, nearest

Result = TypeVar("Result")
VERSION = "1.0.0"  # of the folder's layout; a dataset lies in DATA_DIR/NAME/VERSION


def names(data_dir: Path | str) -> tuple[str, ...]:
    """Names of the datasets that lie in a folder."""
    return tuple(sorted(path.parent.parent.name for path in Path(data_dir).glob(f"*/{VERSION}/manifest.json")))


def checksums(folder: Path) -> dict[str, tuple[int, str]]:
    """Name -> size in bytes and SHA-256 of every file of pictures in a dataset's folder."""
    def checksum(path):
        return path.stat().st_size, files.sha256(path)

    paths = sorted(folder.glob("*.array_record-*-of-*[0-9]"))
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return {path.name: found for path, found in zip(paths, pool.map(checksum, paths), strict=True)}


class Stored:
    """A prepared dataset; records are read from the labels alone, pictures when they are asked for.

    Record numbers run through train, validation and test. Cheap to open and to copy into worker processes.

    Raises:
      ConfigError: it is not there, not finished or damaged; the sentence names the command that prepares it.
    """

    def __init__(self, name: str, data_dir: Path | str):
        self.name, self.folder = name, Path(data_dir) / name / VERSION
        remedy = f"calm prepare --dataset {name} --source DIR --data_dir {data_dir}"
        try:
            if not (self.folder / "manifest.json").exists():
                raise FileNotFoundError
            manifest = json_files.load(self.folder / "manifest.json", error=ValueError, nan=True,
                                       remedy="it is made anew")
            self._scale = tuple(manifest["plan"]["scale"]) or (1.0, 10.0)
            self._counts = {split: int(count) for split, count in manifest["splits"].items()}
            self._checksums = manifest.get("pictures")
        except FileNotFoundError:
            state = "is not finished" if self.folder.with_name(f"{VERSION}.partial").exists() else "is not there"
            raise ConfigError(f"the dataset {name!r} {state} in {data_dir}; prepare it: {remedy}") from None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{self.folder} is damaged ({error!r}); prepare it again: {remedy} --rebuild"
                              ) from None
        self._ends = np.cumsum([self._counts.get(split, 0) for split in SPLITS])
        self._open: dict[tuple[str, str], Any] = {}
        for split, count in self._counts.items():
            starts, text = self._labels(split)
            if len(starts) != count + 1 or starts[-1] != len(text):
                raise ConfigError(f"{self.folder}/labels is damaged: {split} should have {count:,} records; "
                                  f"prepare it again: {remedy} --rebuild")

    def __len__(self) -> int:
        """Records of all splits together."""
        return int(self._ends[-1])

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": {}}  # files are opened anew in each process

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of splits, scale and labels as they are now, and of the pictures as the manifest says they were stored. A
        manifest of before 2026-11-27 does not say it: then all of them are read."""
        pictures_now = self._checksums or checksums(self.folder)
        digest = hashlib.sha256(json.dumps([self._scale, self._counts, pictures_now], sort_keys=True).encode())
        for split in sorted(self._counts):
            digest.update(hashlib.sha256(self._labels(split)[1]).digest())
        return digest.hexdigest()[:16]

    def indices(self, split: str) -> Int64[np.ndarray, "n"]:
        """Record numbers of a split, none where the dataset has no such part.

        Raises:
          ConfigError: the name is none of train, validation and test.
        """
        if split not in SPLITS:
            raise ConfigError(f"{self.name} has no split {split!r}{nearest(split, SPLITS)}")
        end = int(self._ends[SPLITS.index(split)])
        return np.arange(end - self._counts.get(split, 0), end, dtype=np.int64)

    def record(self, index: int) -> Record:
        """What is known of record `index`.

        Raises:
          BadRecord: its line in the labels is damaged.
        """
        split, place = self._place(index)
        starts, text = self._labels(split)
        try:
            label = json.loads(text[int(starts[place]):int(starts[place + 1])])
            for name in ("captions", "comments", "unfit"):
                if not isinstance(label.setdefault(name, []), list):
                    raise ValueError(f"{name} is no list")
                label[name] = tuple(label[name])
            label["questions"] = tuple((question, answer) for question, answer in label.get("questions", ()))
            record = Record(label.pop("key"), ImageRef(int(index)), scale=self._scale, **label)
            record.check()
            return record
        except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
            raise BadRecord(f"record {place} of {self.folder}/labels/{split}.jsonl is damaged ({error}); prepare the "
                            "dataset again with --rebuild") from None

    def pixels(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """The stored picture, RGB 0..255.

        Raises:
          BadRecord: the shard that holds it is missing or damaged.
        """
        return self._read(index, pictures.read)

    def content(self, index: int) -> bytes:
        """The SHA-256 of the stored picture's file; raises as `pixels`."""
        return self._read(index, lambda data: hashlib.sha256(data).digest())

    def _read(self, index: int, read: Callable[[bytes], Result]) -> Result:
        split, place = self._place(index)
        try:
            return read(self._pictures(split)[place]["image"])
        except Exception as error:  # array_record and protobuf raise what they like on damaged files
            reason = " ".join(str(error).split())[:300]
            raise BadRecord(f"{self._called(index)} of {self.folder} cannot be read: {reason}; prepare the dataset "
                            "again with --rebuild") from error

    def _called(self, index: int) -> str:
        try:
            return self.record(index).key
        except BadRecord:
            return f"record {index}"

    def _place(self, index: int) -> tuple[str, int]:
        if not 0 <= index < len(self):
            raise IndexError(f"{self.name} has no record {index}; there are {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        split = SPLITS[number]
        return split, int(index - (self._ends[number] - self._counts[split]))

    def _labels(self, split: str) -> tuple[np.ndarray, Any]:
        """Where each line begins, and all lines, both mapped into memory."""
        if ("labels", split) not in self._open:
            path = self.folder / "labels" / f"{split}.jsonl"
            try:
                for file in (path, path.with_suffix(".npy")):
                    if file.exists() and not file.is_file():  # nobody may ever write into a pipe
                        raise OSError(f"{file.name} is no regular file")
                starts = np.load(path.with_suffix(".npy"), mmap_mode="r")
                with open(path, "rb") as stream:  # an empty file cannot be mapped
                    text = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
            except (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError) as error:  # NumPy's of a header
                raise ConfigError(f"{path} cannot be read ({error}); prepare {self.name} again with "
                                  "--rebuild") from None
            self._open["labels", split] = (starts, text)
        return self._open["labels", split]

    def _pictures(self, split: str) -> Any:
        if ("pictures", split) not in self._open:
            import tensorflow_datasets as tfds
            builder = tfds.builder_from_directory(str(self.folder))
            self._open["pictures", split] = builder.as_data_source(
                split, decoders={"image": tfds.decode.SkipDecoding()})
        return self._open["pictures", split]
