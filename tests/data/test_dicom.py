"""DICOM series written here, slice by slice, and real ones: which slices make a volume, and where it lies."""

import shutil
from pathlib import Path

import numpy as np
import pydicom
import pytest
from dicom_files import (
    COLUMNS,
    GEOMETRIES,
    ROWS,
    SLICES,
    assert_ramp,
    only_refusal,
    only_volume,
    read,
    slice_header,
    write_series,
    write_slice,
)
from pydicom.uid import (
    MediaStorageDirectoryStorage,
    RTStructureSetStorage,
)

from nnunetv2_misfm.data.dicom import group_series, modality_of
from nnunetv2_misfm.data.volume import Refused, Volume, is_sheared


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
    assert list(series.values()) == [sorted(first), sorted(second)]
    assert others == {}
    assert_ramp(only_volume(sorted(first)))


@pytest.mark.parametrize("name", ["PatientID", "StudyInstanceUID", "FrameOfReferenceUID"])
def test_a_series_uid_that_patients_or_studies_share_is_a_series_of_each(name: str, tmp_path: Path):
    first = write_series(tmp_path / "a", (0, 2), **{name: "1.7"})
    second = write_series(tmp_path / "b", (4, 6), **{name: "1.8"})
    silent = write_series(tmp_path / "c", (8, 10), **{name: None})
    series, _ = group_series(first + second + silent)
    assert list(series.values()) == [sorted(first), sorted(second), sorted(silent)]


def test_what_a_header_lacks_counts_as_empty(tmp_path: Path):
    files = write_series(tmp_path, (0, 2), PatientID=None, StudyInstanceUID="")
    header = pydicom.dcmread(files[0])
    del header.PatientID, header.StudyInstanceUID
    header.save_as(files[0])
    series, _ = group_series(files)
    assert list(series.values()) == [sorted(files)]


@pytest.mark.filterwarnings("ignore:Expected implicit VR")  # of the file cut in its header
def test_the_modality_is_that_of_the_first_file_that_names_one(tmp_path: Path):
    (tmp_path / "text").write_text("no DICOM file")
    (tmp_path / "cut").write_bytes(write_slice(tmp_path / "whole", (0, 0, 0), Modality="MR").read_bytes()[:140])
    silent = write_slice(tmp_path / "silent", (0, 0, 0), Modality="")
    free_text = write_slice(tmp_path / "free", (0, 0, 0), Modality="Jane Doe")
    none = [tmp_path / "gone", tmp_path / "text", tmp_path / "cut", silent, free_text]
    told = [write_slice(tmp_path / term, (0, 0, 0), Modality=term) for term in ("PT", "CT")]
    assert modality_of([*none, *told]) == "PT"
    assert modality_of(none) is None


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
    assert list(series.values()) == [[image]]
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


def test_copies_left_out_are_told_beside_a_refusal(tmp_path: Path):
    files = write_series(tmp_path, (0, 2, 6))
    files.append(Path(shutil.copy(files[0], tmp_path / "copy")))
    reason = "1 slice is missing (1 after slice 2 of 3, counted along the slice normal); 1 copy of a slice left out"
    assert only_refusal(files) == reason


def test_slices_that_all_have_one_uid_are_no_copies(tmp_path: Path):
    volume = only_volume(write_series(tmp_path, SOPInstanceUID="1.2.3.4"))
    assert volume.notes == () and volume.voxels.shape[2] == 4
    assert_ramp(volume)


def test_time_points_that_all_have_one_uid_are_no_copies(tmp_path: Path):
    volumes = read(time_series(tmp_path, SOPInstanceUID="1.2.3.4"), split_time_series=True)
    assert [volume.voxels[0, 0, 0] for volume in volumes if isinstance(volume, Volume)] == [10, 20, 30]
    assert [volume.notes for volume in volumes if isinstance(volume, Volume)] == [()] * 3


def test_slices_of_one_uid_and_one_place_are_copies_however_their_numbers_are_printed(tmp_path: Path):
    files = write_series(tmp_path, (0, 2, 4))
    header = pydicom.dcmread(files[0])
    header.ImagePositionPatient = ["-10.0000", "-20.00", "4.0001"]
    header.save_as(tmp_path / "copy")
    assert only_volume([*files, tmp_path / "copy"]).notes == ("1 copy of a slice left out",)


@pytest.mark.parametrize("copy", ["0 before", "Z behind"])
def test_a_copy_that_is_whole_is_read_instead_of_one_that_is_cut(copy: str, tmp_path: Path):
    files = write_series(tmp_path / "K")
    (tmp_path / copy).mkdir()
    cut = tmp_path / copy / files[1].name
    cut.write_bytes(files[1].read_bytes()[:-10])
    volume = only_volume([*files, cut])
    assert volume.notes == ("1 copy of a slice left out",)
    assert_ramp(volume)


def test_a_cut_slice_is_not_left_out_for_one_of_its_uid_elsewhere(tmp_path: Path):
    files = write_series(tmp_path, SOPInstanceUID="1.2.3.4")
    files[0].write_bytes(files[0].read_bytes()[:-10])
    assert only_refusal(files) == f"truncated: 10 bytes of pixel data are missing in {files[0].name}"


def test_a_slice_without_a_whole_copy_is_refused(tmp_path: Path):
    files = write_series(tmp_path)
    for name, missing in (("Z", 4), ("Y", 10)):
        (tmp_path / name).write_bytes(files[0].read_bytes()[:-missing])
    files[0].unlink()
    reason = only_refusal([*files[1:], tmp_path / "Z", tmp_path / "Y"])
    assert reason == "truncated: 10 bytes of pixel data are missing in Y; 1 copy of a slice left out"


def test_an_image_without_a_place_may_be_cut_or_doubled(tmp_path: Path):
    page = write_slice(tmp_path / "0", (0, 0, 0), ImagePositionPatient=None)
    (tmp_path / "1").write_bytes(page.read_bytes()[:-10])
    scan, other = read([page, tmp_path / "1", *write_series(tmp_path / "a")])
    assert isinstance(scan, Volume) and isinstance(other, Refused)
    assert scan.notes == () and other.reason.startswith("no place in space") and "left out" not in other.reason


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


def time_series(folder: Path, name: str = "TemporalPositionIdentifier", **tags: str) -> list[Path]:
    """Three volumes of values 10, 20, 30; instance numbers go the other way."""
    return [
        write_slice(
            folder / f"{(5 * t + 3 * k) % 97}_{t}{k}",
            (0, 0, 2 * k),
            values=np.full((ROWS, COLUMNS), 10 * t + k, np.uint16),
            InstanceNumber=100 - 10 * t,
            **{name: t, **tags},
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
