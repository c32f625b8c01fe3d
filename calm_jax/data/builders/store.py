"""A Source in, a TFDS dataset of array_record shards on disk out, without TensorFlow; `stored` reads it.

    DATA_DIR/NAME/1.0.0/
      NAME-SPLIT.array_record-00000-of-00004   key, picture (JPEG bytes) and label (JSON text), in TFDS's own form
      dataset_info.json  features.json  LICENSE  TFDS's metadata: tfds.builder_from_directory reads the folder
      labels/SPLIT.jsonl  labels/SPLIT.npy       the labels alone, a line a record, and where each line begins; here
                                                 also the tenths of what `data.statistics` measures on the pictures, and
                                                 the attributes that they are unfit for
      manifest.json  skipped.jsonl               how it was made, checksums of the shards, and what could not be used

Rows of training are planned from the labels before any picture is read, so they lie apart and are mapped into memory:
a dataset of any size opens at once. Until all is written the folder is called `1.0.0.partial`, which no reader
accepts; a build that was killed goes on after its last whole shard, and ends in the same bytes.
"""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import hashlib
import io
import itertools
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tqdm
from jaxtyping import UInt8
from PIL import Image

from calm_jax import files
from calm_jax.data import pictures, statistics
from calm_jax.data.builders.labels import SPLITS, Entry, Source
from calm_jax.data.builders.stored import VERSION, checksums
from calm_jax.data.samples import BadRecord, Record
from calm_jax.errors import ConfigError

QUALITY = 95  # of pictures that are encoded anew
SHARD = 2000  # records; a killed build loses less than one shard
PLAIN, LARGEST = 1 << 20, 8  # bytes, and bytes a pixel, above which there is something else in a JPEG: encoded anew
NAMED = 10  # skipped pictures and rows that are named in the summary; skipped.jsonl names all
# Fields of a Record that a label may hold.
FIELDS = {field.name for field in dataclasses.fields(Record)} - {"key", "image", "scale", "deciles"}


def encode(path: Path, longest_side: int) -> tuple[bytes, UInt8[np.ndarray, "H W 3"]]:
    """The picture as it is stored: an upright RGB JPEG whose longest side is at most `longest_side` pixels (0 = any);
    and its pixels.

    A file that is that already, and little else, is taken byte for byte; any other is decoded, shrunk if it is larger
    (antialiased, never cropped), and encoded with QUALITY and full colour resolution.

    Raises:
      BadRecord: the file is missing, unreadable, truncated or too large.
    """
    pixels = pictures.read(path)  # also when the bytes are kept: only decoding tells a truncated file
    height, width = pixels.shape[:2]
    limit = PLAIN + LARGEST * height * width
    with pictures.opened(path) as stream:
        data = stream.read(limit + 1)
    larger = longest_side and max(height, width) > longest_side
    if not larger and len(data) <= limit and _plain(data):
        return data, pixels
    if larger:
        pixels = pictures.fit(pixels, longest_side)
    stream = io.BytesIO()
    try:
        Image.fromarray(pixels).save(stream, "JPEG", quality=QUALITY, subsampling=0)
    except (OSError, ValueError) as error:  # JPEG has at most 65,500 pixels a side
        raise BadRecord(f"{path} cannot be stored as JPEG: {error}; give a smaller --longest_side") from error
    return stream.getvalue(), pixels


def _plain(data: bytes) -> bool:
    with Image.open(io.BytesIO(data), formats=pictures.formats()) as picture:
        try:
            turned = picture.getexif().get(0x0112, 1) != 1
        except Exception:  # a damaged EXIF block: encoded anew, without it
            turned = True
        return picture.format == "JPEG" and picture.mode == "RGB" and not turned


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A picture that could not be stored: its key, `missing` or `unreadable`, and the reason."""

    key: str
    kind: str
    reason: str


def prepare(source: Source, data_dir: Path | str, *, name: str = "", longest_side: int = 512,
            max_bad_share: float = 0.05, workers: int = 0, shard: int = SHARD, rebuild: bool = False,
            say: Callable[[str], None] = print) -> Path:
    """Builds the dataset, or goes on with a build that was interrupted, and returns its folder.

    Args:
      name: under which it is stored; default: the source's.
      longest_side: of a stored picture, pixels; larger ones are shrunk, 0 = none.
      max_bad_share: share of missing or unreadable pictures, and of malformed label rows, above which it stops.
      workers: threads that decode; 0 = one a core.
      shard: records a file.
      rebuild: starts anew; an earlier build of that name is replaced when the new one is complete.
    Raises:
      ConfigError: the source is not what it should be, the folder cannot be written or holds another build.
      BadRecord: more than `max_bad_share` cannot be used.
    """
    name = name or source.name
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name) or name == "demo":
        raise ConfigError(f"{name!r} cannot name a prepared dataset; use small letters, digits and _, and "
                          "not 'demo'")
    began, folder = time.monotonic(), Path(data_dir) / name / VERSION
    partial = folder.with_name(f"{VERSION}.partial")
    entries = _checked(source, max_bad_share)
    build = _Build(partial, source, _plan(source, name, entries, longest_side, shard), _shards(entries, shard))
    replaced = folder.with_name(f"{VERSION}.replaced")
    with _writing(folder):
        if replaced.exists() and not folder.exists():  # a rebuild was killed between its last two steps
            partial.mkdir(exist_ok=True)
            with _alone(partial):
                if not folder.exists():
                    replaced.rename(folder)
        if folder.exists():
            _same(folder, build.plan, "holds a dataset", replace=rebuild)
            if not rebuild:
                for left in (folder / "parts", replaced):  # by a build killed at its very end
                    shutil.rmtree(left, ignore_errors=True)
                say(f"{folder} is prepared already")
                say(summary(folder))
                return folder
        partial.mkdir(parents=True, exist_ok=True)
        with _alone(partial):
            # What says whose build it is goes last and comes first: whenever this is killed, the same command goes on.
            for left in (*partial.glob(".*.partial"), *partial.glob("parts/.*.partial")):  # half-written files
                left.unlink()
            held = list(partial.iterdir())
            if held:
                _same(partial, build.plan, "holds an unfinished build", replace=rebuild)
                if rebuild:
                    for path in held:
                        if path.name not in ("plan.json", "manifest.json"):
                            shutil.rmtree(path) if path.is_dir() else path.unlink()
            build.start()
            build.store(max_bad_share, workers or os.cpu_count() or 1)
            build.finish()
            # Whenever this ends, a reader finds the old data set, none, or the new one, and never a part of one.
            shutil.rmtree(replaced, ignore_errors=True)
            if folder.exists():
                folder.rename(replaced)
            partial.rename(folder)
            shutil.rmtree(replaced, ignore_errors=True)
        shutil.rmtree(folder / "parts", ignore_errors=True)
    say(f"{folder} is ready: {len(entries):,} pictures in {time.monotonic() - began:.1f} s")
    say(summary(folder))
    return folder


def summary(folder: Path) -> str:
    """What a prepared dataset holds, what was skipped, its licence and its citation, as text."""
    manifest = json.loads((folder / "manifest.json").read_text())
    skipped, rows, plan = manifest["skipped"], manifest["rows"], manifest["plan"]
    lines = [", ".join(f"{split} {count:,}" for split, count in manifest["splits"].items())
             + f" pictures, longest side {plan['longest_side'] or 'as it was'}",
             f"splits: {plan['origin']}",
             f"skipped: {skipped['missing']:,} missing and {skipped['unreadable']:,} unreadable pictures of "
             f"{manifest['entries']:,}, {rows['malformed']:,} malformed rows of {rows['read']:,}"]
    with open(folder / "skipped.jsonl", encoding="utf-8") as stream:
        lines += [f"  {json.loads(line)['reason']}" for line in itertools.islice(stream, NAMED)]
    total = sum(skipped.values()) + rows["malformed"]
    if total > NAMED:
        lines.append(f"  ... and {total - NAMED:,} more in {folder / 'skipped.jsonl'}")
    lines += [f"left out: {count:,} {reason}" for reason, count in manifest["left_out"].items()]
    lines += [f"licence: {manifest['licence']}"]
    if manifest["citation"]:
        lines += ["please cite:", manifest["citation"]]
    return "\n".join(lines)


def _checked(source: Source, max_bad_share: float) -> list[Entry]:
    """All entries of the source, of which none is named twice and each has a picture inside of it."""
    entries = []
    splits: dict[str, str] = {}
    for entry in source.entries():
        place, label = source.picture(entry.picture, f"the picture of {entry.key}"), dict(entry.label)
        if not place:
            continue
        if "group" in label:
            label["group"] = _written(label["group"])
        if splits.setdefault(place, entry.split) != entry.split:
            raise ConfigError(f"{place} is named in {splits[place]} and in {entry.split}; a picture belongs "
                              f"to one split: correct the labels in {source.folder}")
        entries.append(dataclasses.replace(entry, picture=place, key=_written(entry.key), label=label))
    bad = len(source.malformed)
    if bad > max_bad_share * source.rows:
        raise BadRecord(f"{bad:,} of {source.rows:,} label rows of {source.folder} are malformed, more than the share "
                        f"{max_bad_share:g}; the first: {source.malformed[0]}. Correct them, or raise --max_bad_share")
    if not entries:
        raise ConfigError(f"the labels in {source.folder} name no picture; check --source")
    twice = [key for key, count in collections.Counter(entry.key for entry in entries).items() if count > 1]
    if twice:
        raise ConfigError(f"{source.folder} has {len(twice)} pictures of the same name, such as "
                          f"{twice[0]!r}; remove one of each")
    for entry in entries:
        if not entry.label.keys() <= FIELDS or entry.split not in SPLITS:
            raise ValueError(f"{entry} has a split or a field that no record has")
    return entries


def _plan(source: Source, name: str, entries: Sequence[Entry], longest_side: int, shard: int) -> dict[str, Any]:
    """What a build is of; two builds of the same plan end in the same bytes."""
    digest = hashlib.sha256()
    for entry in entries:
        digest.update(_json([entry.split, entry.key, entry.picture, entry.label]).encode())
    return {"name": name, "source": source.name, "longest_side": longest_side, "shard": shard,
            "scale": list(source.scale or ()), "origin": source.origin, "labels": digest.hexdigest(),
            "statistics": list(statistics.STATISTICS),
            "fit": {name: list(rule) for name, rule in statistics.FIT.items()}}


def _same(folder: Path, plan: Mapping[str, Any], holds: str, *, replace: bool) -> None:
    """Raises ConfigError unless the folder is a build of this plan, or at least one of ours and to be replaced."""
    try:
        path = folder / "manifest.json"
        found = json.loads(path.read_text())["plan"] if path.exists() else json.loads(
            (folder / "plan.json").read_text())
        different = next((key for key in plan if found[key] != plan[key]), None)
    except (OSError, ValueError, KeyError, TypeError):
        raise ConfigError(f"{folder} exists and was not written by this program, or is damaged; remove it, "
                          "or choose another --data_dir or --name") from None
    if different and not replace:
        what = ("other labels" if different == "labels" else
                f"{different}={found[different]!r}, and {plan[different]!r} is asked for")
        raise ConfigError(f"{folder} {holds} with {what}; ask for the same, replace it with --rebuild, or "
                          "choose another --data_dir or --name")


@dataclasses.dataclass(frozen=True)
class _Shard:
    """A run of entries of one split that becomes the file `name`; `part` names what tells how it went."""

    split: str
    name: str
    part: str
    entries: Sequence[Entry]


def _shards(entries: Sequence[Entry], size: int) -> list[_Shard]:
    shards = []
    for split in SPLITS:
        own = [entry for entry in entries if entry.split == split]
        count = -(-len(own) // size)
        shards += [_Shard(split, f"{split}.array_record-{number:05d}-of-{count:05d}", f"{split}-{number:05d}",
                          own[number * size:(number + 1) * size]) for number in range(count)]
    return shards


@dataclasses.dataclass(frozen=True)
class _Build:
    """A build under way in the folder `partial`."""

    partial: Path
    source: Source
    plan: Mapping[str, Any]
    shards: Sequence[_Shard]

    def start(self) -> None:
        """Says what is built here, before anything is."""
        _write(self.partial / "plan.json", _json(self.plan))
        (self.partial / "manifest.json").unlink(missing_ok=True)
        for name in ("parts", "labels"):
            (self.partial / name).mkdir(exist_ok=True)

    def store(self, max_bad_share: float, workers: int) -> None:
        """Writes the shards that are not there yet.

        Raises:
          BadRecord: too many pictures cannot be used.
        """
        total = sum(len(shard.entries) for shard in self.shards)
        done = {shard.part for shard in self.shards if self._is_done(shard)}
        old = [shard for shard in self.shards if shard.part in done]
        skipped = [item for shard in old for item in self._skipped(shard)]

        def note(item: Skipped | None = None) -> None:
            skipped.extend([item] if item else [])
            if len(skipped) > max_bad_share * total:
                raise BadRecord(f"stopped: {len(skipped):,} of {total:,} pictures cannot be used so far, more than the "
                                f"share {max_bad_share:g}; the first: {skipped[0].reason}. Check --source, or raise "
                                "--max_bad_share; the same command goes on where this one stopped")

        note()
        bar = tqdm.tqdm(total=total, initial=sum(len(shard.entries) for shard in old), unit=" pictures",
                        desc=self.plan["name"], mininterval=0.5, smoothing=0.05)
        with bar, concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for shard in self.shards:
                if shard.part not in done:
                    self._write_shard(shard, pool, 4 * workers, note, bar.update)

    def _file(self, shard: _Shard) -> Path:
        return self.partial / f"{self.plan['name']}-{shard.name}"

    def _part(self, shard: _Shard) -> dict[str, Any]:
        return json.loads((self.partial / "parts" / f"{shard.part}.json").read_text(encoding="utf-8"))

    def _skipped(self, shard: _Shard) -> list[Skipped]:
        return [Skipped(**item) for item in self._part(shard)["skipped"]]

    def _is_done(self, shard: _Shard) -> bool:
        """The file is renamed last, so it speaks for all. Pictures that arrived since are not missed for ever."""
        if not self._file(shard).exists():
            return False
        try:
            missing = {item.key for item in self._skipped(shard) if item.kind == "missing"}
            self._measured(shard)
        except (OSError, ValueError, KeyError, TypeError):  # a rebuild was killed while it cleared the folder
            return False
        return not any(os.path.exists(self.source.folder / entry.picture) for entry in shard.entries
                       if entry.key in missing)

    def _write_shard(self, shard: _Shard, pool: concurrent.futures.Executor, ahead: int,
                     note: Callable[[Skipped], None], progress: Callable[[int], Any]) -> None:
        from array_record.python import array_record_module
        path = self._file(shard)
        temporary, serialize = path.with_name(f"{path.name}.partial"), _serializer()
        size, lines, skipped, measured = 0, [], [], []
        # JPEG does not compress further; one record a group is what random access wants.
        writer = array_record_module.ArrayRecordWriter(str(temporary), "group_size:1,uncompressed")
        try:
            for entry, found in _ahead(pool, ahead, self._encoded, shard.entries):
                if isinstance(found, Skipped):
                    skipped.append(dataclasses.asdict(found))
                    note(found)
                else:
                    picture, values = found
                    example = serialize(entry.key, picture, _json(entry.label))
                    writer.write(example)
                    size += len(example)
                    lines.append(_json({"key": entry.key, **entry.label}))
                    measured.append(values)
                progress(1)
        finally:
            writer.close()
        reader = array_record_module.ArrayRecordReader(str(temporary))
        written = reader.num_records()
        reader.close()
        if written != len(lines):
            raise OSError(f"{temporary} holds {written} records instead of {len(lines)}")
        _write(self.partial / "parts" / f"{shard.part}.jsonl", "".join(f"{line}\n" for line in lines))
        np.save(self.partial / "parts" / f"{shard.part}.npy",
                np.asarray(measured, np.float64).reshape(len(lines), len(statistics.STATISTICS)))
        _write(self.partial / "parts" / f"{shard.part}.json",
               _json({"records": len(lines), "bytes": size, "skipped": skipped}))
        temporary.rename(path)

    def _encoded(self, entry: Entry) -> tuple[bytes, list[float]] | Skipped:
        path = self.source.folder / entry.picture
        try:
            data, pixels = encode(path, self.plan["longest_side"])
            return data, list(statistics.measure(pixels).values())
        except BadRecord as error:
            return Skipped(entry.key, "unreadable" if os.path.lexists(path) else "missing", str(error))
        except OSError as error:  # a folder that may not be entered, a file removed meanwhile
            return Skipped(entry.key, "unreadable", f"{path} cannot be read: {error.strerror or error}")

    def finish(self) -> None:
        """Joins what the shards left, and writes the metadata; may be done again."""
        parts: dict[str, list[dict[str, Any]]] = {}
        for shard in self.shards:
            parts.setdefault(shard.split, []).append(self._part(shard))
        edges = self._edges()
        for split in parts:
            self._join(split, edges)
        skipped = [item for found in parts.values() for part in found for item in part["skipped"]]
        rows = [{"kind": "malformed", "reason": reason} for reason in self.source.malformed]
        _write(self.partial / "skipped.jsonl", "".join(f"{_json(item)}\n" for item in (*skipped, *rows)))
        self._metadata(parts)
        source = self.source
        manifest = {
            "plan": self.plan, "splits": {split: sum(part["records"] for part in found)
                                          for split, found in parts.items()},
            "entries": sum(len(shard.entries) for shard in self.shards),
            "skipped": {kind: sum(item["kind"] == kind for item in skipped) for kind in ("missing", "unreadable")},
            "rows": {"read": source.rows, "malformed": len(source.malformed)},
            "left_out": dict(sorted(source.left_out.items())), "pictures": checksums(self.partial),
            "homepage": source.homepage, "licence": source.licence, "citation": source.citation}
        _write(self.partial / "manifest.json", json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
        (self.partial / "plan.json").unlink()  # it is in the manifest

    def _measured(self, shard: _Shard) -> dict[str, np.ndarray]:
        values = np.load(self.partial / "parts" / f"{shard.part}.npy")
        return dict(zip(statistics.STATISTICS, values.T, strict=True))

    def _edges(self) -> dict[str, np.ndarray]:
        """Between the tenths of the training pictures, or of all where there are none of them."""
        train = [shard for shard in self.shards if shard.split == "train"] or self.shards
        columns = [self._measured(shard) for shard in train]
        return statistics.edges_of({name: np.concatenate([column[name] for column in columns])
                                    for name in statistics.STATISTICS})

    def _join(self, split: str, edges: Mapping[str, np.ndarray]) -> None:
        starts = [0]
        path = self.partial / "labels" / f"{split}.jsonl"
        with open(path, "wb") as stream:
            for shard in self.shards:
                if shard.split != split:
                    continue
                lines = (self.partial / "parts" / f"{shard.part}.jsonl").read_bytes().splitlines()
                measured = self._measured(shard)
                for row, (line, deciles) in enumerate(zip(lines, statistics.deciles_of(measured, edges), strict=True)):
                    label = json.loads(line)
                    unfit = statistics.unfit({name: values[row] for name, values in measured.items()})
                    label["unfit"] = sorted({*label.get("unfit", ()), *unfit})
                    full = f"{_json({**label, 'deciles': deciles})}\n".encode()
                    stream.write(full)
                    starts.append(starts[-1] + len(full))
        np.save(path.with_suffix(".npy"), np.asarray(starts, np.int64))

    def _metadata(self, parts: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
        import tensorflow_datasets as tfds
        from tensorflow_datasets.core import dataset_info, file_adapters, naming
        name, source = self.plan["name"], self.source
        identity = dataset_info.DatasetIdentity(name=name, version=tfds.core.Version(VERSION),
                                                data_dir=str(self.partial), module_name="")
        info = dataset_info.DatasetInfo(
            builder=identity, features=_features(),
            description=f"{source.title}. Scores: {self.plan['scale']}. Splits: {self.plan['origin']}.",
            homepage=source.homepage or None, citation=source.citation or None, license=source.licence or None)
        info.set_file_format(file_adapters.FileFormat.ARRAY_RECORD)
        info.set_splits(tfds.core.splits.SplitDict([
            tfds.core.SplitInfo(
                name=split, shard_lengths=[part["records"] for part in found],
                num_bytes=sum(part["bytes"] for part in found),
                filename_template=naming.ShardedFileTemplate(data_dir=self.partial, dataset_name=name, split=split,
                                                             filetype_suffix="array_record"))
            for split, found in parts.items()]))
        info.write_to_directory(self.partial)


def _ahead(pool: concurrent.futures.Executor, count: int, work: Callable[[Entry], Any], entries: Iterable[Entry]
           ) -> Iterator[tuple[Entry, Any]]:
    """(entry, work(entry)) in order, with `count` of them under way: memory stays bounded."""
    waiting: collections.deque = collections.deque()
    try:
        for entry in entries:
            waiting.append((entry, pool.submit(work, entry)))
            if len(waiting) >= count:
                first, future = waiting.popleft()
                yield first, future.result()
        for first, future in waiting:
            yield first, future.result()
    finally:
        for _, future in waiting:
            future.cancel()


def _features() -> Any:
    import tensorflow_datasets as tfds
    return tfds.features.FeaturesDict({
        "key": tfds.features.Text(doc="name of the picture, unique in the dataset"),
        "image": tfds.features.Image(shape=(None, None, 3), encoding_format="jpeg", doc="upright, never cropped"),
        "label": tfds.features.Text(doc="JSON: what is known of the picture, fields of calm_jax.data.samples.Record")})


def _serializer() -> Callable[[str, bytes, str], bytes]:
    """Writes records in TFDS's own form; deterministic, because a map of protobuf has no order of its own."""
    from tensorflow_datasets.core import example_serializer
    features = _features()
    serializer = example_serializer.ExampleSerializer(features.get_serialized_info())

    def serialize(key: str, image: bytes, label: str) -> bytes:
        example = features.encode_example({"key": _clean(key), "image": image, "label": label})
        return serializer.get_tf_example(example).SerializeToString(deterministic=True)
    return serialize


def _json(value: Any) -> str:
    return _clean(json.dumps(value, ensure_ascii=False, separators=(",", ":")))


def _written(name: str) -> str:
    """The name of a file as UTF-8: other bytes are written out, so that no two names come to be called alike."""
    return name.encode("utf-8", "backslashreplace").decode()


def _clean(text: str) -> str:
    """Without halves of surrogate pairs, which damaged files bring and UTF-8 cannot hold."""
    return text.encode("utf-8", "replace").decode()


def _write(path: Path, text: str) -> None:
    files.write(path, text)


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turns the errors of writing into one sentence; array_record raises RuntimeError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"{folder} could not be written: {reason}; free some space or choose another "
                          "--data_dir, and run the same command again: it goes on where it stopped"
                          ) from error


@contextlib.contextmanager
def _alone(partial: Path) -> Iterator[None]:
    """Holds the folder for this process."""
    handle = os.open(partial, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"another program is building {partial}; wait for it, or stop it") from None
    try:
        yield
    finally:
        os.close(handle)
