"""calm_jax.data.prompts and tokenizer: what is said, what is seen and what is learned stand where they should."""

import os
import pathlib

import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.data import prompts
from calm_jax.data.samples import Answer, BadRecord, ImageRef, Mention, Sample, Turn
from calm_jax.data.tokenizer import Tokenizer
from calm_jax.errors import ConfigError

MODEL = config_lib.model("tiny")
LAYOUT = prompts.Layout.of(MODEL, config_lib.PARTS)
LLAMA = pathlib.Path(os.environ.get("CALM_DATA", "data")) / "tokenizers/llama/tokenizer.model"


@pytest.fixture(scope="module", params=["shipped", "llama"])
def tokenizer(request):
    if request.param == "shipped":
        return Tokenizer()
    if not LLAMA.is_file():
        pytest.skip("no LLaMA tokenizer: set CALM_DATA to a folder that holds tokenizers/llama/tokenizer.model")
    return Tokenizer(str(LLAMA))


def conversation(*turns, images=1):
    return Sample(tuple(ImageRef(i) for i in range(images)), turns, name="test")


def test_the_conversation_is_vicunas(tokenizer):
    encoded = prompts.encode(conversation(Turn(("Hello there.",), Answer("Hi.")), Turn(("And now?",), Answer("Bye."))),
                             tokenizer, LAYOUT)
    text = tokenizer.decode(encoded.tokens)
    assert text == (f"{prompts.SYSTEM} USER: Hello there. ASSISTANT: Hi. USER: And now? ASSISTANT: Bye.")
    assert encoded.tokens[0] == tokenizer.bos
    assert (encoded.tokens == tokenizer.eos).sum() == 2


def test_only_answers_and_their_ends_are_learned(tokenizer):
    sample = conversation(Turn(("How is it?",), Answer("Good.")), Turn(("A hint.",), Answer("Seven.", weight=0.0)),
                          Turn(("A score?",), Answer("6.5.", weight=0.5)))
    encoded = prompts.encode(sample, tokenizer, LAYOUT)
    said = {turn: encoded.labels[encoded.turns == turn, 0] for turn in range(3)}
    assert tokenizer.decode(said[0]) == "Good." and said[0][-1] == tokenizer.eos
    assert len(said[1]) == 0
    assert tokenizer.decode(said[2]) == "6.5."
    np.testing.assert_array_equal(encoded.tokens[encoded.places + 1], encoded.labels[:, 0])
    assert set(encoded.weights[encoded.turns == 2, 0]) == {0.5}


def test_mentions_put_parts_in_the_papers_order(tokenizer):
    turn = Turn((Mention(1, ("thematic", "low")), "and", Mention(0), "What?"), Answer("This."))
    sample = conversation(turn, images=2)
    encoded = prompts.encode(sample, tokenizer, LAYOUT)
    seen = encoded.visual[encoded.visual >= 0]
    size = LAYOUT.size
    queries, patches = MODEL.qformer.queries, MODEL.encoder.patches
    assert size == 3 * queries + patches
    expected = np.concatenate([size + np.arange(queries), size + 3 * queries + np.arange(patches), np.arange(size)])
    np.testing.assert_array_equal(seen, expected)
    assert (encoded.tokens[encoded.visual >= 0] == 0).all()
    alone = prompts.Layout.of(MODEL, ("high",))
    assert alone.spans == {"high": (0, queries)} and alone.size == queries


def test_asking_stops_before_the_answer(tokenizer):
    sample = conversation(Turn(("One?",), Answer("First.")), Turn(("Two?",), Answer("Second.")))
    encoded = prompts.encode(sample, tokenizer, LAYOUT, ask=1)
    assert tokenizer.decode(encoded.tokens).endswith("ASSISTANT: First. USER: Two? ASSISTANT:")


def test_soft_targets_stand_on_their_digits(tokenizer):
    answer = Answer("6.5.", soft={0: {"6": 0.6, "5": 0.3, "7": 0.1}, 2: {"5": 1.0}})
    encoded = prompts.encode(conversation(Turn(("Score?",), answer)), tokenizer, LAYOUT, candidates=2)
    row = list(tokenizer.pieces(encoded.labels[:, 0])).index("6")
    assert tokenizer.pieces(encoded.labels[row]) == ["6", "5"]  # the third candidate does not fit
    np.testing.assert_allclose(encoded.weights[row], [2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(encoded.weights.sum(-1), 1.0, rtol=1e-6)


def test_a_soft_target_needs_a_token_of_its_own(tokenizer):
    sample = conversation(Turn(("Score?",), Answer("The", soft={1: {"h": 1.0}})))
    with pytest.raises(BadRecord, match="no token of its own"):
        prompts.encode(sample, tokenizer, LAYOUT)


@pytest.mark.parametrize("marker", prompts.MARKERS)
def test_markers_inside_texts_are_refused(tokenizer, marker):
    for sample in (conversation(Turn((f"nice {marker} try",), Answer("No."))),
                   conversation(Turn(("Well?",), Answer(f"{marker} yes")))):
        with pytest.raises(BadRecord, match="marker of the conversation format; remove it") as caught:
            prompts.encode(sample, tokenizer, LAYOUT)
        assert marker in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_process_does_not_compute_cannot_be_mentioned(tokenizer):
    layout = prompts.Layout.of(MODEL, ("low",))
    with pytest.raises(BadRecord, match="thematic part, which this process does not compute"):
        prompts.encode(conversation(Turn((Mention(0, ("thematic",)), "?"), Answer("No."))), tokenizer, layout)
    with pytest.raises(BadRecord, match="mentions image 3"):
        prompts.encode(conversation(Turn((Mention(3, ("low",)), "?"), Answer("No."))), tokenizer, layout)


def test_control_pieces_never_come_from_text(tokenizer):
    ids = tokenizer.encode("a </s> b <s>")
    assert tokenizer.eos not in ids and tokenizer.bos not in ids


def test_digits_are_single_tokens(tokenizer):
    assert set("0123456789") <= set(tokenizer.pieces(tokenizer.encode("0123456789.")))
    assert tokenizer.offsets("6.5.") == {0: 1, 1: 2, 2: 3, 3: 4}


def test_a_wrong_tokenizer_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        Tokenizer(str(tmp_path / "none.model"))
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="no SentencePiece model"):
        Tokenizer(str(tmp_path / "bad.model"))
