"""Prompts as arrays in; the tokens of their answers out: prefill once, then cached decoding, all in one program.

A batch is what `Generator.arrays` makes: images uint8 `[B, I, H, W, 3]`, or their visual tokens as pool
`[B, I * N, D]`; tokens and visual int32 `[B, T]` (left-aligned), lengths int32 `[B]`, and digests uint32 `[B]`, which
tell prompts apart when an answer is drawn. No row depends on the others or on padding. A batch may go on from a
beginning that all its rows share (`remembered`): then its tokens are those behind it, and `before` holds its cache.

Answers (greedy, drawn, or by beam search) are kept in slots behind the T of the prompt: those of beam search are a
tree, in which a token looks at its own ancestors, so that no cache is ever moved from beam to beam.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Bool, Float, Int, UInt32

from calm_jax import config as config_lib
from calm_jax.errors import ConfigError
from calm_jax.models import layers
from calm_jax.models.calm import Calm
from calm_jax.models.decoders import Before, Cache
from calm_jax.models.parameters import Geometry, Parameters

COLDEST = 1e-3  # temperature; below it a token is drawn as 0 takes it, and logits divided by it overflow in the end
UNLIKELY = -1e9  # of a score that must not win; finite, because such scores are compared and divided


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How answers are chosen.

    Attributes:
      temperature: 0 = the most probable token (greedy); else, from .001 to 1,000, logits are divided by it and a token
        is drawn.
      top_p: drawn from the fewest most probable tokens that hold this share of the probability.
      beams: > 1 = beam search as Hugging Face's `generate` does it (no early stopping); needs temperature 0.
      shortest: fewest tokens of an answer: before, it cannot end.
      length_penalty: a beam's log-probability is divided by its length to this power, as Hugging Face does.
      seed: of what is drawn. An answer depends on the seed and on its own prompt, not on its neighbours.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    beams: int = 1
    shortest: int = 0
    length_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if self.temperature:  # logits are divided by it in float32
            config_lib.check_number("temperature", self.temperature, {"at least": COLDEST, "at most": 1 / COLDEST})
        for name, bounds in (("top_p", {"above": 0, "at most": 1}), ("beams", {"at least": 1}),
                             ("shortest", {"at least": 0}), ("seed", {"at least": 0, "at most": 2 ** 32 - 1}),
                             ("length_penalty", {"at least": -100, "at most": 100})):
            config_lib.check_number(name, getattr(self, name), bounds)
        if self.beams > 1 and self.temperature > 0:
            raise ConfigError(f"beams={self.beams} and temperature={self.temperature}: beam search draws "
                              "nothing; leave one of them out")


GREEDY = Sampling()


def prompted(geometry: Geometry, parameters: Parameters, batch: dict[str, Array], *, parts: tuple[str, ...], room: int,
             dtype: Any) -> tuple[Calm, Float[Array, "B 1 D"], Cache]:
    """The model, the hidden state that predicts each row's first token, and the cache with `room` free slots."""
    model = geometry.bind(parameters)
    with layers.rows_over_all(len(batch["tokens"])):
        x = model.embed(batch["tokens"], batch["visual"], model.look(batch, parts, dtype=dtype))
        last, cache = model.decoder.prefill(x, batch["lengths"], room, batch.get("before"))
    return model, layers.by_rows(last), [(layers.by_heads(k), layers.by_heads(v)) for k, v in cache]


def remembered(geometry: Geometry, parameters: Parameters, batch: dict[str, Array], *, parts: tuple[str, ...],
               dtype: Any) -> Before:
    """The beginning of conversations, given as a batch of one row, as `before` of the batches that go on from it."""
    cache = prompted(geometry, parameters, batch, parts=parts, room=0, dtype=dtype)[2]
    return Before(cache, batch["lengths"][0])


def own_prompt(batch: dict[str, Array]) -> tuple[Bool[Array, "B 1 S"], Int[Array, "B"]]:
    """Which of the S slots that `prompted` has filled belong to the prompt of each row, and how long prompts are."""
    lengths = batch["lengths"]
    own = jnp.arange(batch["tokens"].shape[1]) < lengths[:, None]
    if "before" in batch:
        before = batch["before"]
        known = jnp.arange(before.cache[0][0].shape[2]) < before.length
        own = jnp.concatenate([jnp.broadcast_to(known, (len(own), len(known))), own], 1)
        lengths = before.length + lengths
    return own[:, None], lengths


def sample(geometry: Geometry, parameters: Parameters, batch: dict[str, Array], temperature: Float[Array, ""],
           top_p: Float[Array, ""], seed: UInt32[Array, ""], shortest: Int[Array, ""], *, parts: tuple[str, ...],
           limit: int, eos: int, vocab: int, dtype: Any, drawn: bool) -> Int[Array, "B L"]:
    """One token after the other: the most probable, or (`drawn`) one by `choose`.

    Args:
      limit: L, the most tokens of an answer.
      eos: the id that ends an answer.
      vocab: tokens that can be said; a vocabulary may be padded with others.

    Returns:
      Ids, `eos` behind the end of an answer.
    """
    model, last, cache = prompted(geometry, parameters, batch, parts=parts, room=limit, dtype=dtype)
    prompt, lengths = own_prompt(batch)
    rows, _, width = prompt.shape

    def following(hidden, count):
        logits = possible(model.decoder.logits(hidden)[:, 0], count, shortest, eos, vocab)
        if not drawn:
            return logits.argmax(-1).astype(jnp.int32)
        return choose(logits, batch["digests"], count, temperature, top_p, seed)

    def unfinished(carry):
        count, _, _, ended = carry
        return (count < limit) & ~ended.all()

    def extend(carry):
        count, answers, cache, ended = carry
        token = jax.lax.dynamic_slice_in_dim(answers, count - 1, 1, axis=1)
        sees = jnp.concatenate([prompt, jnp.broadcast_to(jnp.arange(limit) < count, (rows, 1, limit))], -1)
        hidden, cache = model.decoder.extend(model.decoder.embed(token, dtype), (lengths + count - 1)[:, None], sees,
                                             cache, width + count - 1)
        token = jnp.where(ended, eos, following(hidden, count))
        answers = jax.lax.dynamic_update_slice_in_dim(answers, token[:, None], count, axis=1)
        return count + 1, answers, cache, ended | (token == eos)

    first = following(last, 0)
    answers = jnp.full((first.shape[0], limit), eos, jnp.int32).at[:, 0].set(first)
    return jax.lax.while_loop(unfinished, extend, (1, answers, cache, first == eos))[1]


def possible(logits: Float[Array, "... V"], count: Int[Array, ""] | int, shortest: Int[Array, ""], eos: int, vocab: int
             ) -> Float[Array, "... V"]:
    """The logits of token number `count`, or log-probabilities, which cannot be the end before the shortest length, nor
    one that nobody can say."""
    logits = sayable(logits, vocab)
    return logits.at[..., eos].set(jnp.where(count < shortest, -jnp.inf, logits[..., eos]))


def sayable(logits: Float[Array, "... V"], vocab: int) -> Float[Array, "... V"]:
    """The logits, or log-probabilities, without tokens from `vocab` on, with which a vocabulary is padded.

    Hugging Face's `generate` knows nothing of the tokenizer and may say one, unless it is told to suppress them, as
    exports tell it. It masks the logits of a token that is taken or drawn, and the log-probabilities of beams; so is
    it done here.
    """
    if logits.shape[-1] == vocab:
        return logits
    return jnp.where(jnp.arange(logits.shape[-1]) < vocab, logits, -jnp.inf)


def choose(logits: Float[Array, "B V"], digests: UInt32[Array, "B"], count: Int[Array, ""] | int,
           temperature: Float[Array, ""] | float, top_p: Float[Array, ""] | float,
           seed: UInt32[Array, ""] | int) -> Int[Array, "B"]:
    """Token number `count` of each answer, drawn from the nucleus of the tempered distribution.

    Chance belongs to a token, not to its rank: where rounding swaps two tokens that are nearly as probable, which other
    devices and batch sizes do, the same one is drawn. Tokens as probable as the last of the nucleus belong to it.
    """
    probable = jax.nn.softmax(logits / temperature)
    ranked = jax.lax.top_k(probable, probable.shape[-1])[0]
    before = jnp.cumsum(ranked, -1) - ranked  # what the more probable tokens hold already
    least = jnp.where(before < top_p, ranked, jnp.inf).min(-1, keepdims=True)
    base = jax.random.key(seed)
    keys = jax.vmap(lambda digest: jax.random.fold_in(jax.random.fold_in(base, digest), count))(digests)
    nucleus = jnp.where(probable >= least, jnp.log(probable), -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, nucleus).astype(jnp.int32)


class Beams(NamedTuple):
    """The state of a beam search with K beams and answers of at most L tokens, of which `count` are chosen.

    Attributes:
      running, scores: `[B, K, L]` and `[B, K]` the answers that go on and their log-probabilities.
      owns: `[B, K, L * K]` the slots behind the prompt that each running answer consists of, its newest token not yet
        among them.
      finished, worth: `[B, K, L]` and `[B, K]` the best answers that have ended, with their penalised scores.
      ended: `[B, K]` which places of `finished` are taken.
      improvable: `[B]` whether a running answer could still displace a finished one.
      full: whether all candidates of the last step ended, so that nothing goes on.
    """

    count: Int[Array, ""]
    running: Int[Array, "B K L"]
    scores: Float[Array, "B K"]
    owns: Bool[Array, "B K G"]
    finished: Int[Array, "B K L"]
    worth: Float[Array, "B K"]
    ended: Bool[Array, "B K"]
    improvable: Bool[Array, "B"]
    full: Bool[Array, ""]


def search(geometry: Geometry, parameters: Parameters, batch: dict[str, Array], length_penalty: Float[Array, ""],
           shortest: Int[Array, ""], *, parts: tuple[str, ...], limit: int, beams: int, eos: int,
           vocab: int, dtype: Any) -> Int[Array, "B L"]:
    """The best answer by beam search, as Hugging Face's `generate(num_beams=K, early_stopping=False)` finds it.

    Returns:
      Ids, `eos` behind the end of an answer.
    """
    model, last, cache = prompted(geometry, parameters, batch, parts=parts, room=limit * beams, dtype=dtype)
    prompt, lengths = own_prompt(batch)
    rows, _, width = prompt.shape
    places = jnp.arange(limit * beams)

    def forward(state: Beams, cache):
        """Log-probabilities `[B, K, V]` of what follows each running answer."""
        newest = jax.lax.dynamic_slice_in_dim(state.running, state.count - 1, 1, axis=2)[:, :, 0]
        own = places == (state.count - 1) * beams + jnp.arange(beams)[:, None]
        owns = state.owns | own
        sees = jnp.concatenate([jnp.broadcast_to(prompt, (rows, beams, width)), owns], -1)
        at = jnp.broadcast_to((lengths + state.count - 1)[:, None], (rows, beams))
        hidden, cache = model.decoder.extend(model.decoder.embed(newest, dtype), at, sees, cache,
                                           width + (state.count - 1) * beams)
        logits = jax.nn.log_softmax(model.decoder.logits(hidden))
        return state._replace(owns=owns), possible(logits, state.count, shortest, eos, vocab), cache

    def step(carry):
        state, logits, cache = forward(*carry)
        return advance(state, logits, length_penalty, eos), cache

    start = Beams(
        jnp.int32(0), jnp.full((rows, beams, limit), eos, jnp.int32),
        jnp.where(jnp.arange(beams) == 0, 0.0, UNLIKELY) + jnp.zeros((rows, 1)),  # else all beams begin alike
        jnp.zeros((rows, beams, limit * beams), bool), jnp.full((rows, beams, limit), eos, jnp.int32),
        jnp.full((rows, beams), UNLIKELY), jnp.zeros((rows, beams), bool), jnp.ones(rows, bool), jnp.bool_(False))
    first = possible(jax.nn.log_softmax(model.decoder.logits(last)), 0, shortest, eos, vocab)
    state = advance(start, jnp.broadcast_to(first, (rows, beams, first.shape[-1])), length_penalty, eos)
    state, _ = jax.lax.while_loop(lambda carry: carry[0].improvable.any() & ~carry[0].full, step, (state, cache))
    return state.finished[:, 0]


def advance(state: Beams, logits: Float[Array, "B K V"], length_penalty: Float[Array, ""] | float, eos: int) -> Beams:
    """The state with one more token: of the 2 K best continuations, K that go on, and those that have ended."""
    beams, limit = state.running.shape[1:]
    vocabulary, count = logits.shape[-1], state.count + 1
    total = rearrange(logits + state.scores[..., None], "b k v -> b (k v)")
    scores, flat = jax.lax.top_k(total, 2 * beams)  # twice as many: at most half of them end here
    answers = _take(state.running, flat // vocabulary)
    tokens = (flat % vocabulary).astype(jnp.int32)
    answers = jax.lax.dynamic_update_slice_in_dim(answers, tokens[..., None], state.count, axis=2)
    ends = (tokens == eos) | (count == limit)
    alive, chosen = jax.lax.top_k(scores + ends * UNLIKELY, beams)
    penalty = count.astype(jnp.float32) ** length_penalty
    worth = scores / penalty + jnp.where(
        ends & (jnp.arange(2 * beams) < beams) & state.improvable[:, None], 0.0, UNLIKELY)
    worth, best = jax.lax.top_k(jnp.concatenate([state.worth, worth], 1), beams)
    counted = ends & (jnp.arange(2 * beams) < beams)
    ended = _take(jnp.concatenate([state.ended, counted], 1), best)
    worst = jnp.where(ended, worth.min(-1, keepdims=True), UNLIKELY)
    return Beams(count, _take(answers, chosen), alive, _take(_take(state.owns, flat // vocabulary), chosen),
                 _take(jnp.concatenate([state.finished, answers], 1), best), worth, ended,
                 state.improvable & (alive[:, :1] / penalty > worst).any(-1), ends.all())


def _take(values: Array, places: Int[Array, "B J"]) -> Array:
    """`values[b, places[b]]` of `[B, K, ...]`."""
    return jax.vmap(lambda row, at: row[at])(values, places)
