"""Nothing in, a small dataset out: versions of 13 photographs that come with Python packages, no download needed.

The photographs belong to scikit-image, scikit-learn and matplotlib (`pip install calm_jax[demo]`). A record is a
seeded window of one of them with no, one or two known degradations. Training and validation share nine photographs,
four of them black and white (validation uses windows that no training window nearly equals); the four of the test
split, colour photographs about which nearly every question can be asked, are never trained on.

Captions are written by us after looking at the photographs. Comments and scores are **composed, not human**: a comment
says the known degradations in the bank's words, and sometimes a fact about the photograph after them (facts of nine
photographs are learned by heart, and then said of any other), and the score is 8.4 less a fixed penalty for each
degradation. They show that the machinery learns what it is taught; they say nothing about taste.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.util
import itertools
import re
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from calm_jax.data import attributes, pictures
from calm_jax.data.samples import Edit, ImageRef, Record
from calm_jax.errors import ConfigError, nearest

Window = tuple[float, float, float, float]

SEED = 20241216  # of windows and edits: the demo is the same everywhere
BEST = 8.4  # composed score of a version without degradations, on the scale 1-10; the same for all photographs
SUBJECT_SHARE = 0.7  # of the subject's box that every window holds, so that captions stay true
PHRASINGS = 3  # of the bank's for each grade: a small model learns from nine photographs
MERITS = 1 / 3  # share of the comments that also say a fact about the photograph
NEAR = 0.85  # intersection over union with a training window from which a validation window counts as the same


@dataclasses.dataclass(frozen=True)
class Photograph:
    """A photograph and what we saw in it.

    Attributes:
      name: short, for record keys.
      package, path: where it lies.
      split: `train` photographs serve training and validation.
      subject: (left, top, right, bottom) of what the captions speak about, in fractions.
      captions: what is shown; true of every window.
      merits: sentences for the comments, true of every window; facts of colour, light and place.
      unfit: attributes whose absolute question has no true answer here.
    """

    name: str
    package: str
    path: str
    split: str
    subject: Window
    captions: tuple[str, ...]
    merits: tuple[str, ...]
    unfit: tuple[str, ...] = ()


PHOTOGRAPHS = (
    Photograph(
        "astronaut", "skimage", "data/astronaut.png", "train", (0.15, 0.03, 0.70, 0.75),
        ("An astronaut in an orange space suit smiles at the camera.",
         "A smiling woman with short hair wears an orange space suit.",
         "Portrait of a woman astronaut in an orange suit.",
         "A woman in a space suit poses for an official portrait.",
         "An astronaut is smiling in a studio portrait."),
        ("The smile of the astronaut draws the eye.",
         "The orange suit stands out against the pale background.",
         "A friendly studio portrait of an astronaut.")),
    Photograph(
        "rocket", "skimage", "data/rocket.jpg", "train", (0.40, 0.25, 0.60, 0.98),
        ("A white rocket stands on its launch pad at dusk.",
         "A tall rocket waits on the launch pad under a dark blue sky.",
         "A rocket stands ready for launch in the evening.",
         "Lights shine around a rocket on a launch pad.",
         "A slender white rocket points at the evening sky."),
        ("The rocket rises as a bright line against the deep blue sky.",
         "Lamps glow at the foot of the rocket.",
         "A quiet evening scene at a launch pad."),
        ("exposure",)),
    Photograph(
        "hubble", "skimage", "data/hubble_deep_field.jpg", "train", (0.45, 0.45, 0.55, 0.55),
        ("Many distant galaxies are scattered over a black sky.",
         "A telescope picture of deep space full of galaxies.",
         "Countless small galaxies shine in the dark of space.",
         "Galaxies of many shapes and colours on a black background.",
         "Deep space with many faint points of light."),
        ("The tiny galaxies sparkle on the black of space.",
         "The picture has no centre, and the eye wanders from light to light.",
         "A rich field of galaxies in many colours."),
        ("tilt", "orientation", "exposure", "contrast", "saturation", "vignetting", "tint")),
    Photograph(
        "flower", "sklearn", "datasets/images/flower.jpg", "train", (0.26, 0.18, 0.70, 0.86),
        ("An orange dahlia blooms in front of dark green leaves.",
         "A round orange flower with many petals.",
         "Close view of a dahlia in full bloom.",
         "A single orange flower against a dark green background.",
         "A single dahlia with countless petals is in full bloom."),
        ("The orange flower glows against the dark green background.",
         "The background melts away behind the flower.",
         "The petals of the dahlia form a regular pattern."),
        ("tilt", "orientation")),
    Photograph(
        "officer", "matplotlib", "mpl-data/sample_data/grace_hopper.jpg", "train", (0.22, 0.05, 0.82, 0.80),
        ("An elderly naval officer with glasses poses in front of a flag.",
         "Portrait of an older woman in a dark navy uniform.",
         "A woman in uniform wears glasses and a white officer's cap.",
         "An official portrait of a woman naval officer.",
         "An older woman in a navy uniform looks at the camera."),
        ("The dark uniform stands out against the blue background.",
         "The officer looks calmly and directly at the camera.",
         "A formal portrait of a naval officer.")),
    Photograph(
        "cameraman", "skimage", "data/camera.png", "train", (0.10, 0.12, 0.66, 0.90),
        ("A man looks through a camera on a tripod.",
         "A photographer in a dark coat works with a camera on a tripod.",
         "A man in a black coat stands on a lawn behind his camera.",
         "A cameraman at work on an open field.",
         "A man with a camera, and a city far behind him."),
        ("The dark coat stands out against the pale sky.",
         "The legs of the tripod lead the eye to the camera.",
         "A black and white picture of a man at work."),
        ("saturation",)),
    Photograph(
        "bricks", "skimage", "data/brick.png", "train", (0.45, 0.45, 0.55, 0.55),
        ("A floor of long bricks seen from above.",
         "Rows of narrow bricks with pale joints.",
         "Many bricks lie side by side in straight lines.",
         "A pavement made of bricks.",
         "Bricks form a regular pattern."),
        ("The pale joints draw a regular pattern.",
         "The rows of bricks run away from the camera.",
         "A plain black and white study of a pavement."),
        ("saturation", "tilt", "orientation", "contrast")),
    Photograph(
        "gravel", "skimage", "data/gravel.png", "train", (0.45, 0.45, 0.55, 0.55),
        ("A ground covered with small broken stones.",
         "Gravel seen from above.",
         "Countless little stones lie close together.",
         "Many angular stones fill the picture.",
         "A bed of gravel."),
        ("The many edges of the stones make a lively pattern.",
         "The picture has no centre, and every part of it is alike.",
         "A black and white study of gravel."),
        ("saturation", "tilt", "orientation")),
    Photograph(
        "coins", "skimage", "data/coins.png", "train", (0.35, 0.35, 0.65, 0.65),
        ("Old coins lie in rows on a dark ground.",
         "A collection of ancient coins seen from above.",
         "Many worn coins of several sizes are laid out in lines.",
         "Rows of antique coins on black cloth.",
         "Ancient coins with heads and figures."),
        ("The bright coins stand out against the dark ground.",
         "The coins are set out in even rows.",
         "A black and white picture of a collection of coins."),
        ("saturation", "tilt", "orientation", "exposure")),
    Photograph(
        "motorcycle", "skimage", "data/motorcycle_left.png", "test", (0.18, 0.28, 0.92, 0.90),
        ("A red motorcycle stands in a garage.",
         "A red motorcycle with a black seat is parked on a concrete floor.",
         "A motorcycle is parked in front of shelves and a wooden bench.",
         "Side view of a motorcycle in a cluttered garage.",
         "A red motorcycle leans on its stand."),
        ("The red tank of the motorcycle is the strongest colour.",
         "The motorcycle stands in front of a busy background.",
         "A plain side view of a motorcycle in a garage.")),
    Photograph(
        "cat", "skimage", "data/chelsea.png", "test", (0.20, 0.10, 0.80, 0.85),
        ("A tabby cat with green eyes looks past the camera.",
         "Close view of the face of a tabby cat.",
         "The face of a ginger tabby cat with long whiskers.",
         "A striped cat with yellow green eyes and a pink nose.",
         "Portrait of a cat with striped fur."),
        ("The green eyes of the cat draw the attention.",
         "The face of the cat fills the frame.",
         "A close portrait of a cat with striped fur."),
        ("tilt",)),
    Photograph(
        "coffee", "skimage", "data/coffee.png", "test", (0.15, 0.05, 0.80, 0.92),
        ("A cup of espresso on a red saucer stands on a wooden table.",
         "A red and white coffee cup with a spoon on a saucer.",
         "Coffee in a small cup on a wooden table.",
         "A spoon lies beside a cup of coffee on a red saucer.",
         "An espresso is served in a small cup with a spoon."),
        ("The red of the cup and saucer glows against the brown wood.",
         "The round cup and saucer make a simple composition.",
         "A warm still life with a cup of coffee."),
        ("tilt", "orientation")),
    Photograph(
        "pavilion", "sklearn", "datasets/images/china.jpg", "test", (0.10, 0.05, 0.58, 0.90),
        ("A Chinese pavilion with many roofs stands above a lake.",
         "A red and green tower with tiled roofs rises over the trees.",
         "A traditional Chinese tower among trees with water behind it.",
         "A pavilion with curved roofs stands under a pale blue sky.",
         "An old Chinese building with several storeys by a lake."),
        ("The curved roofs of the pavilion rise against the pale sky.",
         "Trees frame the red and green building from below.",
         "A clear view of a traditional pavilion in daylight.")),
)

VERSIONS = {"train": 120, "validation": 10, "test": 24}  # of each photograph


def path_of(photograph: Photograph) -> Path:
    """Where the file lies, without importing the package that brings it.

    Raises:
      ConfigError: the package or the file is missing.
    """
    found = importlib.util.find_spec(photograph.package)
    for folder in (found.submodule_search_locations or ()) if found else ():
        path = Path(folder) / photograph.path
        if path.is_file():
            return path
    missing = "is not installed" if found is None else f"does not contain {photograph.path}"
    raise ConfigError(f"the demo photograph {photograph.name!r} comes with the package "
                      f"{photograph.package}, which {missing}; run: pip install calm_jax[demo]")


class Demo:
    """The dataset; see the head of this file. Its records are the same on every machine."""

    name = "demo"

    def __init__(self):
        self.photographs = PHOTOGRAPHS
        self._paths = tuple(path_of(photograph) for photograph in self.photographs)
        self._pictures: dict[int, np.ndarray] = {}
        self._records: list[Record] = []
        self._splits: dict[str, list[int]] = {split: [] for split in VERSIONS}
        self._photograph: list[int] = []
        for number, photograph in enumerate(self.photographs):
            rng = np.random.default_rng((SEED, number))
            seen: list[Window] = []
            for split in ("train", "validation") if photograph.split == "train" else ("test",):
                for version in range(VERSIONS[split]):
                    window = _window(photograph, rng, seen if split == "validation" else ())
                    if split == "train":
                        seen.append(window)
                    index = len(self._records)
                    self._splits[split].append(index)
                    self._photograph.append(number)
                    self._records.append(_compose(photograph, index, f"{photograph.name}-{split}-{version:02d}",
                                                  window, rng))

    def __len__(self) -> int:
        """Records of all splits together."""
        return len(self._records)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Of all records and of the files of the photographs, which belong to other packages."""
        digest = hashlib.sha256(repr((self._splits, self._records)).encode())
        for content in self._contents:
            digest.update(content)
        return digest.hexdigest()[:16]

    def indices(self, split: str) -> np.ndarray:
        """Record numbers of a split, int64 `[n]`. Raises ConfigError when there is no such split."""
        if split not in self._splits:
            raise ConfigError(f"demo has no split {split!r}{nearest(split, self._splits)}")
        return np.asarray(self._splits[split], np.int64)

    def record(self, index: int) -> Record:
        """What is known of record `index`."""
        return self._records[index]

    def pixels(self, index: int) -> UInt8[np.ndarray, "H W 3"]:
        """The whole photograph of record `index`, RGB 0..255; each is decoded once. Do not write to it.

        Raises:
          BadRecord: the file is damaged.
        """
        number = self._photograph[index]
        if number not in self._pictures:
            picture = pictures.read(self._paths[number])
            picture.setflags(write=False)  # shared by all records and threads
            self._pictures[number] = picture
        return self._pictures[number]


    def content(self, index: int) -> bytes:
        """The SHA-256 of the photograph's file."""
        return self._contents[self._photograph[index]]

    @functools.cached_property
    def _contents(self) -> list[bytes]:
        return [hashlib.sha256(path.read_bytes()).digest() for path in self._paths]


def build() -> Demo:
    """The demo dataset. Raises ConfigError when the packages with the photographs are not installed."""
    return Demo()


def _window(photograph: Photograph, rng: np.random.Generator, avoid: tuple[Window, ...] | list[Window]) -> Window:
    """Half to all of each side; holds most of the subject and is none of `avoid`."""
    while True:
        share, lean = rng.uniform(0.5, 1.0), np.exp(rng.uniform(-0.25, 0.25))
        wide, high = np.clip((share * lean, share / lean), 0.5, 1.0)
        left, top = rng.uniform(0.0, 1.0 - wide), rng.uniform(0.0, 1.0 - high)
        window = tuple(round(float(value), 4) for value in (left, top, left + wide, top + high))
        subject = photograph.subject
        if _overlap(window, subject) < SUBJECT_SHARE * _overlap(subject, subject):
            continue
        if all(_overlap(window, other) < NEAR * (_overlap(window, window) + _overlap(other, other)
                                                 - _overlap(window, other)) for other in avoid):
            return window


def _overlap(a: Window, b: Window) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _compose(photograph: Photograph, index: int, key: str, window: Window, rng: np.random.Generator) -> Record:
    edits = _edits(photograph, rng)
    facts, merits = photograph.captions, photograph.merits
    if any((edit.attribute, edit.grade) == ("saturation", 0) for edit in edits):
        facts, merits = _colourless(facts), _colourless(merits)
    captions = tuple(facts[i] for i in rng.permutation(len(facts))[:rng.integers(2, 5)])
    comments = tuple(_comment(merits, edits, rng) for _ in range(rng.integers(2, 4)))
    return Record(key, ImageRef(index, window, edits), captions, tuple(dict.fromkeys(comments)), score_of(edits),
                  (1.0, 10.0), photograph.unfit, photograph.name)


def _edits(photograph: Photograph, rng: np.random.Generator) -> tuple[Edit, ...]:
    """None (in a quarter of the records), one or two degradations of the low and middle level that the picture alone
    shows."""
    possible = [attribute for attribute in attributes.ATTRIBUTES.values()
                if attribute.level in ("low", "middle") and attribute.absolute
                and attribute.name not in photograph.unfit]
    count = rng.choice(3, p=(0.25, 0.4, 0.35))
    together = [some for size in range(count + 1) for some in itertools.combinations(possible, size)
                if attributes.together(attribute.name for attribute in some)]
    most = [some for some in together if len(some) == len(together[-1])]  # few pairs suit a picture of the stars
    return attributes.ordered(Edit(attribute.name, int(rng.choice(attribute.flaws)), int(rng.integers(2**31)))
                              for attribute in most[rng.integers(len(most))])


def score_of(edits: tuple[Edit, ...]) -> float:
    """The composed score on the scale 1-10: BEST less the penalty of every edit. Ours; no human gave it."""
    return round(max(1.0, BEST - sum(attributes.get(edit.attribute).penalty[edit.grade] for edit in edits)), 2)


PRAISE = ("Nothing disturbs the picture.", "Technically there is nothing to complain about.",
          "Light, colour and focus are all right.", "A technically clean picture.")


_COLOURS = re.compile(r"\b(red|orange|green|blue|brown|ginger|pink|colours?)\b")


def _colourless(sentences: tuple[str, ...]) -> tuple[str, ...]:
    """Those that stay true of a black and white version."""
    return tuple(sentence for sentence in sentences if not _COLOURS.search(sentence))


def _comment(merits: tuple[str, ...], edits: tuple[Edit, ...], rng: np.random.Generator) -> str:
    flaws = [str(rng.choice(attributes.get(edit.attribute).cues.answers[edit.grade][:PHRASINGS])) for edit in edits]
    said = [flaws[i] for i in rng.permutation(len(flaws))] or [str(rng.choice(PRAISE))]
    if rng.random() < MERITS:
        said.append(str(rng.choice(merits)))
    return " ".join(said)
