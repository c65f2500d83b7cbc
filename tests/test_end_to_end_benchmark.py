"""The benchmark's commands on tiny data: nnU-Net's own scripts train and predict a grid, and a report comes out."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest
from commands import ORGANS, PCT_PRETRAIN, PCT_VF, World, plan_and_configure, write_dataset

pytestmark = pytest.mark.slow

STOCK, PCT = "nnUNetTrainer", "nnUNetTrainerPCTNet"
LENGTH = ("--epochs", "2", "--set", "num_iterations_per_epoch=2")
GRID = ("-d", "901", "-c", "quick", "--train-cases", "2", "--seeds", "0", "1", "--device", "cpu", *LENGTH)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> World:
    """The world after all commands."""
    world = World(tmp_path_factory.mktemp("nnunet"))
    dataset = world.root / "raw" / ORGANS
    write_dataset(dataset, labelled=True)
    for folder in ("preprocessed", "results"):
        (world.root / folder).mkdir()
    plan_and_configure(world, "901")
    test = ("--test", dataset, "--disable-tta", "--skip-validation")
    one = {"nnUNet_npp": "0", "nnUNet_nps": "0"}
    grid = ("nnUNetv2_misfm", "benchmark", *GRID, *test)
    world.run("no weights", *grid, "--trainers", STOCK, PCT_VF)
    world.train("pretrain", PCT_PRETRAIN, target=("901", "quick", "all"))
    world.run("dry run", *grid, "--trainers", STOCK, PCT_VF, "--dry-run")
    world.run("benchmark", *grid, "--trainers", STOCK, PCT_VF, "--jobs", "2", **one)
    world.run("again", *grid, "--trainers", STOCK, PCT_VF, **one)
    world.run("report", "nnUNetv2_misfm", "report", "-d", "901", "-o", world.root / "report")
    # on a fold's validation cases, the second trainer's last prediction taken away
    folds = ("--name", "folds", "--device", "cpu", *LENGTH)
    world.run("folds", "nnUNetv2_misfm", "benchmark", "-d", "901", "-c", "quick", *folds, "--trainers", STOCK, PCT)
    model = f"{PCT}__nnUNetPlans__quick_folds_nall_s0"
    next((world.root / "results" / ORGANS / model / "fold_0" / "validation").glob("*.nii.gz")).unlink()
    world.run("gap", "nnUNetv2_misfm", "report", "-d", "901", "-o", world.root / "gap", "--name", "folds")
    world.run("none", "nnUNetv2_misfm", "report", "-d", "901", "-o", world.root / "none", "--name", "absent")
    return world


def record(world: World) -> Path:
    return world.root / "results" / ORGANS / "misfm_benchmark"


@pytest.mark.parametrize("step", ["pretrain", "dry run", "benchmark", "again", "report", "folds", "gap"])
def test_command_succeeds(done: World, step: str) -> None:
    assert done.finished[step].returncode == 0, done.finished[step].stdout[-2000:] + done.finished[step].stderr[-4000:]


def test_a_trainer_without_weights_is_named_before_anything_runs(done: World) -> None:
    assert done.finished["no weights"].returncode == 2
    assert "nnUNetTrainerPCTNetVF expected pretrained weights and would find none" in done.finished["no weights"].stderr


def test_what_ran_is_what_the_dry_run_printed(done: World) -> None:
    printed = [line for line in done.finished["dry run"].stdout.splitlines() if line and not line.startswith("#")]
    steps = [step for file in record(done).glob("*/run.json") for step in json.loads(file.read_text())]
    ran = {step["command"] for step in steps}
    assert ran == {line for line in printed if "nnUNetv2_misfm configure" not in line}
    assert len(ran) == 2 * 2 * 2


def test_every_trainer_learned_from_the_same_cases_for_the_same_steps(done: World) -> None:
    grid = json.loads((record(done) / "grid.json").read_text())
    splits = json.loads((done.root / "preprocessed" / ORGANS / "splits_final.json").read_text())
    for cell in grid["cells"]:
        name = "n2__fold0__seed{}".format(cell["draw"]["seed"])
        assert splits[cell["run_fold"]] == grid["splits"][name]
        assert len(splits[cell["run_fold"]]["train"]) == 2
    curves = pd.read_csv(done.root / "report" / "csv" / "curves.csv")
    assert (curves.groupby(["trainer", "seed"])["epoch"].count() == 2).all()


def test_finished_cells_are_not_run_again(done: World) -> None:
    assert "4 runs, 4 of them trained and predicted already" in done.finished["again"].stdout


def test_the_report_scores_every_test_case_of_every_run(done: World) -> None:
    cases = pd.read_csv(done.root / "report" / "csv" / "cases.csv")
    truths = len(list((done.root / "raw" / ORGANS / "labelsTs").glob("*")))
    assert len(cases) == 2 * 2 * truths * 2  # trainers, seeds, cases, classes
    assert cases[["dice", "surface_dice"]].apply(lambda column: column.between(0, 1)).all().all()


def test_dice_is_that_of_nnunets_own_evaluation(done: World) -> None:
    from nnunetv2.evaluation.evaluate_predictions import compute_metrics
    from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

    cases = pd.read_csv(done.root / "report" / "csv" / "cases.csv")
    predictions = record(done) / f"{PCT_VF}__n2__fold0__seed1" / "test"
    rows = cases[(cases["trainer"] == PCT_VF) & (cases["seed"] == 1)]
    for truth in (done.root / "raw" / ORGANS / "labelsTs").glob("*.nii.gz"):
        own = compute_metrics(str(truth), str(predictions / truth.name), SimpleITKIO(), [1, 2])["metrics"]
        scored = rows[rows["case"] == truth.name.removesuffix(".nii.gz")]["dice"].tolist()
        assert scored == pytest.approx([own[1]["Dice"], own[2]["Dice"]])


def test_the_report_names_weights_costs_and_commands(done: World) -> None:
    page = (done.root / "report" / "report.md").read_text()
    runs = pd.read_csv(done.root / "report" / "csv" / "runs.csv")
    weights = runs[runs["trainer"] == PCT_VF]["weights_sha256"].unique()
    assert len(weights) == 1 and weights[0][:12] in page
    costs = pd.read_csv(done.root / "report" / "csv" / "trainer_costs.csv")
    assert {*costs["trainer"]} == {STOCK, PCT_VF}
    assert (costs[["parameters", "gflops", "peak_memory_gib"]] > 0).all().all()
    assert (runs["prediction_s_per_case"] > 0).all() and (runs["seconds_per_epoch"] > 0).all()
    assert f"-tr {PCT_VF} -p nnUNetPlans -device cpu" in page
    assert "num_epochs=2" in page


def test_a_lost_prediction_stays_visible_and_is_not_averaged_over(done: World) -> None:
    runs = pd.read_csv(done.root / "gap" / "csv" / "runs.csv").set_index("trainer")
    assert runs.loc[STOCK, "state"] == "finished"
    assert runs.loc[PCT, "state"] == "unfinished"
    assert re.search(r"expected .*predict", str(runs.loc[PCT, "why"]))
    assert {*pd.read_csv(done.root / "gap" / "csv" / "cases.csv")["trainer"]} == {STOCK}


def test_a_benchmark_that_does_not_exist_is_named(done: World) -> None:
    assert done.finished["none"].returncode == 2
    assert "benchmarks there: benchmark, folds" in done.finished["none"].stderr
