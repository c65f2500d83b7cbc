"""Whether a file that a command wrote is whole: one that was stopped, or found the disk full, leaves halves."""

import zipfile
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter


def is_whole_checkpoint(file: Path) -> bool:
    """Whether a file is a complete archive as PyTorch writes it; its directory stands at its very end.

    Raises:
        OSError: The file cannot be opened.
    """
    with file.open("rb") as stream:
        return zipfile.is_zipfile(stream)


def is_whole_segmentation(file: Path, reader: type[BaseReaderWriter]) -> bool:
    """Whether nnU-Net can read a file of labels to its end.

    Args:
        file: The file.
        reader: nnU-Net's reader class of the dataset.
    """
    return _can_be_read(lambda: reader().read_seg(str(file))) and not is_truncated_nifti(file)


def is_truncated_nifti(file: Path) -> bool:
    """Whether a file is NIfTI by its name and ends too early: SimpleITK fills up with zeros and says nothing."""
    if not file.name.endswith((".nii", ".nii.gz")):
        return False
    return not _can_be_read(lambda: np.asanyarray(nibabel.load(file).dataobj))  # type: ignore[attr-defined]


def _can_be_read(read: Callable[[], object]) -> bool:
    try:
        read()
    except MemoryError:
        raise
    except Exception:  # the readers raise whatever they like at a damaged file
        return False
    return True
