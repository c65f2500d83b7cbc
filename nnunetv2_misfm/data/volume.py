"""A scan in memory, whatever file it came from, and its way into the one orientation of an imported dataset.

Geometry follows nibabel: an affine takes the voxel index (i, j, k) to millimetres in a world whose axes point to the
patient's right, front and head (RAS+); an orientation names where each voxel axis points to, so "LPS" is the order in
which DICOM stores an axial slice and in which ITK's direction matrix is the identity.
"""

from dataclasses import dataclass, replace

import nibabel
import numpy as np
import SimpleITK as sitk
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, axcodes2ornt, inv_ornt_aff, io_orientation, ornt_transform

# The orientation of every image written: that of axial DICOM series, so most archives need no change
CANONICAL = "LPS"
# Decimals kept of the written geometry: finer than the float32 header of a NIfTI file holds at 100 mm (8e-6)
_ORIGIN_DECIMALS, _AXES_DECIMALS = 5, 6
# Two images whose voxels all lie within this are in the same place: a tenth of the finest voxels of clinical scanners
# (0.1 mm), and ten times what rounding does: a float32 header is off by up to 3e-4 mm at 512 voxels of 2 mm with an
# origin of 2 m, axes written with 6 decimals by up to 1e-3 mm at 512 voxels
SAME_PLACE_MM = 1e-2
# Beyond it float32 overflows when nnU-Net squares intensities for its standard deviation; no scanner comes near
LARGEST_USABLE = float(np.sqrt(np.finfo(np.float32).max))
# Cosine of the angle between two voxel axes that still count as perpendicular: 0.06 degrees, ten times what headers
# in float32 or with six printed digits are off, and 0.3 mm over 300 mm
_SHEAR_COSINE = 1e-3
# CT gantries tilt by up to 30 degrees; beyond half as much again a damaged header is likelier. Ours
LARGEST_TILT_DEGREES = 45.0
# Volume of the box that three axes of length 1 span, below which they lie in one plane (0.06 degrees). Ours
_FLAT = 1e-3


@dataclass(frozen=True)
class Header:
    """What a file says of itself, axes in the file's own order (i, j, k, ...), the fastest first.

    Attributes:
        shape: voxels per axis.
        spacing_mm: size of a voxel along the first three axes.
        orientation: where these axes point to, e.g. "LPS"; empty where unknown.
        dtype: of the stored voxels, in NumPy's words, e.g. "int16".
        modality: "CT", "MR" or another DICOM term; None where the file does not tell.
    """

    shape: tuple[int, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    orientation: str = ""
    dtype: str = ""
    modality: str | None = None


class Refused(Exception):
    """A scan that cannot enter a dataset.

    Attributes:
        reason: what is wrong with it, in words for the report.
        header: as far as it could be read.
        part: which part of the file or series is meant; empty for the whole.
    """

    def __init__(self, reason: str, header: Header | None = None, part: str = ""):
        super().__init__(reason)
        self.reason = reason
        self.header = header or Header()
        self.part = part

    @property
    def may_pass(self) -> bool:
        """Tells whether the system and not the file was to blame (permission, network), so that it is tried again."""
        return isinstance(self.__cause__, OSError) and self.__cause__.errno is not None

    def of(self, header: Header, part: str) -> "Refused":
        """Returns the same with a header and a part."""
        other = Refused(self.reason, header, part)
        other.__cause__ = self.__cause__
        return other


@dataclass(frozen=True, eq=False)
class Volume:
    """One 3D scan.

    Attributes:
        voxels: real numbers [I, J, K] in any memory order, intensities as the scanner means them (HU in CT).
        affine: float64 [4, 4], voxel index -> mm in RAS+.
        header: what the file says.
        part: which part of a time series or of a DICOM series this is; empty for a whole file or series.
        notes: what was done to make a volume of it, in words for the report.
    """

    voxels: np.ndarray
    affine: np.ndarray
    header: Header
    part: str = ""
    notes: tuple[str, ...] = ()

    @property
    def spacing_mm(self) -> np.ndarray:
        """Size of a voxel along i, j and k in mm, float64 [3]."""
        return voxel_sizes(self.affine)


def orientation_of(affine: np.ndarray) -> str:
    """Returns where the three voxel axes of an affine [4, 4] point to, e.g. "LPS"; oblique axes by the nearest.

    An axis without a direction is "?"; empty where numbers are not finite or too large to tell.
    """
    with np.errstate(all="ignore"):
        if not np.isfinite(affine[:3, :3] ** 2).all():
            return ""
        return "".join(code or "?" for code in nibabel.aff2axcodes(affine))


def spans_space(affine: np.ndarray) -> bool:
    """Tells whether an affine [4, 4] is finite and its three axes have lengths and do not lie in one plane."""
    with np.errstate(all="ignore"):
        return bool(np.isfinite(affine).all() and abs(np.linalg.det(_directions(affine))) >= _FLAT)


def is_sheared(affine: np.ndarray) -> bool:
    """Tells whether the voxel axes of an affine [4, 4] are not perpendicular: gantry tilt, or a warped header."""
    axes = _directions(affine)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR_COSINE)


def is_gantry_tilt(affine: np.ndarray) -> bool:
    """Tells whether the axes of an affine [4, 4] are perpendicular but for a tilt of the third, as of a CT gantry.

    The tilt is the angle between the third axis and the normal of the first two, at most `LARGEST_TILT_DEGREES`.
    """
    first, second, third = _directions(affine).T
    upright = abs(np.cross(first, second) @ third)
    return bool(abs(first @ second) <= _SHEAR_COSINE and upright >= np.cos(np.radians(LARGEST_TILT_DEGREES)))


def _directions(affine: np.ndarray) -> np.ndarray:
    """The three axes as columns of length 1, [3, 3]."""
    return affine[:3, :3] / voxel_sizes(affine)


def corner_distance_mm(affine_one: np.ndarray, affine_other: np.ndarray, shape: tuple[int, ...]) -> float:
    """Returns how far apart in mm two affines [4, 4] put a corner voxel of a grid [I, J, K] at most.

    No voxel of the grid is farther apart: the distance is convex.
    """
    between = affine_one[:3] - affine_other[:3]
    return float(np.linalg.norm(between[:, :3] @ _corners(shape) + between[:, 3:], axis=0).max())


def same_place(affine_one: np.ndarray, affine_other: np.ndarray, shape: tuple[int, ...]) -> bool:
    """Tells whether two affines [4, 4] put every voxel of a grid [I, J, K] in the same place (`SAME_PLACE_MM`)."""
    return corner_distance_mm(affine_one, affine_other, shape) <= SAME_PLACE_MM


def _corners(shape: tuple[int, ...]) -> np.ndarray:
    """Voxel indices of the 8 corners of a grid [I, J, K], as columns [3, 8]."""
    return np.array(np.meshgrid(*[(0, size - 1) for size in shape])).reshape(3, -1)


def is_canonical(affine: np.ndarray) -> bool:
    """Tells whether an image of this affine [4, 4] needs neither flips nor another order of axes nor resampling."""
    return orientation_of(affine) == CANONICAL and not is_sheared(affine)


def canonical(volume: Volume) -> Volume:
    """Returns the same scan with its axes in the order and direction `CANONICAL`, oblique ones left oblique.

    The voxels become a view [I, J, K] of the old ones; every voxel keeps its place in the patient. The axes are made
    perpendicular to the last digit and the affine is rounded to what a file can hold (1e-5 mm, 1e-6 in the axes), so
    that equal scans give equal files.

    Args:
        volume: a scan whose axes are not sheared (`is_sheared`).
    """
    turn = ornt_transform(io_orientation(volume.affine), axcodes2ornt(CANONICAL))
    affine = volume.affine @ inv_ornt_aff(turn, volume.voxels.shape)
    spacing = voxel_sizes(affine)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)  # the nearest perpendicular axes: ITK reads no others
    affine[:3, :3] = (left @ right * spacing).round(_AXES_DECIMALS)
    affine[:3, 3] = affine[:3, 3].round(_ORIGIN_DECIMALS)
    return replace(volume, voxels=apply_orientation(volume.voxels, turn), affine=affine + 0.0)  # no negative zeros


def resample_sheared(volume: Volume, fill: float) -> Volume:
    """Returns a scan with gantry tilt on a grid of perpendicular axes that covers all of it, interpolated linearly.

    The first two axes keep their direction and spacing; the third becomes their normal, with the distance between the
    slices as its spacing: the slices are shifted against each other.

    A voxel that is not finite, or beyond `LARGEST_USABLE`, makes NaN of the new voxels that are interpolated from it:
    those within one old voxel along every axis, and no others.

    Args:
        volume: a scan whose axes pass `is_gantry_tilt`.
        fill: finite intensity of the new voxels that lie outside the old grid.

    Returns:
        float32 [I, J, K]; as many slices as before, and at least as many rows and columns.
    """
    first, second = _directions(volume.affine).T[:2]
    second = second - first * (first @ second)
    second /= np.linalg.norm(second)
    normal = np.cross(first, second)
    normal *= np.sign(normal @ volume.affine[:3, 2])
    axes = np.stack([first, second, normal], axis=1)
    spacing = np.array([*volume.spacing_mm[:2], normal @ volume.affine[:3, 2]])

    world = volume.affine[:3, :3] @ _corners(volume.voxels.shape)
    corners = (axes * spacing).T @ world / (spacing**2)[:, None]  # in voxels of the new grid
    size = np.ceil(corners.max(1) - corners.min(1) - 1e-6).astype(int) + 1
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = volume.affine[:3, 3] + affine[:3, :3] @ corners.min(1)

    # both grids in index space: ITK takes an index of the new grid through `new_to_old` to one of the old
    new_to_old = np.linalg.inv(volume.affine) @ affine
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(new_to_old[:3, :3].ravel().tolist())
    transform.SetTranslation(new_to_old[:3, 3].tolist())
    with np.errstate(over="ignore", invalid="ignore"):
        voxels = volume.voxels.T.astype(np.float32)
    for plane in voxels:
        plane[~(np.abs(plane) <= LARGEST_USABLE)] = np.nan
    image = sitk.GetImageFromArray(voxels)
    grid = sitk.Image([int(n) for n in size], sitk.sitkUInt8)
    resampled = sitk.Resample(image, grid, transform, sitk.sitkLinear, float(fill), sitk.sitkFloat32)
    note = "resampled from sheared axes (gantry tilt) to perpendicular ones"
    return replace(volume, voxels=sitk.GetArrayFromImage(resampled).T, affine=affine, notes=(*volume.notes, note))
