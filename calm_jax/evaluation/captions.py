"""Texts and the references of each in; BLEU, METEOR, ROUGE-L, CIDEr and SPICE with intervals out.

The figures are those of the COCO caption tools (pycocoevalcap, PTB tokeniser), which need Java: this module feeds them
and says in a sentence what is missing. SPICE is the original one (spice-1.0.jar); it needs Java 8 and Stanford's
models, which are not on the package index.
"""

from __future__ import annotations

import dataclasses
import pathlib
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from calm_jax.errors import ConfigError
from calm_jax.evaluation import metrics

BLEU = tuple(f"BLEU-{n}" for n in range(1, 5))
NAMES = (*BLEU, "METEOR", "ROUGE-L", "CIDEr", "SPICE")
_SMALL, _TINY = 1e-9, 1e-15  # against division by zero, as in the COCO tools


@dataclasses.dataclass(frozen=True)
class Measured:
    """Attributes:
      corpus: name -> figure over all texts, as papers report it; 0 to 1, CIDEr 0 to 10.
      items: name -> `[n]` figure of each text.
      intervals: name -> 95 % bootstrap interval of the corpus figure. METEOR has none: its corpus figure weighs
        statistics that the tool keeps to itself.
      missing: why SPICE was not computed, or "".
    """

    corpus: Mapping[str, float]
    items: Mapping[str, Float[np.ndarray, "n"]]
    intervals: Mapping[str, tuple[float, float]]
    missing: str = ""


def measure(said: Sequence[str], references: Sequence[Sequence[str]], *, spice: bool | None = None) -> Measured:
    """How near each text comes to its references.

    Args:
      said: n texts.
      references: of each of them, one or more.
      spice: True = it must be computed, False = not, None = where it can be.

    Raises:
      ConfigError: Java or pycocoevalcap is missing or fails, a text has no reference, or SPICE must be computed and
        cannot.
    """
    if not said or len(said) != len(references) or not all(references):
        raise ConfigError(f"{len(said)} texts and {len(references)} lists of references: every text needs "
                          "references, and there must be at least one text")
    if shutil.which("java") is None:
        raise ConfigError("caption metrics need Java on the PATH, for their tokeniser and for METEOR; "
                          "install a Java runtime, such as openjdk")
    try:
        from pycocoevalcap.bleu.bleu_scorer import BleuScorer
        from pycocoevalcap.cider.cider import Cider
        from pycocoevalcap.meteor.meteor import Meteor
        from pycocoevalcap.rouge.rouge import Rouge
    except ImportError as error:
        raise ConfigError(f"caption metrics need {error.name}; run: pip install calm_jax[captions]"
                          ) from None
    reason = spice_is_missing() if spice is not False else "it was not asked for"
    if spice and reason:
        raise ConfigError(f"SPICE cannot be computed: {reason}")
    result, truth = _tokenised(said, references)
    scorer = BleuScorer(n=4)
    for number in result:
        scorer += (result[number][0], truth[number])
    bleu, bleu_items = scorer.compute_score(option="closest")
    corpus, items = dict(zip(BLEU, bleu, strict=True)), dict(zip(BLEU, bleu_items, strict=True))
    scorers = {"METEOR": Meteor, "ROUGE-L": Rouge, "CIDEr": Cider}
    if not reason:
        from pycocoevalcap.spice.spice import Spice
        scorers["SPICE"] = Spice
    for name, scorer_of in scorers.items():
        try:
            corpus[name], items[name] = scorer_of().compute_score(truth, result)
        except (OSError, ValueError, subprocess.SubprocessError) as error:
            raise ConfigError(f"{name} failed; its Java program may lack memory (2 GiB): {error}") from None
    if "SPICE" in items:
        items["SPICE"] = [item["All"]["f"] for item in items["SPICE"]]
    items = {name: np.asarray(values, float) for name, values in items.items()}
    return Measured({name: float(value) for name, value in corpus.items()}, items, _intervals(scorer.ctest, items),
                    reason)


def _tokenised(said: Sequence[str], references: Sequence[Sequence[str]]):
    """Number -> [text] and number -> references, as the PTB tokeniser leaves them."""
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    def line(text):  # a text is one line, whatever counts as the end of one; ||| separates METEOR's fields
        return {"caption": " ".join(text.replace("|||", " ").split())}

    tokenizer = PTBTokenizer()
    result = tokenizer.tokenize({number: [line(text)] for number, text in enumerate(said)})
    truth = tokenizer.tokenize({number: [line(text) for text in texts] for number, texts in enumerate(references)})
    if [len(truth.get(number, ())) for number in range(len(said))] != [len(texts) for texts in references] \
            or len(result) != len(said):
        raise ConfigError("the Java tokeniser of the caption metrics returned fewer lines than it was "
                          "given; see what it says above")
    return result, truth


def _intervals(counts: Sequence[Mapping], items: Mapping[str, np.ndarray]) -> dict[str, tuple[float, float]]:
    """By resampling texts: of means for what is a mean, of sums of counts for BLEU."""
    groups = [str(number) for number in range(len(counts))]
    found = {name: metrics.mean_interval(values, groups) for name, values in items.items()
             if name in ("ROUGE-L", "CIDEr", "SPICE")}
    table = np.asarray([[item["testlen"], min((abs(length - item["testlen"]), length) for length in item["reflen"])[1],
                         *item["guess"], *item["correct"]] for item in counts], float)
    drawn = np.random.default_rng(0).multinomial(len(table), np.full(len(table), 1 / len(table)),
                                                 size=metrics.RESAMPLES) @ table
    low, high = np.percentile(bleu(drawn), [2.5, 97.5], axis=0)
    return found | {name: (float(low[place]), float(high[place])) for place, name in enumerate(BLEU)}


def bleu(sums: Float[np.ndarray, "m 10"]) -> Float[np.ndarray, "m 4"]:
    """BLEU-1 to -4 of sums of lengths (text, closest reference) and of n-grams guessed and right."""
    lengths, guessed, right = sums[:, :2], sums[:, 2:6], sums[:, 6:]
    precision = np.cumprod((right + _TINY) / (guessed + _SMALL), axis=1) ** (1 / np.arange(1, 5))
    ratio = (lengths[:, :1] + _TINY) / (lengths[:, 1:] + _SMALL)
    return precision * np.where(ratio < 1, np.exp(np.minimum(0.0, 1 - 1 / ratio)), 1.0)


def spice_is_missing() -> str:
    """Why SPICE cannot be computed here, or ""."""
    try:
        import pycocoevalcap.spice.spice as spice
    except ImportError:
        return "pycocoevalcap is not installed"
    models = list((pathlib.Path(spice.__file__).parent / "lib").glob("stanford-corenlp-*-models.jar"))
    if not models:
        return ("Stanford's models are missing; python -m pycocoevalcap.spice.get_stanford_models, or the notes of "
                "pycocoevalcap, fetch them")
    said = subprocess.run(["java", "-version"], capture_output=True, text=True, check=False).stderr
    found = re.search(r'version "(1\.)?(\d+)', said)
    if not found or found.group(2) != "8":
        return f"it needs Java 8, and this is Java {found.group(2) if found else 'of an unknown version'}"
    return ""
