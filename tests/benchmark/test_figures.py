from dataclasses import replace
from io import BytesIO
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from benchmark_results import FINETUNED, SCRATCH, STOCK, TRAINERS, toy_results
from matplotlib import rcParams
from matplotlib.colors import to_hex
from PIL import Image

from nnunetv2_misfm.benchmark.colours import class_colours, legend_columns, trainer_colours, trainer_markers
from nnunetv2_misfm.benchmark.convergence import curves_by_size, epochs_run, epochs_table, epochs_to_reach, size_label
from nnunetv2_misfm.benchmark.figures import (
    dice_against_cases,
    distributions,
    learning_curves,
    mean_with_interval,
    size_in_pixels,
    to_png,
)
from nnunetv2_misfm.benchmark.results import Results
from nnunetv2_misfm.benchmark.statistics import MEAN, case_scores, shared_draws


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    missing = [f"{FINETUNED}__n5__fold0__seed1", f"{SCRATCH}__n10__"]
    return toy_results(tmp_path_factory.mktemp("toy"), sizes=("5", "10", "all"), missing=missing, files=False)


def with_curves(results: Results, curves: dict[tuple[str, str, int], list[float]]) -> Results:
    """Replaces learning curves by these, by trainer, number of cases and seed."""
    rows = [
        {"trainer": trainer, "train_cases": size, "fold": "0", "seed": seed, "epoch": epoch, "pseudo_dice": dice}
        for (trainer, size, seed), values in curves.items()
        for epoch, dice in enumerate(values)
    ]
    return replace(results, curves=pd.DataFrame(rows))


def test_epochs_are_counted_from_one_and_the_target_is_inclusive() -> None:
    assert epochs_to_reach([0.5, 0.7, 0.6], 0.5) == 1
    assert epochs_to_reach([0.1, 0.7, 0.6], 0.7) == 2
    assert epochs_to_reach([0.1, 0.7], 0.71) is None
    assert epochs_to_reach([], 0.1) is None


def test_epochs_are_measured_against_stocks_end_in_the_same_draw(tmp_path: Path) -> None:
    results = toy_results(tmp_path, sizes=("5",), seeds=(0, 1, 2), files=False)
    curves = {}
    for seed, end in ((0, 0.8), (1, 0.4), (2, 0.6)):
        # ten epochs: the last tenth is one epoch, the target 0.95 of `end`
        curves[STOCK, "5", seed] = [0.1] * 9 + [end]
        curves[FINETUNED, "5", seed] = [0.1, 0.2, 0.95 * end + 1e-9, *[0.9] * 7]
        curves[SCRATCH, "5", seed] = [0.39] * 10  # reaches 0.95 x 0.4 only
    table = epochs_table(with_curves(results, curves))
    assert table is not None
    assert [row[1] for row in table.rows] == ["10 (3 of 3 runs)", "not reached (1 of 3 runs)", "3 (3 of 3 runs)"]
    assert table.columns == ["trainer", "5 labelled cases"]


def test_a_reference_ends_with_the_mean_of_its_last_tenth(tmp_path: Path) -> None:
    results = toy_results(tmp_path, trainers=(STOCK, SCRATCH), sizes=("5",), seeds=(0,), files=False)
    curves = {(STOCK, "5", 0): [0.1] * 18 + [0.4, 0.8], (SCRATCH, "5", 0): [0.1] * 4 + [0.58] * 16}
    table = epochs_table(with_curves(results, curves))  # 0.95 x 0.6 = 0.57
    assert table is not None
    assert [row[1] for row in table.rows] == ["20 (1 of 1 runs)", "5 (1 of 1 runs)"]


def test_curves_are_those_of_draws_that_all_trainers_finished(results: Results) -> None:
    curves = curves_by_size(results)
    assert list(curves) == ["5", "10", "all"]
    assert set(curves["5"]["seed"]) == {0} and set(curves["5"]["trainer"]) == set(TRAINERS)
    assert set(curves["10"]["seed"]) == {0, 1} and set(curves["10"]["trainer"]) == {STOCK, FINETUNED}


def test_without_curves_there_is_neither_figure_nor_table(results: Results) -> None:
    bare = replace(results, curves=results.curves.iloc[:0])
    assert learning_curves(bare) is None and epochs_table(bare) is None


def test_a_curve_is_the_mean_over_runs_counted_from_epoch_one(results: Results) -> None:
    figure = learning_curves(results)
    assert figure is not None
    panel = figure.axes[2]
    assert panel.get_title(loc="left") == "all labelled cases (40)"
    line = next(line for line in panel.lines if to_hex(line.get_color()) == trainer_colours(TRAINERS)[SCRATCH].lower())
    runs = results.curves[(results.curves["trainer"] == SCRATCH) & (results.curves["train_cases"] == "all")]
    slow = [np.mean([row.pseudo_dice for row in runs.itertuples() if row.epoch == epoch]) for epoch in range(6)]
    np.testing.assert_allclose(line.get_ydata(), slow)
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6]


def test_dice_stands_at_the_actual_number_of_cases_and_a_gap_breaks_the_line(results: Results) -> None:
    figure = dice_against_cases(results)
    assert figure is not None
    (axes,) = figure.axes
    assert axes.get_xscale() == "log"
    assert [tick.get_text() for tick in axes.get_xticklabels()] == ["5", "10", "all (40)"]
    np.testing.assert_allclose(axes.get_xticks(), [5, 10, 40])
    of_scratch = axes.containers[TRAINERS.index(SCRATCH)].lines[0]
    assert np.isnan(of_scratch.get_ydata()).tolist() == [False, True, False]
    scores = results.cases[(results.cases["trainer"] == STOCK) & (results.cases["train_cases"] == "10")]
    assert axes.containers[0].lines[0].get_ydata()[1] == pytest.approx(100 * scores["dice"].mean())


def test_with_a_single_number_of_cases_the_trainers_stand_close_to_it(tmp_path: Path) -> None:
    figure = dice_against_cases(toy_results(tmp_path, sizes=("10",), files=False))
    assert figure is not None
    (axes,) = figure.axes
    low, high = axes.get_xlim()
    places = [bars.lines[0].get_xdata()[0] for bars in axes.containers]
    assert len(set(places)) == 3 and max(abs(place - 10) for place in places) < 0.03 * (high - low)
    assert low < 6 and high > 14


def test_the_ticks_of_epochs_are_whole_and_a_single_epoch_is_a_dot(results: Results) -> None:
    curves = results.curves
    two, one = (learning_curves(replace(results, curves=curves[curves["epoch"] < n])) for n in (2, 1))
    assert two is not None and one is not None
    ticks = two.axes[0].get_xticks()
    assert len(ticks) > 1 and all(tick == round(tick) for tick in ticks)
    assert {line.get_marker() for line in one.axes[0].lines} == {"o"}
    assert "o" not in {line.get_marker() for line in two.axes[0].lines}


def test_a_legend_fits_the_figure_with_any_names() -> None:
    assert legend_columns(["a", "b"], 8.0, 10, 4) == 2
    assert legend_columns(["a"] * 5, 8.0, 10, 4) == 3  # two rows, three and two
    assert legend_columns(["n" * 40] * 4, 4.6, 10, 4) == 1


def test_runs_of_other_lengths_are_told_by_trainer(results: Results) -> None:
    curves = results.curves
    short = curves[~((curves["trainer"] == SCRATCH) & (curves["epoch"] > 2) & (curves["seed"] == 0))]
    lengths = epochs_run(replace(results, curves=short.assign(pseudo_dice=np.nan)))
    assert lengths["5"] == {STOCK: (6, 6), SCRATCH: (3, 3), FINETUNED: (6, 6)}
    assert lengths["all"][SCRATCH] == (3, 6)
    assert SCRATCH not in lengths["10"]


def test_an_interval_holds_its_mean_and_a_single_case_has_none(results: Results) -> None:
    scores = case_scores(results.cases, shared_draws(results.runs))
    scores = scores[scores["label"] == MEAN]
    (mean, low, high), gap = mean_with_interval(scores, SCRATCH, ["5", "10"])
    assert low < mean < high and np.isnan(gap).all()
    single = scores[scores["case"] == "case_000"]
    (mean, low, high) = mean_with_interval(single, STOCK, ["5"])[0]
    assert low == mean == high == pytest.approx(100 * single.loc[single["trainer"] == STOCK, "dice"].iloc[0])


def test_nothing_finished_gives_no_figure(tmp_path: Path) -> None:
    results = toy_results(tmp_path, sizes=("5",), files=False)
    none = replace(results, runs=results.runs.assign(state="missing"))
    assert dice_against_cases(none) is None and distributions(none) == {}


def test_a_distribution_shows_every_class_and_case_on_one_axis_for_all_sizes(results: Results) -> None:
    figures = distributions(results)
    assert list(figures) == ["5", "10", "all"]
    (axes,) = figures["10"].axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == results.labels
    assert [len(dots.get_offsets()) for dots in axes.collections] == [12] * 4  # two trainers, two classes
    assert len({figure.axes[0].get_xlim() for figure in figures.values()}) == 1


def test_sizes_are_told_in_words(results: Results) -> None:
    assert size_label("1", results) == "1 labelled case" and size_label("10", results) == "10 labelled cases"
    runs = results.runs.copy()
    runs.loc[(runs["train_cases"] == "all") & (runs["seed"] == 1), "num_train"] = 41
    assert size_label("all", replace(results, runs=runs)) == "all labelled cases (40 to 41)"


def test_trainers_keep_their_colours_and_differ_beyond_eight() -> None:
    names = [f"trainer{i}" for i in range(16)]
    colours, markers = trainer_colours(names), trainer_markers(names)
    assert len({(colours[name], markers[name]) for name in names}) == 16
    assert len(set(trainer_colours(names[:8]).values())) == 8
    assert len(set(class_colours(names[:7]).values())) == 7 and len(set(class_colours(names).values())) == 16


def test_a_figure_is_a_png_of_two_dots_per_pixel_whatever_style_is_set(results: Results) -> None:
    before = dice_against_cases(results)
    assert before is not None
    with pytest.MonkeyPatch.context() as patch:
        for key, value in (("font.size", 40.0), ("axes.labelsize", 40.0), ("xtick.labelsize", 40.0)):
            patch.setitem(rcParams, key, value)  # as nnU-Net's progress plot leaves it
        after = dice_against_cases(results)
        assert after is not None
        assert to_png(after) == to_png(before)
    image = Image.open(BytesIO(to_png(before)))
    assert image.format == "PNG" and image.size == tuple(2 * n for n in size_in_pixels(before))
