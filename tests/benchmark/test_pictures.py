from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import SimpleITK as sitk
from benchmark_results import FINETUNED, SCRATCH, STOCK, toy_results
from matplotlib.figure import Figure
from skimage import io

from nnunetv2_misfm.benchmark.figures import to_png
from nnunetv2_misfm.benchmark.pictures import (
    Volume,
    case_dice,
    choose,
    choose_slice,
    crop_box,
    draw_case,
    rank_cases,
    read_volume,
)
from nnunetv2_misfm.benchmark.results import Results

VALUES = {"background": (0,), "Anterior": (1,), "Posterior": (2,)}


@pytest.fixture
def results(tmp_path: Path) -> Results:
    return toy_results(tmp_path, sizes=("5", "all"), cases=5, missing=[f"{FINETUNED}__n5__fold0__seed0"])


def drawn(results: Results, case: str) -> Figure:
    choice = choose(results)
    assert choice is not None
    figure = draw_case(results, choice, case, VALUES)
    assert to_png(figure).startswith(b"\x89PNG")
    return figure


def contours(figure: Figure) -> list[list[str]]:
    """Returns the line styles of the contours of each panel."""
    return [
        ["dashed" if lines.get_linestyle()[0][1] else "solid" for lines in panel.collections]
        for panel in figure.axes
        if panel.images
    ]


def write(file: Path, voxels: np.ndarray, spacing: tuple[float, ...] = (1.0, 1.0, 1.5)) -> None:
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing(spacing)
    sitk.WriteImage(image, str(file))


def test_the_draw_of_most_trainers_and_fewest_cases_is_shown_ranked_by_the_fine_tuned(results: Results) -> None:
    choice = choose(results)
    assert choice is not None
    assert (choice.draw.train_cases, choice.draw.seed) == (5, 1)
    assert [cell.trainer for cell in choice.cells] == [STOCK, SCRATCH, FINETUNED]
    assert choice.ranked_by == FINETUNED
    cases = results.cases
    own = cases[(cases["trainer"] == FINETUNED) & (cases["train_cases"] == "5") & (cases["seed"] == 1)]
    slow = {case: np.mean([row.dice for row in own.itertuples() if row.case == case]) for case in set(own["case"])}
    assert choice.cases["best"] == max(slow, key=slow.__getitem__)
    assert choice.cases["worst"] == min(slow, key=slow.__getitem__)
    assert choice.cases["median"] == sorted(slow, key=slow.__getitem__)[2]


def test_without_fine_tuned_trainers_the_last_ranks_and_without_predictions_nothing_is_shown(tmp_path: Path) -> None:
    results = toy_results(tmp_path, trainers=(STOCK, SCRATCH), sizes=("5",), cases=3, files=False)
    choice = choose(results)
    assert choice is not None and choice.ranked_by == SCRATCH
    assert choose(replace(results, predictions={})) is None


def test_equal_scores_of_all_cases_are_told(results: Results) -> None:
    choice, same = choose(results), choose(replace(results, cases=results.cases.assign(dice=0.0)))
    assert choice is not None and not choice.all_equal
    assert same is not None and same.all_equal


@pytest.mark.parametrize(("trainers", "columns"), [(1, 1), (2, 2), (3, 3), (5, 3)])
def test_the_whole_legend_lies_within_the_picture(tmp_path: Path, trainers: int, columns: int) -> None:
    results = toy_results(tmp_path, [STOCK, SCRATCH, FINETUNED, "A", "B"][:trainers], ("5",), seeds=(0,), cases=1)
    figure = drawn(results, "case_000")
    box = figure.legends[0].get_window_extent()
    assert box.x0 >= 0 and box.x1 <= figure.bbox.x1 and box.y0 >= 0
    assert figure.axes[0].get_gridspec().ncols == columns


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ({"a": 0.1, "b": 0.9, "c": 0.5, "d": 0.7}, {"best": "b", "median": "c", "worst": "a"}),
        ({"a": 0.5, "b": 0.5, "c": 0.5}, {"best": "c", "median": "b", "worst": "a"}),
        ({"a": 0.9, "b": 0.2}, {"best": "a", "worst": "b"}),
        ({"a": 0.9}, {"best": "a"}),
    ],
)
def test_cases_are_ranked_by_score_then_name(scores: dict[str, float], expected: dict[str, str]) -> None:
    assert rank_cases(pd.Series(scores)) == expected


def test_every_panel_has_the_contours_of_truth_and_prediction_and_the_dice_of_its_trainer(results: Results) -> None:
    figure = drawn(results, "case_002")
    assert contours(figure) == [["solid", "solid", "dashed", "dashed"]] * 3
    cells = choose(results).cells  # type: ignore[union-attr]
    for panel, cell in zip(figure.axes, cells, strict=False):
        assert f"Dice {100 * case_dice(results, cell)['case_002']:.1f} %" in panel.get_title()
    texts = [text.get_text() for text in figure.legends[0].get_texts()]
    assert texts == ["Anterior", "Posterior", "truth", "prediction"]


def test_an_empty_truth_shows_where_the_predictions_are(results: Results) -> None:
    truth = results.truths["case_002"]
    write(truth, np.zeros((24, 28, 24), np.uint8))
    assert contours(drawn(results, "case_002")) == [["dashed", "dashed"]] * 3
    for folder in results.predictions.values():
        write(folder / truth.name, np.zeros((24, 28, 24), np.uint8))
    assert contours(drawn(results, "case_002")) == [[]] * 3


def test_a_missing_prediction_and_one_of_another_size_leave_their_panel_without_contour(results: Results) -> None:
    name = results.truths["case_002"].name
    (results.predictions[f"{SCRATCH}__n5__fold0__seed1"] / name).unlink()
    write(results.predictions[f"{FINETUNED}__n5__fold0__seed1"] / name, np.ones((3, 4, 5), np.uint8))
    figure = drawn(results, "case_002")
    assert [len(styles) for styles in contours(figure)] == [4, 2, 2]
    assert ["no prediction" in panel.get_title() for panel in figure.axes] == [False, True, True]


def test_a_missing_image_and_one_of_another_size_are_errors(results: Results) -> None:
    write(results.images["case_001"], np.zeros((3, 4, 5), np.float32))
    with pytest.raises(RuntimeError, match=r"image and truth have other sizes, \(3, 4, 5\) and \(24, 28, 24\)"):
        drawn(results, "case_001")
    results.images["case_002"].unlink()
    with pytest.raises(FileNotFoundError, match="case_002_0000.nii.gz is not there"):
        drawn(results, "case_002")


def test_a_region_is_drawn_as_one_class(results: Results) -> None:
    choice = choose(results)
    assert choice is not None
    whole = replace(results, labels=["whole"])
    figure = draw_case(whole, choice, "case_002", {"whole": (1, 2)})
    assert contours(figure) == [["solid", "dashed"]] * 3


def test_the_slice_lies_across_the_largest_spacing_where_the_truth_covers_most() -> None:
    labels = np.zeros((6, 8, 10), np.uint8)
    labels[2, 1:3, 1:3] = 1
    labels[4, 1:6, 7] = 2  # one voxel more in all
    labels[:, :, 9] = 3  # no class that is compared
    values = {"a": (1,), "b": (2,)}
    assert choose_slice(Volume(labels, (3.0, 1.0, 1.0), True), [], values) == (0, 4)
    assert choose_slice(Volume(labels, (1.0, 1.0, 1.0001), True), [], values) == (0, 4)
    assert choose_slice(Volume(labels, (1.0, 1.0, 2.5), True), [], values) == (2, 7)
    empty = Volume(np.zeros_like(labels), (1.0, 4.0, 1.0), True)
    assert choose_slice(empty, [labels], values) == (1, 1)
    assert choose_slice(empty, [np.zeros_like(labels)], values) == (1, 4)


def test_only_large_images_are_cropped_and_keep_a_margin() -> None:
    covered = np.zeros((90, 400), bool)
    covered[10:20, 200:280] = True
    assert crop_box(covered) == (slice(0, 90), slice(180, 300))
    covered = np.zeros((400, 300), bool)
    covered[3:5, 290:300] = True
    assert crop_box(covered) == (slice(0, 17), slice(278, 300))
    assert crop_box(np.zeros((400, 300), bool)) == (slice(0, 400), slice(0, 300))


def test_voxels_keep_their_proportions(results: Results) -> None:
    for files in (results.images, results.truths):
        image = sitk.ReadImage(str(files["case_002"]))
        write(files["case_002"], sitk.GetArrayFromImage(image), (1.0, 2.5, 3.0))  # x, y, z
    assert drawn(results, "case_002").axes[0].get_aspect() == pytest.approx(2.5)


def test_the_head_is_up_in_a_view_from_the_front(results: Results) -> None:
    low, high = drawn(results, "case_002").axes[0].get_ylim()  # from above: rows run downwards, to the back
    assert low > high
    for files in (results.images, results.truths):
        image = sitk.ReadImage(str(files["case_002"]))
        write(files["case_002"], sitk.GetArrayFromImage(image), (1.0, 3.0, 1.0))
    low, high = drawn(results, "case_002").axes[0].get_ylim()  # rows run to the head
    assert low < high


def test_scans_are_turned_upright(tmp_path: Path) -> None:
    voxels = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    image = sitk.GetImageFromArray(voxels)
    image.SetDirection((-1, 0, 0, 0, -1, 0, 0, 0, 1))  # voxels run to the right and to the front
    image.SetSpacing((1.0, 2.0, 3.0))
    sitk.WriteImage(image, str(tmp_path / "a.nii.gz"))
    volume = read_volume(tmp_path / "a.nii.gz", ".nii.gz")
    np.testing.assert_array_equal(volume.array, voxels[:, ::-1, ::-1])
    assert volume.upright and volume.spacing == (3.0, 2.0, 1.0)


def test_2d_images_are_drawn(results: Results, tmp_path: Path) -> None:
    plane = np.zeros((40, 30), np.uint8)
    plane[5:20, 5:20], plane[25:, 20:] = 1, 2
    names = results.truths
    images = {case: tmp_path / f"{case}_0000.png" for case in names}
    truths = {case: tmp_path / f"{case}.png" for case in names}
    for case in names:
        io.imsave(images[case], plane * 100, check_contrast=False)
        io.imsave(truths[case], plane, check_contrast=False)
        for folder in results.predictions.values():
            io.imsave(folder / f"{case}.png", np.roll(plane, 2, axis=1), check_contrast=False)
    figure = drawn(replace(results, images=images, truths=truths), "case_002")
    assert contours(figure) == [["solid", "solid", "dashed", "dashed"]] * 3
    assert figure.axes[0].images[0].get_array().shape == (40, 30)
