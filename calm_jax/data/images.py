"""A picture file in, an RGB array out; an array and an ImageRef in, the padded square that the encoder sees out.

Nothing is cropped beyond the reference's window and nothing is squashed: composition is part of what is judged. The
padding is CLIP's mean colour, as in LLaVA-1.5, so that it is nearly zero after normalisation.
"""

from __future__ import annotations

import io
import itertools
import os
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageOps, UnidentifiedImageError

from calm_jax.data import attributes
from calm_jax.data.samples import BadRecord, ImageRef

Picture = UInt8[np.ndarray, "H W 3"]
Square = UInt8[np.ndarray, "S S 3"]

PADDING = tuple(round(255 * mean) for mean in (0.48145466, 0.4578275, 0.40821073))  # CLIP's mean colour
# Pillow refuses 179 megapixels and more by itself; it is asked again here in case its guard was switched off.
MAX_PIXELS = 178_956_970
GEOMETRY_SCALE = 2  # geometric edits work on a picture this many times larger, where it has the pixels


def read(source: str | os.PathLike | bytes) -> Picture:
    """Decodes a picture: RGB 0..255, upright (EXIF), the first frame of an animation, transparency over PADDING.

    Args:
      source: a path, or the bytes of a file.
    Raises:
      BadRecord: missing, unreadable, truncated or too large; one sentence with the name and the reason.
    """
    name = f"a picture of {len(source):,} bytes" if isinstance(source, bytes) else str(Path(source))
    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise BadRecord(f"{name} has {width * height / 1e6:,.0f} megapixels, and pictures above "
                                f"{MAX_PIXELS / 1e6:.0f} are not decoded; make it smaller")
            picture.seek(0)
            picture.load()
            return _rgb(_upright(picture))
    except BadRecord:
        raise
    except FileNotFoundError:
        raise BadRecord(f"{name} does not exist") from None
    except IsADirectoryError:
        raise BadRecord(f"{name} is a folder, not a picture") from None
    except PermissionError:
        raise BadRecord(f"{name} may not be read: permission denied") from None
    except Image.DecompressionBombError:
        raise BadRecord(f"{name} has more than the {MAX_PIXELS / 1e6:.0f} megapixels that are decoded; "
                        "make it smaller") from None
    except UnidentifiedImageError:
        raise BadRecord(f"{name} is not a picture in a known format, or its beginning is damaged") from None
    except Exception as error:  # Pillow's decoders raise OSError, SyntaxError, ValueError, struct.error and others
        reason = " ".join(str(error).split()) or type(error).__name__
        raise BadRecord(f"{name} is truncated or damaged: {reason}") from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged EXIF block spoils the rotation only, not the picture
        return picture


def _rgb(picture: Image.Image) -> Picture:
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N", "F"):
        values = np.asarray(picture, np.float32)
        # Pillow opens 16-bit grey as I or I;16; a float picture is 0..1 by convention, else taken as 0..255.
        if picture.mode == "F":
            values = values * (255.0 if values.size and values.max() <= 1.0 else 1.0)
        else:
            values = values / 257.0
        grey = np.clip(np.rint(np.nan_to_num(values)), 0, 255).astype(np.uint8)
        return np.repeat(grey[..., None], 3, 2)
    if picture.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, (*PADDING, 255))
        picture = Image.alpha_composite(ground, picture)
    return np.array(picture.convert("RGB"))


def fit(pixels: Picture, ref: ImageRef, size: int) -> Picture:
    """Cuts the window out and resizes its longest side to `size`, antialiased; not edited, not padded.

    Raises:
      BadRecord: the picture is empty, or the window is no part of it.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = ref.window or (0.0, 0.0, 1.0, 1.0)
    if not (0.0 <= left < right <= 1.0 and 0.0 <= top < bottom <= 1.0) or not width * height:
        raise BadRecord(f"record {ref.index}: the window {ref.window} is no part of a picture of {width} x {height}")
    # Cut in whole pixels, at least one, before resizing: the antialiasing must not look beyond the window.
    left, top = min(round(left * width), width - 1), min(round(top * height), height - 1)
    right, bottom = max(round(right * width), left + 1), max(round(bottom * height), top + 1)
    scale = size / max(right - left, bottom - top)
    fitted = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    picture = Image.fromarray(np.ascontiguousarray(pixels[top:bottom, left:right]))
    return np.asarray(picture.resize(fitted, Image.Resampling.BICUBIC, reducing_gap=3.0))


def _longest(pixels: Picture, ref: ImageRef) -> int:
    left, top, right, bottom = ref.window or (0.0, 0.0, 1.0, 1.0)
    return round(max((right - left) * pixels.shape[1], (bottom - top) * pixels.shape[0]))


def pad(pixels: Picture, size: int) -> Square:
    """Centres a picture of at most `size` x `size` on a square of PADDING."""
    height, width = pixels.shape[:2]
    square = np.empty((size, size, 3), np.uint8)
    square[:] = PADDING
    top, left = (size - height) // 2, (size - width) // 2
    square[top:top + height, left:left + width] = pixels
    return square


def render(pixels: Picture, ref: ImageRef, size: int) -> Square:
    """What the encoder sees of a stored picture: window, resize, edits in order, padding. A function of its arguments.

    Edits act on the fitted picture, so that their strength is what the encoder sees and the padding stays even.

    Args:
      pixels: the stored picture, RGB 0..255.
      ref: its window and edits.
      size: side of the square, pixels.
    Raises:
      BadRecord: the window is no part of the picture.
      ConfigError: an edit names no attribute or grade.
    """
    return render_noting(pixels, ref, size)[0]


def render_noting(pixels: Picture, ref: ImageRef, size: int) -> tuple[Square, frozenset[str]]:
    """`render`, and the names of the attributes that must not be asked about on this picture.

    They are those whose edit changed nothing visible and those about which the picture itself has no answer (the
    colours of a grey one): the label of such a turn would be false, so its answer is to be masked.
    """
    leading = list(itertools.takewhile(lambda edit: attributes.get(edit.attribute).geometric, ref.edits))
    picture = fit(pixels, ref, size)
    doubtful = set(attributes.unanswerable(picture))
    if leading:
        # Turning and enlarging a fitted picture would blur it, and blur is another attribute's label: done larger.
        height, width = picture.shape[:2]
        picture = fit(pixels, ref, max(size, min(GEOMETRY_SCALE * size, _longest(pixels, ref))))
        for edit in leading:
            picture = attributes.apply(picture, edit)
        picture = np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
    for edit in ref.edits[len(leading):]:
        before, picture = picture, attributes.apply(picture, edit)
        if edit.grade != attributes.get(edit.attribute).neutral and attributes.is_noop(before, picture):
            doubtful.add(edit.attribute)
    return pad(picture, size), frozenset(doubtful)
