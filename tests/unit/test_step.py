"""One training step: gradients and moments for what learns alone, and a loss that equals the naive one."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import miniature
import numpy as np
import optax
import pytest

from calm_jax import config as config_lib
from calm_jax import sharding
from calm_jax.errors import ConfigError
from calm_jax.models import parameters as parameters_lib
from calm_jax.models.parameters import Geometry
from calm_jax.training import filters, optimizer
from calm_jax.training.setup import Setup
from calm_jax.training.step import State, Step, compile_train

MODEL = dataclasses.replace(miniature.MODEL, decoder=dataclasses.replace(miniature.MODEL.decoder, vocab=128))
ROW = config_lib.Row(tokens=64, images=2, answers=12, candidates=3)
# A prefix of the frozen parts comes first in no pattern, so that patterns and not order decide.
PROCESS = miniature.process(batch=4, row=ROW, train=(r"mfam/.*",), freeze=(r"decoder/.*", r"encoder/.*"), steps=10)
GEOMETRY = Geometry.of(MODEL)


@pytest.fixture(scope="module", autouse=True)
def quick_compilation():
    """These programs run for milliseconds; compiling them well takes most of the time."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def values() -> dict[str, jax.Array]:
    """Random parameters, none of them zero."""
    rng = np.random.default_rng(2)
    scale = lambda shape: 0.7 * shape[-2] ** -0.5 if len(shape) > 1 else 0.3  # noqa: E731
    return {path: jnp.asarray(rng.standard_normal(leaf.shape) * scale(leaf.shape) + path.endswith("scale"), jnp.float32)
            for path, leaf in GEOMETRY.shapes.items()}


def make(process: config_lib.Process, mesh=None) -> Step:
    tx, schedule = optimizer.make(process.optimizer, process.steps)
    return Step(GEOMETRY, process, tx, schedule, jnp.float32, freeze_encoder=True, dropout=False, mesh=mesh)


def split(values, process=PROCESS):
    learns = filters.trainable(GEOMETRY.shapes, process)
    return ({p: v for p, v in values.items() if learns[p]}, {p: v for p, v in values.items() if not learns[p]})


@pytest.fixture(scope="module")
def gradients():
    """The compiled gradient function of each number of micro-batches."""
    return {count: jax.jit(make(dataclasses.replace(PROCESS, accumulate=count)).gradients) for count in (1, 2)}


@jax.jit
def full_logits(values, batch):
    model = GEOMETRY.bind(values)
    return jax.nn.log_softmax(model.decoder.logits(model(batch, PROCESS.parts)), -1)


def naive(values, batch) -> tuple[float, float, float]:
    """(mean loss, right, answers) from full [B, T, V] logits and a loop over the supervised positions."""
    probabilities = np.asarray(full_logits(values, batch), np.float64)
    assert probabilities.shape == (4, ROW.tokens, MODEL.decoder.vocab)
    total = weight = right = answers = 0.0
    for row, place in np.argwhere(batch["weights"].sum(-1) > 0):
        predicted = probabilities[row, batch["places"][row, place]]
        for label, share in zip(batch["labels"][row, place], batch["weights"][row, place], strict=True):
            total -= share * predicted[label]
            weight += share
        answers += 1
        right += predicted.argmax() == batch["labels"][row, place, 0]
    return total / weight, right, answers


@pytest.fixture(scope="module")
def batch():
    return miniature.batch(MODEL, PROCESS)


def test_the_loss_equals_the_naive_one_over_full_logits_with_soft_targets(values, batch, gradients):
    assert ((batch["weights"] > 0).sum(-1) > 1).any()  # soft targets are among them
    _, metrics = gradients[1](*split(values), batch, None)
    loss, right, answers = naive(values, batch)
    assert float(metrics["loss"]) == pytest.approx(loss, rel=1e-5)
    assert float(metrics["accuracy"]) == pytest.approx(right / answers)
    assert float(metrics["answers"]) == answers
    assert float(metrics["tokens"]) == (batch["segments"] > 0).sum()
    assert float(metrics["examples"]) == 2 * PROCESS.batch


def test_the_gradients_are_those_of_the_loss(values, batch, gradients):
    """Against central differences along random directions."""
    trained, frozen = split(values)
    grads, _ = gradients[1](trained, frozen, batch, None)
    loss = jax.jit(make(PROCESS).loss)
    total, rng = {"words": jnp.asarray(batch["weights"].sum())}, np.random.default_rng(0)
    for _ in range(3):
        direction = {path: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32) for path, leaf in trained.items()}
        up, down = ({p: v + sign * 2e-4 * direction[p] for p, v in trained.items()} for sign in (1, -1))
        measured = (loss(up, frozen, batch, total, None)[0] - loss(down, frozen, batch, total, None)[0]) / 4e-4
        expected = sum(float((grads[path] * direction[path]).sum()) for path in trained)
        assert float(measured) == pytest.approx(expected, rel=0.05, abs=0.02)


def test_accumulation_equals_no_accumulation(values, batch, gradients):
    one, once = gradients[1](*split(values), batch, None)
    two, twice = gradients[2](*split(values), batch, None)
    for path in one:
        np.testing.assert_allclose(two[path], one[path], atol=2e-6, rtol=1e-4, err_msg=path)
    for name in once:
        assert float(twice[name]) == pytest.approx(float(once[name]), rel=1e-5), name


def test_what_has_no_weight_does_not_count(values, batch, gradients):
    """Labels, places and whole rows of weight zero change nothing."""
    some = {name: value.copy() for name, value in batch.items()}
    some["weights"][2:] = 0
    grads, metrics = gradients[1](*split(values), some, None)
    other = {name: value.copy() for name, value in some.items()}
    unused = other["weights"] == 0
    other["labels"][unused] = 5
    other["places"][unused.all(-1)] = 0
    other["tokens"][2:] = 7
    other["images"][2:] = 0
    again, same = gradients[1](*split(values), other, None)
    assert float(metrics["loss"]) == pytest.approx(float(same["loss"]), rel=1e-6)
    assert float(metrics["answers"]) == float(same["answers"])
    for path in grads:
        np.testing.assert_allclose(again[path], grads[path], atol=1e-7, err_msg=path)
    nothing = {**some, "weights": np.zeros_like(some["weights"])}
    empty, zero = gradients[1](*split(values), nothing, None)
    assert float(zero["loss"]) == 0 and all(not np.any(leaf) for leaf in empty.values())


def bytes_of(tree) -> int:
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree))


def test_gradients_and_moments_exist_for_what_learns_alone_and_the_rest_stays_bit_for_bit(values, batch):
    mesh = sharding.make_mesh(config_lib.Mesh(), jax.devices()[:1])
    step = make(PROCESS, mesh)
    trained, frozen = split(values)
    count = sum(leaf.size for leaf in trained.values())
    assert 0 < count < sum(leaf.size for leaf in values.values()) / 2
    before = {path: np.asarray(leaf).tobytes() for path, leaf in values.items()}
    grads = jax.eval_shape(step.gradients, trained, frozen, batch, None)[0]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(grads)) == 4 * count
    layout = sharding.parameters(GEOMETRY.shapes, mesh)
    single = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    own = {path: layout[path] for path in trained}
    placement = State(single, own, sharding.optimizer(step.tx, trained, own, mesh))
    state = jax.device_put(State(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, trained), step.tx.init(trained)),
                           placement)
    counters = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim == 0]
    assert bytes_of(state.optimizer) == 2 * 4 * count + bytes_of(counters) and len(counters) == 2
    train = compile_train(step, placement, {path: layout[path] for path in frozen})
    for number in range(3):
        state, metrics = train(state, frozen, sharding.put(batch, mesh, PROCESS.batch), jax.random.key(0))
        assert float(metrics["lr"]) == float(step.schedule(number))
    assert int(state.step) == 3
    for path, leaf in frozen.items():
        assert np.asarray(leaf).tobytes() == before[path], path
    assert all(np.asarray(leaf).tobytes() != before[path] for path, leaf in state.trained.items()
               if not path.endswith("k/bias"))  # a bias of the keys shifts all scores alike: its gradient is nothing
    assert bytes_of(state.optimizer) == 2 * 4 * count + bytes_of(counters)


@pytest.mark.parametrize(("train", "freeze"), [((r"mfam/qformers/.*",),
                                                (r"mfam/thematic/.*", "encoder/.*", "decoder/.*")),
                                               ((r"encoder/.*",), (r"mfam/.*", "decoder/.*")), ((".*",), ())])
def test_moments_take_twice_the_trained_parameters_whatever_learns(train, freeze):
    process = dataclasses.replace(PROCESS, train=train, freeze=freeze)
    learns = filters.trainable(GEOMETRY.shapes, process)
    shapes = {path: leaf for path, leaf in GEOMETRY.shapes.items() if learns[path]}
    moments = jax.tree.leaves(jax.eval_shape(make(process).tx.init, shapes))
    assert sum(leaf.size for leaf in moments if leaf.ndim) == 2 * sum(leaf.size for leaf in shapes.values())
    assert all(leaf.dtype == jnp.float32 for leaf in moments if leaf.ndim)


# ---- warm-up, cosine, Adam --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup", "final"), [(1000, 0.03, 0.0), (200, 0.1, 0.2), (4, 0.03, 0.0)])
def test_the_learning_rate_warms_up_linearly_and_decays_like_a_cosine(steps, warmup, final):
    _, schedule = optimizer.make(config_lib.Optimizer(peak_lr=2e-3, warmup=warmup, final=final), steps)
    top = max(1, round(warmup * steps))
    assert float(schedule(0)) == pytest.approx(2e-3 / top, rel=1e-5)  # the first step already learns
    assert float(schedule(top - 1)) == pytest.approx(2e-3)
    assert float(schedule(steps)) == pytest.approx(final * 2e-3, abs=1e-9)
    for step in range(0, steps, max(1, steps // 17)):
        if step < top:
            expected = 2e-3 * (step + 1) / top
        else:
            progress = (step - top + 1) / (steps - top + 1)
            expected = 2e-3 * (final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress)))
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("steps", [1, 2])
def test_very_short_processes_have_a_schedule(steps):
    _, schedule = optimizer.make(config_lib.Optimizer(peak_lr=1e-3, warmup=0.9), steps)
    assert all(0 < float(schedule(step)) <= 1e-3 * 1.0001 for step in range(steps))


def test_the_optimizer_is_adam_with_clipping_and_decay_of_matrices():
    cfg = config_lib.Optimizer(peak_lr=0.1, warmup=0.1, clip=0.5, weight_decay=0.01, b2=0.95)
    tx, schedule = optimizer.make(cfg, 10)
    parameters = {"a/kernel": jnp.ones((2, 2)), "a/bias": jnp.ones(2)}
    grads = {"a/kernel": jnp.full((2, 2), 3.0), "a/bias": jnp.asarray([4.0, -4.0])}
    state, ours = tx.init(parameters), parameters
    theirs, moments = parameters, [jax.tree.map(jnp.zeros_like, parameters)] * 2
    norm = float(optax.tree.norm(grads))
    for step in range(3):
        updates, state = tx.update(grads, state, ours)
        ours = optax.apply_updates(ours, updates)
        clipped = jax.tree.map(lambda g: g * 0.5 / norm, grads)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], clipped)
        second = jax.tree.map(lambda v, g: 0.95 * v + 0.05 * g * g, moments[1], clipped)
        moments = [first, second]
        t, rate = step + 1, float(schedule(step))
        theirs = {
            name: value - rate * (first[name] / (1 - 0.9**t) / (jnp.sqrt(second[name] / (1 - 0.95**t)) + 1e-8)
                                  + (0.01 * value if name == "a/kernel" else 0))
            for name, value in theirs.items()}
    for name, value in ours.items():
        np.testing.assert_allclose(value, theirs[name], rtol=1e-5)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_weight_decay_pulls_on_what_is_a_matrix_without_its_axes_of_stacking(stem):
    """Against the shapes of one block and one level; every parameter of a model that has all parts is decided about."""
    model = dataclasses.replace(
        miniature.MODEL, encoder=dataclasses.replace(miniature.MODEL.encoder, stem=stem),
        lora=config_lib.Lora(rank=2), score_head=config_lib.ScoreHead(width=4))
    for path, leaf in Geometry.of(model).shapes.items():
        stacked = ("/qformers/" in path) + ("/blocks/" in path)  # levels, and blocks of a group or of a tower
        assert optimizer.decays(path) == (leaf.ndim - stacked > 1), path
    with pytest.raises(ConfigError, match="encoder/shift"):
        optimizer.decays("encoder/shift")


def test_no_norm_and_no_bias_is_pulled():
    tx = make(dataclasses.replace(PROCESS, optimizer=config_lib.Optimizer(weight_decay=0.5))).tx
    ones = {path: jnp.ones(leaf.shape) for path, leaf in GEOMETRY.shapes.items()}
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)
    still = {path for path, leaf in updates.items() if not np.asarray(leaf).any()}
    assert still == {path for path in ones if path.endswith(("/scale", "/bias", "/cls")) or "/biases/" in path}


# ---- filters ----------------------------------------------------------------------------------------------------


def test_parameters_matched_by_neither_or_both_lists_are_named():
    with pytest.raises(ConfigError, match="encoder/cls matches none of train, freeze"):
        filters.trainable(GEOMETRY.shapes, dataclasses.replace(PROCESS, freeze=(r"decoder/.*", r"encoder/(?!cls).*")))
    with pytest.raises(ConfigError, match="mfam/thematic/project/bias matches train and freeze"):
        filters.trainable(GEOMETRY.shapes, dataclasses.replace(
            PROCESS, freeze=(r"decoder/.*", r"encoder/.*", "mfam/thematic/project/bias")))


def test_patterns_that_match_nothing_are_named():
    with pytest.raises(ConfigError, match=r"the pattern 'mfan/\.\*' of train matches no parameter"):
        filters.trainable(GEOMETRY.shapes, dataclasses.replace(PROCESS, train=("mfam/.*", "mfan/.*")))
    with pytest.raises(ConfigError, match="the pattern 'cls' of freeze matches no parameter"):
        filters.trainable(GEOMETRY.shapes, dataclasses.replace(PROCESS, freeze=("decoder/.*", "encoder/.*", "cls")))


def test_a_pattern_that_is_no_regular_expression_is_named():
    with pytest.raises(ConfigError, match=r"'mfam/\('.*is no regular expression"):
        filters.trainable(GEOMETRY.shapes, dataclasses.replace(PROCESS, train=("mfam/(",)))


def test_a_process_in_which_nothing_learns_is_refused():
    with pytest.raises(ConfigError, match="nothing learns"):
        filters.trainable(GEOMETRY.shapes, dataclasses.replace(PROCESS, train=(), freeze=(".*",)))


def test_the_table_adds_up():
    learns = filters.trainable(GEOMETRY.shapes, PROCESS)
    lines = filters.table(GEOMETRY.shapes, learns).splitlines()
    total = sum(leaf.size for leaf in GEOMETRY.shapes.values()) / 1e6
    trained, frozen = (float(word) for word in lines[-1].split()[1:3])
    assert trained + frozen == pytest.approx(total, abs=2e-3) and lines[-1].split()[0] == "all"
    sums = [sum(float(line.split()[column]) for line in lines[1:-1]) for column in (1, 2)]
    assert sums == pytest.approx([trained, frozen], abs=0.01)


def test_the_parameter_table_and_the_model_agree(values):
    drawn = jax.eval_shape(lambda key: parameters_lib.initial(MODEL, key), jax.random.key(0))
    assert {p: v.shape for p, v in drawn.items()} == {p: v.shape for p, v in GEOMETRY.shapes.items()}
    model = GEOMETRY.bind(values)
    assert np.array_equal(model.decoder.embedding[...], values["decoder/embedding"])


@pytest.mark.parametrize("remat", ["none", "full"])
def test_memory_of_a_step_is_linear_in_the_length_of_a_row(remat):
    """What the compiled step needs beside its arguments, from 1,024 to 8,192 tokens."""
    def temporaries(length):
        model = dataclasses.replace(MODEL, remat=remat, decoder=dataclasses.replace(MODEL.decoder, positions=length))
        only = miniature.process(batch=1, row=config_lib.Row(tokens=length, images=1, answers=64), parts=("thematic",))
        config = miniature.config(model=model, processes={"only": only})
        setup = Setup.of(config, "only", Geometry.of(model), sharding.make_mesh(config.mesh, jax.devices()[:1]))
        compiled = setup.compiled().lower(*setup.arguments()).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporaries(1024), temporaries(8192)
    assert long < 9 * short
    assert long < 8192 * 8192 * 4  # not one array of the scores of a head
