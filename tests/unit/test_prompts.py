"""calm_jax.data.prompts and chat: what is said, what is seen and what is learned stand where they should."""

import os
import pathlib

import numpy as np
import pytest

from calm_jax import config as config_lib
from calm_jax.data.samples import Answer, BadRecord, ImageRef, Mention, Sample, Turn
from calm_jax.errors import ConfigError
from calm_jax.text import chat as chat_lib
from calm_jax.text import prompts
from calm_jax.text.templates import vicuna

MODEL = config_lib.model("tiny")
LAYOUT = prompts.Layout.of(MODEL, config_lib.PARTS)
LLAMA = pathlib.Path(os.environ.get("CALM_DATA", "data")) / "tokenizers/llama/tokenizer.model"


@pytest.fixture(scope="module", params=["shipped", "llama"])
def chat(request):
    if request.param == "shipped":
        return chat_lib.load()
    if not LLAMA.is_file():
        pytest.skip("no LLaMA chat: set CALM_DATA to a folder that holds tokenizers/llama/tokenizer.model")
    return chat_lib.load(str(LLAMA))


def conversation(*turns, images=1):
    return Sample(tuple(ImageRef(i) for i in range(images)), turns, name="test")


def test_the_conversation_is_vicunas(chat):
    encoded = prompts.encode(conversation(Turn(("Hello there.",), Answer("Hi.")), Turn(("And now?",), Answer("Bye."))),
                             chat, LAYOUT)
    text = chat.tokenizer.decode(encoded.tokens)
    assert text == (f"{vicuna.SYSTEM} USER: Hello there. ASSISTANT: Hi. USER: And now? ASSISTANT: Bye.")
    assert encoded.tokens[0] == chat.tokenizer.bos
    assert (encoded.tokens == chat.stop).sum() == 2


def test_only_answers_and_their_ends_are_learned(chat):
    sample = conversation(Turn(("How is it?",), Answer("Good.")), Turn(("A hint.",), Answer("Seven.", weight=0.0)),
                          Turn(("A score?",), Answer("6.5.", weight=0.5)))
    encoded = prompts.encode(sample, chat, LAYOUT)
    said = {turn: encoded.labels[encoded.turns == turn, 0] for turn in range(3)}
    assert chat.tokenizer.decode(said[0]) == "Good." and said[0][-1] == chat.stop
    assert len(said[1]) == 0
    assert chat.tokenizer.decode(said[2]) == "6.5."
    np.testing.assert_array_equal(encoded.tokens[encoded.places + 1], encoded.labels[:, 0])
    assert set(encoded.weights[encoded.turns == 2, 0]) == {0.5}


def test_mentions_put_parts_in_the_papers_order(chat):
    turn = Turn((Mention(1, ("thematic", "low")), "and", Mention(0), "What?"), Answer("This."))
    sample = conversation(turn, images=2)
    encoded = prompts.encode(sample, chat, LAYOUT)
    seen = encoded.visual[encoded.visual >= 0]
    size = LAYOUT.size
    queries, patches = MODEL.qformer.queries, MODEL.encoder.patches
    assert size == 3 * queries + patches
    expected = np.concatenate([size + np.arange(queries), size + 3 * queries + np.arange(patches), np.arange(size)])
    np.testing.assert_array_equal(seen, expected)
    assert (encoded.tokens[encoded.visual >= 0] == 0).all()
    alone = prompts.Layout.of(MODEL, ("high",))
    assert alone.spans == {"high": (0, queries)} and alone.size == queries


def test_asking_stops_before_the_answer(chat):
    sample = conversation(Turn(("One?",), Answer("First.")), Turn(("Two?",), Answer("Second.")))
    encoded = prompts.encode(sample, chat, LAYOUT, ask=1)
    assert chat.tokenizer.decode(encoded.tokens).endswith("ASSISTANT: First. USER: Two? ASSISTANT:")


def test_soft_targets_stand_on_their_digits(chat):
    answer = Answer("6.5.", soft={0: {"6": 0.6, "5": 0.3, "7": 0.1}, 2: {"5": 1.0}})
    encoded = prompts.encode(conversation(Turn(("Score?",), answer)), chat, LAYOUT, candidates=2)
    row = list(chat.tokenizer.pieces(encoded.labels[:, 0])).index("6")
    assert chat.tokenizer.pieces(encoded.labels[row]) == ["6", "5"]  # the third candidate does not fit
    np.testing.assert_allclose(encoded.weights[row], [2 / 3, 1 / 3], rtol=1e-6)
    np.testing.assert_allclose(encoded.weights.sum(-1), 1.0, rtol=1e-6)


def test_a_soft_target_needs_a_token_of_its_own(chat):
    sample = conversation(Turn(("Score?",), Answer("The", soft={1: {"h": 1.0}})))
    with pytest.raises(BadRecord, match="no token of its own"):
        prompts.encode(sample, chat, LAYOUT)


@pytest.mark.parametrize("marker", chat_lib.load().markers)
def test_markers_inside_texts_are_refused(chat, marker):
    for sample in (conversation(Turn((f"nice {marker} try",), Answer("No."))),
                   conversation(Turn(("Well?",), Answer(f"{marker} yes")))):
        with pytest.raises(BadRecord, match="marker of the conversation format; remove it") as caught:
            prompts.encode(sample, chat, LAYOUT)
        assert marker in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_process_does_not_compute_cannot_be_mentioned(chat):
    layout = prompts.Layout.of(MODEL, ("low",))
    with pytest.raises(BadRecord, match="thematic part, which this process does not compute"):
        prompts.encode(conversation(Turn((Mention(0, ("thematic",)), "?"), Answer("No."))), chat, layout)
    with pytest.raises(BadRecord, match="mentions image 3"):
        prompts.encode(conversation(Turn((Mention(3, ("low",)), "?"), Answer("No."))), chat, layout)


def test_control_pieces_never_come_from_text(chat):
    ids = chat.tokenizer.encode("a </s> b <s>")
    assert chat.stop not in ids and chat.tokenizer.bos not in ids


def test_digits_are_single_tokens(chat):
    assert set("0123456789") <= set(chat.tokenizer.pieces(chat.tokenizer.encode("0123456789.")))
    assert chat.tokenizer.offsets("6.5.") == {0: 1, 1: 2, 2: 3, 3: 4}


def test_a_wrong_tokenizer_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match="there is no such file"):
        chat_lib.load(str(tmp_path / "none.model"))
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(ConfigError, match="no SentencePiece model"):
        chat_lib.load(str(tmp_path / "bad.model"))
