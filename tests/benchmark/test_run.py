"""Running a grid: order, skipping, resuming, failures, GPUs; nnU-Net's commands by a stand-in."""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
from benchmark_grid import CPU, PCT, Commands, made_grid
from conftest import Workspace
from filelock import FileLock

from nnunetv2_misfm.benchmark.progress import Progress, num_epochs
from nnunetv2_misfm.benchmark.run import Options, Outcome, check_options, describe, remaining, run_grid
from nnunetv2_misfm.benchmark.scores import scores_of
from nnunetv2_misfm.benchmark.state import State, mismatch, recorded_steps, state_of
from nnunetv2_misfm.errors import MisfmError


def states(outcomes: list[Outcome]) -> list[str]:
    return [outcome.state for outcome in outcomes]


def test_cells_run_one_after_another_and_once(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, train_cases=[2, "all"])
    assert states(run_grid(grid, grid.cells, CPU)) == ["finished"] * 4
    ran = stand_in()
    assert [line.split()[0] for line in ran] == ["nnUNetv2_train", "nnUNetv2_predict"] * 4
    assert [line.split()[2:4] for line in ran[::2]] == [
        ["quick_benchmark_n2_s0", "2"],
        ["quick_benchmark_n2_s0", "2"],
        ["quick_benchmark_nall_s0", "0"],
        ["quick_benchmark_nall_s0", "0"],
    ]
    assert states(run_grid(grid, grid.cells, CPU)) == ["finished"] * 4
    assert stand_in() == ran


def test_a_failed_cell_is_listed_and_the_others_go_on(
    workspace: Workspace, stand_in: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = made_grid(workspace)
    monkeypatch.setenv("FAIL", "nnUNetTrainerBaseline")
    outcomes = run_grid(grid, grid.cells, CPU)
    assert states(outcomes) == ["failed", "finished"]
    said = describe(outcomes)
    assert "failed: nnUNetTrainer with all cases, fold 0, seed 0: `nnUNetv2_train" in said
    assert "ended with status 1: " in said and "CUDA out of memory" in said
    assert said.endswith("1 finished, 1 failed")
    monkeypatch.delenv("FAIL")
    assert states(run_grid(grid, grid.cells, CPU)) == ["finished", "finished"]


def test_a_cut_training_goes_on(workspace: Workspace, stand_in: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    monkeypatch.setenv("CUT", PCT)
    assert states(run_grid(grid, grid.cells, CPU)) == ["failed"]
    assert state_of(grid, grid.cells[0]) is State.CUT
    assert states(run_grid(grid, grid.cells, CPU)) == ["finished"]
    assert ["--c" in line.split() for line in stand_in()] == [False, True, False]
    titles = [step["title"] for step in recorded_steps(grid, grid.cells[0])]
    assert titles == ["train", "go on training", "predict"]


def test_missing_parts_are_made_up_for(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    run_grid(grid, grid.cells, Options(device="cpu", skip_validation=True))
    (cell,) = grid.cells
    assert remaining(grid, cell, Options(device="cpu", skip_validation=True)) == []
    (next((grid.folder / cell.name / "test").glob("*.nii.gz"))).unlink()
    assert [c.title for c in remaining(grid, cell, CPU)] == ["validate", "predict"]
    run_grid(grid, grid.cells, CPU)
    assert [line.split()[0] for line in stand_in()[2:]] == ["nnUNetv2_train", "nnUNetv2_predict"]
    assert " --val " in stand_in()[2]


def test_without_a_test_folder_the_validation_cases_are_scored(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, test=False, trainers=[PCT])
    assert states(run_grid(grid, grid.cells, CPU)) == ["finished"]
    scores = scores_of(grid, grid.cells[0], "validation")
    assert sorted({*scores["case"]}) == sorted(grid.splits["nall__fold0__seed0"]["val"])
    assert (scores["dice"] == 1).all()
    with pytest.raises(MisfmError, match="expected --test DIR with --skip-validation, got none"):
        run_grid(grid, grid.cells, Options(device="cpu", skip_validation=True))


def test_every_gpu_has_one_run_at_a_time(
    workspace: Workspace, stand_in: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("nnunetv2_misfm.benchmark.run.describe_machine", lambda device: "two GPUs")
    grid = made_grid(workspace, train_cases=[2, 3])
    assert states(run_grid(grid, grid.cells, Options(jobs=2))) == ["finished"] * 4
    assert {line.split()[-1] for line in stand_in()} == {"2", "5"}
    with pytest.raises(MisfmError, match="expected at most 2 GPUs, as many as PyTorch finds, got --gpus 3"):
        run_grid(grid, grid.cells, Options(jobs=3))


def test_a_machine_without_gpus_is_told_so(
    workspace: Workspace, stand_in: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = made_grid(workspace)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(MisfmError, match="expected a GPU for --device cuda, PyTorch finds none: use --device cpu"):
        check_options(grid, Options())
    check_options(grid, CPU)


def test_a_cell_that_raises_anything_fails_alone(
    workspace: Workspace, stand_in: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    grid = made_grid(workspace)

    def broken(*arguments: object) -> None:
        if arguments[1] == grid.cells[0]:
            raise KeyError("dice")

    monkeypatch.setattr("nnunetv2_misfm.benchmark.run.scores_of", broken)
    outcomes = run_grid(grid, grid.cells, CPU)
    assert [(o.state, o.why) for o in outcomes] == [("failed", "KeyError: 'dice'"), ("finished", "")]


@pytest.mark.parametrize("content", ["", "[{", "{}", "[1]"])
def test_a_damaged_record_fails_its_cell_alone_before_it_runs(
    workspace: Workspace, stand_in: Commands, content: str
) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    folder = grid.folder / grid.cells[0].name
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(content)
    (outcome,) = run_grid(grid, grid.cells, CPU)
    assert outcome.state == "failed" and f"{folder / 'run.json'}, got a damaged file: delete it" in outcome.why
    assert stand_in() == []


def test_a_full_disk_fails_the_cell_with_a_sentence(workspace: Workspace, stand_in: Commands) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    grid = made_grid(workspace)
    folder = grid.folder / grid.cells[0].name
    folder.mkdir(parents=True)
    (folder / "log.txt").symlink_to("/dev/full")
    outcomes = run_grid(grid, grid.cells, CPU)
    assert states(outcomes) == ["failed", "finished"]
    assert outcomes[0].why == "OSError: [Errno 28] No space left on device"


def test_weights_of_the_users_environment_are_recorded(
    workspace: Workspace, stand_in: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("nnUNet_misfm_weights", "/some where/w.pth")
    grid = made_grid(workspace, trainers=[PCT])
    run_grid(grid, grid.cells, CPU)
    train, predict = (step["command"] for step in recorded_steps(grid, grid.cells[0]))
    assert train.startswith("nnUNet_misfm_weights='/some where/w.pth' nnUNetv2_train ")
    assert predict.startswith("nnUNetv2_predict ")


def test_the_fold_all_validates_on_what_it_learned_from(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, trainers=[PCT], folds=["all"])
    assert states(run_grid(grid, grid.cells, CPU)) == ["finished"]
    assert len(list((grid.results(grid.cells[0]) / "validation").glob("*.nii.gz"))) == 8


def test_a_cell_of_another_process_is_left_to_it(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace)
    folder = grid.folder / grid.cells[0].name
    folder.mkdir(parents=True)
    with FileLock(folder / ".lock"):
        assert states(run_grid(grid, grid.cells, CPU)) == ["elsewhere", "finished"]


def test_results_of_other_plans_are_named(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    run_grid(grid, grid.cells, CPU)
    (cell,) = grid.cells
    assert mismatch(grid, cell) is None
    file = workspace.base / "nnUNetPlans.json"
    plans = json.loads(file.read_text())
    plans["configurations"]["3d_fullres"]["spacing"] = [2.0, 1.0, 1.0]
    file.write_text(json.dumps(plans))
    assert "comes from other plans: spacing of quick_benchmark_nall_s0 differ" in str(mismatch(grid, cell))
    outcomes = run_grid(grid, grid.cells, CPU)
    assert states(outcomes) == ["failed"]
    assert "comes from other plans" in outcomes[0].why


def test_results_of_other_classes_are_named(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    run_grid(grid, grid.cells, CPU)
    file = workspace.base / "dataset.json"
    content = json.loads(file.read_text())
    content["labels"]["fourth"] = 3
    file.write_text(json.dumps(content))
    assert "was trained on the classes background, organ, lesion" in str(mismatch(grid, grid.cells[0]))


def test_scores_are_computed_anew_when_predictions_change(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    run_grid(grid, grid.cells, CPU)
    (cell,) = grid.cells
    first = scores_of(grid, cell, "test")
    kept = (grid.folder / cell.name / "scores_test.csv").stat().st_mtime_ns
    assert scores_of(grid, cell, "test").equals(first)
    assert (grid.folder / cell.name / "scores_test.csv").stat().st_mtime_ns == kept
    a, b = sorted((grid.folder / cell.name / "test").glob("*.nii.gz"))
    a.write_bytes(b.read_bytes())
    os.utime(a, (time.time() + 5, time.time() + 5))
    assert scores_of(grid, cell, "test")["dice"].min() < 1


def test_predictions_of_a_former_training_are_made_anew(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    run_grid(grid, grid.cells, CPU)
    (cell,) = grid.cells
    final = grid.results(cell) / "checkpoint_final.pth"
    os.utime(final, (time.time() + 60, time.time() + 60))
    assert [c.title for c in remaining(grid, cell, CPU)] == ["validate", "predict"]
    stale = next((grid.folder / cell.name / "test").glob("*.nii.gz"))
    os.utime(final, (time.time() - 60, time.time() - 60))
    stale.write_bytes(b"of a former training")
    os.utime(stale, (time.time() - 120, time.time() - 120))
    assert states(run_grid(grid, grid.cells, CPU)) == ["finished"]
    assert stale.read_bytes() != b"of a former training"


def test_the_bar_follows_nnunets_epochs(capsys: pytest.CaptureFixture) -> None:
    progress = Progress(30)
    run = progress.run(10)
    for line in ("2026-01-01: Epoch 0\n", "Epoch time: 3.2 s\n", "2026-01-01: Epoch 4\n", "2026-01-01: Epoch 4\n"):
        run.read(line)
    assert progress._bar.n == 4
    run.finish()
    assert progress._bar.n == 10
    progress.close()


def test_lengths_of_runs_are_known() -> None:
    assert num_epochs("nnUNetTrainer", ()) == 1000
    assert num_epochs("nnUNetTrainer_250epochs", ()) == 250
    assert num_epochs("nnUNetTrainerPCTNet", ("batch_size=2", "num_epochs=40")) == 40
    assert num_epochs("nnUNetTrainerPCTNet", ("num_epochs=50", "num_epochs=20")) == 20  # what `configure` writes


def test_logs_hold_commands_and_output(workspace: Workspace, stand_in: Commands) -> None:
    grid = made_grid(workspace, trainers=[PCT])
    run_grid(grid, grid.cells, CPU)
    log = Path(grid.folder / grid.cells[0].name / "log.txt").read_text()
    assert "$ nnUNetv2_train Dataset555_Toy quick_benchmark_nall_s0 0 -tr nnUNetTrainerPCTNet" in log
    assert "Epoch 0" in log
    first = recorded_steps(grid, grid.cells[0])[0]
    assert (first["status"], first["cases"]) == (0, 0)
    assert recorded_steps(grid, grid.cells[0])[1]["cases"] == 2


def test_images_without_truth_count_in_the_time_of_prediction(workspace: Workspace, stand_in: Commands) -> None:
    images = workspace.root / "test" / "imagesTs"
    shutil.copy(images / "other_20_0000.nii.gz", images / "unlabelled_0000.nii.gz")
    grid = made_grid(workspace, trainers=[PCT])
    assert states(run_grid(grid, grid.cells, CPU)) == ["finished"]
    assert recorded_steps(grid, grid.cells[0])[1]["cases"] == 3
