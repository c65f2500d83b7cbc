"""Preprocessing on the engine against nnU-Net's own command, on phantoms."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import blosc2
import numpy as np
import pytest
import SimpleITK as sitk
from commands import World
from toy import toy_plans

from nnunetv2_misfm.data.phantoms import write_phantom_dataset
from nnunetv2_misfm.data.preprocess import OWN_FOLDER, _settings, _target, preprocess
from nnunetv2_misfm.data.records import Records
from nnunetv2_misfm.errors import MisfmError

POOL, LISTED = "Dataset900_Pool", "Dataset901_Listed"
DATA = "nnUNetPlans_3d_fullres"


def write_listed_dataset(raw: Path) -> None:
    """Three cases of two channels, listed by path in dataset.json, with regions, an ignore label and a dark frame."""
    folder, elsewhere = raw / LISTED, raw / "elsewhere"
    folder.mkdir(parents=True)
    elsewhere.mkdir()
    listed = {}
    for case in range(3):
        generator = np.random.default_rng(case)
        arrays = {
            "t1": np.pad(generator.normal(100, 10, (18, 26, 24)), 3),
            "t2": np.pad(generator.normal(50, 5, (18, 26, 24)), 3),
            "seg": np.pad(generator.integers(0, 4, (18, 26, 24)), 3),
        }
        for name, array in arrays.items():
            image = sitk.GetImageFromArray(array.astype(np.uint8 if name == "seg" else np.float32))
            image.SetSpacing((1.0, 1.5, 2.0 + case))
            sitk.WriteImage(image, str(elsewhere / f"patient_{case}_{name}.nii.gz"))
        paths = [f"../elsewhere/patient_{case}_{name}.nii.gz" for name in arrays]
        listed[f"patient_{case}"] = {"images": paths[:2], "label": paths[2]}
    description = {
        "channel_names": {"0": "T1", "1": "T2"},
        "labels": {"background": 0, "whole": [1, 2], "core": 2, "ignore": 3},
        "regions_class_order": [1, 2],
        "numTraining": 3,
        "file_ending": ".nii.gz",
        "dataset": listed,
    }
    (folder / "dataset.json").write_text(json.dumps(description))


def write_plans(preprocessed: Path, raw: Path, name: str) -> None:
    """What planning leaves of a dataset."""
    two_channels = {"normalization_schemes": ["ZScoreNormalization"] * 2, "use_mask_for_norm": [True, False]}
    if name == LISTED:
        plans = toy_plans(spacing=[1.5, 1.5, 1.0], **two_channels)
        flat = {**plans["configurations"]["3d_fullres"], "spacing": [1.0, 1.0], "patch_size": [32, 32]}
        plans["configurations"] = {"2d": {**flat, "data_identifier": "nnUNetPlans_2d"}}
        plans.update(transpose_forward=[1, 0, 2], transpose_backward=[1, 0, 2])
    else:
        plans = toy_plans(spacing=[5.0, 3.5, 3.5], normalization_schemes=["CTNormalization"])
    intensities = {"mean": 20.0, "std": 90.0, "percentile_00_5": -120.0, "percentile_99_5": 250.0}
    plans["foreground_intensity_properties_per_channel"] = {"0": intensities, "1": intensities}
    (preprocessed / name).mkdir(parents=True, exist_ok=True)
    shutil.copy(raw / name / "dataset.json", preprocessed / name)
    (preprocessed / name / "nnUNetPlans.json").write_text(json.dumps({**plans, "dataset_name": name}))


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both datasets as `nnUNetv2_preprocess` leaves them."""
    world = World(tmp_path_factory.mktemp("stock"))
    write_phantom_dataset(world.root / "raw", 900, "Pool", num_training=4, seed=0, labelled=False)
    write_listed_dataset(world.root / "raw")
    for name in (POOL, LISTED):
        write_plans(world.root / "preprocessed", world.root / "raw", name)
    world.run("stock", "nnUNetv2_preprocess", "-d", "900", "901", "-c", "2d", "3d_fullres", "-np", "1")
    assert world.finished["stock"].returncode == 0, world.finished["stock"].stderr
    return world.root


@pytest.fixture
def planned(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same datasets, planned and not preprocessed."""
    shutil.copytree(stock / "raw", tmp_path / "raw")
    preprocessed = shutil.ignore_patterns("nnUNetPlans_*", "gt_segmentations")
    shutil.copytree(stock / "preprocessed", tmp_path / "preprocessed", ignore=preprocessed)
    for name in ("raw", "preprocessed", "results"):
        monkeypatch.setenv(f"nnUNet_{name}", str(tmp_path / name))
    return tmp_path


def files_below(folder: Path) -> dict[str, Path]:
    files = [file for file in folder.rglob("*") if file.is_file() and OWN_FOLDER not in file.parts]
    return {str(file.relative_to(folder)): file for file in files}


def cases_in(folder: Path) -> dict[str, int]:
    """Case -> time of change of its image."""
    return {file.stem: file.stat().st_mtime_ns for file in folder.glob("*.b2nd") if not file.stem.endswith("_seg")}


def data_folder(root: Path) -> Path:
    return root / "preprocessed" / POOL / DATA


def redone(folder: Path, before: dict[str, int]) -> set[str]:
    """Cases written or rewritten since."""
    return {case for case, changed in cases_in(folder).items() if before.get(case) != changed}


def assert_equal(ours: Path, stock: Path) -> None:
    """Same files: arrays, their chunks and compression, and all other files byte for byte.

    Not the bytes of the arrays: four threads compress, and blocks are stored as they get ready, in nnU-Net too.
    """
    ours_files, stock_files = files_below(ours), files_below(stock)
    assert ours_files.keys() == stock_files.keys()
    for name, file in ours_files.items():
        if file.suffix != ".b2nd":
            assert file.read_bytes() == stock_files[name].read_bytes(), name
            continue
        assert file.stat().st_size == stock_files[name].stat().st_size, name
        array, expected = blosc2.open(str(file)), blosc2.open(str(stock_files[name]))
        assert (array.dtype, array.chunks, array.blocks) == (expected.dtype, expected.chunks, expected.blocks)
        assert array.schunk.cparams == expected.schunk.cparams
        np.testing.assert_array_equal(array[:], expected[:])


def test_files_are_those_of_nnunet(planned: Path, stock: Path):
    folder = data_folder(planned)
    assert preprocess("900", ["3d_fullres", "quick"], workers=1).splitlines() == [
        f"3d_fullres: preprocessed 4 cases into {folder}",
        f"quick: preprocessed 0 cases into {folder}; 4 were finished before",
    ]
    assert_equal(folder.parent, stock / "preprocessed" / POOL)


def test_files_of_a_listed_dataset_with_regions_are_those_of_nnunet(planned: Path, stock: Path):
    base = planned / "preprocessed" / LISTED
    preprocess(LISTED, ["2d"], workers=1)
    assert_equal(base, stock / "preprocessed" / LISTED)

    file = planned / "raw" / LISTED / "dataset.json"
    description = json.loads(file.read_text())
    description["dataset"]["patient_9"] = description["dataset"]["patient_0"]
    file.write_text(json.dumps(description))
    assert preprocess(LISTED, ["2d"], workers=1).splitlines() == [
        f"2d: preprocessed 0 cases into {base / 'nnUNetPlans_2d'}; 3 were finished before",
        f"1 cases of {file.parent} are missing in the dataset.json beside the plans, so they were left out: "
        "plan again (nnUNetv2_plan_experiment) to take them in.",
    ]


def test_only_what_is_not_up_to_date_is_redone_and_what_is_no_case_goes(planned: Path, stock: Path):
    folder, raw = data_folder(planned), planned / "raw" / POOL
    plans_file = folder.parent / "nnUNetPlans.json"
    plans = json.loads(plans_file.read_text())
    removed = "removed {} files that were out of date or not of this command"
    shutil.copytree(stock / "preprocessed" / POOL / DATA, folder)  # it does not say what it was made from
    said = preprocess(POOL, workers=1)
    assert said == f"3d_fullres: preprocessed 4 cases into {folder}; {removed.format(12)}"

    before = cases_in(folder)
    plans["configurations"]["3d_fullres"].update(batch_size=7, architecture={})
    plans_file.write_text(json.dumps(plans))
    assert preprocess(POOL) == f"3d_fullres: preprocessed 0 cases into {folder}; 4 were finished before"
    assert redone(folder, before) == set()

    (folder / "phantom_000.pkl").unlink()
    (folder / "phantom_001_seg.b2nd").write_bytes(b"half")
    (folder / "of_another_program").mkdir()
    label = raw / "labelsTr" / "phantom_002.nii.gz"
    sitk.WriteImage(sitk.ReadImage(str(label)) * 0 + 1, str(label))
    os.utime(label, (time.time() + 10, time.time() + 10))
    said = preprocess(POOL, workers=1)
    assert said == f"3d_fullres: preprocessed 3 cases into {folder}; 1 were finished before; {removed.format(9)}"
    assert redone(folder, before) == {"phantom_000", "phantom_001", "phantom_002"}
    assert (folder.parent / "gt_segmentations" / label.name).read_bytes() == label.read_bytes()

    shapes = {case: blosc2.open(str(folder / f"{case}.b2nd")).shape for case in before}
    plans["configurations"]["3d_fullres"]["spacing"] = [10.0, 7.0, 7.0]
    plans_file.write_text(json.dumps(plans))
    for file in raw.glob("*Tr/phantom_003*"):
        file.unlink()
    preprocess(POOL, workers=1)
    assert sorted(cases_in(folder)) == ["phantom_000", "phantom_001", "phantom_002"]
    for case in cases_in(folder):
        halved = blosc2.open(str(folder / f"{case}.b2nd")).shape
        assert all(abs(n - m / 2) <= 1 for n, m in zip(halved[1:], shapes[case][1:], strict=True))


@pytest.mark.parametrize(
    ("part", "keys", "value"),
    [
        ("plans", ("transpose_forward",), [0, 2, 1]),
        ("plans", ("image_reader_writer",), "NibabelIO"),
        ("plans", ("foreground_intensity_properties_per_channel", "0", "mean"), 21.0),
        ("plans", ("configurations", "3d_fullres", "patch_size"), [16, 16, 32]),
        ("plans", ("configurations", "3d_fullres", "normalization_schemes"), ["ZScoreNormalization"]),
        ("dataset_json", ("labels", "body"), 2),
        ("dataset_json", ("regions_class_order",), [1]),
    ],
)
def test_all_that_decides_the_files_is_in_the_settings(planned: Path, part: str, keys: tuple[str, ...], value: Any):
    base = planned / "preprocessed" / POOL
    contents = {"plans": json.loads((base / "nnUNetPlans.json").read_text())}
    contents["dataset_json"] = json.loads((base / "dataset.json").read_text())
    before = _settings(_target("quick", contents["plans"], contents["dataset_json"], base))
    *parents, last = keys
    entry = contents[part]
    for key in parents:
        entry = entry[key]
    entry[last] = value
    assert _settings(_target("quick", contents["plans"], contents["dataset_json"], base)) != before


def test_a_corrupt_image_is_named_the_others_are_finished_and_mending_it_finishes_all(planned: Path, stock: Path):
    image = planned / "raw" / POOL / "imagesTr" / "phantom_001_0000.nii.gz"
    good, folder = image.read_bytes(), data_folder(planned)
    image.write_bytes(b"no image")
    (planned / "raw" / POOL / "labelsTr" / "phantom_003.nii.gz").rename(planned / "hidden")
    names = r"phantom_001 \(3d_fullres\), phantom_003 \(3d_fullres\)"
    said = rf"^2 of 4 cases failed: {names}\. phantom_001 \(3d_fullres\) said: RuntimeError: .+"
    with pytest.raises(MisfmError, match=said + "Mend them and run the same command again; the others are finished"):
        preprocess(POOL, workers=1)
    before = cases_in(folder)
    assert sorted(before) == ["phantom_000", "phantom_002"]

    image.write_bytes(good)
    (planned / "hidden").rename(planned / "raw" / POOL / "labelsTr" / "phantom_003.nii.gz")
    preprocess(POOL, workers=1)
    assert redone(folder, before) == {"phantom_001", "phantom_003"}
    assert_equal(folder.parent, stock / "preprocessed" / POOL)


def test_a_run_that_was_killed_goes_on_where_it_was(planned: Path, stock: Path):
    folder = data_folder(planned)
    script = planned / "script.py"
    script.write_text(
        "from nnunetv2_misfm.data.preprocess import preprocess\n"
        f"if __name__ == '__main__':\n    preprocess({POOL!r}, workers=1)\n"
    )
    process = subprocess.Popen([sys.executable, script], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = folder.parent / OWN_FOLDER / "records"
    while not list(records.glob("*/*.json")) and process.poll() is None:
        time.sleep(0.001)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    time.sleep(1)  # its worker ends by itself
    finished = {key.split("/")[1] for key, _ in Records(records)}
    before = {case: changed for case, changed in cases_in(folder).items() if case in finished}
    assert 1 <= len(before) < 4
    preprocess(POOL, workers=1)
    assert redone(folder, before) == {f"phantom_00{i}" for i in range(4)} - finished
    assert_equal(folder.parent, stock / "preprocessed" / POOL)
    assert [entry.name for entry in (folder.parent / OWN_FOLDER).iterdir() if any(entry.iterdir())] == ["records"]


def test_a_cluster_writes_the_same_files(planned: Path, stock: Path):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=1, threads_per_worker=2, processes=True, dashboard_address=":0") as cluster:
        preprocess(POOL, scheduler=cluster.scheduler_address)
    assert_equal(planned / "preprocessed" / POOL, stock / "preprocessed" / POOL)


def test_what_is_missing_is_named(planned: Path, monkeypatch: pytest.MonkeyPatch):
    base, raw = planned / "preprocessed" / POOL, planned / "raw"
    with pytest.raises(MisfmError, match="got '3d'; it has 3d_fullres, quick"):
        preprocess(POOL, ["3d_fullres", "3d"])
    with pytest.raises(MisfmError, match="expected plans at .*mine.json, found none"):
        preprocess(POOL, plans="mine")
    (raw / POOL / "imagesTr").rename(raw / POOL / "hidden")
    with pytest.raises(MisfmError, match="the training cases of .* could not be listed"):
        preprocess(POOL)
    (raw / POOL / "hidden").rename(raw / POOL / "imagesTr")
    (base / "dataset.json").rename(base / "hidden")
    with pytest.raises(
        MisfmError, match="dataset.json, which planning puts there: run nnUNetv2_plan_experiment -d 900"
    ):
        preprocess("900")
    (base / "hidden").rename(base / "dataset.json")
    (raw / POOL / "dataset.json").unlink()
    with pytest.raises(MisfmError, match="expected the raw dataset at .*, found no dataset.json there: set nnUNet_raw"):
        preprocess(POOL)
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(MisfmError, match="the environment variable nnUNet_raw to name a folder, but it is not set"):
        preprocess(POOL)
    assert not (base / DATA).exists()
