"""A ConfigDict in, a validated tree of frozen dataclasses out; every field of the project is declared here, once.

Each field carries its meaning, its unit and its source: `paper` (arXiv 2412.11952), `ours` (the paper does not
say), or the public model whose geometry it is. `python -m calm_jax.config` prints them all.
"""

from __future__ import annotations

import dataclasses
import math
import operator
import re
import signal
import struct
import typing
from typing import Any

import ml_collections

from calm_jax import registry
from calm_jax.errors import ConfigError, nearest

PARTS = ("low", "middle", "high", "thematic")  # the LLM's input order (paper)
LEVELS = PARTS[:3]
VARIANTS = ("tiny", "small", "laptop", "1b", "7b", "13b")
# Variants whose frozen encoder is much of what a step costs, and whose features are small: they are kept on disk.
CACHED = ("laptop",)
CHATS = {"laptop": "chatml_bare", "1b": "zephyr"}  # variant -> chat template of its language model, where not Vicuna's


def field(default: Any, doc: str, source: str, *, choices: tuple = (), runtime: bool = False, form: str = "",
          least: float | None = None, above: float | None = None, most: float | None = None,
          below: float | None = None) -> Any:
    """A documented dataclass field. `runtime` fields may change between a run and its resumption; a number lies within
    its bounds, of which `least` and `most` are allowed values, `above` and `below` are not; `form` says of a text that
    it is a `regex` or a `path`. A default that is a function, or a class, is called for each instance."""
    bounds = {"at least": least, "above": above, "at most": most, "below": below}
    metadata = {"doc": doc, "source": source, "choices": choices, "runtime": runtime, "form": form,
                "bounds": {words: bound for words, bound in bounds.items() if bound is not None}}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    if isinstance(default, dict) or dataclasses.is_dataclass(default):
        return dataclasses.field(default_factory=lambda: default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


REMOTE = re.compile(r"[a-zA-Z][a-zA-Z0-9+.-]+:/")  # how an address begins, also after pathlib has shortened it
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127  # of float32
HOLDS = {"at least": operator.ge, "above": operator.gt, "at most": operator.le, "below": operator.lt}


def check_number(name: str, value: float, bounds: typing.Mapping[str, float]) -> None:
    """Raises ConfigError for a number that is outside of its bounds, such as {"at least": 1}; or, as float32 has it, in
    which everything is computed, not finite or no more than 0."""
    fits = value == 0 or SMALLEST <= abs(value) <= LARGEST
    seen = struct.unpack("f", struct.pack("f", value))[0] if fits and isinstance(value, float) else value
    if not (fits and all(HOLDS[words](seen, bound) for words, bound in bounds.items())):
        allowed = " and ".join(f"{words} {bound:g}" for words, bound in bounds.items())
        raise ConfigError(f"{name}={value!r} cannot be used; give a number {allowed}" if allowed else
                          f"{name}={value!r} cannot be used; give a finite number")


def check_local(name: str, path: object) -> None:
    """Raises ConfigError for the address of a bucket or the like: everything is read and written through the local file
    system, where such an address would become the name of a folder."""
    if REMOTE.match(str(path)):
        raise ConfigError(f"{name}={path} is an address, not a path of this machine; mount it (a bucket with gcsfuse) "
                          "or copy it, and give the path where it is then")


def check_regex(name: str, regex: str) -> None:
    """Raises ConfigError for what is no regular expression."""
    try:
        re.compile(regex)
    except re.error as error:
        raise ConfigError(f"{name}={regex!r} is no regular expression: {error}") from None


class Checked:
    """Base of the groups of fields: every value is as its field declares it, numbers finite and within their bounds."""

    def __post_init__(self):
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            for item in value if isinstance(value, tuple) else (value,):
                if type(item) in (int, float):
                    check_number(entry.name, item, entry.metadata["bounds"])
                elif entry.metadata["form"] and isinstance(item, str):
                    {"path": check_local, "regex": check_regex}[entry.metadata["form"]](entry.name, item)


@dataclasses.dataclass(frozen=True)
class PartFeatures:
    """What an encoder gives of one part of an image: `tokens` of `width` channels each, the first `prefix` of which
    stand for no place in it, such as a class token."""

    width: int
    tokens: int
    prefix: int = 0


@dataclasses.dataclass(frozen=True)
class Encoder(Checked):
    """Base of the configs of visual encoders, which `registry.ENCODERS` knows by their family's name.

    A family is a frozen dataclass of fields made by `field`, with a default for `family` and a field `image_size`, the
    side in pixels of the square that it sees, and with what is declared here.
    """

    family: str = field("", "name of the encoder's family", "ours")

    @property
    def mean(self) -> tuple[float, float, float]:
        """RGB in 0..1, of the images that it was trained on."""
        raise NotImplementedError

    @property
    def std(self) -> tuple[float, float, float]:
        """As `mean`, their standard deviation."""
        raise NotImplementedError

    @property
    def padding(self) -> tuple[int, int, int]:
        """RGB 0..255 of what surrounds an image that is no square: the mean, which is zero after normalisation."""
        red, green, blue = (round(255 * value) for value in self.mean)
        return red, green, blue

    def part(self, part: str) -> PartFeatures:
        """The geometry of the features of one of PARTS."""
        raise NotImplementedError

    def resized(self, image_size: int) -> Encoder:
        """The config of the same parameters for images of another size, in pixels.

        Raises:
          ConfigError: the family sees images of one size alone.
        """
        if image_size != self.image_size:
            raise ConfigError(f"an encoder of the family {self.family!r} sees images of {self.image_size} pixels a "
                              f"side alone, not of {image_size}")
        return self

    def flops(self, parts: tuple[str, ...], depths: Depths) -> tuple[float, float] | None:
        """Floating-point operations on one image, as far as `parts` read it: of matmuls with weights, and of
        attention; None: the family does not say, and its traced program is counted."""
        return None

    def wrong(self) -> list[str]:
        """What about the fields does not go together, a sentence each that names fields by their own name."""
        return []

    def build(self, depths: Depths, rngs: Any) -> Any:
        """The module, `models.encoders.Encoder`, with random parameters of the generators `rngs`."""
        raise NotImplementedError


@dataclasses.dataclass(frozen=True)
class Decoder(Checked):
    """Base of the configs of language models, which `registry.DECODERS` knows by their family's name.

    A family is a frozen dataclass of fields made by `field`, with a default for `family` and the fields `vocab`
    (tokens), `width` (channels of a token), `depth` (blocks), `positions` (longest conversation in tokens), `heads` and
    `kv_heads`.
    """

    family: str = field("", "name of the language model's family", "ours")

    @property
    def head_size(self) -> int:
        """Channels of an attention head."""
        return self.width // self.heads

    def wrong(self) -> list[str]:
        """As `Encoder.wrong`."""
        return []

    def build(self, rngs: Any) -> Any:
        """The module, `models.decoders.Decoder`, with random parameters of the generators `rngs`."""
        raise NotImplementedError


def encoder(family: str, **options: Any) -> Encoder:
    """The config of an encoder of a family, with the family's own defaults.

    Raises:
      ConfigError: there is no such family, or an option is none of its fields.
    """
    return _build(Encoder, {"family": family, **options}, "encoder")


def decoder(family: str, **options: Any) -> Decoder:
    """As `encoder`, of a language model."""
    return _build(Decoder, {"family": family, **options}, "decoder")


@dataclasses.dataclass(frozen=True)
class QFormer(Checked):
    width: int = field(768, "channels of a query", "BLIP-2", least=1)
    depth: int = field(12, "blocks", "BLIP-2", least=1)
    heads: int = field(12, "attention heads", "BLIP-2", least=1)
    mlp_width: int = field(3072, "hidden channels of the MLP", "BLIP-2", least=1)
    cross_every: int = field(2, "one block in so many also attends to the picture, the first of each group", "BLIP-2",
                             least=1)
    queries: int = field(32, "learned queries a level", "BLIP-2; the paper's count is not known", least=1)
    eps: float = field(1e-12, "LayerNorm epsilon", "BLIP-2", above=0)


@dataclasses.dataclass(frozen=True)
class Thematic(Checked):
    pool: int = field(1, "side of the square of patches that are averaged into one thematic token; 1 = each patch is "
                      "one", "ours", least=1)
    norm: bool = field(False, "LayerNorm before the fully connected layer; False = none (LLaVA-1.5)", "ours")


@dataclasses.dataclass(frozen=True)
class Depths(Checked):
    low: float = field(1 / 4, "encoder depth read by the low-level Q-Former, fraction of its blocks", "ours",
                       above=0, most=1)
    middle: float = field(1 / 2, "encoder depth read by the middle-level Q-Former, fraction", "ours", above=0, most=1)
    high: float = field(3 / 4, "encoder depth read by the high-level Q-Former, fraction", "ours", above=0, most=1)
    thematic: float = field(23 / 24, "encoder depth read by the fully connected layer, fraction", "LLaVA-1.5",
                            above=0, most=1)

    def block(self, part: str, depth: int) -> int:
        """The number of encoder blocks run before `part` reads, for an encoder of `depth` blocks."""
        return max(1, round(getattr(self, part) * depth))


@dataclasses.dataclass(frozen=True)
class Lora(Checked):
    rank: int = field(0, "rank of the update; 0 = no LoRA", "ours (the paper tunes the LLM)", least=0)
    alpha: float = field(256.0, "scale numerator: an update is multiplied by alpha / rank", "LLaVA-1.5", above=0)
    dropout: float = field(0.05, "dropout before the first factor, probability (in steps of 1/256)", "LLaVA-1.5",
                           least=0, below=1)
    targets: str = field(r"decoder/blocks/(q|k|v|o|gate|up|down)", "regex: paths of the linear layers that get one",
                         "LLaVA-1.5", form="regex")


@dataclasses.dataclass(frozen=True)
class ScoreHead(Checked):
    width: int = field(0, "hidden channels of the regression head; 0 = no head", "ours", least=0)


@dataclasses.dataclass(frozen=True)
class LightHead(Checked):
    grades: tuple[int, ...] = field((), "grades of each attribute in the order of data/attributes.py; () = no head",
                                    "ours", least=2)
    levels: tuple[str, ...] = field((), "the level of each attribute, of whose visual tokens one is its own", "ours",
                                    choices=LEVELS)


@dataclasses.dataclass(frozen=True)
class Model(Checked):
    encoder: Encoder = field(lambda: encoder("clip"), "visual encoder", "paper: a visual encoder; ours: CLIP")
    depths: Depths = field(Depths(), "where each part reads the encoder", "ours")
    qformer: QFormer = field(QFormer(), "each of the three Q-Formers", "paper: three Q-Formers; BLIP-2")
    thematic: Thematic = field(Thematic(), "thematic tokens", "paper: one fully connected layer; the rest is ours")
    visual_rms: float = field(0.0, "root mean square at which a randomly initialised MFAM gives its tokens, best that "
                              "of the word embeddings; 0 = that which the converted checkpoint a run begins from has, "
                              "else 1", "ours", least=0)
    decoder: Decoder = field(lambda: decoder("llama"), "language model", "paper: models like Vicuna-7B")
    lora: Lora = field(Lora(), "low-rank updates", "ours")
    score_head: ScoreHead = field(ScoreHead(), "regression head where an answer begins, for the reader `head`", "ours")
    light_head: LightHead = field(LightHead(), "head on the visual tokens, with which the MFAM warms up, and of "
                                  "the reader light", "ours")
    dtype: str = field("auto", "computation; auto: bfloat16 on accelerators, float32 on CPU", "ours",
                       choices=("auto", "float32", "bfloat16"), runtime=True)
    frozen_dtype: str = field("auto", "storage of frozen parameters; auto as above", "ours",
                              choices=("auto", "float32", "bfloat16"), runtime=True)
    remat: str = field("full", "what a block keeps for its backward pass: none (all), dots (results of products and of "
                       "attention kernels), full (its input only)", "ours", choices=("none", "dots", "full"),
                       runtime=True)

    def visual_tokens(self, part: str) -> int:
        """Tokens that `part` contributes to a mention of an image."""
        if part != "thematic":
            return self.qformer.queries
        features = self.encoder.part(part)
        return (features.tokens - features.prefix) // self.thematic.pool ** 2

    def spans(self, parts: tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """Where the tokens of each of `parts` stand among the visual tokens of an image: part -> (first, count)."""
        found, size = {}, 0
        for part in PARTS:
            if part in parts:
                found[part] = (size, self.visual_tokens(part))
                size += found[part][1]
        return found

    def attribute_tokens(self, parts: tuple[str, ...]) -> tuple[int, ...]:
        """The place, among the visual tokens of an image, of each attribute's own token: the first of its level is that
        of the level's first attribute, and so on. 0 where its level is not computed: no grade is known there."""
        spans, levels = self.spans(parts), self.light_head.levels
        return tuple(spans[level][0] + levels[:number].count(level) if level in spans else 0
                     for number, level in enumerate(levels))

    @property
    def visual_gain(self) -> float:
        """`visual_rms` as the initialisation has it."""
        return self.visual_rms or 1.0


@dataclasses.dataclass(frozen=True)
class Mesh(Checked):
    data: int = field(1, "devices along which only the batch is split", "ours", runtime=True, least=-1)
    fsdp: int = field(-1, "devices along which batch and parameters are split; -1 = all that remain", "ours",
                      runtime=True, least=-1)
    tensor: int = field(1, "devices along which heads and MLP channels are split", "ours", runtime=True, least=-1)


@dataclasses.dataclass(frozen=True)
class Row(Checked):
    tokens: int = field(2048, "T: positions of a row", "LLaVA-1.5 (its length)", least=1)
    images: int = field(2, "I: images a row owns", "ours", least=1)
    answers: int = field(256, "K: supervised positions of a row", "ours", least=1)
    candidates: int = field(1, "C: tokens a soft target may spread over at one position", "ours", least=1)


@dataclasses.dataclass(frozen=True)
class Optimizer(Checked):
    peak_lr: float = field(1e-3, "learning rate after warm-up", "paper: 1e-3, 1e-3, 2.5e-5, 7e-5 for the processes",
                           above=0)
    warmup: float = field(0.03, "linear warm-up, fraction of the steps; of W such steps the first has peak_lr / W",
                          "paper: linear warm-up; LLaVA-1.5: 3 %; its first rate is ours",
                          least=0, most=1)
    final: float = field(0.0, "learning rate at the end, fraction of the peak", "paper: cosine annealing; end is ours",
                         least=0, most=1)
    b1: float = field(0.9, "Adam first-moment decay", "paper: Adam; value is ours", least=0, below=1)
    b2: float = field(0.999, "Adam second-moment decay", "paper: Adam; value is ours", least=0, below=1)
    eps: float = field(1e-8, "Adam epsilon", "ours", above=0)
    weight_decay: float = field(0.0, "decoupled weight decay of matrices, embeddings and queries, not of norms and "
                                "biases", "LLaVA-1.5", least=0)
    clip: float = field(1.0, "largest global gradient norm; 0 = no clipping", "ours", least=0)
    scale: tuple[str, ...] = field((), "REGEX=FACTOR: parameters whose learning rate is multiplied; the first match "
                                   "counts", "ours")

    def __post_init__(self):
        super().__post_init__()
        for entry in self.scale:
            regex, _, factor = entry.rpartition("=")
            try:
                re.compile(regex)
                check_number("factor", float(factor), {"at least": 0})
            except (re.error, ValueError):  # of which ConfigError is one
                raise ConfigError(f"scale={entry!r} is not REGEX=FACTOR, such as 'encoder/.*=0.1'") from None


@dataclasses.dataclass(frozen=True)
class Process(Checked):
    dataset: str = field("demo", "name of the dataset", "ours")
    tasks: dict[str, float] = field({"attributes": 1.0}, "task -> weight in the mixture; DATASET:TASK takes another "
                                    "dataset than the process's own", "ours")
    support: tuple[int, ...] = field((2, 8), "fewest and most rated pictures shown before a personal question",
                                     "paper: in context; numbers are ours", least=1)
    score_spread: float = field(0.0, "standard deviation of the Gaussian that replaces the one right digit of a score, "
                                "on the scale 1-10; 0 = none", "ours", least=0)
    rater_spread: bool = field(False, "where a picture's raters are known, take their standard deviation instead",
                               "ours")
    score_head: float = field(0.0, "weight of the regression head's loss, a mean over the conversations with a score, "
                              "beside that of the words; 0 = it learns nothing", "ours", least=0)
    words: float = field(1.0, "weight of the loss of the answers' words; 0 = the language model is not computed",
                         "ours", least=0)
    light_head: float = field(0.0, "weight of the light head's losses, of the grades and of the scores, each a mean "
                              "over those that are known; 0 = it learns nothing", "ours", least=0)
    compose: bool = field(False, "captions and comments are composed of what is known and measured where nobody wrote "
                          "any", "ours")
    cues: str = field("", "file of further phrases about attributes, from calm cues; '' = only the written",
                      "paper: GPT-3.5 wrote them; ours: most are written by hand", form="path")
    phrasings: int = field(0, "of each written question and answer about attributes and measurements only so many "
                           "are used; 0 = all", "ours", least=0)
    terse: float = field(0.0, "share of the questions about an attribute that are its name alone, answered in a word",
                         "ours", least=0, most=1)
    parts: tuple[str, ...] = field(PARTS, "parts of an image that this process computes", "paper: all, in this order",
                                   choices=PARTS)
    train: tuple[str, ...] = field((".*",), "regexes: parameters that learn", "paper (table of processes)",
                                   form="regex")
    freeze: tuple[str, ...] = field((), "regexes: parameters that stay; every parameter matches exactly one list",
                                    "paper (table of processes)", form="regex")
    row: Row = field(Row(), "shape of a packed row", "ours")
    batch: int = field(128, "rows a step, all devices together", "ours (LLaVA-1.5: 256 and 128 examples)", least=1)
    accumulate: int = field(1, "micro-batches a step", "ours", least=1)
    steps: int = field(1000, "optimizer steps", "ours", least=1)
    optimizer: Optimizer = field(Optimizer(), "Adam, warm-up, cosine", "paper")
    eval_every: int = field(500, "steps between validations; 0 = only at the end", "ours", least=0)
    eval_batches: int = field(8, "validation batches", "ours", least=1)
    train_share: float = field(1.0, "share of the training records that is used, the same ones in every epoch", "ours",
                               above=0, most=1)
    versions: int = field(0, "draws of each record (its edits, questions and answers) that take turns, one an epoch; "
                          "0 = new ones in every epoch", "ours", least=0)
    cached: bool = field(False, "the frozen encoder's features are kept on disk and used again, in half precision; "
                         "False = each step encodes its images", "ours")
    patches: int = field(0, "of a cached image so many patches a level, drawn anew at each step, are what training "
                         "sees; validation sees all; 0 = all", "ours", least=0)
    mixup: float = field(0.0, "both parameters of the Beta distribution from which the share is drawn that an image "
                         "with a score keeps of itself: the rest of features and score is of the one before it in the "
                         "batch; 0 = none", "ours", least=0)
    shuffle_labels: bool = field(False, "control: every conversation is about the pictures of another record", "ours")

    def __post_init__(self):
        super().__post_init__()
        if self.batch % self.accumulate:
            raise ConfigError(f"batch={self.batch} does not divide into accumulate={self.accumulate} micro-batches; "
                              "choose a divisor")
        if not (self.words or self.light_head):
            raise ConfigError("words=0 and light_head=0: there is nothing to learn from; set one of them")
        if self.score_head and not self.words:
            raise ConfigError(f"score_head={self.score_head} reads the language model, which words=0 leaves out")
        if self.patches and not self.cached:
            raise ConfigError(f"patches={self.patches} are drawn from features that are kept; set cached=True, or "
                              "leave patches out")
        if self.mixup and (self.words or not self.cached):
            raise ConfigError(f"mixup={self.mixup} mixes features that are kept, for the light head, which alone can "
                              "say what a mixture is worth; set cached=True and words=0, or leave mixup out")
        if not self.tasks:
            raise ConfigError("a process needs at least one task, such as tasks.attributes=1.0")
        for name, weight in self.tasks.items():
            if not 0 < weight < math.inf:
                raise ConfigError(f"tasks.{name}={weight} is no weight; give a number above 0, or leave the task out")
        if len(self.support) != 2 or not 1 <= self.support[0] <= self.support[1]:
            raise ConfigError(f"support={self.support} is not (fewest, most), such as (2, 8)")
        if self.support[1] >= self.row.images and any(task == "personal" for _, task in self.mixture):
            raise ConfigError(f"a personal question may show {self.support[1]} pictures and one more, and a row has "
                              f"row.images={self.row.images}; raise row.images or lower support")

    @property
    def mixture(self) -> dict[tuple[str, str], float]:
        """(dataset, task) -> weight."""
        found: dict[tuple[str, str], float] = {}
        for name, weight in self.tasks.items():
            dataset, _, task = name.rpartition(":")
            found[dataset or self.dataset, task] = found.get((dataset or self.dataset, task), 0.0) + weight
        return found

    @property
    def datasets(self) -> tuple[str, ...]:
        """The datasets of the mixture, in the order in which the tasks name them."""
        return tuple(dict.fromkeys(dataset for dataset, _ in self.mixture))


@dataclasses.dataclass(frozen=True)
class Checkpoint(Checked):
    every_steps: int = field(500, "steps between checkpoints; 0 = only at the end", "ours", runtime=True, least=0)
    every_minutes: float = field(30.0, "minutes between checkpoints; 0 = off", "ours", runtime=True, least=0)
    keep: int = field(2, "newest checkpoints kept, at least one (the best one is kept besides)", "ours",
                      runtime=True, least=0)
    keep_every_steps: int = field(0, "checkpoints at multiples of this are kept for ever; 0 = none", "ours",
                                  runtime=True, least=0)


@dataclasses.dataclass(frozen=True)
class Data(Checked):
    dir: str = field("", "folder of datasets that calm prepare stored; only `demo` needs none", "ours",
                     runtime=True, form="path")
    workers: int = field(0, "data processes; 0 = threads of the training process", "ours", runtime=True, least=0)
    threads: int = field(4, "rows prepared at the same time", "ours", runtime=True, least=1)
    cache_mb: int = field(0, "decoded pictures kept in memory, megabytes a process; 0 = none", "ours", runtime=True,
                          least=0)
    max_bad_share: float = field(0.01, "share of unreadable records above which the run stops", "ours", runtime=True,
                                 least=0, most=1)


@dataclasses.dataclass(frozen=True)
class Config(Checked):
    seed: int = field(0, "seed of initialisation, data order, augmentation and dropout", "ours",
                      least=0, most=2**32 - 1)
    init: str = field("", "where parameters come from: a workdir or checkpoint folder; empty = random", "ours",
                      form="path")
    model: Model = field(Model, "geometry and numerics", "paper and ours")
    tokenizer: str = field("", "path of a tokenizer.model or tokenizer.json, or the name of a registered one; empty = "
                           "the small one that ships", "ours", form="path")
    chat: str = field("vicuna", "name of the chat template: what stands between the turns of a conversation", "paper: "
                      "models like Vicuna-7B")
    mesh: Mesh = field(Mesh(), "how devices share the work", "ours", runtime=True)
    run: tuple[str, ...] = field((), "processes to run, in this order", "paper: two stages of two processes")
    processes: dict[str, Process] = field({}, "name -> training process", "paper")
    checkpoint: Checkpoint = field(Checkpoint(), "when to save, what to keep", "ours", runtime=True)
    data: Data = field(Data(), "how the pipeline runs", "ours", runtime=True)
    log_every: int = field(10, "steps between logged metrics", "ours", runtime=True, least=1)

    def __post_init__(self):
        super().__post_init__()
        for name in self.run:
            if name not in self.processes:
                raise ConfigError(f"run names the process {name!r}, which `processes` does not define"
                                  f"{nearest(name, self.processes)}")
        qformer = self.model.qformer
        checks = (
            (qformer.width % qformer.heads == 0, f"model.qformer.width={qformer.width} is no multiple of "
             f"heads={qformer.heads}"),
            (qformer.depth % qformer.cross_every == 0, f"model.qformer.depth={qformer.depth} is no multiple of "
             f"cross_every={qformer.cross_every}"),
        )
        wrong = [f"model.encoder.{message}" for message in self.model.encoder.wrong()]
        wrong += [message for holds, message in checks if not holds] + ([] if wrong else self._unpooled())
        wrong += [f"model.decoder.{message}" for message in self.model.decoder.wrong()]
        for name in self.run:
            tokens = self.processes[name].row.tokens
            if tokens > self.model.decoder.positions and self.processes[name].words:
                wrong.append(f"processes.{name}.row.tokens={tokens} exceeds model.decoder.positions="
                             f"{self.model.decoder.positions}")
            if self.processes[name].light_head and not self.model.light_head.grades:
                wrong.append(f"processes.{name}.light_head={self.processes[name].light_head} teaches a light head, and "
                             "the model has none; set model.light_head.grades")
            if self.processes[name].light_head and len(self.model.light_head.levels) != len(
                    self.model.light_head.grades):
                wrong.append(f"model.light_head.levels are {len(self.model.light_head.levels)}, and .grades "
                             f"{len(self.model.light_head.grades)}: each attribute has both")
            most = max(map(self.model.light_head.levels.count, LEVELS))
            if self.processes[name].light_head and most > qformer.queries:
                wrong.append(f"model.qformer.queries={qformer.queries} are too few for a light head: a level has "
                             f"{most} attributes, each with a token of its own")
            if self.processes[name].cached and self.data.workers:
                wrong.append(f"processes.{name}.cached=True encodes images in the training process, which "
                             f"data.workers={self.data.workers} data processes cannot; set data.workers=0, and "
                             "data.threads instead")
            if self.processes[name].score_head and not self.model.score_head.width:
                wrong.append(f"processes.{name}.score_head={self.processes[name].score_head} teaches a regression "
                             "head, and the model has none; set model.score_head.width, such as 256")
        if wrong:
            raise ConfigError("; ".join(wrong))

    def _unpooled(self) -> list[str]:
        """Why thematic tokens cannot be pooled as the config says."""
        features, pool = self.model.encoder.part("thematic"), self.model.thematic.pool
        count = features.tokens - features.prefix
        side = math.isqrt(count)
        if pool == 1 or (side * side == count and side % pool == 0):
            return []
        return [f"model.thematic.pool={pool} does not divide the {count} thematic features of the encoder, which are "
                + (f"{side} x {side}" if side * side == count else "no square grid")]


def to_config_dict(config: Config) -> ml_collections.ConfigDict:
    """The dataclass tree as a ConfigDict, so that command-line flags can override single fields."""
    return ml_collections.ConfigDict(dataclasses.asdict(config))


def from_config_dict(values: ml_collections.ConfigDict | dict[str, Any]) -> Config:
    """Validates every field of `values` and returns the dataclass tree.

    Raises:
      ConfigError: names an unknown field with the nearest valid one, or a field of the wrong type.
    """
    if isinstance(values, ml_collections.ConfigDict):
        values = values.to_dict()
    return _build(Config, values, "config")


def _build(kind: Any, value: Any, path: str) -> Any:
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, typing.Mapping):
            raise ConfigError(f"{path} is a group of fields, not {value!r}")
        if kind in FAMILIES:
            kind = _family(kind, value, path)
        hints = typing.get_type_hints(kind)
        for name in value:
            if name not in hints:
                raise ConfigError(f"{path}.{name} is not a field{nearest(name, hints)}")
        built = {name: _build(hints[name], item, f"{path}.{name}") for name, item in value.items()}
        for entry in dataclasses.fields(kind):
            choices = entry.metadata["choices"]
            items = built.get(entry.name, ())
            for item in items if isinstance(items, tuple) else (items,):
                if choices and item not in choices:
                    raise ConfigError(f"{path}.{entry.name}={item!r} is not one of its values"
                                      f"{nearest(str(item), choices)}")
        try:
            return kind(**built)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from None
    origin = typing.get_origin(kind)
    if origin is dict:
        if not isinstance(value, typing.Mapping):
            raise ConfigError(f"{path} is a table of names, not {value!r}")
        return {name: _build(typing.get_args(kind)[1], item, f"{path}.{name}") for name, item in value.items()}
    if origin is tuple:
        if isinstance(value, str) or not isinstance(value, (tuple, list)):
            raise ConfigError(f"{path} takes a tuple, such as (\"a\",), not {value!r}")
        return tuple(_build(typing.get_args(kind)[0], item, path) for item in value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{path} takes {_article(kind)}, not {value!r}")
    return value


FAMILIES = {Encoder: registry.ENCODERS, Decoder: registry.DECODERS}


def _family(kind: type, value: typing.Mapping[str, Any], path: str) -> type:
    """The dataclass of the family that `value` names."""
    known = FAMILIES[kind]
    if not isinstance(value.get("family"), str):
        raise ConfigError(f"{path}.family is missing; it names a family, such as {known.names()[0]!r}")
    try:
        return known.get(value["family"])
    except ConfigError as error:
        raise ConfigError(f"{path}.family: {error}") from None


def _article(kind: type) -> str:
    return {int: "a whole number", float: "a number", str: "text", bool: "True or False"}.get(kind, str(kind))


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """One line a field whose value differs, `runtime` fields left out; both are `dataclasses.asdict` of a Config."""
    lines: list[str] = []
    compare(Config, old, new, "config", lines)
    return lines


def compare(kind: Any, old: Any, new: Any, path: str, lines: list[str]) -> None:
    """Adds a line to `lines` for each field, of a config of type `kind`, whose value differs, as `differences`."""
    if isinstance(old, dict) and isinstance(new, dict):
        if kind in FAMILIES and old.get("family") == new.get("family"):
            kind = _family(kind, new, path)
        entries = {f.name: f for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        hints = typing.get_type_hints(kind) if entries else {}
        for name in sorted(old.keys() | new.keys()):
            if name in entries and entries[name].metadata["runtime"]:
                continue
            below = hints.get(name) if entries else typing.get_args(kind)[1]
            if name in entries and name not in old:  # of before there was this field: it did what its default does
                old = {**old, name: _default(entries[name])}
            compare(below, old.get(name, "(absent)"), new.get(name, "(absent)"), f"{path}.{name}", lines)
    elif (list(old) if isinstance(old, tuple) else old) != (list(new) if isinstance(new, tuple) else new):
        lines.append(f"{path}: {old!r} -> {new!r}")


def model(variant: str) -> Model:
    """The geometry of a variant.

    `7b` and `13b` are CLIP ViT-L/14-336 + BLIP-2 + Vicuna v1.5, `1b` is the same with TinyLlama-1.1B, `laptop` is
    DINOv2 ViT-S/14 at 224 pixels + SmolLM2-135M: pretrained parts. `small` and `tiny` are trained from scratch. The
    paper names models like Vicuna-7B; all choices are ours.
    """
    if variant == "7b":
        return Model()
    if variant == "13b":
        return Model(decoder=decoder("llama", width=5120, depth=40, heads=40, kv_heads=40, mlp_width=13_824))
    if variant == "1b":
        return Model(thematic=Thematic(pool=2, norm=True), decoder=decoder(
            "llama", width=2048, depth=22, heads=32, kv_heads=4, mlp_width=5632, positions=2048))
    if variant == "laptop":  # MFAM of 7.3 M parameters, 40 visual tokens an image
        return Model(
            encoder=encoder("dinov2", image_size=224, native_size=518),
            depths=Depths(thematic=1.0),
            qformer=QFormer(width=256, depth=2, heads=4, mlp_width=1024, cross_every=1, queries=8),
            thematic=Thematic(pool=4, norm=True),
            decoder=decoder("llama", vocab=49_152, width=576, depth=30, heads=9, kv_heads=3, mlp_width=1536,
                            rope_theta=1e5, positions=8192, tied=True),
            remat="none")
    if variant == "small":
        return Model(
            encoder=encoder("clip", image_size=224, patch=16, width=384, depth=8, heads=6, mlp_width=1536, stem="conv"),
            depths=Depths(thematic=7 / 8),
            qformer=QFormer(width=256, depth=4, heads=4, mlp_width=1024, queries=16),
            decoder=decoder("llama", vocab=2048, width=512, depth=8, heads=8, kv_heads=8, mlp_width=1376,
                            positions=2048),
            remat="none")
    if variant == "tiny":
        return Model(
            encoder=encoder("clip", image_size=64, patch=8, width=96, depth=4, heads=3, mlp_width=288, stem="conv"),
            depths=Depths(thematic=1.0),
            qformer=QFormer(width=96, depth=2, heads=3, mlp_width=288, cross_every=1, queries=8),
            decoder=decoder("llama", vocab=2048, width=128, depth=2, heads=4, kv_heads=4, mlp_width=344,
                            positions=1024),
            remat="none")
    raise ConfigError(f"there is no variant {variant!r}{nearest(variant, VARIANTS)}")


def _default(entry: dataclasses.Field) -> Any:
    """The default of a field, as `dataclasses.asdict` has it."""
    value = entry.default if entry.default is not dataclasses.MISSING else entry.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value


def describe() -> str:
    """A table of all fields with default, meaning and source."""
    lines: list[str] = []

    def walk(kind, path, family=""):
        hints = typing.get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            if hints[entry.name] in FAMILIES:
                known = FAMILIES[hints[entry.name]]
                for name in known.names():
                    walk(known.get(name), f"{path}.{entry.name}", f"family {name}: ")
            elif dataclasses.is_dataclass(hints[entry.name]):
                walk(hints[entry.name], f"{path}.{entry.name}")
            elif entry.name == "processes":
                walk(Process, f"{path}.processes.NAME")
            else:
                lines.append(f"{path}.{entry.name} = {_default(entry)!r}")
                lines.append(f"    {family}{entry.metadata['doc']} [{entry.metadata['source']}]")

    walk(Config, "config")
    return "\n".join(lines)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # whoever read enough has ended it
    print(describe())
