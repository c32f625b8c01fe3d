"""An array and an ImageRef in, the padded and possibly edited square that the encoder sees out.

Nothing is cropped beyond the reference's window and nothing is squashed: composition is part of what is judged. The
colour of the padding is the encoder's choice (`config.Encoder.padding`).
"""

from __future__ import annotations

import itertools

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from calm_jax.data import attributes, pictures
from calm_jax.data.samples import BadRecord, ImageRef

Picture = UInt8[np.ndarray, "H W 3"]
Square = UInt8[np.ndarray, "S S 3"]
Colour = tuple[int, int, int]  # RGB 0..255

# Looked at in place of a picture that could not be read; what is made of it says nothing about that picture.
NOTHING = np.zeros((1, 1, 3), np.uint8)
GEOMETRY_SCALE = 2  # geometric edits work on a picture this many times larger, where it has the pixels


def fit(pixels: Picture, ref: ImageRef, size: int) -> Picture:
    """Cuts the reference's window out and resizes its longest side to `size`; not edited, not padded.

    Raises:
      BadRecord: the picture is empty, or the window is no part of it.
    """
    try:
        return pictures.fit(pixels, size, ref.window)
    except BadRecord as error:
        raise BadRecord(f"record {ref.index}: {error}") from None


class Fitter:
    """`fit` of one stored picture, done once for each window and size: the versions that a conversation compares differ
    only in what comes after."""

    def __init__(self, pixels: Picture):
        self.pixels = pixels
        self._done: dict[tuple[tuple[float, ...] | None, int], Picture] = {}
        self._unanswerable: dict[tuple[tuple[float, ...] | None, int], frozenset[str]] = {}

    def __call__(self, ref: ImageRef, size: int) -> Picture:
        """As `fit`; not to be written to."""
        if (ref.window, size) not in self._done:
            self._done[ref.window, size] = fit(self.pixels, ref, size)
        return self._done[ref.window, size]

    def unanswerable(self, ref: ImageRef, size: int) -> frozenset[str]:
        """`attributes.unanswerable` of the fitted picture."""
        if (ref.window, size) not in self._unanswerable:
            self._unanswerable[ref.window, size] = attributes.unanswerable(self(ref, size))
        return self._unanswerable[ref.window, size]

    def longest(self, ref: ImageRef) -> int:
        """The longest side of the window, pixels."""
        left, top, right, bottom = ref.window or (0.0, 0.0, 1.0, 1.0)
        return round(max((right - left) * self.pixels.shape[1], (bottom - top) * self.pixels.shape[0]))


def render(pixels: Picture, ref: ImageRef, size: int, padding: Colour = pictures.PADDING) -> Square:
    """What the encoder sees of a stored picture: window, resize, edits in order, padding. A function of its arguments.

    Edits act on the fitted picture, so that their strength is what the encoder sees and the padding stays even.

    Args:
      pixels: the stored picture, RGB 0..255.
      ref: its window and edits.
      size: side of the square, pixels.
      padding: colour around the picture; the default is CLIP's.
    Raises:
      BadRecord: the window is no part of the picture.
      ConfigError: an edit names no attribute or grade.
    """
    return render_noting(Fitter(pixels), ref, size, padding)[0]


def render_noting(fitter: Fitter, ref: ImageRef, size: int, padding: Colour = pictures.PADDING
                  ) -> tuple[Square, frozenset[str]]:
    """`render`, and the names of the attributes that must not be asked about on this picture.

    They are those whose edit is measured to have changed nothing visible on this picture, and those about which the
    picture itself has no answer (the colours of a grey one): the label of such a turn would be false, so its answer is
    to be masked.
    """
    leading = list(itertools.takewhile(lambda edit: attributes.get(edit.attribute).geometric, ref.edits))
    picture = fitter(ref, size)
    doubtful = set(fitter.unanswerable(ref, size))
    if leading:
        # Turning and enlarging a fitted picture would blur it, and blur is another attribute's label: done larger.
        before, (height, width) = picture, picture.shape[:2]
        picture = fitter(ref, max(size, min(GEOMETRY_SCALE * size, fitter.longest(ref))))
        for edit in leading:
            picture = attributes.apply(picture, edit)
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
        doubtful |= {edit.attribute for edit in leading if attributes.is_noop(before, picture, edit)}
    for edit in ref.edits[len(leading):]:
        before, picture = picture, attributes.apply(picture, edit)
        if attributes.is_noop(before, picture, edit):
            doubtful.add(edit.attribute)
    return pictures.pad(picture, size, padding), frozenset(doubtful)
