"""Colours, markers, fonts and legends of a report's figures: a trainer has the same everywhere."""

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps, style
from matplotlib.colors import to_hex
from matplotlib.textpath import TextPath

# Okabe and Ito's colours for the colour-blind; black first, as stock mostly is, and yellow, faint on white, last
OKABE_ITO = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
# The same without black, the brightest first
BRIGHT = ("#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#009E73", "#D55E00", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
# Of a legend's entry beside its text, in font sizes: matplotlib's handlelength, handletextpad and columnspacing
_BESIDE_TEXT = 2.0 + 0.8 + 2.0
_POINTS_PER_INCH = 72
# nnU-Net sets seaborn's huge fonts for the whole process, so everything that could differ is said here
STYLE: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.labelsize": 10,
    "xtick.labelsize": 9,
    "ytick.labelsize": 9,
    "legend.fontsize": 9,
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "axes.edgecolor": "#666666",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.8,
    "lines.linewidth": 1.8,
}


def trainer_colours(trainers: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each trainer, by its place among all trainers of the grid; from the ninth on they repeat."""
    return {trainer: OKABE_ITO[i % len(OKABE_ITO)] for i, trainer in enumerate(trainers)}


def trainer_markers(trainers: Sequence[str]) -> dict[str, str]:
    """Returns a marker for each trainer, by its place; with the ninth, where colours repeat, markers are shifted."""
    return {trainer: MARKERS[(i + i // len(OKABE_ITO)) % len(MARKERS)] for i, trainer in enumerate(trainers)}


def class_colours(labels: Sequence[str]) -> dict[str, str]:
    """Returns a colour for each class, bright enough to lie on a grey image; beyond 7 some are hard to tell apart."""
    if len(labels) <= len(BRIGHT):
        return dict(zip(labels, BRIGHT, strict=False))
    many = colormaps["tab20"]
    return {label: to_hex(many(i % many.N)) for i, label in enumerate(labels)}


def legend_columns(labels: Sequence[str], width_inches: float, font_size: float, at_most: int) -> int:
    """Returns in how many columns the entries of a legend fit a width; at least one.

    Args:
        labels: Texts of the entries, at least one.
        width_inches: Room for the legend.
        font_size: In points.
        at_most: Columns where there is room.
    """
    with style.context(["default", STYLE]):
        longest = max(TextPath((0, 0), label, size=font_size).get_extents().width for label in labels)
    fitting = int(width_inches * _POINTS_PER_INCH // (longest + _BESIDE_TEXT * font_size))
    rows = -(-len(labels) // max(1, min(at_most, fitting)))
    return -(-len(labels) // rows)  # rows of about the same length
