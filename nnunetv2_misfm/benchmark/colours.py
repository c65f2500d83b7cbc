"""Colours, markers and font sizes of a report's figures: a trainer has the same everywhere."""

from collections.abc import Sequence
from typing import Any

from matplotlib import colormaps
from matplotlib.colors import to_hex

# Okabe and Ito's colours for the colour-blind; black first, as stock mostly is, and yellow, faint on white, last
OKABE_ITO = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442")
# The same without black, the brightest first
BRIGHT = ("#E69F00", "#56B4E9", "#CC79A7", "#F0E442", "#009E73", "#D55E00", "#0072B2")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
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
