import json
import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.get_network_from_plans import get_network_from_plans
from toy import toy_dataset_json, toy_plans

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.halving_lr import HalvingLRScheduler
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerVFPretrain


def trained(workspace: Workspace, kind: type = nnUNetTrainerVFPretrain, **arguments: Any) -> tuple[Any, Path]:
    trainer = workspace.trainer(kind, **arguments)
    trainer.run_training()
    return trainer, Path(trainer.output_folder)


def damage(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def set_epoch(file: Path, epoch: int) -> None:
    checkpoint = torch.load(file, weights_only=False)
    torch.save({**checkpoint, "current_epoch": epoch}, file)


@pytest.mark.parametrize("name", ["checkpoint_final.pth", "checkpoint_best.pth"])
def test_checkpoint_is_plain_and_says_what_it_is(workspace: Workspace, name: str) -> None:
    trainer, folder = trained(workspace)
    checkpoint = torch.load(folder / name, weights_only=True)
    stock = {
        *("network_weights", "optimizer_state", "grad_scaler_state", "logging", "_best_ema", "current_epoch"),
        *("init_args", "trainer_name", "inference_allowed_mirroring_axes"),
    }
    assert set(checkpoint) == stock | {"misfm_meta", "misfm_state", "nnssl_adaptation_plan", "citations"}
    assert checkpoint["trainer_name"] == "nnUNetTrainerVFPretrain"
    meta = checkpoint["misfm_meta"]
    assert json.loads(json.dumps(meta)) == {**meta, "recipe": json.loads(json.dumps(meta["recipe"]))}
    assert meta["method"] == "volume_fusion"
    assert meta["recipe"]["num_epochs"] == 1 and meta["recipe"]["volume_fusion"]["num_levels"] == 4
    assert meta["data"]["dataset"] == "Dataset555_Toy" and meta["data"]["num_training_cases"] == 4
    assert re.fullmatch("[0-9a-f]{64}", meta["data"]["sha256"])
    assert {"nnunetv2", "torch", "nnunetv2-misfm"} <= set(meta["versions"])
    assert any("2306.16925" in paper for paper in meta["citations"])
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize("kind", [nnUNetTrainerVFPretrain, nnUNetTrainerPCTNet])
def test_network_can_be_rebuilt_from_the_checkpoint_alone(workspace: Workspace, kind: type) -> None:
    _, folder = trained(workspace, kind)
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    network = checkpoint["misfm_meta"]["network"]
    rebuilt = get_network_from_plans(
        network["class"], network["kwargs"], network["kwargs_to_import"],
        network["input_channels"], network["num_classes"], deep_supervision=True,
    )  # fmt: skip
    rebuilt.load_state_dict(checkpoint["network_weights"])


def test_stock_nnunet_can_resume_our_checkpoint(workspace: Workspace) -> None:
    trainer, folder = trained(workspace, MisfmTrainer)
    stock = workspace.trainer(nnUNetTrainer)
    stock.load_checkpoint(str(folder / "checkpoint_final.pth"))
    assert stock.current_epoch == 1
    for name, value in trainer.network.state_dict().items():
        assert torch.equal(stock.network.state_dict()[name], value)


def test_write_that_fails_leaves_the_former_checkpoint(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, folder = trained(workspace)
    file = folder / "checkpoint_final.pth"
    before = file.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(
        MisfmError, match="checkpoint_final.pth could not be written .*No space left.*former checkpoint"
    ):
        trainer.save_checkpoint(str(file))
    assert file.read_bytes() == before
    assert not list(folder.glob("*.tmp"))


def test_continuing_falls_back_to_the_readable_checkpoint_of_the_highest_epoch(workspace: Workspace) -> None:
    trainer, folder = trained(workspace)
    for name, epoch in [("checkpoint_latest.pth", 5), ("checkpoint_best.pth", 3)]:
        trainer.save_checkpoint(str(folder / name))
        set_epoch(folder / name, epoch)
    damage(folder / "checkpoint_final.pth")
    resumed = workspace.trainer(nnUNetTrainerVFPretrain, continue_training=True)
    resumed.load_checkpoint(str(folder / "checkpoint_final.pth"))
    assert resumed.current_epoch == 5
    log = Path(resumed.log_file).read_text()
    assert "WARNING" in log and "checkpoint_latest.pth (epoch 5) instead" in log
    set_epoch(folder / "checkpoint_best.pth", 9)
    damage(folder / "checkpoint_latest.pth")
    resumed = workspace.trainer(nnUNetTrainerVFPretrain, continue_training=True)
    resumed.load_checkpoint(str(folder / "checkpoint_final.pth"))
    assert resumed.current_epoch == 9


def test_unreadable_checkpoint_fails_with_a_sentence_where_nothing_may_stand_in(workspace: Workspace) -> None:
    _, folder = trained(workspace)
    damage(folder / "checkpoint_final.pth")
    validating = workspace.trainer(nnUNetTrainerVFPretrain)  # --val: not continuing
    with pytest.raises(MisfmError, match="checkpoint_final.pth is truncated or no PyTorch checkpoint"):
        validating.load_checkpoint(str(folder / "checkpoint_final.pth"))
    torch.save({"network_weights": {}}, folder / "checkpoint_best.pth")  # readable, but nothing to go on from
    continuing = workspace.trainer(nnUNetTrainerVFPretrain, continue_training=True)
    with pytest.raises(MisfmError, match="No other checkpoint in .* can be read either"):
        continuing.load_checkpoint(str(folder / "checkpoint_final.pth"))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_loss_that_is_not_finite_stops_with_epoch_step_and_cases(workspace: Workspace, value: float) -> None:
    trainer = workspace.trainer(MisfmTrainer, {"num_epochs": 3, "num_iterations_per_epoch": 4})
    step, steps = trainer.train_step, []

    def poisoned(batch: dict) -> dict:
        steps.append(batch["keys"])
        if len(steps) == 4 + 3:  # second epoch, third step
            batch["data"][:] = value
        return step(batch)

    trainer.train_step = poisoned
    with pytest.raises(MisfmError) as caught:
        trainer.run_training()
    cases = ", ".join(steps[-1])
    assert f"training stopped in epoch 1, step 2, rank 0: loss nan; cases of the batch: {cases}." in str(caught.value)
    kept = torch.load(Path(trainer.output_folder) / "checkpoint_best.pth", weights_only=True)
    assert all(torch.isfinite(v).all() for v in kept["network_weights"].values())


def test_fold_past_the_end_is_an_error(workspace: Workspace) -> None:
    trainer = workspace.trainer(MisfmTrainer, fold=1)  # the toy dataset has one split
    with pytest.raises(MisfmError, match=r"expected a fold below 1 \(the splits in .*splits_final.json\), got 1"):
        trainer.do_split()
    (workspace.base / "splits_final.json").unlink()
    with pytest.raises(MisfmError, match="expected a fold below 5"):
        workspace.trainer(MisfmTrainer, fold=5).do_split()
    assert [len(part) for part in workspace.trainer(MisfmTrainer, fold=4).do_split()] == [5, 1]


def test_too_few_cases_for_cross_validation_is_an_error(make_workspace: Any) -> None:
    workspace = make_workspace(num_cases=4)
    (workspace.base / "splits_final.json").unlink()
    with pytest.raises(MisfmError, match="expected at least 5 cases for nnU-Net's cross-validation, got 4"):
        workspace.trainer(MisfmTrainer, fold=0).do_split()


@pytest.mark.parametrize("variable", ["nnUNet_preprocessed", "nnUNet_results"])
def test_missing_variable_is_named(workspace: Workspace, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.delenv(variable)
    with pytest.raises(MisfmError, match=f"expected the environment variable {variable} to name a folder"):
        workspace.trainer(MisfmTrainer)


def test_faulty_block_is_refused_before_anything_is_written(workspace: Workspace) -> None:
    with pytest.raises(MisfmError, match="unknown key 'epochs'"):
        workspace.trainer(MisfmTrainer, {"epochs": 3})
    assert not workspace.results.exists()


def test_constructor_has_nnunets_signature_and_leaves_the_plans_alone(workspace: Workspace) -> None:
    plans = toy_plans()
    trainer = workspace.trainer(nnUNetTrainerVFPretrain, plans=plans)
    assert list(trainer.my_init_kwargs) == ["plans", "configuration", "fold", "dataset_json", "device"]
    assert plans == toy_plans()


@pytest.mark.parametrize(
    ("optimizer", "kind"), [("sgd", torch.optim.SGD), ("adam", torch.optim.Adam), ("adamw", torch.optim.AdamW)]
)
def test_recipe_chooses_the_optimiser(workspace: Workspace, optimizer: str, kind: type) -> None:
    block = {"optimizer": optimizer, "initial_lr": 0.25, "weight_decay": 0.5, "num_epochs": 10}
    trainer = workspace.trainer(MisfmTrainer, block)
    trainer.initialize()
    (group,) = trainer.optimizer.param_groups
    assert type(trainer.optimizer) is kind
    assert (group["lr"], group["weight_decay"]) == (0.25, 0.5)
    trainer.lr_scheduler.step(5)
    assert group["lr"] == pytest.approx(0.25 * 0.5**0.9)  # nnU-Net's poly


def test_halving_schedule_halves_after_every_fifth() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = HalvingLRScheduler(optimizer, 0.8, num_epochs=10)
    rates = []
    for epoch in range(10):
        scheduler.step(epoch)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == [0.8, 0.8, 0.4, 0.4, 0.2, 0.2, 0.1, 0.1, 0.05, 0.05]


def test_flips_alone_keep_every_voxel_and_nnunets_handling_of_labels(workspace: Workspace) -> None:
    trainer = workspace.trainer(MisfmTrainer, {"augmentation": "flips"})
    trainer.on_train_start()
    loader = trainer.dataloader_train.data_loader
    assert tuple(loader.patch_size) == (16, 16, 16)  # no margin
    image = torch.arange(4096.0).reshape(1, 16, 16, 16)
    out = loader.transforms(image=image.clone(), segmentation=(image % 4 - 1).to(torch.int16))
    assert torch.equal(out["image"].flatten().sort().values, image.flatten())
    labels, *coarser = out["segmentation"]
    assert torch.equal(labels, (out["image"] % 4 - 1).clamp(min=0).to(torch.int16))  # -1 (outside) became background
    assert len(coarser) == 1


def test_seed_repeats_a_run(workspace: Workspace) -> None:
    first, second = (trained(workspace, MisfmTrainer)[0].network.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    third = trained(workspace, MisfmTrainer, block={"seed": 8})[0].network.state_dict()
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_resumed_run_keeps_its_account_of_pretrained_weights(workspace: Workspace) -> None:
    trainer, folder = trained(workspace)
    trainer.weights_report = {"file": "a.pth"}
    trainer.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    resumed = workspace.trainer(nnUNetTrainerVFPretrain, continue_training=True)
    resumed.load_checkpoint(str(folder / "checkpoint_latest.pth"))
    assert resumed.weights_report == {"file": "a.pth"}


def test_labels_of_regions_and_ignore_train(workspace: Workspace) -> None:
    regions = {"labels": {"background": 0, "whole": [1, 2], "lesion": 2, "ignore": 3}, "regions_class_order": [1, 2]}
    for augmentation in ("flips", "nnunet"):
        trainer = workspace.trainer(
            nnUNetTrainerPCTNet, {"augmentation": augmentation}, dataset_json=toy_dataset_json(**regions)
        )
        folder = workspace.base / "nnUNetPlans_3d_fullres"
        add_ignore_locations(folder)
        trainer.run_training()
        assert np.isfinite(trainer.logger.get_value("train_losses", 0))


def add_ignore_locations(folder: Path) -> None:
    """What nnU-Net's preprocessing adds to a case where the dataset has an ignore label."""
    from batchgenerators.utilities.file_and_folder_operations import load_pickle, write_pickle

    for file in folder.glob("*.pkl"):
        properties = load_pickle(str(file))
        properties["class_locations"][(-1, 0, 1, 2)] = np.argwhere(np.ones((1, 8, 8, 8)))
        write_pickle(properties, str(file))
