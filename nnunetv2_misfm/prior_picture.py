"""A picture of how alike the learned priors of a universal model are: tasks, modalities, and one with the other.

Paper: Gao et al., Training Like a Medical Resident: Context-Prior Learning Toward Universal Medical Image
Segmentation, CVPR 2024, arXiv:2306.02416. The tokens of a task or modality at the network's scales differ in width and
length; here (our choice) each is scaled to unit length before they are joined, so that each scale counts the same.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.universe import PLANS_KEY, Universe
from nnunetv2_misfm.weights.checkpoint import network_weights, read_checkpoint

# Values are written into the cells of no more rows than this (ours: beyond, a picture is read by its colours)
_MOST_ROWS_WITH_VALUES = 12
# Inches of a cell with a value in it, and of one without, which is as high as a line of its name
_CELL_INCHES = (0.46, 0.19)
_NAME_POINTS = 9
_VALUE_POINTS = 8
# Width and height of the colour bar; room between it and the maps, which holds its ticks and their titles, above it for
# the figure's title, between the task map and the one that shares its rows, and before the modality map
_BAR_INCHES = (2.2, 0.13)
_ABOVE_MAPS_INCHES = 0.75
_ABOVE_BAR_INCHES = 0.4
_GAPS_INCHES = (0.2, 0.45)
# Width of the title "tasks and modalities", whose map may be narrower
_BETWEEN_TITLE_INCHES = 1.75
_DOTS_PER_INCH = 140
# Colour-blind safe, white at 0; its ends are dark beyond this value, so that writing on them is white
_COLOURS: dict[str, Any] = {"cmap": "RdBu_r", "norm": Normalize(-1, 1)}
_DARK_FROM = 0.6


class Similarities(NamedTuple):
    """Cosine similarities of priors.

    Attributes:
        rows: Names of tasks or modalities.
        columns: The same.
        cosine: float64 [rows, columns], -1 to 1.
    """

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cosine: np.ndarray


class PriorSimilarities(NamedTuple):
    """The three maps of a universal model.

    Attributes:
        tasks: Of each task with each task.
        between: Of each task (row) with each modality (column).
        modalities: Of each modality with each modality.
    """

    tasks: Similarities
    between: Similarities
    modalities: Similarities


def prior_similarities(weights: Mapping[str, torch.Tensor], universe: Universe) -> PriorSimilarities:
    """Returns the similarities of a universal model's tasks and modalities, in the model's order.

    A task is its tokens of all scales, each scaled to unit length, joined to one vector; a modality the same of the
    mean over its tokens of each scale. At each scale both live in the same channels.

    Args:
        weights: State dict of a `ContextPriorNetwork`.
        universe: The names of its tasks and modalities.

    Raises:
        MisfmError: The weights hold no priors, or other numbers of them than there are names, or no finite numbers.
    """
    sites = [name.removesuffix("task_tokens") for name in weights if name.endswith(".task_tokens")]
    vectors = []
    for names, kind, one in ((universe.tasks, "tasks", "task"), (universe.modalities, "modalities", "modality")):
        scales = [weights[key].double().numpy() for site in sites if (key := f"{site}{one}_tokens") in weights]
        if not sites or [len(tokens) for tokens in scales] != [len(names)] * len(sites):
            got = f"{', '.join(str(len(tokens)) for tokens in scales)} of them" if scales else "none"
            raise MisfmError(
                f"expected the learned tokens of {len(names)} {kind} at each scale, got {got}: use a checkpoint of "
                "nnUNetTrainerHermes."
            )
        if not all(np.isfinite(tokens).all() for tokens in scales):
            raise MisfmError(f"expected finite tokens of {kind}, got NaN or infinity: this training has diverged.")
        vectors.append(_joined([tokens.mean(1) if tokens.ndim == 3 else tokens for tokens in scales]))
    tasks, modalities = vectors
    return PriorSimilarities(
        Similarities(universe.tasks, universe.tasks, np.clip(tasks @ tasks.T, -1, 1)),
        Similarities(universe.tasks, universe.modalities, np.clip(tasks @ modalities.T, -1, 1)),
        Similarities(universe.modalities, universe.modalities, np.clip(modalities @ modalities.T, -1, 1)),
    )


def _joined(scales: list[np.ndarray]) -> np.ndarray:
    """Returns rows [n, sum of C] of unit length: those of each scale [n, C] at the same length, joined."""
    unit = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny) for rows in scales]
    return np.concatenate(unit, 1) / np.sqrt(len(scales))


def alike_together(priors: PriorSimilarities) -> PriorSimilarities:
    """Returns the same, tasks and modalities each in an order in which alike ones are neighbours, in all three maps."""
    tasks, modalities = _clustered(priors.tasks), _clustered(priors.modalities)
    orders = ((tasks, tasks), (tasks, modalities), (modalities, modalities))
    return PriorSimilarities(*(_reordered(part, *order) for part, order in zip(priors, orders, strict=True)))


def _clustered(part: Similarities) -> np.ndarray:
    """Returns the order of a hierarchical clustering (average linkage) of a symmetric map's rows."""
    if len(part.rows) < 3:
        return np.arange(len(part.rows))
    return leaves_list(linkage(squareform(1 - part.cosine, checks=False), "average", optimal_ordering=True))


def _reordered(part: Similarities, rows: np.ndarray, columns: np.ndarray) -> Similarities:
    """Returns a map with its rows and columns in other orders."""
    names = tuple(part.rows[i] for i in rows), tuple(part.columns[i] for i in columns)
    return Similarities(*names, part.cosine[np.ix_(rows, columns)])


def most_alike(part: Similarities) -> tuple[str, str, float] | None:
    """Returns the two names of highest similarity in a symmetric map, and their cosine; None where one is alone."""
    rows, columns = np.triu_indices(len(part.rows), 1)
    if not len(rows):
        return None
    values = part.cosine[rows, columns]
    best = int(values.argmax())
    return part.rows[rows[best]], part.rows[columns[best]], float(values[best])


def draw_priors(checkpoint: Path, output: Path) -> str:
    """Writes a PNG of the similarities between the priors of a universal model and returns a sentence on it.

    Args:
        checkpoint: Of nnUNetTrainerHermes.
        output: The PNG file to write, atomically; its folder is made.

    Raises:
        MisfmError: Not a universal model's checkpoint, or a file that cannot be read or written.
    """
    content = read_checkpoint(checkpoint)
    plans = (content.get("init_args") or {}).get("plans", {})
    weights = network_weights(content, checkpoint)
    if PLANS_KEY not in plans or not any(name.endswith(".task_tokens") for name in weights):
        raise MisfmError(
            f"{checkpoint}: expected a checkpoint of a universal model, which has priors to compare, got one of "
            f"{content.get('trainer_name', 'an unknown trainer')}: use one that nnUNetTrainerHermes wrote."
        )
    universe = Universe.from_plans(plans)
    try:
        priors = prior_similarities(weights, universe)
    except MisfmError as error:
        raise MisfmError(f"{checkpoint}: {error}") from error
    with style.context("default"):  # nnU-Net sets huge fonts for the whole process
        _write(_draw(universe.dataset, alike_together(priors)), output)
    if pair := most_alike(priors.tasks):
        first, second, cosine = pair
        return (
            f"wrote {output}: of {len(universe.tasks)} tasks {first} and {second} are most alike (cosine {cosine:.2f})."
        )
    return f"wrote {output}: {universe.tasks[0]} is the only task."


def _write(figure: Figure, output: Path) -> None:
    """Writes a PNG whole or not at all."""
    temporary = output.with_name(output.name + ".tmp")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            figure.savefig(temporary, format="png", bbox_inches="tight", pad_inches=0.15)
            os.replace(temporary, output)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MisfmError(f"{output} could not be written ({error.strerror}); check folder and disk.") from error


def _draw(dataset: str, priors: PriorSimilarities) -> Figure:
    """Returns the figure: title, colour bar, and below them the three maps, whose cells have a fixed size in inches."""
    tasks, between, modalities = (tuple(n * _cell_inches(part) for n in part.cosine.shape[::-1]) for part in priors)
    between_left = tasks[0] + _GAPS_INCHES[0]
    modalities_left = between_left + max(between[0], _BETWEEN_TITLE_INCHES) + _GAPS_INCHES[1]
    top = max(tasks[1], modalities[1])
    bar_bottom = top + _ABOVE_MAPS_INCHES
    width, height = modalities_left + modalities[0], bar_bottom + _BAR_INCHES[1] + _ABOVE_BAR_INCHES
    figure = Figure((width, height), _DOTS_PER_INCH)
    FigureCanvasAgg(figure)

    def place(left: float, bottom: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    figure.text(0, 1, f"Learned priors of {dataset}", va="top", fontsize="large", weight="bold", parse_math=False)
    bar = place(0, bar_bottom, *_BAR_INCHES)
    figure.colorbar(ScalarMappable(**_COLOURS), bar, orientation="horizontal", ticks=(-1, -0.5, 0, 0.5, 1))
    bar.text(1.05, 0.5, "cosine similarity", va="center", transform=bar.transAxes)
    places = (0, tasks), (between_left, between), (modalities_left, modalities)
    titles = ("tasks", "left"), ("tasks and modalities", "nowhere"), ("modalities", "right")
    for part, (left, (wide, high)), (title, names_on) in zip(priors, places, titles, strict=True):
        axes = place(left, top - high, wide, high)
        axes.set_title(title, loc="left")
        _draw_map(axes, part, names_on)
    return figure


def _cell_inches(part: Similarities) -> float:
    """Returns the edge of a map's cells."""
    return _CELL_INCHES[len(part.rows) > _MOST_ROWS_WITH_VALUES]


def _draw_map(axes: Axes, part: Similarities, names_on: str) -> None:
    """Draws a map with the columns' names below it, the rows' on a side, and values in its cells where rows are few."""
    axes.imshow(part.cosine, interpolation="nearest", **_COLOURS)
    axes.set_xticks(range(len(part.columns)), part.columns, rotation=90)
    axes.set_yticks(range(len(part.rows)), part.rows)
    axes.tick_params(length=0, labelsize=_NAME_POINTS, labelleft=names_on == "left", labelright=names_on == "right")
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a dollar in a name is a dollar
    if len(part.rows) > _MOST_ROWS_WITH_VALUES:
        return
    for (row, column), value in np.ndenumerate(part.cosine):
        colour = "white" if abs(value) > _DARK_FROM else "black"
        written = f"{round(value, 2) + 0.0:.2f}"  # no minus before 0.00
        axes.text(column, row, written, ha="center", va="center", fontsize=_VALUE_POINTS, color=colour)
