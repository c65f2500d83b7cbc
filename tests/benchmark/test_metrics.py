"""Scores against hand arithmetic, a slow loop over boxes, and MONAI and SimpleITK."""

import itertools
import math
from dataclasses import astuple, replace

import numpy as np
import pytest
import SimpleITK as sitk
from scipy.ndimage import gaussian_filter

from nnunetv2_misfm.benchmark.metrics import Scores, score

# surface-distance 0.1 imports through names that SciPy has moved
pytestmark = pytest.mark.filterwarnings("ignore:Please import:DeprecationWarning")

SPACING = (3.0, 1.0, 2.0)
Box = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def box_mask(box: Box, shape: tuple[int, int, int] = (14, 18, 16)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[tuple(slice(*side) for side in box)] = True
    return mask


def shifted(box: Box, axis: int, voxels: int) -> Box:
    moved = list(box)
    moved[axis] = (box[axis][0] + voxels, box[axis][1] + voxels)
    return tuple(moved)  # type: ignore[return-value]


def box_surface(box: Box, spacing: tuple[float, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Corner points [N, 3] in mm on a box's surface, and their areas [N].

    The surface passes half a voxel from each corner point: a rectangle on a face, a bevel at an edge, a triangle at a
    corner.
    """
    points, areas = [], []
    for point in itertools.product(*(range(low, high + 1) for low, high in box)):
        ends = [axis for axis in range(3) if point[axis] in box[axis]]
        if not ends:
            continue
        a, b, c = (spacing[axis] for axis in (*ends, *(axis for axis in range(3) if axis not in ends)))
        areas.append({1: b * c, 2: 0.5 * math.hypot(a, b) * c, 3: math.hypot(a * b, b * c, c * a) / 8}[len(ends)])
        points.append(np.multiply(point, spacing))
    return np.array(points), np.array(areas)


def slow_distances(points: np.ndarray, others: np.ndarray) -> list[float]:
    return [min(math.dist(point, other) for other in others) for point in points]


def slow_percentile(distances: list[float], areas: np.ndarray, percent: float) -> float:
    passed = 0.0
    for distance, area in sorted(zip(distances, areas, strict=True)):
        passed += area
        if passed >= percent / 100 * areas.sum() - 1e-9:
            return distance
    raise AssertionError


def blobs(seed: int, shift: tuple[int, int, int] = (0, 0, 0)) -> np.ndarray:
    noise = gaussian_filter(np.random.default_rng(seed).standard_normal((20, 40, 32)), (2, 4, 3))
    noise += 0.5 * np.roll(noise, shift, (0, 1, 2))
    return noise > 0.6 * noise.std()  # some reach the border of the image


@pytest.mark.parametrize(("axis", "distance_mm", "dice"), [(0, 6.0, 0.6), (1, 2.0, 0.8), (2, 4.0, 0.75)])
def test_a_shift_by_two_voxels_counts_the_spacing_of_its_own_axis(axis: int, distance_mm: float, dice: float) -> None:
    box = ((2, 7), (3, 13), (3, 11))  # 5 x 10 x 8 voxels
    scores = score(box_mask(box), box_mask(shifted(box, axis, 2)), SPACING, 1.0)
    assert scores.dice == pytest.approx(dice)  # overlap of what remains along the axis: 3/5, 8/10, 6/8
    assert scores.hd95_mm == pytest.approx(distance_mm)


def test_surface_dice_counts_the_moved_faces_from_a_tolerance_of_the_shift_on() -> None:
    box = ((4, 6), (2, 16), (2, 14))
    truth, prediction = box_mask(box), box_mask(shifted(box, 0, 1))
    below, at = (score(truth, prediction, SPACING, tolerance).surface_dice for tolerance in (2.99, 3.0))
    assert below < 0.5
    assert at == 1.0


def test_a_tolerance_of_one_voxel_covers_a_voxel_whose_spacing_was_rounded_to_float32() -> None:
    box = ((4, 6), (2, 16), (2, 14))
    spacing = (float(np.float32(1.2)), 1.0, 1.0)
    assert spacing[0] > 1.2
    assert score(box_mask(box), box_mask(shifted(box, 0, 1)), spacing, 1.2).surface_dice == 1.0


@pytest.mark.parametrize(
    ("truth", "prediction"),
    [
        (((2, 7), (3, 9), (3, 8)), ((3, 8), (3, 9), (5, 10))),
        (((2, 10), (3, 13), (3, 12)), ((4, 8), (5, 11), (6, 9))),  # concentric
        (((2, 4), (3, 5), (3, 5)), ((6, 11), (9, 14), (8, 11))),  # apart
        (((0, 5), (0, 6), (12, 16)), ((1, 6), (2, 8), (11, 16))),  # at the border of the image
    ],
)
def test_boxes_score_as_a_slow_loop_over_their_surfaces_says(truth: Box, prediction: Box) -> None:
    (ours, our_areas), (theirs, their_areas) = box_surface(truth, SPACING), box_surface(prediction, SPACING)
    there, back = slow_distances(ours, theirs), slow_distances(theirs, ours)
    area = our_areas.sum() + their_areas.sum()
    near = our_areas[np.array(there) <= 2.5].sum() + their_areas[np.array(back) <= 2.5].sum()
    scores = score(box_mask(truth), box_mask(prediction), SPACING, 2.5)
    assert scores.assd_mm == pytest.approx((np.dot(there, our_areas) + np.dot(back, their_areas)) / area)
    percentiles = slow_percentile(there, our_areas, 95), slow_percentile(back, their_areas, 95)
    assert scores.hd95_mm == pytest.approx(max(percentiles))
    assert scores.surface_dice == pytest.approx(near / area)


def test_few_far_voxels_do_not_move_hd95_but_the_mean() -> None:
    truth = box_mask(((2, 12), (2, 16), (2, 14)))
    prediction = truth.copy()
    prediction[0, 0, 0] = True
    scores = score(truth, prediction, SPACING, 1.0)
    assert scores.hd95_mm == 0
    assert 0 < scores.assd_mm < 0.1


def test_one_slice_is_scored_by_its_contours_in_the_plane() -> None:
    # A rectangle of 3 x 4 pixels of 2 mm x 1 mm moved down by one row, on the corner points of its pixels:
    # 4 corners of sqrt(5)/2 mm, 6 points of 1 mm above and below, 4 of 2 mm at the sides. Upper edge: 3 points and
    # 2 corners 2 mm off. Lower edge: 3 points 1, 2 and 1 mm off the other's sides. All else lies on the other contour.
    truth, prediction = np.zeros((2, 1, 8, 8), bool)
    truth[0, 1:4, 1:5] = prediction[0, 2:5, 1:5] = True
    corner = math.sqrt(5) / 2
    length = 4 * corner + 6 * 1 + 4 * 2
    scores = score(truth, prediction, (999.0, 2.0, 1.0), 1.0)
    assert scores.dice == pytest.approx(2 / 3)
    assert scores.assd_mm == pytest.approx((3 * 2 + 2 * corner * 2 + (1 + 2 + 1)) / length)
    assert scores.hd95_mm == 2
    assert scores.surface_dice == pytest.approx(1 - (3 + 2 * corner + 1) / length)


def test_a_slice_along_another_axis_scores_the_same() -> None:
    truth, prediction = np.zeros((2, 1, 8, 8), bool)
    truth[0, 1:4, 1:5] = prediction[0, 2:5, 2:5] = True
    expected = score(truth, prediction, (999.0, 2.0, 1.0), 1.0)
    assert score(np.moveaxis(truth, 0, 2), np.moveaxis(prediction, 0, 2), (2.0, 1.0, 999.0), 1.0) == expected


def test_equal_masks_are_perfect() -> None:
    assert score(blobs(0), blobs(0), SPACING, 0.0) == Scores(1.0, 0.0, 0.0, 1.0, False, False)


def test_two_empty_masks_are_perfect() -> None:
    empty = np.zeros((4, 5, 6), bool)
    assert score(empty, empty, SPACING, 1.0) == Scores(1.0, 0.0, 0.0, 1.0, True, True)


@pytest.mark.parametrize("truth_empty", [True, False])
def test_one_empty_mask_scores_nothing_at_the_diagonal_of_the_image(truth_empty: bool) -> None:
    empty, full = np.zeros((4, 12, 8), bool), np.zeros((4, 12, 8), bool)
    full[1, 2, 3] = True
    masks = (empty, full) if truth_empty else (full, empty)
    # 4 x 3 mm, 12 x 1 mm, 8 x 2 mm
    diagonal = math.sqrt(12**2 + 12**2 + 16**2)
    expected = Scores(0.0, pytest.approx(diagonal), pytest.approx(diagonal), 0.0, truth_empty, not truth_empty)  # type: ignore[arg-type]
    assert score(*masks, SPACING, 1.0) == expected


def test_the_diagonal_of_one_slice_leaves_out_its_thickness() -> None:
    empty, full = np.zeros((1, 3, 4), bool), np.ones((1, 3, 4), bool)
    assert score(empty, full, (999.0, 1.0, 1.0), 1.0).hd95_mm == 5


def test_scores_are_finite_where_masks_fill_the_image() -> None:
    full = np.ones((3, 4, 5), bool)
    assert score(full, full, SPACING, 0.0) == Scores(1.0, 0.0, 0.0, 1.0, False, False)


@pytest.mark.parametrize("seed", range(3))
def test_truth_and_prediction_may_change_places(seed: int) -> None:
    truth, prediction = blobs(seed), blobs(seed, (2, 3, 1))
    swapped = score(prediction, truth, SPACING, 1.5)
    assert astuple(swapped) == pytest.approx(astuple(score(truth, prediction, SPACING, 1.5)))
    assert 0.3 < swapped.dice < 1


@pytest.mark.parametrize("seed", range(3))
def test_dice_is_that_of_simpleitk(seed: int) -> None:
    truth, prediction = blobs(seed), blobs(seed, (2, 3, 1))
    overlap = sitk.LabelOverlapMeasuresImageFilter()
    overlap.Execute(*(sitk.GetImageFromArray(mask.astype(np.uint8)) for mask in (truth, prediction)))
    assert score(truth, prediction, SPACING, 1.5).dice == pytest.approx(overlap.GetDiceCoefficient(1))


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("seed", range(3))
def test_scores_agree_with_monai(seed: int) -> None:
    pytest.importorskip("monai")
    truth, prediction = blobs(seed), blobs(seed, (2, 3, 1))
    scores, theirs = score(truth, prediction, SPACING, 1.5), monai_scores(truth, prediction, 1.5)
    # The same definitions: volumes, and surface elements by area
    assert scores.dice == pytest.approx(theirs.dice, abs=1e-6)
    assert scores.surface_dice == pytest.approx(theirs.surface_dice, abs=1e-6)
    assert scores.assd_mm == pytest.approx(monai_mean_by_area(truth, prediction), rel=1e-5)
    # Others: MONAI measures between the centres of border voxels and counts each once. Within half a slice (1.5 mm)
    assert scores.assd_mm == pytest.approx(theirs.assd_mm, abs=0.5)
    assert scores.hd95_mm == pytest.approx(theirs.hd95_mm, abs=1.5)


def monai_scores(truth: np.ndarray, prediction: np.ndarray, tolerance_mm: float) -> Scores:
    import torch
    from monai import metrics

    y, y_pred = (torch.from_numpy(mask[None, None].astype(np.float32)) for mask in (truth, prediction))
    given = {"include_background": True, "spacing": list(SPACING)}
    nsd = metrics.compute_surface_dice(y_pred, y, class_thresholds=[tolerance_mm], use_subvoxels=True, **given)
    return Scores(
        dice=float(metrics.compute_dice(y_pred, y)),
        assd_mm=float(metrics.compute_average_surface_distance(y_pred, y, symmetric=True, **given)),
        hd95_mm=float(metrics.compute_hausdorff_distance(y_pred, y, percentile=95, **given)),
        surface_dice=float(nsd),
        truth_empty=False,
        prediction_empty=False,
    )


def monai_mean_by_area(truth: np.ndarray, prediction: np.ndarray) -> float:
    import torch
    from monai.metrics.utils import get_edge_surface_distance

    y, y_pred = torch.from_numpy(truth), torch.from_numpy(prediction)
    edges, distances, areas = get_edge_surface_distance(
        y_pred, y, spacing=list(SPACING), use_subvoxels=True, symmetric=True
    )
    weights = torch.cat([area[edge] for edge, area in zip(edges, areas, strict=True)])
    return float((torch.cat(distances) * weights).sum() / weights.sum())


MASK = np.ones((3, 4, 5), bool)


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"truth": MASK.astype(int)}, r"truth: expected bool \[D, H, W\], got int64 of shape \(3, 4, 5\)"),
        ({"prediction": MASK[0]}, r"prediction: expected bool \[D, H, W\], got bool of shape \(4, 5\)"),
        ({"prediction": MASK[:2]}, r"prediction: expected the truth's shape \(3, 4, 5\), got \(2, 4, 5\)"),
        ({"spacing_mm": (1.0, 1.0)}, r"spacing_mm: expected three positive numbers, got \(1.0, 1.0\)"),
        ({"spacing_mm": (1.0, 0.0, 1.0)}, "spacing_mm: expected three positive numbers"),
        ({"tolerance_mm": -1.0}, "tolerance_mm: expected a number of 0 or more, got -1.0"),
        ({"tolerance_mm": math.nan}, "tolerance_mm: expected a number of 0 or more, got nan"),
    ],
)
def test_wrong_arguments_are_named(given: dict, sentence: str) -> None:
    usual = {"truth": MASK, "prediction": MASK, "spacing_mm": SPACING, "tolerance_mm": 1.0}
    with pytest.raises(ValueError, match=sentence):
        score(**{**usual, **given})


def test_scores_cannot_be_changed() -> None:
    perfect = score(MASK, MASK, SPACING, 1.0)
    assert replace(perfect, dice=0.5).dice == 0.5
    with pytest.raises(AttributeError):
        perfect.dice = 0.5  # type: ignore[misc]
