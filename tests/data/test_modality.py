import os
from pathlib import Path

import nibabel
import numpy as np
import pytest
from dicom_files import write_slice
from scans import ct, mr

from nnunetv2_misfm.data import modality
from nnunetv2_misfm.data.files import read_file
from nnunetv2_misfm.data.judge import survey
from nnunetv2_misfm.data.modality import lacks_offset, modality_by_intensity, probe_modality
from nnunetv2_misfm.data.outcome import Settings
from nnunetv2_misfm.data.phantoms import make_phantom
from nnunetv2_misfm.data.records import State
from nnunetv2_misfm.data.sources import Source, scan_folder, sources_in

AUTO = Settings("auto")
CT_FILES, MR_FILES = 10, 147  # of ../shared/data/unannotated


def by_intensity(voxels: np.ndarray) -> str:
    return modality_by_intensity(voxels, survey(voxels))


def phantom() -> np.ndarray:
    """A trunk in air, int16 HU."""
    return make_phantom(np.random.default_rng(1)).image.T


@pytest.mark.parametrize(("folder", "expected", "count"), [("ct", "CT", CT_FILES), ("mr", "MR", MR_FILES)])
def test_every_real_scan_is_told(shared, folder, expected, count):
    files = sorted((shared / "data" / "unannotated" / folder).iterdir())
    assert len(files) >= count
    told = {file.name: by_intensity(next(read_file(file)).voxels) for file in files}
    assert {name: said for name, said in told.items() if said != expected} == {}


def without_offset(ct: np.ndarray) -> np.ndarray:
    return (ct + 1024).clip(0).astype(np.uint16)


def test_ct_counted_from_zero_is_ct_and_lacks_its_offset():
    ct = phantom()
    counts = without_offset(ct)
    assert by_intensity(counts) == "CT"
    assert lacks_offset(counts, survey(counts))
    assert not lacks_offset(ct, survey(ct))
    half = counts + np.float32(0.5)  # counts are whole numbers
    assert not lacks_offset(half, survey(half))


def test_of_the_real_scans_the_one_without_offset_is_told(shared):
    lacking = set()
    for file in sorted((shared / "data" / "unannotated").glob("*/*")):
        voxels = next(read_file(file)).voxels
        if lacks_offset(voxels, survey(voxels)):
            lacking.add(file.name)
        elif file.parent.name == "ct" and survey(voxels).integral:
            assert by_intensity(without_offset(voxels)) == "CT", file.name
    assert lacking == {"slicer_CTHeadAxial.nii.gz"}


@pytest.mark.parametrize("padding", [-2000, -2048, -3024, -32768])
@pytest.mark.parametrize("kind", [np.int16, np.float32])
def test_padding_outside_the_field_of_view_does_not_hide_a_ct(padding, kind):
    ct = phantom().astype(kind)
    across = np.indices(ct.shape[:2]) - np.array(ct.shape[:2]).reshape(2, 1, 1) / 2
    ct[np.linalg.norm(across, axis=0) > 0.45 * ct.shape[0]] = padding
    assert by_intensity(ct) == "CT"


def test_voxels_that_are_not_finite_do_not_hide_a_ct():
    ct = phantom().astype(np.float32)
    ct[ct < -900] = np.nan
    assert by_intensity(ct) == "CT"


@pytest.mark.parametrize("kind", [np.int16, np.float64])
def test_phase_images_are_mr(kind):
    voxels = np.random.default_rng(0).integers(-4096, 4096, (32, 32, 16)).astype(kind)
    assert by_intensity(voxels) == "MR"


def test_a_bright_mr_and_a_normalised_one_are_mr():
    draw = np.random.default_rng(0)
    assert by_intensity(draw.integers(0, 1800, (24, 24, 24)).astype(np.int16)) == "MR"
    assert by_intensity(draw.normal(0, 1, (24, 24, 24))) == "MR"
    assert by_intensity(draw.integers(0, 256, (24, 24, 24)).astype(np.uint8)) == "MR"


def nifti(path: Path, voxels: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return path


def one_source(folder: Path, state: State) -> Source:
    scan_folder(str(folder), state.scanned)
    [source] = sources_in([str(folder)], state.scanned)
    return source


def state_in(folder: Path) -> State:
    return State(folder / "state", folder / "state")


def probed(folder: Path, voxels: np.ndarray, **chosen) -> str | None:
    """What is said of a file of these voxels."""
    path = nifti(folder / "a.nii", voxels)
    return probe_modality(Source(str(path)), state_in(folder), Settings("auto", **chosen))


def dicom_series(folder: Path, term: str, voxels: np.ndarray) -> Source:
    """Writes [I, J, K] as slices of signed integers that name a modality, or by "" none."""
    for k in range(voxels.shape[2]):
        write_slice(folder / "scans" / f"{k}", (0, 0, 2.0 * k), values=voxels[..., k].T.astype(np.int16), Modality=term)
    return one_source(folder / "scans", state_in(folder))


def test_a_probe_is_remembered_until_the_file_or_the_settings_change(tmp_path, monkeypatch):
    scans, state = tmp_path / "scans", state_in(tmp_path)
    scans.mkdir()
    path = nifti(scans / "a.nii", phantom())
    source = one_source(scans, state)
    assert probe_modality(source, state, AUTO) == "CT"
    with monkeypatch.context() as patched:
        patched.setattr(modality, "read_file", lambda *_, **__: pytest.fail("read again"))
        assert probe_modality(source, state, AUTO) == "CT"
    assert probe_modality(source, state, Settings("auto", min_size=500)) is None
    assert probe_modality(source, state, AUTO) == "CT"
    nifti(path, phantom().clip(0) // 8)
    os.utime(path, ns=(0, 0))
    assert probe_modality(source, state, AUTO) == "MR"


def test_what_cannot_be_read_has_no_modality_and_that_is_remembered_too(tmp_path, monkeypatch):
    (tmp_path / "a.nii.gz").write_text("no image")
    state, source = state_in(tmp_path), Source(str(tmp_path / "a.nii.gz"))
    assert probe_modality(source, state, AUTO) is None
    monkeypatch.setattr(modality, "read_file", lambda *_, **__: pytest.fail("read again"))
    assert probe_modality(source, state, AUTO) is None


@pytest.mark.parametrize("kind", ["constant", "label map", "half", "flat", "small", "empty"])
def test_what_the_import_refuses_has_no_modality(tmp_path, kind):
    draw = np.random.default_rng(0)
    voxels = {
        "constant": np.zeros((9, 9, 9), np.int16),
        "label map": np.kron(draw.integers(0, 9, (3, 3, 3)), np.ones((4, 4, 4))).astype(np.uint8),
        "half": draw.integers(0, 2, (9, 9, 9)) / np.float32(2),
        "flat": draw.integers(0, 900, (64, 64, 1)).astype(np.int16),
        "small": draw.integers(0, 900, (64, 64, 7)).astype(np.int16),
        "empty": np.full((9, 9, 9), np.nan),
    }
    assert probed(tmp_path, voxels[kind]) is None
    if kind == "small":
        assert probed(tmp_path, voxels[kind], min_size=7) == "MR"


def test_sheared_axes_have_a_modality_where_they_are_to_be_brought_right(tmp_path):
    affine = np.diag([1.0, 1, 2, 1])
    affine[1, 2] = 0.5
    path = tmp_path / "a.nii"
    nibabel.save(nibabel.Nifti1Image(ct(0), affine), path)
    assert probe_modality(Source(str(path)), state_in(tmp_path), AUTO) is None
    assert probe_modality(Source(str(path)), state_in(tmp_path), Settings("auto", resample_sheared=True)) == "CT"


def test_a_time_series_has_the_modality_of_its_first_volume_where_it_is_to_be_taken_apart(tmp_path):
    series = np.stack([phantom(), phantom() * 0], -1)
    assert probed(tmp_path, series) is None
    assert probed(tmp_path, series, split_time_series=True) == "CT"
    assert probed(tmp_path, series[..., ::-1], split_time_series=True) is None


def test_of_a_time_series_that_its_header_refuses_no_voxel_is_read(tmp_path, monkeypatch):
    path = nifti(tmp_path / "a.nii", np.stack([phantom()] * 2, -1))
    monkeypatch.setattr("nnunetv2_misfm.data.files._stored", lambda *_: pytest.fail("voxels read"))
    assert probe_modality(Source(str(path)), state_in(tmp_path), AUTO) is None


@pytest.mark.parametrize("term", ["CT", "MR", "PT"])
def test_a_series_is_what_its_header_says_whatever_its_voxels(tmp_path, monkeypatch, term):
    source = dicom_series(tmp_path, term, ct(0)[..., :3])
    monkeypatch.setattr(modality, "read_series", lambda *_, **__: pytest.fail("voxels read"))
    assert probe_modality(source, state_in(tmp_path), AUTO) == term


@pytest.mark.parametrize(("voxels", "expected"), [(ct(0), "CT"), (mr(0), "MR"), (mr(0)[..., :7], None)])
@pytest.mark.parametrize("term", ["", "Mr Doe", "M"])
def test_a_series_that_names_no_modality_is_told_by_its_intensities(tmp_path, voxels, expected, term):
    assert probe_modality(dicom_series(tmp_path, term, voxels), state_in(tmp_path), AUTO) == expected
