"""Scores of one mask against another: Dice, and three distances between their surfaces, in mm.

Surfaces are those of the library `surface-distance` (Nikolov et al. 2018, arXiv:1809.04430, the surface Dice of the
Medical Segmentation Decathlon): elements between voxel corners, each counted by its area, so that neither a finer grid
nor thick slices change a surface's weight.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import surface_distance

HAUSDORFF_PERCENT = 95.0  # the field's robust Hausdorff distance; the maximum hangs on single voxels
# Relative. NIfTI stores spacings as float32, where 1.2 is 1.2000000477: a tolerance of one voxel must cover one voxel
TOLERANCE_SLACK = 1e-6


@dataclass(frozen=True)
class Scores:
    """What one mask is worth beside another; every number is finite, whatever is empty (`score` states the rule).

    Attributes:
        dice: Overlap of the volumes, 0..1.
        assd_mm: Average symmetric surface distance: mean over both surfaces together, by area.
        hd95_mm: Robust Hausdorff distance: the larger of the two directed 95th percentiles, by area.
        surface_dice: Share of both surfaces that lies within the tolerance of the other one, 0..1, by area.
        truth_empty: The truth holds no voxel.
        prediction_empty: The prediction holds no voxel.
    """

    dice: float
    assd_mm: float
    hd95_mm: float
    surface_dice: float
    truth_empty: bool
    prediction_empty: bool


def score(truth: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float) -> Scores:
    """Returns the scores of a mask; truth and prediction may change places.

    Empty masks count, so that every trainer is compared on the same cases:
    - both empty: Dice 1, surface Dice 1, distances 0. (nnU-Net writes NaN there and leaves the case out of its mean.)
    - one of them empty: Dice 0, surface Dice 0, and both distances are the diagonal of the image in mm, the largest
      distance that is possible in it.

    An image of one slice is scored in its plane: contours by length instead of surfaces by area, the spacing across the
    slice (nnU-Net's readers put 999 there) left out. A mask that reaches the border of the image ends there.

    Args:
        truth: [D, H, W], bool.
        prediction: [D, H, W], bool.
        spacing_mm: Size of a voxel along D, H, W in mm, positive.
        tolerance_mm: Distance up to which (inclusive) surfaces agree for the surface Dice, mm, not negative.

    Raises:
        ValueError: The masks are not bool [D, H, W] of one shape, or a number is out of range.
    """
    _check(truth, prediction, spacing_mm, tolerance_mm)
    spacing = np.asarray(spacing_mm, float)
    if 1 in truth.shape:
        across = truth.shape.index(1)
        truth, prediction, spacing = truth.squeeze(across), prediction.squeeze(across), np.delete(spacing, across)
    truth_empty, prediction_empty = not truth.any(), not prediction.any()
    if truth_empty and prediction_empty:
        return Scores(1.0, 0.0, 0.0, 1.0, truth_empty, prediction_empty)
    if truth_empty or prediction_empty:
        diagonal_mm = float(np.linalg.norm(truth.shape * spacing))
        return Scores(0.0, diagonal_mm, diagonal_mm, 0.0, truth_empty, prediction_empty)
    # crops to the voxels of both masks by itself
    surfaces = surface_distance.compute_surface_distances(truth, prediction, spacing)
    tolerance = tolerance_mm * (1 + TOLERANCE_SLACK)
    return Scores(
        dice=float(surface_distance.compute_dice_coefficient(truth, prediction)),
        assd_mm=_assd(surfaces),
        hd95_mm=float(surface_distance.compute_robust_hausdorff(surfaces, HAUSDORFF_PERCENT)),
        surface_dice=float(surface_distance.compute_surface_dice_at_tolerance(surfaces, tolerance)),
        truth_empty=False,
        prediction_empty=False,
    )


def _assd(surfaces: dict[str, np.ndarray]) -> float:
    """Returns the mean over both surfaces together; the library's own means are one per direction."""
    distances_mm = np.concatenate([surfaces["distances_gt_to_pred"], surfaces["distances_pred_to_gt"]])
    areas = np.concatenate([surfaces["surfel_areas_gt"], surfaces["surfel_areas_pred"]])
    return float(np.average(distances_mm, weights=areas))


def _check(truth: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float], tolerance_mm: float) -> None:
    for name, mask in (("truth", truth), ("prediction", prediction)):
        if mask.dtype != bool or mask.ndim != 3:
            raise ValueError(f"{name}: expected bool [D, H, W], got {mask.dtype} of shape {mask.shape}.")
    if truth.shape != prediction.shape:
        raise ValueError(f"prediction: expected the truth's shape {truth.shape}, got {prediction.shape}.")
    if len(spacing_mm) != 3 or not all(0 < size < math.inf for size in spacing_mm):
        raise ValueError(f"spacing_mm: expected three positive numbers, got {tuple(spacing_mm)}.")
    if not 0 <= tolerance_mm < math.inf:
        raise ValueError(f"tolerance_mm: expected a number of 0 or more, got {tolerance_mm}.")
