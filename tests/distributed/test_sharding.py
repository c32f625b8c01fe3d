"""Any mesh gives one device's loss and gradients; nothing large is replicated; no visual token leaves its row.

The checks run in one process with eight simulated CPU devices, which prints their results as JSON.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import importlib.util
import itertools
import json
import math
import re
import sys

import jax
import miniature
import numpy as np
import pytest
from jax.sharding import AbstractMesh, AxisType

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.errors import ConfigError
from calm_jax.models.parameters import Geometry
from calm_jax.training import filters, optimizer
from calm_jax.training.step import State, Step, compile_train

MESHES = [sizes for sizes in itertools.product((1, 2, 4, 8), repeat=3) if math.prod(sizes) == 8]
# `make test` takes one mesh, `make test-slow` one of every kind; thorough: all ten, with and without micro-batches.
SOME = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
ROWS = 16  # divides among eight devices also in two micro-batches
VISUAL = 96  # channels of the language model, so that a visual pool has a shape that nothing else has

# Eight heads and widths that divide by eight; one LoRA, so that its rules are used too. Nine patches an image: with as
# many as rows, position embeddings would have the shape of activations.
WIDE = dataclasses.replace(
    miniature.MODEL,
    encoder=dataclasses.replace(miniature.MODEL.encoder, image_size=24, heads=8, stem="patch"),
    qformer=dataclasses.replace(miniature.MODEL.qformer, heads=8),
    decoder=dataclasses.replace(miniature.MODEL.decoder, width=VISUAL, heads=8, kv_heads=8, mlp_width=64, vocab=256),
    lora=config_lib.Lora(rank=4, alpha=4.0, dropout=0.0))
# The other encoders have parameters of their own, and position embeddings of another grid.
OTHERS = {name: dataclasses.replace(WIDE, encoder=config_lib.encoder(
    family, image_size=32, native_size=40, patch=8, width=32, depth=2, heads=8, mlp_width=64, **options))
    for name, family, options in (("registers", "dinov2", {"registers": 3}),
                                  ("swiglu", "dinov2", {"activation": "swiglu"}), ("siglip", "siglip", {}))}
# The language model with every option: a tied embedding, wider heads in groups, biases, norms of queries and keys.
OPTIONS = dataclasses.replace(WIDE, decoder=dataclasses.replace(
    WIDE.decoder, kv_heads=4, head_dim=16, tied=True, qkv_bias=True, qk_norm=True, rope_factor=4.0, rope_original=16))
# Three heads, odd widths: an axis that does not divide is left out.
ODD = dataclasses.replace(
    miniature.MODEL,
    encoder=dataclasses.replace(miniature.MODEL.encoder, width=36, heads=3, mlp_width=50),
    qformer=dataclasses.replace(miniature.MODEL.qformer, width=30, heads=3, mlp_width=42),
    decoder=dataclasses.replace(miniature.MODEL.decoder, width=36, heads=3, kv_heads=3, mlp_width=50, vocab=251))
PROCESS = miniature.process(batch=ROWS, row=config_lib.Row(tokens=64, images=2, answers=12, candidates=3))


# ---- what runs on eight devices ---------------------------------------------------------------------------------


def a_step(model: config_lib.Model, accumulate: int, mesh: jax.sharding.Mesh | None) -> Step:
    process = dataclasses.replace(PROCESS, accumulate=accumulate)
    tx, schedule = optimizer.make(process.optimizer, process.steps)
    return Step(Geometry.of(model), process, tx, schedule, np.float32, freeze_encoder=False, dropout=False, mesh=mesh)


def drawn(model: config_lib.Model) -> dict[str, np.ndarray]:
    """Random parameters, none of them zero."""
    rng = np.random.default_rng(1)
    scale = lambda shape: 0.5 * shape[-2] ** -0.5 if len(shape) > 1 else 0.1  # noqa: E731
    return {path: (rng.standard_normal(leaf.shape) * scale(leaf.shape) + path.endswith("scale")).astype(np.float32)
            for path, leaf in Geometry.of(model).shapes.items()}


def prepared(model: config_lib.Model, accumulate: int, sizes: tuple[int, int, int] | None):
    """(compiled function, arguments) that give gradients and metrics on a mesh, or on one device."""
    batch, parameters = miniature.batch(model, PROCESS), drawn(model)
    if sizes is None:
        compute = jax.jit(a_step(model, accumulate, None).gradients)
    else:
        mesh = sharding.make_mesh(config_lib.Mesh(*sizes))
        layout = sharding.parameters(Geometry.of(model).shapes, mesh)
        compute = jax.jit(a_step(model, accumulate, mesh).gradients, out_shardings=(layout, None))
        parameters = {path: jax.device_put(value, layout[path]) for path, value in parameters.items()}
        batch = sharding.put(batch, mesh, len(batch["tokens"]))
    return compute.lower(parameters, {}, batch, None).compile(), (parameters, {}, batch, None)


def difference(ours, theirs) -> float:
    """The largest absolute difference of loss and gradients."""
    a, b = ((grads, metrics["loss"]) for grads, metrics in (ours, theirs))
    return max(jax.tree.leaves(jax.tree.map(lambda x, y: float(np.abs(x - y).max()), a, b)))


def compiled(model: config_lib.Model, flat: bool) -> str:
    """HLO of the compiled train step on fsdp=8; `flat`: the negative control, a visual pool flat over the batch."""
    mesh = sharding.make_mesh(config_lib.Mesh(fsdp=8))
    step = a_step(model, 1, mesh)
    if flat:
        def embed(self, tokens, visual, pool):
            rows, size, width = pool.shape
            index = visual + jax.numpy.arange(rows)[:, None] * size
            seen = pool.reshape(rows * size, width)[jax.numpy.maximum(index, 0)]
            return jax.numpy.where((visual >= 0)[..., None], seen, self.decoder.embed(tokens, pool.dtype))

        class Flat(Geometry):
            def bind(self, parameters):
                model = super().bind(parameters)
                model.__class__ = type("FlatCalm", (type(model),), {"embed": embed})
                return model

        step = dataclasses.replace(step, geometry=Flat(**vars(step.geometry)))
    shapes = step.geometry.shapes
    layout = sharding.parameters(shapes, mesh)
    moments = sharding.optimizer(step.tx, shapes, layout, mesh)
    single = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    state = State(jax.ShapeDtypeStruct((), np.int32), dict(shapes), jax.eval_shape(step.tx.init, dict(shapes)))
    train = compile_train(step, State(single, layout, moments), {})
    batch = jax.eval_shape(lambda: miniature.batch(model, PROCESS))
    return train.lower(state, {}, batch, jax.eval_shape(lambda: jax.random.key(0))).compile().as_text()


def exchanged(hlo: str) -> list[tuple[str, str, list[int]]]:
    """(collective, dtype, shape) of every array that one makes in compiled HLO."""
    found = []
    kinds = r"all-gather|all-to-all|collective-permute|all-reduce|reduce-scatter"
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({kinds})(-start)?\(", line)
        for dtype, shape in re.findall(r"(\w+)\[([\d,]*)\]", match.group(1)) if match else ():
            found.append((match.group(2), dtype, [int(size) for size in shape.split(",") if size]))
    return found


def on_eight_devices(one: bool) -> None:
    """Compiles in two threads, which is what takes time, and computes in one: collectives must not interleave.

    Args:
      one: mesh of two models, and what their compiled programs exchange; else many meshes of all.
    """
    assert len(jax.devices()) == 8
    meshes = {("wide", 1): [(2, 2, 2)], ("options", 1): [(1, 2, 4)]} if one else {
        ("wide", 1): MESHES if miniature.THOROUGH else SOME, ("wide", 2): MESHES if miniature.THOROUGH else [(2, 2, 2)],
        ("odd", 1): [(1, 1, 8)], ("options", 1): [(1, 2, 4), (2, 2, 2)], **{(name, 1): [(2, 2, 2)] for name in OTHERS}}
    models = {"wide": WIDE, "odd": ODD, "options": OPTIONS, **OTHERS}
    work = [(name, accumulate, sizes) for (name, accumulate), some in meshes.items() for sizes in (None, *some)]
    result: dict = {"differences": {}}
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        texts = pool.submit(lambda: {name: exchanged(compiled(model, flat)) for name, model, flat in (
            ("wide", WIDE, False), ("options", OPTIONS, False), ("flat", WIDE, True)) if one})
        ready = pool.map(lambda item: prepared(models[item[0]], *item[1:]), work)
        for (name, accumulate, sizes), (compute, arguments) in zip(work, ready, strict=True):
            outcome = jax.device_get(compute(*arguments))
            if sizes is None:
                one = outcome
                result[f"loss {name} {accumulate}"] = float(one[1]["loss"])
                result[f"largest {name}"] = max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(one[0]))
            else:
                result["differences"][f"{name} {accumulate} {sizes}"] = difference(outcome, one)
        result["collectives"] = texts.result()
    print(json.dumps(result))


def computed(one: bool) -> dict:
    """What `on_eight_devices` found; every mesh gave what one device gave."""
    done = miniature.run([sys.executable, "-c", f"import test_sharding; test_sharding.on_eight_devices({one})"],
                         miniature.environment(devices=8))
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout)
    for name in ("wide", "options"):
        assert 0.01 < found[f"largest {name}"] < 10  # there is something to differ in, and float32 can hold it
    wrong = {mesh: value for mesh, value in found["differences"].items() if not value < 1e-5}
    print(f"largest difference over {len(found['differences'])} meshes: {max(found['differences'].values()):.2e}")
    assert not wrong, wrong
    return found


@pytest.fixture(scope="module")
def measured() -> dict:
    return computed(one=True)


def test_a_mesh_gives_the_loss_and_gradients_of_one_device(measured):
    assert len(measured["differences"]) == 2


@pytest.mark.slow
def test_every_mesh_gives_the_loss_and_gradients_of_one_device():
    found = computed(one=False)
    assert len(MESHES) == 10 and len(found["differences"]) == (26 if miniature.THOROUGH else 12)
    assert found["loss wide 1"] == pytest.approx(found["loss wide 2"], abs=1e-5)


POOL = ROWS * PROCESS.row.images * sum(WIDE.visual_tokens(part) for part in PROCESS.parts)


def of_all_rows(collectives) -> list:
    """Collectives that make activations of the whole batch on a device: rows or pictures first, or the flat pool.

    Integers are left out: token ids of all rows do travel, to where their channels of the embedding table are.
    """
    pictures = ROWS * PROCESS.row.images
    return [(kind, shape) for kind, dtype, shape in collectives if dtype.startswith(("f", "bf")) and (
        (shape[:1] == [ROWS] and len(shape) > 1) or (shape[:1] == [pictures] and len(shape) > 2)
        or shape == [POOL, VISUAL])]


@pytest.mark.parametrize("name", ["wide", "options"])
def test_no_visual_token_and_no_other_activation_of_another_row_is_gathered(measured, name):
    """FSDP moves weights, and gradients of weights, and no rows."""
    collectives = measured["collectives"][name]
    assert any(kind == "all-gather" for kind, _, _ in collectives)  # the weights
    assert not of_all_rows(collectives)


def test_the_check_for_gathered_visual_tokens_can_fail(measured):
    assert ("all-gather", [POOL, VISUAL]) in of_all_rows(measured["collectives"]["flat"])


def test_the_options_of_a_language_model_are_split_where_they_are_used():
    """Biases as the columns that they are added to, an embedding by words and channels, norms of heads nowhere."""
    layout = sharding.parameters(Geometry.of(OPTIONS).shapes, eight(1, 2, 4))
    specs = {path.removeprefix("decoder/"): tuple(layout[path].spec) for path in layout if path.startswith("decoder/")}
    for name in "qkv":
        assert specs[f"blocks/{name}/bias"] == (None, "tensor") == specs[f"blocks/{name}/kernel"][::2]
    assert specs["embedding"] == ("tensor", "fsdp") and specs["blocks/q_norm/scale"] == (None, None)
    assert not any(path.startswith("head") for path in specs)


# ---- arithmetic on shapes, in this process ----------------------------------------------------------------------


def eight(data: int = 1, fsdp: int = 8, tensor: int = 1) -> AbstractMesh:
    return AbstractMesh((data, fsdp, tensor), sharding.AXES, axis_types=(AxisType.Auto,) * 3)


@pytest.mark.parametrize("variant", ["7b", "13b"])
def test_no_large_parameter_is_replicated_on_fsdp_8(variant):
    shapes = Geometry.of(config_lib.model(variant)).shapes
    layout = sharding.parameters(shapes, eight())
    whole = {path: shapes[path].size * 4 for path in shapes
             if math.prod(layout[path].shard_shape(shapes[path].shape)) == shapes[path].size}
    assert not {path: size for path, size in whole.items() if size > 1e6}
    share = sum(math.prod(layout[path].shard_shape(leaf.shape)) for path, leaf in shapes.items())
    assert share < 1.01 / 8 * sum(leaf.size for leaf in shapes.values())


@pytest.mark.parametrize("variant", config_lib.VARIANTS)
@pytest.mark.parametrize("stem", ["patch", "conv"])
@pytest.mark.parametrize("rank", [0, 8])
def test_every_parameter_matches_exactly_one_rule(variant, stem, rank):
    model = config_lib.model(variant)
    vit = model.encoder
    if vit.family == "clip":  # the stem is an option of CLIP alone
        odd = stem == "conv" and vit.patch & (vit.patch - 1)
        vit = dataclasses.replace(vit, stem=stem, patch=16 if odd else vit.patch)
    shapes = Geometry.of(dataclasses.replace(model, encoder=vit, lora=config_lib.Lora(rank=rank))).shapes
    for path in shapes:
        rules = [name for name, (regexes, _) in sharding.TABLE.items()
                 if any(re.fullmatch(regex, path) for regex in regexes)]
        assert len(rules) == 1, (path, rules)
    assert sharding.rules(shapes).keys() == shapes.keys()
    assert any("/lora/" in path for path in shapes) == bool(rank)
    text = sharding.table(shapes, eight())
    assert all(rule in text for rule in set(sharding.rules(shapes).values()))


def test_a_parameter_without_a_rule_is_named():
    with pytest.raises(ConfigError, match="decoder/blocks/bell matches none of"):
        sharding.rules({"decoder/embedding": None, "decoder/blocks/bell": None})


def test_a_batch_that_does_not_divide_the_mesh_is_refused_with_a_batch_that_does():
    sharding.check_batch(miniature.process(batch=16, accumulate=2), eight(), "scores")
    with pytest.raises(ConfigError, match=r"processes.scores: batch=12 over accumulate=1 makes 12 rows .* "
                       r"data\*fsdp=8 devices; choose a batch that is a multiple of 8"):
        sharding.check_batch(miniature.process(batch=12), eight(), "scores")
    with pytest.raises(ConfigError, match="choose a batch that is a multiple of 16"):
        sharding.check_batch(miniature.process(batch=8, accumulate=2), eight(2, 4, 1), "scores")
    sharding.check_batch(miniature.process(batch=1), eight(1, 1, 8), "scores")  # tensor does not split rows


@pytest.mark.parametrize(("sizes", "said"), [
    ((3, 1, 1), "mesh data=3 fsdp=1 tensor=1 does not multiply to the 8 devices present; set one of them to -1"),
    ((-1, 3, 1), "does not multiply to the 8 devices"),
    ((-1, -1, 1), "at most one may be -1"),
    ((0, 8, 1), "the others are positive"),
])
def test_a_mesh_that_does_not_fit_the_devices_is_refused(sizes, said):
    with pytest.raises(ConfigError, match=said):
        sharding.make_mesh(config_lib.Mesh(*sizes), devices=[None] * 8)


@pytest.mark.parametrize(("file", "variant", "process"), [("pretrain", "7b", "generic"), ("finetune", "7b", "scores")])
def test_moments_are_sharded_like_their_parameters(file, variant, process):
    spec = importlib.util.spec_from_file_location(file, miniature.ROOT / "configs" / f"{file}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = config_lib.from_config_dict(module.get_config(variant))
    shapes = Geometry.of(config.model).shapes
    learns = filters.trainable(shapes, config.processes[process])
    trained = {path: leaf for path, leaf in shapes.items() if learns[path]}
    layout = {path: place for path, place in sharding.parameters(shapes, eight()).items() if learns[path]}
    tx, _ = optimizer.make(config.processes[process].optimizer, 10)
    moments = jax.tree.leaves(sharding.optimizer(tx, trained, layout, eight()))
    for path in trained:
        assert sum(place == layout[path] for place in moments) >= 2
