"""A picture file in, an RGB array or the padded square that the encoder sees, out.

This file runs without the rest of the package: every exported model carries a copy of it, so that the same picture
gives the same score on both sides. Hence shapes are said in words here: RGB pictures are uint8 `[H, W, 3]`, 0..255.
"""

from __future__ import annotations

import io
import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

PADDING = tuple(round(255 * mean) for mean in (0.48145466, 0.4578275, 0.40821073))  # CLIP's mean colour
# Pillow refuses 179 megapixels and more by itself; it is asked again here in case its guard was switched off.
MAX_PIXELS = 178_956_970


class BadRecord(ValueError):
    """A picture, or a record with one, that cannot be used; the message names it and says why. Training masks, counts
    and names it."""


def square(picture: str | os.PathLike | bytes | Image.Image | np.ndarray, size: int) -> np.ndarray:
    """The whole picture as the encoder sees it: uint8 `[size, size, 3]`, nothing cropped, nothing squashed.

    Args:
      picture: a path, the bytes of a file, an opened picture, or RGB pixels.
    Raises:
      BadRecord: as `read` and `fit`.
    """
    return pad(fit(pixels(picture), size), size)


def pixels(picture: str | os.PathLike | bytes | Image.Image | np.ndarray) -> np.ndarray:
    """RGB pixels of anything that holds a picture.

    Raises:
      BadRecord: as `read`, or an array is no RGB picture.
    """
    if isinstance(picture, Image.Image):
        return _rgb(_upright(picture))
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise BadRecord(f"an array {picture.shape} of {picture.dtype} is no picture; give uint8 [H, W, 3], RGB "
                            "from 0 to 255")
        return picture
    return read(picture)


def read(source: str | os.PathLike | bytes) -> np.ndarray:
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
        if picture.getexif().get(0x0112, 1) == 1:
            return picture  # exif_transpose would copy it
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged EXIF block spoils the rotation only, not the picture
        return picture


def _rgb(picture: Image.Image) -> np.ndarray:
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
    return np.asarray(picture if picture.mode == "RGB" else picture.convert("RGB"))


def fit(pixels: np.ndarray, size: int, window: tuple[float, float, float, float] | None = None) -> np.ndarray:
    """Cuts the window out and resizes its longest side to `size`, antialiased; not padded.

    Args:
      window: (left, top, right, bottom) in fractions of the picture; None is the whole picture.
    Raises:
      BadRecord: the picture is empty, or the window is no part of it.
    """
    height, width = pixels.shape[:2]
    left, top, right, bottom = window or (0.0, 0.0, 1.0, 1.0)
    if not (0.0 <= left < right <= 1.0 and 0.0 <= top < bottom <= 1.0) or not width * height:
        raise BadRecord(f"the window {window} is no part of a picture of {width} x {height}")
    # Cut in whole pixels, at least one, before resizing: the antialiasing must not look beyond the window.
    left, top = min(round(left * width), width - 1), min(round(top * height), height - 1)
    right, bottom = max(round(right * width), left + 1), max(round(bottom * height), top + 1)
    scale = size / max(right - left, bottom - top)
    fitted = (max(1, round((right - left) * scale)), max(1, round((bottom - top) * scale)))
    cut = np.ascontiguousarray(pixels[top:bottom, left:right])
    if fitted == (right - left, bottom - top):
        return cut
    picture = Image.fromarray(cut)
    return np.asarray(picture.resize(fitted, Image.Resampling.BICUBIC, reducing_gap=3.0))


def pad(pixels: np.ndarray, size: int) -> np.ndarray:
    """Centres a picture of at most `size` x `size` on a square of PADDING."""
    height, width = pixels.shape[:2]
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[:] = np.tile(np.asarray(PADDING, np.uint8), (size, 1))  # whole lines are copied far faster than colours
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top:top + height, left:left + width] = pixels
    return canvas
