"""The project's own texts in, the small SentencePiece model that ships for `tiny` and `small` out.

    python -m tools.tokenizer [--out FILE] [--vocab 2048]

Ours: byte-pair encoding with byte fallback and split digits, as LLaMA's, trained on what the small models have to say:
the conversation template, the phrases of every attribute, the instructions, the demo's texts, and a page of words
about photographs (corpus.txt, beside this file, written for this purpose).
"""

from __future__ import annotations

import io
import pathlib
from typing import Annotated

import numpy as np
import sentencepiece
import typer

from calm_jax import cli, files
from calm_jax import config as config_lib
from calm_jax.data import builders, tasks
from calm_jax.data.tasks.context import Context
from calm_jax.text.templates import vicuna
from calm_jax.text.tokenizers import SHIPPED

DEMO_TASKS = ("attributes", "comparisons", "caption", "comment", "score")
DRAWS = 3  # conversations drawn for each task and record of the demo: phrasings vary from draw to draw


def corpus() -> list[str]:
    """Sentences to train on, each a line."""
    lines = pathlib.Path(__file__).with_name("corpus.txt").read_text().splitlines()
    lines += [vicuna.SYSTEM, *vicuna.TEMPLATE.markers[-2:]] * 50
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


def main(
        out: Annotated[str, typer.Option(help="Where to write the model.")] = str(SHIPPED),
        vocab: Annotated[int, typer.Option(min=260, help="Pieces, the three control pieces and 256 bytes "
                                           "included.")] = 2048) -> None:
    files.output(out, ours=_ours)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_writer=model, vocab_size=vocab, model_type="bpe",
        byte_fallback=True, split_digits=True, character_coverage=1.0, unk_id=0, bos_id=1, eos_id=2, pad_id=-1,
        normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1, minloglevel=1)
    files.write(out, model.getvalue())
    print(f"{out}: {vocab} pieces, {len(model.getvalue()) / 1024:.0f} KiB")


if __name__ == "__main__":
    cli.single(main)
