"""Functions that draw on matplotlib's axes in, SVG elements that stand inside a page and take its colours out."""

from __future__ import annotations

import io
import re
from collections.abc import Callable

import numpy as np
from jaxtyping import Float

# Drawn in these colours, then replaced by the page's own, which differ by light and dark.
INK, GRID = "#010203", "#040506"
BLUE, ORANGE, GREY, GREEN, VIOLET = "#3b82c4", "#d9782d", "#8a8f98", "#3a9d6a", "#9a6bd1"


def plot(name: str, draw: Callable, *, width: float = 4.2, height: float = 2.9) -> str:
    """An SVG element to stand inside a page: text stays text, and ink and grid take the page's colours.

    Args:
      name: unique on the page; keeps the ids of several plots apart.
      draw: function of the axes.
      width, height: inches of 72 units.
    """
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.style import context
    style = {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 9.5, "text.color": INK,
             "axes.labelcolor": INK, "axes.edgecolor": GRID, "axes.grid": True, "grid.color": GRID,
             "grid.linewidth": 0.6, "xtick.color": INK, "ytick.color": INK, "axes.spines.top": False,
             "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 9, "axes.axisbelow": True,
             "xtick.major.size": 0, "ytick.major.size": 0}
    with context(style):
        figure_ = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure_)
        draw(figure_.add_subplot())
        file = io.StringIO()
        figure_.savefig(file, format="svg", transparent=True)
    svg = file.getvalue()
    svg = svg[svg.index("<svg"):]
    svg = re.sub(r"<metadata>.*?</metadata>\s*", "", svg, flags=re.DOTALL)
    svg = re.sub(r"<style[^>]*>.*?</style>\s*", "", svg, flags=re.DOTALL)  # would hold for the whole page
    svg = re.sub(r' xmlns(:xlink)?="[^"]*"| version="[^"]*"| (width|height)="[\d.]+pt"', "", svg.split(">", 1)[0]
                 ) + ">" + svg.split(">", 1)[1]
    prefix = re.sub(r"\W+", "-", name)
    svg = re.sub(r'\bid="', f'id="{prefix}-', svg)
    svg = svg.replace("xlink:href=\"#", f'xlink:href="#{prefix}-').replace("url(#", f"url(#{prefix}-")
    svg = re.sub(r"font: ([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    svg = svg.replace(INK, "currentColor").replace(GRID, "var(--line)")
    return svg.replace("<svg", f'<svg class="plot" role="img" aria-label="{prefix}"', 1)


def smooth(values: Float[np.ndarray, "n"], span: float = 0.12) -> Float[np.ndarray, "n"]:
    """A running mean over `span` of the points, centred; the ends average what there is."""
    reach = max(int(len(values) * span / 2), 1)
    return np.asarray([values[max(i - reach, 0):i + reach + 1].mean() for i in range(len(values))])
