"""calm_jax.inference: generated answers equal the full forward's, and do not depend on their neighbours."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.data import builders, images
from calm_jax.data.samples import Answer, ImageRef, Mention, Sample, Turn
from calm_jax.data.scale import DECIMALS, read_score
from calm_jax.data.tasks.opinions import in_context
from calm_jax.errors import ConfigError
from calm_jax.inference import decoding
from calm_jax.inference.decoding import GREEDY, Sampling
from calm_jax.inference.generate import Generator
from calm_jax.inference.scorer import SAID, Tree
from calm_jax.models import layers
from calm_jax.models.parameters import Geometry, initial
from calm_jax.text import chat as chat_lib
from calm_jax.text import prompts

MODEL = config_lib.Model(
    encoder=config_lib.encoder("clip", image_size=32, patch=8, width=32, depth=4, heads=2, mlp_width=64, stem="conv"),
    qformer=config_lib.QFormer(width=32, depth=2, heads=2, mlp_width=64, queries=2),
    decoder=config_lib.decoder("llama", vocab=2048, width=48, depth=2, heads=4, kv_heads=2, mlp_width=96,
                               positions=512),
    remat="none")


@pytest.fixture(scope="module")
def parameters():
    return jax.jit(lambda key: initial(MODEL, key))(jax.random.key(3))


@pytest.fixture(scope="module")
def generator(parameters):
    return Generator(MODEL, parameters, chat_lib.load())


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


@jax.jit
def following(parameters, images, tokens, visual, length):
    """Logits behind the first `length` tokens of each row; a module's function, so that one width is compiled once."""
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    batch = {"images": jnp.broadcast_to(images, (len(tokens), *images.shape[1:])), "tokens": tokens, "visual": visual,
             "positions": positions, "segments": (positions < length).astype(jnp.int32)}
    model = Geometry.of(MODEL).bind(parameters)
    hidden = model(batch, config_lib.PARTS)
    return model.answer_logits(hidden, jnp.full((len(tokens), 1), length - 1))[:, 0]


class Uncached:
    """Logits of what follows a prompt and some tokens of its answer, each time by the full forward of training."""

    def __init__(self, parameters, generator, demo, sample, turn, limit):
        self.parameters, self.arrays = parameters, generator.arrays([(sample, turn)], demo.pixels, limit)
        self.length, self.width = int(self.arrays["lengths"][0]), self.arrays["tokens"].shape[1] + limit

    def __call__(self, answers):
        """`[K, V]` after `[K, t]` tokens."""
        tokens = np.zeros((len(answers), self.width), np.int32)
        visual = np.full((len(answers), self.width), -1, np.int32)
        tokens[:, :self.length] = self.arrays["tokens"][0, :self.length]
        visual[:, :self.length] = self.arrays["visual"][0, :self.length]
        answers = np.asarray(answers, np.int32)
        tokens[:, self.length:self.length + answers.shape[1]] = answers
        return following(self.parameters, self.arrays["images"], tokens, visual,
                         jnp.int32(self.length + answers.shape[1]))

    def one_by_one(self, sampling, eos, limit):
        """Greedy, or drawn by `decoding.choose`."""
        said = []
        while len(said) < limit and eos not in said:
            logits = decoding.possible(self(np.asarray([said], np.int32)), len(said), sampling.shortest, eos,
                                       MODEL.decoder.vocab)
            said.append(int(logits[0].argmax()) if sampling.temperature == 0 else int(decoding.choose(
                logits, jnp.asarray(self.arrays["digests"]), len(said), sampling.temperature, sampling.top_p,
                np.uint32(sampling.seed))[0]))
        return said

    def beams(self, sampling, eos, limit):
        """The textbook: all sequences as lists, the best K kept, finished ones set aside by their penalised score."""
        running, finished = [((), 0.0)], []
        for length in range(1, limit + 1):
            said = np.asarray([ids for ids, _ in running], np.int32).reshape(len(running), -1)
            found = jax.nn.log_softmax(self(said))
            found = np.asarray(decoding.possible(found, length - 1, sampling.shortest, eos,
                                                 MODEL.decoder.vocab), np.float64)
            most, penalty = 2 * sampling.beams, length ** sampling.length_penalty
            candidates = sorted((((*ids, token), score + found[beam, token])
                                 for beam, (ids, score) in enumerate(running)
                                 for token in np.argsort(-found[beam])[:most].tolist()), key=lambda c: -c[1])[:most]
            ends = [ids[-1] == eos or length == limit for ids, _ in candidates]
            finished += [(ids, score / penalty) for place, (ids, score) in enumerate(candidates)
                         if ends[place] and place < sampling.beams]
            finished = sorted(finished, key=lambda f: -f[1])[:sampling.beams]
            running = [c for c, end in zip(candidates, ends, strict=True) if not end][:sampling.beams]
            if not running or (len(finished) == sampling.beams and running[0][1] / penalty <= finished[-1][1]):
                break
        return list(finished[0][0])


SAMPLINGS = {"greedy": Sampling(), "drawn": Sampling(temperature=1.0, seed=5), "tempered": Sampling(temperature=0.6),
             "nucleus": Sampling(temperature=1.3, top_p=0.7, seed=2 ** 32 - 1), "long": Sampling(shortest=9),
             "three beams": Sampling(beams=3), "long beams": Sampling(beams=2, shortest=7),
             "beams that like length": Sampling(beams=4, length_penalty=2.0),
             "beams that do not": Sampling(beams=2, length_penalty=-1.0)}
# The kinds of search, of which `make test` takes the first.
EVERY_WAY = [pytest.param(SAMPLINGS[name], id=name, marks=[pytest.mark.slow] * (name != "greedy"))
             for name in ("greedy", "nucleus", "three beams")]


@pytest.fixture(scope="module")
def talkative(parameters):
    """A model whose answers differ and end: its head likes the end of the text now and then."""
    head = parameters["decoder/head/kernel"]
    return parameters | {"decoder/head/kernel": 3 * head.at[:, chat_lib.load().stop].multiply(1.7)}


@pytest.mark.parametrize("sampling", EVERY_WAY)
def test_what_a_vocabulary_is_padded_with_is_never_said(talkative, demo, sampling):
    """The same answers as without the padding, although its logits are the highest by far."""
    model = dataclasses.replace(MODEL, decoder=dataclasses.replace(MODEL.decoder, vocab=2112))
    kernel, table = talkative["decoder/head/kernel"], talkative["decoder/embedding"]
    padded = talkative | {
        "decoder/head/kernel": jnp.concatenate([kernel, jnp.repeat(50 * kernel[:, :1], 64, 1)], 1),
        "decoder/embedding": jnp.concatenate([table, table[:64]])}
    plain, wide = Generator(MODEL, talkative, chat_lib.load()), Generator(model, padded, chat_lib.load())
    asked = questions()[:4]
    arrays = wide.arrays(asked, demo.pixels, 6)
    said = wide.ids(arrays, 6, sampling)
    assert said.max() < 2048
    if sampling == GREEDY:
        np.testing.assert_array_equal(said, plain.ids(plain.arrays(asked, demo.pixels, 6), 6, sampling))
        for reader in SAID:  # nor does it share the probability from which scores are read
            scores = [[(score.value, score.spread) for score in each.scores(asked, demo.pixels, reader=reader)]
                      for each in (wide, plain)]
            np.testing.assert_allclose(*scores, atol=1e-5)


def test_a_language_model_of_every_option_answers_as_its_full_forward(demo):
    """A tied and padded embedding, wider heads in groups, biases, norms of queries and keys, scaled frequencies; with
    kernels as CPUs and as accelerators have them."""
    decoder = dataclasses.replace(MODEL.decoder, vocab=2112, head_dim=16, tied=True, qkv_bias=True, qk_norm=True,
                                  rope_factor=8.0, rope_original=32)
    model, rng = dataclasses.replace(MODEL, decoder=decoder), np.random.default_rng(0)
    parameters = jax.jit(lambda key: initial(model, key))(jax.random.key(3))
    for path, leaf in parameters.items():
        if path.endswith(("bias", "scale")):
            parameters[path] = leaf + 0.3 * rng.normal(size=leaf.shape).astype(np.float32)
        if path.startswith("decoder/") and path.endswith(("o/kernel", "down/kernel")):
            parameters[path] = 2 * leaf  # so that answers are no single word
    geometry, limit = Geometry.of(model), 6
    generator = Generator(model, parameters, chat_lib.load())
    assert "decoder/head/kernel" not in generator.parameters
    assert generator.parameters["decoder/embedding"].shape == (2112, 48)
    arrays = generator.arrays(questions(), demo.pixels, limit)
    width = arrays["tokens"].shape[1] + limit

    @jax.jit
    def following(tokens, visual, lengths):
        positions = jnp.broadcast_to(jnp.arange(width), tokens.shape)
        bound = geometry.bind(parameters)
        hidden = bound({"images": arrays["images"], "tokens": tokens, "visual": visual, "positions": positions,
                        "segments": (positions < lengths[:, None]).astype(jnp.int32)}, config_lib.PARTS)
        return bound.answer_logits(hidden, lengths[:, None] - 1)[:, 0, :2048]

    tokens, visual = (np.pad(arrays[name], ((0, 0), (0, limit)), constant_values=value)
                      for name, value in (("tokens", 0), ("visual", -1)))
    for count in range(limit):
        ends = arrays["lengths"] + count
        tokens[np.arange(4), ends] = np.asarray(following(tokens, visual, ends).argmax(-1))
    expected = [tokens[row, length:length + limit] for row, length in enumerate(arrays["lengths"])]
    assert generator.chat.stop not in np.concatenate(expected) and len(set(np.concatenate(expected))) > 4
    np.testing.assert_array_equal(generator.ids(arrays, limit), expected)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(layers, "platform", lambda: "tpu")
        plain = Generator(model, parameters, chat_lib.load())
    np.testing.assert_array_equal(plain.ids(arrays, limit), expected)


def test_kernels_may_lie_either_way(talkative, demo, monkeypatch):
    """Transposed, as CPUs want them, or as they were trained, as accelerators have them."""
    turned = Generator(MODEL, talkative, chat_lib.load())
    with monkeypatch.context() as patched:
        patched.setattr(layers, "platform", lambda: "tpu")
        plain = Generator(MODEL, talkative, chat_lib.load())
    assert [each.parameters["decoder/blocks/1/gate/kernel"].shape for each in (turned, plain)] == [(96, 48), (48, 96)]
    assert [each.parameters["decoder/head/kernel"].shape for each in (turned, plain)] == [(2048, 48), (48, 2048)]
    texts, scores = zip(*((list(each.answers(questions(), demo.pixels, limit=6, batch=4)),
                           [score.value for score in each.scores(questions(), demo.pixels, batch=4)])
                          for each in (turned, plain)), strict=True)
    assert texts[0] == texts[1]
    np.testing.assert_allclose(*scores, atol=1e-5)


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
def test_cached_generation_equals_the_full_forward(talkative, demo, sampling):
    generator, limit = Generator(MODEL, talkative, chat_lib.load()), 12
    asked, eos = questions(), generator.chat.stop
    arrays = generator.arrays(asked, demo.pixels, limit)
    found = generator.ids(arrays, limit, sampling)
    for (sample, turn), ids in zip(asked, found, strict=True):
        uncached = Uncached(talkative, generator, demo, sample, turn, limit)
        expected = (uncached.beams if sampling.beams > 1 else uncached.one_by_one)(sampling, eos, limit)
        assert ids.tolist() == expected + [eos] * (limit - len(expected))
    assert len({tuple(ids) for ids in found.tolist()}) > 1


@pytest.mark.parametrize("sampling", EVERY_WAY)
def test_answers_do_not_depend_on_their_neighbours(talkative, demo, sampling):
    generator, asked = Generator(MODEL, talkative, chat_lib.load()), questions()

    def said(asked, batch):
        return list(generator.answers(asked, demo.pixels, limit=12, batch=batch, sampling=sampling))

    together = said(asked, 4)
    assert [text for item in asked for text in said([item], 1)] == together
    assert said(asked[::-1], 4) == together[::-1] and said(iter(asked), 3) == together


@pytest.mark.parametrize("sampling", EVERY_WAY)
def test_a_remembered_beginning_changes_nothing(talkative, demo, sampling):
    """Rated pictures once for all questions, or again for each: the same scores and answers."""
    generator = Generator(MODEL, talkative, chat_lib.load())
    rated = [(ImageRef(10 * place), 2.5 * place) for place in (1, 2, 3)]
    asked = [(Sample(*in_context(rated, ImageRef(index), config_lib.PARTS)), 3) for index in (0, 250, 500, 750, 1000)]
    looked: list[int] = []

    def pixels(index):
        looked.append(index)
        return demo.pixels(index)

    memory = generator.remember(asked[0][0], 3, pixels)
    assert sorted(looked) == [10, 20, 30] and memory.images == 3
    whole = list(generator.answers(asked, demo.pixels, limit=6, batch=4, sampling=sampling))
    looked.clear()
    # What is drawn depends on the prompt as it is given, whose digest a beginning is no part of.
    again = list(generator.answers(asked, pixels, limit=6, batch=4, sampling=sampling, memory=memory))
    assert not {10, 20, 30} & set(looked) and (again == whole or sampling.temperature > 0)
    for reader in SAID:
        mine = [(score.value, score.spread) for score in generator.scores(asked, pixels, reader=reader, memory=memory)]
        np.testing.assert_allclose(mine, [(score.value, score.spread) for score in generator.scores(
            asked, demo.pixels, reader=reader)], atol=1e-4)
        assert len({round(value, 4) for value, _ in mine}) == 5


def test_every_picture_is_read_once(generator, demo):
    """Also of a batch that is not full."""
    looked: list[int] = []

    def pixels(index):
        looked.append(index)
        return demo.pixels(index)

    mention = (Mention(0), "Which score?")
    asked = [(Sample((ImageRef(index),), (Turn(mention, Answer("")),)), 0) for index in range(11)]
    assert len(list(generator.scores(asked, pixels, batch=4))) == 11 and sorted(looked) == list(range(11))


def test_what_is_drawn_follows_the_distribution():
    """Of 4,000 answers: their shares, those outside the nucleus, and other seeds."""
    logits = jnp.log(jnp.asarray([[0.5, 0.3, 0.15, 0.05]]))
    rows = jnp.broadcast_to(logits, (4000, 4))
    digests = jnp.arange(4000, dtype=jnp.uint32)

    def shares(temperature, top_p, seed=0):
        return np.bincount(decoding.choose(rows, digests, 0, temperature, top_p, seed), minlength=4) / 4000

    np.testing.assert_allclose(shares(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.03)
    squared = np.asarray([0.5, 0.3, 0.15, 0.05]) ** 2
    np.testing.assert_allclose(shares(0.5, 1.0), squared / squared.sum(), atol=0.03)
    np.testing.assert_allclose(shares(1.0, 0.8), [0.625, 0.375, 0, 0], atol=0.03)  # .5 + .3 reach it
    np.testing.assert_allclose(shares(1.0, 0.81)[3], 0)
    assert shares(1.0, 0.01).tolist() == [1, 0, 0, 0]
    assert shares(1.0, 1.0, seed=1).tolist() != shares(1.0, 1.0).tolist()


def test_what_is_drawn_outlives_rounding():
    """Tokens that rounding swaps in their order, as another number of devices may, are not swapped in the answer."""
    rng = np.random.default_rng(0)
    logits = np.repeat(rng.normal(size=(1, 40)), 50, 1).astype(np.float32)  # 40 times 50 equals
    rows, digests = jnp.broadcast_to(logits, (2000, 2000)), jnp.arange(2000, dtype=jnp.uint32)
    disturbed = rows + 1e-6 * rng.normal(size=rows.shape).astype(np.float32)
    drawn, again = (np.asarray(decoding.choose(each, digests, 3, 1.0, 0.99, 7)) for each in (rows, disturbed))
    assert (drawn != again).mean() < 0.002 and len(np.unique(drawn)) > 500


NAN = float("nan")


@pytest.mark.parametrize("wrong", [
    {"temperature": -1.0}, {"temperature": 1e-40}, {"temperature": NAN}, {"temperature": float("inf")}, {"top_p": 0.0},
    {"top_p": NAN}, {"shortest": -2}, {"seed": -1}, {"beams": 0}, {"length_penalty": NAN},
    {"beams": 2, "temperature": 1.0}], ids=str)
def test_impossible_sampling_is_refused_by_the_name_of_its_field(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        Sampling(**wrong)


@pytest.mark.parametrize("reader", SAID)
def test_scores_equal_brute_force(parameters, generator, demo, reader):
    """The whole prompt and everything that can be said behind it, each in a row of its own."""
    asked, geometry = questions(), Geometry.of(MODEL)
    spelled = [generator.tokenizer.encode(text) for text in SAID[reader]]

    @jax.jit
    def logits(batch):
        model = geometry.bind(parameters)
        return jax.nn.log_softmax(model.decoder.logits(model(batch, config_lib.PARTS)))

    truth = []
    for sample, turn in asked:
        encoded = prompts.encode(sample, generator.chat, generator.layout, ask=turn)
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
        values = np.asarray(list(SAID[reader].values()))
        mean = (chances * values).sum() / chances.sum()
        truth.append((mean, np.sqrt((chances * (values - mean) ** 2).sum() / chances.sum())))
    for batch in (4, 3):
        found = list(generator.scores(asked, demo.pixels, reader=reader, batch=batch))
        np.testing.assert_allclose([(score.value, score.spread) for score in found], truth, atol=1e-5)
        assert all(score.parsed and not score.text for score in found)
    assert len({round(mean, 3) for mean, _ in truth}) > 1


def test_the_tree_says_every_decimal_once_and_shares_what_they_begin_with(generator):
    tree = Tree.of(generator.tokenizer, SAID["expectation"])
    longest = max(len(generator.tokenizer.encode(text)) for text in DECIMALS)
    assert len(tree.values) == 91 and tree.values[0] == 1 and tree.values[-1] == 10
    assert tree.steps.sum(1).max() == longest and len(tree.tokens) < 2 * 9 + 2 * longest
    for ids in map(generator.tokenizer.encode, DECIMALS):  # the full stop behind it changes nothing before it
        text = generator.tokenizer.decode(ids)
        assert generator.tokenizer.encode(text + ".")[:len(ids)] == ids


def test_a_prompt_that_does_not_fit_is_refused(generator, demo):
    long = Sample((), (Turn(("word " * 500,), Answer("A.")),))
    with pytest.raises(ConfigError, match="exceed the model's 512 positions"):
        list(generator.answers([(long, 0)], demo.pixels))


@pytest.mark.parametrize(("text", "score"), [
    ("6.5.", 6.5), ("The score is 7.", 7.0), ("10.0.", 10.0), ("I give it 3.25 of 10.", 3.25), ("", None),
    ("none", None), ("42", None), ("0.5", None), ("11.0. or 4.2.", 4.2), ("6..5", 6.0), ("1985", None),
    ("-3.5", None), ("\u22123.5", None), ("6,5", 6.5), ("6,5.", 6.5), ("1,000", None), ("the 3rd: 8.2", 8.2),
    ("f2.8 and f/4, so 7.1", 7.1), ("8/10", 8.0), ("7, 8", 7.0), ("3.4.5", None), ("Score:7.3!", 7.3)])
def test_scores_are_read_from_text(text, score):
    assert read_score(text) == score
