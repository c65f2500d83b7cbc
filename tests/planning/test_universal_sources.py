import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from universal_datasets import AXIAL, SAGITTAL, run_here, write_raw, write_volume

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning import universal_sources
from nnunetv2_misfm.planning.universal_sources import RawSource, check_cases, left_right_axis, read_sources

BRAIN, ABDOMEN = "Dataset004_Brain", "Dataset101_Abdomen"


@pytest.fixture
def raw(folders: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(universal_sources, "run", run_here)
    return folders / "raw"


def read_one(raw: Path, modality: str | None = None, **dataset: Any) -> RawSource:
    write_raw(raw, BRAIN, **{"num_cases": 2, "shape": (16, 18, 20), **dataset})
    return read_sources([BRAIN], {} if modality is None else {4: modality})[0]


# Modalities


@pytest.mark.parametrize(
    ("channels", "modality"),
    [
        (["CT"], "CT"), (["ct"], "CT"), (["MRI"], "MR"), (["mr"], "MR"), (["flair"], "FLAIR"), (["T1"], "T1"),
        (["PET"], "PET"), (["T1", "Flair"], "T1+FLAIR"), (["T1+C"], "T1+C"),
    ],
)  # fmt: skip
def test_modality_comes_from_the_channels(raw: Path, channels: list[str], modality: str) -> None:
    assert read_one(raw, channels=channels, num_cases=1).modality == modality


@pytest.mark.parametrize("name", ["noNorm", "zscore", "rescale_to_0_1", "0", "image", "channel_1", ""])
def test_names_that_say_nothing_ask_for_the_modality(raw: Path, name: str) -> None:
    with pytest.raises(MisfmError, match=rf"tell the modality .*got '{name}': say it with --modality 4=CT, say\.$"):
        read_one(raw, channels=[name], num_cases=1)
    with pytest.raises(MisfmError, match=r"--modality 4=CT\+CT, say\.$"):
        read_one(raw, channels=["T1", name], num_cases=1)


def test_given_modality_wins(raw: Path) -> None:
    assert read_one(raw, "mri", channels=["noNorm"], num_cases=1).channels == ("MR",)
    assert read_one(raw, "CT", channels=["T1"], num_cases=1).channels == ("CT",)
    assert read_one(raw, "t1+FLAIR", channels=["a", "b"], num_cases=1).channels == ("T1", "FLAIR")


def test_given_modality_of_other_channels_or_datasets_is_refused(raw: Path) -> None:
    with pytest.raises(MisfmError, match=r"=\.\.\. to name 2 channels joined by '\+' \(now a, b\), got T1\.$"):
        read_one(raw, "T1", channels=["a", "b"], num_cases=1)
    with pytest.raises(MisfmError, match=r"--modality for datasets that are joined \(Dataset004_Brain\), got 101\.$"):
        read_sources([BRAIN], {101: "CT"})


@pytest.mark.parametrize(
    ("other", "listed"), [(["FLAIR", "T1"], "FLAIR, T1"), (["T1"], "T1"), (["T1", "T2"], "T1, T2")]
)
def test_clashing_channels_are_listed(raw: Path, other: list[str], listed: str) -> None:
    write_raw(raw, BRAIN, channels=["T1", "FLAIR"], num_cases=1)
    write_raw(raw, ABDOMEN, channels=other, num_cases=1)
    with pytest.raises(MisfmError, match=rf"got T1, FLAIR in {BRAIN} and {listed} in {ABDOMEN}: "):
        read_sources([BRAIN, ABDOMEN], {})


def test_single_channels_of_any_modality_go_together(raw: Path) -> None:
    write_raw(raw, BRAIN, num_cases=1)
    write_raw(raw, ABDOMEN, channels=["CT"], num_cases=1)
    assert [source.modality for source in read_sources([ABDOMEN, BRAIN], {})] == ["CT", "MR"]


# Labels


def test_labels_are_in_the_order_of_their_values(raw: Path) -> None:
    source = read_one(raw, labels={"lesion": 2, "background": 0, "ignore": 3, "organ": 1})
    assert list(source.classes.items()) == [("organ", (1,)), ("lesion", (2,))]
    assert source.ignore_label == 3 and not source.has_regions


def test_regions_are_in_the_order_of_the_description(raw: Path) -> None:
    labels = {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}
    source = read_one(raw, labels=labels, regions_class_order=[1, 2])
    assert list(source.classes.items()) == [("whole", (1, 2)), ("core", (2,))]
    assert source.has_regions and source.ignore_label == 3


@pytest.mark.parametrize(
    ("entries", "sentence"),
    [
        ({"labels": {"background": 0, "a": 1, "b": 3}}, r"to be 1, 2, 3, \.\.\. as nnU-Net does, got 1, 3\.$"),
        ({"labels": {"organ": 1}}, r"not as nnU-Net wants them \(Background label not declared"),
        ({"labels": {"background": 0, "a": [1, 2]}}, r"not as nnU-Net wants them \(.*regions_class_order"),
        ({"labels": {"background": 0}}, r"expected at least one label beside the background in .*, found none\.$"),
        ({"misfm": {"labels": "body_mask"}}, r"no labels but body masks, expected a labelled dataset: leave it out"),
        ({"misfm": {"universal": {}}}, r"is a universal dataset, expected its sources: name them, or use --extend\.$"),
        ({"channel_names": {}}, r"expected channel_names in the dataset\.json of Dataset004_Brain, found none"),
        ({"channel_names": {"0": "T1", "1": "T2"}}, r"expected 2 images for case case_0 of .*, got 1\.$"),
    ],
)
def test_unfit_descriptions_are_refused(raw: Path, entries: dict[str, Any], sentence: str) -> None:
    with pytest.raises(MisfmError, match=sentence):
        read_one(raw, **entries)


def test_missing_description_and_missing_files_are_named(raw: Path) -> None:
    with pytest.raises(MisfmError, match=rf"description at {raw}/Dataset004_Brain/dataset\.json, found none"):
        read_sources([BRAIN], {})
    folder = write_raw(raw, BRAIN, num_cases=2)
    (folder / "labelsTr/case_1.nii.gz").unlink()
    with pytest.raises(MisfmError, match=r"labelsTr/case_1\.nii\.gz is missing: case case_1 of Dataset004_Brain"):
        read_sources([BRAIN], {})
    (folder / "labelsTr/case_0.nii.gz").unlink()
    for image in (folder / "imagesTr").iterdir():
        image.unlink()
    with pytest.raises(MisfmError, match=r"^expected training cases in .*Dataset004_Brain, found none\.$"):
        read_sources([BRAIN], {})


def test_files_of_a_listing_stay_as_they_are_written(raw: Path) -> None:
    listing = {"a": {"images": ["imagesTr/case_0_0000.nii.gz"], "label": "labelsTr/case_0.nii.gz"}}
    source = read_one(raw, dataset=listing)
    assert source.description["dataset"] == listing
    assert source.cases[0].images == (str(raw / BRAIN / "imagesTr/case_0_0000.nii.gz"),)


# Cases


def test_fit_cases_tell_their_left_right_axis(raw: Path) -> None:
    write_raw(raw, BRAIN, num_cases=2, direction=SAGITTAL)
    write_raw(raw, ABDOMEN, num_cases=2, labels={"background": 0, "a": 1, "ignore": 2})
    sources = read_sources([BRAIN, ABDOMEN], {})
    assert check_cases(sources, 1) == {BRAIN: 0, ABDOMEN: 2}


def test_cases_of_differing_orientation_tell_no_axis(raw: Path) -> None:
    source = read_one(raw)
    image = np.random.default_rng(0).normal(size=(16, 18, 20)).astype(np.float32)
    write_volume(raw / BRAIN / "imagesTr/case_1_0000.nii.gz", image, (1, 1, 1), SAGITTAL)
    assert check_cases([source], 1) == {BRAIN: None}


@pytest.mark.parametrize(
    ("file", "array", "sentence"),
    [
        ("labelsTr/case_1", np.zeros((16, 18, 21), np.uint8), r"case_1\.nii\.gz as large as its image \(16 x 18 x 20 "
         r"voxels\), got 16 x 18 x 21: mend"),
        ("labelsTr/case_1", np.full((16, 18, 20), 7, np.uint8), r"the values 0, 1, 2 that the dataset\.json of "
         r"Dataset004_Brain knows, got 7 in .*labelsTr/case_1\.nii\.gz"),
        ("imagesTr/case_1_0000", np.zeros((1, 18, 20), np.float32), r"expected 3D images, got 1 x 18 x 20 voxels in "
         r".*case_1_0000\.nii\.gz"),
    ],
)  # fmt: skip
def test_first_unfit_case_is_named(raw: Path, file: str, array: np.ndarray, sentence: str) -> None:
    source = read_one(raw)
    write_volume(raw / BRAIN / f"{file}.nii.gz", array, (1, 1, 1))
    with pytest.raises(MisfmError, match=sentence):
        check_cases([source], 1)


def test_voxels_that_are_no_numbers_are_refused(raw: Path) -> None:
    source = read_one(raw, file_ending=".nrrd")  # ITK's NIfTI reader makes zeros of them
    array = np.zeros((16, 18, 20), np.float32)
    array[3, 4, 5] = np.nan
    write_volume(raw / BRAIN / "imagesTr/case_1_0000.nrrd", array, (1, 1, 1))
    with pytest.raises(MisfmError, match=r"imagesTr/case_1_0000\.nrrd holds voxels that are no numbers"):
        check_cases([source], 1)


@pytest.mark.parametrize("file", ["imagesTr/case_1_0000.nii.gz", "labelsTr/case_1.nii.gz"])
def test_unreadable_file_is_named(raw: Path, file: str) -> None:
    source = read_one(raw)
    content = (raw / BRAIN / file).read_bytes()
    (raw / BRAIN / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(
        MisfmError, match=rf"^{re.escape(str(raw / BRAIN / file))} could not be read \(.*mend or remove"
    ):
        check_cases([source], 1)


def test_dataset_that_no_reader_opens_is_named(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_raw(raw, BRAIN, num_cases=1)
    (raw / BRAIN / "imagesTr/case_0_0000.nii.gz").write_bytes(b"nothing")
    with pytest.raises(MisfmError, match=r"case_0_0000\.nii\.gz can be read by none of nnU-Net's readers"):
        read_sources([BRAIN], {})
    assert capsys.readouterr() == ("", "")


# Orientation


def _turned(degrees: float) -> tuple[float, ...]:
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    return (c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0)  # about z


@pytest.mark.parametrize(
    ("direction", "axis"),
    [(AXIAL, 2), (SAGITTAL, 0), (_turned(30), 2), (_turned(60), 1), (_turned(45), None), ((1.0, 0.0, 0.0, 1.0), None)],
)
def test_left_right_axis_of_simpleitk_is_the_nearest(direction: tuple[float, ...], axis: int | None) -> None:
    assert left_right_axis({"sitk_stuff": {"direction": direction}}) == axis


def test_left_right_axis_of_nibabel_is_free_of_the_spacing() -> None:
    affine = np.eye(4)
    affine[:3, :3] = [[0, 0.5, 0], [0, 0, 3], [-2, 0, 0]]  # y of the array runs along left-right
    assert left_right_axis({"nibabel_stuff": {"original_affine": affine}}) == 1
    reoriented = {"original_affine": affine, "reoriented_affine": np.diag([2.0, 0.5, 3.0, 1.0])}
    assert left_right_axis({"nibabel_stuff": reoriented}) == 2
    assert left_right_axis({"spacing": [1, 1, 1]}) is None
