import os
from pathlib import Path

import nibabel
import numpy as np
import pydicom
import pytest
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from nnunetv2_misfm.data import modality
from nnunetv2_misfm.data.files import read_file
from nnunetv2_misfm.data.judge import survey
from nnunetv2_misfm.data.modality import lacks_offset, modality_by_intensity, modality_of_series, probe_modality
from nnunetv2_misfm.data.phantoms import make_phantom
from nnunetv2_misfm.data.records import State
from nnunetv2_misfm.data.sources import Source, scan_folder, sources_in

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


def dicom_file(path: Path, term: str | None) -> Path:
    """A slice of 4 x 4 voxels, with as little else as a file may have."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    header = FileDataset(None, {}, file_meta=meta, preamble=bytes(128))
    header.SOPClassUID, header.SOPInstanceUID, header.SeriesInstanceUID = CTImageStorage, generate_uid(), "1.2.3"
    if term is not None:
        header.Modality = term
    header.Rows = header.Columns = 4
    header.PixelData = bytes(32)
    pydicom.dcmwrite(path, header, implicit_vr=False, little_endian=True)
    return path


@pytest.mark.parametrize("term", ["CT", "MR", "PT"])
def test_a_series_is_what_its_header_says(tmp_path, term):
    assert modality_of_series([dicom_file(tmp_path / "a", term)]) == term


def test_the_first_header_that_tells_counts(tmp_path):
    (tmp_path / "text").write_text("no DICOM file")
    (tmp_path / "cut").write_bytes(dicom_file(tmp_path / "a", "MR").read_bytes()[:140])
    silent, told = dicom_file(tmp_path / "silent", None), dicom_file(tmp_path / "told", "CT")
    files = [tmp_path / "gone", tmp_path / "text", tmp_path / "cut", silent]
    assert modality_of_series([*files, told]) == "CT"
    assert modality_of_series(files) is None


def nifti(path: Path, voxels: np.ndarray) -> Path:
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), path)
    return path


def one_source(folder: Path, state: State) -> Source:
    scan_folder(str(folder), state.scanned)
    [source] = sources_in([str(folder)], state.scanned)
    return source


def test_a_probe_is_remembered_until_the_file_changes(tmp_path, monkeypatch):
    scans, state = tmp_path / "scans", State(tmp_path / "state", tmp_path / "state")
    scans.mkdir()
    path = nifti(scans / "a.nii", phantom())
    source = one_source(scans, state)
    assert probe_modality(source, state) == "CT"
    with monkeypatch.context() as patched:
        patched.setattr(modality, "read_file", lambda *_, **__: pytest.fail("read again"))
        assert probe_modality(source, state) == "CT"
    nifti(path, phantom().clip(0) // 8)
    os.utime(path, ns=(0, 0))
    assert probe_modality(source, state) == "MR"


def test_what_cannot_be_read_has_no_modality_and_that_is_remembered_too(tmp_path, monkeypatch):
    (tmp_path / "a.nii.gz").write_text("no image")
    state, source = State(tmp_path / "state", tmp_path / "state"), Source(str(tmp_path / "a.nii.gz"))
    assert probe_modality(source, state) is None
    monkeypatch.setattr(modality, "read_file", lambda *_, **__: pytest.fail("read again"))
    assert probe_modality(source, state) is None


def test_a_constant_volume_has_no_modality_and_a_time_series_that_of_its_first_volume(tmp_path):
    state = State(tmp_path / "state", tmp_path / "state")
    constant = nifti(tmp_path / "constant.nii", np.zeros((9, 9, 9), np.int16))
    assert probe_modality(Source(str(constant)), state) is None
    series = nifti(tmp_path / "series.nii", np.stack([phantom(), phantom() * 0], -1))
    assert probe_modality(Source(str(series)), state) == "CT"


def test_a_series_is_probed_by_its_header(tmp_path):
    scans, state = tmp_path / "scans", State(tmp_path / "state", tmp_path / "state")
    scans.mkdir()
    dicom_file(scans / "a", "PT")
    assert probe_modality(one_source(scans, state), state) == "PT"
