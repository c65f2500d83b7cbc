"""Pictures of single cases: the best, the median and the worst, with the contours of truth and prediction."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import SimpleITK as sitk
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from nnunetv2.imageio.reader_writer_registry import determine_reader_writer_from_file_ending
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_misfm.benchmark.answer import is_fine_tuned
from nnunetv2_misfm.benchmark.colours import STYLE, class_colours, legend_columns
from nnunetv2_misfm.benchmark.grid import Cell, Draw
from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.tables import display_name

# Ours: small images are shown whole, of larger ones what lies around the classes
_SHOWN_WHOLE_VOXELS = 96
_LEAST_MARGIN_VOXELS = 12
_WINDOW_PERCENTILES = (1, 99)
_COLUMNS = 4
_COLUMN_INCHES = 2.3
_TITLE_INCHES = 0.5
_LEGEND_ROW_INCHES = 0.25
_LEGEND_COLUMNS = 5
_LEGEND_POINTS = 10.0
_LINES = {"solid": "truth", "dashed": "prediction"}
_SAME = 1e-12  # Dice that differ by less differ by the machine's rounding
_TITLE_LETTERS = 30  # as many fit a column at 10 points


@dataclass(frozen=True)
class Choice:
    """Which cases are shown, and what for.

    Attributes:
        ranked_by: Trainer whose Dice makes a case the best or the worst.
        draw: The runs shown are those of this draw.
        cells: Its finished runs, in the order of the grid.
        cases: Case by `best`, `median` and `worst`; with fewer than three cases some are missing.
        all_equal: Whether all cases have the same Dice there, which makes the ranks arbitrary.
    """

    ranked_by: str
    draw: Draw
    cells: tuple[Cell, ...]
    cases: dict[str, str]
    all_equal: bool


@dataclass(frozen=True)
class Volume:
    """An image or label map in memory.

    Attributes:
        array: [D, H, W]; D is 1 for a 2D image.
        spacing: mm per axis of the array; of a 2D image the first is nnU-Net's stand-in.
        upright: Whether the array's axes run to the patient's head, back and left.
    """

    array: np.ndarray
    spacing: tuple[float, ...]
    upright: bool


def choose(results: Results) -> Choice | None:
    """Returns what to show, None where no finished run left predictions.

    The draw is the first, and so one of few labelled cases, of those with the most finished trainers. Cases are ranked
    by the mean Dice over the classes in the draw's run of the last fine-tuned trainer, else of the last trainer.
    """
    finished = [cell for cell in results.grid.cells if cell.name in results.predictions]
    by_draw: dict[Draw, list[Cell]] = {}
    for cell in finished:
        by_draw.setdefault(cell.draw, []).append(cell)
    for draw, cells in sorted(by_draw.items(), key=lambda item: -len(item[1])):
        tuned = [cell for cell in cells if is_fine_tuned(results, cell.trainer)]
        ranked = (tuned or cells)[-1]
        dice = case_dice(results, ranked)
        dice = dice[dice.index.isin(list(results.truths)) & dice.index.isin(list(results.images))]
        if len(dice):
            equal = len(dice) > 1 and float(np.ptp(dice)) < _SAME
            return Choice(ranked.trainer, draw, tuple(cells), rank_cases(dice), equal)
    return None


def rank_cases(dice: pd.Series) -> dict[str, str]:
    """Returns the case of each rank.

    Args:
        dice: Scores by case, at least one.

    Returns:
        `best`, `median` (of an even number the lower of the middle two) and `worst`; of two cases no median, of one
        only `best`. Equal scores are ordered by the case's name.
    """
    ordered = sorted(dice.index, key=lambda case: (dice[case], case))
    ranks = {"best": ordered[-1], "median": ordered[(len(ordered) - 1) // 2], "worst": ordered[0]}
    shown = list(ranks)[:1] if len(ordered) == 1 else ["best", "worst"] if len(ordered) == 2 else list(ranks)
    return {rank: ranks[rank] for rank in shown}


def case_dice(results: Results, cell: Cell) -> pd.Series:
    """Returns the mean Dice over the classes in each case of a run, by case."""
    cases, draw = results.cases, cell.draw
    chosen = cases[
        (cases["trainer"] == cell.trainer)
        & (cases["train_cases"].astype(str) == str(draw.train_cases))
        & (cases["fold"].astype(str) == str(draw.fold))
        & (cases["seed"].astype(int) == draw.seed)
    ]
    return chosen.groupby("case")["dice"].mean()


def draw_case(results: Results, choice: Choice, case: str, values: Mapping[str, Sequence[int]]) -> Figure:
    """Draws one case: a panel per trainer with the contours of the truth and of its prediction.

    The slice lies across the axis of the largest spacing (the first of equals) where the truth's classes cover most; of
    an empty truth, where the predictions do; else in the middle.

    Args:
        results: Of the benchmark.
        choice: Of `choose`.
        case: One of its cases.
        values: Values in the label files by the class's name; several where it is a region.

    Raises:
        OSError: A file is missing.
        RuntimeError: A file cannot be read.
    """
    truth_file = results.truths[case]
    ending = truth_file.name.removeprefix(case)
    image, truth = read_volume(results.images[case], ending), read_volume(truth_file, ending)
    if truth.array.shape != image.array.shape:
        raise RuntimeError(f"image and truth have other sizes, {image.array.shape} and {truth.array.shape}")
    predictions = [
        _prediction(results.predictions[cell.name] / truth_file.name, ending, truth) for cell in choice.cells
    ]
    labels = {label: tuple(values[label]) for label in results.labels}
    axis, index = choose_slice(truth, [array for array in predictions if array is not None], labels)
    planes = [None if array is None else np.take(array, index, axis) for array in predictions]
    shown, truth_plane = np.take(image.array, index, axis), np.take(truth.array, index, axis)
    every = [value for of_label in labels.values() for value in of_label]
    covered = np.any([np.isin(plane, every) for plane in [truth_plane, *planes] if plane is not None], axis=0)
    box = crop_box(covered)
    titles = [f"{display_name(cell.trainer)}\n{_dice_text(results, cell, case)}" for cell in choice.cells]
    rows_mm, columns_mm = np.delete(np.array(truth.spacing), axis)
    return _draw_panels(
        image=shown[box],
        truth={label: np.isin(truth_plane[box], labels[label]) for label in labels},
        predictions=[
            {} if plane is None else {label: np.isin(plane[box], labels[label]) for label in labels} for plane in planes
        ],
        titles=titles,
        aspect=float(rows_mm / columns_mm),
        head_is_last=truth.upright and axis != 0,
    )


def read_volume(file: Path, ending: str) -> Volume:
    """Reads a file through nnU-Net's reader of this ending; what SimpleITK reads in 3D is turned upright.

    Raises:
        OSError: There is no such file.
        RuntimeError: It cannot be read.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is not there")
    reader = determine_reader_writer_from_file_ending(ending, verbose=False)
    if reader is SimpleITKIO:
        image = sitk.ReadImage(str(file))
        if image.GetDimension() == 3 and image.GetNumberOfComponentsPerPixel() == 1:
            image = sitk.DICOMOrient(image, "LPS")
            return Volume(sitk.GetArrayFromImage(image), image.GetSpacing()[::-1], upright=True)
    array, properties = reader().read_images((str(file),))
    return Volume(array[0], tuple(float(edge) for edge in properties["spacing"]), upright=False)


def choose_slice(
    truth: Volume, predictions: Sequence[np.ndarray], labels: Mapping[str, Sequence[int]]
) -> tuple[int, int]:
    """Returns the axis to look along and the index of the slice.

    Args:
        truth: Label map.
        predictions: Label maps [D, H, W] of the same size.
        labels: Values by class.
    """
    spacing = np.array(truth.spacing)
    axis = int(np.flatnonzero(spacing > spacing.max() * 0.99)[0])  # voxels are seldom cubes to the last digit
    values = [value for of_label in labels.values() for value in of_label]
    others = tuple(other for other in range(3) if other != axis)
    for arrays in ([truth.array], predictions):
        areas = np.sum([np.isin(array, values).sum(axis=others) for array in arrays], axis=0)
        if np.any(areas):
            return axis, int(np.argmax(areas))
    return axis, truth.array.shape[axis] // 2


def crop_box(covered: np.ndarray) -> tuple[slice, slice]:
    """Returns rows and columns to show: all of a short side, of a longer one what is covered and a quarter around it.

    Args:
        covered: bool [H, W], where truth or prediction hold a class.
    """
    box = []
    for axis in (0, 1):
        size, hit = covered.shape[axis], np.flatnonzero(covered.any(axis=1 - axis))
        if size <= _SHOWN_WHOLE_VOXELS or not len(hit):
            box.append(slice(0, size))
            continue
        margin = max(_LEAST_MARGIN_VOXELS, (int(hit[-1]) - int(hit[0]) + 1) // 4)
        box.append(slice(max(0, int(hit[0]) - margin), min(size, int(hit[-1]) + margin + 1)))
    return box[0], box[1]


def _prediction(file: Path, ending: str, truth: Volume) -> np.ndarray | None:
    if not file.is_file():
        return None
    array = read_volume(file, ending).array
    return array if array.shape == truth.array.shape else None


def _dice_text(results: Results, cell: Cell, case: str) -> str:
    dice = case_dice(results, cell)
    return f"Dice {100 * dice[case]:.1f} %" if case in dice.index else "not scored"


def _draw_panels(
    image: np.ndarray,
    truth: Mapping[str, np.ndarray],
    predictions: Sequence[Mapping[str, np.ndarray]],
    titles: Sequence[str],
    aspect: float,
    head_is_last: bool,
) -> Figure:
    rows = -(-len(titles) // _COLUMNS)
    columns = -(-len(titles) // rows)  # rows of about the same length
    present = [label for label in truth if any(masks[label].any() for masks in [truth, *predictions] if masks)]
    colours = class_colours(list(truth))
    width = max(columns * _COLUMN_INCHES, 2 * _COLUMN_INCHES)
    legend = legend_columns([*present, *_LINES.values()], width, _LEGEND_POINTS, _LEGEND_COLUMNS)
    legend_rows = -(-(len(present) + len(_LINES)) // legend)
    panel_inches = float(np.clip(_COLUMN_INCHES * aspect * image.shape[0] / image.shape[1], 0.8, 2 * _COLUMN_INCHES))
    footer = (legend_rows + 0.6) * _LEGEND_ROW_INCHES
    height = rows * (panel_inches + _TITLE_INCHES) + footer
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height))
        FigureCanvasAgg(figure)
        grid = {
            "left": 0.005,
            "right": 0.995,
            "bottom": footer / height,
            "top": 1 - _TITLE_INCHES / height,
            "wspace": 0.04,
            "hspace": _TITLE_INCHES / panel_inches,
        }
        panels = figure.subplots(rows, columns, squeeze=False, gridspec_kw=grid).flat
        low, high = np.percentile(image, _WINDOW_PERCENTILES)
        for axes in panels:
            axes.axis("off")
        for axes, title, masks in zip(figure.axes, titles, predictions, strict=False):
            axes.imshow(image, cmap="gray", vmin=low, vmax=high, aspect=aspect, interpolation="nearest")
            _draw_contours(axes, truth, colours, "solid")
            _draw_contours(axes, masks, colours, "dashed")
            axes.set(xlim=(-0.5, image.shape[1] - 0.5), ylim=(image.shape[0] - 0.5, -0.5))
            if head_is_last:
                axes.invert_yaxis()
            axes.set_title(
                title if masks else f"{title}\n(no prediction)", fontsize=_title_size(title), fontweight="normal"
            )
        lines = [Line2D([], [], color=colours[label], label=label) for label in present]
        lines += [Line2D([], [], color="#333333", linestyle=line, label=label) for line, label in _LINES.items()]
        figure.legend(handles=lines, loc="lower center", ncols=legend, frameon=False, fontsize=_LEGEND_POINTS)
    return figure


def _title_size(title: str) -> float:
    """Returns the font size at which the longest line fits a column."""
    return min(10.0, 10.0 * _TITLE_LETTERS / max(len(line) for line in title.splitlines()))


def _draw_contours(axes: Axes, masks: Mapping[str, np.ndarray], colours: Mapping[str, str], line: str) -> None:
    for label, mask in masks.items():
        if not mask.any():
            continue
        closed = np.pad(mask, 1).astype(float)  # a class that touches the border has a contour there too
        axes.contour(
            np.arange(-1, mask.shape[1] + 1),
            np.arange(-1, mask.shape[0] + 1),
            closed,
            levels=[0.5],
            colors=[colours[label]],
            linestyles=line,
            linewidths=1.6,
        )
