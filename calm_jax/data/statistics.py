"""A picture in, numbers measured on it; numbers of a data set in, the tenth of it in which each picture lies, out.

Dense supervision of our own: every untouched picture has two dozen true answers that no one had to write, so that many
short questions share one encoding. A statistic is measured on the picture fitted to SIZE, never on the padding, and
asked as a tenth of its data set: `7 of 10` is true there whatever the unit. What cannot be told is not asked: a
statistic that has no answer on a picture (the hue of a grey one) is NaN, and a value that more than a tenth of the data
set shares (no clipped pixel at all) has no tenth.

At prepare time: `measure` every picture, `edges_of` the training split, `deciles_of` every split, `unfit` every
picture; `Record.deciles` and `Record.unfit` carry the results and `data/tasks/measured.py` asks. All of them together
take 3 ms a picture on one core of a Xeon (2026-11-21). Sources name where a measure comes from; thresholds are ours.
"""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from einops import rearrange, reduce
from jaxtyping import Float, Int32, UInt8

from calm_jax.data import pictures, statistics_cues
from calm_jax.errors import ConfigError, nearest

Picture = UInt8[np.ndarray, "H W 3"]
Values = Float[np.ndarray, "n"]
Edges = Float[np.ndarray, "9"]

SIZE = 224  # longest side on which everything is measured, pixels
SMALLEST = 16  # shortest side, pixels, below which a picture has no statistics but its format
FEWEST = 20  # measured values below which a data set has no tenths
CLIPPED, CRUSHED = 250, 5  # grey levels from which on a pixel counts as clipped, and up to which as crushed
EDGE = 24.1  # grey levels a pixel from which on a gradient is an edge; no square of it is whole, so none lies on it
FREE = 3.0  # mean gradient, grey levels a pixel, below which a cell of the picture is empty
CELL = 8  # side of such a cell, pixels
COLOURLESS = 3.0  # mean chroma, grey levels, below which a picture has no hue
ONE_HUE = 0.5  # concentration below which no hue dominates
BLANK = 1.0  # standard deviation of the luminance, grey levels, below which nothing can be located


class View:
    """A fitted picture and what several statistics share, each computed once, when it is first wanted."""

    def __init__(self, pixels: Picture):
        self.pixels = pixels
        self.height, self.width = pixels.shape[:2]

    @functools.cached_property
    def planes(self) -> Float[np.ndarray, "3 H W"]:
        return np.ascontiguousarray(rearrange(self.pixels, "h w c -> c h w")).astype(np.float32)

    @functools.cached_property
    def thousandths(self) -> Int32[np.ndarray, "H W"]:
        """Rec. 601 luma in thousandths of a grey level: exact, where equal values and ranks matter."""
        red, green, blue = (self.pixels[..., channel].astype(np.int32) for channel in range(3))
        return 299 * red + 587 * green + 114 * blue

    @functools.cached_property
    def luma(self) -> Float[np.ndarray, "H W"]:
        """Rec. 601 luma, 0..255."""
        return self.thousandths * np.float32(0.001)

    @functools.cached_property
    def gradient(self) -> Float[np.ndarray, "H-1 W-1"]:
        """Magnitude of the forward differences of the luma, grey levels a pixel."""
        luma = self.luma
        down, right = luma[1:, :-1] - luma[:-1, :-1], luma[:-1, 1:] - luma[:-1, :-1]
        return np.sqrt(down * down + right * right)

    @functools.cached_property
    def laplacian(self) -> Float[np.ndarray, "H-2 W-2"]:
        """The four-neighbour Laplacian of the luma."""
        luma = self.luma
        return luma[:-2, 1:-1] + luma[2:, 1:-1] + luma[1:-1, :-2] + luma[1:-1, 2:] - 4 * luma[1:-1, 1:-1]

    @functools.cached_property
    def extremes(self) -> tuple[UInt8[np.ndarray, "H W"], UInt8[np.ndarray, "H W"]]:
        """The lowest and the highest channel of each pixel."""
        red, green, blue = (self.pixels[..., channel] for channel in range(3))
        return (np.minimum(np.minimum(red, green), blue), np.maximum(np.maximum(red, green), blue))

    @functools.cached_property
    def hue_vector(self) -> tuple[float, float, float]:
        """Mean of the pixels' chroma vectors (alpha, beta) on the hexagon's axes, and mean length of the vectors.

        The direction of a sum of vectors is the chroma-weighted circular mean (Fisher 1993), without an arctangent a
        pixel.
        """
        red, green, blue = self.planes
        alpha = red - (green + blue) * np.float32(0.5)
        beta = (green - blue) * np.float32(np.sqrt(0.75))
        return float(alpha.mean()), float(beta.mean()), float(np.sqrt(alpha * alpha + beta * beta).mean())

    @functools.cached_property
    def blank(self) -> bool:
        return float(self.luma.std()) < BLANK

    @functools.cached_property
    def means(self) -> Float[np.ndarray, "3"]:
        return self.planes.mean((1, 2), dtype=np.float64)


def _entropy(counts: np.ndarray) -> float:
    share = counts[counts > 0] / counts.sum()
    return float(-(share * np.log2(share)).sum())


def _colourfulness(view: View) -> float:
    red, green, blue = view.planes
    red_green, yellow_blue = red - green, (red + green) * np.float32(0.5) - blue
    spread = np.hypot(red_green.std(dtype=np.float64), yellow_blue.std(dtype=np.float64))
    centre = np.hypot(red_green.mean(dtype=np.float64), yellow_blue.mean(dtype=np.float64))
    return float(spread + 0.3 * centre)


def _grain(view: View) -> float:
    # The median of the absolute responses instead of their mean: texture and edges fill the tail, noise the middle.
    second = np.diff(np.diff(view.thousandths, 2, 0), 2, 1)
    return float(np.median(np.abs(second))) / (6745 * 0.6)


def _vividness(view: View) -> float:
    low, high = view.extremes  # black has no saturation: 0 by 1
    return float(((high - low) / np.maximum(high, 1).astype(np.float32)).mean(dtype=np.float64))


def _tones(view: View) -> float:
    return _entropy(np.bincount(((view.thousandths + 500) // 1000).ravel()))


def _hue(view: View) -> float:
    alpha, beta, chroma = view.hue_vector
    if chroma < COLOURLESS or np.hypot(alpha, beta) < ONE_HUE * chroma:
        return np.nan
    return float((np.rad2deg(np.arctan2(beta, alpha)) + HUE_START) % 360.0)


def _hue_unity(view: View) -> float:
    alpha, beta, chroma = view.hue_vector
    return float(np.hypot(alpha, beta) / chroma) if chroma >= COLOURLESS else np.nan


def _colour_variety(view: View) -> float:
    coarse = (view.pixels >> 5).astype(np.int32)
    return _entropy(np.bincount((coarse[..., 0] * 64 + coarse[..., 1] * 8 + coarse[..., 2]).ravel()))


def _falloff(view: View) -> float:
    high, wide = view.height // 6, view.width // 6
    rows, columns = (slice(None, high), slice(-high, None)), (slice(None, wide), slice(-wide, None))
    corners = np.mean([view.luma[row, column].mean() for row in rows for column in columns])
    centre = view.luma[2 * high:-2 * high, 2 * wide:-2 * wide].mean()
    return float(np.log2((centre + 1.0) / (corners + 1.0)))


def _symmetry(view: View) -> float:
    if view.blank:
        return np.nan
    luma = view.luma - view.luma.mean()
    return float((luma * luma[:, ::-1]).mean() / (luma * luma).mean())


def _centroid(view: View, axis: int) -> float:
    if view.blank:
        return np.nan
    profile = view.gradient.sum(1 - axis, dtype=np.float64)
    return float((profile @ np.linspace(0.0, 1.0, len(profile))) / profile.sum())


def _thirds(view: View) -> float:
    if view.blank:
        return np.nan
    height, width = view.gradient.shape
    reach = (round(height / 12), round(width / 12))
    patches = (view.gradient[y - reach[0]:y + reach[0], x - reach[1]:x + reach[1]].sum()
               for y in (round(height / 3), round(2 * height / 3)) for x in (round(width / 3), round(2 * width / 3)))
    return float(sum(patches) / view.gradient.sum())


def _centre_focus(view: View) -> float:
    if view.blank:
        return np.nan
    power = view.laplacian * view.laplacian
    high, wide = power.shape[0] // 4, power.shape[1] // 4
    return float(power[high:-high, wide:-wide].sum() / power.sum())


def _free_space(view: View) -> float:
    height, width = (side // CELL * CELL for side in view.gradient.shape)
    cells = reduce(view.gradient[:height, :width], "(h a) (w b) -> h w", "mean", a=CELL, b=CELL)
    return float((cells < FREE).mean())


def _light_above(view: View) -> float:
    third = view.height // 3
    return float(view.luma[:third].mean(dtype=np.float64) - view.luma[-third:].mean(dtype=np.float64))


def _balance(view: View) -> float:
    half = view.width // 2
    return float(view.luma[:, -half:].mean(dtype=np.float64) - view.luma[:, :half].mean(dtype=np.float64))


@dataclasses.dataclass(frozen=True)
class Statistic:
    """One number of an untouched picture.

    Attributes:
      name: as in `Record.deciles`; never the name of an attribute, whose grades are another thing.
      level: low, middle or high: the part of the model that answers for it.
      meaning: definition, unit and source in a sentence.
      measure: View -> number, NaN where the picture has no answer; small pictures are never given to it.
      edges: where the places 0 to 9 are the same in every data set (the sectors of the hue circle), else None.
    """

    name: str
    level: str
    meaning: str
    measure: Callable[[View], float] = dataclasses.field(repr=False)
    edges: tuple[float, ...] | None = None

    @property
    def cues(self) -> statistics_cues.Cues:
        """What is asked and said about it."""
        return statistics_cues.CUES[self.name]

    @property
    def circular(self) -> bool:
        """Whether its places are sectors with names and without an order."""
        return self.edges is not None


# The hue circle begins where red does; nine edges between the ten names of `statistics_cues`, degrees from there.
HUE_START = 18.0
_HUES = (32.0, 63.0, 85.0, 110.0, 173.0, 207.0, 233.0, 275.0, 310.0)

_ALL = (
    Statistic("brightness", "low", "mean Rec. 601 luma, 0..255", lambda view: float(view.luma.mean(dtype=np.float64))),
    Statistic("tonal_spread", "low", "RMS contrast: standard deviation of the luma, 0..127.5 (Peli 1990)",
              lambda view: float(view.luma.std(dtype=np.float64))),
    Statistic("acuity", "low", "variance of the Laplacian of the luma (Pech-Pacheco et al. 2000)",
              lambda view: float(view.laplacian.var(dtype=np.float64))),
    Statistic("grain", "low", "standard deviation of the noise, grey levels: the estimate of Immerkaer 1996, from the "
              "median instead of the mean", _grain),
    Statistic("highlights", "low", f"share of the pixels with a channel of at least {CLIPPED}",
              lambda view: float((view.extremes[1] >= CLIPPED).mean())),
    Statistic("shadows", "low", f"share of the pixels with no channel above {CRUSHED}",
              lambda view: float((view.extremes[1] <= CRUSHED).mean())),
    Statistic("edge_density", "low", f"share of the pixels with a gradient of at least {EDGE:.1f} grey levels a pixel",
              lambda view: float((view.gradient >= np.float32(EDGE)).mean())),
    Statistic("tones", "low", "entropy of the luma in 256 grey levels, bits (Shannon 1948)", _tones),
    Statistic("colourfulness", "middle", "sigma + 0.3 mu of the opponent channels (Hasler and Suesstrunk 2003)",
              _colourfulness),
    Statistic("vividness", "middle", "mean saturation of the hexcone model, 0..1 (Smith 1978)", _vividness),
    Statistic("hue", "middle", f"direction of the mean chroma vector, degrees from {-HUE_START:.0f}; NaN on grey "
              "pictures and where no hue dominates (Fisher 1993)", _hue, edges=_HUES),
    Statistic("hue_unity", "middle", "length of the mean chroma vector by the mean length, 0..1; NaN on grey pictures "
              "(Fisher 1993)", _hue_unity),
    Statistic("warmth", "middle", "mean of red less blue by their sum, -1..1 (ours)",
              lambda view: float((view.means[0] - view.means[2]) / max(view.means[0] + view.means[2], 1.0))),
    Statistic("greenness", "middle", "mean of green less the mean of red and blue, by the sum of the channels (ours)",
              lambda view: float((view.means[1] - (view.means[0] + view.means[2]) / 2) / max(view.means.sum(), 1.0))),
    Statistic("colour_variety", "middle", "entropy of the colours in 8 x 8 x 8 bins, bits (Shannon 1948)",
              _colour_variety),
    Statistic("falloff", "middle", "mean luma of the middle by that of the corners, octaves; the corners are a sixth "
              "of each side (ours)", _falloff),
    Statistic("symmetry", "high", "correlation of the luma with its mirror image, left and right; NaN on blank "
              "pictures (ours)", _symmetry),
    Statistic("detail_height", "high", "vertical centroid of the gradient, 0 at the top, 1 at the bottom (ours)",
              lambda view: _centroid(view, 0)),
    Statistic("detail_side", "high", "horizontal centroid of the gradient, 0 at the left, 1 at the right (ours)",
              lambda view: _centroid(view, 1)),
    Statistic("thirds", "high", "share of the gradient in four patches about the crossings of the thirds, a ninth of "
              "the area (ours; after the rule of thirds in Datta et al. 2006)", _thirds),
    Statistic("centre_focus", "high", "share of the squared Laplacian in the middle quarter of the area (ours; after "
              "the indicator of a low depth of field in Datta et al. 2006)", _centre_focus),
    Statistic("free_space", "high", f"share of {CELL} x {CELL} cells with a mean gradient below {FREE:.0f} (ours)",
              _free_space),
    Statistic("light_above", "high", "mean luma of the upper third less that of the lower (ours)", _light_above),
    Statistic("light_right", "high", "mean luma of the right half less that of the left (ours)", _balance),
    Statistic("format", "high", "width by height, octaves: 0 is square",
              lambda view: float(np.log2(view.width / view.height))),
)

STATISTICS: Mapping[str, Statistic] = types.MappingProxyType({statistic.name: statistic for statistic in _ALL})


# attribute -> (statistic, lowest, highest) of the untouched pictures about whose grade one can ask without another
# picture beside it: a night scene is no underexposed noon. Chosen on PARA so that one threshold on an independent
# measure tells neighbouring grades apart on at least 95 % of the pictures.
FIT: Mapping[str, tuple[str, float, float]] = types.MappingProxyType({
    "sharpness": ("acuity", 550.0, np.inf),
    "noise": ("grain", 0.0, 6.0),
    "exposure": ("brightness", 82.0, 133.0),
    "contrast": ("tonal_spread", 36.0, 69.0),
    "saturation": ("colourfulness", 28.0, 80.0),
    "tint": ("greenness", -0.03, 0.035),
    "vignetting": ("falloff", -0.25, 0.15),
})


def get(name: str) -> Statistic:
    """The statistic of that name. Raises ConfigError with the nearest name when there is none."""
    if name not in STATISTICS:
        raise ConfigError(f"there is no statistic {name!r}{nearest(name, STATISTICS)}")
    return STATISTICS[name]


def of_level(level: str) -> tuple[Statistic, ...]:
    """The statistics of a level."""
    return tuple(statistic for statistic in STATISTICS.values() if statistic.level == level)


def measure(pixels: Picture) -> dict[str, float]:
    """Every statistic of a stored picture, measured on it fitted to SIZE; NaN where it has no answer.

    Args:
      pixels: the whole picture, RGB 0..255, without window and edits.
    Raises:
      BadRecord: the picture is empty.
    """
    return measure_fitted(pictures.fit(pixels, SIZE))


def measure_fitted(pixels: Picture) -> dict[str, float]:
    """As `measure`, of a picture that is already fitted."""
    view = View(pixels)
    small = min(pixels.shape[:2]) < SMALLEST
    return {name: np.nan if small and name != "format" else statistic.measure(view)
            for name, statistic in STATISTICS.items()}


def unfit(measured: Mapping[str, float]) -> tuple[str, ...]:
    """Attributes whose absolute question has no true answer on a picture of which `measure` gave this, for
    `Record.unfit`: it is by itself too dark, too pale, too noisy, ... for its untouched grade to be called neutral, or
    was not measured. Comparisons and other attributes are not concerned."""
    return tuple(name for name, (statistic, lowest, highest) in FIT.items()
                 if not lowest <= measured[statistic] <= highest)


def edges(values: Values) -> Edges:
    """The nine edges between the tenths of a data set: linear quantiles of the values that are not NaN.

    All NaN, so that nothing is asked, where fewer than FEWEST values were measured or the values do not differ.
    """
    values = np.asarray(values, np.float64)
    values = values[~np.isnan(values)]
    if len(values) < FEWEST or values.min() == values.max():
        return np.full(9, np.nan)
    return np.quantile(values, np.arange(1, 10) / 10)


def decile(value: float, edges: Edges) -> int | None:
    """The tenth of a value, 0 to 9; a value on an edge belongs to the tenth above.

    None where it has none: NaN, no edges, or two edges and more at the value itself, which a tenth of the data set and
    more share.
    """
    edges = np.asarray(edges, np.float64)
    if np.isnan(value) or np.isnan(edges).any():
        return None
    below, place = np.searchsorted(edges, value, "left"), np.searchsorted(edges, value, "right")
    return int(place) if place - below <= 1 else None


def edges_of(many: Mapping[str, Values]) -> dict[str, Edges]:
    """statistic -> its edges, of statistic -> the values of a data set, as `columns` gives them."""
    return {name: np.asarray(get(name).edges, np.float64) if get(name).circular else edges(values)
            for name, values in many.items()}


def deciles_of(many: Mapping[str, Values], edges: Mapping[str, Edges] | None = None) -> list[dict[str, int]]:
    """For every picture of a data set what `Record.deciles` holds: statistic -> tenth, those without one left out.

    Args:
      many: statistic -> value of every picture.
      edges: as of `edges_of`, of the training split where `many` is another; None = of `many` itself.
    """
    edges = edges_of(many) if edges is None else edges
    places = {name: [decile(value, edges[name]) for value in values] for name, values in many.items()}
    count = len(next(iter(many.values()), ()))
    return [{name: column[index] for name, column in places.items() if column[index] is not None}
            for index in range(count)]


def columns(measured: Sequence[Mapping[str, float]]) -> dict[str, Values]:
    """What `measure` gave of many pictures, as statistic -> values in their order."""
    return {name: np.asarray([one[name] for one in measured], np.float64) for name in STATISTICS}


@functools.cache
def _phrases(name: str) -> Mapping[str, str]:
    """Normalised answer -> what it states."""
    statistic = get(name)
    cues = statistic.cues
    if statistic.circular:
        return {statistics_cues.normal(text): str(place)
                for place in range(len(cues.words)) for text in cues.answers(place)}
    texts = {statistics_cues.tenth(place): str(place) for place in range(10)}
    texts |= {text: f"level{level}" for level in range(len(cues.words)) for text in cues.answers(level)}
    for which in statistics_cues.CHOICES:
        texts |= {text: which for text in cues.chosen(which)}
    return {statistics_cues.normal(text): stated for text, stated in texts.items()}


def said(name: str, text: str) -> str | None:
    """What an answer states, as the part of a turn's label behind the name: `0` to `9`, `level0` to `level4`, `first`
    or `second`; None when it is no answer to this statistic. Case, white space and the full stop do not matter."""
    return _phrases(name).get(statistics_cues.normal(text))
