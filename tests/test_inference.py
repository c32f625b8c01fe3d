"""calm_jax.inference: generated answers equal the full forward's, and do not depend on their neighbours."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.data import builders, images, prompts
from calm_jax.data.samples import Answer, ImageRef, Mention, Sample, Turn
from calm_jax.data.tokenizer import Tokenizer
from calm_jax.inference.generate import Generator
from calm_jax.inference.scorer import DECIMALS, Tree, read_score
from calm_jax.models.parameters import Geometry, initial

MODEL = config_lib.Model(
    vit=config_lib.Vit(image_size=32, patch=8, width=32, depth=4, heads=2, mlp_width=64, stem="conv"),
    qformer=config_lib.QFormer(width=32, depth=2, heads=2, mlp_width=64, queries=2),
    llama=config_lib.Llama(vocab=2048, width=48, depth=2, heads=4, kv_heads=2, mlp_width=96, positions=512),
    remat="none")


@pytest.fixture(scope="module")
def generator():
    parameters = jax.jit(lambda key: initial(MODEL, key))(jax.random.key(3))
    return Generator(MODEL, parameters, Tokenizer())


@pytest.fixture(scope="module")
def demo():
    return builders.load("demo")


def questions():
    mention = Mention(0)
    one = Sample((ImageRef(0),), (Turn((mention, "What does it show?"), Answer("A.")),))
    two = Sample((ImageRef(50), ImageRef(90)), (Turn((Mention(0, ("low",)), "or", Mention(1, ("low",)), "Which?"),
                                                     Answer("The first.")),
                                                Turn(("Why is that so, in more words than before?",), Answer("B."))))
    none = Sample((), (Turn(("Hello.",), Answer("C.")),))
    return [(one, 0), (two, 1), (none, 0), (two, 0)]


def by_full_forward(generator, demo, sample, turn, limit):
    """Greedy decoding without a cache: the whole prompt again for every token."""
    encoded = prompts.encode(sample, generator.tokenizer, generator.layout, ask=turn)
    slots = max(1, len(encoded.images))
    pixels = np.zeros((1, slots, generator.size, generator.size, 3), np.uint8)
    for slot, ref in enumerate(encoded.images):
        pixels[0, slot] = images.render(demo.pixels(ref.index), ref, generator.size)
    width = len(encoded.tokens) + limit
    tokens = np.zeros((1, width), np.int32)
    visual = np.full((1, width), -1, np.int32)
    tokens[0, :len(encoded.tokens)], visual[0, :len(encoded.visual)] = encoded.tokens, encoded.visual
    geometry = Geometry.of(MODEL)

    @jax.jit
    def following(tokens, length):
        model = geometry.bind(generator.parameters)
        positions = jnp.arange(width)[None]
        batch = {"images": pixels, "tokens": tokens, "visual": visual, "positions": positions,
                 "segments": (positions < length).astype(jnp.int32)}
        hidden = model(batch, config_lib.PARTS)
        return model.answer_logits(hidden, (length - 1)[None, None])[0, 0].argmax()

    said, length = [], len(encoded.tokens)
    while len(said) < limit:
        token = int(following(tokens, jnp.int32(length)))
        if token == generator.tokenizer.eos:
            break
        tokens[0, length] = token
        said.append(token)
        length += 1
    return generator.tokenizer.decode(said)


def test_cached_generation_equals_the_full_forward(generator, demo):
    asked = questions()
    answers = list(generator.answers(asked, demo.pixels, limit=12, batch=4))
    assert answers == [by_full_forward(generator, demo, sample, turn, 12) for sample, turn in asked]
    assert len(set(answers)) > 1


def test_answers_do_not_depend_on_their_neighbours(generator, demo):
    asked = questions()
    together = list(generator.answers(asked, demo.pixels, limit=12, batch=4))
    alone = [text for item in asked for text in generator.answers([item], demo.pixels, limit=12, batch=1)]
    assert alone == together
    assert list(generator.answers(asked[::-1], demo.pixels, limit=12, batch=4)) == together[::-1]
    assert list(generator.answers(asked, demo.pixels, limit=12, batch=3)) == together


def test_expected_scores_equal_brute_force(generator, demo):
    """The whole prompt and every decimal from 1.0 to 10.0 behind it, each in a row of its own."""
    asked, geometry = questions(), Geometry.of(MODEL)
    spelled = [generator.tokenizer.encode(text) for text in DECIMALS]

    @jax.jit
    def logits(batch):
        model = geometry.bind(generator.parameters)
        return jax.nn.log_softmax(model.llama.logits(model(batch, config_lib.PARTS)))

    truth = []
    for sample, turn in asked:
        encoded = prompts.encode(sample, generator.tokenizer, generator.layout, ask=turn)
        length, width = len(encoded.tokens), 448
        tokens = np.zeros((len(spelled), width), np.int32)
        visual = np.full((len(spelled), width), -1, np.int32)
        pixels = np.zeros((len(spelled), 2, generator.size, generator.size, 3), np.uint8)
        for slot, ref in enumerate(encoded.images):
            pixels[:, slot] = images.render(demo.pixels(ref.index), ref, generator.size)
        tokens[:, :length], visual[:, :length] = encoded.tokens, encoded.visual
        for row, ids in enumerate(spelled):
            tokens[row, length:length + len(ids)] = ids
        positions = np.broadcast_to(np.arange(width), tokens.shape)
        found = np.asarray(logits({"images": pixels, "tokens": tokens, "visual": visual, "positions": positions,
                                   "segments": np.ones_like(tokens)}))
        chances = np.exp([sum(found[row, length - 1 + step, token] for step, token in enumerate(ids))
                          for row, ids in enumerate(spelled)])
        values = np.asarray([float(text) for text in DECIMALS])
        mean = (chances * values).sum() / chances.sum()
        truth.append((mean, np.sqrt((chances * (values - mean) ** 2).sum() / chances.sum())))
    np.testing.assert_allclose(list(generator.scores(asked, demo.pixels, batch=4)), truth, atol=1e-4)
    np.testing.assert_allclose(list(generator.scores(asked, demo.pixels, batch=3)), truth, atol=1e-4)
    assert len({round(mean, 3) for mean, _ in truth}) > 1


def test_the_tree_says_every_decimal_once_and_shares_what_they_begin_with(generator):
    tree = Tree.of(generator.tokenizer)
    longest = max(len(generator.tokenizer.encode(text)) for text in DECIMALS)
    assert len(tree.values) == 91 and tree.values[0] == 1 and tree.values[-1] == 10
    assert tree.steps.sum(1).max() == longest and len(tree.tokens) < 2 * 9 + 2 * longest
    for ids in map(generator.tokenizer.encode, DECIMALS):  # the full stop behind it changes nothing before it
        text = generator.tokenizer.decode(ids)
        assert generator.tokenizer.encode(text + ".")[:len(ids)] == ids


def test_a_prompt_that_does_not_fit_is_refused(generator, demo):
    long = Sample((), (Turn(("word " * 500,), Answer("A.")),))
    with pytest.raises(config_lib.ConfigError, match="exceed the model's 512 positions"):
        list(generator.answers([(long, 0)], demo.pixels))


@pytest.mark.parametrize(("text", "score"), [
    ("6.5.", 6.5), ("The score is 7.", 7.0), ("10.0.", 10.0), ("I give it 3.25 of 10.", 3.25), ("", None),
    ("none", None), ("42", None), ("0.5", None), ("11.0. or 4.2.", 4.2), ("6..5", 6.0), ("1985", None)])
def test_scores_are_read_from_text(text, score):
    assert read_score(text) == score
