import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from toy import toy_architecture, toy_case, toy_dataset_json, write_case

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.masked_image_modelling import (
    nnUNetTrainerMIM,
    nnUNetTrainerMIMPretrain,
    nnUNetTrainerPCTNetMIM,
    nnUNetTrainerPCTNetMIMPretrain,
)
from nnunetv2_misfm.trainers.models_genesis import nnUNetTrainerModelsGenesis, nnUNetTrainerModelsGenesisPretrain
from nnunetv2_misfm.trainers.patch_swapping import nnUNetTrainerPatchSwapping, nnUNetTrainerPatchSwappingPretrain
from nnunetv2_misfm.trainers.reconstruction import ReconstructionLoss, ReconstructionTrainer

METHODS = {
    nnUNetTrainerModelsGenesisPretrain: "models_genesis",
    nnUNetTrainerPatchSwappingPretrain: "patch_swapping",
    nnUNetTrainerMIMPretrain: "masked_image_modelling",
}
THREE = pytest.mark.parametrize("kind", list(METHODS))
EACH_NETWORK = pytest.mark.parametrize("kind", [nnUNetTrainerPatchSwappingPretrain, nnUNetTrainerPCTNetMIMPretrain])
REGIONS = {"labels": {"background": 0, "whole": [1, 2], "lesion": 2}, "regions_class_order": [1, 2]}
IGNORE = {"labels": {"background": 0, "organ": 1, "lesion": 2, "ignore": 3}}


def error_by_hand(restored: np.ndarray, target: np.ndarray, power: int) -> float:
    """Mean of |restored - target| ** power over the voxels whose target is a number, one after the other."""
    errors = []
    for index in np.ndindex(*target.shape):
        if not np.isnan(target[index]):
            errors.append(abs(float(restored[index]) - float(target[index])) ** power)
    return sum(errors) / len(errors) if errors else 0.0


def losses_of(trainer: Any) -> list[float]:
    """Takes two training steps and one validation step and returns their losses."""
    torch.seed()  # nothing that an earlier test left behind may help
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    losses = [trainer.train_step(next(trainer.dataloader_train))["loss"] for _ in range(2)]
    losses += [step["loss"] for step in validate(trainer, 1)]
    assert np.isfinite(losses).all()
    return list(map(float, losses))


def validate(trainer: Any, num_steps: int) -> list[dict[str, Any]]:
    with torch.no_grad():
        trainer.on_validation_epoch_start()
        return [trainer.validation_step(next(trainer.dataloader_val)) for _ in range(num_steps)]


def pretrained(workspace: Workspace, kind: type, **arguments: Any) -> Path:
    """Runs a pretraining of one epoch and returns its final checkpoint."""
    trainer = workspace.trainer(kind, fold="all", **arguments)
    trainer.logger.plot_progress_png = lambda folder: None
    trainer.run_training()
    return Path(trainer.output_folder) / "checkpoint_final.pth"


@pytest.mark.parametrize(("kind", "power"), [("mse", 2), ("l1", 1)])
def test_loss_is_the_mean_error_of_a_slow_loop(kind: Any, power: int) -> None:
    restored, target = (torch.randn(2, 2, 3, 4, 3, generator=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert float(ReconstructionLoss(kind)(restored, target)) == pytest.approx(
        error_by_hand(restored.numpy(), target.numpy(), power), rel=1e-5
    )
    target[0, 1, :2] = target[1, 0, 1, 1] = torch.nan
    assert float(ReconstructionLoss(kind)(restored, target)) == pytest.approx(
        error_by_hand(restored.numpy(), target.numpy(), power), rel=1e-5
    )


def test_loss_of_three_voxels_is_the_hand_computed_one() -> None:
    restored = torch.tensor([1.0, -3.0, 5.0, 7.0]).reshape(1, 1, 1, 1, 4).requires_grad_()
    target = torch.tensor([0.0, 1.0, torch.nan, 9.0]).reshape(1, 1, 1, 1, 4)
    loss = ReconstructionLoss("mse")(restored, target)
    assert loss.item() == (1 + 16 + 4) / 3
    loss.backward()
    assert restored.grad is not None
    assert restored.grad.flatten().tolist() == pytest.approx([2 / 3, -8 / 3, 0, -4 / 3])
    assert ReconstructionLoss("l1")(restored, target).item() == pytest.approx((1 + 4 + 2) / 3)
    assert ReconstructionLoss("l1")(restored[..., 1:3], target[..., 1:3]).item() == 4  # a single voxel


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_loss_is_zero_where_nothing_is_asked(kind: Any) -> None:
    restored = torch.randn(1, 1, 2, 2, 2, requires_grad=True)
    loss = ReconstructionLoss(kind)(restored, torch.full((1, 1, 2, 2, 2), torch.nan))
    loss.backward()
    assert loss.item() == 0.0
    assert restored.grad is not None and (restored.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_loss_of_half_precision_outputs_is_computed_in_float32(dtype: torch.dtype) -> None:
    restored = torch.full((1, 1, 64, 64, 64), 4.0, dtype=dtype)  # the sum of squares is beyond float16
    loss = ReconstructionLoss("mse")(restored, torch.full((1, 1, 64, 64, 64), 1 / 3))
    assert loss.dtype == torch.float32 and float(loss) == pytest.approx((11 / 3) ** 2, rel=1e-5)


def test_target_of_a_coarser_head_is_the_mean_below_it_and_not_asked_for_where_a_voxel_is_not() -> None:
    target = torch.arange(2 * 4 * 6, dtype=torch.float32).reshape(1, 1, 2, 4, 6).repeat(1, 2, 1, 1, 1)
    target[0, 1, 1, 3, 5] = torch.nan
    coarse = ReconstructionTrainer.resize_target(target, [1, 2, 3])
    for channel, y, x in np.ndindex(2, 2, 3):
        voxels = [24 * k + 6 * (2 * y + j) + 2 * x + i for k in (0, 1) for j in (0, 1) for i in (0, 1)]
        last = (channel, y, x) == (1, 1, 2)
        assert coarse[0, channel, 0, y, x].item() == pytest.approx(np.nan if last else sum(voxels) / 8, nan_ok=True)


@pytest.mark.parametrize(
    ("kind", "default"),
    [
        (nnUNetTrainerModelsGenesisPretrain, (2 / 3, 1 / 3, 0)),  # nnU-Net's: each half as much, the last left out
        (nnUNetTrainerPCTNetMIMPretrain, (8 / 15, 4 / 15, 2 / 15, 1 / 15)),
    ],
)
def test_heads_weigh_as_in_the_trainings_that_follow_or_the_finest_alone(
    workspace: Workspace, kind: Any, default: tuple[float, ...]
) -> None:
    finest = {kind.method.method: {"deep_supervision": False, "loss": "l1"}}
    rest = len(default) - 1
    for block, in_ddp, expected in (
        ({}, False, default),
        (finest, False, (1, *[0] * rest)),
        (finest, True, (1, *[1e-6] * rest)),  # else DDP misses the parameters of the other heads
    ):
        trainer = workspace.trainer(kind, block, architecture=toy_architecture(num_stages=4))
        trainer.is_ddp = in_ddp
        loss = trainer._build_loss()
        assert tuple(loss.weight_factors) == pytest.approx(expected)
        assert loss.loss.kind == ("l1" if block else "mse")
    trainer.enable_deep_supervision = False
    assert isinstance(trainer._build_loss(), ReconstructionLoss)


@pytest.mark.parametrize("kind", [*METHODS, nnUNetTrainerPCTNetMIMPretrain])
def test_every_weight_learns_but_the_head_that_nnunet_leaves_out(workspace: Workspace, kind: Any) -> None:
    patch_size = [32] * 3 if kind is nnUNetTrainerPCTNetMIMPretrain else [16] * 3  # a deepest level above one voxel
    trainer = workspace.trainer(kind, patch_size=patch_size)
    trainer.initialize()
    before = {name: weight.detach().clone() for name, weight in trainer.network.named_parameters()}
    losses_of(trainer)
    still = {name for name, weight in trainer.network.named_parameters() if torch.equal(weight, before[name])}
    left_out = {"decoder.seg_layers.0.weight", "decoder.seg_layers.0.bias"}  # coarsest first in nnU-Net's decoder
    assert still == (set() if kind is nnUNetTrainerPCTNetMIMPretrain else left_out)


@THREE
def test_no_label_is_read_and_the_datasets_classes_do_not_act(workspace: Workspace, kind: Any) -> None:
    before = losses_of(workspace.trainer(kind))
    for labels in (REGIONS, IGNORE):
        trainer = workspace.trainer(kind, dataset_json=toy_dataset_json(**labels))
        assert losses_of(trainer) == before
        assert {output.shape[1] for output in trainer.network(torch.zeros(2, 1, 16, 16, 16))} == {1}
    for i in range(6):
        _, other_labels = toy_case(100 + i, (20, 22, 20), 1, labels=[2] if i % 2 else [])
        write_case(
            workspace.base / "nnUNetPlans_3d_fullres", f"case_{i}", toy_case(i, (20, 22, 20), 1)[0], other_labels
        )
    assert losses_of(workspace.trainer(kind)) == before


@pytest.mark.parametrize("kind", [*METHODS, nnUNetTrainerPCTNetMIMPretrain])
def test_checkpoint_names_the_method_and_rebuilds_through_the_predictors_own_call(
    make_workspace: Callable[..., Workspace], kind: Any
) -> None:
    workspace = make_workspace(dataset_json=toy_dataset_json(num_channels=2))
    method = kind.method.method
    file = pretrained(
        workspace, kind, block={method: {"loss": "l1"}}, dataset_json=toy_dataset_json(num_channels=2, **REGIONS)
    )
    checkpoint = torch.load(file, weights_only=True)
    meta = checkpoint["misfm_meta"]
    assert (meta["method"], meta["network"]["num_classes"], meta["network"]["input_channels"]) == (method, 2, 2)
    assert (meta["recipe"][method]["loss"], meta["recipe"][method]["deep_supervision"]) == ("l1", True)
    assert [name for name in METHODS.values() if name in meta["recipe"]] == [method]
    plans = PlansManager(json.loads((file.parent.parent / "plans.json").read_text()))
    network = kind.build_network_architecture(  # as nnUNetPredictor does, with the heads of the dataset
        plans, plans.get_configuration("quick"), 2, 3, enable_deep_supervision=False
    )
    network.load_state_dict(checkpoint["network_weights"])
    assert network.eval()(torch.zeros(1, 2, 16, 16, 16)).shape == (1, 2, 16, 16, 16)


@EACH_NETWORK
def test_validation_is_the_same_every_epoch_and_logged_as_minus_its_mean_error(workspace: Workspace, kind: Any) -> None:
    trainer = workspace.trainer(kind)
    trainer.on_train_start()
    first, second = validate(trainer, 2), validate(trainer, 2)
    assert [step["loss"] for step in first] == [step["loss"] for step in second]
    trainer.on_validation_epoch_end(first)
    trainer.on_validation_epoch_start()
    expected = []
    with torch.no_grad():
        for _ in range(2):
            posed = trainer.pose_task(next(trainer.dataloader_val), trainer.validation_generator)
            heads = zip(trainer.network(posed["data"]), posed["target"], trainer.loss.weight_factors, strict=True)
            expected.append(sum(w * error_by_hand(r.numpy(), t.numpy(), 2) for r, t, w in heads))
    assert expected[0] != expected[1]
    mean = trainer.logger.get_value("val_losses", -1)
    assert mean == pytest.approx(sum(expected) / 2, rel=1e-4)
    assert trainer.logger.get_value("mean_fg_dice", -1) == -mean
    assert trainer.logger.get_value("dice_per_class_or_region", -1) == [-mean]


def test_best_checkpoint_is_the_one_of_the_least_loss(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerPatchSwappingPretrain, {"num_epochs": 4})
    trainer.logger.plot_progress_png = lambda folder: None
    trainer.on_train_start()
    saved = []
    for loss in (2.0, 1.0, 9.0, 0.5):
        trainer.on_epoch_start()
        trainer.on_train_epoch_start()
        trainer.on_train_epoch_end([{"loss": np.float32(1)}])
        trainer.on_validation_epoch_end([{"loss": np.float32(loss)}])
        trainer.on_epoch_end()
        best = torch.load(Path(trainer.output_folder) / "checkpoint_best.pth", weights_only=True)
        saved.append((best["current_epoch"], best["_best_ema"]))
    # nnU-Net's moving average keeps 0.9 of the value before: -2, -1.9, -2.61, -2.399
    assert [epoch for epoch, _ in saved] == [1, 2, 2, 2]
    assert [average for _, average in saved] == pytest.approx([-2, -1.9, -1.9, -1.9])
    assert "'Pseudo dice' below is minus the validation loss" in Path(trainer.log_file).read_text()


@THREE
@pytest.mark.parametrize(("broken", "phase"), [([2], "training"), ([4, 5], "validation")], ids=["training", "val"])
def test_case_without_numbers_stops_the_run_and_is_named(
    workspace: Workspace, kind: Any, broken: list[int], phase: str
) -> None:
    for i in broken:
        image, labels = toy_case(i, (20, 22, 20), 1)
        write_case(workspace.base / "nnUNetPlans_3d_fullres", f"case_{i}", np.full_like(image, np.nan), labels)
    with pytest.raises(
        MisfmError, match=f"{phase} stopped in epoch 0, step .*: loss nan; cases of the batch"
    ) as caught:
        workspace.trainer(kind, {"num_iterations_per_epoch": 10}).run_training()  # each case comes in ten batches
    assert all(f"case_{i}" in str(caught.value) for i in broken)


@pytest.mark.parametrize(
    ("pretrain", "finetune"),
    [
        (nnUNetTrainerModelsGenesisPretrain, nnUNetTrainerModelsGenesis),
        (nnUNetTrainerPatchSwappingPretrain, nnUNetTrainerPatchSwapping),
        (nnUNetTrainerMIMPretrain, nnUNetTrainerMIM),
        (nnUNetTrainerPCTNetMIMPretrain, nnUNetTrainerPCTNetMIM),
    ],
)
def test_fine_tuning_takes_all_or_the_encoder_and_its_heads_are_fresh(
    workspace: Workspace, pretrain: Any, finetune: Any
) -> None:
    file = pretrained(workspace, pretrain)
    given = torch.load(file, weights_only=True)["network_weights"]
    for transfer, kept in (("all", ("encoder.", "decoder.")), ("encoder", ("encoder.",))):
        trainer = workspace.trainer(finetune, {"transfer": transfer})
        trainer.on_train_start()
        account = json.loads((Path(trainer.output_folder) / "pretrained_weights.json").read_text())
        held = {name: t.detach() for name, t in trainer.network.named_parameters()}
        body = {name for name in held if name.startswith(kept) and ".seg_layers." not in name}
        assert body and all(torch.equal(held[name], given[name]) for name in body)
        assert (account["file"], account["transfer"]) == (str(file), transfer)
        assert body <= set(account["moved"]) and held.keys() - body == held.keys() & account["fresh"].keys()
        kernels = [name for name in held.keys() - body if held[name].ndim == 5]
        assert kernels and not any(torch.equal(held[name], given[name]) for name in kernels if held[name].shape[0] > 3)


def test_methods_are_named_where_a_key_is_unknown(workspace: Workspace) -> None:
    for kind in (*METHODS, nnUNetTrainerMIM):
        with pytest.raises(MisfmError, match="unknown key 'mim'; known keys are num_epochs") as caught:
            workspace.trainer(kind, {"mim": {}})
        assert all(f" {name}" in str(caught.value) for name in METHODS.values())
