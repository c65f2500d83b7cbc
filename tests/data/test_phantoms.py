"""The phantoms: shapes against hand arithmetic and a slow loop, densities, files, refusal to overwrite."""

import json
from math import pi
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunetv2_misfm.data import phantoms
from nnunetv2_misfm.data.phantoms import LABELS, Solid, draw_anatomy, make_phantom, write_phantom_dataset
from nnunetv2_misfm.errors import MisfmError


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def test_an_ellipsoid_holds_the_points_that_a_slow_loop_finds():
    solid = Solid("liver", "ellipsoid", (1.0, -3.0, 0.5), (4.0, 3.0, 5.0))
    axes = [np.arange(-8.0, 8.1, 1.0), np.arange(-9.0, 9.1, 1.5), np.arange(-7.5, 7.6, 1.0)]
    inside = solid.contains(*axes)
    for i, z in enumerate(axes[0]):
        for j, y in enumerate(axes[1]):
            for k, x in enumerate(axes[2]):
                expected = ((z - 1) / 4) ** 2 + ((y + 3) / 3) ** 2 + ((x - 0.5) / 5) ** 2 <= 1
                assert inside[i, j, k] == expected


def test_a_cylinder_ends_at_its_half_length():
    solid = Solid("spine", "cylinder", (0.0, 0.0, 0.0), (2.0, 1.0, 1.0))
    inside = solid.contains(np.array([-3.0, -2.0, 0.0, 2.0, 3.0]), np.zeros(1), np.array([0.0, 1.0, 1.1]))
    assert inside[:, 0].tolist() == [[False] * 3, *[[True, True, False]] * 3, [False] * 3]


def test_volumes_are_those_of_the_text_book():
    assert Solid("liver", "ellipsoid", (0, 0, 0), (3, 4, 5)).volume_mm3 == pytest.approx(80 * pi)
    assert Solid("spine", "cylinder", (0, 0, 0), (10, 2, 3)).volume_mm3 == pytest.approx(120 * pi)


def test_the_kidneys_fill_their_analytic_volume():
    kidneys = [solid for solid in draw_anatomy(rng(3)) if solid.tissue == "kidneys"]
    expected_mm3 = sum(4 / 3 * pi * np.prod(kidney.semi_axes_mm) for kidney in kidneys)
    phantom = make_phantom(rng(3), spacing_mm=(1.0, 1.0, 1.0))
    assert len(kidneys) == 2
    assert (phantom.labels == LABELS["kidneys"]).sum() == pytest.approx(expected_mm3, rel=0.01)


@pytest.mark.parametrize("seed", range(8))
def test_every_organ_is_there_and_inside_the_body(seed: int):
    phantom = make_phantom(rng(seed))
    assert set(np.unique(phantom.labels)) == set(LABELS.values())
    assert phantom.body.any() and not phantom.body.all()
    assert phantom.body[phantom.labels > 0].all()


def test_types_and_sizes_are_as_documented_and_sizes_vary():
    made = [make_phantom(rng(seed)) for seed in range(8)]
    for phantom in made:
        assert (phantom.image.dtype, phantom.labels.dtype, phantom.body.dtype) == (np.int16, np.uint8, bool)
        assert phantom.image.shape == phantom.labels.shape == phantom.body.shape
        depth, height, width = phantom.image.shape
        assert 25 <= depth <= 40 and 48 <= height <= 71 and height == width
        assert phantom.spacing_mm[1] == phantom.spacing_mm[2]
    assert len({phantom.image.shape for phantom in made}) > 4


def test_without_noise_air_and_organs_have_their_published_density(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(phantoms, "NOISE_HU", 0.0)
    phantom = make_phantom(rng(1), spacing_mm=(1.0, 1.0, 1.0))
    assert (phantom.image[:, 0, 0] == -1000).all()
    liver, kidney, spine = (np.median(phantom.image[phantom.labels == label]) for label in (1, 2, 3))
    assert 95 <= liver <= 125 and 165 <= kidney <= 205 and 240 <= spine <= 320
    skin = phantom.body & ~np.roll(phantom.body, 1, axis=2)
    assert ((phantom.image[skin] > -1000) & (phantom.image[skin] < -49)).all()


def test_noise_is_white_and_has_the_stated_deviation():
    liver = make_phantom(rng(1), spacing_mm=(1.0, 1.0, 1.0))
    values = liver.image[liver.labels == LABELS["liver"]].astype(float)
    quartiles = np.percentile(values, [25, 75])
    assert (quartiles[1] - quartiles[0]) / 1.349 == pytest.approx(15, rel=0.1)


@pytest.mark.parametrize(("organ", "other"), [("liver", "spleen"), ("kidneys", "blood")])
def test_no_threshold_between_two_tissues_serves_all_cases(organ: str, other: str):
    organ_is_denser = set()
    for seed in range(12):
        solids = draw_anatomy(rng(seed))
        others = next(solid for solid in reversed(solids) if solid.tissue == other)
        phantom = make_phantom(rng(seed), spacing_mm=(2.0, 2.0, 2.0))
        outside_the_organ = phantom.labels != LABELS[organ]
        in_other = others.contains(*phantoms.voxel_centres_mm((2.0, 2.0, 2.0))) & outside_the_organ
        organ_hu = np.median(phantom.image[phantom.labels == LABELS[organ]])
        organ_is_denser.add(bool(organ_hu > np.median(phantom.image[in_other])))
    assert organ_is_denser == {True, False}


def test_the_same_seed_gives_the_same_voxels_and_another_seed_does_not():
    first, again, other = make_phantom(rng(4)), make_phantom(rng(4)), make_phantom(rng(5))
    assert np.array_equal(first.image, again.image) and np.array_equal(first.labels, again.labels)
    assert first.spacing_mm == again.spacing_mm
    assert first.image.shape != other.image.shape or not np.array_equal(first.image, other.image)


def test_voxel_centres_are_symmetric_and_a_spacing_apart():
    z, y, x = phantoms.voxel_centres_mm((4.0, 2.0, 2.0))
    assert (len(z), len(y), len(x)) == (25, 53, 53)
    assert z[0] == -48.0 and z[12] == 0.0 and y[0] == -52.0 and np.diff(x).tolist() == [2.0] * 52
    fine_z = phantoms.voxel_centres_mm((4.0, 2.0, 2.0), 2)[0]
    assert fine_z[:2].tolist() == [-49.0, -47.0]


def read(file: Path) -> tuple[np.ndarray, sitk.Image]:
    volume = sitk.ReadImage(str(file))
    return sitk.GetArrayFromImage(volume), volume


def test_a_labelled_dataset_reads_back_as_it_was_made(tmp_path: Path):
    folder = write_phantom_dataset(tmp_path, 901, "Organs", num_training=2, num_test=1, seed=3, labelled=True)
    assert folder == tmp_path / "Dataset901_Organs"
    assert sorted(str(file.relative_to(folder)) for file in folder.rglob("*.nii.gz")) == [
        "imagesTr/phantom_000_0000.nii.gz",
        "imagesTr/phantom_001_0000.nii.gz",
        "imagesTs/phantom_002_0000.nii.gz",
        "labelsTr/phantom_000.nii.gz",
        "labelsTr/phantom_001.nii.gz",
        "labelsTs/phantom_002.nii.gz",
    ]
    phantom = make_phantom(np.random.default_rng((3, 901, 2)))
    image, image_file = read(folder / "imagesTs/phantom_002_0000.nii.gz")
    labels, labels_file = read(folder / "labelsTs/phantom_002.nii.gz")
    assert np.array_equal(image, phantom.image) and np.array_equal(labels, phantom.labels)
    assert image_file.GetSpacing() == pytest.approx(phantom.spacing_mm[::-1])
    assert labels_file.GetSpacing() == image_file.GetSpacing()
    assert labels_file.GetOrigin() == image_file.GetOrigin()
    middle = [(count - 1) / 2 for count in image_file.GetSize()]
    assert image_file.TransformContinuousIndexToPhysicalPoint(middle) == pytest.approx((0, 0, 0), abs=1e-4)
    dataset_json = json.loads((folder / "dataset.json").read_text())
    assert dataset_json["numTraining"] == 2
    assert dataset_json["labels"] == {"background": 0, "liver": 1, "kidneys": 2, "spine": 3}
    assert dataset_json["misfm"]["labels"] != "body_mask"


def test_an_unlabelled_dataset_carries_the_body_mask_and_says_so(tmp_path: Path):
    folder = write_phantom_dataset(tmp_path, 900, "Pool", num_training=1, seed=3, labelled=False)
    phantom = make_phantom(np.random.default_rng((3, 900, 0)))
    assert np.array_equal(read(folder / "labelsTr/phantom_000.nii.gz")[0], phantom.body)
    dataset_json = json.loads((folder / "dataset.json").read_text())
    assert dataset_json["misfm"] == {"labels": "body_mask", "source": "phantoms"}
    assert dataset_json["labels"] == {"background": 0, "body": 1}
    assert not (folder / "imagesTs").exists()


def test_a_dataset_of_its_own_is_replaced(tmp_path: Path):
    write_phantom_dataset(tmp_path, 900, "Pool", num_training=2, seed=3, labelled=False)
    folder = write_phantom_dataset(tmp_path, 900, "Pool", num_training=1, seed=3, labelled=False)
    assert len(list((folder / "imagesTr").iterdir())) == 1


@pytest.mark.parametrize("theirs", ["Dataset900_Pool", "Dataset900_Other"])
@pytest.mark.parametrize("dataset_json", [None, "{}", "not json", '{"misfm": {"source": "import"}}'])
def test_a_dataset_of_the_user_is_never_touched(tmp_path: Path, theirs: str, dataset_json: str | None):
    scan = tmp_path / theirs / "imagesTr" / "a_0000.nii.gz"
    scan.parent.mkdir(parents=True)
    scan.write_text("precious")
    if dataset_json is not None:
        (tmp_path / theirs / "dataset.json").write_text(dataset_json)
    with pytest.raises(MisfmError, match=f"dataset 900: expected no other.*found {theirs}.*choose another"):
        write_phantom_dataset(tmp_path, 900, "Pool", num_training=1, seed=3, labelled=False)
    assert scan.read_text() == "precious"
