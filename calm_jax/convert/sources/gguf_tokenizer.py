"""The tokenizer inside a GGUF file (SmolLM2's, Llama's, Qwen's, TinyLlama's) as the contents of a tokenizer.json.

A GGUF file has the vocabulary, the merges or scores and the names of special tokens. How text is split into words
before that is a name alone (`tokenizer.ggml.pre`); what it stands for is in llama.cpp and in the tokenizer.json of the
published model. Where these two differ the tokenizer.json counts, for with it the model was trained: Qwen's normalises
to NFC, which llama.cpp leaves out; SmolLM2's makes every digit a word of its own. transformers ignores the name and
splits SmolLM2's text as GPT-2 does: ids differ at some numerals beyond 0 to 9, as in " ½". A name that is not known is
refused.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from calm_jax.convert.sources import gguf_header

# Types of a token. Merges lead to the others alone.
UNKNOWN, CONTROL, USER_DEFINED, BYTE = 2, 3, 4, 6
SPACE = "▁"  # SentencePiece's
LARGEST = 1 << 22  # tokens; published models have a quarter of a million


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
        {**BYTES, "use_regex": False}]}


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
DIGITS = {"type": "Sequence", "pretokenizers": [{"type": "Digits", "individual_digits": True}, BYTES]}
# What a word is for Llama 3 and for Qwen, which differ in how many digits one has.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
LLAMA3 = {"pre_tokenizer": _split(WORDS.format(digits=r"\p{N}{1,3}")), "ignore_merges": True}
# tokenizer.ggml.pre -> what the tokenizer.json of such models has besides vocabulary and merges.
SPLITS: dict[str, dict[str, Any]] = {
    "gpt-2": {"pre_tokenizer": BYTES},
    "smollm": {"pre_tokenizer": DIGITS},
    "starcoder": {"pre_tokenizer": DIGITS},
    "llama-bpe": LLAMA3, "llama3": LLAMA3, "llama-v3": LLAMA3,
    "qwen2": {"pre_tokenizer": _split(WORDS.format(digits=r"\p{N}")), "normalizer": {"type": "NFC"}}}


def contents_of(header: gguf_header.Header) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of the tokenizer.json and the tokenizer_config.json that say what a GGUF file does.

    Raises:
      FileError: the file has no tokenizer, or one of a kind that is not known.
    """
    found = header.metadata
    kind, tokens = found.text("tokenizer.ggml.model"), header.texts("tokenizer.ggml.tokens")
    if not 0 < len(tokens) <= LARGEST:
        raise found.refuse(f"tokenizer.ggml.tokens has {len(tokens):,} entries")
    vocab = {token: number for number, token in enumerate(tokens)}
    if len(vocab) < len(tokens):
        twice = next(token for number, token in enumerate(tokens) if vocab[token] != number)
        raise found.refuse(f"the token {twice[:80]!r} occurs twice in tokenizer.ggml.tokens")
    types = header.numbers("tokenizer.ggml.token_type", len(tokens))
    if types is None:
        raise found.refuse("there is no tokenizer.ggml.token_type, so that nothing says which tokens are special")
    named = {name: _token(header, tokens, f"tokenizer.ggml.{key}_token_id", usual if kind == "llama" else None)
             for name, key, usual in (("bos_token", "bos", 1), ("eos_token", "eos", 2), ("unk_token", "unknown", 0),
                                      ("pad_token", "padding", None))}
    if kind == "gpt2":
        content, begins = _bytes(header, vocab)
    elif kind == "llama":
        content, begins = _sentence_piece(header, vocab, types, named["unk_token"])
    else:
        raise found.refuse(f"its tokenizer is of the kind {kind[:80]!r}, and gpt2 (byte-level BPE) and llama "
                           "(SentencePiece's BPE) are read; give the Hugging Face folder of the same model")
    special = {token for token in named.values() if token is not None}
    added = [{"id": number, "content": token, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False, "special": bool(types[number] != USER_DEFINED or token in special)}
             for number, token in enumerate(tokens)
             if types[number] in (UNKNOWN, CONTROL, USER_DEFINED) or token in special]
    around = [(named[f"{name}_token"], found.flag(f"tokenizer.ggml.add_{name}_token", usual))
              for name, usual in (("bos", begins), ("eos", False))]
    before, after = ([token] if token is not None and wanted else [] for token, wanted in around)
    content = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added,
               "normalizer": content["normalizer"], "pre_tokenizer": content["pre_tokenizer"],
               "post_processor": _around(before, after, vocab), "decoder": content["decoder"],
               "model": content["model"]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **named, "add_bos_token": bool(before),
              "add_eos_token": bool(after), "clean_up_tokenization_spaces": False}
    if "tokenizer.chat_template" in found:
        config["chat_template"] = found.text("tokenizer.chat_template")
    return content, config


def _token(header: gguf_header.Header, tokens: list[str], name: str, usual: int | None) -> str | None:
    """The token of an id in the metadata; None where there is none."""
    number = header.metadata.whole(name, usual, least=0, most=len(tokens) - 1)
    return None if number is None or number >= len(tokens) else tokens[number]


def _model(**values: Any) -> dict[str, Any]:
    return {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False, **values}


def _bytes(header: gguf_header.Header, vocab: dict[str, int]) -> tuple[dict[str, Any], bool]:
    """Byte-level BPE, and whether a text begins with the token of the beginning where the file does not say so."""
    found = header.metadata
    name = found.text("tokenizer.ggml.pre")
    if name not in SPLITS:
        raise found.refuse(f"tokenizer.ggml.pre is {name[:80]!r}, and how that splits text is known of "
                           f"{', '.join(SPLITS)} alone; give the Hugging Face folder of the same model")
    split = SPLITS[name]
    return {"normalizer": split.get("normalizer"), "pre_tokenizer": split["pre_tokenizer"],
            "decoder": {**BYTES, "add_prefix_space": True},
            "model": _model(ignore_merges=split.get("ignore_merges", False), vocab=vocab,
                            merges=_merges(header, vocab))}, name in ("llama-bpe", "llama3", "llama-v3")


def _merges(header: gguf_header.Header, vocab: dict[str, int]) -> list[list[str]]:
    merges = []
    for merge in header.texts("tokenizer.ggml.merges"):
        pair = merge.split(" ")
        if len(pair) != 2 or pair[0] not in vocab or pair[1] not in vocab or pair[0] + pair[1] not in vocab:
            raise header.metadata.refuse(f"the merge {merge[:80]!r} is not of two tokens that make a third")
        merges.append(pair)
    return merges


def _sentence_piece(header: gguf_header.Header, vocab: dict[str, int], types: np.ndarray, unknown: str | None
                    ) -> tuple[dict[str, Any], bool]:
    """SentencePiece's BPE, in which the best pair is that of the token with the highest score; a text begins with the
    token of the beginning where the file does not say otherwise."""
    found = header.metadata
    for name in ("precompiled_charsmap", "remove_extra_whitespaces"):
        value = found.values.get(f"tokenizer.ggml.{name}", False)
        if value is not False:
            raise found.refuse(f"tokenizer.ggml.{name} changes texts before they are split, which is not done here; "
                               "give the Hugging Face folder of the same model")
    prefix = found.flag("tokenizer.ggml.add_space_prefix", True)
    if "tokenizer.ggml.merges" in found:
        merges = _merges(header, vocab)
    else:
        scores = header.numbers("tokenizer.ggml.scores", len(vocab))
        if scores is None:
            raise found.refuse("there are neither tokenizer.ggml.scores nor tokenizer.ggml.merges")
        merges = _of_scores(vocab, scores, types)
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    bytewise = bool((types == BYTE).any())
    decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                *([{"type": "ByteFallback"}] if bytewise else []), {"type": "Fuse"},
                *([{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else [])]
    return {"normalizer": {"type": "Sequence", "normalizers": [
                *([{"type": "Prepend", "prepend": SPACE}] if prefix else []), spaces]},
            "pre_tokenizer": None, "decoder": {"type": "Sequence", "decoders": decoders},
            "model": _model(unk_token=unknown, fuse_unk=True, byte_fallback=bytewise, vocab=vocab, merges=merges)}, True


def _of_scores(vocab: dict[str, int], scores: np.ndarray, types: np.ndarray) -> list[list[str]]:
    """Every pair of tokens that makes a third, best first; those of one token in the order of their ids."""
    usable = ~np.isin(types, (UNKNOWN, CONTROL, BYTE))
    pairs = []
    for token, number in vocab.items():
        if not usable[number]:
            continue
        for cut in range(1, len(token)):
            left, right = vocab.get(token[:cut], -1), vocab.get(token[cut:], -1)
            if left >= 0 and right >= 0 and usable[left] and usable[right]:
                pairs.append((-float(scores[number]), number, left, right))
    tokens = list(vocab)
    return [[tokens[left], tokens[right]] for *_, left, right in sorted(pairs)]


def _around(before: list[str], after: list[str], vocab: dict[str, int]) -> dict[str, Any] | None:
    """What stands around a whole text, in transformers; CALM joins segments itself."""
    if not before and not after:
        return None

    def text(name: str, number: int) -> list[dict[str, Any]]:
        return [*({"SpecialToken": {"id": token, "type_id": number}} for token in before),
                {"Sequence": {"id": name, "type_id": number}},
                *({"SpecialToken": {"id": token, "type_id": number}} for token in after)]

    return {"type": "TemplateProcessing", "single": text("A", 0), "pair": [*text("A", 0), *text("B", 1)],
            "special_tokens": {token: {"id": token, "ids": [vocab[token]], "tokens": [token]}
                               for token in (*before, *after)}}

