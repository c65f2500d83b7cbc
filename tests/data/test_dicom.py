"""DICOM series written here, slice by slice, and real ones: geometry by the standard's own formula, values by hand."""

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from pydicom.data import get_testdata_file
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate, get_frame
from pydicom.uid import (
    CTImageStorage,
    EnhancedMRImageStorage,
    ExplicitVRLittleEndian,
    MediaStorageDirectoryStorage,
    RLELossless,
    RTStructureSetStorage,
    generate_uid,
)

from nnunetv2_misfm.data.dicom import group_series, read_series
from nnunetv2_misfm.data.volume import Refused, Volume, is_sheared

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


@pytest.mark.parametrize("name", GEOMETRIES)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_ramp_in_the_patient_is_found_at_its_place(name: str, reverse: bool, tmp_path: Path):
    orientation, step = GEOMETRIES[name]
    origins = [np.array((-12.5, 7, 30)) + k * np.array(step) for k in range(SLICES)]
    for k, origin in enumerate(origins[::-1] if reverse else origins):
        write_slice(tmp_path / f"{(3 * k) % 7}", origin, orientation)
    volume = only_volume(list(tmp_path.iterdir()))
    assert volume.voxels.shape == (COLUMNS, ROWS, SLICES)
    assert_ramp(volume)
    assert is_sheared(volume.affine) == (name == "tilted gantry")
    # ascending along the cross product of row and column direction
    first = origins[0] if np.cross(orientation[:3], orientation[3:]) @ step > 0 else origins[-1]
    np.testing.assert_allclose(volume.affine[:3, 3], first * (-1, -1, 1), atol=1e-6)


def test_the_header_says_what_the_file_says(tmp_path: Path):
    volume = only_volume(write_series(tmp_path))
    assert volume.header.shape == (5, 6, 4)
    assert volume.header.spacing_mm == pytest.approx((0.5, 0.8, 2))
    assert (volume.header.orientation, volume.header.dtype, volume.header.modality) == ("LPS", "int16", "CT")
    assert (volume.part, volume.notes) == ("", ())


def test_several_series_in_one_folder_and_one_over_two_folders_are_told_apart(tmp_path: Path):
    first = write_series(tmp_path / "a", (0, 2), SeriesInstanceUID="1.1")
    first += write_series(tmp_path / "b", (4, 6), SeriesInstanceUID="1.1")
    second = [write_slice(tmp_path / "a" / f"second{z}", (0, 0, z), SeriesInstanceUID="1.2") for z in range(3)]
    series, others = group_series([*first, *second[::-1]])
    assert series == {"1.1": sorted(first), "1.2": sorted(second)}
    assert others == {}
    assert_ramp(only_volume(series["1.1"]))


def test_every_file_that_is_no_image_has_its_reason(tmp_path: Path):
    image = write_slice(tmp_path / "image", (0, 0, 0))
    (tmp_path / "text.txt").write_text("no scan\n" * 30)
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    (tmp_path / "cut").write_bytes(image.read_bytes()[:500])
    (tmp_path / "garbage").write_bytes(bytes(128) + b"DICM" + bytes(range(256)) * 4)
    (tmp_path / "no_preamble_garbage").write_bytes(b"\x08\x00" + bytes(range(256)) * 4)
    structures = slice_header(np.zeros((1, 1), np.uint8), SOPClassUID=RTStructureSetStorage, Modality="RTSTRUCT")
    index = slice_header(np.zeros((1, 1), np.uint8), SOPClassUID=MediaStorageDirectoryStorage)
    for header, name in ((structures, "structures"), (index, "DICOMDIR")):
        del header.Rows, header.Columns, header.PixelData
        header.save_as(tmp_path / name, enforce_file_format=True)
    files = [*tmp_path.iterdir(), tmp_path / "vanished"]
    series, others = group_series(files)
    assert series == {"1.2.3": [image]}
    assert set(others) == set(files) - {image}
    reasons = {file.name: reason for file, reason in others.items()}
    assert reasons["structures"] == "DICOM, but no image: RTSTRUCT"
    assert reasons["DICOMDIR"] == "DICOM, but no image: a DICOMDIR index"
    assert reasons["cut"].startswith("unreadable DICOM header: ")
    assert reasons["garbage"].startswith("unreadable DICOM header: ")
    assert reasons["no_preamble_garbage"].startswith("unreadable DICOM header: ")
    assert all(reasons[name].startswith("not a scan: ") for name in ("text.txt", "empty", "folder", "vanished"))


def test_a_missing_slice_is_refused_with_its_place(tmp_path: Path):
    reason = only_refusal(write_series(tmp_path, (0, 2, 4, 8, 10, 12)))
    assert reason == "1 slice is missing (1 after slice 3 of 6, counted along the slice normal)"


def test_several_missing_slices_are_counted(tmp_path: Path):
    reason = only_refusal(write_series(tmp_path, (0, 2, 4, 10, 12, 16, 18)))
    assert reason == "3 slices are missing (2 after slice 3, 1 after slice 5 of 7, counted along the slice normal)"


def test_many_gaps_are_not_all_named(tmp_path: Path):
    heights = np.cumsum([1, 1, 1, 1, 1, 1, 1, 1, *[2] * 7])
    reason = only_refusal(write_series(tmp_path, heights))
    assert reason.startswith("7 slices are missing (1 after slice 8, ") and "and in 2 more places" in reason


def test_uneven_steps_are_refused_with_the_smallest_and_the_largest(tmp_path: Path):
    assert only_refusal(write_series(tmp_path, (0, 2, 4, 7))) == (
        "non-uniform spacing: 2.000 to 3.000 mm from slice to slice"
    )


@pytest.mark.parametrize(("off", "taken"), [(0.19, True), (-0.19, True), (0.22, False), (-0.22, False)])
def test_a_slice_may_be_a_tenth_of_a_step_off_its_place(off: float, taken: bool, tmp_path: Path):
    (result,) = read(write_series(tmp_path, (0, 2, 4 + off, 6, 8)))
    assert isinstance(result, Volume) == taken
    if taken:
        np.testing.assert_allclose(result.affine[:3, 2], (0, 0, 2), atol=1e-9)  # type: ignore[union-attr]


def test_slices_shifted_sideways_are_refused(tmp_path: Path):
    files = [write_slice(tmp_path / f"{k}", (3.0 * (k == 1), 0, 2 * k)) for k in range(4)]
    assert only_refusal(files) == "slices shifted against each other: up to 3.000 mm off a straight line"


def test_copies_of_a_slice_are_left_out_and_noted(tmp_path: Path):
    files = write_series(tmp_path)
    copies = [Path(shutil.copy(file, tmp_path / f"Z{file.name}")) for file in files[:2]]
    volume = only_volume([*copies, *files])
    assert volume.notes == ("2 copies of slices left out",)
    assert volume.voxels.shape[2] == 4


def test_a_scout_beside_the_scan_is_a_stack_of_its_own(tmp_path: Path):
    files = write_series(tmp_path) + [write_slice(tmp_path / "scout", (0, 0, 0), (0, 1, 0, 0, 0, -1))]
    scan, scout = read(files)
    assert isinstance(scan, Volume) and isinstance(scout, Refused)
    assert (scan.part, scout.part) == ("stack 1 of 2", "stack 2 of 2")
    assert (scout.reason, scout.header.shape) == ("2D: a single slice", (5, 6, 1))


def test_slices_of_another_size_are_a_stack_of_their_own(tmp_path: Path):
    small = np.zeros((3, 3), np.int16)
    files = write_series(tmp_path) + [write_slice(tmp_path / f"s{z}", (0, 0, z), values=small) for z in (1, 2)]
    assert [result.header.shape for result in read(files)] == [(5, 6, 4), (3, 3, 2)]


def test_a_colour_image_in_a_series_leaves_the_scan_alone(tmp_path: Path):
    page = slice_header(np.zeros((3, 4, 4), np.uint8), SamplesPerPixel=3, PhotometricInterpretation="RGB")
    page.PlanarConfiguration = 1
    page.save_as(tmp_path / "0 page", enforce_file_format=True)
    scan, colour = read([tmp_path / "0 page", *write_series(tmp_path)])
    assert isinstance(scan, Volume) and isinstance(colour, Refused)
    assert (colour.reason, colour.part) == ("colour (RGB) image", "stack 2 of 2")


def time_series(folder: Path, name: str = "TemporalPositionIdentifier") -> list[Path]:
    """Three volumes of values 10, 20, 30; instance numbers go the other way."""
    return [
        write_slice(
            folder / f"{(5 * t + 3 * k) % 97}_{t}{k}",
            (0, 0, 2 * k),
            values=np.full((ROWS, COLUMNS), 10 * t + k, np.uint16),
            InstanceNumber=100 - 10 * t,
            **{name: t},
        )
        for t in (1, 2, 3)
        for k in range(SLICES)
    ]


@pytest.mark.parametrize(
    "name", ["TemporalPositionIdentifier", "TemporalPositionIndex", "EchoNumbers", "AcquisitionNumber"]
)
def test_a_time_series_is_refused_or_taken_apart(name: str, tmp_path: Path):
    files = time_series(tmp_path, name)
    (refused,) = read(files)
    assert isinstance(refused, Refused) and refused.header.shape == (5, 6, 4)
    assert refused.reason.startswith("time series of 3 volumes") and "--split-time-series" in refused.reason
    volumes = read(files, split_time_series=True)
    assert [volume.part for volume in volumes] == ["volume 1 of 3", "volume 2 of 3", "volume 3 of 3"]
    for t, volume in enumerate(volumes, 1):
        assert isinstance(volume, Volume)
        assert [volume.voxels[0, 0, k] for k in range(SLICES)] == [10 * t + k for k in range(SLICES)]


def test_a_time_series_that_lacks_a_slice_is_refused(tmp_path: Path):
    (refused,) = read(time_series(tmp_path)[:-1], split_time_series=True)
    assert isinstance(refused, Refused)
    assert refused.reason == "slices recur unequally: some places hold 2 slice(s), others up to 3"


def test_a_time_series_whose_time_points_do_not_match_is_not_mixed(tmp_path: Path):
    files = time_series(tmp_path)
    header = pydicom.dcmread(files[0])
    header.TemporalPositionIdentifier = 9
    header.save_as(files[0])
    (refused,) = read(files, split_time_series=True)
    assert isinstance(refused, Refused) and "do not name the same time points" in refused.reason


@pytest.mark.parametrize("name", ["TemporalPositionIndex", "TemporalPositionIdentifier"])
def test_one_time_point_in_a_series_of_its_own_is_known_as_such(name: str, tmp_path: Path):
    files = write_series(tmp_path, **{name: 4})
    assert only_refusal(files) == "time point 4 of a time series: --split-time-series takes it as a volume"
    (volume,) = read(files, split_time_series=True)
    assert isinstance(volume, Volume) and volume.part == "time point 4"


def test_the_first_time_point_is_an_ordinary_volume(tmp_path: Path):
    assert only_volume(write_series(tmp_path, TemporalPositionIndex=1)).part == ""


def constant_slice(file: Path, z: float, value: int, **tags: Any) -> Path:
    return write_slice(file, (0, 0, z), values=np.full((ROWS, COLUMNS), value, np.uint16), **tags)


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


def compress_rle(file: Path) -> bytes:
    header = pydicom.dcmread(file)
    header.compress(RLELossless)
    header.save_as(file)
    return file.read_bytes()


def test_rle_is_read(tmp_path: Path):
    files = write_series(tmp_path)
    for file in files:
        compress_rle(file)
    assert_ramp(only_volume(files))


def compressed_series(folder: Path, name: str, cut: int = 0) -> list[Path]:
    header = pydicom.dcmread(get_testdata_file(name, download=False))
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


def test_files_without_preamble_are_read(tmp_path: Path):
    files = write_series(tmp_path)
    for file in files:
        header = pydicom.dcmread(file)
        bare = Dataset({element.tag: element for element in header})
        bare.save_as(file, implicit_vr=True, little_endian=True)
    series, others = group_series(files)
    assert others == {}
    assert_ramp(only_volume(series["1.2.3"]))


def test_bits_beyond_the_stored_ones_are_no_part_of_the_values(tmp_path: Path):
    """12 bits, signed, in 16, with an overlay in the others; GDCM and pydicom each decode one of both series."""
    stored = np.full((ROWS, COLUMNS), 0x7FFE, np.int16)
    tags = {"BitsStored": 12, "HighBit": 11, "values": stored}
    for name, sop_class in (("known", CTImageStorage), ("unknown", "1.2.111.10008.2.1.4.1.1.2")):
        files = [write_slice(tmp_path / name / str(z), (0, 0, z), **tags, SOPClassUID=sop_class) for z in (0, 1)]
        assert set(only_volume(files).voxels.ravel().tolist()) == {-2}


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


def test_what_identifies_the_patient_is_in_no_result(tmp_path: Path):
    secrets = ("Doe", "Jane", "4711", "20200229", "Knee", "1.2.3", "1.2.826")  # the last: root of generated UIDs
    bad = [
        write_series(tmp_path / "a"),
        write_series(tmp_path / "b", Modality="Jane Doe"),
        write_series(tmp_path / "c", ImagePositionPatient=None),
        write_series(tmp_path / "d", (0, 1, 3)),
        time_series(tmp_path / "e"),
    ]
    for results in map(read, bad):
        for result in results:
            said = f"{getattr(result, 'reason', '')} {getattr(result, 'notes', '')} {result.part} {result.header}"
            assert not [secret for secret in secrets if secret in said]


def test_odd_values_are_read_in_silence(tmp_path: Path, recwarn: pytest.WarningsRecorder):
    files = write_series(tmp_path)
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content.replace(b"20200229", b"99999999").replace(b"CT", b"ct"))
    assert isinstance(read(files)[0], Volume | Refused)
    group_series(files)
    assert not recwarn.list


def test_the_real_head_is_one_volume(shared: Path):
    series, others = group_series(list((shared / "data/odd/dicom_ct_head_64x64x93").iterdir()))
    (files,) = series.values()
    volume = only_volume(files)
    assert others == {} and volume.voxels.shape == (64, 64, 93)
    np.testing.assert_allclose(volume.spacing_mm, (3.2, 3.2, 1.5), atol=1e-9)


@pytest.mark.parametrize("cut", ["half", "last 100 bytes"])
def test_a_real_slice_cut_short_is_refused_by_name(cut: str, shared: Path, tmp_path: Path):
    for file in (shared / "data/odd/dicom_ct_head_64x64x93").iterdir():
        shutil.copyfile(file, tmp_path / file.name)
    broken = tmp_path / "CTHead34.dcm"
    content = broken.read_bytes()
    broken.write_bytes(content[: len(content) // 2 if cut == "half" else -100])
    assert only_refusal(list(tmp_path.iterdir())).startswith("truncated: ")
    assert "CTHead34.dcm" in only_refusal(list(tmp_path.iterdir()))


@pytest.mark.parametrize(
    ("folder", "reason"),
    [
        ("dicom_ct_gantry_tilt_nonuniform", "non-uniform spacing: "),
        ("dicom_missing_slice", "1 slice is missing (1 after slice 13 of 18"),
    ],
)
def test_real_series_that_are_no_even_grid_are_refused(folder: str, reason: str, shared: Path):
    series, _ = group_series(list((shared / "data/odd" / folder).iterdir()))
    (files,) = series.values()
    assert only_refusal(files).startswith(reason)


def test_real_time_points_in_series_of_their_own_are_known_as_such(shared: Path):
    series, others = group_series(list((shared / "data/odd/dicom_4d").iterdir()))
    assert (len(series), others) == (19, {})
    results = [result for files in series.values() for result in read(files)]
    assert sum(isinstance(result, Volume) for result in results) == 1
    reasons = {result.reason.split(":")[0] for result in results if isinstance(result, Refused)}
    assert reasons == {f"time point {n} of a time series" for n in range(2, 20)}
    parts = {result.part for files in series.values() for result in read(files, split_time_series=True)}
    assert parts == {""} | {f"time point {n}" for n in range(2, 20)}
