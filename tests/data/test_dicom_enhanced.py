"""Enhanced multi-frame DICOM files. Values and places by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from dicom_files import (
    AXIAL,
    COLUMNS,
    ROWS,
    SPACING,
    assert_ramp,
    compress_rle,
    only_refusal,
    only_volume,
    ramp_slice,
    read,
    slice_header,
)
from pydicom.dataset import Dataset, FileDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    EnhancedMRImageStorage,
)

from nnunetv2_misfm.data.volume import Volume


def item(**values: Any) -> Dataset:
    dataset = Dataset()
    for name, value in values.items():
        setattr(dataset, name, value)
    return dataset


def enhanced(
    places: list[float], frames: np.ndarray, rescales: list[tuple[str, str]] | None = None, **contents: list[int]
) -> FileDataset:
    """An enhanced multi-frame image; `contents`: attributes of FrameContentSequence, by frame."""
    groups = []
    for n, z in enumerate(places):
        content = item(**{name: values[n] for name, values in contents.items()})
        group = item(PlanePositionSequence=[item(ImagePositionPatient=[-10, -20, z])], FrameContentSequence=[content])
        if rescales:
            slope, intercept = rescales[n]
            group.PixelValueTransformationSequence = [item(RescaleSlope=slope, RescaleIntercept=intercept)]
        groups.append(group)
    shared = item(
        PlaneOrientationSequence=[item(ImageOrientationPatient=list(AXIAL))],
        PixelMeasuresSequence=[item(PixelSpacing=list(SPACING), SliceThickness=2)],
    )
    return slice_header(
        frames,
        SOPClassUID=EnhancedMRImageStorage,
        Modality="MR",
        NumberOfFrames=len(places),
        SharedFunctionalGroupsSequence=[shared],
        PerFrameFunctionalGroupsSequence=groups,
    )


def test_the_frames_of_an_enhanced_image_are_put_in_order(tmp_path: Path):
    places = [4.0, 0.0, 6.0, 2.0]
    header = enhanced(places, np.stack([ramp_slice((-10, -20, z)) for z in places]))
    header.save_as(tmp_path / "mf", enforce_file_format=True)
    volume = only_volume([tmp_path / "mf"])
    assert_ramp(volume)
    assert volume.header.shape == (5, 6, 4) and volume.header.modality == "MR"
    compress_rle(tmp_path / "mf")
    assert_ramp(only_volume([tmp_path / "mf"]))


def test_each_frame_of_an_enhanced_image_has_its_own_rescale(tmp_path: Path):
    frames = np.stack([np.full((ROWS, COLUMNS), 100, np.uint16)] * 3)
    header = enhanced([4, 0, 2], frames, [("2", "0"), ("0.5", "-1024"), ("1", "7")])
    shared_by_mistake = item(RescaleSlope="5", RescaleIntercept="5")
    header.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = [shared_by_mistake]
    header.save_as(tmp_path / "mf", enforce_file_format=True)
    assert only_volume([tmp_path / "mf"]).voxels[0, 0].tolist() == [-974, 107, 200]


@pytest.mark.parametrize(
    ("slope", "intercept", "expected", "kind"),
    [("3", "-1", 299, "i"), ("0.5", "1", 51, "f"), ("100000000", "0", 10_000_000_000, "f")],
)
def test_the_shared_rescale_of_an_enhanced_image_is_applied(
    slope: str, intercept: str, expected: int, kind: str, tmp_path: Path
):
    header = enhanced([0, 2], np.stack([np.full((ROWS, COLUMNS), 100, np.uint16)] * 2))
    transform = item(RescaleSlope=slope, RescaleIntercept=intercept)
    header.SharedFunctionalGroupsSequence[0].PixelValueTransformationSequence = [transform]
    header.save_as(tmp_path / "mf", enforce_file_format=True)
    voxels = only_volume([tmp_path / "mf"]).voxels
    assert voxels.dtype.kind == kind and voxels[0, 0].tolist() == [expected, expected]


def test_an_enhanced_image_of_monochrome1_is_not_inverted(tmp_path: Path):
    header = enhanced([0, 2], np.stack([np.full((ROWS, COLUMNS), n, np.uint16) for n in (7, 3000)]))
    header.PhotometricInterpretation = "MONOCHROME1"
    header.save_as(tmp_path / "mf", enforce_file_format=True)
    assert only_volume([tmp_path / "mf"]).voxels[0, 0].tolist() == [7, 3000]


def test_an_enhanced_image_with_a_broken_frame_is_read_from_its_copy(tmp_path: Path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 4000, (3, ROWS, COLUMNS)).astype(np.uint16)
    enhanced([4, 0, 2], frames).save_as(tmp_path / "whole", enforce_file_format=True)
    compress_rle(tmp_path / "whole")
    header = pydicom.dcmread(tmp_path / "whole")
    coded = [get_frame(header.PixelData, n, number_of_frames=3) for n in range(3)]
    header.PixelData = encapsulate([coded[0], coded[1], coded[2][:-20]])
    header.save_as(tmp_path / "broken")
    assert only_refusal([tmp_path / "broken"]).startswith("truncated or corrupt pixel data in broken")
    volume = only_volume([tmp_path / "broken", tmp_path / "whole"])
    assert volume.notes == ("1 copy of a slice left out",)
    np.testing.assert_array_equal(volume.voxels, frames[[1, 2, 0]].T)


def test_the_time_points_of_an_enhanced_image_are_taken_apart(tmp_path: Path):
    frames = np.stack([np.full((ROWS, COLUMNS), n, np.uint16) for n in range(6)])
    header = enhanced([0, 0, 2, 2, 4, 4], frames, TemporalPositionIndex=[2, 1, 2, 1, 2, 1])
    header.save_as(tmp_path / "mf", enforce_file_format=True)
    assert only_refusal([tmp_path / "mf"]).startswith("time series of 2 volumes")
    first, second = read([tmp_path / "mf"], split_time_series=True)
    assert isinstance(first, Volume) and isinstance(second, Volume)
    assert (first.voxels[0, 0].tolist(), second.voxels[0, 0].tolist()) == ([1, 3, 5], [0, 2, 4])


def test_parallel_stacks_of_an_enhanced_image_are_told_apart_by_name(tmp_path: Path):
    frames = np.stack([np.full((ROWS, COLUMNS), n, np.uint16) for n in range(4)])
    enhanced([0, 2, 50, 53], frames, StackID=["a", "a", "b", "b"]).save_as(tmp_path / "mf", enforce_file_format=True)
    first, second = read([tmp_path / "mf"])
    assert first.header.spacing_mm[2] == pytest.approx(2) and second.header.spacing_mm[2] == pytest.approx(3)


def test_an_enhanced_image_with_a_missing_frame_or_cut_short_is_refused(tmp_path: Path):
    frames = np.stack([np.full((ROWS, COLUMNS), n, np.uint16) for n in range(4)])
    file = tmp_path / "mf"
    enhanced([0, 2, 4, 8], frames).save_as(file, enforce_file_format=True)
    assert only_refusal([file]).startswith("1 slice is missing (1 after slice 3 of 4")
    file.write_bytes(file.read_bytes()[:-30])
    assert only_refusal([file]) == "truncated: 30 bytes of pixel data are missing in mf"


def jpeg_frame(file: Path, values: np.ndarray) -> tuple[str, bytes]:
    writer = sitk.ImageFileWriter()
    writer.SetFileName(str(file))
    writer.SetImageIO("GDCMImageIO")
    writer.UseCompressionOn()
    writer.SetCompressor("JPEG2000")
    writer.Execute(sitk.GetImageFromArray(values[None]))
    written = pydicom.dcmread(file)
    return written.file_meta.TransferSyntaxUID, get_frame(written.PixelData, 0, number_of_frames=1)


@pytest.mark.parametrize("alike", [True, False])
def test_a_jpeg_compressed_enhanced_image_needs_one_rescale(alike: bool, tmp_path: Path):
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 4000, (3, 64, 32)).astype(np.uint16)
    coded = [jpeg_frame(tmp_path / f"{n}.dcm", frame) for n, frame in enumerate(frames)]
    rescales = [("2", "1"), ("2", "1") if alike else ("1", "1"), ("2", "1")]
    header = enhanced([4, 0, 2], frames, rescales)
    header.file_meta.TransferSyntaxUID = coded[0][0]
    assert header.file_meta.TransferSyntaxUID.is_compressed
    header.PixelData = encapsulate([frame for _, frame in coded])
    header["PixelData"].VR = "OB"
    header.save_as(tmp_path / "mf", enforce_file_format=True)
    if alike:
        expected = 2 * frames[[1, 2, 0]].astype(int) + 1
        np.testing.assert_array_equal(only_volume([tmp_path / "mf"]).voxels, expected.T)
    else:
        assert "differ in their rescale" in only_refusal([tmp_path / "mf"])


def test_a_multi_frame_image_without_places_is_refused(tmp_path: Path):
    header = slice_header(np.zeros((3, ROWS, COLUMNS), np.uint8), NumberOfFrames=3)
    header.save_as(tmp_path / "us", enforce_file_format=True)
    assert only_refusal([tmp_path / "us"]) == "multi-frame image (3 frames) without a position per frame"
