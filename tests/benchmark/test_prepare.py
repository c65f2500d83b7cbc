"""From a request to a grid: names, folds, commands, and every fault before anything is written."""

import json
import os
from pathlib import Path

import pytest
from conftest import Workspace

from nnunetv2_misfm.benchmark.benchmark import benchmark, dry
from nnunetv2_misfm.benchmark.grid import Draw, Grid, read_grid
from nnunetv2_misfm.benchmark.prepare import Request, cells_of, plan_grid, prepare, weights_by_trainer
from nnunetv2_misfm.benchmark.run import Options
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.planning.configure import configure

STOCK, PCT, VF = "nnUNetTrainer", "nnUNetTrainerPCTNet", "nnUNetTrainerPCTNetVF"


def request(**changes: object) -> Request:
    return Request(**{"dataset": "555", "configuration": "quick", "trainers": [STOCK, PCT], **changes})  # type: ignore


def written(workspace: Workspace) -> dict[str, bytes]:
    files = [f for f in workspace.root.rglob("*") if f.is_file() and not f.name.endswith(".lock")]
    return {str(f): f.read_bytes() for f in files}


def test_every_trainer_gets_every_draw(workspace: Workspace) -> None:
    grid = plan_grid(request(folds=[0, 1], train_cases=[2, "all"], seeds=[0, 1]))
    assert len(grid.cells) == 2 * 2 * 2 * 2
    by_trainer = [{(c.draw, c.configuration, c.run_fold) for c in grid.cells if c.trainer == t} for t in (STOCK, PCT)]
    assert by_trainer[0] == by_trainer[1]


def test_planning_writes_nothing(workspace: Workspace) -> None:
    before = written(workspace)
    grid = plan_grid(request(train_cases=[2], test=workspace.root / "test"))
    dry(grid, list(grid.cells), Options())
    assert written(workspace) == before


def test_dry_run_prints_the_exact_commands(workspace: Workspace) -> None:
    asked = request(
        train_cases=[2], seeds=[3], settings=["num_epochs=5"], test=workspace.root / "test", mirroring=False
    )
    grid = plan_grid(asked)
    test, results = workspace.root / "test", workspace.results
    config = "quick_benchmark_n2_s3"
    out = {t: results / "misfm_benchmark" / f"{t}__n2__fold0__seed3" / "test" for t in (STOCK, PCT)}
    common = f"-p nnUNetPlans -i {test}/imagesTs -o"
    assert dry(grid, cells_of(grid, asked), Options(device="cpu")).splitlines() == [
        "# the folds 2 behind those in splits_final.json",
        "# configurations, one per number of cases and seed",
        f"nnUNetv2_misfm configure -d Dataset555_Toy -c quick -p nnUNetPlans --name {config} num_epochs=5 seed=3",
        "# 2 cases, fold 0, seed 3: nnU-Net's fold 2, 2 training and 2 validation cases",
        f"nnUNetv2_train Dataset555_Toy {config} 2 -tr nnUNetTrainerBaseline -p nnUNetPlans -device cpu",
        f"nnUNetv2_predict -d Dataset555_Toy -c {config} -f 2 -tr nnUNetTrainerBaseline {common} {out[STOCK]} "
        "-device cpu --continue_prediction --disable_tta",
        f"nnUNetv2_train Dataset555_Toy {config} 2 -tr {PCT} -p nnUNetPlans -device cpu",
        f"nnUNetv2_predict -d Dataset555_Toy -c {config} -f 2 -tr {PCT} {common} {out[PCT]} "
        "-device cpu --continue_prediction --disable_tta",
    ]


def test_a_dry_run_needs_no_gpu_and_a_real_one_says_so(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    said, status = benchmark(request(), Options(), dry_run=True)
    assert status == 0 and "-tr nnUNetTrainerPCTNet -p nnUNetPlans -device cuda" in said
    before = written(workspace)
    with pytest.raises(MisfmError, match="expected a GPU for --device cuda, PyTorch finds none: use --device cpu"):
        benchmark(request(), Options())
    assert written(workspace) == before


def test_the_stock_trainer_is_untouched_unless_its_length_is_set(workspace: Workspace) -> None:
    untouched = plan_grid(request(configuration="3d_fullres", settings=["batch_size=2"]))
    assert untouched.cells[0].run_trainer == STOCK
    for changes in ({"configuration": "3d_fullres", "settings": ["num_epochs=2"]}, {"configuration": "quick"}):
        assert plan_grid(request(**changes)).cells[0].run_trainer == "nnUNetTrainerBaseline"  # quick has a length


def begin(grid: Grid) -> None:
    """Prepares a grid and leaves a trace of its first run."""
    prepare(grid)
    (grid.folder / grid.cells[0].name).mkdir()


def test_what_is_written_is_what_was_planned(workspace: Workspace) -> None:
    asked = request(folds=[1], train_cases=[2, 3], seeds=[4], settings=["num_epochs=9"])
    grid = plan_grid(asked)
    prepare(grid)
    assert read_grid("Dataset555_Toy", "benchmark") == grid
    plans = json.loads((workspace.base / "nnUNetPlans.json").read_text())["configurations"]
    for count in (2, 3):
        block = plans[f"quick_benchmark_n{count}_s4"]["misfm"]
        assert (block["num_epochs"], block["seed"], block["num_iterations_per_epoch"]) == (9, 4, 2)
    splits = json.loads((workspace.base / "splits_final.json").read_text())
    for cell in grid.cells:
        assert splits[cell.run_fold] == grid.splits[cell.draw.name]
        assert len(splits[cell.run_fold]["train"]) == cell.draw.train_cases


def test_more_trainers_and_draws_join_a_recorded_benchmark(workspace: Workspace) -> None:
    begin(plan_grid(request(train_cases=[3])))
    more = request(trainers=[PCT, "nnUNetTrainerFMUNet"], train_cases=[2, 3])
    grid = plan_grid(more)
    assert {*grid.trainers} == {STOCK, PCT, "nnUNetTrainerFMUNet"}
    assert {(c.trainer, c.draw.train_cases) for c in cells_of(grid, more)} == {
        (PCT, 2),
        (PCT, 3),
        ("nnUNetTrainerFMUNet", 2),
        ("nnUNetTrainerFMUNet", 3),
    }
    assert (STOCK, Draw(3, 0, 0)) in {(c.trainer, c.draw) for c in grid.cells}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"settings": ["num_epochs=3"]}, "was begun with settings none, got num_epochs=3"),
        ({"tolerance_mm": 2.0}, "was begun with tolerance_mm 1.0, got 2.0"),
        ({"mirroring": False}, "was begun with mirroring True, got False"),
        ({"configuration": "3d_fullres"}, "was begun with configuration quick, got 3d_fullres"),
    ],
)
def test_a_recorded_benchmark_keeps_its_settings(workspace: Workspace, changes: dict, sentence: str) -> None:
    begin(plan_grid(request()))
    with pytest.raises(MisfmError, match=sentence):
        plan_grid(request(**changes))
    plan_grid(request(**changes, name="other"))


def test_changed_splits_are_noticed(workspace: Workspace) -> None:
    begin(plan_grid(request(train_cases=[2])))
    file = workspace.base / "splits_final.json"
    splits = json.loads(file.read_text())
    file.write_text(json.dumps([splits[1], splits[0], *splits[2:]]))
    with pytest.raises(MisfmError, match="begun with other cases for n2__fold0__seed0: splits_final.json changed"):
        plan_grid(request(train_cases=[2]))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trainers": ["nnUNetTrainerPCTNett"]}, "expected the name of a trainer that nnU-Net finds, got"),
        ({"trainers": ["nnUNetTrainerVFPretrain"]}, "expected trainers that learn from labels, got nnUNetTrainerVFP"),
        ({"configuration": "2d"}, "expected one of the configurations 3d_fullres, quick of .*, got '2d'"),
        ({"folds": [9]}, "expected one of the folds 0 to 1 or 'all', got 9"),
        ({"train_cases": [50]}, "at most the 6 training cases of fold 0, got --train-cases 50"),
        ({"folds": ["all"]}, "expected --test DIR with the fold 'all', got none"),
        ({"trainers": [VF]}, "would find none: pretrain first with nnUNetv2_train Dataset555_Toy 3d_fullres all -tr"),
        ({"trainers": [VF], "weights": {VF: Path("absent.pth")}}, "weights for nnUNetTrainerPCTNetVF at .*, found"),
        ({"weights": {VF: Path("absent.pth")}}, "expected --weights for one of nnUNetTrainer, .*, got them for"),
        ({"name": "a__b"}, "expected a --name of letters"),
        ({"tolerance_mm": float("nan")}, "expected a --tolerance above 0 mm, got nan"),
        ({"train_cases": [0]}, "expected --train-cases of 1 or more, or all, got 0"),
        ({"settings": ["seed=3"]}, "expected seeds by --seeds, got one in --set"),
        ({"settings": ["bogus=1"]}, "unknown key 'bogus'"),
        ({"settings": ["num_epochs=0"]}, "num_epochs must be a number above 0, got 0"),
        ({"trainers": [STOCK, "nnUNetTrainerBaseline"]}, "expected nnUNetTrainer or nnUNetTrainerBaseline, got both"),
        ({"trainers": ["nnUNetTrainer_5epochs"]}, "got nnUNetTrainer_5epochs, which has its own: leave the length out"),
        ({"dataset": "777"}, "expected the number or name of a dataset, got '777'"),
        ({"test": Path("nowhere")}, r"expected labels \*.nii.gz in .*nowhere/labelsTs, found none"),
    ],
)  # fmt: skip
def test_faults_are_named_before_anything_is_written(workspace: Workspace, changes: dict, sentence: str) -> None:
    before = written(workspace)
    with pytest.raises(MisfmError, match=sentence):
        plan_grid(request(**changes))
    assert written(workspace) == before


def test_test_cases_are_not_training_cases(workspace: Workspace) -> None:
    test, truths = workspace.root / "test", workspace.base / "gt_segmentations"
    twin = sorted(truths.glob("*.nii.gz"))[3]
    (test / "labelsTs" / "copy.nii.gz").write_bytes(twin.read_bytes())
    (test / "imagesTs" / "copy_0000.nii.gz").write_bytes(b"")
    with pytest.raises(MisfmError, match=f"copy.nii.gz equals the training case {twin.name}"):
        plan_grid(request(test=test))
    os.rename(test / "labelsTs" / "copy.nii.gz", test / "labelsTs" / twin.name)
    with pytest.raises(MisfmError, match="1 files missing"):
        plan_grid(request(test=test))
    os.rename(test / "imagesTs" / "copy_0000.nii.gz", test / "imagesTs" / twin.name.replace(".nii", "_0000.nii"))
    with pytest.raises(MisfmError, match=r"are named as cases of Dataset555_Toy \(1 in all\)"):
        plan_grid(request(test=test))


def test_weights_are_taken_from_a_finished_pretraining(workspace: Workspace) -> None:
    run = workspace.results / "nnUNetTrainerPCTNetVFPretrain__nnUNetPlans__3d_fullres" / "fold_all"
    run.mkdir(parents=True)
    (run / "checkpoint_final.pth").write_bytes(b"")
    assert plan_grid(request(trainers=[VF])).weights == {}


def test_weights_are_those_of_the_first_runs(workspace: Workspace) -> None:
    weights = workspace.root / "a.pth"
    weights.write_bytes(b"a")
    asked = request(trainers=[VF], weights={VF: weights})
    begin(plan_grid(asked))
    assert plan_grid(request(trainers=[VF])).weights == {VF: str(weights)}  # recorded
    weights.write_bytes(b"b")
    with pytest.raises(MisfmError, match="was begun with the weights .*a.pth for nnUNetTrainerPCTNetVF, got .*others"):
        plan_grid(asked)


def test_weights_that_would_not_be_used_are_refused(workspace: Workspace) -> None:
    weights = workspace.root / "a.pth"
    weights.write_bytes(b"a")
    with pytest.raises(
        MisfmError, match="expected --weights for a trainer that fine-tunes, got them for nnUNetTrainerP"
    ):
        plan_grid(request(weights={PCT: weights}))
    with pytest.raises(MisfmError, match="expected --weights or pretrained_weights in --set, got both"):
        plan_grid(request(trainers=[VF], weights={VF: weights}, settings=["pretrained_weights=b.pth"]))
    plans = json.loads((workspace.base / "nnUNetPlans.json").read_text())
    plans["configurations"]["quick"]["misfm"]["pretrained_weights"] = "b.pth"
    (workspace.base / "nnUNetPlans.json").write_text(json.dumps(plans))
    with pytest.raises(MisfmError, match=r"expected --weights or pretrained_weights in quick, got both: .* \(b.pth\)"):
        plan_grid(request(trainers=[VF], weights={VF: weights}))


def test_a_benchmark_of_which_nothing_was_begun_may_change(workspace: Workspace) -> None:
    prepare(plan_grid(request()))
    assert plan_grid(request(settings=["num_epochs=3"])).settings == ("num_epochs=3",)


def test_configurations_of_two_benchmarks_do_not_collide(workspace: Workspace) -> None:
    configure("555", "quick", "quick_a", ["batch_size=2"])
    prepare(plan_grid(request(configuration="quick_a", name="b")))
    with pytest.raises(MisfmError, match="quick_a_b_nall_s0 belongs to the benchmark 'b' already"):
        plan_grid(request(name="a_b"))


def test_recorded_splits_come_back_behind_a_restored_file(workspace: Workspace) -> None:
    file = workspace.base / "splits_final.json"
    users = file.read_bytes()
    begin(plan_grid(request(train_cases=[3])))
    first = plan_grid(request(train_cases=[2, 3]))
    prepare(first)
    appended = json.loads(file.read_text())
    file.write_bytes(users)
    again = plan_grid(request(train_cases=[2, 3]))
    assert [c.run_fold for c in again.cells] == [c.run_fold for c in first.cells]
    prepare(again)
    assert json.loads(file.read_text()) == appended


def test_the_command_lines_are_recorded_once_each(workspace: Workspace) -> None:
    begin(plan_grid(request(command="first")))
    prepare(plan_grid(request(command="second", train_cases=[2])))
    assert plan_grid(request(command="first")).requests == ("first", "second")


def test_weights_are_texts_of_trainer_and_file() -> None:
    assert weights_by_trainer(["A=x=y.pth", "B=/z"]) == {"A": Path("x=y.pth"), "B": Path("/z")}
    for wrong in ("A", "=x", "A="):
        with pytest.raises(MisfmError, match=f"expected --weights of the form TRAINER=FILE, got '{wrong}'"):
            weights_by_trainer([wrong])
