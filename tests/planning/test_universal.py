"""The command itself, on three tiny datasets."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.training.dataloading.nnunet_dataset import infer_dataset_class
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from universal_datasets import run_here, write_raw

from nnunetv2_misfm.cli import main
from nnunetv2_misfm.data import engine, preprocess
from nnunetv2_misfm.planning import universal_sources
from nnunetv2_misfm.planning.configure import configure
from nnunetv2_misfm.universe import Universe

BRAIN, ABDOMEN, HEAD = "Dataset004_Brain", "Dataset101_Abdomen", "Dataset102_Head"
UNIVERSAL = "Dataset950_Universal"
SIDED = {"background": 0, "liver": 1, "kidney_left": 2, "kidney_right": 3}
QUICK = ("--spacing", "1", "1", "1", "--gpu-memory-gb", "1", "--batch-size", "2", "-np", "1")
LATER = ("-d", "4", "--dataset", "960")
COMMAND = ("universal", "-d", "4", "101", "--dataset", "950", *QUICK, "--same", "4:organ=101:liver")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """nnU-Net's folders with three raw datasets, of which two are joined."""
    root = tmp_path_factory.mktemp("universal")
    with pytest.MonkeyPatch.context() as patch:
        for name in ("raw", "preprocessed", "results"):
            (root / name).mkdir()
            patch.setenv(f"nnUNet_{name}", str(root / name))
        patch.setenv("nnUNet_n_proc_DA", "0")
        patch.setattr(universal_sources, "run", run_here)
        patch.setattr(preprocess, "run", run_here)
        write_raw(root / "raw", BRAIN)
        write_raw(root / "raw", ABDOMEN, num_cases=3, channels=["CT"], labels=SIDED)
        write_raw(root / "raw", HEAD, num_cases=2, channels=["T2"], labels={"background": 0, "tumour": 1})
        assert main(COMMAND) == 0
        yield root


def read(file: Path) -> Any:
    return json.loads(file.read_text())


def times_of(folder: Path) -> dict[str, int]:
    return {file.name: file.stat().st_mtime_ns for file in folder.iterdir()}


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(["universal", *arguments]) == 2
    return capsys.readouterr().err


# What is written


def test_universal_dataset_holds_the_cases_of_all_sources(root: Path) -> None:
    folder = root / "preprocessed" / UNIVERSAL / "nnUNetPlans_3d_fullres"
    kind = infer_dataset_class(str(folder))
    names = [f"004_case_{i}" for i in range(6)] + [f"101_case_{i}" for i in range(3)]
    cases = kind(str(folder))
    assert cases.identifiers == names == list(read(root / "raw" / UNIVERSAL / "dataset.json")["dataset"])
    data, segmentation, _, properties = cases.load_case("101_case_2")
    assert data.shape == (1, 24, 26, 28) and set(np.unique(segmentation[:])) == {0, 1, 2, 3}
    assert set(properties["class_locations"]) == {1, 2, 3}


def test_ct_is_clipped_and_scaled_by_its_own_dataset_and_mr_case_by_case(root: Path) -> None:
    folder = root / "preprocessed" / UNIVERSAL / "nnUNetPlans_3d_fullres"
    cases = infer_dataset_class(str(folder))(str(folder))
    raw = {
        name: sitk.GetArrayFromImage(sitk.ReadImage(str(root / "raw" / name / "imagesTr/case_1_0000.nii.gz")))
        for name in (BRAIN, ABDOMEN)
    }
    plans = read(root / "preprocessed" / ABDOMEN / "nnUNetPlansOf950.json")
    own = plans["foreground_intensity_properties_per_channel"]["0"]
    clipped = np.clip(raw[ABDOMEN], own["percentile_00_5"], own["percentile_99_5"])
    np.testing.assert_allclose(cases.load_case("101_case_1")[0][0], (clipped - own["mean"]) / own["std"], atol=1e-5)
    scored = (raw[BRAIN] - raw[BRAIN].mean()) / raw[BRAIN].std()
    np.testing.assert_allclose(cases.load_case("004_case_1")[0][0], scored, atol=1e-5)


def test_preprocessed_cases_are_those_of_stock_nnunet_under_the_sources_plans(root: Path) -> None:
    base = root / "preprocessed" / ABDOMEN
    manager = PlansManager(str(base / "nnUNetPlansOf950.json"))
    files = [str(root / "raw" / ABDOMEN / part / "case_0") for part in ("imagesTr", "labelsTr")]
    data, segmentation, _ = DefaultPreprocessor(verbose=False).run_case(
        [files[0] + "_0000.nii.gz"], files[1] + ".nii.gz", manager, manager.get_configuration("3d_fullres"),
        str(base / "dataset.json"),
    )  # fmt: skip
    folder = base / "nnUNetPlansOf950_3d_fullres"
    written = infer_dataset_class(str(folder))(str(folder)).load_case("case_0")
    np.testing.assert_array_equal(written[0][:], data)
    np.testing.assert_array_equal(written[1][:], segmentation)
    assert {file.name for file in (base / "gt_segmentations").iterdir()} == {f"case_{i}.nii.gz" for i in range(3)}


def test_plans_tell_tasks_and_what_may_be_mirrored(root: Path) -> None:
    universe = Universe.from_plans(read(root / "preprocessed" / UNIVERSAL / "nnUNetPlans.json"))
    assert universe.tasks == ("4:organ", "4:lesion", "101:kidney_left", "101:kidney_right")
    assert [source.tasks for source in universe.sources] == [(0, 1), (0, 2, 3)]
    assert [source.mirror_axes for source in universe.sources] == [(0, 1, 2), (0, 1)]
    assert [source.num_cases for source in universe.sources] == [6, 3] and universe.source is None
    for name in (BRAIN, ABDOMEN):
        own = Universe.from_plans(read(root / "preprocessed" / name / "nnUNetPlansOf950.json"))
        assert own == universe.answering(name)


def test_folds_unite_the_sources(root: Path) -> None:
    folds = read(root / "preprocessed" / UNIVERSAL / "splits_final.json")
    brain = read(root / "preprocessed" / BRAIN / "splits_final.json")
    assert folds[3]["val"] == [f"004_{name}" for name in brain[3]["val"]] + ["101_case_0"]
    assert len(folds) == 5 and all(len(fold["train"]) + len(fold["val"]) == 9 for fold in folds)


def test_configure_works_on_the_plans_and_joining_again_keeps_it_and_every_case(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plans_files = [
        configure("950", "3d_fullres", "quick", ["num_epochs=2", "batch_size=3"]),
        configure("101", "3d_fullres", "own", ["batch_size=4"], "nnUNetPlansOf950"),
    ]
    folders = [root / "preprocessed" / name / "nnUNetPlansOf950_3d_fullres" for name in (BRAIN, ABDOMEN)]
    before, contents = [times_of(folder) for folder in folders], [read(file) for file in plans_files]
    (folders[1] / "case_1.pkl").unlink()
    assert main(COMMAND) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote Dataset950_Universal: 9 cases, 4 tasks, 2 modalities; spacing 1 x 1 x 1 mm, patch "
        f"{' x '.join(map(str, contents[0]['configurations']['3d_fullres']['patch_size']))}, batch 2",
        "",
        "source              cases  tasks                                       modality  mirror axes",
        "Dataset004_Brain    6      4:organ, 4:lesion                           MR        0, 1, 2",
        "Dataset101_Abdomen  3      4:organ, 101:kidney_left, 101:kidney_right  CT        0, 1",
        "",
        "next: nnUNetv2_train 950 3d_fullres 0 -tr nnUNetTrainerHermes",
    ]
    after = [times_of(folder) for folder in folders]
    assert after[0] == before[0] and [read(file) for file in plans_files] == contents
    assert [list(content["configurations"]) for content in contents] == [["3d_fullres", "quick"], ["3d_fullres", "own"]]
    assert {name for name in after[1] if after[1][name] != before[1][name]} == {
        "case_1.b2nd", "case_1_seg.b2nd", "case_1.pkl"
    }  # fmt: skip


def test_the_next_command_trains_on_all_cases_where_the_first_fold_holds_out_none(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_raw(root / "raw", "Dataset105_Lone", num_cases=1)
    assert main(("universal", "-d", "105", "--dataset", "956", "-p", "mine", *QUICK)) == 0
    said = capsys.readouterr().out.splitlines()[-1]
    assert said == "next: nnUNetv2_train 956 3d_fullres all -tr nnUNetTrainerHermes -p mine"


# Extension


def test_extension_keeps_numbers_plans_and_preprocessed_cases(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    reused = root / "preprocessed" / BRAIN / "nnUNetPlansOf950_3d_fullres"
    before = times_of(reused)
    command = ["universal", "-d", "102", "--dataset", "951", "--extend", "950", "-np", "1"]
    assert main([*command, "--no-preprocessing"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "to preprocess, and then the same command again:",
        "nnUNetv2_preprocess -d 102 -plans_name nnUNetPlansOf951 -c 3d_fullres -np 1",
    ]
    assert not (root / "preprocessed/Dataset951_Universal/nnUNetPlans_3d_fullres").exists()
    assert main(command) == 0
    base, extended = (
        read(root / "preprocessed" / name / "nnUNetPlans.json") for name in (UNIVERSAL, "Dataset951_Universal")
    )
    known, universe = Universe.from_plans(base), Universe.from_plans(extended)
    assert universe.tasks == (*known.tasks, "102:tumour") and universe.modalities == ("MR", "CT", "T2")
    assert universe.sources[:2] == known.sources and universe.extends == UNIVERSAL
    assert extended["configurations"] == base["configurations"]
    assert times_of(reused) == before
    assert not (root / "preprocessed" / BRAIN / "nnUNetPlansOf951_3d_fullres").exists()
    cases = sorted(file.name for file in (root / "preprocessed/Dataset951_Universal/nnUNetPlans_3d_fullres").iterdir())
    assert len(cases) == 3 * 11 and cases[-1] == "102_case_1_seg.b2nd"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-d", "4", "--extend", "950"), "Dataset004_Brain is a source of Dataset950_Universal already"),
        (("-d", "102", "--extend", "4"), "expected plans at"),
        (("-d", "102", "--extend", "952"), "expected another --dataset than the extended one, got 952 for both."),
        (("-d", "102", "--alone"), "expected --alone together with --extend"),
        (("-d", "102", "--extend", "950", "--spacing", "1", "1", "1"), "--spacing cannot be had with --extend"),
    ],
)
def test_impossible_extensions_are_refused(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refusal(capsys, *arguments, "--dataset", "952")
    assert not (root / "raw/Dataset952_Universal").exists()


# Refusals


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("-d", "4", BRAIN, "--dataset", "960"), "Dataset004_Brain is given twice in -d: name every dataset once."),
        (("-d", "4", "101", "--dataset", "101"), "Dataset101_Abdomen is a source, so the universal dataset needs"),
        (("-d", "4", "77", "--dataset", "960"), "expected the number or name of a dataset, got '77'"),
        (("-d", "4", "101", "--dataset", "102"), "dataset id 102 is taken by Dataset102_Head: choose another"),
        (("-d", "4", "--dataset", "102", "--name", "Head"), "Dataset102_Head was not made by this command"),
        (("-d", "101", "4", "--dataset", "950"), f"{UNIVERSAL} was made with sources ['{BRAIN}', '{ABDOMEN}'], got"),
        (("-d", "4", "950", "--dataset", "960"), f"{UNIVERSAL} is a universal dataset, expected its sources"),
        (("-d", "4", "101", "--dataset", "0"), "expected a --dataset of 1 to 999, got 0."),
        (("-d", "4", "--dataset", "960", "--name", "a__b"), "expected a --name of letters"),
        (("-d", "4", "--dataset", "960", "--modality", "CT"), "expected --modality of the form 101=CT, got 'CT'."),
        (("-d", "4", "--dataset", "960", "--no-mirroring", "5"), "expected --no-mirroring of datasets that are joined"),
        (("-d", "4", "--dataset", "960", "--spacing", "1", "0", "1"), "expected a finite --spacing above 0 mm"),
        ((*LATER, "--spacing", "nan", "1", "1"), "expected a finite --spacing above 0 mm, got nan x 1 x 1."),
        ((*LATER, "--spacing", "inf", "1", "1"), "expected a finite --spacing above 0 mm, got inf x 1 x 1."),
        ((*LATER, "--gpu-memory-gb", "-3"), "expected a finite --gpu-memory-gb above 0, got -3."),
        ((*LATER, "--gpu-memory-gb", "0"), "expected a finite --gpu-memory-gb above 0, got 0."),
        ((*LATER, "--gpu-memory-gb", "nan"), "expected a finite --gpu-memory-gb above 0, got nan."),
        ((*LATER, "--gpu-memory-gb", "inf"), "expected a finite --gpu-memory-gb above 0, got inf."),
        ((*LATER, "--patch-size", "8", "0", "8"), "expected a --patch-size of 1 or more, got 8 x 0 x 8."),
        ((*LATER, "--batch-size", "0"), "expected a --batch-size of 1 or more, got 0."),
        ((*LATER, "--features", "8", "-1"), "expected a --features of 1 or more, got 8 x -1."),
        ((*LATER, "-np", "0"), "expected a -np of 1 or more, got 0."),
        (("-d", "4", "101", "--dataset", "960", "--same", "4:x=101:liver"), "got 4:x; known are organ, lesion."),
    ],
)
def test_impossible_requests_are_refused_and_leave_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str
) -> None:
    assert sentence in refusal(capsys, *arguments)
    assert not list(root.glob("*/Dataset960_*"))


def test_a_run_that_was_refused_late_leaves_nothing_and_the_number_free(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def files() -> dict[Path, bytes]:
        return {file: file.read_bytes() for file in root.rglob("*") if file.is_file()}

    before = files()
    for option, numbers, sentence in (
        ("--patch-size", ("16", "16", "15"), "got 16 x 16 x 15."),
        ("--features", ("8",), "stages, got 1: 8."),
    ):
        for number in ("955", "950"):
            sources = ("-d", "4", "101", "--dataset", number)
            assert sentence in refusal(capsys, *sources, *QUICK, option, *numbers)
            assert files() == before and not list(root.glob("*/Dataset955_*"))
    again = ("universal", "-d", "101", "4", "--dataset", "955", "--name", "Other", *QUICK, "--no-preprocessing")
    assert main(again) == 0
    for folder in root.glob("*/Dataset955_Other"):
        shutil.rmtree(folder)


def test_wrong_folds_of_a_source_are_refused_before_anything_is_written(
    root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write_raw(root / "raw", "Dataset106_Folds", num_cases=2)
    (folder / "splits_final.json").write_text('[{"train": ["case_0"], "val": ["case_9"]}]')
    said = refusal(capsys, "-d", "4", "106", "--dataset", "960", *QUICK)
    shutil.rmtree(folder)
    assert "splits_final.json names case_9, which Dataset106_Folds does not have" in said
    assert not list(root.glob("*/Dataset960_*")) and not (root / "preprocessed/Dataset106_Folds").exists()


def test_unfit_case_leaves_nothing(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(universal_sources, "run", engine.run)
    folder = write_raw(root / "raw", "Dataset103_Damaged", num_cases=2)
    image = folder / "imagesTr/case_1_0000.nii.gz"
    image.write_bytes(image.read_bytes()[:2000])
    said = refusal(capsys, "-d", "4", "103", "--dataset", "960", "-np", "1")
    shutil.rmtree(folder)
    assert f"universal: {image} could not be read" in said
    assert not list(root.glob("*/Dataset960_*")) and not (root / "preprocessed/Dataset103_Damaged").exists()


def test_other_spacing_makes_the_cases_anew(root: Path) -> None:
    folder = root / "preprocessed" / ABDOMEN / "nnUNetPlansOf950_3d_fullres"
    other = ["2" if argument == "1" and i < 10 else argument for i, argument in enumerate(COMMAND)]
    assert main([*other, "--no-preprocessing"]) == 0
    assert not folder.exists()
    assert main(other) == 0
    case = infer_dataset_class(str(folder))(str(folder)).load_case("case_0")
    assert case[0].shape == (1, 12, 13, 14)
