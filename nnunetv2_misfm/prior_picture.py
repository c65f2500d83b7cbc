"""A picture of how alike the learned priors of a universal model are: tasks beside modalities.

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
# the figure's title, and between the maps
_BAR_INCHES = (2.2, 0.13)
_ABOVE_MAPS_INCHES = 0.75
_ABOVE_BAR_INCHES = 0.4
_GAP_INCHES = 0.45
_DOTS_PER_INCH = 140
# Colour-blind safe, white at 0; its ends are dark beyond this value, so that writing on them is white
_COLOURS: dict[str, Any] = {"cmap": "RdBu_r", "norm": Normalize(-1, 1)}
_DARK_FROM = 0.6


class Similarities(NamedTuple):
    """Cosine similarities of the priors of one kind.

    Attributes:
        names: Of the tasks or modalities.
        cosine: float64 [names, names], -1 to 1.
    """

    names: tuple[str, ...]
    cosine: np.ndarray


def prior_similarities(weights: Mapping[str, torch.Tensor], universe: Universe) -> tuple[Similarities, Similarities]:
    """Returns the similarities of a universal model's tasks and of its modalities, in the model's order.

    A task is its tokens of all scales, each scaled to unit length, joined to one vector; a modality the same of the
    mean over its tokens of each scale.

    Args:
        weights: State dict of a `ContextPriorNetwork`.
        universe: The names of its tasks and modalities.

    Raises:
        MisfmError: The weights hold no priors, or other numbers of them than there are names, or no finite numbers.
    """
    tasks = [rows.double().numpy() for name, rows in weights.items() if name.endswith(".task_tokens")]
    modalities = [rows.double().mean(1).numpy() for name, rows in weights.items() if name.endswith(".modality_tokens")]
    for names, scales, kind in ((universe.tasks, tasks, "tasks"), (universe.modalities, modalities, "modalities")):
        if not scales or any(len(rows) != len(names) for rows in scales):
            got = f"{', '.join(str(len(rows)) for rows in scales)} of them" if scales else "none"
            raise MisfmError(
                f"expected the learned tokens of {len(names)} {kind} at each scale, got {got}: use a checkpoint of "
                "nnUNetTrainerHermes."
            )
        if not all(np.isfinite(rows).all() for rows in scales):
            raise MisfmError(f"expected finite tokens of {kind}, got NaN or infinity: this training has diverged.")
    return Similarities(universe.tasks, _cosine(tasks)), Similarities(universe.modalities, _cosine(modalities))


def _cosine(scales: list[np.ndarray]) -> np.ndarray:
    """Returns the cosines [n, n] between rows that are joined over scales [n, C], each scale at unit length."""
    unit = [rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(float).tiny) for rows in scales]
    joined = np.concatenate(unit, 1)
    return np.clip(joined @ joined.T / len(scales), -1, 1)


def alike_together(similarities: Similarities) -> Similarities:
    """Returns the same in the order of a hierarchical clustering (average linkage): alike ones are neighbours."""
    if len(similarities.names) < 3:
        return similarities
    distances = squareform(1 - similarities.cosine, checks=False)
    order = leaves_list(linkage(distances, "average", optimal_ordering=True))
    return Similarities(tuple(similarities.names[i] for i in order), similarities.cosine[np.ix_(order, order)])


def most_alike(similarities: Similarities) -> tuple[str, str, float] | None:
    """Returns the names of the two of highest similarity and their cosine; None where there is one alone."""
    rows, columns = np.triu_indices(len(similarities.names), 1)
    if not len(rows):
        return None
    values = similarities.cosine[rows, columns]
    best = int(values.argmax())
    return similarities.names[rows[best]], similarities.names[columns[best]], float(values[best])


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
        tasks, modalities = prior_similarities(weights, universe)
    except MisfmError as error:
        raise MisfmError(f"{checkpoint}: {error}") from error
    with style.context("default"):  # nnU-Net sets huge fonts for the whole process
        _write(_draw(universe.dataset, alike_together(tasks), alike_together(modalities)), output)
    if pair := most_alike(tasks):
        first, second, cosine = pair
        return f"wrote {output}: of {len(tasks.names)} tasks {first} and {second} are most alike (cosine {cosine:.2f})."
    return f"wrote {output}: {tasks.names[0]} is the only task."


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


def _draw(dataset: str, tasks: Similarities, modalities: Similarities) -> Figure:
    """Returns the figure: title, colour bar, and below them the two maps, whose cells have a fixed size in inches."""
    edges = [len(part.names) * _cell_inches(part) for part in (tasks, modalities)]
    bar_bottom = max(edges) + _ABOVE_MAPS_INCHES
    width, height = sum(edges) + _GAP_INCHES, bar_bottom + _BAR_INCHES[1] + _ABOVE_BAR_INCHES
    figure = Figure((width, height), _DOTS_PER_INCH)
    FigureCanvasAgg(figure)

    def place(left: float, bottom: float, wide: float, high: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, wide / width, high / height))

    figure.text(0, 1, f"Learned priors of {dataset}", va="top", fontsize="large", weight="bold", parse_math=False)
    bar = place(0, bar_bottom, *_BAR_INCHES)
    figure.colorbar(ScalarMappable(**_COLOURS), bar, orientation="horizontal", ticks=(-1, -0.5, 0, 0.5, 1))
    bar.text(1.05, 0.5, "cosine similarity", va="center", transform=bar.transAxes)
    lefts = (0, edges[0] + _GAP_INCHES)
    for part, left, edge, what in zip((tasks, modalities), lefts, edges, ("tasks", "modalities"), strict=True):
        axes = place(left, max(edges) - edge, edge, edge)
        axes.set_title(what, loc="left")
        _draw_map(axes, part, names_on_right=left > 0)
    return figure


def _cell_inches(part: Similarities) -> float:
    """Returns the edge of a map's cells."""
    return _CELL_INCHES[len(part.names) > _MOST_ROWS_WITH_VALUES]


def _draw_map(axes: Axes, part: Similarities, names_on_right: bool) -> None:
    """Draws a map with the names beside and below it, and the values in its cells where they are few."""
    number = len(part.names)
    axes.imshow(part.cosine, interpolation="nearest", **_COLOURS)
    axes.set_xticks(range(number), part.names, rotation=90)
    axes.set_yticks(range(number), part.names)
    axes.tick_params(length=0, labelsize=_NAME_POINTS, labelleft=not names_on_right, labelright=names_on_right)
    for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
        label.set_parse_math(False)  # a dollar in a name is a dollar
    if number > _MOST_ROWS_WITH_VALUES:
        return
    for (row, column), value in np.ndenumerate(part.cosine):
        colour = "white" if abs(value) > _DARK_FROM else "black"
        written = f"{round(value, 2) + 0.0:.2f}"  # no minus before 0.00
        axes.text(column, row, written, ha="center", va="center", fontsize=_VALUE_POINTS, color=colour)
