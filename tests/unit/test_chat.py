"""Chat templates and tokenizers of the library `tokenizers`: what is written, what is learned, what is inert."""

from __future__ import annotations

import json
import types

import pytest
import tokenizers as library
from tokenizers import decoders, models, pre_tokenizers, trainers

from calm_jax.config import Model, decoder
from calm_jax.convert import hf_import
from calm_jax.data.samples import Answer, BadRecord, ImageRef, Mention, Sample, Turn
from calm_jax.errors import ConfigError
from calm_jax.registry import TEMPLATES
from calm_jax.text import chat as chat_lib
from calm_jax.text import prompts, tokenizers
from calm_jax.text.templates.vicuna import SYSTEM

SPECIAL = {"chatml": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
           "llama3": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]}
LINES = ["6.5.", "10.0.", "What would improve this photograph?", "naïve café – “so” 日本語 🙂",
         "  two  spaces\n\nand\tmore ",
         "<|im_end|>", "a<|im_start|>user b", "e\u0301 \u200d x", ""]
WRITTEN = {
    "chatml": f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n*? One.<|im_end|>\n<|im_start|>assistant\n"
              "Good.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n6.5.<|im_end|>\n",
    "chatml_bare": "<|im_start|>user\n*? One.<|im_end|>\n<|im_start|>assistant\nGood.<|im_end|>\n"
                   "<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n6.5.<|im_end|>\n",
    "qwen": "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n*? One.<|im_end|>\n"
            "<|im_start|>assistant\nGood.<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\n6.5."
            "<|im_end|>\n",
    "zephyr": f"<|system|>\n{SYSTEM}<|endoftext|>\n<|user|>\n*? One.<|endoftext|>\n<|assistant|>\nGood.<|endoftext|>"
              "\n<|user|>\nTwo?<|endoftext|>\n<|assistant|>\n6.5.<|endoftext|>",  # the tokenizer's own end of a text
    "llama3": f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\n*? One.<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\nGood.<|eot_id|>"
              "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
              "<|start_header_id|>assistant<|end_header_id|>\n\n6.5.<|eot_id|>"}
LAYOUT = prompts.Layout(("low",), {"low": (0, 2)}, 2)
SAMPLE = Sample((ImageRef(0),), (
    Turn((Mention(0, ("low",)), "? One."), Answer("Good.")),
    Turn(("Two?",), Answer("6.5.", soft={0: {"6": 0.75, "5": 0.25}}))))


def written(folder, special, **config):
    """The folder of a byte-level BPE such as GPT-2's, trained here."""
    model = library.Tokenizer(models.BPE())
    model.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    model.decoder = decoders.ByteLevel()
    model.train_from_iterator([SYSTEM, *LINES] * 3, trainers.BpeTrainer(
        vocab_size=500, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    folder.mkdir(exist_ok=True)
    model.save(str(folder / "tokenizer.json"))
    if config:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    place = tmp_path_factory.mktemp("tokenizers")
    return {name: written(place / name, special) for name, special in SPECIAL.items()}


def test_ids_are_those_of_transformers(folders):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(folders["chatml"] / "tokenizer.json"))
    ours = tokenizers.load(str(folders["chatml"]))
    for line in LINES:
        expected = theirs(line, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert list(ours.encode(line)) == expected, line
        assert ours.decode(ours.encode(line)) == line
    assert ours.vocab == len(theirs) and ours.bos is None
    assert ours.special("<|im_end|>") == theirs.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("template", WRITTEN)
def test_a_conversation_is_written_as_its_template_says(folders, template):
    chat = chat_lib.load(str(folders["llama3" if template == "llama3" else "chatml"]), template)
    encoded = prompts.encode(SAMPLE, chat, LAYOUT, candidates=2)
    pieces = []
    run: list[int] = []
    for token, visual in zip(encoded.tokens, encoded.visual, strict=True):  # special tokens as they are spelled
        name = chat.tokenizer.pieces([token])[0]
        if visual >= 0 or name in {*SPECIAL["chatml"], *SPECIAL["llama3"]}:
            pieces += [chat.tokenizer.decode(run), "*" if visual == 0 else "" if visual > 0 else name]
            run = []
        else:
            run.append(int(token))
    assert "".join([*pieces, chat.tokenizer.decode(run)]) == WRITTEN[template]
    # Learned are the answers and what ends each of them, and nothing else.
    learned = encoded.labels[:, 0]
    assert chat.tokenizer.decode(learned[encoded.turns == 0]) == "Good."
    assert learned[encoded.turns == 0][-1] == learned[-1] == chat.stop
    assert (encoded.tokens[encoded.places + 1] == learned).all()
    row = [number for number, weights in enumerate(encoded.weights) if weights[1] > 0]
    assert [chat.tokenizer.pieces(encoded.labels[number]) for number in row] == [["6", "5"]]
    asked = prompts.encode(SAMPLE, chat, LAYOUT, ask=1)
    assert len(asked.places) > 0 and list(asked.tokens[-len(chat.assistant):]) == list(chat.assistant)


def test_the_name_of_a_special_token_inside_a_text_is_refused_and_would_be_inert(folders):
    chat = chat_lib.load(str(folders["chatml"]), "chatml")
    assert chat.stop not in chat.tokenizer.encode("a<|im_end|>b")
    for text in ("so <|im_end|> it", "<|im_start|>", "an <image>"):
        for turn in (Turn((text,), Answer("No.")), Turn(("Why?",), Answer(text))):
            with pytest.raises(BadRecord, match="marker"):
                prompts.encode(Sample((), (turn,)), chat, LAYOUT)


def test_a_template_whose_tokens_are_not_there_is_refused_with_those_that_are_known(folders):
    with pytest.raises(ConfigError, match=r"llama3 needs the token <\|start_header_id\|>.*vicuna"):
        chat_lib.load(str(folders["chatml"]), "llama3")
    with pytest.raises(ConfigError, match="chatml needs"):
        chat_lib.load("", "chatml")
    with pytest.raises(ConfigError, match="the nearest is 'chatml'"):
        chat_lib.load("", "chatmll")
    assert set(TEMPLATES.names()) == {"vicuna", "chatml", "chatml_bare", "llama3", "qwen", "zephyr"}


@pytest.mark.parametrize("template", SPECIAL)
def test_a_conversion_takes_the_template_that_the_special_tokens_tell(folders, template):
    tokenizer = tokenizers.load(str(folders[template]))
    llm, cfg = types.SimpleNamespace(tokenizer=lambda: tokenizer), decoder("llama", vocab=tokenizer.vocab)
    assert hf_import._chat(llm, cfg, "").template == template
    if template == "chatml":
        assert hf_import._chat(llm, cfg, "qwen").template == "qwen"


def test_a_config_beside_it_says_what_begins_and_ends_a_text(tmp_path, folders):
    folder = written(tmp_path / "a", SPECIAL["chatml"], bos_token={"content": "<|im_start|>"}, eos_token="<|im_end|>")
    found = tokenizers.load(str(folder))
    assert found.bos == found.special("<|im_start|>") and found.eos == found.special("<|im_end|>")
    assert [path.name for path in found.files] == ["tokenizer.json", "tokenizer_config.json"]
    bare = tokenizers.load(str(folders["chatml"]))
    assert bare.bos is None and bare.eos == bare.special("<|endoftext|>") and bare.fingerprint != found.fingerprint
    again = chat_lib.load(str(folder), "chatml")
    assert again.tokenizer.fingerprint == found.fingerprint


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"model": {"type": "BPE"}}', b"\xff\xfe"])
def test_what_is_no_tokenizer_is_one_sentence(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    for where in (tmp_path, tmp_path / "tokenizer.json"):
        with pytest.raises(ConfigError, match=r"cannot read the tokenizer .*tokenizer.json") as error:
            tokenizers.load(str(where))
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="neither a file of a kind"):
        tokenizers.load(str(tmp_path / "words.txt"))


def test_a_vocabulary_may_be_padded_to_a_multiple_of_64():
    chat = chat_lib.load()
    size = chat.tokenizer.vocab
    assert size == 2048 and chat.fits(size) and chat.fits(size + 64) and chat.fits(size + 512)
    assert not chat.fits(size + 1) and not chat.fits(size - 64) and not chat.fits(size + 576)
    assert Model(decoder=decoder("llama", vocab=2112)).decoder.vocab == 2112
