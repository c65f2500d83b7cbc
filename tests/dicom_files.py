"""DICOM slices written with pydicom, for tests, and what to expect of them by the standard's own formula."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import (
    CTImageStorage,
    ExplicitVRLittleEndian,
    RLELossless,
    generate_uid,
)

from nnunetv2_misfm.data.dicom import read_series
from nnunetv2_misfm.data.volume import Refused, Volume

ROWS, COLUMNS, SLICES = 6, 5, 4

SPACING = (0.8, 0.5)  # PixelSpacing: between rows, between columns
AXIAL = (1.0, 0, 0, 0, 1, 0)
COS, SIN = np.cos(0.3), np.sin(0.3)
# row direction, column direction, step from slice to slice in mm; all in DICOM's coordinates
GEOMETRIES = {
    "axial": (AXIAL, (0, 0, 2.5)),
    "coronal": ((1, 0, 0, 0, 0, -1), (0, 3, 0)),
    "sagittal": ((0, 1, 0, 0, 0, -1), (-1.5, 0, 0)),
    "prone": ((-1, 0, 0, 0, -1, 0), (0, 0, 2)),
    "oblique": ((COS, SIN, 0, -SIN * COS, COS * COS, SIN), (1.3 * SIN * SIN, -1.3 * SIN * COS, 1.3 * COS)),
    "tilted gantry": ((1, 0, 0, 0, COS, -SIN), (0, 0, 4)),
}


def place(origin: Any, orientation: Any, column: float, row: float) -> np.ndarray:
    """The equation C.7.6.2.1-1 of PS3.3: patient coordinates of a pixel."""
    x, y = np.array(orientation[:3]), np.array(orientation[3:])
    return np.array(origin) + x * SPACING[1] * column + y * SPACING[0] * row


def ramp(point: np.ndarray) -> float:
    """Linear in the patient, other along each axis."""
    return 1000 + 31 * point[0] + 17 * point[1] + 13 * point[2]


def ramp_slice(origin: Any, orientation: Any = AXIAL) -> np.ndarray:
    values = [[ramp(place(origin, orientation, i, j)) for i in range(COLUMNS)] for j in range(ROWS)]
    return np.rint(values).astype(np.int16)


def slice_header(values: np.ndarray, **tags: Any) -> FileDataset:
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    header.SOPClassUID, header.SOPInstanceUID = CTImageStorage, generate_uid()
    header.SeriesInstanceUID, header.StudyInstanceUID, header.Modality = "1.2.3", "1.2", "CT"
    header.PatientName, header.PatientID, header.StudyDate = "Doe^Jane", "ID4711", "20200229"
    header.SeriesDescription = "Knee of Jane"
    header.Rows, header.Columns = values.shape[-2:]
    header.SamplesPerPixel, header.PhotometricInterpretation = 1, "MONOCHROME2"
    header.BitsAllocated = header.BitsStored = 8 * values.dtype.itemsize
    header.HighBit, header.PixelRepresentation = header.BitsStored - 1, int(values.dtype.kind == "i")
    header.PixelData = values.tobytes()
    for name, value in tags.items():
        setattr(header, name, value)
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = header.SOPClassUID, header.SOPInstanceUID
    return header


def write_slice(
    file: Path, origin: Any, orientation: Any = AXIAL, values: np.ndarray | None = None, **tags: Any
) -> Path:
    tags = {
        "ImagePositionPatient": [float(x) for x in np.round(origin, 6)],
        "ImageOrientationPatient": [float(x) for x in np.round(orientation, 9)],
        "PixelSpacing": list(SPACING),
        **tags,
    }
    header = slice_header(ramp_slice(origin, orientation) if values is None else values, **tags)
    file.parent.mkdir(parents=True, exist_ok=True)
    header.save_as(file, enforce_file_format=True)
    return file


def write_series(folder: Path, heights: Any = (0, 2, 4, 6), **tags: Any) -> list[Path]:
    """An axial series; the files' order by name is not that of the slices."""
    files = [write_slice(folder / f"IM{(7 * k) % 101:03}", (-10, -20, z), **tags) for k, z in enumerate(heights)]
    return files[::-1]


def read(files: list[Path], **options: Any) -> list[Volume | Refused]:
    return list(read_series(files, **options))


def only_volume(files: list[Path]) -> Volume:
    (volume,) = read(files)
    assert isinstance(volume, Volume), volume.reason
    return volume


def only_refusal(files: list[Path]) -> str:
    (refused,) = read(files)
    assert isinstance(refused, Refused)
    return refused.reason


def assert_ramp(volume: Volume, step: float = 0.5) -> None:
    """Every voxel holds the ramp's value at the place to which the affine takes its index."""
    for i, j, k in np.ndindex(volume.voxels.shape):
        right, front, head, _ = volume.affine @ (i, j, k, 1)
        assert abs(volume.voxels[i, j, k] - ramp(np.array([-right, -front, head]))) <= step + 0.01


def constant_slice(file: Path, z: float, value: int, **tags: Any) -> Path:
    return write_slice(file, (0, 0, z), values=np.full((ROWS, COLUMNS), value, np.uint16), **tags)


def compress_rle(file: Path) -> bytes:
    header = pydicom.dcmread(file)
    header.compress(RLELossless)
    header.save_as(file)
    return file.read_bytes()
