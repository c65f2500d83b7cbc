"""Where the slices of a DICOM series lie, and whether they make a 3D image: stacks, time points, gaps, the affine.

Slices of single-frame files and frames of an enhanced multi-frame file are described alike, by a `Frame`. Positions and
directions are those of DICOM's patient coordinates (mm, axes to the patient's left, back and head), as the Image Plane
Module (DICOM PS3.3, C.7.6.2.1.1) defines them; only `affine_of` turns them to RAS+.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isclose
from pathlib import Path

import numpy as np
from pydicom.dataset import Dataset

from nnunetv2_misfm.data.volume import SAME_PLACE_MM, Header, Refused, orientation_of

# How far a slice may be off its place on the even grid, in steps between slices. Scanners print positions with few
# digits and tables stop inexactly; a tenth of a step is below what linear interpolation along the axis would show
_OFF_GRID = 0.1
# Two slices are at one place where they differ by less than this share of a pixel: far above the noise of printed
# digits, far below any distance between slices
_SAME_PLACE = 0.01
# Largest difference of direction cosines, and of spacings relative to each other, within one stack: 0.06 degrees
_SAME_GRID = 1e-3
# Largest error of length or angle in the two direction cosines of a header: what three printed digits leave
_BAD_COSINES = 1e-2
_GAPS_NAMED = 5
# The attributes that `frames_of` reads, and those that tell whether a file holds slices at all
FRAME_TAGS = [
    *("SOPInstanceUID", "Modality", "Rows", "Columns", "SamplesPerPixel", "PhotometricInterpretation"),
    *("BitsAllocated", "PixelRepresentation", "NumberOfFrames", "ImagePositionPatient", "ImageOrientationPatient"),
    *("PixelSpacing", "RescaleSlope", "RescaleIntercept", "TemporalPositionIndex", "TemporalPositionIdentifier"),
    *("EchoNumbers", "DiffusionBValue", "AcquisitionNumber", "InstanceNumber", "ModalityLUTSequence"),
    *("SharedFunctionalGroupsSequence", "PerFrameFunctionalGroupsSequence"),
]
# The functional groups that hold the same of a frame in a multi-frame file (PS3.3, C.7.6.16.2 and C.8.13.5)
_GROUPS = (
    *("PlanePositionSequence", "PlaneOrientationSequence", "PixelMeasuresSequence", "FrameContentSequence"),
    *("PixelValueTransformationSequence", "MREchoSequence", "MRDiffusionSequence"),
)


class NoSlice(Refused):
    """An image that is whole but no slice of a scan; the rest of its series may be one."""


@dataclass(frozen=True)
class Frame:
    """One slice: a single-frame file, or one frame of a multi-frame file.

    Attributes:
        file: that holds it.
        index: of the frame in the file, from 0; None in a single-frame file.
        shape: (columns, rows).
        position: centre of the first voxel in mm.
        row_axis: unit vector along a row of pixels (towards higher columns).
        column_axis: unit vector along a column of pixels (towards higher rows).
        spacing: mm between neighbouring (columns, rows): the two numbers of PixelSpacing, swapped.
        rescale: (slope, intercept) from stored values to intensities.
        temporal: number of the time point, where told.
        echo: number of the echo, or its time, where told.
        order: sorts the frames of one place, after time point and echo.
        stack: name of the stack in a multi-frame file; empty elsewhere.
        dtype: of the stored values, in NumPy's words.
        modality: DICOM's, e.g. "CT".
        transfer_syntax: UID of the encoding of the pixels; empty where the file has no meta header.
        monochrome1: the slice is meant to be shown with its lowest values white; they are stored like any others.
        lookup_table: intensities come from a table (Modality LUT), not from the rescale.
        spare: a copy of the slice in another file, to be read where this one turns out to be broken.
    """

    file: Path
    index: int | None
    shape: tuple[int, int]
    position: tuple[float, ...]
    row_axis: tuple[float, ...]
    column_axis: tuple[float, ...]
    spacing: tuple[float, float]
    rescale: tuple[float, float] = (1.0, 0.0)
    temporal: int | None = None
    echo: float | None = None
    order: tuple[float, ...] = ()
    stack: str = ""
    dtype: str = ""
    modality: str | None = None
    transfer_syntax: str = ""
    monochrome1: bool = False
    lookup_table: bool = False
    spare: "Frame | None" = None

    def __post_init__(self) -> None:
        """Raises Refused where the numbers describe no plane in space."""
        axes = np.array([self.row_axis, self.column_axis])
        if not np.isfinite([*self.position, *self.spacing, *self.rescale]).all() or min(self.spacing) <= 0:
            raise Refused("position, pixel spacing or rescale of a slice is not a usable number")
        if not np.abs(axes @ axes.T - np.eye(2)).max() < _BAD_COSINES:
            raise Refused("ImageOrientationPatient holds no two perpendicular unit vectors")
        if self.rescale[0] == 0:
            raise Refused("RescaleSlope is 0: every voxel would get the same value")

    @property
    def normal(self) -> np.ndarray:
        """Unit vector float64 [3] perpendicular to the slice, right-handed with row and column axis."""
        normal = np.cross(self.row_axis, self.column_axis)
        return normal / np.linalg.norm(normal)

    @property
    def identity(self) -> tuple[object, ...]:
        """What two copies of one slice have in common, beside their UID, which careless anonymisers make all alike."""
        place = tuple(round(x / SAME_PLACE_MM) for x in self.position)
        return self.shape, place, self.temporal, self.echo, self.order, self.stack

    def shares_grid(self, other: "Frame") -> bool:
        """Tells whether two slices have one size, pixel spacing and orientation and one name of their stack."""
        axes = zip(self.row_axis + self.column_axis, other.row_axis + other.column_axis, strict=True)
        return (
            (self.shape, self.stack) == (other.shape, other.stack)
            and all(abs(a - b) <= _SAME_GRID for a, b in axes)
            and all(isclose(a, b, rel_tol=_SAME_GRID) for a, b in zip(self.spacing, other.spacing, strict=True))
        )


def frames_of(header: Dataset, file: Path, modality: str | None, transfer_syntax: str) -> list[Frame]:
    """Describes the slices of one file by its header.

    Raises:
        NoSlice: It says too little to place them.
        Refused: What it says cannot be.
        Exception: Values that are no numbers.
    """
    count = int(header.get("NumberOfFrames") or 1)
    groups = header.get("PerFrameFunctionalGroupsSequence") or []
    if not groups and count > 1:
        raise NoSlice(f"multi-frame image ({count} frames) without a position per frame")
    if groups and len(groups) != count:
        raise Refused(f"{count} frames, but places of {len(groups)}, in {file.name}")
    shared = (header.get("SharedFunctionalGroupsSequence") or [Dataset()])[0]
    values = [_flat(shared, own) for own in groups] or [header]
    return [
        _frame_of(header, file, index if groups else None, own, modality, transfer_syntax)
        for index, own in enumerate(values)
    ]


def _flat(shared: Dataset, own: Dataset) -> Dataset:
    """Returns the attributes of all functional groups of one frame in one data set, its own over the shared ones."""
    flat = Dataset()
    for groups in (shared, own):
        for name in _GROUPS:
            if groups.get(name):
                flat.update(groups[name][0])
    return flat


def _frame_of(
    header: Dataset, file: Path, index: int | None, values: Dataset, modality: str | None, transfer_syntax: str
) -> Frame:
    """Describes one slice by the attributes of its file and those of its own."""
    position = _numbers(values, "ImagePositionPatient", 3)
    axes = _numbers(values, "ImageOrientationPatient", 6)
    spacing = _numbers(values, "PixelSpacing", 2)
    if not (position and axes and spacing):
        raise NoSlice("no place in space: ImagePositionPatient, ImageOrientationPatient or PixelSpacing is missing")
    temporal = _numbers(values, "TemporalPositionIndex") or _numbers(values, "TemporalPositionIdentifier")
    echo = _numbers(values, "EchoNumbers") or _numbers(values, "EffectiveEchoTime")
    order = [_numbers(values, name) or (0.0,) for name in ("DiffusionBValue", "AcquisitionNumber", "InstanceNumber")]
    kind = "float" if "PixelRepresentation" not in header else "int" if header.PixelRepresentation else "uint"
    return Frame(
        file=file,
        index=index,
        shape=(int(header.Columns), int(header.Rows)),
        position=position,
        row_axis=axes[:3],
        column_axis=axes[3:],
        spacing=(spacing[1], spacing[0]),
        rescale=((_numbers(values, "RescaleSlope") or (1.0,))[0], (_numbers(values, "RescaleIntercept") or (0.0,))[0]),
        temporal=int(temporal[0]) if temporal else None,
        echo=echo[0] if echo else None,
        order=(*(number[0] for number in order), index or 0),
        stack=str(values.get("StackID") or "") if index is not None else "",
        dtype=f"{kind}{header.BitsAllocated}",
        modality=modality,
        transfer_syntax=transfer_syntax,
        monochrome1=str(header.get("PhotometricInterpretation") or "").upper().startswith("MONOCHROME1"),
        lookup_table=bool(header.get("ModalityLUTSequence")),
    )


def _numbers(values: Dataset, name: str, count: int | None = None) -> tuple[float, ...]:
    """Returns the numbers of an attribute, none where it is missing or empty; ValueError where they are not `count`."""
    value = values.get(name)
    if value is None or value == "":
        return ()
    numbers = tuple(np.atleast_1d(np.asarray(value, dtype=float)).tolist())
    if numbers and count not in (None, len(numbers)):
        raise ValueError(name)
    return numbers


def whole_copy(copies: Sequence[tuple[list[Frame], Refused | None]]) -> list[Frame]:
    """Returns the slices of the first file without a flaw, with those of the others to spare; raises the first flaw."""
    whole = [frames for frames, flaw in copies if flaw is None]
    if not whole and copies[0][1]:
        raise copies[0][1]
    chosen = whole.pop()
    while whole:
        chosen = [replace(frame, spare=spare) for frame, spare in zip(whole.pop(), chosen, strict=True)]
    return chosen


def split_stacks(frames: Sequence[Frame]) -> list[list[Frame]]:
    """Returns the frames that share a grid, each group in ascending order along its normal.

    The groups stand in the order of their first frame.
    """
    stacks: list[list[Frame]] = []
    for frame in frames:
        stack = next((stack for stack in stacks if stack[0].shares_grid(frame)), None)
        if stack is None:
            stacks.append([frame])
        else:
            stack.append(frame)
    return [[stack[k] for k in np.argsort(_offsets(stack), kind="stable")] for stack in stacks]


def split_time_points(stack: Sequence[Frame]) -> list[list[Frame]]:
    """Returns the volumes of a sorted stack in which every place recurs equally often; one volume where none recurs.

    Raises:
        Refused: Places recur unequally often, or the time points or echoes of the volumes would be mixed.
    """
    new_place = np.diff(_offsets(stack)) > _SAME_PLACE * min(stack[0].spacing)
    bounds = [0, *(np.flatnonzero(new_place) + 1).tolist(), len(stack)]
    places = [
        sorted(stack[a:b], key=lambda frame: (frame.temporal or 0, frame.echo or 0, frame.order))
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]
    counts = sorted({len(place) for place in places})
    if len(counts) > 1:
        raise Refused(f"slices recur unequally: some places hold {counts[0]} slice(s), others up to {counts[-1]}")
    volumes = [list(volume) for volume in zip(*places, strict=True)]
    if len(volumes) > 1 and any(len({(frame.temporal, frame.echo) for frame in volume}) > 1 for volume in volumes):
        raise Refused(f"time series of {len(volumes)} volumes whose slices do not name the same time points or echoes")
    return volumes


def check_even(volume: Sequence[Frame]) -> None:
    """Checks that the slices of one volume, sorted, are at least two and lie on a straight line at even steps.

    Raises:
        Refused: They do not.
    """
    if len(volume) < 2:
        raise Refused("2D: a single slice")
    steps = np.diff(_offsets(volume))
    step = float(np.sort(steps)[(len(steps) - 1) // 2])
    multiples = np.rint(steps / step).astype(int)
    # both ends of a step may be off their place
    if multiples.min() >= 1 and multiples.max() >= 2 and np.abs(steps / step - multiples).max() <= 2 * _OFF_GRID:
        raise Refused(_name_gaps(multiples, len(volume)))

    positions = np.array([frame.position for frame in volume])
    grid = np.linspace(positions[0], positions[-1], len(volume))
    pitch = (_offsets(volume)[-1] - _offsets(volume)[0]) / (len(volume) - 1)
    along = np.abs((positions - grid) @ volume[0].normal).max()
    if along > _OFF_GRID * pitch:
        low, high = steps.min(), steps.max()
        raise Refused(f"non-uniform spacing: {low:.3f} to {high:.3f} mm from slice to slice")
    off_line = float(np.linalg.norm(positions - grid, axis=1).max())
    if off_line > _OFF_GRID * pitch:
        raise Refused(f"slices shifted against each other: up to {off_line:.3f} mm off a straight line")


def affine_of(volume: Sequence[Frame]) -> np.ndarray:
    """Returns float64 [4, 4]: (column, row, slice) of sorted slices -> mm in RAS+.

    The third axis is the true step from slice to slice, so that a tilted gantry gives an affine with shear. A single
    slice gets a step of 1 mm along its normal.
    """
    first, last = volume[0], volume[-1]
    step = first.normal
    if len(volume) > 1:
        step = np.subtract(last.position, first.position) / (len(volume) - 1)
    affine = np.eye(4)
    affine[:3, 0] = np.multiply(first.row_axis, first.spacing[0])
    affine[:3, 1] = np.multiply(first.column_axis, first.spacing[1])
    affine[:3, 2] = step
    affine[:3, 3] = first.position
    affine[:2] *= -1  # left and back become right and front
    return affine + 0.0  # no negative zeros


def header_of(frames: Sequence[Frame]) -> Header:
    """Returns what the report says of the sorted slices of one volume."""
    affine, first = affine_of(frames), frames[0]
    return Header(
        shape=(*first.shape, len(frames)),
        spacing_mm=tuple(float(length) for length in np.linalg.norm(affine[:3, :3], axis=0)),
        orientation=orientation_of(affine),
        dtype=first.dtype,
        modality=first.modality,
    )


def _offsets(frames: Sequence[Frame]) -> np.ndarray:
    """Returns mm along the normal of the first frame, float64 [frames]."""
    return np.array([frame.position for frame in frames]) @ frames[0].normal


def _name_gaps(multiples: np.ndarray, slices: int) -> str:
    gaps = np.flatnonzero(multiples > 1)
    missing = int((multiples - 1).sum())
    places = [f"{multiples[gap] - 1} after slice {gap + 1}" for gap in gaps[:_GAPS_NAMED]]
    places += [f"and in {len(gaps) - _GAPS_NAMED} more places"] if len(gaps) > _GAPS_NAMED else []
    noun = "slice is" if missing == 1 else "slices are"
    return f"{missing} {noun} missing ({', '.join(places)} of {slices}, counted along the slice normal)"
