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

from calm_jax import config as config_lib
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
    """A regex, matched in full, of names that have no counterpart on the other side, and why."""

    pattern: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Constant:
    """A tensor that the torch class demands and no output of CALM depends on: `value` in the shape of `like`."""

    key: str
    like: str
    value: float


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


def _linear(path: str, key: str, *, bias: bool = True, stride: int = 1, offset: int = 0) -> tuple[Row, ...]:
    rows = (Row(f"{path}/kernel", f"{key}.weight", LINEAR, stride, offset),
            Row(f"{path}/bias", f"{key}.bias", SAME, stride, offset))
    return rows if bias else rows[:1]


def _norm(path: str, key: str, *, bias: bool = True, stride: int = 1, offset: int = 0) -> tuple[Row, ...]:
    rows = (Row(f"{path}/scale", f"{key}.weight", SAME, stride, offset),
            Row(f"{path}/bias", f"{key}.bias", SAME, stride, offset))
    return rows if bias else rows[:1]


def vit(cfg: config_lib.Vit) -> Table:
    """`models.vit.Vit` and CLIPVisionModel; reads CLIPModel too, with and without the `vision_model.` level.

    The convolutional stem is ours; its torch names are `embeddings.stem.N`, an `nn.Conv2d` each but the last, linear.
    """
    if cfg.stem == "patch":
        sizes = (("c", 3), ("p", cfg.patch), ("q", cfg.patch))
        stem = (Row("stem/embed/kernel", "embeddings.patch_embedding.weight",
                    Rearrange("d c p q", "(p q c) d", sizes)),)
    else:
        count = cfg.patch.bit_length() - 1
        stem = (*(row for n in range(count) for row in (Row(f"stem/kernels/{n}", f"embeddings.stem.{n}.weight", CONV),
                                                        Row(f"stem/biases/{n}", f"embeddings.stem.{n}.bias"))),
                *_linear("stem/embed", f"embeddings.stem.{count}"))
    block = "encoder.layers.{layer}"
    return Table(
        rows=(
            *stem,
            Row("cls", "embeddings.class_embedding"),
            Row("positions", "embeddings.position_embedding.weight"),
            *_norm("pre_norm", "pre_layrnorm"),  # the misspelling is CLIP's
            *_norm("blocks/attention_norm", f"{block}.layer_norm1"),
            *_linear("blocks/attention/q", f"{block}.self_attn.q_proj"),
            *_linear("blocks/attention/k", f"{block}.self_attn.k_proj"),
            *_linear("blocks/attention/v", f"{block}.self_attn.v_proj"),
            *_linear("blocks/attention/o", f"{block}.self_attn.out_proj"),
            *_norm("blocks/mlp_norm", f"{block}.layer_norm2"),
            *_linear("blocks/up", f"{block}.mlp.fc1"),
            *_linear("blocks/down", f"{block}.mlp.fc2"),
        ),
        renames=((r"^vision_model\.", ""),),
        ignored=(
            Ignored(r"post_layernorm\.(weight|bias)", "the pooled output plays no part in CALM"),
            Ignored(r"embeddings\.position_ids", "a buffer that older transformers saved: 0, 1, 2, ..."),
            Ignored(r"(text_model\..*|text_projection\.weight|visual_projection\.weight|logit_scale)",
                    "CLIP's text side and contrastive head"),
        ),
        constants=(Constant("post_layernorm.weight", "pre_layrnorm.weight", 1.0),
                   Constant("post_layernorm.bias", "pre_layrnorm.bias", 0.0)),
    )


def qformer(cfg: config_lib.QFormer) -> Table:
    """One `models.qformer.QFormer` and Blip2ForConditionalGeneration's query_tokens, qformer.*, language_projection.*.

    The norm of the features read is `ln_vision.*` (LAVIS), which Blip2ForConditionalGeneration keeps as
    `vision_model.post_layernorm.*`. Also reads a bare Blip2QFormerModel, InstructBLIP and LAVIS files.
    """
    rows = [
        *_norm("context_norm", "ln_vision"),
        Row("queries", "query_tokens", Rearrange("1 q d", "q d")),
        *_norm("norm", "qformer.layernorm"),
        *_linear("project", "language_projection"),
    ]
    key = "qformer.encoder.layer.{layer}"
    for j in range(cfg.cross_every):
        path, number = f"groups/blocks/{j}", {"stride": cfg.cross_every, "offset": j}
        for ours, theirs in (("attention", "attention"), ("cross", "crossattention"))[: 1 if j else 2]:
            rows += [
                *_linear(f"{path}/{ours}/q", f"{key}.{theirs}.attention.query", **number),
                *_linear(f"{path}/{ours}/k", f"{key}.{theirs}.attention.key", **number),
                *_linear(f"{path}/{ours}/v", f"{key}.{theirs}.attention.value", **number),
                *_linear(f"{path}/{ours}/o", f"{key}.{theirs}.output.dense", **number),
                *_norm(f"{path}/{ours}_norm", f"{key}.{theirs}.output.LayerNorm", **number),
            ]
        rows += [
            *_linear(f"{path}/up", f"{key}.intermediate_query.dense", **number),
            *_linear(f"{path}/down", f"{key}.output_query.dense", **number),
            *_norm(f"{path}/mlp_norm", f"{key}.output_query.LayerNorm", **number),
        ]
    return Table(
        rows=tuple(rows),
        renames=(
            (r"^Qformer\.bert\.", "qformer."),  # LAVIS
            (r"^(encoder|layernorm|embeddings)\.", r"qformer.\1."),  # a bare Blip2QFormerModel
            (r"^qformer\.embeddings\.(LayerNorm|layernorm)\.", "qformer.layernorm."),  # LAVIS, InstructBLIP
            (r"^(qformer\.encoder\.layer\.\d+\.\w+)\.self\.", r"\1.attention."),  # LAVIS
            (r"^(opt_proj|t5_proj|llm_proj)\.", "language_projection."),  # LAVIS
            (r"^vision_model\.post_layernorm\.", "ln_vision."),  # Blip2ForConditionalGeneration
        ),
        ignored=(
            Ignored(r"qformer\.embeddings\..*|qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*",
                    "the text branch: only queries pass through CALM's Q-Formers"),
            Ignored(r"Qformer\.cls\..*|(vision_proj|text_proj|vision_projection|text_projection|itm_head)\..*|temp",
                    "heads of BLIP-2's first stage"),
            Ignored(r"(vision_model|visual_encoder)\..*", "BLIP-2's own visual encoder"),
            Ignored(r"(language_model|opt_model|t5_model|llm_model)\..*", "BLIP-2's own language model"),
        ),
    )


def mfam(cfg: config_lib.QFormer) -> Table:
    """`models.mfam.Mfam`: three times `qformer`, as `qformers.0` (low) to `qformers.2` (high), and `thematic`."""
    return Table(rows=(*qformer(cfg).within("qformers/", "qformers.{level}."), *_linear("thematic", "thematic")))


def llama() -> Table:
    """`models.llama.Llama` and LlamaForCausalLM with an untied head."""
    block = "model.layers.{layer}"
    return Table(
        rows=(
            Row("embedding", "model.embed_tokens.weight"),
            *_norm("blocks/attention_norm", f"{block}.input_layernorm", bias=False),
            *_linear("blocks/q", f"{block}.self_attn.q_proj", bias=False),
            *_linear("blocks/k", f"{block}.self_attn.k_proj", bias=False),
            *_linear("blocks/v", f"{block}.self_attn.v_proj", bias=False),
            *_linear("blocks/o", f"{block}.self_attn.o_proj", bias=False),
            *_norm("blocks/mlp_norm", f"{block}.post_attention_layernorm", bias=False),
            *_linear("blocks/gate", f"{block}.mlp.gate_proj", bias=False),
            *_linear("blocks/up", f"{block}.mlp.up_proj", bias=False),
            *_linear("blocks/down", f"{block}.mlp.down_proj", bias=False),
            *_norm("norm", "model.norm", bias=False),
            *_linear("head", "lm_head", bias=False),
        ),
        ignored=(Ignored(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq",
                         "rotary frequencies, which older transformers saved and everyone computes"),),
    )


def score_head(cfg: config_lib.ScoreHead) -> Table:
    """`models.score_head.ScoreHead`, where a model has one, and its counterpart of the same names in the export."""
    return Table(rows=(*_linear("hidden", "hidden"), *_linear("out", "out")) if cfg.width else ())


def calm(cfg: config_lib.Model) -> Table:
    """`models.calm.Calm` and its parts under `vision_tower.`, `mfam.` and `language_model.` in one torch model."""
    tower = vit(cfg.vit)
    return Table(
        rows=(*tower.within("vit/", "vision_tower."), *mfam(cfg.qformer).within("mfam/", "mfam."),
              *llama().within("llama/", "language_model."),
              *score_head(cfg.score_head).within("score_head/", "score_head.")),
        renames=((r"^vision_tower\.vision_model\.", "vision_tower."),),
        ignored=tuple(Ignored(rf"vision_tower\.({rule.pattern})", rule.reason) for rule in tower.ignored))


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
        tensors[constant.key] = np.full_like(tensors[constant.like], constant.value)
    return tensors


def _renamed(table: Table, name: str) -> str:
    for pattern, replacement in table.renames:
        name = re.sub(pattern, replacement, name)
    return name


def _ignored(rules: Iterable[Ignored], name: str) -> bool:
    return any(re.fullmatch(rule.pattern, name) for rule in rules)
