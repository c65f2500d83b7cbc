"""Is this volume fit for pretraining? Checks on geometry and voxels, and the one form in which voxels are stored."""

from dataclasses import dataclass

import numpy as np

from nnunetv2_misfm.data.volume import Refused, Volume, is_sheared

# Fewer voxels along an axis hold no box of Volume Fusion, whose smallest side is 8 voxels (reference of the default
# recipe in trainers/volume_fusion.py)
MIN_SIZE = 8
# Beyond it float32 overflows when nnU-Net squares intensities for its standard deviation; no scanner comes near
_UNUSABLE = float(np.sqrt(np.finfo(np.float32).max))
# Stored types in the order tried: the first that holds every voxel exactly. All are read by nnU-Net's SimpleITK reader
_INTEGER_TYPES = (np.int16, np.uint16, np.int32)

# A label map is told by its flatness. Seen in scans and label maps of 14 sources: of the neighbours along the fastest
# axis that are not both background, 1 % to 30 % are equal in scans, 61 % to 97 % in label maps
_EQUAL_NEIGHBOURS = 0.5
_FEW_VALUES = 16  # with so few different intensities it is a label map (or worthless), however flat
_MANY_VALUES = (
    1000  # with so many it is an image, were it enlarged voxel by voxel; atlases name some hundred structures
)
_SAMPLE = 1 << 19  # voxels looked at, in whole rows


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
        allow_shear: whether axes that are not perpendicular pass.

    Raises:
        Refused: 2D, too small, voxels without a size, or sheared axes.
    """
    shape = volume.voxels.shape
    if 1 in shape:
        raise Refused("2D: a single slice", volume.header, volume.part)
    if min(shape) < min_size:
        raise Refused(f"smaller than {min_size} voxels along an axis", volume.header, volume.part)
    if not np.isfinite(volume.affine).all() or np.linalg.det(volume.affine[:3, :3]) == 0:
        raise Refused("the header gives no usable voxel size or direction", volume.header, volume.part)
    if not allow_shear and is_sheared(volume.affine):
        reason = "sheared axes (gantry tilt); --resample-sheared brings it to perpendicular ones"
        raise Refused(reason, volume.header, volume.part)


def survey(voxels: np.ndarray) -> Intensities:
    """Looks at every voxel once, slice by slice, so that no second copy of [I, J, K] is made."""
    if voxels.dtype.kind in "iub":
        return Intensities(float(voxels.min()), float(voxels.max()), 0, True)
    lowest, highest, unusable, integral = np.inf, -np.inf, 0, True
    for index in range(voxels.shape[2]):
        plane = voxels[:, :, index]
        usable = np.abs(plane) <= _UNUSABLE  # False for NaN
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
    if seen.integral and _is_label_map(volume.voxels):
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
            written[:, :, index] = np.where(np.abs(plane) <= _UNUSABLE, plane, fill)
        return written
    return np.asarray(voxels, dtype=dtype, order="F")


def _is_label_map(voxels: np.ndarray) -> bool:
    """Tells a map [I, J, K] of whole numbers from an image by the share of equal neighbours off the background."""
    step = max(1, round((voxels.size / _SAMPLE) ** 0.5))
    rows = voxels[:, ::step, ::step]
    values, counts = np.unique(rows[np.abs(rows) <= _UNUSABLE], return_counts=True)
    if len(values) <= _FEW_VALUES:
        return _count_values(voxels, _FEW_VALUES + 1) <= _FEW_VALUES
    if len(values) >= _MANY_VALUES:
        return False
    # the background, and the two ends to which windowed images are clipped
    plateaus = (values[counts.argmax()], values[0], values[-1])
    left, right = rows[:-1], rows[1:]
    off_plateau = ~np.isin(left, plateaus) | ~np.isin(right, plateaus)
    off_plateau &= (np.abs(left) <= _UNUSABLE) & (np.abs(right) <= _UNUSABLE)
    equal = int(np.count_nonzero((left == right) & off_plateau))
    return equal > _EQUAL_NEIGHBOURS * max(1, int(np.count_nonzero(off_plateau)))


def _count_values(voxels: np.ndarray, enough: int) -> int:
    """Number of different usable values, counted until there are `enough`."""
    values = np.array([], voxels.dtype)
    for index in range(voxels.shape[2]):
        plane = voxels[:, :, index]
        values = np.union1d(values, plane[np.abs(plane) <= _UNUSABLE])
        if len(values) >= enough:
            break
    return len(values)
