"""Small scans as files, for tests of the importer."""

import csv
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np
import pydicom
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

SHAPE = (16, 18, 20)
LPS = np.diag([-1.0, -1.0, 2.0, 1.0])
ORIENTATIONS = ["".join(letters) for order in permutations(("LR", "PA", "SI")) for letters in product(*order)]


def affine_of(orientation: str, spacing: tuple[float, float, float], origin=(10.0, -20.0, 30.0)) -> np.ndarray:
    """The affine by hand: every letter is a signed unit vector of the RAS+ world."""
    unit = {"R": (1, 0, 0), "L": (-1, 0, 0), "A": (0, 1, 0), "P": (0, -1, 0), "S": (0, 0, 1), "I": (0, 0, -1)}
    affine = np.eye(4)
    for axis, (letter, size) in enumerate(zip(orientation, spacing, strict=True)):
        affine[:3, axis] = np.array(unit[letter]) * size
    affine[:3, 3] = origin
    return affine


def rotation(degrees: float) -> np.ndarray:
    """About an axis that is none of the world's."""
    axis = np.array([1.0, 2.0, 3.0]) / np.sqrt(14)
    cross = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]])
    angle = np.radians(degrees)
    turn = np.eye(4)
    turn[:3, :3] += np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
    return turn


def ct(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """An ellipsoid of soft tissue in air with noise, int16 [I, J, K]."""
    generator = np.random.default_rng(seed)
    axes = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    inside = sum(axis**2 for axis in axes) < 0.8
    return np.where(inside, 50, -1000).astype(np.int16) + generator.integers(-30, 30, shape).astype(np.int16)


def mr(seed: int, shape: tuple[int, int, int] = SHAPE) -> np.ndarray:
    """The same in arbitrary units from 0, uint16 [I, J, K]."""
    return ((ct(seed, shape).astype(int) + 1030) // 2).astype(np.uint16)


def write(file: Path, voxels: np.ndarray, affine: np.ndarray = LPS) -> Path:
    """Writes NIfTI-1 with a geometry in RAS+."""
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(voxels, affine).to_filename(file)
    return file


def report(dataset: Path) -> list[dict[str, str]]:
    """The rows of a dataset's report."""
    with open(dataset / "import_report.csv", newline="", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder with its bytes."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def write_series(folder: Path, voxels: np.ndarray, modality: str = "CT") -> list[str]:
    """Every second slice in another folder; returns what identifies the patient."""
    series, study, frame = generate_uid(), generate_uid(), generate_uid()
    for k in range(voxels.shape[2]):
        meta = pydicom.dataset.FileMetaDataset()
        meta.MediaStorageSOPClassUID, meta.TransferSyntaxUID = CTImageStorage, ExplicitVRLittleEndian
        meta.MediaStorageSOPInstanceUID = generate_uid()
        slice_ = pydicom.Dataset()
        slice_.file_meta = meta
        slice_.SOPClassUID, slice_.SOPInstanceUID = CTImageStorage, meta.MediaStorageSOPInstanceUID
        slice_.PatientName, slice_.PatientID, slice_.PatientBirthDate = "Doe^Erika", "MRN-4711-X", "19640812"
        slice_.AccessionNumber, slice_.InstitutionName = "ACC-99887766", "St Elsewhere"
        slice_.StudyDescription, slice_.StudyDate = "Abdomen of Erika", "20240131"
        slice_.Modality, slice_.SeriesInstanceUID, slice_.StudyInstanceUID = modality, series, study
        slice_.FrameOfReferenceUID = frame
        slice_.Rows, slice_.Columns = voxels.shape[1], voxels.shape[0]
        slice_.PixelSpacing, slice_.ImageOrientationPatient = [1.0, 1.0], [1, 0, 0, 0, 1, 0]
        slice_.ImagePositionPatient, slice_.InstanceNumber = [0, 0, 2.0 * k], k + 1
        slice_.SamplesPerPixel, slice_.PhotometricInterpretation = 1, "MONOCHROME2"
        slice_.BitsAllocated = slice_.BitsStored = 16
        slice_.HighBit, slice_.PixelRepresentation = 15, 1
        slice_.RescaleSlope, slice_.RescaleIntercept = 1, 0
        slice_.PixelData = voxels[:, :, k].T.tobytes()
        place = folder / f"part {k % 2}" / f"IM{k:04d}"
        place.parent.mkdir(parents=True, exist_ok=True)
        slice_.save_as(place, enforce_file_format=True)
    return ["Erika", "MRN-4711-X", "19640812", "ACC-99887766", "Elsewhere", "20240131", series, study, frame]
