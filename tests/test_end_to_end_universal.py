"""The commands of docs/universal.md on tiny data: join, train, predict in each convention, extend, look at the priors.

Dataset 41 is MR with two classes, 42 CT in which left and right differ, 43 MR with regions. All commands run once in
the fixture `done`; the tests look at what they left behind.
"""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from commands import World, parallel
from universal_datasets import write_raw

from nnunetv2_misfm.weights.checkpoint import read_checkpoint, tensors_sha256

pytestmark = pytest.mark.slow

BRAIN, TRUNK, TUMOUR, LATE = "Dataset041_Brain", "Dataset042_Trunk", "Dataset043_Tumour", "Dataset044_Late"
SOURCES = {BRAIN: "41", TRUNK: "42", TUMOUR: "43"}
HERMES = "nnUNetTrainerHermes"
TINY = ("--patch-size", "16", "16", "16", "--batch-size", "2", "-pl", "ExperimentPlanner", "-np", "1")
QUICK = (
    "num_epochs=2", "num_iterations_per_epoch=3", "num_val_iterations_per_epoch=1", "seed=3",
    "hermes.evaluate_every_epochs=2", "hermes.evaluation_cases=1",
)  # fmt: skip


def universal(world: World, step: str, *arguments: str) -> None:
    """Runs the joining command; nnU-Net's planning needs a data worker."""
    world.run(step, "nnUNetv2_misfm", "universal", *arguments, nnUNet_n_proc_DA="1")


def predict(world: World, number: str, folder: Path) -> None:
    """Predicts the first case of a source by nnU-Net's command."""
    images = world.root / f"in {number}"
    images.mkdir()
    (case,) = sorted((folder / "imagesTr").glob("case_0_0000*"))
    (images / case.name).symlink_to(case)
    world.run(
        f"predict {number}", "nnUNetv2_predict", "-d", number, "-c", "quick", "-tr", HERMES, "-p", "nnUNetPlansOf950",
        "-f", "0", "-i", images, "-o", world.root / f"out {number}", "-device", "cpu", "-npp", "0", "-nps", "0",
    )  # fmt: skip


def use(world: World, configure: tuple[str, ...]) -> None:
    """What else is done with a trained universal model, and what must be refused."""
    plans = ("-p", "nnUNetPlansOf950")
    world.train("train a source", HERMES, *plans, target=("41", "3d_fullres", "0"))
    world.run("configure a source", *configure, "-d", "41", *plans, *QUICK[:4])
    world.train("validate a source", HERMES, *plans, "--val", target=("41", "quick", "0"))
    chosen = ("-c", "quick", "-tr", HERMES, "-f", "0")
    archive = ("-o", world.root / "model.zip")
    world.run("export", "nnUNetv2_export_model_to_zip", "-d", "42", *chosen, *plans, *archive)
    file = folder_of(world, "Dataset950_Universal", "nnUNetPlans") / "checkpoint_final.pth"
    world.run("priors", "nnUNetv2_misfm", "priors", file, "-o", world.root / "priors.png")
    on_cpu = ("-device", "cpu", "-npp", "0", "-nps", "0")
    images = ("-i", world.root / "raw" / BRAIN / "imagesTr", "-o", world.root / "out 950")
    world.run("predict the whole", "nnUNetv2_predict", "-d", "950", *chosen, *images, *on_cpu)
    flag = ("-pretrained_weights", file)
    target = ("41", "quick", "0")
    world.train("stock", "nnUNetTrainerBaseline", *plans, *flag, target=target, nnUNet_misfm_skip_validation="1")


def extend(world: World, configure: tuple[str, ...]) -> None:
    """Adds a dataset to the trained model."""
    universal(world, "extend", "-d", "44", "--extend", "950", "--dataset", "951", "--name", "Plus", "-np", "1")
    world.run("configure the larger", *configure, "-d", "951", *QUICK)
    world.train("train the larger", HERMES, target=("951", "quick", "0"), nnUNet_misfm_skip_validation="1")


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> World:
    world = World(tmp_path_factory.mktemp("universal"))
    for name in ("raw", "preprocessed", "results"):
        (world.root / name).mkdir()
    raw = world.root / "raw"
    write_raw(raw, BRAIN)
    sides = {"background": 0, "left kidney": 1, "right kidney": 2, "organ": 3}
    write_raw(raw, TRUNK, channels=("CT",), labels=sides, num_cases=5, spacing=(2.0, 1.0, 1.0), file_ending=".mha")
    regions = {"background": 0, "whole": [1, 2], "core": 2}
    write_raw(raw, TUMOUR, channels=("T1",), labels=regions, num_cases=3, regions_class_order=[1, 2])
    write_raw(raw, LATE, channels=("T1",), labels={"background": 0, "thing": 1}, num_cases=5)
    joined = ("-d", "41", "42", "43", "--dataset", "950", "--same", "41:organ=42:organ", *TINY)
    universal(world, "join", *joined)
    configure = ("nnUNetv2_misfm", "configure", "-c", "3d_fullres", "--name", "quick")
    world.run("configure", *configure, "-d", "950", *QUICK)
    world.train("train", HERMES, target=("950", "quick", "0"))
    assert world.finished["train"].returncode == 0, world.finished["train"].stdout + world.finished["train"].stderr
    validations = world.root / "results" / BRAIN / f"{HERMES}__nnUNetPlansOf950__quick" / "fold_0" / "validation"
    validations.rename(validations.with_name("validation of the whole"))
    parallel(
        *(functools.partial(predict, world, number, raw / name) for name, number in SOURCES.items()),
        functools.partial(use, world, configure),
        functools.partial(extend, world, configure),
    )
    return world


def folder_of(world: World, dataset: str, plans: str = "nnUNetPlansOf950") -> Path:
    return world.root / "results" / dataset / f"{HERMES}__{plans}__quick" / "fold_0"


STEPS = (
    "join", "configure", "train", "validate a source", "predict 41", "predict 42", "predict 43", "export", "priors",
    "stock", "extend", "train the larger",
)  # fmt: skip


@pytest.mark.parametrize("step", STEPS)
def test_every_command_succeeds(done: World, step: str) -> None:
    finished = done.finished[step]

    assert finished.returncode == 0, f"{finished.stdout[-3000:]}\n{finished.stderr[-3000:]}"


def test_no_image_is_copied_and_cases_are_links(done: World) -> None:
    described = json.loads((done.root / "raw" / "Dataset950_Universal" / "dataset.json").read_text())
    cases = list((done.root / "preprocessed" / "Dataset950_Universal" / "nnUNetPlans_3d_fullres").iterdir())

    assert set(described["dataset"]) == {
        *(f"041_case_{i}" for i in range(6)), *(f"042_case_{i}" for i in range(5)), *(f"043_case_{i}" for i in range(3))
    }  # fmt: skip
    assert sorted(p.name for p in (done.root / "raw" / "Dataset950_Universal").iterdir()) == ["dataset.json"]
    assert len(cases) == 3 * 14
    assert all(case.is_symlink() and case.exists() for case in cases)


@pytest.mark.parametrize(("dataset", "values"), [(BRAIN, {0, 1, 2}), (TRUNK, {0, 1, 2, 3}), (TUMOUR, {0, 1, 2})])
def test_predictions_are_in_the_convention_of_their_dataset(done: World, dataset: str, values: set[int]) -> None:
    ending = ".mha" if dataset == TRUNK else ".nii.gz"
    predicted = sitk.ReadImage(str(done.root / f"out {SOURCES[dataset]}" / f"case_0{ending}"))
    image = sitk.ReadImage(str(done.root / "raw" / dataset / "imagesTr" / f"case_0_0000{ending}"))

    assert predicted.GetSize() == image.GetSize()
    assert predicted.GetSpacing() == pytest.approx(image.GetSpacing())
    assert set(np.unique(sitk.GetArrayFromImage(predicted)).tolist()) <= values


def test_every_source_has_the_same_weights_and_its_own_plans(done: World) -> None:
    whole = read_checkpoint(folder_of(done, "Dataset950_Universal", "nnUNetPlans") / "checkpoint_final.pth")
    hashes = {tensors_sha256(whole["network_weights"])}
    for dataset in SOURCES:
        checkpoint = read_checkpoint(folder_of(done, dataset) / "checkpoint_final.pth")
        plans = json.loads((folder_of(done, dataset).parent / "plans.json").read_text())
        hashes |= {tensors_sha256(checkpoint["network_weights"]), checkpoint["misfm_meta"]["weights_sha256"]}
        assert plans["dataset_name"] == dataset

    assert len(hashes) == 1


def test_normalisation_is_each_modality_s_own(done: World) -> None:
    schemes = {
        dataset: json.loads((done.root / "preprocessed" / dataset / "nnUNetPlansOf950.json").read_text())
        ["configurations"]["3d_fullres"]["normalization_schemes"]
        for dataset in SOURCES
    }  # fmt: skip

    assert schemes == {
        BRAIN: ["ZScoreNormalization"], TRUNK: ["CTNormalization"], TUMOUR: ["ZScoreNormalization"]
    }  # fmt: skip


def test_left_and_right_are_not_mirrored_at_prediction(done: World) -> None:
    axes = {
        dataset: read_checkpoint(folder_of(done, dataset) / "checkpoint_final.pth")["inference_allowed_mirroring_axes"]
        for dataset in SOURCES
    }

    assert axes == {BRAIN: (0, 1, 2), TRUNK: (0, 1), TUMOUR: (0, 1, 2)}


def validated(folder: Path) -> list[str]:
    """Names of the cases of a summary."""
    summary = json.loads((folder / "summary.json").read_text())
    return [Path(entry["prediction_file"]).name.split(".")[0] for entry in summary["metric_per_case"]]


def test_the_final_validation_writes_a_summary_for_every_source(done: World) -> None:
    cases = {
        dataset: validated(folder_of(done, dataset) / ("validation of the whole" if dataset == BRAIN else "validation"))
        for dataset in SOURCES
    }
    split = json.loads((done.root / "preprocessed" / "Dataset950_Universal" / "splits_final.json").read_text())[0]

    assert {f"{d[7:10]}_{case}" for d, names in cases.items() for case in names} == set(split["val"])
    assert not set(split["train"]) & set(split["val"])
    assert sorted(validated(folder_of(done, BRAIN) / "validation")) == sorted(cases[BRAIN])


def test_whole_cases_are_evaluated_while_it_trains(done: World) -> None:
    table = folder_of(done, "Dataset950_Universal", "nnUNetPlans") / "evaluation_per_dataset.csv"
    rows = [line.split(",") for line in table.read_text().splitlines()]

    assert rows[0] == ["epoch", "dataset", "task", "dice", "cases"]
    assert {row[1] for row in rows[1:]} == set(SOURCES)
    assert {row[0] for row in rows[1:]} == {"1"}


def test_a_source_s_plans_do_not_train(done: World) -> None:
    finished = done.finished["train a source"]

    assert finished.returncode != 0
    assert "train Dataset950_Universal with nnUNetv2_train 950 3d_fullres 0 -tr nnUNetTrainerHermes" in finished.stderr


def test_the_universal_plans_do_not_predict(done: World) -> None:
    finished = done.finished["predict the whole"]

    assert finished.returncode != 0
    assert "a universal model answers in the convention of one of its source datasets" in finished.stderr


def test_stock_nnunet_takes_the_universal_weights(done: World) -> None:
    model = done.root / "results" / BRAIN / "nnUNetTrainerBaseline__nnUNetPlansOf950__quick" / "fold_0"

    assert (model / "checkpoint_final.pth").is_file()
    assert "Loading pretrained weights from file" in done.finished["stock"].stdout


def test_further_tasks_start_from_the_model_that_they_extend(done: World) -> None:
    run = folder_of(done, "Dataset951_Plus", "nnUNetPlans")
    report = json.loads((run / "pretrained_weights.json").read_text())
    checkpoint = read_checkpoint(run / "checkpoint_final.pth")
    pools = [name for name in checkpoint["network_weights"] if name.endswith("task_tokens")]

    assert report["route"] == "the finished run on Dataset950_Universal, which this one extends"
    assert set(pools) <= set(report["adapted"])
    assert all("44:thing" in report["adapted"][name] for name in pools)
    assert {checkpoint["network_weights"][name].shape[0] for name in pools} == {7}
    assert report["share"] == 1.0
    assert torch.isfinite(checkpoint["network_weights"][pools[0]]).all()


def test_the_picture_of_the_priors_is_drawn(done: World) -> None:
    assert (done.root / "priors.png").read_bytes()[:4] == b"\x89PNG"
