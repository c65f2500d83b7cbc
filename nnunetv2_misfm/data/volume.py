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
# Two images whose voxels lie within this are in the same place: a tenth of what the finest scans resolve, and a hundred
# times the rounding of headers in float32
SAME_PLACE_MM = 1e-3
# Cosine of the angle between two voxel axes that still count as perpendicular: 0.06 degrees, ten times what headers
# in float32 or with six printed digits are off, and 0.3 mm over 300 mm
_SHEAR_COSINE = 1e-3


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
    """Returns where the three voxel axes of an affine [4, 4] point to, e.g. "LPS"; oblique axes by the nearest."""
    return "".join(code or "?" for code in nibabel.aff2axcodes(affine))


def is_sheared(affine: np.ndarray) -> bool:
    """Tells whether the voxel axes of an affine [4, 4] are not perpendicular: gantry tilt, or a warped header."""
    axes = affine[:3, :3] / voxel_sizes(affine)
    return bool(np.abs(axes.T @ axes - np.eye(3)).max() > _SHEAR_COSINE)


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


def resample_sheared(volume: Volume) -> Volume:
    """Returns the scan on a grid of perpendicular axes that covers all of it, interpolated linearly.

    The first two axes keep their direction and spacing; the third becomes their normal, with the distance between the
    slices as its spacing. Voxels outside the old grid get the lowest intensity. A gantry tilt needs no more: only the
    slices are shifted against each other.

    Returns:
        float32 [I, J, K]; at least as many voxels as before along every axis.
    """
    first, second = (volume.affine[:3, axis] / volume.spacing_mm[axis] for axis in (0, 1))
    second = second - first * (first @ second)
    second /= np.linalg.norm(second)
    normal = np.cross(first, second)
    normal *= np.sign(normal @ volume.affine[:3, 2])
    axes = np.stack([first, second, normal], axis=1)
    spacing = np.array([*volume.spacing_mm[:2], normal @ volume.affine[:3, 2]])

    ends = np.array(np.meshgrid(*[(0, size - 1) for size in volume.voxels.shape])).reshape(3, -1)
    corners = (axes * spacing).T @ (volume.affine[:3, :3] @ ends) / (spacing**2)[:, None]  # in voxels of the new grid
    size = np.ceil(corners.max(1) - corners.min(1) - 1e-6).astype(int) + 1
    affine = np.eye(4)
    affine[:3, :3] = axes * spacing
    affine[:3, 3] = volume.affine[:3, 3] + affine[:3, :3] @ corners.min(1)

    # both grids in index space: ITK takes an index of the new grid through `new_to_old` to one of the old
    new_to_old = np.linalg.inv(volume.affine) @ affine
    transform = sitk.AffineTransform(3)
    transform.SetMatrix(new_to_old[:3, :3].ravel().tolist())
    transform.SetTranslation(new_to_old[:3, 3].tolist())
    image = sitk.GetImageFromArray(volume.voxels.T.astype(np.float32))
    lowest = float(volume.voxels.min())
    grid = sitk.Image([int(n) for n in size], sitk.sitkUInt8)
    resampled = sitk.Resample(image, grid, transform, sitk.sitkLinear, lowest, sitk.sitkFloat32)
    note = "resampled from sheared axes (gantry tilt) to perpendicular ones"
    return replace(volume, voxels=sitk.GetArrayFromImage(resampled).T, affine=affine, notes=(*volume.notes, note))
