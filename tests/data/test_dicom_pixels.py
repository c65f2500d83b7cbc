"""Intensities of DICOM slices: rescale, types, compression, damage. Values by hand."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import (
    COLUMNS,
    ROWS,
    assert_ramp,
    compress_rle,
    constant_slice,
    only_refusal,
    only_volume,
    read,
    write_series,
    write_slice,
)
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    CTImageStorage,
    generate_uid,
)

from nnunetv2_misfm.data.dicom import group_series, read_series
from nnunetv2_misfm.data.volume import Refused, Volume


def test_rescales_that_differ_from_slice_to_slice_are_each_applied(tmp_path: Path):
    files = [
        constant_slice(tmp_path / "a", 0, 100, RescaleSlope="1", RescaleIntercept="0"),
        constant_slice(tmp_path / "b", 1, 100, RescaleSlope="0.5", RescaleIntercept="-1024"),
        constant_slice(tmp_path / "c", 2, 60000, RescaleSlope="2", RescaleIntercept="1"),
    ]
    voxels = only_volume(files).voxels
    assert voxels.dtype == np.float32
    assert voxels[0, 0].tolist() == [100, -974, 120001]


def test_one_rescale_in_whole_numbers_stays_in_integers(tmp_path: Path):
    files = [constant_slice(tmp_path / str(z), z, 60000, RescaleSlope="1", RescaleIntercept="-1024") for z in (0, 1)]
    voxels = only_volume(files).voxels
    assert voxels.dtype.kind == "i" and voxels[0, 0].tolist() == [58976, 58976]


def test_one_rescale_in_fractions_gives_float32(tmp_path: Path):
    files = [constant_slice(tmp_path / str(z), z, 10, RescaleSlope="0.25", RescaleIntercept="1") for z in (0, 1)]
    voxels = only_volume(files).voxels
    assert voxels.dtype == np.float32 and voxels[0, 0].tolist() == [3.5, 3.5]


def test_slices_of_other_types_share_one_that_holds_both(tmp_path: Path):
    first = write_slice(tmp_path / "a", (0, 0, 0), values=np.full((ROWS, COLUMNS), -5, np.int16))
    assert only_volume([first, constant_slice(tmp_path / "b", 1, 65535)]).voxels[0, 0].tolist() == [-5, 65535]


def test_slices_of_other_ranges_share_a_type_that_holds_both(tmp_path: Path):
    rescale = {"RescaleSlope": "1", "RescaleIntercept": "-1024"}
    first = constant_slice(tmp_path / "a", 0, 100, BitsStored=12, HighBit=11, **rescale)
    second = constant_slice(tmp_path / "b", 1, 60000, **rescale)
    assert only_volume([first, second]).voxels[0, 0].tolist() == [-924, 58976]


def test_a_slope_of_zero_is_refused(tmp_path: Path):
    assert "RescaleSlope is 0" in only_refusal(write_series(tmp_path, RescaleSlope="0", RescaleIntercept="0"))


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize(("rescale", "expected"), [({}, [7, 3000]), (("1", "-1024"), [-1017, 1976])])
def test_monochrome1_is_not_inverted(compress: bool, rescale: tuple[str, str], expected: list[int], tmp_path: Path):
    tags = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11}
    if rescale:
        tags["RescaleSlope"], tags["RescaleIntercept"] = rescale
    files = [constant_slice(tmp_path / f"{z}", z, value, **tags) for z, value in ((0, 7), (1, 3000))]
    for file in files if compress else []:
        compress_rle(file)
    assert only_volume(files).voxels[0, 0].tolist() == expected


def test_compressed_monochrome1_is_refused_and_the_scan_beside_it_is_read(tmp_path: Path):
    files = compressed_series(tmp_path / "a", "MR_small_jp2klossless.dcm", PhotometricInterpretation="MONOCHROME1")
    scan, other = read(write_series(tmp_path / "b") + files)
    assert isinstance(scan, Refused) and isinstance(other, Volume)
    assert scan.reason == "compressed MONOCHROME1 image, which the decoder would invert: write it uncompressed"
    assert_ramp(other)


@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
def test_a_lookup_table_instead_of_a_rescale_is_refused(photometric: str, tmp_path: Path):
    table = Dataset()
    table.LUTDescriptor, table.ModalityLUTType = [256, 0, 16], "HU"
    table.LUTData = np.arange(1000, 1256, dtype=np.uint16).tobytes()
    files = write_series(tmp_path, PhotometricInterpretation=photometric, ModalityLUTSequence=[table])
    assert only_refusal(files).startswith("a lookup table instead of a rescale (Modality LUT)")


@pytest.mark.parametrize("name", ["ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"])
def test_slices_without_a_place_are_refused(name: str, tmp_path: Path):
    reason = only_refusal(write_series(tmp_path, **{name: None}))
    assert reason.startswith("no place in space")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ImageOrientationPatient", [1, 0, 0, 1, 0, 0]),
        ("ImageOrientationPatient", [0, 0, 0, 0, 0, 0]),
        ("PixelSpacing", [0, 1]),
        ("ImagePositionPatient", [1, 2]),
    ],
)
def test_an_impossible_geometry_is_refused(name: str, value: list[float], tmp_path: Path):
    assert only_refusal(write_series(tmp_path, **{name: value}))


def test_label_maps_and_dose_maps_are_no_scans(tmp_path: Path):
    assert only_refusal(write_series(tmp_path, Modality="SEG")) == "a label map (SEG), not a scan"
    assert only_refusal(write_series(tmp_path, Modality="RTDOSE")) == "a map of dose (RTDOSE), not a scan"


@pytest.mark.parametrize("keep", ["half", "all but 2", "all but 20"])
def test_a_truncated_file_is_refused_by_name(keep: str, tmp_path: Path):
    files = write_series(tmp_path)
    content = files[1].read_bytes()
    files[1].write_bytes(content[: {"half": -ROWS * COLUMNS, "all but 2": -2, "all but 20": -20}[keep]])
    assert only_refusal(files).startswith("truncated: ")
    assert files[1].name in only_refusal(files)


def test_pixel_data_shorter_than_the_size_says_are_refused(tmp_path: Path):
    files = write_series(tmp_path)
    header = pydicom.dcmread(files[2])
    header.PixelData = header.PixelData[:-10]
    header.save_as(files[2])
    assert only_refusal(files) == f"truncated: 10 bytes of pixel data are missing in {files[2].name}"


def test_a_file_without_pixel_data_is_refused(tmp_path: Path):
    files = write_series(tmp_path)
    header = pydicom.dcmread(files[2])
    del header.PixelData
    header.save_as(files[2])
    assert only_refusal(files) == f"truncated: 60 bytes of pixel data are missing in {files[2].name}"


def test_a_file_that_vanished_is_refused_by_name(tmp_path: Path):
    files = write_series(tmp_path)
    files[0].unlink()
    assert only_refusal(files) == f"{files[0].name} cannot be read: No such file or directory"


@pytest.mark.parametrize("name", ["MR_small_implicit.dcm", "MR_small_jp2klossless.dcm"])
def test_a_file_that_vanishes_after_its_header_was_read_is_refused_by_name(name: str, tmp_path: Path):
    results = read_series(write_series(tmp_path / "a") + compressed_series(tmp_path / "b", name))
    assert isinstance(next(results), Volume)
    shutil.rmtree(tmp_path / "b")
    (refused,) = results
    assert isinstance(refused, Refused) and refused.reason == "0 cannot be read: No such file or directory"


def test_rle_is_read(tmp_path: Path):
    files = write_series(tmp_path)
    for file in files:
        compress_rle(file)
    assert_ramp(only_volume(files))


def compressed_series(folder: Path, name: str, cut: int = 0, **tags: str) -> list[Path]:
    header = pydicom.dcmread(get_testdata_file(name, download=False))
    header.update(tags)
    folder.mkdir(exist_ok=True)
    files = []
    for k in range(3):
        header.SOPInstanceUID = header.file_meta.MediaStorageSOPInstanceUID = generate_uid()
        header.ImagePositionPatient = [0, 0, 3 * k]
        header.save_as(folder / str(k))
        files.append(folder / str(k))
    files[1].write_bytes(files[1].read_bytes()[: -cut or None])
    return files


def test_rle_data_that_end_early_are_refused(tmp_path: Path):
    """By 20 bytes in a well-formed file: GDCM alone reads them in silence."""
    files = compressed_series(tmp_path, "MR_small_RLE.dcm")
    header = pydicom.dcmread(files[1])
    header.PixelData = encapsulate([get_frame(header.PixelData, 0, number_of_frames=1)[:-20]])
    header.save_as(files[1])
    assert only_refusal(files) == "truncated or corrupt pixel data in 1 (RuntimeError)"


@pytest.mark.parametrize("name", ["MR_small_jpeg_ls_lossless.dcm", "MR_small_jp2klossless.dcm"])
def test_compressed_slices_are_read_and_refused_where_cut(name: str, tmp_path: Path):
    expected = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False)).pixel_array
    voxels = only_volume(compressed_series(tmp_path, name)).voxels
    np.testing.assert_array_equal(voxels, np.stack([expected.T] * 3, axis=2))
    assert only_refusal(compressed_series(tmp_path, name, cut=100)).startswith("truncated or corrupt pixel data in 1")


def test_a_compressed_slice_that_is_cut_is_read_from_its_copy(tmp_path: Path):
    expected = pydicom.dcmread(get_testdata_file("MR_small.dcm", download=False)).pixel_array
    files = compressed_series(tmp_path / "K", "MR_small_jp2klossless.dcm")
    files.append(write_copy(files[1], tmp_path / "Z", files[1].read_bytes()))
    first = write_copy(files[1], tmp_path / "A", files[1].read_bytes()[:-100])
    volume = only_volume([first, *files])
    assert volume.notes == ("2 copies of slices left out",)
    np.testing.assert_array_equal(volume.voxels, np.stack([expected.T] * 3, axis=2))
    for copy in files[1], files[-1]:
        copy.write_bytes(copy.read_bytes()[:-100])
    reason = "truncated or corrupt pixel data in 1 (RuntimeError); 2 copies of slices left out"
    assert only_refusal([first, *files]) == reason


def write_copy(file: Path, folder: Path, content: bytes) -> Path:
    folder.mkdir()
    (folder / file.name).write_bytes(content)
    return folder / file.name


def test_files_without_preamble_are_read(tmp_path: Path):
    files = write_series(tmp_path)
    for file in files:
        header = pydicom.dcmread(file)
        bare = Dataset({element.tag: element for element in header})
        bare.save_as(file, implicit_vr=True, little_endian=True)
    series, others = group_series(files)
    assert others == {}
    assert_ramp(only_volume(*series.values()))


def test_bits_beyond_the_stored_ones_are_no_part_of_the_values(tmp_path: Path):
    """12 bits, signed, in 16, with an overlay in the others; GDCM and pydicom each decode one of both series."""
    stored = np.full((ROWS, COLUMNS), 0x7FFE, np.int16)
    tags = {"BitsStored": 12, "HighBit": 11, "values": stored}
    for name, sop_class in (("known", CTImageStorage), ("unknown", "1.2.111.10008.2.1.4.1.1.2")):
        files = [write_slice(tmp_path / name / str(z), (0, 0, z), **tags, SOPClassUID=sop_class) for z in (0, 1)]
        assert set(only_volume(files).voxels.ravel().tolist()) == {-2}
