"""Halves of files are told from whole ones."""

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.nibabel_reader_writer import NibabelIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunetv2_misfm.benchmark.damage import is_whole_checkpoint, is_whole_segmentation


@pytest.mark.parametrize("name", ["a.nii.gz", "a.nii", "a.nrrd", "a.mha"])
@pytest.mark.parametrize("reader", [SimpleITKIO, NibabelIO])
def test_truncated_segmentations_are_found(tmp_path: Path, name: str, reader: type) -> None:
    if reader is NibabelIO and ".nii" not in name:
        pytest.skip("nibabel reads NIfTI only")
    file = tmp_path / name
    labels = np.random.default_rng(0).integers(0, 3, (10, 12, 14)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(labels), str(file))
    assert is_whole_segmentation(file, reader)
    content = file.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 20):
        file.write_bytes(content[:length])
        assert not is_whole_segmentation(file, reader), length


def test_truncated_checkpoints_are_found(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint_final.pth"
    torch.save({"network_weights": {"a": torch.zeros(1000)}}, file)
    assert is_whole_checkpoint(file)
    content = file.read_bytes()
    for length in (0, 100, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        assert not is_whole_checkpoint(file), length
