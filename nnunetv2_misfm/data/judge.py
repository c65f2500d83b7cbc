"""Is this volume fit for pretraining? Checks on geometry and voxels, and the one form in which voxels are stored."""

from dataclasses import dataclass

import numpy as np
from nibabel.affines import voxel_sizes

from nnunetv2_misfm.data.volume import (
    LARGEST_TILT_DEGREES,
    LARGEST_USABLE,
    Refused,
    Volume,
    is_gantry_tilt,
    is_sheared,
    spans_space,
)

# Fewer voxels along an axis hold no box of Volume Fusion, whose smallest side is 8 voxels (reference of the default
# recipe in trainers/volume_fusion.py)
MIN_SIZE = 8
# Sizes in mm that a voxel can have: micro-CT resolves 1e-3, and no scan has slices 100 apart. Ours
_SIZES_MM = (1e-3, 100.0)
# Origins beyond 1 km come from damaged headers; float32, in which NIfTI holds them, is off by 0.03 mm there. Ours
_FARTHEST_MM = 1e6
# Stored types in the order tried: the first that holds every voxel exactly. All are read by nnU-Net's SimpleITK reader
_INTEGER_TYPES = (np.int16, np.uint16, np.int32)

# A label map is told by its flatness. Seen in scans and label maps of 14 sources: of the neighbours along the fastest
# axis that are not both background, 1 % to 30 % are equal in scans, 61 % to 97 % in label maps
_EQUAL_NEIGHBOURS = 0.5
# With so few different intensities it is a label map (or worthless), however flat and of whatever type: masks are also
# stored as 0 and 0.5, or with a slope of 1/255
_FEW_VALUES = 16
# With so many it is an image, were it enlarged voxel by voxel: atlases name some hundred structures
_MANY_VALUES = 1000
SAMPLE = 1 << 19  # voxels looked at where a share tells: 1 % of them is off by 0.014 % (one sigma)


@dataclass(frozen=True)
class Intensities:
    """What the voxels of a volume hold.

    Attributes:
        lowest: the lowest usable intensity, inf where there is none.
        highest: the highest, -inf where there is none.
        unusable: number of voxels that are not finite, or too large for float32 arithmetic.
        integral: whether all usable intensities are whole numbers.
    """

    lowest: float
    highest: float
    unusable: int
    integral: bool


def check_geometry(volume: Volume, min_size: int = MIN_SIZE, *, allow_shear: bool = False) -> None:
    """Checks size and axes.

    Args:
        volume: the scan.
        min_size: smallest number of voxels along any axis.
        allow_shear: whether axes pass that a gantry tilt keeps from being perpendicular.

    Raises:
        Refused: 2D, too small, voxels without a plausible size, place or direction, or axes that are sheared: at all,
            or where `allow_shear`, otherwise than by a gantry tilt (`is_gantry_tilt`).
    """
    shape = volume.voxels.shape
    if 1 in shape:
        raise Refused("2D: a single slice", volume.header, volume.part)
    if min(shape) < min_size:
        raise Refused(f"smaller than {min_size} voxels along an axis", volume.header, volume.part)
    reason = _against_affine(volume.affine, allow_shear)
    if reason:
        raise Refused(reason, volume.header, volume.part)


def _against_affine(affine: np.ndarray, allow_shear: bool) -> str:
    """Returns what is wrong with an affine [4, 4]; empty for nothing."""
    if not np.isfinite(affine).all():
        return "the header gives no usable voxel size or direction: not all its numbers are finite"
    with np.errstate(all="ignore"):
        sizes = voxel_sizes(affine)
    if not ((sizes >= _SIZES_MM[0]) & (sizes <= _SIZES_MM[1])).all():
        said = " x ".join(f"{size:g}" for size in sizes)
        return f"the header gives no usable voxel size: {said} mm, where {_SIZES_MM[0]:g} to {_SIZES_MM[1]:g} can be"
    if np.abs(affine[:3, 3]).max() > _FARTHEST_MM:
        return f"the header gives no usable place: {np.abs(affine[:3, 3]).max():g} mm from the origin"
    if not spans_space(affine):
        return "the header gives no usable direction: the three axes lie in one plane"
    if not is_sheared(affine):
        return ""
    if not is_gantry_tilt(affine):
        return f"sheared axes, and by no gantry tilt (of the third axis alone, up to {LARGEST_TILT_DEGREES:g} degrees)"
    return "" if allow_shear else "sheared axes (gantry tilt); --resample-sheared brings it to perpendicular ones"


def survey(voxels: np.ndarray) -> Intensities:
    """Looks at every voxel once, slice by slice, so that no second copy of [I, J, K] is made."""
    if voxels.dtype.kind in "iub":
        return Intensities(float(voxels.min()), float(voxels.max()), 0, True)
    lowest, highest, unusable, integral = np.inf, -np.inf, 0, True
    for index in range(voxels.shape[2]):
        plane = voxels[:, :, index]
        usable = np.abs(plane) <= LARGEST_USABLE  # False for NaN
        count = int(np.count_nonzero(usable))
        if count < plane.size:
            unusable += plane.size - count
            plane = plane[usable]
        if count:
            lowest, highest = min(lowest, float(plane.min())), max(highest, float(plane.max()))
            integral = integral and bool((np.rint(plane) == plane).all())
    return Intensities(lowest, highest, unusable, integral)


def check_intensities(volume: Volume, seen: Intensities) -> None:
    """Raises Refused where a volume holds no image: nothing finite, one intensity everywhere, or a label map."""
    if seen.unusable == volume.voxels.size:
        raise Refused("no finite voxel", volume.header, volume.part)
    if seen.lowest == seen.highest:
        raise Refused(f"constant: every voxel is {seen.lowest:g}", volume.header, volume.part)
    if _is_label_map(volume.voxels, seen):
        raise Refused("a label map, not an image", volume.header, volume.part)


def stored_form(voxels: np.ndarray, seen: Intensities, fill: float) -> np.ndarray:
    """Returns the voxels as they are written: Fortran order, the smallest exact type, unusable ones replaced.

    Args:
        voxels: real [I, J, K].
        seen: what `survey` said of them.
        fill: intensity put in place of unusable voxels.

    Returns:
        [I, J, K], int16, uint16 or int32 where all intensities are whole numbers that it holds, else float32. The same
        array where it has this form already.
    """
    dtype: type = np.float32
    if seen.integral:
        for candidate in _INTEGER_TYPES:
            if np.iinfo(candidate).min <= seen.lowest and seen.highest <= np.iinfo(candidate).max:
                dtype = candidate
                break
    if seen.unusable:
        written: np.ndarray = np.empty(voxels.shape, dtype, order="F")
        for index in range(voxels.shape[2]):
            plane = voxels[:, :, index]
            written[:, :, index] = np.where(np.abs(plane) <= LARGEST_USABLE, plane, fill)
        return written
    return np.asarray(voxels, dtype=dtype, order="F")


def _is_label_map(voxels: np.ndarray, seen: Intensities) -> bool:
    """Tells a map [I, J, K] by few values or, of whole numbers, by the share of equal neighbours off the background."""
    step = max(1, round((voxels.size / SAMPLE) ** 0.5))
    rows = voxels[:, ::step, ::step]
    values, counts = np.unique(rows[np.abs(rows) <= LARGEST_USABLE], return_counts=True)
    if len(values) <= _FEW_VALUES:
        return _count_values(voxels, _FEW_VALUES + 1) <= _FEW_VALUES
    if not seen.integral or len(values) >= _MANY_VALUES:
        return False
    # the background, and the two ends to which windowed images are clipped
    plateaus = (values[counts.argmax()], values[0], values[-1])
    left, right = rows[:-1], rows[1:]
    off_plateau = ~np.isin(left, plateaus) | ~np.isin(right, plateaus)
    off_plateau &= (np.abs(left) <= LARGEST_USABLE) & (np.abs(right) <= LARGEST_USABLE)
    equal = int(np.count_nonzero((left == right) & off_plateau))
    return equal > _EQUAL_NEIGHBOURS * max(1, int(np.count_nonzero(off_plateau)))


def _count_values(voxels: np.ndarray, enough: int) -> int:
    """Number of different usable values, counted until there are `enough`."""
    values = np.array([], voxels.dtype)
    for index in range(voxels.shape[2]):
        plane = voxels[:, :, index]
        values = np.union1d(values, plane[np.abs(plane) <= LARGEST_USABLE])
        if len(values) >= enough:
            break
    return len(values)
