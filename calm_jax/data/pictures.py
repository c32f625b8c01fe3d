"""A picture file in, an RGB array or the padded square that the encoder sees, out.

This file runs without the rest of the package: every exported model carries a copy of it, so that the same picture
gives the same score on both sides. Hence shapes are said in words here: RGB pictures are uint8 `[H, W, 3]`, 0..255.
"""

from __future__ import annotations

import contextlib
import functools
import io
import itertools
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

PADDING = tuple(round(255 * mean) for mean in (0.48145466, 0.4578275, 0.40821073))  # CLIP's mean colour
# Pillow knows formats that start other programs (EPS) or fetch files; a picture of these is a picture and nothing else.
FORMATS = ("JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000")
# Pillow refuses 179 megapixels and more by itself; it is asked again here in case its guard was switched off.
MAX_PIXELS = 178_956_970
KEPT_PIXELS = 1 << 25  # larger pictures are reduced by a whole number
STRIP = 1 << 20  # pixels that are converted at a time: besides the decoded picture and the result little is held
BUDGET = 1 << 31  # bytes that all threads together hold while they decode; a picture that needs more is refused
SAMPLES = 1 << 20  # of a picture of floats, about so many numbers tell the unit
# Bytes a pixel that decoders hold beside Pillow's own picture, from above; measured, see docs/decisions.md.
_EXTRA = {"WEBP": 12, "JPEG2000": 16, "AVIF": 12, "TIFF": 4, "GIF": 4}
_COEFFICIENTS = 6  # of a progressive JPEG, all of which are held until the last scan
_NARROW = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16L": 2, "I;16B": 2, "I;16N": 2}  # bytes a pixel; all others have 4

# It warns from half of its limit on; that and the budget are ours here.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class BadRecord(ValueError):
    """A picture, or a record with one, that cannot be used; the message names it and says why. Training masks, counts
    and names it."""

    exit_code = 1  # as errors of the rest of the package have one


def square(picture: str | os.PathLike | bytes | Image.Image | np.ndarray, size: int,
           padding: tuple[int, int, int] = PADDING) -> np.ndarray:
    """The whole picture as the encoder sees it: uint8 `[size, size, 3]`, nothing cropped, nothing squashed.

    Args:
      picture: a path, the bytes of a file, an opened picture, or RGB pixels.
    Raises:
      BadRecord: as `read` and `fit`.
    """
    return pad(fit(pixels(picture), size), size, padding)


def pixels(picture: str | os.PathLike | bytes | Image.Image | np.ndarray) -> np.ndarray:
    """RGB pixels of anything that holds a picture.

    Raises:
      BadRecord: as `read`, or an array is no RGB picture.
    """
    if isinstance(picture, Image.Image):
        try:
            with _DECODING.of(_memory(picture)):
                return _decoded(picture)
        except BadRecord as error:
            raise BadRecord(f"an opened picture {error}") from None
        except Exception as error:  # Pillow decodes it now, see `read`
            raise BadRecord(f"an opened picture is truncated or damaged: {_reason(error)}") from error
    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            raise BadRecord(f"an array {picture.shape} of {picture.dtype} is no picture; give uint8 [H, W, 3], RGB "
                            "from 0 to 255")
        return picture
    return read(picture)


def read(source: str | os.PathLike | bytes) -> np.ndarray:
    """Decodes a picture: RGB 0..255, upright (EXIF), the first frame of an animation, transparency over PADDING.

    A picture of more than KEPT_PIXELS comes reduced to fewer. 16-bit grey is 0..65535, and integers of 32 bits are
    taken for that where any is above 255; what numbers a picture of floats counts in is told by most of its pixels:
    0..1 where 99 % are at most 1, 0..255 where more than half are above 1, 1 % above 32 and 99 % at most 255.
    Threads share a BUDGET of memory, so that giants are decoded one after the other.

    Args:
      source: a path, or the bytes of a file.
    Raises:
      BadRecord: missing, no regular file, of no format in FORMATS, unreadable, truncated, too large, or of numbers that
        could mean anything; one sentence with the name and the reason.
    """
    name = f"a picture of {len(source):,} bytes" if isinstance(source, bytes) else str(Path(source))
    try:
        with opened(source) as stream, Image.open(stream, formats=formats()) as picture:
            picture.seek(0)
            with _DECODING.of(_memory(picture)):
                try:
                    return _decoded(picture)
                finally:
                    picture.close()  # what is given back must be free
    except BadRecord as error:
        raise BadRecord(f"{name} {error}") from None
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
        raise BadRecord(f"{name} is truncated or damaged: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class Budget:
    """So many bytes may be in use in all threads together. Thread-safe."""

    def __init__(self, size: int):
        self.size, self._free, self._changed = size, size, threading.Condition()

    @contextlib.contextmanager
    def of(self, count: int) -> Iterator[None]:
        """Waits until `count` bytes, at most all of them, are free, and holds them."""
        with self._changed:
            self._changed.wait_for(lambda: self._free >= count)
            self._free -= count
        try:
            yield
        finally:
            with self._changed:
                self._free += count
                self._changed.notify_all()


_DECODING = Budget(BUDGET)


@functools.cache
def formats() -> list[str]:
    """Those of FORMATS that this Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def opened(source: str | os.PathLike | bytes) -> BinaryIO:
    """The bytes of a picture. A pipe, which nobody may ever write into, is not waited for.

    Raises:
      OSError, BadRecord: it cannot be opened, or is no regular file.
    """
    if isinstance(source, bytes):
        return io.BytesIO(source)
    try:
        handle = os.open(source, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (FileNotFoundError, PermissionError):
        raise
    except (OSError, ValueError) as error:  # a name that is too long, a loop of links, a zero in a name
        raise BadRecord(f"cannot be opened: {getattr(error, 'strerror', None) or error}") from None
    try:
        mode = os.fstat(handle).st_mode
        if stat.S_ISDIR(mode):
            raise IsADirectoryError
        if not stat.S_ISREG(mode):
            raise BadRecord("is no regular file but a pipe, socket or device")
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _decoded(picture: Image.Image) -> np.ndarray:
    """Upright RGB pixels of an opened picture, at most KEPT_PIXELS of them; besides the decoded picture and the result
    only strips are held."""
    picture.load()
    width, height = picture.size
    factor, scale = _factor(width, height), _grey_scale(picture)
    rows = max(STRIP // width // factor, 1) * factor
    out = np.empty((-(-height // factor), -(-width // factor), 3), np.uint8)
    for top in range(0, height, rows):
        part = _rgb(_strip(picture, top, rows), scale)
        if factor > 1:
            part = np.asarray(Image.fromarray(part).reduce(factor))
        out[top // factor:top // factor + len(part)] = part
    turn = _TURNS.get(_orientation(picture))
    return np.ascontiguousarray(turn(out)) if turn else out


def _strip(picture: Image.Image, top: int, rows: int) -> Image.Image:
    if rows >= picture.height:
        return picture
    return picture.crop((0, top, picture.width, min(top + rows, picture.height)))


def _factor(width: int, height: int) -> int:
    """The least whole number by which a picture's sides are divided so that at most KEPT_PIXELS are left."""
    return next(n for n in itertools.count(1) if -(-width // n) * -(-height // n) <= KEPT_PIXELS)


def _memory(picture: Image.Image) -> int:
    """Bytes that decoding takes, from above, with the result and, where that is turned, a copy of it.

    Raises:
      BadRecord: these are too many, or its pixels are.
    """
    pixels = picture.width * picture.height
    if pixels > MAX_PIXELS:
        raise BadRecord(f"has {pixels / 1e6:,.0f} megapixels, and pictures above {MAX_PIXELS / 1e6:.0f} are not "
                        "decoded; make it smaller")
    each = _NARROW.get(picture.mode, 4) + _EXTRA.get(picture.format or "", 0)
    if picture.info.get("progressive"):
        each += _COEFFICIENTS
    strip = min(pixels, max(STRIP, picture.width * _factor(*picture.size)))
    need = pixels * each + 2 * 3 * min(pixels, KEPT_PIXELS) + 32 * strip
    if need > _DECODING.size:
        raise BadRecord(f"has {pixels / 1e6:,.1f} megapixels, which take {need / 2 ** 30:.2g} GiB to decode from "
                        f"{picture.format or 'memory'}, and there are {_DECODING.size / 2 ** 30:.2g}; make it smaller, "
                        "or a PNG or JPEG")
    return need


# What makes a picture of an EXIF orientation upright.
_TURNS = {2: lambda pixels: pixels[:, ::-1], 3: lambda pixels: pixels[::-1, ::-1], 4: lambda pixels: pixels[::-1],
          5: lambda pixels: pixels.transpose(1, 0, 2), 6: lambda pixels: pixels.transpose(1, 0, 2)[:, ::-1],
          7: lambda pixels: pixels[::-1, ::-1].transpose(1, 0, 2), 8: lambda pixels: pixels.transpose(1, 0, 2)[::-1]}


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(0x0112, 1))
    except Exception:  # a damaged EXIF block spoils the rotation only, not the picture
        return 1


def _grey_scale(picture: Image.Image) -> float:
    """What the numbers of a grey picture of more than eight bits are multiplied by to be 0..255; 1 for other pictures.

    Raises:
      BadRecord: they could mean anything.
    """
    if picture.mode == "F":
        rows = max(STRIP // picture.width, 1)
        step = 1 + picture.width * picture.height // SAMPLES
        values = np.concatenate([np.asarray(_strip(picture, top, rows)).ravel()[::step].copy()
                                 for top in range(0, picture.height, rows)])
        values = values[np.isfinite(values)]
        middle, most = np.percentile(values, (50, 99)) if values.size else (0.0, 0.0)
        if most <= 1:
            return 255.0
        if middle > 1 and 32 < most <= 255:
            return 1.0
        raise BadRecord(f"holds floats of which half are up to {middle:.4g} and 99 % up to {most:.4g}, neither 0..1 "
                        "nor 0..255; convert it to 8 or 16 bits")
    if picture.mode == "I" or picture.mode.startswith("I;16"):
        low, high = picture.getextrema()
        if low < 0 or high > 65_535:
            raise BadRecord(f"holds numbers from {low} to {high}, not 16-bit grey; convert it to 8 or 16 bits")
        if picture.mode == "I" and 0 < high <= 255:
            raise BadRecord(f"holds integers of 32 bits up to {high}, which could be 8-bit grey or a black picture of "
                            "16; convert it to 8 or 16 bits")
        return 1 / 257
    return 1.0


def _rgb(picture: Image.Image, scale: float) -> np.ndarray:
    """RGB pixels; `scale` is the `_grey_scale` of the whole that this is a part of."""
    if picture.mode in ("I", "I;16", "I;16L", "I;16B", "I;16N", "F"):  # 16-bit grey is I or I;16
        values = np.asarray(picture, np.float32) * np.float32(scale)
        grey = np.clip(np.rint(np.nan_to_num(values, posinf=255)), 0, 255).astype(np.uint8)
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


def pad(pixels: np.ndarray, size: int, padding: tuple[int, int, int] = PADDING) -> np.ndarray:
    """Centres a picture of at most `size` x `size` on a square of one colour, RGB."""
    height, width = pixels.shape[:2]
    canvas = np.empty((size, size, 3), np.uint8)
    canvas[:] = np.tile(np.asarray(padding, np.uint8), (size, 1))  # whole lines are copied far faster than colours
    top, left = (size - height) // 2, (size - width) // 2
    canvas[top:top + height, left:left + width] = pixels
    return canvas
