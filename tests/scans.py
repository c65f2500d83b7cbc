"""Small scans as files, for tests of the importer."""

import csv
from itertools import permutations, product
from pathlib import Path

import nibabel
import numpy as np

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
