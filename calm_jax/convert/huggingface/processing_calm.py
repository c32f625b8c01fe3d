"""Pictures and instructions in, the tensors that CALM takes out; token ids in, text out.

Nothing of transformers' image processors or tokenizers is used: their resizing and their treatment of special pieces
have changed over its versions, and a picture should keep its score.
"""

import inspect
import json
import os
import re
import shutil

import numpy as np
import tokenizers
import torch
from transformers import BatchFeature
from transformers.utils import PushToHubMixin, cached_file

from .pictures import square

try:
    import sentencepiece
except ImportError:  # of use for a tokenizer.model alone
    sentencepiece = None

CONFIG = "processor_config.json"
PARTS = ("low", "middle", "high", "thematic")  # the order of their tokens
SLOT = object()  # where the tokens of a picture stand among the pieces of a message
_HUB = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")


class SentencePiece:
    """A tokenizer.model: LLaMA's, Vicuna's. A word boundary stands before each stretch of text."""

    def __init__(self, content):
        if sentencepiece is None:
            raise ImportError("the tokenizer of this model is one of SentencePiece; install it: pip install "
                              "sentencepiece")
        self._model = sentencepiece.SentencePieceProcessor(model_proto=content)

    def encode(self, text):
        return self._model.encode(text)

    def decode(self, ids, skip_special_tokens):
        if skip_special_tokens:
            return self._model.decode(ids)
        return "".join(self._model.id_to_piece(token) for token in ids).replace("\u2581", " ")


class Tokenizers:
    """A tokenizer.json of the library `tokenizers`: SmolLM2's, Llama 3's, Qwen's. The name of a special token inside a
    text is text."""

    def __init__(self, content):
        self._model = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = True

    def encode(self, text):
        return self._model.encode(text, add_special_tokens=False).ids

    def decode(self, ids, skip_special_tokens):
        return self._model.decode(ids, skip_special_tokens=skip_special_tokens)


KINDS = {"tokenizer.model": SentencePiece, "tokenizer.json": Tokenizers}


class CalmProcessor(PushToHubMixin):
    """Args:
        vocabulary: content of the tokenizer's file.
        tokenizer: name of that file: `tokenizer.model` or `tokenizer.json`.
        chat: how a conversation is written: `template`, its name; `begin`, `user`, `assistant` and `end`, token ids of
            what stands before the first message, before a prompt, between a prompt and its answer, and after an answer,
            where the first of `end` is what stops one; `bos`, the id that begins a text, or None; `pad`, that of
            padding; `markers`, what no text may contain.
        image_size: side of the square that the encoder sees, pixels.
        tokens: part -> visual tokens of an image.
        instructions: task -> the words that ask for it: `score`, `level`, `comment`.
        mean, std: of the encoder's training pictures, RGB in 0..1.
        padding: RGB 0..255 of what surrounds a picture that is no square.
    """

    def __init__(self, vocabulary, tokenizer, chat, image_size, tokens, instructions, mean, std, padding, **extra):
        self._vocabulary, self.tokenizer, self.chat = vocabulary, tokenizer, chat
        self._words = KINDS[tokenizer](vocabulary)
        self.image_size, self.tokens, self.instructions = image_size, dict(tokens), instructions
        self.mean, self.std, self.padding, self._extra = mean, std, tuple(padding), extra
        self.bos_token_id, self.eos_token_id, self.pad_token_id = chat["bos"], chat["end"][0], chat["pad"]
        self._spans, self._size = {}, 0
        for part in PARTS:
            self._spans[part] = range(self._size, self._size + self.tokens[part])
            self._size += self.tokens[part]

    @classmethod
    def from_pretrained(cls, name, trust_remote_code=None, **kwargs):
        hub = {key: kwargs[key] for key in _HUB if kwargs.get(key) is not None}
        with open(cached_file(name, CONFIG, **hub), encoding="utf-8") as stream:
            config = json.load(stream)
        with open(cached_file(name, config["tokenizer"], **hub), "rb") as stream:
            return cls(stream.read(), **config)

    def save_pretrained(self, folder, push_to_hub=False, **kwargs):
        os.makedirs(folder, exist_ok=True)
        config = {"tokenizer": self.tokenizer, "chat": self.chat, "image_size": self.image_size, "tokens": self.tokens,
                  "instructions": self.instructions, "mean": self.mean, "std": self.std, "padding": self.padding,
                  **self._extra}
        with open(os.path.join(folder, CONFIG), "w", encoding="utf-8") as stream:
            json.dump(config, stream, indent=2)
        with open(os.path.join(folder, self.tokenizer), "wb") as stream:
            stream.write(self._vocabulary)
        for source in (__file__, inspect.getfile(square)):
            target = os.path.join(folder, os.path.basename(source))
            if not os.path.exists(target):
                shutil.copyfile(source, target)
        if push_to_hub:
            self.push_to_hub(kwargs.pop("repo_id", os.path.basename(os.path.normpath(folder))), **kwargs)
        return [os.path.join(folder, CONFIG), os.path.join(folder, self.tokenizer)]

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoProcessor"):
        """AutoProcessor calls this; the exported files name their classes already."""
        cls._auto_class = auto_class

    def __call__(self, images=None, text=None, parts=PARTS, return_tensors="pt"):
        """Args:
            images: one picture (path, bytes, PIL image or RGB array `[H, W, 3]` uint8), a list with one for each
                conversation, or a list of lists.
            text: an instruction, a conversation (messages with role and content as in chat templates), or a list of
                either. `<image>` says where a picture's tokens stand; without it they come first.
            parts: which tokens of a picture are used, among low, middle, high and thematic.
        Returns:
            input_ids, attention_mask, visual `[B, T]` int64 (padded on the left, ready for `generate`), and, if there
            are pictures, pixel_values `[B, I, 3, S, S]` float32.
        Raises:
            ValueError: a picture cannot be read, text and pictures do not fit together, or the messages of a
                conversation are not by turns the user's and the assistant's.
        """
        if return_tensors not in ("pt", None):
            raise ValueError(f"return_tensors={return_tensors!r} is not supported; CALM takes torch tensors ('pt')")
        texts = [text] if _is_one(text) else list(text)
        rows = _rows(images, len(texts))
        encoded = [self._encode(content, len(row), parts) for content, row in zip(texts, rows, strict=True)]
        length = max(len(ids) for ids, _ in encoded)
        shape = (len(encoded), length)
        out = {"input_ids": torch.full(shape, self.pad_token_id), "visual": torch.full(shape, -1),
               "attention_mask": torch.zeros(shape, dtype=torch.int64)}
        for row, (ids, visual) in enumerate(encoded):
            out["input_ids"][row, length - len(ids):] = torch.tensor(ids)
            out["visual"][row, length - len(ids):] = torch.tensor(visual)
            out["attention_mask"][row, length - len(ids):] = 1
        slots = max(map(len, rows))
        if slots:
            side = self.image_size
            pixels = torch.zeros(len(rows), slots, 3, side, side)
            for row, pictures in enumerate(rows):
                for slot, picture in enumerate(pictures):
                    pixels[row, slot] = self._pixels(picture)
            out["pixel_values"] = pixels
        return BatchFeature(data=out)

    def decode(self, ids, skip_special_tokens=True):
        ids = [int(token) for token in ids]
        if skip_special_tokens:
            special = (self.bos_token_id, self.eos_token_id, self.pad_token_id)
            ids = [token for token in ids if token not in special]
        return self._words.decode(ids, skip_special_tokens)

    def batch_decode(self, rows, skip_special_tokens=True):
        return [self.decode(row, skip_special_tokens) for row in rows]

    def encode_words(self, text):
        """Ids of a stretch of text by itself, without special tokens."""
        return self._words.encode(text)

    def _pixels(self, picture):
        values = square(picture, self.image_size, self.padding).astype(np.float32) / np.float32(255)
        values = (values - np.asarray(self.mean, np.float32)) / np.asarray(self.std, np.float32)
        return torch.from_numpy(np.ascontiguousarray(values.transpose(2, 0, 1)))

    def _encode(self, text, pictures, parts):
        """Ids and visual indices of one conversation. Every stretch of text is encoded by itself and the ids are
        joined, so that a marker inside somebody's text could never act as one."""
        unknown = [part for part in parts if part not in PARTS]
        if unknown:
            raise ValueError(f"there is no part {unknown[0]!r} of a picture; the parts are {', '.join(PARTS)}")
        messages = [{"role": "user", "content": text}] if isinstance(text, str) else text
        ids, visual, used = [], [], 0

        def write(tokens, slots=None):
            ids.extend(tokens)
            visual.extend([-1] * len(tokens) if slots is None else slots)

        explicit = any(piece is SLOT for message in messages for piece in _pieces(message))
        write(self.chat["begin"])
        for number, message in enumerate(messages):
            role, pieces = message["role"], _pieces(message)
            if role not in ("user", "assistant"):
                raise ValueError(f"a message has the role {role!r}; the roles are user and assistant")
            if role != ("user", "assistant")[number % 2]:
                raise ValueError(f"message {number + 1} is of the role {role}; a conversation begins with the user, "
                                 "and the assistant answers each message")
            if role == "assistant":
                write(self.chat["assistant"])
                if SLOT in pieces:
                    raise ValueError(f"message {number + 1}, an answer, has an <image>; only the user shows pictures")
                for piece in pieces:
                    write(self.encode_words(self._checked(piece)))
                write(self.chat["end"])
                continue
            write(self.chat["user"])
            if number == 0 and not explicit:
                pieces = [SLOT] * pictures + [f" {piece}" if pictures else piece for piece in pieces]
            for piece in pieces:
                if piece is SLOT:
                    slots = [used * self._size + n for part in PARTS if part in parts for n in self._spans[part]]
                    write([0] * len(slots), slots)
                    used += 1
                else:
                    write(self.encode_words(self._checked(piece)))
        if messages[-1]["role"] != "assistant":
            write(self.chat["assistant"])
        if used != pictures:
            raise ValueError(f"the text has {used} <image> and there are {pictures} pictures; give one for each")
        return ids, visual

    def _checked(self, text):
        for marker in self.chat["markers"]:
            if marker in text:
                raise ValueError(f"the text contains {marker!r}, a marker of the conversation format; write it "
                                 f"otherwise: {text[:80]!r}")
        return text


def _is_one(text):
    """Whether it is one instruction or one conversation, not a list of them."""
    return isinstance(text, str) or (bool(text) and isinstance(text[0], dict))


def _rows(images, count):
    """The pictures of each of `count` conversations."""
    if images is None:
        return [[] for _ in range(count)]
    if not isinstance(images, (list, tuple)):
        images = [images]
    if count == 1 and not (images and isinstance(images[0], (list, tuple))):
        return [list(images)]
    if len(images) != count:
        raise ValueError(f"there are {count} texts and pictures for {len(images)}; give a list of lists, one for each "
                         "text")
    return [list(row) if isinstance(row, (list, tuple)) else [row] for row in images]


def _pieces(message):
    """Text and SLOT in the order of a message's content."""
    content = message["content"]
    if isinstance(content, str):
        return [SLOT if piece == "<image>" else piece for piece in re.split("(<image>)", content) if piece]
    return [SLOT if entry["type"] == "image" else entry["text"] for entry in content]
