"""Torch tensors by name in, leaves of the JAX models by path out, and back: one two-way table a model.

A table is data: rows of (jax path, torch key, rearrangement). Blocks that JAX stacks are numbered in the torch key,
and every torch tensor is one place in one leaf, so big files can be read and written one tensor at a time: `match`
needs shapes only, and each `Entry` it gives can be converted alone. `to_jax` and `to_torch` do it for whole models in
memory. Paths are those of `models.parameters`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping

import einops
import numpy as np

from calm_jax.errors import ConfigError

Shapes = Mapping[str, tuple[int, ...]]
TILE = 256  # rows and columns
NAMED = 10  # tensors that one sentence names


class WeightError(ConfigError):
    """Tensors and leaves that do not correspond; the message names the first of them, `problems` all."""

    def __init__(self, problems: Iterable[str]):
        self.problems = list(problems)
        more = len(self.problems) - NAMED
        super().__init__("the weights do not fit the model: " + "; ".join(self.problems[:NAMED])
                         + (f"; and {more:,} more" if more > 0 else ""))


@dataclasses.dataclass(frozen=True)
class Rearrange:
    """Axes of a torch tensor and of its JAX counterpart, as einops patterns; read either way, so it is its own inverse.

    Values and dtype are never touched. `sizes` gives the axes that a pattern leaves open.
    """

    torch: str = "..."
    jax: str = "..."
    sizes: tuple[tuple[str, int], ...] = ()

    def to_jax(self, tensor: np.ndarray) -> np.ndarray:
        return einops.rearrange(tensor, f"{self.torch} -> {self.jax}", **dict(self.sizes))

    def to_torch(self, leaf: np.ndarray) -> np.ndarray:
        return einops.rearrange(leaf, f"{self.jax} -> {self.torch}", **dict(self.sizes))


def contiguous(values: np.ndarray) -> np.ndarray:
    """The same values in C order. Transposed matrices are copied in tiles that fit the cache: NumPy, which goes line by
    line, takes five times as long for one of 4,096 x 11,008."""
    if values.ndim != 2 or values.flags.c_contiguous or values.size < TILE * TILE:
        return np.ascontiguousarray(values)
    copy = np.empty(values.shape, values.dtype)
    for top in range(0, values.shape[0], TILE):
        for left in range(0, values.shape[1], TILE):
            tile = np.s_[top:top + TILE, left:left + TILE]
            copy[tile] = values[tile]
    return copy


SAME = Rearrange()
LINEAR = Rearrange("o i", "i o")
CONV = Rearrange("o i h w", "h w i o")


@dataclasses.dataclass(frozen=True)
class Row:
    """One leaf and the torch tensors it is made of.

    Attributes:
      path: the JAX leaf.
      key: the torch name. `{level}` and `{layer}`, in this order, stand for the leaf's leading axes.
      transform: between one torch tensor and its place in the leaf.
      stride, offset: entry n of the stacked axis is torch layer n * stride + offset.
    """

    path: str
    key: str
    transform: Rearrange = SAME
    stride: int = 1
    offset: int = 0


@dataclasses.dataclass(frozen=True)
class Ignored:
    """A regex, matched in full, of names that have no counterpart on the other side, and why.

    Attributes:
      same: name of the torch tensor of which these must be copies, which whoever reads values checks (see `copies`).
    """

    pattern: str
    reason: str
    same: str = ""


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor that the torch class demands and no output of CALM depends on: `value` in the shape of `like`, behind
    `lead` axes of one entry."""

    key: str
    like: str
    value: float
    lead: int = 0

    def shape(self, like: tuple[int, ...]) -> tuple[int, ...]:
        """Its shape, if `like` has this one."""
        return (1,) * self.lead + like


@dataclasses.dataclass(frozen=True)
class Entry:
    """One torch tensor and its place: `leaf[index] = transform.to_jax(tensor)`; `shape` is the torch tensor's."""

    key: str
    path: str
    index: tuple[int, ...]
    transform: Rearrange
    shape: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Table:
    """How the leaves of one JAX model and the tensors of one torch model correspond.

    Attributes:
      rows: the correspondence, one row a leaf.
      renames: (regex, replacement), applied in order to the names found in files, whose styles have changed over time.
      ignored: renamed torch names that are read by nobody.
      left_out: JAX paths that this table leaves alone (see `without`).
      constants: written besides the rows, so that the torch class finds every tensor it expects.
    """

    rows: tuple[Row, ...]
    renames: tuple[tuple[str, str], ...] = ()
    ignored: tuple[Ignored, ...] = ()
    left_out: tuple[Ignored, ...] = ()
    constants: tuple[Constant, ...] = ()

    def without(self, pattern: str, reason: str) -> Table:
        """The table less the leaves whose path matches `pattern` in full; the caller must fill those itself."""
        gone = [row for row in self.rows if re.fullmatch(pattern, row.path)]
        keys = tuple(Ignored(re.sub(r"\\\{\w+\\\}", r"\\d+", re.escape(row.key)), reason) for row in gone)
        return dataclasses.replace(self, rows=tuple(row for row in self.rows if row not in gone),
                                   ignored=self.ignored + keys, left_out=(*self.left_out, Ignored(pattern, reason)))

    def within(self, path: str, key: str) -> tuple[Row, ...]:
        """The rows of this model as a part of a larger one: `path` and `key` are put before theirs."""
        return tuple(dataclasses.replace(row, path=path + row.path, key=key + row.key) for row in self.rows)

    def ignored_within(self, key: str) -> tuple[Ignored, ...]:
        """What is ignored of this model as a part of a larger one."""
        return tuple(dataclasses.replace(rule, pattern=f"{re.escape(key)}({rule.pattern})",
                                         same=rule.same and key + rule.same) for rule in self.ignored)


def linear(path: str, key: str, *, bias: bool = True, stride: int = 1, offset: int = 0) -> tuple[Row, ...]:
    rows = (Row(f"{path}/kernel", f"{key}.weight", LINEAR, stride, offset),
            Row(f"{path}/bias", f"{key}.bias", SAME, stride, offset))
    return rows if bias else rows[:1]


def norm(path: str, key: str, *, bias: bool = True, stride: int = 1, offset: int = 0) -> tuple[Row, ...]:
    rows = (Row(f"{path}/scale", f"{key}.weight", SAME, stride, offset),
            Row(f"{path}/bias", f"{key}.bias", SAME, stride, offset))
    return rows if bias else rows[:1]


def lora(table: Table, paths: Iterable[str]) -> tuple[Row, ...]:
    """Rows of the low-rank updates among `paths` (`X/lora/a`, `X/lora/b`), under PEFT's names beside those of X.

    Raises:
      WeightError: an update's layer is no linear layer in torch.
    """
    kernels = {row.path: row for row in table.rows}
    rows, problems = [], []
    for path in paths:
        found = re.fullmatch(r"(.*)/lora/(a|b)", path)
        if found is None:
            continue
        row = kernels.get(f"{found[1]}/kernel")
        if row is None or row.transform != LINEAR:
            problems.append(f"the low-rank update {path} is of no linear layer in torch; merge it into its kernel")
        else:
            key = row.key.removesuffix("weight") + f"lora_{found[2].upper()}.weight"
            rows.append(dataclasses.replace(row, path=path, key=key))
    if problems:
        raise WeightError(problems)
    return tuple(rows)


def expand(table: Table, shapes: Shapes) -> tuple[list[Entry], list[str]]:
    """Every torch tensor that leaves of these `shapes` are made of, in table order, and what is wrong, in sentences."""
    entries, problems = [], []
    for row in table.rows:
        if row.path not in shapes:
            problems.append(f"the model has no leaf {row.path} for {row.key}")
            continue
        shape = tuple(shapes[row.path])
        stacked = shape[:row.key.count("{")]
        for index in np.ndindex(stacked):
            layer = index[-1] * row.stride + row.offset if index else 0
            key = row.key.format(level=index[0] if index else 0, layer=layer)
            like = np.broadcast_to(np.int8(0), shape[len(stacked):])  # a shape without memory
            entries.append(Entry(key, row.path, index, row.transform, row.transform.to_torch(like).shape))
    known = {row.path for row in table.rows}
    problems += [f"no torch tensor corresponds to the leaf {path} {tuple(shapes[path])}"
                 for path in shapes if path not in known and not _ignored(table.left_out, path)]
    return entries, problems


def match(table: Table, found: Shapes, shapes: Shapes) -> dict[str, Entry]:
    """The place of every tensor in `found` that is used, under the name it has there.

    Args:
      table: of the model.
      found: shape of every torch tensor there is.
      shapes: shape of every leaf of the JAX model.

    Raises:
      WeightError: lists together every missing, unexpected and wrongly shaped tensor and every leaf without a row.
    """
    entries, problems = expand(table, shapes)
    wanted = {entry.key: entry for entry in entries}
    places: dict[str, Entry] = {}
    taken: dict[str, str] = {}
    for name, shape in found.items():
        key = _renamed(table, name)
        if key not in wanted:
            if not _ignored(table.ignored, key):
                problems.append(f"unexpected: {name} {tuple(shape)}")
        elif key in taken:
            problems.append(f"twice: {name} and {taken[key]} are the same tensor")
        else:
            places[name], taken[key] = wanted[key], name
            if tuple(shape) != wanted[key].shape:
                problems.append(f"wrong shape: {name} is {tuple(shape)}, the model needs {wanted[key].shape}")
    problems += [f"missing: {key} {entry.shape}" for key, entry in wanted.items() if key not in taken]
    if problems:
        raise WeightError(problems)
    return places


def copies(table: Table, names: Iterable[str]) -> list[tuple[str, str, str]]:
    """(name, other, sentence) of every ignored tensor among `names` that must be a copy of another one there; the
    sentence is for those that differ."""
    renamed = {_renamed(table, name): name for name in names}
    return [(name, renamed[rule.same], f"{name} is not the same as {renamed[rule.same]}: {rule.reason}")
            for rule in table.ignored if rule.same in renamed
            for key, name in renamed.items() if re.fullmatch(rule.pattern, key)]


def fits(table: Table, found: Shapes, shapes: Shapes, pattern: str) -> bool:
    """Whether all tensors of the leaves whose path matches `pattern` in full are found, in the shapes needed."""
    rows = tuple(row for row in table.rows if re.fullmatch(pattern, row.path))
    entries, _ = expand(dataclasses.replace(table, rows=rows), shapes)
    renamed = {_renamed(table, name): tuple(shape) for name, shape in found.items()}
    return all(renamed.get(entry.key) == entry.shape for entry in entries)


def to_jax(table: Table, tensors: Mapping[str, np.ndarray], shapes: Shapes) -> dict[str, np.ndarray]:
    """The leaves made of `tensors`, bit for bit; tensors of several dtypes in one stack get the widest of them.

    Args:
      table: of the model.
      tensors: torch name -> value, in the torch shape.
      shapes: shape of every leaf of the JAX model; the result has exactly these, less `table.left_out`.

    Raises:
      WeightError: as `match`.
    """
    places = match(table, {name: tensor.shape for name, tensor in tensors.items()}, shapes)
    if wrong := [sentence for name, other, sentence in copies(table, tensors)
                 if not np.array_equal(tensors[name], tensors[other])]:
        raise WeightError(wrong)
    dtypes: dict[str, list[np.dtype]] = {}
    for name, entry in places.items():
        dtypes.setdefault(entry.path, []).append(tensors[name].dtype)
    leaves = {path: np.empty(shapes[path], np.result_type(*kinds)) for path, kinds in dtypes.items()}
    for name, entry in places.items():
        leaves[entry.path][entry.index] = entry.transform.to_jax(tensors[name])
    return leaves


def to_torch(table: Table, leaves: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The torch tensors that `leaves` are made of, bit for bit, contiguous, with the table's constants.

    Raises:
      WeightError: lists together every leaf that is missing and every leaf without a row (merge LoRA updates first).
    """
    entries, problems = expand(table, {path: np.shape(leaf) for path, leaf in leaves.items()})
    if problems:
        raise WeightError(problems)
    tensors = {entry.key: contiguous(entry.transform.to_torch(np.asarray(leaves[entry.path])[entry.index]))
               for entry in entries}
    for constant in table.constants:
        like = tensors[constant.like]
        tensors[constant.key] = np.full(constant.shape(like.shape), constant.value, like.dtype)
    return tensors


def _renamed(table: Table, name: str) -> str:
    for pattern, replacement in table.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _ignored(rules: Iterable[Ignored], name: str) -> bool:
    return any(re.fullmatch(rule.pattern, name) for rule in rules)
