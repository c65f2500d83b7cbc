"""What is gathered for the report: states of runs, curves, notes; nothing of an unfinished run is averaged."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from benchmark_grid import CPU, PCT, STOCK, Commands, made_grid
from conftest import Workspace

from nnunetv2_misfm.benchmark.gather import gather
from nnunetv2_misfm.benchmark.grid import Grid
from nnunetv2_misfm.benchmark.report import write_report
from nnunetv2_misfm.benchmark.run import run_grid
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.weights.checkpoint import file_sha256


@pytest.fixture
def finished(workspace: Workspace, stand_in: Commands) -> Callable[..., Grid]:
    """Runs a grid."""

    def run(**changes: object) -> Grid:
        grid = made_grid(workspace, **changes)
        run_grid(grid, grid.cells, CPU)
        return grid

    return run


def test_a_finished_grid_has_scores_curves_and_runs(finished: Callable[..., Grid]) -> None:
    grid = finished(train_cases=[2, "all"])
    results = gather("555")
    assert (results.runs["state"] == "finished").all() and len(results.runs) == 4
    assert results.labels == ["organ", "lesion"] and results.absent == []
    assert len(results.cases) == 4 * 2 * 2 and (results.cases["dice"] == 1).all()
    assert sorted(results.truths) == ["other_20", "other_21"]
    assert results.runs["num_train"].tolist() == [2, 2, 6, 6]
    assert results.runs["seconds_per_epoch"].tolist() == [7.0] * 4  # of 4, 7 and 9
    one = results.curves[(results.curves["trainer"] == PCT) & (results.curves["train_cases"] == "2")]
    assert one["pseudo_dice"].tolist() == pytest.approx([0, 0.4, 0.6])
    assert results.predictions[grid.cells[0].name] == grid.folder / grid.cells[0].name / "test"


def test_runs_that_failed_or_never_ran_stay_visible(
    workspace: Workspace, finished: Callable[..., Grid], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAIL", PCT)
    finished()
    made_grid(workspace, train_cases=[3])  # joins the benchmark, is not run
    runs = gather("555").runs
    states = {(r["trainer"], r["train_cases"]): (r["state"], r["why"].split(";")[0]) for r in runs.to_dict("records")}
    assert states == {
        (STOCK, "3"): ("missing", "not run yet"),
        (PCT, "3"): ("missing", "not run yet"),
        (STOCK, "all"): ("finished", ""),
        (PCT, "all"): ("failed", "train ended with status 1"),
    }


def test_a_prediction_of_other_geometry_leaves_its_run_out_by_name(finished: Callable[..., Grid]) -> None:
    grid = finished()
    file = grid.folder / grid.cells[1].name / "test" / "other_20.nii.gz"
    image = sitk.ReadImage(str(file))
    image.SetSpacing((2.0, 1.0, 1.0))
    sitk.WriteImage(image, str(file))
    results = gather("555")
    row = results.runs.set_index("trainer").loc[PCT]
    assert row["state"] == "unfinished" and "other_20" in row["why"]
    assert {*results.cases["trainer"]} == {STOCK}


def test_a_lost_prediction_leaves_its_run_out(finished: Callable[..., Grid]) -> None:
    grid = finished()
    (grid.folder / grid.cells[0].name / "test" / "other_20.nii.gz").unlink()
    row = gather("555").runs.set_index("trainer").loc[STOCK]
    assert (row["state"], row["why"]) == ("unfinished", "1 test cases are not predicted yet by its final weights")


def test_stale_validation_predictions_are_not_scored(finished: Callable[..., Grid]) -> None:
    grid = finished(test=False)
    final = grid.results(grid.cells[0]) / "checkpoint_final.pth"
    os.utime(final, (final.stat().st_mtime + 60,) * 2)
    row = gather("555").runs.set_index("trainer").loc[STOCK]
    assert (
        row["state"] == "unfinished" and row["why"] == "its validation cases are not predicted yet by its final weights"
    )


@pytest.mark.parametrize("name", ["scores_test.csv", "run.json", "pretrained_weights.json"])
def test_damaged_records_of_a_run_do_not_stop_the_report(finished: Callable[..., Grid], name: str) -> None:
    grid = finished()
    folder = grid.results(grid.cells[0]) if name == "pretrained_weights.json" else grid.folder / grid.cells[0].name
    (folder / name).write_text("")
    states = gather("555").runs.set_index("trainer")["state"]
    assert states[PCT] == "finished"
    assert states[STOCK] == ("finished" if name == "scores_test.csv" else "unfinished")  # scores are computed anew


def test_a_removed_test_folder_is_named(workspace: Workspace, finished: Callable[..., Grid]) -> None:
    finished()
    (workspace.root / "test").rename(workspace.root / "elsewhere")
    with pytest.raises(MisfmError, match=r"expected labels \*.nii.gz in .*test/labelsTs, found none: put them back"):
        gather("555")


def test_a_training_on_other_cases_is_mismatched(workspace: Workspace, finished: Callable[..., Grid]) -> None:
    grid = finished(train_cases=[2])
    for cell in grid.cells:
        start = grid.results(cell) / "misfm_benchmark.json"
        start.write_text(json.dumps({**json.loads(start.read_text()), "splits_sha256": "0"}))
    with pytest.raises(MisfmError, match="comes from a training with other cases: delete it or use another --name"):
        gather("555")


def test_validation_cases_of_the_fold_all_are_not_compared(workspace: Workspace, finished: Callable[..., Grid]) -> None:
    finished(folds=["all"])
    with pytest.raises(MisfmError, match=r"has runs of the fold 'all', which learn from every case: .* \(--on test\)"):
        gather("555", compared="validation")


def test_a_checkpoint_without_curves_is_named(finished: Callable[..., Grid]) -> None:
    grid = finished()
    final = grid.results(grid.cells[0]) / "checkpoint_final.pth"
    stamp = final.stat().st_mtime
    torch.save({"network_weights": {}}, final)
    os.utime(final, (stamp, stamp))
    row = gather("555").runs.set_index("trainer").loc[STOCK]
    assert row["state"] == "unfinished" and "expected nnU-Net's logged curves, found none" in row["why"]


def test_runs_of_other_plans_are_mismatched(workspace: Workspace, finished: Callable[..., Grid]) -> None:
    finished(train_cases=[2, "all"])
    file = workspace.base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["quick_benchmark_n2_s0"]["batch_size"] = 4
    file.write_text(json.dumps(plans))
    runs = gather("555").runs.set_index("train_cases")
    assert {*runs.loc["2", "state"]} == {"mismatched"} and {*runs.loc["all", "state"]} == {"finished"}
    assert runs.loc["2", "why"].str.contains("comes from other plans: batch_size of quick_benchmark_n2_s0").all()


def test_nothing_finished_is_an_error(workspace: Workspace, stand_in: Commands) -> None:
    made_grid(workspace)
    with pytest.raises(
        MisfmError, match="benchmark 'benchmark' of Dataset555_Toy has no finished run yet: not run yet"
    ):
        gather("555")


def test_classes_without_truth_are_named_and_not_scored(workspace: Workspace, finished: Callable[..., Grid]) -> None:
    for file in (workspace.root / "test" / "labelsTs").glob("*"):
        image = sitk.ReadImage(str(file))
        only_organ = sitk.GetArrayFromImage(image) == 1
        sitk.WriteImage(sitk.GetImageFromArray(only_organ.astype(np.uint8)), str(file))
    finished()
    results = gather("555")
    assert (results.labels, results.absent) == (["organ"], ["lesion"])
    assert {*results.cases["label"]} == {"organ"}


def test_empty_predictions_are_counted_in_a_note(finished: Callable[..., Grid]) -> None:
    grid = finished()
    file = grid.folder / grid.cells[1].name / "test" / "other_21.nii.gz"
    image = sitk.ReadImage(str(file))
    no_lesion = sitk.GetArrayFromImage(image)
    no_lesion[no_lesion == 2] = 0
    sitk.WriteImage(sitk.GetImageFromArray(no_lesion), str(file))
    notes = [note for note in gather("555").notes if "predicted no" in note]
    assert len(notes) == 1
    assert notes[0].startswith("nnUNetTrainerPCTNet predicted no lesion at all in 1 of 2 predictions over all its runs")


@pytest.mark.parametrize("test", [True, False])
def test_what_pretraining_saw_is_said(workspace: Workspace, finished: Callable[..., Grid], test: bool) -> None:
    weights = workspace.root / "weights.pth"
    data = {"dataset": "Dataset555_Toy", "num_training_cases": 8, "sha256": "0"}
    recipe = {"num_epochs": 4, "num_iterations_per_epoch": 250}
    meta = {"method": "volume_fusion", "recipe": recipe, "batch_size": 2, "data": data}
    torch.save({"misfm_meta": meta, "network_weights": {}}, weights)
    grid = finished(test=test)
    account = {"file": str(weights), "sha256": file_sha256(weights), "share": 0.9}
    (grid.results(grid.cells[1]) / "pretrained_weights.json").write_text(json.dumps(account))
    results = gather("555")
    (note,) = [note for note in results.notes if note.startswith("Pretrained")]
    assert "volume_fusion, 1,000 steps of batch 2 on 8 cases of Dataset555_Toy" in note
    assert ("may have been in the pretraining" in note) is not test
    assert results.runs["weights_sha256"].tolist() == ["", account["sha256"]]
    weights.write_bytes(b"other")
    assert "holds other weights now" in [n for n in gather("555").notes if n.startswith("Pretrained")][0]


def test_what_is_gathered_makes_a_report(finished: Callable[..., Grid], tmp_path: Path) -> None:
    finished(test=False)
    page = write_report(gather("555"), tmp_path / "report").with_suffix(".md").read_text()
    assert "2 validation cases of the folds" in page
