"""A photograph and a flaw in; the photograph with that flaw out, by other means than those that training uses.

For the suggesting protocol (ours): a model that recognises `data.attributes`' own operations by their fingerprints
gains nothing here. Tone is done by gamma in linear light and by Pillow's enhancers, blur is a disc or a motion, noise
is of the photon kind, compression is WebP's, turning is scipy's. A flaw is named by the attribute and the grade whose
advice undoes it; strengths lie near the stronger grade of training.
"""

from __future__ import annotations

import io
import types
from collections.abc import Callable, Mapping

import numpy as np
import scipy.ndimage
from jaxtyping import UInt8
from PIL import Image, ImageEnhance

Picture = UInt8[np.ndarray, "H W 3"]
Flaw = tuple[str, int]  # attribute of `data.attributes` and the grade that the picture then has


def _linear(pixels: Picture) -> np.ndarray:
    """sRGB 0..255 -> light 0..1."""
    x = pixels.astype(np.float64) / 255
    return np.where(x <= 0.04045, x / 12.92, ((x + 0.055) / 1.055) ** 2.4)


def _encoded(light: np.ndarray) -> Picture:
    light = np.clip(light, 0, 1)
    x = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.rint(255 * x).astype(np.uint8)


def _enhanced(enhancer, factor: float) -> Callable[[Picture, np.random.Generator], Picture]:
    return lambda pixels, rng: np.asarray(enhancer(Image.fromarray(pixels)).enhance(factor * rng.uniform(0.9, 1.1)))


def _light(stops: float) -> Callable[[Picture, np.random.Generator], Picture]:
    return lambda pixels, rng: _encoded(_linear(pixels) * 2 ** (stops * rng.uniform(0.85, 1.15)))


def _defocus(pixels: Picture, rng: np.random.Generator) -> Picture:
    """A disc, as an open aperture out of focus draws it."""
    radius = max(1.5, max(pixels.shape[:2]) / 60 * rng.uniform(0.9, 1.2))
    reach = int(np.ceil(radius))
    y, x = np.mgrid[-reach:reach + 1, -reach:reach + 1]
    disc = (x ** 2 + y ** 2 <= radius ** 2).astype(np.float64)
    light = _linear(pixels)
    return _encoded(np.stack([scipy.ndimage.convolve(light[..., c], disc / disc.sum(), mode="nearest")
                              for c in range(3)], -1))


def _photons(pixels: Picture, rng: np.random.Generator) -> Picture:
    """So little light that photons count, most in the shadows; over two pixels, as a sensor's noise after scaling."""
    light = _linear(pixels)
    counts = 40 * rng.uniform(0.8, 1.2)
    noise = rng.poisson(light * counts) / counts - light + rng.normal(0, 0.02, light.shape)
    return _encoded(light + 1.6 * scipy.ndimage.gaussian_filter(noise, (0.5, 0.5, 0)))


def _webp(pixels: Picture, rng: np.random.Generator) -> Picture:
    file = io.BytesIO()
    small = Image.fromarray(pixels)
    small.save(file, "WEBP", quality=int(rng.integers(1, 4)), method=4)
    return np.asarray(Image.open(file).convert("RGB"))


def _cast(gains: tuple[float, float, float]) -> Callable[[Picture, np.random.Generator], Picture]:
    """A filter in front of the lens: gains of linear light."""
    return lambda pixels, rng: _encoded(_linear(pixels) * np.asarray(gains) ** rng.uniform(0.8, 1.2))


def _falloff(pixels: Picture, rng: np.random.Generator) -> Picture:
    """Light that falls with the fourth power of the cosine, exaggerated."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[-1:1:height * 1j, -1:1:width * 1j]
    angle = np.arctan(1.3 * rng.uniform(0.95, 1.1) * np.sqrt((x ** 2 + y ** 2) / 2) * 1.2)
    return _encoded(_linear(pixels) * np.cos(angle)[..., None] ** 4)


def _turned(sign: int) -> Callable[[Picture, np.random.Generator], Picture]:
    """Turned by some degrees, clockwise for a positive sign, and cut to what has no empty corners."""
    def turn(pixels, rng):
        degrees = rng.uniform(8, 12)
        height, width = pixels.shape[:2]
        whole = scipy.ndimage.rotate(pixels, -sign * degrees, reshape=False, order=1, mode="nearest")
        # The largest upright rectangle of the same shape inside the turned one.
        c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
        share = min(width / (width * c + height * s), height / (width * s + height * c))
        top, left = round(height * (1 - share) / 2), round(width * (1 - share) / 2)
        return np.ascontiguousarray(whole[top:height - top or None, left:width - left or None])
    return turn


def _upside_down(pixels: Picture, rng: np.random.Generator) -> Picture:
    return np.ascontiguousarray(pixels[::-1, ::-1])


def _thumb(pixels: Picture, rng: np.random.Generator) -> Picture:
    """Something dark and soft before a third of the lens."""
    height, width = pixels.shape[:2]
    y, x = np.mgrid[0:1:height * 1j, 0:1:width * 1j]
    centre_y, centre_x = rng.uniform(0.25, 0.75), rng.choice([0.0, 1.0])
    distance = np.hypot((x - centre_x) / 0.55, (y - centre_y) / 0.6)
    cover = scipy.ndimage.gaussian_filter(np.clip((1.0 - distance) * 12, 0, 1), max(height, width) / 80)[..., None]
    colour = np.asarray([0.06, 0.03, 0.02]) * rng.uniform(0.4, 2.0)
    return _encoded(_linear(pixels) * (1 - cover) + colour * cover)


FLAWS: Mapping[Flaw, Callable[[Picture, np.random.Generator], Picture]] = types.MappingProxyType({
    ("exposure", 0): _light(-2.2), ("exposure", 2): _light(1.8),
    ("contrast", 0): _enhanced(ImageEnhance.Contrast, 0.3), ("contrast", 2): _enhanced(ImageEnhance.Contrast, 2.4),
    ("saturation", 0): _enhanced(ImageEnhance.Color, 0.0), ("saturation", 1): _enhanced(ImageEnhance.Color, 0.35),
    ("tint", 0): _cast((1.25, 0.6, 1.25)), ("tint", 2): _cast((0.65, 1.3, 0.65)),
    ("sharpness", 2): _defocus, ("noise", 2): _photons, ("compression", 2): _webp,
    ("vignetting", 2): _falloff, ("tilt", 0): _turned(-1), ("tilt", 2): _turned(1),
    ("orientation", 1): _upside_down, ("occlusion", 2): _thumb,
})


def degrade(pixels: Picture, flaw: Flaw, seed: int) -> Picture:
    """The picture with that flaw; the same for the same seed."""
    return FLAWS[flaw](pixels, np.random.default_rng([seed, list(FLAWS).index(flaw)]))
