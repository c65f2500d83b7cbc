"""What stopped commands left half-written is made anew; nothing of it is scored or counts as trained."""

import json
from pathlib import Path

import pytest
from benchmark_grid import CPU, PCT, Commands, made_grid
from conftest import Workspace

from nnunetv2_misfm.benchmark.run import run_grid
from nnunetv2_misfm.benchmark.scores import scores_of
from nnunetv2_misfm.benchmark.state import State, state_of


def halve(file: Path) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def test_a_prediction_that_was_cut_is_made_anew(
    workspace: Workspace, stand_in: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    monkeypatch.setenv("CUT_PREDICTION", "1")
    assert [o.state for o in run_grid(grid, grid.cells, CPU)] == ["failed"]
    folder = grid.folder / grid.cells[0].name / "test"
    assert [file.name for file in folder.glob("*.nii.gz")] == ["other_20.nii.gz"]  # the whole one stays
    monkeypatch.delenv("CUT_PREDICTION")
    assert [o.state for o in run_grid(grid, grid.cells, CPU)] == ["finished"]
    assert (scores_of(grid, grid.cells[0], "test")["dice"] == 1).all()


@pytest.mark.parametrize("test", [True, False])
def test_a_prediction_that_was_truncated_since_is_made_anew(
    workspace: Workspace, stand_in: Commands, test: bool
) -> None:
    grid = made_grid(workspace, test=test, trainers=[PCT])
    run_grid(grid, grid.cells, CPU)
    (cell,) = grid.cells
    folder = grid.folder / cell.name / "test" if test else grid.results(cell) / "validation"
    halve(next(folder.glob("*.nii.gz")))
    assert [o.state for o in run_grid(grid, grid.cells, CPU)] == ["finished"]
    assert (scores_of(grid, cell, "test" if test else "validation")["dice"] == 1).all()
    assert ("nnUNetv2_predict" if test else "--val") in stand_in()[-1]


def test_a_truncated_final_checkpoint_is_trained_anew(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    run_grid(grid, grid.cells, CPU)
    (cell,) = grid.cells
    final = grid.results(cell) / "checkpoint_final.pth"
    halve(final)
    assert state_of(grid, cell) is State.NEW
    assert [o.state for o in run_grid(grid, grid.cells, CPU)] == ["finished"]
    assert state_of(grid, cell) is State.TRAINED
    assert [line.split()[0] for line in stand_in()] == ["nnUNetv2_train", "nnUNetv2_predict"] * 2
    assert "--c" not in stand_in()[2].split()


def test_a_training_goes_on_from_the_checkpoint_before_a_truncated_one(
    workspace: Workspace, stand_in: Commands
) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    run_grid(grid, grid.cells, CPU)
    (cell,) = grid.cells
    final, latest, best = (grid.results(cell) / f"checkpoint_{name}.pth" for name in ("final", "latest", "best"))
    best.write_bytes(final.read_bytes())
    for file in (final, latest):
        file.write_bytes(best.read_bytes()[:-30])
    assert state_of(grid, cell) is State.CUT
    assert [o.state for o in run_grid(grid, grid.cells, CPU)] == ["finished"]
    assert "--c" in stand_in()[2].split()
    asides = sorted(file.name for file in grid.results(cell).glob("*.unreadable"))
    assert asides == ["checkpoint_final.pth.unreadable", "checkpoint_latest.pth.unreadable"]


def test_results_of_another_training_are_left_as_they_are(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    run_grid(grid, grid.cells, CPU)
    final = grid.results(grid.cells[0]) / "checkpoint_final.pth"
    halve(final)
    kept = grid.results(grid.cells[0]).parent / "dataset.json"
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "labels": {"background": 0}}))
    assert [o.state for o in run_grid(grid, grid.cells, CPU)] == ["failed"]
    assert final.is_file()
