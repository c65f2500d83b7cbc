"""A report's figures: Dice against the number of labelled cases, learning curves, scores of single cases by class."""

import math
from collections.abc import Callable, Sequence
from io import BytesIO

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from nnunetv2_misfm.benchmark.colours import STYLE, legend_columns, trainer_colours, trainer_markers
from nnunetv2_misfm.benchmark.convergence import curves_by_size, runs_of, size_label
from nnunetv2_misfm.benchmark.grid import ALL
from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.statistics import (
    MEAN,
    bootstrap_interval,
    case_scores,
    run_means,
    shared_draws,
    size_order,
)
from nnunetv2_misfm.benchmark.tables import display_name

_WIDTH_INCHES = 8.4
_LEGEND_ROW_INCHES = 0.27
_LEGEND_COLUMNS = 4
_LEGEND_POINTS = 9.5
_DOTS_PER_INCH = 192  # two per CSS pixel
_LOG_FROM_RATIO = 3.0  # ours: sizes that span less are read more easily on a linear axis
_BESIDE = 0.012  # of the axis, ours: markers of trainers stand beside each other, so that bars do not hide bars
_MARGIN = 0.08  # of the axis, ours: more than the markers of a number of cases spread


def dice_against_cases(results: Results) -> Figure | None:
    """Draws mean Dice against the number of labelled cases, a line per trainer; None where nothing can be compared.

    Means are over cases (scores averaged over the shared draws and the classes first), bars are 95 % bootstrap
    intervals over cases, faint dots the means of single runs.
    """
    draws = shared_draws(results.runs)
    scores = case_scores(results.cases, draws)
    scores = scores[scores["label"] == MEAN]
    if scores.empty:
        return None
    trainers, sizes = results.grid.trainers, sorted(set(scores["train_cases"]), key=size_order)
    numbers = {size: _number_of_cases(size, results) for size in sizes}
    colours, markers = trainer_colours(trainers), trainer_markers(trainers)
    singles = run_means(results.cases, draws)
    log = max(numbers.values()) > _LOG_FROM_RATIO * min(numbers.values())
    to_axis, to_number = (math.log, math.exp) if log else (float, float)
    first, last = to_axis(min(numbers.values())), to_axis(max(numbers.values()))
    length = (last - first) or first  # around a single number there is as much room as it is large

    def draw(axes: Axes) -> None:
        for i, trainer in enumerate(trainers):
            aside = _BESIDE * length * (i - (len(trainers) - 1) / 2)
            places = {size: to_number(to_axis(numbers[size]) + aside) for size in sizes}
            means, low, high = mean_with_interval(scores, trainer, sizes).T
            bars = [means - low, high - means]
            axes.errorbar(
                list(places.values()),
                means,
                bars,
                color=colours[trainer],
                marker=markers[trainer],
                markersize=6,
                capsize=3,
            )
            runs = singles[(singles["trainer"] == trainer) & singles["train_cases"].isin(sizes)]
            axes.scatter(
                [places[size] for size in runs["train_cases"]],
                100 * runs["dice"],
                s=14,
                color=colours[trainer],
                alpha=0.35,
                linewidths=0,
            )
        if log:
            axes.set_xscale("log")
        room = _MARGIN * length if last > first else length / 2
        axes.set_xlim(to_number(first - room), to_number(last + room))
        ticks = {n: " / ".join(_tick(size, n) for size in sizes if numbers[size] == n) for n in numbers.values()}
        axes.set_xticks(list(ticks), list(ticks.values()))
        axes.set_xticks([], minor=True)
        axes.set(xlabel="labelled training cases", ylabel="mean Dice of a case (%)")
        axes.grid(axis="x", visible=False)

    return _figure(results, [("", draw)], panel_inches=3.6, columns=1)


def mean_with_interval(scores: pd.DataFrame, trainer: str, train_cases: Sequence[str]) -> np.ndarray:
    """Returns float [number of sizes, 3]: mean Dice over cases and the ends of its 95 % bootstrap interval, in %.

    Args:
        scores: Of `case_scores`, the means over classes.
        trainer: One of its trainers.
        train_cases: Sizes; one at which the trainer has no scores gives NaN, a single case an interval of no length.
    """
    rows = []
    for size in train_cases:
        own = scores[(scores["trainer"] == trainer) & (scores["train_cases"] == size)]
        dice = 100 * own["dice"].to_numpy()
        mean = float(dice.mean()) if len(dice) else math.nan
        rows.append((mean, *(bootstrap_interval(dice)[:2] if len(dice) > 1 else (mean, mean))))
    return np.array(rows)


def learning_curves(results: Results) -> Figure | None:
    """Draws nnU-Net's pseudo Dice per epoch: means over the runs of the shared draws, bands from the least to the most.

    A panel per number of labelled cases; None where there are no curves.
    """
    trainers = results.grid.trainers
    colours = trainer_colours(trainers)
    panels: list[tuple[str, Callable[[Axes], None]]] = []
    for size, curves in curves_by_size(results).items():

        def draw(axes: Axes, curves: pd.DataFrame = curves) -> None:
            for trainer in trainers:
                by_epoch = curves[curves["trainer"] == trainer].groupby("epoch")["pseudo_dice"]
                band = by_epoch.agg(["mean", "min", "max"])
                if band.empty:
                    continue
                epochs = band.index.to_numpy() + 1
                alone = "o" if len(epochs) == 1 else None  # a line of one point would not be seen
                axes.plot(epochs, band["mean"], color=colours[trainer], marker=alone)
                axes.fill_between(epochs, band["min"], band["max"], color=colours[trainer], alpha=0.15, linewidth=0)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
            axes.set(xlabel="epoch", ylabel="pseudo Dice", ylim=(min(0.0, curves["pseudo_dice"].min()), 1))

        panels.append((size_label(size, results), draw))
    return _figure(results, panels, panel_inches=2.5, columns=2, lines=True) if panels else None


def distributions(results: Results) -> dict[str, Figure]:
    """Draws the Dice of single cases by class and trainer, a figure per number of labelled cases (its key).

    Boxes span the quartiles with the median, whiskers reach to the last case within 1.5 of their length; a dot is a
    case, averaged over the shared draws.
    """
    draws = shared_draws(results.runs)
    scores = case_scores(results.cases, draws)
    trainers = results.grid.trainers
    colours = trainer_colours(trainers)
    lowest, highest = 100 * scores["dice"].min(), 100 * scores["dice"].max()  # one axis for all numbers of cases
    figures = {}
    for size in sorted(set(scores["train_cases"]), key=size_order):
        of_size = scores[scores["train_cases"] == size]
        shown = [trainer for trainer in trainers if (of_size["trainer"] == trainer).any()]

        def draw(axes: Axes, of_size: pd.DataFrame = of_size, shown: Sequence[str] = shown) -> None:
            jitter = np.random.default_rng(0)
            for row, label in enumerate(results.labels):
                for i, trainer in enumerate(shown):
                    own = of_size[(of_size["trainer"] == trainer) & (of_size["label"] == label)]
                    dice = 100 * own["dice"].to_numpy()
                    place = row + 0.8 * ((i + 0.5) / len(shown) - 0.5)
                    _box(axes, dice, place, 0.6 / len(shown), colours[trainer], jitter)
            axes.set_yticks(range(len(results.labels)), results.labels)
            axes.set(
                xlabel="Dice of a case (%)",
                xlim=(max(lowest - 2, -1), min(highest + 2, 101)),
                ylim=(len(results.labels) - 0.5, -0.5),
            )
            axes.grid(axis="y", visible=False)

        panel_inches = 0.3 + len(results.labels) * (0.15 + 0.17 * len(shown))
        figures[size] = _figure(results, [("", draw)], panel_inches=panel_inches, columns=1, trainers=shown, lines=True)
    return figures


def to_png(figure: Figure) -> bytes:
    """Returns a figure as PNG, two dots per CSS pixel."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png", dpi=_DOTS_PER_INCH, pil_kwargs={"optimize": True})
    return buffer.getvalue()


def size_in_pixels(figure: Figure) -> tuple[int, int]:
    """Returns width and height in CSS pixels at which the figure's text has its natural size."""
    width, height = figure.get_size_inches() * _DOTS_PER_INCH / 2
    return round(width), round(height)


def _number_of_cases(train_cases: str, results: Results) -> int:
    if train_cases != ALL:
        return int(train_cases)
    return round(float(runs_of(results, ALL)["num_train"].mean()))  # folds of one dataset may differ by one case


def _tick(train_cases: str, number: int) -> str:
    return f"all ({number})" if train_cases == ALL else train_cases


def _box(axes: Axes, dice: np.ndarray, place: float, width: float, colour: str, jitter: np.random.Generator) -> None:
    line = {"color": colour, "linewidth": 1.2}
    axes.boxplot(
        [dice],
        positions=[place],
        widths=width,
        orientation="horizontal",
        showfliers=False,
        manage_ticks=False,
        boxprops=line,
        whiskerprops=line,
        capprops=line,
        medianprops={"color": colour, "linewidth": 2.2},
    )
    spread = jitter.uniform(-0.35, 0.35, len(dice)) * width
    axes.scatter(dice, place + spread, s=9, color=colour, alpha=0.4, linewidths=0)


def _figure(
    results: Results,
    panels: Sequence[tuple[str, Callable[[Axes], None]]],
    panel_inches: float,
    columns: int,
    trainers: Sequence[str] | None = None,
    lines: bool = False,
) -> Figure:
    """Returns a figure of panels with a common legend above them."""
    every = results.grid.trainers
    shown = every if trainers is None else list(trainers)
    colours, markers = trainer_colours(every), trainer_markers(every)
    columns = min(columns, len(panels))
    rows = -(-len(panels) // columns)
    legend = legend_columns([display_name(name) for name in shown], _WIDTH_INCHES, _LEGEND_POINTS, _LEGEND_COLUMNS)
    legend_inches = -(-len(shown) // legend) * _LEGEND_ROW_INCHES + 0.12
    with style.context(["default", STYLE]):
        height = rows * (panel_inches + 0.55) + legend_inches + 0.1
        engine = ConstrainedLayoutEngine(rect=(0.005, 0, 0.99, 1 - legend_inches / height))
        figure = Figure(figsize=(_WIDTH_INCHES, height), layout=engine)
        FigureCanvasAgg(figure)
        axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for place, (title, draw) in zip(axes, panels, strict=False):
            place.set_title(title, loc="left")
            draw(place)
        for place in axes[len(panels) :]:
            place.axis("off")
        handles = [
            Line2D(
                [],
                [],
                color=colours[name],
                marker="" if lines else markers[name],
                markersize=6,
                label=display_name(name),
            )
            for name in shown
        ]
        figure.legend(handles=handles, loc="upper center", ncols=legend, frameon=False, fontsize=_LEGEND_POINTS)
    return figure
