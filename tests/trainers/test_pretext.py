import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from toy import toy_architecture, toy_case, toy_dataset_json, toy_plans, write_case

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers import pretext
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerPCTNetVFPretrain, nnUNetTrainerVFPretrain

BOTH = pytest.mark.parametrize("kind", [nnUNetTrainerVFPretrain, nnUNetTrainerPCTNetVFPretrain])
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "lesion": 2}, "regions_class_order": [1, 2]}
IGNORE = {"labels": {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}}


def recorded_losses(trainer: Any) -> list[float]:
    """Runs the whole training and returns every loss, training and validation, step by step."""
    torch.seed()  # nothing that an earlier test left behind may help
    losses: list[float] = []
    for name in ("train_step", "validation_step"):
        step = getattr(trainer, name)
        setattr(trainer, name, lambda batch, step=step: losses.append(float((r := step(batch))["loss"])) or r)
    trainer.run_training()
    return losses


@BOTH
def test_pretraining_runs_and_logs_what_nnunet_plots(workspace: Workspace, kind: type) -> None:
    trainer = workspace.trainer(kind, {"num_epochs": 2})
    losses = recorded_losses(trainer)
    assert len(losses) == 2 * (2 + 1) and np.isfinite(losses).all()
    assert len(trainer.logger.get_value("dice_per_class_or_region", 0)) == 4
    assert len(trainer.logger.get_value("ema_fg_dice", None)) == 2
    trainer.perform_actual_validation()
    folder = workspace.results / f"{kind.__name__}__nnUNetPlans__quick" / "fold_0"
    assert {"checkpoint_final.pth", "checkpoint_best.pth", "progress.png"} <= {p.name for p in folder.iterdir()}
    assert not (folder / "validation").exists()


@BOTH
def test_shuffled_labels_give_the_same_losses_step_by_step(workspace: Workspace, kind: type) -> None:
    before = recorded_losses(workspace.trainer(kind))
    folder = workspace.base / "nnUNetPlans_3d_fullres"
    for i in range(6):
        image, _ = toy_case(i, (20, 22, 20), 1)
        _, other_labels = toy_case(100 + i, (20, 22, 20), 1, labels=[2] if i % 2 else [])
        write_case(folder, f"case_{i}", image, other_labels)
    assert recorded_losses(workspace.trainer(kind)) == before


@BOTH
@pytest.mark.parametrize("labels", [REGIONS, IGNORE], ids=["regions", "ignore label within the levels"])
def test_regions_and_ignore_label_of_the_dataset_do_not_act(workspace: Workspace, kind: type, labels: dict) -> None:
    before = recorded_losses(workspace.trainer(kind))
    assert recorded_losses(workspace.trainer(kind, dataset_json=toy_dataset_json(**labels))) == before


@BOTH
@pytest.mark.parametrize("num_levels", [4, 8])
def test_checkpoint_rebuilds_through_the_predictors_own_call(workspace: Workspace, kind: type, num_levels: int) -> None:
    trainer = workspace.trainer(kind, {"volume_fusion": {"num_levels": num_levels}})
    trainer.run_training()
    file = workspace.results / f"{kind.__name__}__nnUNetPlans__quick" / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    plans = PlansManager(json.loads((file.parent.parent / "plans.json").read_text()))
    heads_of_the_dataset = plans.get_label_manager(toy_dataset_json()).num_segmentation_heads
    network = kind.build_network_architecture(  # as nnUNetPredictor does
        plans, plans.get_configuration("quick"), 1, heads_of_the_dataset, enable_deep_supervision=False
    )
    network.load_state_dict(checkpoint["network_weights"])
    assert network.eval()(torch.zeros(1, 1, 16, 16, 16)).shape == (1, num_levels + 1, 16, 16, 16)


@BOTH
def test_validation_is_the_same_in_every_epoch(workspace: Workspace, kind: type) -> None:
    trainer = workspace.trainer(kind, {"num_val_iterations_per_epoch": 2})
    trainer.on_train_start()

    def validation() -> list[dict]:
        trainer.on_validation_epoch_start()
        return [trainer.prepare_batch(next(trainer.dataloader_val), training=False) for _ in range(2)]

    first, second = validation(), validation()
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a["data"], b["data"])
        assert all(torch.equal(x, y) for x, y in zip(a["target"], b["target"], strict=True))


@BOTH
def test_batch_of_one_is_fused_with_the_case_before(workspace: Workspace, kind: type) -> None:
    block = {"num_iterations_per_epoch": 4, "augmentation_on": "workers"}  # so that a volume looks the same twice
    trainer = workspace.trainer(kind, block, batch_size=1, patch_size=[16, 16, 32])
    posed: list[dict] = []
    pose = trainer.pose_task
    trainer.pose_task = lambda batch, generator: (posed.append(batch), pose(batch, generator))[1]
    trainer.run_training()
    training = [b for b in posed if b["keys"][0] not in ("case_4", "case_5")]
    assert len(training) == 4
    for batch in training:
        assert batch["foreground"].shape == batch["data"].shape
        assert not torch.equal(batch["foreground"], batch["data"])
    for earlier, later in zip(training, training[1:], strict=False):
        assert list(earlier["keys"]) != list(later["keys"])
        assert torch.equal(later["foreground"], earlier["data"])


def test_batch_is_the_papers_four_unless_a_named_configuration_says_otherwise(workspace: Workspace) -> None:
    plans = toy_plans(batch_size=7)
    assert workspace.trainer(nnUNetTrainerVFPretrain, plans=plans).configuration_manager.batch_size == 7
    del plans["configurations"]["quick"]["batch_size"]
    trainer = workspace.trainer(nnUNetTrainerVFPretrain, plans=plans)
    assert trainer.configuration_manager.batch_size == 4
    assert trainer.plans_manager.plans["configurations"]["3d_fullres"]["batch_size"] == 7


def test_targets_are_made_for_every_head(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerPCTNetVFPretrain, patch_size=[16, 20, 12])
    trainer.initialize()
    batch = {"data": torch.randn(2, 1, 16, 20, 12), "keys": ["a", "b"]}
    posed = trainer.pose_task(batch, torch.Generator().manual_seed(0))
    outputs = trainer.network(posed["data"])
    assert [t.shape[2:] for t in posed["target"]] == [o.shape[2:] for o in outputs]
    assert posed["target"][3].shape[2:] == (2, 3, 2)  # 20 / 8 rounded up
    assert torch.equal(
        posed["target"][1], posed["target"][0][:, :, 1::2, 1::2, 1::2]
    )  # nearest-exact: the voxel's centre


def test_loss_counts_the_background_class_over_the_whole_batch(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerVFPretrain)
    trainer.initialize()
    loss = trainer.loss.loss
    target = torch.zeros(2, 1, 4, 4, 4, dtype=torch.int16)
    target[0, :, :2] = 1
    logits = torch.full((2, 5, 4, 4, 4), -50.0).scatter_(1, target.long(), 50.0)
    logits[1] = 0.0  # the second sample knows nothing: every class 1/5
    probability = logits.softmax(1)
    dice = []
    for k in range(5):
        truth = (target[:, 0] == k).float()
        dice.append((2 * (probability[:, k] * truth).sum() + 1e-5) / (probability[:, k].sum() + truth.sum() + 1e-5))
    entropy = -probability.log().gather(1, target.long()).mean()
    assert float(loss(logits, target)) == pytest.approx(float(entropy - sum(dice) / 5), abs=1e-5)


def test_dataset_of_one_case_is_refused(make_workspace: Callable[..., Workspace]) -> None:
    workspace = make_workspace(num_cases=1)
    trainer = workspace.trainer(nnUNetTrainerVFPretrain, fold="all")
    with pytest.raises(
        MisfmError, match="nnUNetTrainerVFPretrain expected at least 2 cases to train on, got 1 in fold all"
    ):
        trainer.run_training()


def test_single_validation_case_gives_way_to_the_training_cases(workspace: Workspace) -> None:
    names = [f"case_{i}" for i in range(6)]
    (workspace.base / "splits_final.json").write_text(json.dumps([{"train": names[:5], "val": names[5:]}]))
    trainer = workspace.trainer(nnUNetTrainerVFPretrain)
    trainer.on_train_start()
    assert trainer.dataloader_val.batches.cases == names[:5]


@BOTH
def test_cascade_and_2d_are_refused_before_anything_is_written(workspace: Workspace, kind: type) -> None:
    with pytest.raises(MisfmError, match="expected a configuration without a previous stage, got a cascade"):
        workspace.trainer(kind, previous_stage="3d_lowres")
    with pytest.raises(NotImplementedError, match=r"expected a 3D configuration, got one with the 2D patch \[16, 16\]"):
        workspace.trainer(kind, patch_size=[16, 16])
    assert not workspace.results.exists()


@BOTH
def test_several_channels_and_residual_networks(make_workspace: Callable[..., Workspace], kind: type) -> None:
    dataset_json = toy_dataset_json(num_channels=3)
    workspace = make_workspace(dataset_json=dataset_json)
    architecture = toy_architecture(residual=True)
    trainer = workspace.trainer(kind, dataset_json=dataset_json, architecture=architecture)
    assert np.isfinite(recorded_losses(trainer)).all()


@pytest.mark.parametrize("place", ["device", "workers"])
def test_nnunets_augmentation_is_an_option(workspace: Workspace, place: str) -> None:
    trainer = workspace.trainer(nnUNetTrainerVFPretrain, {"augmentation": "nnunet", "augmentation_on": place})
    assert np.isfinite(recorded_losses(trainer)).all()
    batches = trainer.dataloader_train.batches
    assert ("GammaTransform" in str(batches.transforms)) == (place == "workers")
    assert min(batches.crop_size) > 16  # the margin that rotation needs
    if place == "device":
        crops = [pair for i in range(20) for pair in zip(*vars(batches[i]["data"]).values(), strict=True)]
        sizes = {pose.is_resampled: tuple(volume.shape[1:]) for volume, pose in crops}
        assert sizes == {False: (16, 16, 16), True: tuple(batches.crop_size)}


def masked_norm(plans: dict) -> dict:
    plans["configurations"]["3d_fullres"]["use_mask_for_norm"] = [True]
    return plans


@pytest.mark.parametrize("place", ["device", "workers"])
def test_zeros_outside_of_a_normalisation_mask_stay_zeros(workspace: Workspace, place: str) -> None:
    for i in range(6):
        image, labels = toy_case(i, (20, 22, 20), 1)
        image[:, :10] = 0
        write_case(workspace.base / "nnUNetPlans_3d_fullres", f"case_{i}", image, labels)
    block = {"augmentation": "nnunet", "augmentation_on": place}
    trainer = workspace.trainer(nnUNetTrainerVFPretrain, plans=masked_norm(toy_plans(block)))
    trainer.on_train_start()
    shown: list[torch.Tensor] = []
    trainer.pose_task = lambda batch, generator: shown.append(batch["data"])
    for _ in range(20):
        trainer.prepare_batch(next(trainer.dataloader_train), training=True)
    patches = torch.cat(shown)
    has_zeros = (patches == 0).flatten(1).float().mean(1)
    assert has_zeros.min() > 0.1  # also where noise, contrast or gamma acted


@BOTH
def test_every_few_epochs_a_picture_shows_the_same_tasks(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    drawn: list = []
    monkeypatch.setattr(
        pretext, "write_picture", lambda samples, trainer, recipe, output: drawn.append((samples, output))
    )
    trainer = workspace.trainer(kind, {"num_epochs": 4, "picture_every_epochs": 2})
    trainer.run_training()
    assert [output.name for _, output in drawn] == ["pretext_epoch_00002.png", "pretext_epoch_00004.png"]
    (first, _), (second, _) = drawn
    assert len(first) == 2
    for a, b in zip(first, second, strict=True):
        titles = [column.title.split("\n")[0] for column in a.columns]
        assert titles == ["background", "foreground", "fused", "levels", "predicted levels"]
        assert all(np.array_equal(x.volume, y.volume) for x, y in zip(a.columns[:-1], b.columns[:-1], strict=True))


def test_a_picture_that_fails_is_a_warning_and_pictures_change_nothing(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = []
    for every in (0, 1):

        def fail(*given: object) -> None:
            raise MisfmError("expected a preprocessed case case_5, got none.")

        monkeypatch.setattr(pretext, "write_picture", fail)
        trainer = workspace.trainer(nnUNetTrainerVFPretrain, {"num_epochs": 2, "picture_every_epochs": every})
        losses.append(recorded_losses(trainer))
        assert ("WARNING: " in Path(trainer.log_file).read_text()) == (every == 1)
    assert losses[0] == losses[1]
