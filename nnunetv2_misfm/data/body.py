"""Where the patient is in a scan: the body mask that an unlabelled scan carries as its label.

CT by a threshold in HU, MR by the robust threshold of Smith 2002, "Fast robust automated brain extraction", Human Brain
Mapping 17:143-155, its estimation of basic image parameters. Thin things such as the table are removed, the largest
component is kept and its holes are filled. Sampling and statistics need no sharper outline than a few millimetres, so
all of this is done on every n-th voxel: next to reading and writing the scan it costs nothing.
"""

from collections.abc import Sequence
from math import ceil

import numpy as np
from scipy import ndimage

# Tissue lies above: MIS-FM's own body crop (HiLab-git/PyMIC, pymic/util/image_process.py, get_human_region_from_ct).
# Lungs lie below and come back as holes.
CT_THRESHOLD_HU = -600.0
# A CT stored without its intercept holds HU + 1024 (12-bit scanners): nothing is negative, soft tissue lies around
# 1024. 900, ours, is a little below fat; a crop inside the body has no negative voxel either, but only one of dense
# bone or metal has 2 % of its voxels above 900 HU.
_CT_INTERCEPT, _CT_SHIFTED_TISSUE = -1024.0, 900.0
# Smith 2002: 2 and 98 % of the voxels lie below the robust minimum and maximum, and what lies below a tenth of the way
# between them is background
_ROBUST_PERCENTILES, _MR_FRACTION = (2.0, 98.0), 0.1

# All from here on: ours.
# The reduced grid, steps along k, j and i: 2 mm within a slice, so that a child's chest wall of 10 mm outlives the
# opening; 16 voxels per axis still show a shape; 2^24 need about 0.2 GB and come up only in scans of several 100 MB.
_STEPS_MM, _MIN_SAMPLES, _MAX_SAMPLES = (3.0, 2.0, 2.0), 16, 2**24
# Half the thickness of what counts as thin, rounded to voxels: skins of a table top (1-3 mm), blankets, tubes; MIS-FM
# opens by about 7 mm (two 3 x 3 steps at half size). In a small image at most this share of its size.
_RADIUS_MM, _RADIUS_SHARE = 2.0, 1 / 16
# Components of this share of the largest are kept too: both legs, but neither an arm beside the trunk nor a table
_KEPT_SHARE = 0.5
# The part of a side of a slice that counts as near its corner
_CORNER_SHARE = 1 / 16
# A voxel's neighbours in the background, [K, J, I]: the four in its axial slice, none in other slices
_IN_SLICE = np.array([[[0] * 3] * 3, [[0, 1, 0], [1, 1, 1], [0, 1, 0]], [[0] * 3] * 3], bool)


def body_mask(voxels: np.ndarray, spacing_mm: Sequence[float], modality: str) -> np.ndarray:
    """Returns where the patient's body is, lungs and other air inside it included.

    The mask is never empty, and consists of blocks of at most 2 x 2 x 3 mm. Where removing thin things leaves nothing,
    they stay; where nothing lies above the threshold, all is body. All is body as well in a crop from inside of it: an
    MR in which fewer than 2 % of the voxels are as dark as air, and a CT without air, which a CT looks like too that is
    no longer in HU (scaled to [0, 1]) or was cut off above -600. A CT stored without its intercept (0..4095) is
    recognised. In MR, tissue darker than a tenth of the robust maximum is missed where it meets a corner of the slice.

    Args:
        voxels: finite real numbers [I, J, K] in orientation LPS: i to the left, j to the back, k to the head; HU in CT.
        spacing_mm: of i, j and k, above zero.
        modality: "CT"; any other is treated as MR.

    Returns:
        uint8 [I, J, K] in Fortran order, 1 = body.
    """
    reversed_voxels, reversed_spacing = voxels.T, tuple(spacing_mm)[::-1]  # [K, J, I]
    steps = _steps(reversed_voxels.shape, reversed_spacing)
    reduced = np.ascontiguousarray(reversed_voxels[tuple(slice(step // 2, None, step) for step in steps)])
    box = [
        1 + 2 * min(round(_RADIUS_MM / (step * spacing)), int(size * _RADIUS_SHARE))
        for step, spacing, size in zip(steps, reversed_spacing, reduced.shape, strict=True)
    ]
    body = _ct_body(reduced, box) if modality == "CT" else _mr_body(reduced, box)
    return _enlarged(body.view(np.uint8), steps, reversed_voxels.shape).T


def _steps(shape: Sequence[int], spacing_mm: Sequence[float]) -> list[int]:
    """Returns the step in voxels along k, j and i of the reduced grid."""
    steps = [
        max(1, min(int(step_mm / spacing), size // _MIN_SAMPLES))
        for step_mm, size, spacing in zip(_STEPS_MM, shape, spacing_mm, strict=True)
    ]
    while np.prod([ceil(size / step) for size, step in zip(shape, steps, strict=True)]) > _MAX_SAMPLES:
        finest = min(range(len(steps)), key=lambda axis: steps[axis] * spacing_mm[axis])
        steps[finest] += 1
    return steps


def _ct_body(voxels: np.ndarray, box: Sequence[int]) -> np.ndarray:
    """Returns the body in a CT as bool [K, J, I], without what is thinner in a slice than a box (voxels per axis)."""
    stored_without_intercept = voxels.min() >= 0 and _robust_range(voxels)[1] > _CT_SHIFTED_TISSUE
    above = voxels > CT_THRESHOLD_HU - (_CT_INTERCEPT if stored_without_intercept else 0)
    in_slice = (1, *box[1:])
    eroded = ndimage.minimum_filter(above, in_slice, mode="constant", cval=0)
    opened = ndimage.maximum_filter(eroded, in_slice, mode="constant", cval=0)
    # a table that closes a gap with the back must be gone before gaps are filled
    return _filled(_largest(_first_not_empty(opened, above)))


def _mr_body(voxels: np.ndarray, box: Sequence[int]) -> np.ndarray:
    """Returns the body in an MR as bool [K, J, I]: where the mean over a box (voxels per axis) exceeds the threshold.

    The mean takes the noise off the air and bridges thin dark tissue. As the threshold is low, it also spreads the body
    by about half a box, which an erosion along each axis takes back; outside the image it goes on. Noise of more than
    about a sixth of the tissue's intensity is not told from it.
    """
    lowest, highest = _robust_range(voxels)
    if lowest > _MR_FRACTION * highest:  # there is no air
        return np.ones(voxels.shape, bool)
    mean = ndimage.uniform_filter(voxels, box, output=np.result_type(voxels, np.float32))
    above = mean > lowest + _MR_FRACTION * (highest - lowest)
    eroded = [ndimage.minimum_filter1d(above, size, axis, mode="constant", cval=1) for axis, size in enumerate(box)]
    # a scalp that the dark skull parts from the brain must be filled before a component is chosen
    return _largest(_filled(_first_not_empty(np.logical_and.reduce(eroded), above)))


def _robust_range(voxels: np.ndarray) -> tuple[float, float]:
    """Returns the intensities t2 and t98 below which 2 and 98 % of the voxels lie."""
    lowest, highest = np.percentile(voxels, _ROBUST_PERCENTILES, method="lower")
    return float(lowest), float(highest)


def _first_not_empty(*masks: np.ndarray) -> np.ndarray:
    """Returns the first of some masks that is not empty; where all are, one that is True everywhere."""
    return next((mask for mask in masks if mask.any()), np.ones_like(masks[0]))


def _largest(mask: np.ndarray) -> np.ndarray:
    """Returns the largest component of a mask, and those of at least half its size."""
    components, _ = ndimage.label(mask)
    sizes = np.bincount(components[mask])
    return (sizes >= _KEPT_SHARE * sizes.max())[components]


def _filled(mask: np.ndarray) -> np.ndarray:
    """Returns a mask [K, J, I] with its holes filled slice by slice, so that air cut open by the last slice is filled.

    The outside is what meets the border of a slice near a corner: a body hardly ever fills the corners of an image,
    while the middle of a side often cuts lungs or dark muscle open.
    """
    regions, count = ndimage.label(~mask, _IN_SLICE)
    height, width = (ceil(size * _CORNER_SHARE) for size in mask.shape[1:])
    is_outside = np.zeros(count + 1, bool)
    for side, near in (
        (regions[:, 0], width),
        (regions[:, -1], width),
        (regions[:, :, 0], height),
        (regions[:, :, -1], height),
    ):
        is_outside[side[:, :near]] = is_outside[side[:, -near:]] = True
    is_outside[0] = False  # the mask itself
    return ~is_outside[regions]


def _enlarged(mask: np.ndarray, steps: Sequence[int], shape: Sequence[int]) -> np.ndarray:
    """Returns a mask on the full grid, each voxel of the reduced one repeated around its place."""
    for axis in (2, 1, 0):
        repeats = np.full(mask.shape[axis], steps[axis])
        repeats[-1] += shape[axis] - repeats.sum()
        mask = np.repeat(mask, repeats, axis)
    return mask
