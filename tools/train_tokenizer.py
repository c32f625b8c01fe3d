"""The project's own texts in, the small SentencePiece model that ships for `tiny` and `small` out.

    python -m tools.train_tokenizer [--out FILE] [--vocab 2048]

Ours: byte-pair encoding with byte fallback and split digits, as LLaMA's, trained on what the small models have to say:
the conversation template, the phrases of every attribute, the instructions, the demo's texts, and a page of words
about photographs (tools/tokenizer_corpus.txt, written for this purpose).
"""

from __future__ import annotations

import io
import pathlib

import numpy as np
import sentencepiece
from absl import flags

from calm_jax import command, files
from calm_jax import config as config_lib
from calm_jax.data import builders, prompts, tasks, tokenizer
from calm_jax.data.tasks.context import Context

_OUT = flags.DEFINE_string("out", str(tokenizer.SHIPPED), "where to write the model")
_VOCAB = flags.DEFINE_integer("vocab", 2048, "pieces, the three control pieces and 256 bytes included", lower_bound=260)
DEMO_TASKS = ("attributes", "comparisons", "caption", "comment", "score")
DRAWS = 3  # conversations drawn for each task and record of the demo: phrasings vary from draw to draw


def corpus() -> list[str]:
    """Sentences to train on, each a line."""
    lines = pathlib.Path(__file__).with_name("tokenizer_corpus.txt").read_text().splitlines()
    lines += [prompts.SYSTEM, *prompts.MARKERS[-2:]] * 50
    dataset = builders.load("demo")
    for index in dataset.indices("train"):
        for name in DEMO_TASKS:
            for draw in range(DRAWS):
                sample = tasks.make(name, dataset, int(index), np.random.default_rng([int(index), draw]),
                                    Context(config_lib.PARTS))
                for turn in sample.turns:
                    lines += [piece for piece in (*turn.prompt, turn.answer.text) if isinstance(piece, str)]
    return lines


def _ours(path: pathlib.Path) -> bool:
    try:
        return bool(sentencepiece.SentencePieceProcessor(model_file=str(path)).vocab_size())
    except (RuntimeError, OSError):
        return False


def main() -> None:
    files.output(_OUT.value, ours=_ours)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=_VOCAB.value, model_type="bpe",
        byte_fallback=True, split_digits=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=1)
    files.write(_OUT.value, model.getvalue())
    print(f"{_OUT.value}: {_VOCAB.value} pieces, {len(model.getvalue()) / 1024:.0f} KiB")


if __name__ == "__main__":
    command.run(main)
