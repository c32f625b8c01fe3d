"""A fitted picture and a grade of an attribute in, the degraded picture and the words for its grade out.

The text-guided self-supervision of the paper: an augmentation of known strength makes its own label. The attributes,
their grades and strengths are ours (the paper names levels, not attributes). Grades are numbered along one axis, such
as dark, normal, bright, so that a comparison asks for the higher or the lower number; the neutral grade is the
untouched picture. An absolute question is asked only where a random photograph is nearly always neutral: nobody can
tell a warm light from a warm scene, or a tight crop from a close view, without the picture beside it.

Strengths are relative to the picture's longest side (blur, geometry) or in grey levels (noise, tone), so that a grade
looks alike at 96 and at 336 pixels. Within a grade they vary by about a tenth, drawn from the seed of the edit.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import types
from collections.abc import Callable, Iterable, Mapping

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageFilter

from calm_jax.data import cues as cues_lib
from calm_jax.data.samples import Edit
from calm_jax.errors import ConfigError, nearest

Picture = UInt8[np.ndarray, "H W 3"]
Operation = Callable[[np.ndarray, int, np.random.Generator], np.ndarray]

JITTER = 0.1  # largest relative deviation of a strength inside its grade


# What must change before an edit counts as visible: a mean or, of a thing that stands in a place, what is there.
INVISIBLE = 1.0  # mean absolute change of the picture, grey levels, below which nothing can be seen
DARKENED = 4.0  # the same of the corners, for dark corners: those of a night picture cannot get darker
COVERING = 12  # grey levels of any channel from which on a covered pixel shows, and ...
COVERED = (0.0, 0.06, 0.22)  # ... the share of the frame that shows, by grade: a wall before a wall is no obstacle


def _change(before: Picture, after: Picture) -> Picture:
    """The absolute change in every third line: a mean or a share needs no more."""
    before, after = before[::3], after[::3]
    return np.maximum(before, after) - np.minimum(before, after)


def _changed(before: Picture, after: Picture, grade: int) -> bool:
    return float(_change(before, after).mean()) >= INVISIBLE


def _corners_changed(before: Picture, after: Picture, grade: int) -> bool:
    high, wide = (-(-side // 6) for side in before.shape[:2])
    rows, columns = (slice(None, high), slice(-high, None)), (slice(None, wide), slice(-wide, None))
    return float(np.mean([before[row, column].astype(np.int16) - after[row, column]
                          for row in rows for column in columns])) >= DARKENED


def _covered(before: Picture, after: Picture, grade: int) -> bool:
    change = _change(before, after)
    most = np.maximum(np.maximum(change[..., 0], change[..., 1]), change[..., 2])
    return float((most >= COVERING).mean()) >= COVERED[grade]


@dataclasses.dataclass(frozen=True)
class Attribute:
    """One thing that can be said of a picture.

    Attributes:
      name: as in `Edit.attribute`.
      level: low, middle or high: the part of the model that answers for it.
      grades: short pseudo-labels along the axis of the comparison.
      neutral: the grade that leaves the picture as it is.
      absolute: whether one picture alone tells its grade.
      penalty: what each grade takes from a composed score on the 1-10 scale (`builders.demo`; ours).
      operation: (picture, grade, rng) -> picture of the same shape; never called with the neutral grade.
      relative: whether any two versions can be compared; else only on a picture fit for the absolute question.
      geometric: whether the operation enlarges, which would cost sharpness on a picture without pixels to spare.
      shows: (before, after, grade) -> whether the edit can be seen; judged on the pixels of this very picture.
    """

    name: str
    level: str
    grades: tuple[str, ...]
    neutral: int
    absolute: bool
    penalty: tuple[float, ...]
    operation: Operation = dataclasses.field(repr=False)
    geometric: bool = False
    relative: bool = True
    shows: Callable[[np.ndarray, np.ndarray, int], bool] = dataclasses.field(default=_changed, repr=False)

    @property
    def cues(self) -> cues_lib.Cues:
        """What is said about it."""
        return cues_lib.CUES[self.name]

    @property
    def flaws(self) -> tuple[int, ...]:
        """The grades that change the picture."""
        return tuple(grade for grade in range(len(self.grades)) if grade != self.neutral)


def _around(value: float, rng: np.random.Generator) -> float:
    return value * (1.0 + rng.uniform(-JITTER, JITTER))


def _table(pixels: np.ndarray, curves: np.ndarray) -> np.ndarray:
    """Maps grey levels: `curves` is float [256] for all channels or [3, 256]. Pillow's look-up beats NumPy's."""
    curves = np.broadcast_to(np.clip(np.rint(curves), 0, 255).astype(np.uint8), (3, 256))
    return np.asarray(Image.fromarray(pixels).point(curves.ravel().tolist()))


_LEVELS = np.arange(256, dtype=np.float32)


def _blur(pixels, grade, rng):
    sigma = _around((0.0, 0.013, 0.036)[grade], rng) * max(pixels.shape[:2])
    return np.asarray(Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(sigma)))


def _noise(pixels, grade, rng):
    # Half of the power is common to the channels, as in a developed photograph: luminance and chroma noise.
    sigma = _around((0.0, 14.0, 42.0)[grade], rng) / np.sqrt(2.0)
    height, width, _ = pixels.shape
    noise = rng.standard_normal((height, width, 4), dtype=np.float32)
    noisy = noise[..., :3] + noise[..., 3:]
    noisy *= np.float32(sigma)
    noisy += pixels
    return np.minimum(np.maximum(noisy, 0, out=noisy), 255, out=noisy).astype(np.uint8)


def _compress(pixels, grade, rng):
    quality = round(_around((95, 15, 6)[grade], rng))
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality, subsampling=0)
    return np.asarray(Image.open(file).convert("RGB"))


def _expose(pixels, grade, rng):
    # A shift in stops is a gain of linear light; display values follow it with the power 1/2.2.
    stops = _around((-2.2, 0.0, 1.6)[grade], rng)
    return _table(pixels, _LEVELS * 2.0 ** (stops / 2.2))


def _contrast(pixels, grade, rng):
    # About the picture's own mean, so that its brightness, which is another attribute, stays.
    gain = _around((0.38, 1.0, 2.3)[grade], rng)
    pivot = float(pixels.mean())
    return _table(pixels, pivot + gain * (_LEVELS - pivot))


def _saturate(pixels, grade, rng):
    share = (0.0, _around(0.38, rng), 1.0)[grade]
    picture = Image.fromarray(pixels)
    return np.asarray(Image.blend(picture.convert("L").convert("RGB"), picture, share))


_LUMINANCE = np.array([0.299, 0.587, 0.114])


def _gains(pixels, gains):
    # Divided by their luminance, so that a colour cast neither darkens nor brightens.
    gains = np.asarray(gains) / (_LUMINANCE @ gains)
    return _table(pixels, gains[:, None] * _LEVELS)


def _temperature(pixels, grade, rng):
    shift = _around((-0.26, 0.0, 0.26)[grade], rng)
    return _gains(pixels, np.exp([shift, 0.0, -shift * 1.3]))


def _tint(pixels, grade, rng):
    shift = _around((-0.21, 0.0, 0.21)[grade], rng)
    return _gains(pixels, np.exp([-shift, shift, -shift]))


@functools.lru_cache(maxsize=64)
def _radius(height: int, width: int) -> np.ndarray:
    """Distance from the centre, float32 [H, W, 1], 1 at the corners."""
    y = np.linspace(-1.0, 1.0, height, dtype=np.float32)[:, None, None] if height > 1 else np.zeros((1, 1, 1), "f4")
    x = np.linspace(-1.0, 1.0, width, dtype=np.float32)[None, :, None] if width > 1 else np.zeros((1, 1, 1), "f4")
    return np.sqrt((y * y + x * x) / 2.0)


def _vignette(pixels, grade, rng):
    loss = _around((0.0, 0.42, 0.88)[grade], rng)
    light = 1.0 - np.float32(loss) * _radius(*pixels.shape[:2]) ** np.float32(2.0 if grade == 1 else 1.4)
    return (pixels * light).astype(np.uint8)


def _tilt(pixels, grade, rng):
    # Zoomed until the turned frame lies inside the picture: invented borders would give the answer away.
    angle = np.deg2rad(_around((-11.0, 0.0, 11.0)[grade], rng))
    height, width, _ = pixels.shape
    cosine, sine = np.cos(angle), np.sin(angle)
    zoom = cosine + abs(sine) * max(width / height, height / width)
    a, b = cosine / zoom, sine / zoom
    x, y = width / 2, height / 2
    turn = (a, b, x - a * x - b * y, -b, a, y + b * x - a * y)
    picture = Image.fromarray(pixels)
    return np.asarray(picture.transform((width, height), Image.Transform.AFFINE, turn, Image.Resampling.BILINEAR))


def _upend(pixels, grade, rng):
    return np.ascontiguousarray(pixels[::-1, ::-1])


# A finger, a strap, a leaf, a glove, a wall: what comes before a lens.
_OBSTACLES = np.array([(196, 142, 118), (28, 26, 30), (58, 84, 40), (52, 62, 118), (214, 206, 196)], np.float32)


def _inside(distance: np.ndarray) -> slice:
    """Where a rising distance from the centre of an ellipse is less than its radius."""
    return slice(*np.searchsorted(distance, (-1.0, 1.0)))


def _occlude(pixels, grade, rng):
    # A soft ellipse centred on the frame; never near a corner, where too little of it would show.
    height, width, _ = pixels.shape
    reach = _around((0.0, 0.25, 0.55)[grade], rng)
    along, side = rng.uniform(0.25, 0.75), rng.integers(4)
    centre = ((0.0, along), (along, 1.0), (1.0, along), (along, 0.0))[side]
    slope = rng.uniform(0.8, 1.25)
    y = (np.linspace(0.0, 1.0, height, dtype=np.float32)[:, None] - np.float32(centre[0])) / np.float32(reach * slope)
    x = (np.linspace(0.0, 1.0, width, dtype=np.float32)[None, :] - np.float32(centre[1])) / np.float32(reach / slope)
    colour = _OBSTACLES[rng.integers(len(_OBSTACLES))] * np.float32(rng.uniform(0.85, 1.15))
    rows, columns = _inside(y[:, 0]), _inside(x[0])
    y, x, under = y[rows], x[:, columns], pixels[rows, columns]  # the rest is not touched
    cover = np.clip((1.0 - np.sqrt(y * y + x * x)) * np.float32(6.0), 0.0, 1.0)[..., None]
    covered = pixels.copy()
    covered[rows, columns] = np.clip(under + cover * (colour - under), 0, 255)
    return covered


def _cut(pixels, wide, high, rng):
    """The share `wide` x `high` of the picture, near its middle, stretched to the whole frame."""
    height, width, _ = pixels.shape
    left, top = (1 - wide) * rng.uniform(0.3, 0.7) * width, (1 - high) * rng.uniform(0.3, 0.7) * height
    box = (left, top, left + wide * width, top + high * height)
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC, box=box))


def _frame(pixels, grade, rng):
    share = _around((1.0, 0.72, 0.48)[grade], rng)
    return _cut(pixels, share, share, rng)


def _stretch(pixels, grade, rng):
    # The frame keeps its shape: the picture is cut across the stretch first.
    share = 1.0 / _around(1.5, rng)
    return _cut(pixels, *((1.0, share) if grade == 0 else (share, 1.0)), rng)


# In the order in which edits are applied: what a lens and the light do, then tone and colour, then sensor and file.
# Blur after noise would hide the noise, and whatever follows compression would hide its blocks.
_ALL = (
    Attribute("aspect", "high", ("tall", "true", "wide"), 1, False, (1.6, 0.0, 1.6), _stretch, geometric=True),
    Attribute("orientation", "high", ("upright", "upside down"), 0, True, (0.0, 2.5), _upend, relative=False),
    Attribute("tilt", "high", ("left", "level", "right"), 1, True, (1.2, 0.0, 1.2), _tilt, geometric=True),
    Attribute("framing", "high", ("wide", "close", "tight"), 0, False, (0.0, 0.7, 1.7), _frame, geometric=True),
    Attribute("occlusion", "high", ("free", "edge", "large"), 0, True, (0.0, 1.4, 3.3), _occlude, shows=_covered),
    Attribute("sharpness", "low", ("sharp", "soft", "blurred"), 0, True, (0.0, 1.3, 3.4), _blur),
    Attribute("exposure", "low", ("dark", "normal", "bright"), 1, True, (2.3, 0.0, 2.0), _expose),
    Attribute("contrast", "low", ("low", "normal", "harsh"), 1, True, (1.8, 0.0, 1.5), _contrast),
    Attribute("saturation", "middle", ("none", "pale", "full"), 2, True, (1.1, 0.9, 0.0), _saturate),
    Attribute("temperature", "middle", ("cool", "neutral", "warm"), 1, False, (1.0, 0.0, 0.8), _temperature),
    Attribute("tint", "middle", ("magenta", "none", "green"), 1, True, (1.7, 0.0, 1.9), _tint),
    Attribute("vignetting", "middle", ("none", "slight", "strong"), 0, True, (0.0, 0.6, 1.6), _vignette,
              shows=_corners_changed),
    Attribute("noise", "low", ("clean", "grainy", "noisy"), 0, True, (0.0, 1.0, 2.8), _noise),
    Attribute("compression", "low", ("none", "visible", "heavy"), 0, True, (0.0, 1.2, 3.0), _compress),
)

ATTRIBUTES: Mapping[str, Attribute] = types.MappingProxyType({attribute.name: attribute for attribute in _ALL})
_ORDER = {name: place for place, name in enumerate(ATTRIBUTES)}

# Two edits of which one would make the other's label false or invisible are never made together.
NOT_TOGETHER: Mapping[frozenset[str], str] = types.MappingProxyType({
    frozenset(("sharpness", "compression")): "a blurred picture has no detail on which light compression shows",
    frozenset(("sharpness", "noise")): "coarse noise covers the detail whose loss would show",
    frozenset(("noise", "compression")): "coarse quantisation removes fine grain and keeps coarse grain",
    frozenset(("saturation", "compression")): "coarse quantisation takes colour away by itself",
    frozenset(("exposure", "contrast")): "a shift in stops is a gain too: it alters the contrast",
    frozenset(("exposure", "vignetting")): "clipped highlights fill dark corners, and dark corners lower the mean",
    frozenset(("exposure", "saturation")): "clipped channels lose their colour",
    frozenset(("contrast", "saturation")): "a gain about the mean of all channels scales the colour as well",
    frozenset(("noise", "saturation")): "coloured noise puts colour back into a grey picture",
    frozenset(("saturation", "temperature")): "a cast puts colour back into a grey picture",
    frozenset(("saturation", "tint")): "a cast puts colour back into a grey picture",
    frozenset(("temperature", "tint")): "two casts mix into a third",
    frozenset(("orientation", "tilt")): "left and right are ambiguous in an upended picture",
    frozenset(("occlusion", "vignetting")): "a dark object at the border passes for a dark corner",
})

# edited attribute -> attributes that are not asked about when they themselves are neutral, because the edit makes
# the neutral answer doubtful.
NOT_ASKED: Mapping[str, Mapping[str, str]] = types.MappingProxyType({
    "noise": {"sharpness": "coarse noise covers fine detail"},
    "compression": {"sharpness": "quantisation removes fine detail",
                    "saturation": "coarse quantisation takes colour away", "tint": "and falsifies what is left of it"},
    "exposure": {"contrast": "a shift in stops alters the contrast",
                 "saturation": "clipped channels lose their colour"},
    "contrast": {"saturation": "flat pictures are pale, harsh ones colourful",
                 "exposure": "harsh contrast clips the dark and bright parts"},
    "tint": {"saturation": "a cast is colour"},
    "vignetting": {"exposure": "dark corners lower the mean"},
    "occlusion": {"vignetting": "a dark object at the border passes for a dark corner",
                  "exposure": "a dark or bright object shifts the mean"},
    "orientation": {"tilt": "left and right are ambiguous in an upended picture"},
    "tilt": {"orientation": "turning is what orientation asks about"},
})

# Mean difference of the highest and the lowest channel, grey levels, below which a picture has no colour to speak of.
COLOURLESS = 3.0


def get(name: str) -> Attribute:
    """The attribute of that name. Raises ConfigError with the nearest name when there is none."""
    if name not in ATTRIBUTES:
        raise ConfigError(f"there is no attribute {name!r}{nearest(name, ATTRIBUTES)}")
    return ATTRIBUTES[name]


def graded(label: str) -> tuple[int, int] | None:
    """What the label of a turn says of an attribute: its place in ATTRIBUTES, and the grade; None of other labels."""
    name, _, grade = label.partition("=")
    return (_ORDER[name], int(grade)) if name in _ORDER and grade.isdigit() else None


def phrases() -> tuple[tuple[str, ...], ...]:
    """Of each attribute its name, then the names of its grades."""
    return tuple((attribute.name, *attribute.grades) for attribute in ATTRIBUTES.values())


def of_level(level: str) -> tuple[Attribute, ...]:
    """The attributes of a level, in the order in which they are applied."""
    return tuple(attribute for attribute in ATTRIBUTES.values() if attribute.level == level)


def ordered(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """Edits in the order that keeps their labels true: geometry, blur, tone, colour, noise, compression."""
    return tuple(sorted(edits, key=lambda edit: _ORDER[get(edit.attribute).name]))


@functools.cache
def exclusions(name: str) -> int:
    """How many attributes an edit of this one can not be made beside, itself counted: at least 1."""
    return 1 + sum(name in pair for pair in NOT_TOGETHER)


def consistent(grades: Mapping[str, int]) -> bool:
    """Whether all these labels (attribute -> grade) are true and visible on one picture edited accordingly."""
    edited = {name for name, grade in grades.items() if grade != get(name).neutral}
    hidden = {name for other in edited for name in NOT_ASKED.get(other, ())}
    return together(edited) and not hidden & (grades.keys() - edited)


def together(names: Iterable[str]) -> bool:
    """Whether edits of these attributes leave each other's labels true."""
    names = set(names)
    return not any(pair <= names for pair in NOT_TOGETHER)


def apply(pixels: Picture, edit: Edit) -> Picture:
    """The picture after one edit, of the same shape; the neutral grade returns it unchanged.

    Args:
      pixels: RGB 0..255, without padding.
      edit: its seed alone decides the strength inside the grade and every random draw.
    Raises:
      ConfigError: no such attribute or grade.
    """
    attribute = get(edit.attribute)
    if not 0 <= edit.grade < len(attribute.grades):
        raise ConfigError(
            f"{attribute.name} has the grades 0 to {len(attribute.grades) - 1}, not {edit.grade}")
    if edit.grade == attribute.neutral:
        return pixels
    return attribute.operation(np.ascontiguousarray(pixels), edit.grade, np.random.default_rng(edit.seed))


def is_noop(before: Picture, after: Picture, edit: Edit) -> bool:
    """Whether an edit changed nothing visible, such as the saturation of a grey picture: its label would be false."""
    attribute = get(edit.attribute)
    return edit.grade != attribute.neutral and not attribute.shows(before, after, edit.grade)


def unanswerable(pixels: Picture) -> frozenset[str]:
    """Attributes about which an untouched picture has no true answer: colours of a grey picture, all of a blank one."""
    counts = np.asarray(Image.fromarray(pixels).histogram()).reshape(3, 256).sum(0)  # far cheaper than the pixels
    mean = counts @ _LEVELS / pixels.size
    if np.sqrt(counts @ np.square(_LEVELS - mean) / pixels.size) < COLOURLESS:
        return frozenset(ATTRIBUTES)
    red, green, blue = (pixels[..., channel] for channel in range(3))
    chroma = float((np.maximum(np.maximum(red, green), blue) - np.minimum(np.minimum(red, green), blue)).mean())
    return frozenset(("saturation",)) if chroma < COLOURLESS else frozenset()


@functools.cache
def _phrases(name: str, file: str) -> tuple[dict[str, int], dict[str, str]]:
    names, cues = get(name).grades, cues_lib.bank(file)[name]
    grades = {cues_lib.normal(text): grade for grade, texts in enumerate(cues.answers)
              for text in (names[grade], *texts)}
    choices = {cues_lib.normal(text): which for template in cues.more_answers + cues.less_answers
               for which, text in zip(cues_lib.CHOICES, cues_lib.variations(template), strict=True)}
    return grades, choices


def grade_of(attribute: str, text: str, file: str = "") -> int | None:
    """The grade that an answer states, or None. Case, white space and the full stop do not matter.

    `file` holds further phrases, as the config field `cues`.
    """
    return _phrases(attribute, file)[0].get(cues_lib.normal(text))


def choice_of(attribute: str, text: str, file: str = "") -> str | None:
    """`first` or `second`, as an answer to a comparison states it, or None; otherwise as `grade_of`."""
    return _phrases(attribute, file)[1].get(cues_lib.normal(text))
