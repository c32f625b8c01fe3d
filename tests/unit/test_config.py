"""Every config file in every variant parses, fits its model, and covers its parameters; every field is documented."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import math
import subprocess
import sys
import typing

import miniature
import pytest

from calm_jax import config as config_lib
from calm_jax import json_files, sharding
from calm_jax.convert import families
from calm_jax.data import builders, tasks
from calm_jax.errors import ConfigError
from calm_jax.models.parameters import Geometry
from calm_jax.text.prompts import Layout
from calm_jax.training import filters

FILES = sorted(path.stem for path in (miniature.ROOT / "configs").glob("*.py") if not path.stem.startswith("_"))


def opened(file: str):
    spec = importlib.util.spec_from_file_location(f"config_{file}", miniature.ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The sizes of the paper's stages, or what a file of its own purpose offers; the first is the default.
CHOICES = {file: getattr(opened(file), "VARIANTS", config_lib.VARIANTS) for file in FILES}


def load(file: str, variant: str = "") -> config_lib.Config:
    return config_lib.from_config_dict(opened(file).get_config(variant))


@pytest.mark.parametrize(("file", "variant"), [(file, variant) for file in FILES for variant in CHOICES[file]])
def test_every_config_fits_its_model(file, variant):
    config = load(file, variant)
    assert config.run
    shapes = Geometry.of(config.model).shapes
    assert sharding.rules(shapes).keys() == shapes.keys()
    for name in config.run:
        process = config.processes[name]
        learns = filters.trainable(shapes, process)
        assert learns.keys() == shapes.keys() and filters.table(shapes, learns)
        assert set(process.datasets) <= set(builders.names())
        assert {task for _, task in process.mixture} <= set(tasks.TASKS)
        assert Layout.of(config.model, process.parts).size < process.row.tokens  # a picture fits into a row
        assert process.eval_every <= process.steps


@pytest.mark.parametrize("file", FILES)
def test_the_first_variant_is_the_default_and_unknown_ones_are_refused(file):
    assert load(file) == load(file, CHOICES[file][0])
    with pytest.raises((ConfigError, KeyError), match="7B"):
        load(file, "7B")


def test_the_peak_learning_rates_of_7b_are_those_of_the_paper():
    stage_one, stage_two = load("pretrain", "7b"), load("finetune", "7b")
    rates = [config.processes[name].optimizer.peak_lr for config in (stage_one, stage_two) for name in config.run]
    assert rates == [1e-3, 1e-3, 2.5e-5, 7e-5]


def test_what_the_7b_processes_train_is_what_the_paper_trains():
    def parts(file, name):
        config = load(file, "7b")
        shapes = Geometry.of(config.model).shapes
        learns = filters.trainable(shapes, config.processes[name])
        groups = {path: "/".join(path.split("/")[:2]) if path.startswith("mfam") else path.split("/")[0]
                  for path in shapes}
        return {groups[path] for path in shapes if learns[path]}, {groups[path] for path in shapes if not learns[path]}

    assert parts("pretrain", "self_supervised") == ({"mfam/qformers"}, {"mfam/thematic", "encoder", "decoder"})
    assert parts("pretrain", "generic") == ({"mfam/thematic"}, {"mfam/qformers", "encoder", "decoder"})
    for name in ("comments", "scores"):
        assert parts("finetune", name) == ({"mfam/qformers", "mfam/thematic", "decoder"}, {"encoder"})


def test_the_7b_geometry_has_as_many_parameters_as_its_models():
    shapes = Geometry.of(config_lib.model("7b")).shapes
    count = lambda prefix: sum(leaf.size for path, leaf in shapes.items() if path.startswith(prefix))  # noqa: E731
    assert count("decoder/") == 6_738_415_616  # LLaMA-2-7B
    assert count("encoder/") == 303_507_456 - 2 * 1024  # CLIP ViT-L/14-336's encoder without the norm behind it


# What the published config.json of each part says of its geometry.
PUBLISHED = {
    ("laptop", "encoder"): {
        "model_type": "dinov2", "image_size": 518, "patch_size": 14, "hidden_size": 384, "num_hidden_layers": 12,
        "num_attention_heads": 6, "mlp_ratio": 4, "hidden_act": "gelu", "layer_norm_eps": 1e-6, "qkv_bias": True},
    ("laptop", "language model"): {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536, "rms_norm_eps": 1e-5,
        "rope_theta": 100_000, "max_position_embeddings": 8192, "tie_word_embeddings": True, "hidden_act": "silu"},
    ("1b", "language model"): {
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": 2048, "num_hidden_layers": 22,
        "num_attention_heads": 32, "num_key_value_heads": 4, "intermediate_size": 5632, "rms_norm_eps": 1e-5,
        "rope_theta": 10_000, "max_position_embeddings": 2048, "tie_word_embeddings": False, "hidden_act": "silu"},
}


@pytest.mark.parametrize(("variant", "what"), PUBLISHED)
def test_a_variant_has_the_geometry_of_its_published_parts(variant, what):
    found = families.read(json_files.Table(PUBLISHED[variant, what], "config.json", "", ConfigError), what)
    model = config_lib.model(variant)
    assert model.encoder == found.resized(224) if what == "encoder" else model.decoder == found
    assert variant == "1b" or sum(leaf.size for path, leaf in Geometry.of(model).shapes.items()
                                  if path.startswith("mfam/")) == 7_390_464


def fields(kind=config_lib.Config) -> typing.Iterator[tuple[type, dataclasses.Field]]:
    for entry in dataclasses.fields(kind):
        yield kind, entry
        below = typing.get_type_hints(kind)[entry.name]
        if dataclasses.is_dataclass(below):
            yield from fields(below)
    if kind is config_lib.Config:
        yield from fields(config_lib.Process)


def test_python_m_calm_jax_config_prints_every_field_with_its_source():
    text = subprocess.run([sys.executable, "-m", "calm_jax.config"], cwd=miniature.ROOT, text=True, check=True,
                          capture_output=True).stdout
    lines = text.splitlines()
    names = [line.split(" = ")[0] for line in lines[::2]]
    families = [line.split(":")[0] if line.startswith("    family ") else "" for line in lines[1::2]]
    assert len(names) == len(set(zip(names, families, strict=True))) > 60  # families share names of fields
    for below in lines[1::2]:
        assert below.startswith("    ") and below.rstrip().endswith("]") and "[]" not in below
    for kind, entry in fields():
        assert entry.metadata["doc"] and entry.metadata["source"], (kind, entry.name)
        nested = dataclasses.is_dataclass(typing.get_type_hints(kind)[entry.name]) or entry.name == "processes"
        assert nested or any(name.endswith(f".{entry.name}") for name in names), entry.name


def test_no_field_is_declared_twice_with_the_same_meaning():
    documents = [(entry.name, entry.metadata["doc"]) for _, entry in {(k, e.name): (k, e) for k, e in fields()}.values()
                 if entry.name not in ("eps", "heads", "mlp_width", "depth", "width")]
    assert len(documents) == len(set(documents))


def test_a_config_survives_the_way_through_a_config_dict_and_json():
    config = load("finetune", "7b")
    assert config_lib.from_config_dict(config_lib.to_config_dict(config)) == config
    assert config_lib.from_config_dict(json.loads(json.dumps(dataclasses.asdict(config)))) == config


def changed(path: str, value):
    tree = dataclasses.asdict(load("finetune", "7b"))
    node = tree
    *above, last = path.split(".")
    for name in above:
        node = node[name]
    node[last] = value
    return tree


@pytest.mark.parametrize(("path", "value", "said"), [
    ("model.encoder.widht", 64, "config.model.encoder.widht is not a field; the nearest is 'width'"),
    ("model.encoder.width", "64", "config.model.encoder.width takes a whole number, not '64'"),
    ("model.encoder.width", 100, "model.encoder.width=100 is no multiple of heads=16"),
    ("model.encoder.stem", "cnov", "config.model.encoder.stem='cnov' is not one of its values; the nearest is 'conv'"),
    ("model.thematic.pool", 5, "model.thematic.pool=5 does not divide the 576 thematic features of the encoder, which "
                               "are 24 x 24"),
    ("model.encoder", 3, "config.model.encoder is a group of fields, not 3"),
    ("processes.scores.parts", ("low", "hihg"), "parts='hihg' is not one of its values; the nearest is 'high'"),
    ("processes.scores.train", "vit", "takes a tuple"),
    ("processes.scores.accumulate", 3, "batch=128 does not divide into accumulate=3 micro-batches"),
    ("processes.scores.tasks", {}, "a process needs at least one task"),
    ("processes.scores.row.tokens", 8192, "row.tokens=8192 exceeds model.decoder.positions=4096"),
    ("run", ("comment", "scores"), "run names the process 'comment', which `processes` does not define; the nearest "
                                   "is 'comments'"),
    ("seed", True, "config.seed takes a whole number, not True"),
])
def test_what_is_wrong_is_named_with_the_remedy(path, value, said):
    with pytest.raises(ConfigError) as error:
        config_lib.from_config_dict(changed(path, value))
    assert said in str(error.value)


def test_differences_leave_runtime_fields_out():
    old = dataclasses.asdict(load("finetune", "7b"))
    assert config_lib.differences(old, changed("mesh.fsdp", 4)) == []
    assert config_lib.differences(old, changed("checkpoint.keep", 9)) == []
    assert config_lib.differences(old, changed("seed", 1)) == ["config.seed: 0 -> 1"]
    assert config_lib.differences(old, changed("processes.scores.optimizer.peak_lr", 1.0)) == [
        "config.processes.scores.optimizer.peak_lr: 7e-05 -> 1.0"]


@pytest.mark.parametrize(("path", "values"), [
    ("processes.scores.optimizer.peak_lr", (float("nan"), float("inf"), 0.0, -1e-3)),
    ("processes.scores.optimizer.warmup", (-0.1, 1.5)), ("processes.scores.optimizer.b2", (1.0, float("nan"))),
    ("processes.scores.optimizer.weight_decay", (-0.1, float("inf"))),
    ("processes.scores.optimizer.scale", (("encoder/.*=nan",), ("encoder/.*=-1",))),
    ("processes.scores.steps", (0, -1)), ("processes.scores.batch", (0, -4)), ("processes.scores.accumulate", (0,)),
    ("processes.scores.eval_batches", (0,)), ("processes.scores.row.images", (0,)),
    ("processes.scores.train_share", (0.0, 1.5)), ("processes.scores.score_spread", (float("nan"), -1.0)),
    ("processes.scores.tasks.score", (0.0, float("inf"), float("nan"))),
    ("model.encoder.heads", (0,)), ("model.encoder.patch", (0,)), ("model.qformer.cross_every", (0,)),
    ("model.decoder.kv_heads", (0,)), ("model.decoder.eps", (0.0,)), ("model.decoder.rope_theta", (float("inf"),)),
    ("model.lora.rank", (-1,)), ("model.lora.dropout", (1.0, -0.5)), ("model.depths.low", (0.0, 1.1)),
    ("data.max_bad_share", (float("nan"), 2.0)), ("data.threads", (0,)), ("log_every", (0,)), ("seed", (-1, 2 ** 32)),
    ("checkpoint.every_minutes", (float("nan"), -1.0))], ids=lambda item: item if isinstance(item, str) else "")
def test_a_number_that_cannot_be_meant_is_refused_by_its_name(path, values):
    *above, last = path.split(".")
    for value in values:
        tree = dataclasses.asdict(load("finetune", "tiny"))
        node = tree
        for name in above:
            node = node[name]
        node[last] = value
        with pytest.raises(ConfigError, match=last):
            config_lib.from_config_dict(tree)


@pytest.mark.parametrize(("path", "value"), [
    ("processes.scores.optimizer.b2", 1 - 1e-12), ("processes.scores.optimizer.peak_lr", 1e39),
    ("processes.scores.optimizer.eps", 1e-46), ("model.lora.targets", "decoder/("),
    ("processes.scores.train", ("encoder/(",)), ("processes.scores.freeze", ("*",)),
    ("processes.scores.support", (0, 4))])
def test_what_float32_cannot_hold_and_no_regular_expression_is_refused_by_its_name(path, value):
    with pytest.raises(ConfigError, match=path.rpartition(".")[2]):
        config_lib.from_config_dict(changed(path, value))


@pytest.mark.parametrize("path", ["init", "tokenizer", "data.dir", "processes.scores.cues"])
@pytest.mark.parametrize("address", ["gs://bucket/run", "s3://bucket", "file:///runs/a", "gs:/bucket"])
def test_the_address_of_a_bucket_is_no_path(path, address):
    with pytest.raises(ConfigError, match=f"{path.rpartition('.')[2]}={address}"):
        config_lib.from_config_dict(changed(path, address))
    config_lib.from_config_dict(changed(path, "/mnt/bucket/a:b"))


def test_every_number_declares_its_bounds():
    """A field that takes any finite number has to say so here."""
    def free(kind):
        hints = typing.get_type_hints(kind)
        for entry in dataclasses.fields(kind):
            if dataclasses.is_dataclass(hints[entry.name]):
                yield from free(hints[entry.name])
            elif hints[entry.name] in (int, float) and not entry.metadata["bounds"]:
                yield entry.name

    assert not [*free(config_lib.Config), *free(config_lib.Process)]


def test_kept_tasks_have_a_share_and_options_combine():
    """Without +keep the large models learn what the paper says and nothing besides."""
    for size in ("7b", "13b"):
        assert [set(process.tasks) for process in load("finetune", size).processes.values()] == [{"comment"}, {"score"}]
    for variant in ("tiny", "small", "7b+keep", "7b+lora+keep", "13b+keep+head+lora"):
        config = load("finetune", variant)
        last = config.processes[config.run[-1]]
        assert {"score", "comment", "attributes"} <= set(last.tasks)
        assert ("suggestion" in last.tasks) == (variant in ("tiny", "small"))  # elsewhere zero-shot, as in the paper
        assert math.isclose(sum(last.tasks.values()), 1) and max(last.tasks, key=last.tasks.get) == "score"
        assert bool(config.model.lora.rank) == ("lora" in variant) and bool(last.score_head) == ("head" in variant)
    for wrong in ("7b+kept", "7b+keep+keep", "+keep"):
        with pytest.raises(ConfigError, match="there is no variant"):
            load("finetune", wrong)


def test_a_field_that_an_older_config_lacks_had_its_default():
    """Also one of an encoder's or a decoder's family, and of a table of processes."""
    process = config_lib.Process(tasks={"caption": 1.0})
    now = config_lib.Config(run=("only",), processes={"only": process})
    old = json.loads(json.dumps(dataclasses.asdict(now)))
    del old["processes"]["only"]["cached"], old["model"]["light_head"], old["model"]["encoder"]["native_size"]
    del old["model"]["decoder"]["tied"]
    assert config_lib.differences(old, dataclasses.asdict(now)) == []
    other = dataclasses.replace(
        now, processes={"only": dataclasses.replace(process, train=("mfam/.*",), freeze=("(?!mfam).*",), cached=True)},
        model=dataclasses.replace(now.model, decoder=dataclasses.replace(now.model.decoder, tied=True)))
    found = config_lib.differences(old, dataclasses.asdict(other))
    assert {line.partition(":")[0] for line in found} == {
        "config.model.decoder.tied", "config.processes.only.cached", "config.processes.only.freeze",
        "config.processes.only.train"}
