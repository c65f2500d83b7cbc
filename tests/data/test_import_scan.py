import hashlib
from dataclasses import asdict
from pathlib import Path

import nibabel
import numpy as np
import pytest
import SimpleITK as sitk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scans import LPS, ORIENTATIONS, affine_of, ct, mr, rotation, write

from nnunetv2_misfm.data.import_scan import import_source
from nnunetv2_misfm.data.outcome import Outcome, Settings
from nnunetv2_misfm.data.records import CannotWrite, State
from nnunetv2_misfm.data.sources import Source

CT = Settings("CT")


def import_one(tmp_path: Path, file: Path, chosen: Settings = CT) -> list[Outcome]:
    state = State(tmp_path / "state", tmp_path / "state")
    source = Source(str(file))
    import_source(source, tmp_path / "dataset", state, chosen)
    return [Outcome(**row) for row in state.imported.last(source.key)["outcomes"]]


def written(tmp_path: Path, outcome: Outcome) -> tuple[sitk.Image, sitk.Image]:
    """Image and mask as nnU-Net's reader sees them."""
    image = sitk.ReadImage(str(tmp_path / "dataset" / outcome.image))
    return image, sitk.ReadImage(str(tmp_path / "dataset" / "labelsTr" / f"{outcome.case}.nii.gz"))


def test_an_accepted_scan_has_its_row_its_image_and_its_mask(tmp_path):
    file = write(tmp_path / "a.nii", ct(0))
    [outcome] = import_one(tmp_path, file)
    described = asdict(outcome)
    assert described["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    voxels = ct(0)
    expected = {
        "path": str(file),
        "verdict": "accepted",
        "reason": "",
        "part": "",
        "modality": "CT",
        "files": 1,
        "shape": "16x18x20",
        "spacing_mm": "1.000x1.000x2.000",
        "orientation": "LPS",
        "dtype": "int16",
        "intensity_range": f"{voxels.min()}..{voxels.max()}",
    }
    assert {key: described[key] for key in expected} == expected
    image, mask = written(tmp_path, outcome)
    np.testing.assert_array_equal(sitk.GetArrayFromImage(image), ct(0).T)
    body = sitk.GetArrayFromImage(mask)
    assert set(np.unique(body)) == {0, 1}
    assert float(outcome.body_share) == pytest.approx(body.mean(), abs=1e-4)
    truth = ct(0).T > -500
    assert 2 * (truth & (body > 0)).sum() / (truth.sum() + body.sum()) > 0.95
    assert image.GetSpacing() == mask.GetSpacing() == (1, 1, 2)
    assert image.GetDirection() == mask.GetDirection() == (1, 0, 0, 0, 1, 0, 0, 0, 1)
    assert image.GetOrigin() == mask.GetOrigin()


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(*[st.integers(8, 24)] * 3),
    spacing=st.tuples(*[st.floats(0.2, 8)] * 3),
    origin=st.tuples(*[st.floats(-500, 500)] * 3),
    orientation=st.sampled_from(ORIENTATIONS),
    degrees=st.sampled_from([0.0, 3.0, 25.0]),
    dtype=st.sampled_from(["int16", "uint16", "int32", "uint8", "float32", "float64"]),
    ending=st.sampled_from([".nii", ".nii.gz", ".mha", ".nrrd"]),
)
def test_voxels_and_geometry_survive_for_any_shape_spacing_orientation_and_type(
    tmp_path_factory, seed, shape, spacing, origin, orientation, degrees, dtype, ending
):
    tmp_path = tmp_path_factory.mktemp("round")
    generator = np.random.default_rng(seed)
    low, high = (0, 250) if dtype == "uint8" else (0, 60000) if dtype == "uint16" else (-1024, 3000)
    voxels = generator.integers(low, high, shape).astype(dtype)
    if dtype.startswith("float"):
        voxels += generator.random(shape).astype(dtype)
    affine = rotation(degrees) @ affine_of(orientation, spacing, origin)
    file = tmp_path / f"scan{ending}"
    if ending in (".nii", ".nii.gz"):
        write(file, voxels, affine)
    else:
        write_by_itk(file, voxels, affine)
    [outcome] = import_one(tmp_path, file, Settings("MR"))
    assert outcome.verdict == "accepted", outcome.reason
    image, _ = written(tmp_path, outcome)
    # every corner and some voxels inside: where the source's own geometry puts them, the written image has their value
    indices = [tuple(bit * (size - 1) for bit, size in zip(bits, shape, strict=True)) for bits in np.ndindex(2, 2, 2)]
    indices += [tuple(generator.integers(0, shape)) for _ in range(20)]
    for index in indices:
        place_lps = (affine @ [*index, 1])[:3] * (-1, -1, 1)
        found = image.TransformPhysicalPointToContinuousIndex([float(mm) for mm in place_lps])
        assert np.allclose(found, np.round(found), atol=0.02)
        value = image.GetPixel([int(round(axis)) for axis in found])
        assert value == pytest.approx(float(voxels[index]), rel=1e-6)
    direction = np.reshape(image.GetDirection(), (3, 3))
    assert (np.abs(direction).argmax(axis=0) == (0, 1, 2)).all() or degrees == 25.0
    assert sorted(image.GetSize()) == sorted(shape)


def write_by_itk(file: Path, voxels: np.ndarray, affine: np.ndarray) -> None:
    lps = np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine
    spacing = np.linalg.norm(lps[:3, :3], axis=0)
    image = sitk.GetImageFromArray(np.ascontiguousarray(voxels.T))
    image.SetSpacing(spacing.tolist())
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / spacing).ravel().tolist())
    sitk.WriteImage(image, str(file))


@pytest.mark.parametrize(("modality", "fill"), [("CT", -40.0), ("MR", 0.0)])
def test_voxels_that_are_not_finite_are_repaired_and_reported(tmp_path, modality, fill):
    voxels = np.random.default_rng(0).integers(-40, 500, (10, 11, 12)).astype(np.float32) + 0.5
    voxels[0, 0, 0] = -40
    broken = voxels.copy()
    broken[2, 3, 4], broken[5, 6, 7], broken[1, 1, 1] = np.nan, -np.inf, 3.4e38
    [outcome] = import_one(tmp_path, write(tmp_path / "a.nii.gz", broken), Settings(modality))
    assert outcome.verdict == "repaired"
    assert outcome.reason == f"3 voxels were not finite: set to {fill:g}"
    voxels[2, 3, 4] = voxels[5, 6, 7] = voxels[1, 1, 1] = fill
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written(tmp_path, outcome)[0]), voxels.T)


REFUSED = {
    "no finite voxel": np.full((9, 9, 9), np.nan, np.float32),
    "constant: every voxel is 7": np.full((9, 9, 9), 7, np.int16),
    "a label map, not an image": (ct(0) > 0).astype(np.uint8),
    "smaller than 8 voxels along an axis": ct(0)[:, :, :7],
    "2D: a single slice": ct(0)[:, :, 0],
    "time series of 3 volumes": np.stack([ct(0), ct(1), ct(2)], axis=3),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_enter_is_refused_with_the_reason_and_leaves_nothing(tmp_path, reason):
    [outcome] = import_one(tmp_path, write(tmp_path / "a.nii.gz", REFUSED[reason]))
    assert outcome.verdict == "rejected"
    assert outcome.reason.startswith(reason)
    assert outcome.shape == "x".join(map(str, REFUSED[reason].shape))
    assert outcome.sha256 and not outcome.case
    assert not (tmp_path / "dataset").exists()


def test_a_truncated_file_is_refused_and_hashed(tmp_path):
    file = write(tmp_path / "a.nii.gz", ct(0))
    file.write_bytes(file.read_bytes()[:-100])
    [outcome] = import_one(tmp_path, file)
    assert outcome.verdict == "rejected" and outcome.reason.startswith("damaged: ")
    assert outcome.sha256 == hashlib.sha256(file.read_bytes()).hexdigest()


def test_a_time_series_is_taken_apart_where_asked(tmp_path):
    file = write(tmp_path / "a.nii.gz", np.stack([ct(0), ct(1), np.zeros_like(ct(2))], axis=3))
    outcomes = import_one(tmp_path, file, Settings("CT", split_time_series=True))
    assert [outcome.verdict for outcome in outcomes] == ["split", "split", "rejected"]
    assert [outcome.part for outcome in outcomes] == [f"volume {n} of 3" for n in (1, 2, 3)]
    for number, outcome in enumerate(outcomes[:2]):
        np.testing.assert_array_equal(sitk.GetArrayFromImage(written(tmp_path, outcome)[0]), ct(number).T)


def test_sheared_axes_are_refused_or_resampled(tmp_path):
    affine = LPS.copy()
    affine[1, 2] = 0.6
    file = write(tmp_path / "a.nii.gz", ct(0), affine)
    [outcome] = import_one(tmp_path, file)
    assert outcome.verdict == "rejected" and "gantry tilt" in outcome.reason
    [outcome] = import_one(tmp_path / "again", file, Settings("CT", resample_sheared=True))
    assert outcome.verdict == "repaired" and "resampled" in outcome.reason
    image, mask = written(tmp_path / "again", outcome)
    assert image.GetSize() == mask.GetSize() and image.GetSize()[1] > 18


@pytest.mark.parametrize(
    ("name", "affine", "linked"),
    [("a.nii.gz", LPS, True), ("a.mha", LPS, True), ("a.nrrd", LPS, True), ("a.nii", LPS, False)]
    + [("a.nii.gz", np.eye(4), False)],
)
def test_only_what_nnunet_reads_and_needs_no_change_is_linked(tmp_path, name, affine, linked):
    file = tmp_path / name
    write(file, ct(0), affine) if ".nii" in name else write_by_itk(file, ct(0), affine)
    [outcome] = import_one(tmp_path, file, Settings("CT", link=True))
    assert outcome.verdict == "accepted"
    assert (outcome.image == str(file)) is linked
    assert (tmp_path / "dataset/imagesTr").exists() is not linked
    image, mask = written(tmp_path, outcome)
    assert image.GetSize() == mask.GetSize() and image.GetOrigin() == mask.GetOrigin()


def test_a_linked_scan_has_no_voxel_to_repair(tmp_path):
    voxels = ct(0).astype(np.float32)
    voxels[0, 0, 0] = np.nan
    [outcome] = import_one(tmp_path, write(tmp_path / "a.nii.gz", voxels), Settings("CT", link=True))
    assert outcome.verdict == "repaired" and outcome.image.startswith("imagesTr/")


def test_nifti2_is_written_anew_as_itk_cannot_read_it(tmp_path):
    nibabel.Nifti2Image(ct(0), LPS).to_filename(tmp_path / "a.nii.gz")
    [outcome] = import_one(tmp_path, tmp_path / "a.nii.gz", Settings("CT", link=True))
    assert outcome.verdict == "accepted" and outcome.image.startswith("imagesTr/")
    np.testing.assert_array_equal(sitk.GetArrayFromImage(written(tmp_path, outcome)[0]), ct(0).T)


def test_equal_content_gives_an_equal_name_and_another_voxel_or_place_another(tmp_path):
    moved = LPS.copy()
    moved[0, 3] = 5
    changed = ct(0)
    changed[0, 0, 0] += 1
    scans = [(ct(0), LPS), (ct(0).astype(np.float64), LPS), (ct(0), moved), (changed, LPS)]
    files = [write(tmp_path / f"{n}.nii", voxels, affine) for n, (voxels, affine) in enumerate(scans)]
    cases = [import_one(tmp_path, file)[0].case for file in files]
    assert cases[0] == cases[1] and len(set(cases)) == 3


def test_equal_scans_keep_names_of_their_own_where_duplicates_are_kept(tmp_path):
    files = [write(tmp_path / f"{name}.nii", ct(0)) for name in "ab"]
    kept = Settings("CT", keep_duplicates=True)
    one, other = (import_one(tmp_path, file, kept)[0] for file in files)
    assert one.case != other.case and one.content == other.content


def test_a_recorded_source_is_not_read_again_until_it_changes(tmp_path, monkeypatch):
    file = write(tmp_path / "a.nii", ct(0))
    [first] = import_one(tmp_path, file)
    image = tmp_path / "dataset" / first.image
    image.unlink()
    assert import_one(tmp_path, file) == [first] and not image.exists()
    write(file, ct(1))
    [second] = import_one(tmp_path, file)
    assert second.case != first.case


def test_a_fault_of_the_system_is_reported_and_tried_again(tmp_path, monkeypatch):
    file = write(tmp_path / "a.nii", ct(0))

    def broken(*arguments, **keywords):
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patched:
        patched.setattr(nibabel, "load", broken)
        [outcome] = import_one(tmp_path, file)
    assert (outcome.verdict, outcome.reason) == ("rejected", "cannot be read: Input/output error")
    [outcome] = import_one(tmp_path, file)
    assert outcome.verdict == "accepted"


def test_a_full_disk_stops_the_run_and_leaves_nothing_half_written(tmp_path, monkeypatch):
    def full(self, stream):
        stream.write(b"half")
        raise OSError(28, "No space left on device")

    file = write(tmp_path / "a.nii", ct(0))
    monkeypatch.setattr(nibabel.Nifti1Image, "to_stream", full)
    with pytest.raises(CannotWrite, match="No space left on device.*start the same command again"):
        import_one(tmp_path, file)
    assert [path for path in (tmp_path / "dataset").rglob("*") if path.is_file()] == []
    assert [path for path in (tmp_path / "state").rglob("*") if path.is_file()] == []


def test_mr_without_air_is_all_body_and_never_empty(tmp_path):
    [outcome] = import_one(tmp_path, write(tmp_path / "a.nii", mr(0)[5:14, 5:14, 5:15]), Settings("MR"))
    assert 0.5 < float(outcome.body_share) <= 1
