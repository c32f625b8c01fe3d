"""A result of calm_jax.evaluate in; a picture of it, as a PNG file, out."""

from __future__ import annotations

import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from calm_jax import files
from calm_jax.data.scale import HIGHEST, LOWEST
from calm_jax.evaluation import plots

BINS = 10  # of the calibration curve, with equally many pictures each


def write(result: Mapping[str, Any], file: pathlib.Path) -> pathlib.Path | None:
    """Draws a result; returns the file, or None where there is nothing to draw or matplotlib is not installed."""
    draw = {"scoring": _scores, "suggesting": _suggestions, "personalised": _shots}.get(result["task"])
    if draw is None:
        return None
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return None
    figure = Figure(figsize=(9.5, 4.4) if draw is _scores else (7, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    draw(figure, result)
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    files.write(file, picture.getvalue())
    return file


def calibration(said: Sequence[float], true: Sequence[float]) -> tuple[np.ndarray, np.ndarray]:
    """Means of predictions and of truths in bins of equally many pictures, from low predictions to high ones."""
    said, true = np.asarray(said, float), np.asarray(true, float)
    parts = np.array_split(np.argsort(said, kind="stable"), min(BINS, max(len(said), 1)))
    return np.asarray([said[part].mean() for part in parts]), np.asarray([true[part].mean() for part in parts])


def _scores(figure, result) -> None:
    points = np.asarray([(float(item["said"]), float(item["true"].rstrip("."))) for item in result["answers"]
                         if item["said"]]).reshape(-1, 2)
    scatter, curve = figure.subplots(1, 2)
    for axes in (scatter, curve):
        axes.set(xlabel=f"score of the model ({result['reader']})", ylabel="score of the raters")
    if not len(points):
        return
    scatter.plot(*points.T, "o", color=plots.BLUE, alpha=0.35, markersize=3, markeredgewidth=0)
    scatter.plot([LOWEST, HIGHEST], [LOWEST, HIGHEST], "--", color=plots.GREY, linewidth=1)
    scatter.set(xlim=(LOWEST, HIGHEST), ylim=(LOWEST, HIGHEST), aspect="equal")
    means = calibration(*points.T)
    curve.plot(*means, "o-", color=plots.BLUE)
    ends = [min(map(min, means)), max(map(max, means))]
    curve.plot(ends, ends, "--", color=plots.GREY, linewidth=1)
    curve.set_title("calibration: means of tenths of the pictures", fontsize=10)


def _suggestions(figure, result) -> None:
    axes, rows = figure.subplots(), result["table"][::-1]
    places = np.arange(len(rows))
    axes.barh(places, [row["right"] for row in rows], color=plots.BLUE, height=0.6, label="right")
    axes.plot([row["elsewhere"] for row in rows], places, "|", color="black", markersize=12,
              label="advised to other photographs")
    if "control" in rows[0]:
        axes.plot([row["control"] for row in rows], places, "x", color=plots.ORANGE, label="control")
    axes.set_yticks(places, [row["flaw"] for row in rows])
    axes.set_xlabel("share of suggestions that undo the flaw")
    axes.legend(frameon=False)


def _shots(figure, result) -> None:
    axes, rows = figure.subplots(), result["table"]
    for arm, colour, label in (("own", plots.BLUE, "true ratings"), ("permuted", plots.ORANGE, "permuted")):
        mine = [row for row in rows if row["arm"] == arm and row["srcc"] is not None]
        if mine:
            low, high = np.asarray([row["srcc_interval"] for row in mine]).T
            shots, means = [row["shots"] for row in mine], np.asarray([row["srcc"] for row in mine])
            axes.errorbar(shots, means, yerr=[means - low, high - means], fmt="o-", color=colour, capsize=3,
                          label=label)
    for row in rows:
        if row["arm"] == "crowd" and row["srcc"] is not None:
            axes.axhline(row["srcc"], color=plots.GREY, linestyle="--", label="the crowd's mean score")
    axes.set(xlabel="rated pictures", ylabel="SRCC, mean over raters", xticks=sorted({r["shots"] for r in rows}))
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)  # above: lines cross the plot
