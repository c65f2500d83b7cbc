"""Files of the formats of research archives for tests, and what reading them gives."""

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_misfm.data.files import read_file
from nnunetv2_misfm.data.volume import Refused, Volume

SHAPE = (11, 12, 13)
VOXELS = np.random.default_rng(7).integers(-2000, 2000, SHAPE).astype(np.int16)
AFFINE = np.array([[-0.7, 0.1, 0, 12], [0.1, 0.7, 0, -30], [0, 0, 2.5, 99], [0, 0, 0, 1]])
NIFTI = [".nii", ".nii.gz", ".hdr", "-2.nii", "-2.nii.gz"]
MGH = [".mgh", ".mgz"]
ITK = [".nrrd", ".gz.nrrd", ".nhdr", ".gz.nhdr", ".mha", ".z.mha", ".mhd", ".z.mhd"]


def write(folder: Path, ending: str, voxels: np.ndarray = VOXELS, affine: np.ndarray = AFFINE) -> Path:
    """Writes a file that nibabel or ITK reads; "-2" stands for NIfTI-2, ".gz" or ".z" before an ITK ending packs it."""
    path = folder / f"scan{ending}"
    if ending in ITK:
        image = sitk.GetImageFromArray(voxels.T.copy())
        sitk.WriteImage(image, str(path), useCompression=ending.startswith((".gz", ".z")))
    elif ending in MGH:
        nibabel.save(nibabel.MGHImage(voxels, affine), path)
    else:
        kinds = {".hdr": nibabel.Nifti1Pair, "-2.nii": nibabel.Nifti2Image, "-2.nii.gz": nibabel.Nifti2Image}
        nibabel.save(kinds.get(ending, nibabel.Nifti1Image)(voxels, affine), path)
    return path


def data_file(path: Path) -> Path:
    """The file of the voxels, found by looking."""
    others = [file for file in path.parent.iterdir() if file != path]
    return others[0] if others else path


def nifti(path: Path, voxels: np.ndarray = VOXELS, **header: Any) -> Path:
    """Writes NIfTI-1 with some fields of its header set."""
    image = nibabel.Nifti1Image(voxels, AFFINE)
    for name, value in header.items():
        image.header[name] = value
    nibabel.save(image, path)
    return path


def patched(path: Path, offset: int, values: bytes) -> Path:
    content = bytearray(path.read_bytes())
    content[offset : offset + len(values)] = values
    path.write_bytes(content)
    return path


def read(path: Path, **options: Any) -> Volume:
    [volume] = read_file(path, **options)
    return volume


def refusal(path: Path, **options: Any) -> Refused:
    """The reason against a file: one line, and nothing was yielded before."""
    with pytest.raises(Refused) as caught:
        list(read_file(path, **options))
    reason = caught.value.reason
    assert reason and "\n" not in reason and len(reason) < 300
    return caught.value
