"""Two processes on the CPU, through nnU-Net's own `run_ddp` with gloo (ddp_worker.py)."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle
from toy import DATASET, toy_case, toy_dataset_json, toy_plans, write_case, write_toy_dataset

from nnunetv2_misfm.trainers.baseline import nnUNetTrainerBaseline
from nnunetv2_misfm.trainers.discovery import nnunetv2_misfm_trainers
from nnunetv2_misfm.trainers.masked_image_modelling import nnUNetTrainerMIMPretrain
from nnunetv2_misfm.trainers.patch_swapping import nnUNetTrainerPatchSwappingPretrain
from nnunetv2_misfm.trainers.reconstruction import ReconstructionTrainer
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerVFPretrain
from nnunetv2_misfm.weights.checkpoint import tensors_sha256

pytestmark = pytest.mark.slow

PCT_PRETRAIN, PCT_VF, VF_PRETRAIN = "nnUNetTrainerPCTNetVFPretrain", "nnUNetTrainerPCTNetVF", "nnUNetTrainerVFPretrain"
# Name of the scenario -> trainer and configuration
SCENARIOS = {
    "pretrain_pct": (PCT_PRETRAIN, "quick"),
    "pretrain_plans": (VF_PRETRAIN, "four"),
    "finetune": (PCT_VF, "quick"),
    "genesis": ("nnUNetTrainerModelsGenesisPretrain", "rivals"),
    "masking_pct": ("nnUNetTrainerPCTNetMIMPretrain", "rivals"),
    "masking_pct_finest": ("nnUNetTrainerPCTNetMIMPretrain", "rivals_finest"),  # heads of which nothing is asked
    # these five train on given samples
    "dice_per_sample": ("nnUNetTrainerBaseline", "single"),
    "dice_of_batch": ("nnUNetTrainerBaseline", "single_batch_dice"),
    "fusion": (VF_PRETRAIN, "single_four"),
    "swapping": ("nnUNetTrainerPatchSwappingPretrain", "single"),
    "masking": ("nnUNetTrainerMIMPretrain", "single"),
    "nan": (PCT_VF, "quick"),
    "resume": (PCT_VF, "quick"),  # goes on where `nan` stopped
}
RIVALS = ("genesis", "masking_pct", "masking_pct_finest")
# Epochs that each takes
LEARNING = {
    "pretrain_pct": [0, 1], "pretrain_plans": [0, 1], "finetune": [0, 1], "resume": [1],
    "dice_per_sample": [0], "dice_of_batch": [0], "fusion": [0], "swapping": [0], "masking": [0],
    **dict.fromkeys(RIVALS, [0, 1]),
}  # fmt: skip
EQUAL_TO_ONE_RANK = {
    "dice_per_sample": nnUNetTrainerBaseline,
    "dice_of_batch": nnUNetTrainerBaseline,
    "fusion": nnUNetTrainerVFPretrain,
    "swapping": nnUNetTrainerPatchSwappingPretrain,
    "masking": nnUNetTrainerMIMPretrain,
}
NUM_STEPS = 3
NUM_VALIDATION = 3
GRID = (1, 8, 8, 16)  # of the coarser head's target


@dataclass
class Runs:
    """What the two ranks left behind."""

    root: Path
    output: str

    def accounts(self, scenario: str) -> list[dict[str, Any]]:
        files = [self.root / f"{scenario}_{rank}.json" for rank in (0, 1)]
        assert all(file.is_file() for file in files), self.output[-4000:]
        accounts = [json.loads(file.read_text()) for file in files]
        assert scenario == "nan" or not any(a["error"] for a in accounts), [a["error"] for a in accounts]
        return accounts

    def fold(self, scenario: str) -> Path:
        trainer, configuration = SCENARIOS[scenario]
        results = "nan" if scenario == "resume" else scenario
        return self.root / results / DATASET / f"{trainer}__nnUNetPlans__{configuration}" / "fold_0"


def plans_of_scenarios() -> dict[str, Any]:
    # with a batch of one, the patch is what leaves PCT-Net's BatchNorm two values per channel at the deepest level
    sgd = {"optimizer": "sgd", "initial_lr": 0.01}  # Adam makes whole steps of the rounding in gradients that are zero
    # augmented in the workers, a volume looks the same as foreground as it did the step before
    block = {"num_epochs": 2, "num_iterations_per_epoch": 3, "augmentation_on": "workers"}
    plans = toy_plans(block, patch_size=[16, 16, 32])
    quick = plans["configurations"]["quick"]
    by_sgd = dict.fromkeys(("volume_fusion", "patch_swapping", "masked_image_modelling"), sgd)
    one_epoch = {**quick["misfm"], "num_epochs": 1, "num_iterations_per_epoch": NUM_STEPS, **by_sgd}
    masking = {"block_size": [4, 4, 4]}
    rivals = {**quick["misfm"], "num_val_iterations_per_epoch": 2, "masked_image_modelling": masking}
    finest = {"masked_image_modelling": {**masking, "deep_supervision": False}}
    plans["configurations"] |= {
        "four": {**quick, "batch_size": 4},
        "single": {**quick, "misfm": one_epoch},
        "single_batch_dice": {**quick, "misfm": one_epoch, "batch_dice": True},
        "single_four": {**quick, "misfm": one_epoch, "batch_size": 4},
        "rivals": {**quick, "misfm": rivals},
        "rivals_finest": {**quick, "misfm": {**rivals, **finest}},
    }
    return plans


def make_validatable(base: Path, shapes: Sequence[tuple[int, int, int]]) -> None:
    """Gives the toy dataset what the final validation needs: as many validation cases, geometry and reference files."""
    folder = base / "nnUNetPlans_3d_fullres"
    names = [f"case_{i}" for i in range(6)]
    training, validation = names[: -len(shapes)], names[-len(shapes) :]
    (base / "splits_final.json").write_text(json.dumps([{"train": training, "val": validation}]))
    (base / "gt_segmentations").mkdir()
    for seed, (name, shape) in enumerate(zip(validation, shapes, strict=True)):
        image, labels = toy_case(seed, shape, 1)
        write_case(folder, name, image, labels)
        properties = load_pickle(str(folder / f"{name}.pkl"))
        geometry = {"spacing": (1.0,) * 3, "origin": (0.0,) * 3, "direction": tuple(np.eye(3).ravel())}
        write_pickle({**properties, "sitk_stuff": geometry}, str(folder / f"{name}.pkl"))
        sitk.WriteImage(
            sitk.GetImageFromArray(labels[0].astype(np.uint8)), str(base / "gt_segmentations" / f"{name}.nii.gz")
        )


def given_batches(size: int, num_classes: int) -> list[dict[str, Any]]:
    """Batches as nnU-Net's loader makes them, with targets for the two heads of the toy network.

    The first samples have little foreground and lack the last class, so that Dice of a batch and of samples differ.
    """
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(NUM_STEPS):
        target = torch.zeros(size, *GRID, dtype=torch.int64)
        for i in range(size):
            labels = torch.randint(0, num_classes - size + 1 + i, GRID, generator=generator)
            target[i] = labels * (torch.rand(GRID, generator=generator) < (i + 1) / size)
        fine = target.repeat_interleave(2, 2).repeat_interleave(2, 3).repeat_interleave(2, 4)
        data = fine + torch.randn(fine.shape, generator=generator)
        batches.append({"data": data, "target": [fine, target], "keys": [f"case_{i}" for i in range(size)]})
    return batches


def given_restorations(kind: type[ReconstructionTrainer]) -> list[dict[str, Any]]:
    """Batches of two restorations of a rival, with targets for the two heads of the toy network."""
    generator, recipe = torch.Generator().manual_seed(0), kind.method()
    batches = []
    for _ in range(NUM_STEPS):
        volumes = torch.randn(2, GRID[0], *(2 * n for n in GRID[1:]), generator=generator)
        data, fine = kind.make_task(volumes, recipe, generator)
        target = [fine, kind.resize_target(fine, list(GRID[1:]))]
        batches.append({"data": data, "target": target, "keys": ["case_0", "case_1"]})
    return batches


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Both ranks after all scenarios."""
    root = tmp_path_factory.mktemp("distributed")
    base = write_toy_dataset(root / "preprocessed", plans_of_scenarios())
    # in one, nine and one windows: the first rank's two cases take fewer forward passes than the second rank's one
    make_validatable(base, [(16, 16, 32), (30, 30, 32), (16, 16, 32)])
    scenarios = []
    for name, (trainer, configuration) in SCENARIOS.items():
        scenario = {
            "name": name,
            "results": name,
            "dataset": DATASET,
            "trainer": trainer,
            "configuration": configuration,
        }
        if name in EQUAL_TO_ONE_RANK:
            scenario["batches"] = str(root / f"{name}_batches.pt")
            kind = EQUAL_TO_ONE_RANK[name]
            of_labels = (4, 5) if name == "fusion" else (2, 3)
            rival = issubclass(kind, ReconstructionTrainer)
            torch.save(given_restorations(kind) if rival else given_batches(*of_labels), scenario["batches"])
        scenarios.append(scenario)
    by_name = {scenario["name"]: scenario for scenario in scenarios}
    weights = Runs(root, "").fold("pretrain_pct") / "checkpoint_final.pth"
    by_name["finetune"] |= {"validate": True, "weights": str(weights)}
    by_name["nan"] |= {"nan": [1, 4], "weights": str(weights)}  # rank 1, the second step of the second epoch
    by_name["resume"] |= {"results": "nan", "continue": True, "weights": "nowhere.pth"}
    (root / "scenarios.json").write_text(json.dumps(scenarios))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folders = {f"nnUNet_{name}": str(root / name) for name in ("raw", "preprocessed")}
    discovery = str(Path(nnunetv2_misfm_trainers.__file__).parent)
    one_process = {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    environment = {**os.environ, **folders, **one_process, "nnUNet_extTrainer": discovery}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    command = [sys.executable, str(Path(__file__).with_name("ddp_worker.py")), str(root / "scenarios.json")]
    outputs = [root / f"output_{rank}.txt" for rank in (0, 1)]
    processes = []
    for rank, output in enumerate(outputs):
        with output.open("w") as stream:
            variables = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=variables, stdout=stream, stderr=subprocess.STDOUT))
    try:
        for process in processes:
            process.wait(timeout=900)
    finally:
        for process in processes:
            process.kill()
    return Runs(root, "\n".join(output.read_text() for output in outputs))


@pytest.mark.parametrize("scenario", LEARNING)
def test_both_ranks_log_the_same_losses(runs: Runs, scenario: str) -> None:
    first, second = (account["logged"] for account in runs.accounts(scenario))
    assert first == second and np.isfinite(first["train_losses"] + first["val_losses"]).all()
    assert len(first["train_losses"]) == LEARNING[scenario][-1] + 1


@pytest.mark.parametrize("scenario", LEARNING)
def test_parameters_are_bit_equal_after_each_epoch(runs: Runs, scenario: str) -> None:
    first, second = runs.accounts(scenario)
    assert first["parameters"] == second["parameters"] and first["buffers"] == second["buffers"]
    assert first["epochs"] == LEARNING[scenario] and len(set(first["parameters"])) == len(LEARNING[scenario])


@pytest.mark.parametrize("scenario", LEARNING)
def test_ranks_share_the_batch_on_the_cpu(runs: Runs, scenario: str) -> None:
    size = 2 if scenario in ("pretrain_plans", "fusion") else 1
    for account in runs.accounts(scenario):
        assert (account["device"], account["batch_size"]) == ("cpu", size)


@pytest.mark.parametrize("scenario", LEARNING)
def test_only_the_first_rank_writes(runs: Runs, scenario: str) -> None:
    first, second = runs.accounts(scenario)
    assert any(name.endswith("checkpoint_final.pth.tmp") for name in first["written"])
    assert second["written"] == []


@pytest.mark.parametrize("scenario", ["pretrain_pct", "pretrain_plans", *RIVALS])
def test_ranks_pretrain_on_tasks_of_their_own(runs: Runs, scenario: str) -> None:
    tasks = [task for account in runs.accounts(scenario) for task in account["tasks"]]
    training = [task for task in tasks if task["phase"] == "training"]
    assert len(training) == 2 * 2 * 3
    for what in ("data", "draws", "answer"):
        assert len({task[what] for task in training}) == len(training)


def test_batch_of_one_per_rank_is_fused_with_the_case_before(runs: Runs) -> None:
    for account in runs.accounts("pretrain_pct"):
        foreground, case = account["drawn"][0]
        training = [task for task in account["tasks"] if task["phase"] == "training"]
        for task in training:
            assert task["foreground"] == foreground and task["case"] != case
            foreground, case = task["data"], task["case"]
        assert {task["data"] for task in training} < {digest for digest, _ in account["drawn"]}


@pytest.mark.parametrize("scenario", RIVALS)
def test_logged_validation_loss_is_the_mean_over_the_ranks(runs: Runs, scenario: str) -> None:
    accounts = runs.accounts(scenario)
    first, second = (account["validation"] for account in accounts)
    assert [len(epoch) for epoch in first + second] == [2] * 4 and not set(sum(first, [])) & set(sum(second, []))
    expected = [np.mean([*of_first, *of_second]) for of_first, of_second in zip(first, second, strict=True)]
    for account in accounts:
        assert account["logged"]["val_losses"] == pytest.approx(expected)
        assert account["logged"]["dice_per_class_or_region"] == [[pytest.approx(-loss)] for loss in expected]


def test_finetuning_loads_on_both_ranks_and_reports_once(runs: Runs) -> None:
    file = runs.fold("pretrain_pct") / "checkpoint_final.pth"
    report = json.loads((runs.fold("finetune") / "pretrained_weights.json").read_text())
    assert report["file"] == str(file) and report["share"] == 1
    weights = torch.load(file, weights_only=True)["network_weights"]
    expected = tensors_sha256({name: tensor for name, tensor in weights.items() if ".seg_layers." not in name})
    assert [account["body_at_start"] for account in runs.accounts("finetune")] == [expected] * 2


def test_final_validation_shares_the_cases_among_the_ranks(runs: Runs) -> None:
    summary = json.loads((runs.fold("finetune") / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == NUM_VALIDATION
    log = "".join(file.read_text() for file in runs.fold("finetune").glob("training_log*"))
    assert "Mean Validation Dice" in log


def test_nan_on_one_rank_stops_both_and_keeps_the_last_good_checkpoint(runs: Runs) -> None:
    first, second = (account["error"] for account in runs.accounts("nan"))
    written = runs.accounts("nan")[0]["written"]
    assert "MisfmError: training stopped in epoch 1, step 1, rank 0: loss not finite on another rank" in first
    assert "MisfmError: training stopped in epoch 1, step 1, rank 1: loss nan" in second
    weights = torch.load(runs.fold("nan") / "checkpoint_best.pth", weights_only=True)["network_weights"]
    assert all(torch.isfinite(tensor).all() for tensor in weights.values())
    names = {path.name for path in runs.fold("nan").glob("*.pth")}
    assert names == {"checkpoint_best.pth", "checkpoint_final.pth"}  # the final one is of `resume`
    assert not any(name.endswith(("checkpoint_final.pth.tmp", "checkpoint_latest.pth.tmp")) for name in written)


@pytest.mark.parametrize("scenario", EQUAL_TO_ONE_RANK)
def test_two_ranks_with_one_sample_each_equal_one_rank_with_both(
    runs: Runs, scenario: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged = runs.accounts(scenario)[0]["logged"]
    monkeypatch.setenv("nnUNet_preprocessed", str(runs.root / "preprocessed"))
    monkeypatch.setenv("nnUNet_results", str(tmp_path))
    monkeypatch.setenv("nnUNet_compile", "f")
    plans = {**plans_of_scenarios(), "continue_training": False}
    kind, configuration = EQUAL_TO_ONE_RANK[scenario], SCENARIOS[scenario][1]
    trainer: Any = kind(plans, configuration, 0, toy_dataset_json(), torch.device("cpu"))
    trainer.initialize()
    trainer.network.train()
    batches = torch.load(runs.root / f"{scenario}_batches.pt")
    trainer.prepare_batch = lambda batch, training: batch  # the task is given
    losses = [trainer.train_step(batch)["loss"] for batch in batches]
    distributed = torch.load(runs.root / f"{scenario}_ddp.pt")
    for name, tensor in trainer.network.state_dict().items():
        torch.testing.assert_close(distributed[name], tensor, rtol=0, atol=1e-5)
    assert logged["train_losses"][0] == pytest.approx(np.mean(losses), abs=1e-5)
