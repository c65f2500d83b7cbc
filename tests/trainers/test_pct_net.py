from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from toy import toy_architecture, toy_dataset_json

from nnunetv2_misfm.architectures import PCTNet
from nnunetv2_misfm.architectures.pct_net import default_num_heads
from nnunetv2_misfm.architectures.window_attention import WindowAttention
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.five_levels import five_level_strides
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet


def plan_strides(num_stages: int, *shallow: tuple[int, int, int]) -> list[list[int]]:
    """Strides as nnU-Net plans them: [1, 1, 1] first, then the given ones, then (2, 2, 2)."""
    strides = [[1, 1, 1], *map(list, shallow)]
    return strides + [[2, 2, 2]] * (num_stages - len(strides))


@pytest.mark.parametrize("num_stages", [4, 5, 6, 7])
def test_plans_of_any_depth_give_five_levels(num_stages: int) -> None:
    assert five_level_strides(plan_strides(num_stages)) == [[1, 1, 1], *[[2, 2, 2]] * 4]
    anisotropic = plan_strides(num_stages, (1, 2, 2), (2, 2, 1))
    assert five_level_strides(anisotropic) == [[1, 1, 1], [1, 2, 2], [2, 2, 1], [2, 2, 2], [2, 2, 2]]


def test_missing_stages_pool_by_two() -> None:
    assert five_level_strides([[1, 1, 1], [1, 2, 2]]) == [[1, 1, 1], [1, 2, 2], *[[2, 2, 2]] * 3]


@pytest.mark.parametrize(
    ("strides", "patch", "grids"),
    [
        (plan_strides(4), [40, 56, 40], [(40, 56, 40), (20, 28, 20), (10, 14, 10), (5, 7, 5)]),
        (plan_strides(6, (1, 2, 2), (1, 2, 2)), [16, 32, 32], [(16, 32, 32), (16, 16, 16), (16, 8, 8), (8, 4, 4)]),
        (plan_strides(3, (2, 2, 1)), [20, 12, 10], [(20, 12, 10), (10, 6, 10), (5, 3, 5), (3, 2, 3)]),
    ],
)
def test_heads_targets_and_weights_agree(workspace: Workspace, strides: list, patch: list, grids: list) -> None:
    architecture = toy_architecture(len(strides), strides=strides)
    trainer = workspace.trainer(nnUNetTrainerPCTNet, patch_size=patch, architecture=architecture)
    trainer.initialize()
    outputs = trainer.network(torch.randn(2, 1, *patch))
    assert [tuple(o.shape[2:]) for o in outputs] == grids
    scales = trainer._get_deep_supervision_scales()
    transform = trainer.get_validation_transforms(scales)
    targets = transform(segmentation=torch.zeros(1, *patch, dtype=torch.int16))["segmentation"]
    assert [tuple(t.shape[1:]) for t in targets] == grids
    assert np.allclose(trainer.loss.weight_factors, np.array([8, 4, 2, 1]) / 15)


def test_every_parameter_learns(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerPCTNet)
    trainer.on_train_start()
    trainer.network.train()
    batch = next(trainer.dataloader_train)
    trainer.loss(trainer.network(batch["data"]), batch["target"]).backward()
    assert not [name for name, p in trainer.network.named_parameters() if p.grad is None]


@pytest.mark.parametrize("case", ["residual plans", "two channels", "regions", "cascade"])
def test_one_epoch_of(case: str, make_workspace: Any) -> None:
    arguments: dict[str, Any] = {
        "residual plans": {"architecture": toy_architecture(residual=True)},
        "two channels": {"dataset_json": toy_dataset_json(num_channels=2)},
        "regions": {
            "dataset_json": toy_dataset_json(
                labels={"background": 0, "whole": [1, 2], "lesion": 2}, regions_class_order=[1, 2]
            )
        },
        "cascade": {"previous_stage": "3d_lowres"},
    }[case]
    workspace = make_workspace(dataset_json=arguments.get("dataset_json"))
    trainer = workspace.trainer(nnUNetTrainerPCTNet, **arguments)
    if case == "cascade":
        write_previous_stage(workspace, trainer)
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", 0))
    assert isinstance(trainer.network, PCTNet)
    assert trainer.network.encoder.stem.weight.shape[1] == {"two channels": 2, "cascade": 3}.get(case, 1)


def write_previous_stage(workspace: Workspace, trainer: Any) -> None:
    """Puts each case's own labels where nnU-Net expects the previous stage's predictions."""
    from pathlib import Path

    from nnunetv2.training.dataloading.nnunet_dataset import nnUNetDatasetBlosc2

    folder = Path(trainer.folder_with_segs_from_previous_stage)
    folder.mkdir(parents=True)
    source = workspace.base / "nnUNetPlans_3d_fullres"
    for name in nnUNetDatasetBlosc2.get_identifiers(str(source)):
        _, labels, _, _ = nnUNetDatasetBlosc2(str(source)).load_case(name)
        nnUNetDatasetBlosc2.save_seg(labels[0], str(folder / name))


def test_defaults_are_the_released_widths_and_adam(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerPCTNet, {"features_per_stage": None, "num_heads": None})
    description = trainer.network_description(trainer.plans_manager, trainer.configuration_manager)
    assert description["kwargs"]["features_per_stage"] == [24, 48, 128, 256, 512]
    assert description["kwargs"]["num_heads"] == [4, 8, 16]
    recipe = trainer.recipe
    assert (recipe.optimizer, recipe.initial_lr, recipe.weight_decay, recipe.lr_schedule, recipe.augmentation) == (
        "adam", 1e-3, 1e-5, "poly", "nnunet",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("widths", "heads"), [([128, 256, 512], [4, 8, 16]), ([32, 64, 128], [4, 8, 16]), ([6, 12, 33], [3, 6, 11])]
)
def test_heads_are_the_released_ones_or_the_most_below_that_divide(widths: list[int], heads: list[int]) -> None:
    assert default_num_heads([8, 8, *widths]) == heads


def test_recipe_sets_heads_and_attention_dropout(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerPCTNet, {"num_heads": [2, 4, 8], "attention_dropout": 0.5})
    trainer.initialize()
    attention = [m for m in trainer.bare_network.modules() if isinstance(m, WindowAttention)]
    assert {(m.num_heads, m.attention_dropout) for m in attention} == {(2, 0.5), (4, 0.5), (8, 0.5)}


def test_network_with_the_default_heads_learns(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerPCTNet, {"num_heads": None})
    trainer.on_train_start()
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.network.train()
    result = trainer.train_step(next(trainer.dataloader_train))
    attention = [m for m in trainer.bare_network.modules() if isinstance(m, WindowAttention)]
    assert {m.num_heads for m in attention} == {4, 8, 16}  # of the widths 8, 16, 32
    assert np.isfinite(result["loss"])
    assert not [name for name, p in trainer.network.named_parameters() if torch.equal(p, before[name])]


def test_batch_norm_without_a_second_value_is_refused(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerPCTNet, batch_size=1)
    sentence = r"expected more than one value per channel .* got batch size 1 and patch \[16, 16, 16\]; raise either"
    with pytest.raises(MisfmError, match=sentence):
        trainer.run_training()


def test_wrong_number_of_widths_is_refused(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerPCTNet, {"features_per_stage": [8, 16]})
    with pytest.raises(MisfmError, match=r"features_per_stage must hold 5 numbers for PCTNet, got \[8, 16\]"):
        trainer.initialize()


def test_2d_is_refused_at_once(workspace: Workspace) -> None:
    with pytest.raises(NotImplementedError, match="nnUNetTrainerPCTNet expected a 3D configuration"):
        workspace.trainer(nnUNetTrainerPCTNet, patch_size=[16, 16])
    assert not workspace.results.exists()


@pytest.mark.parametrize(
    ("strides", "said"),
    [
        (None, "none"),
        ([[1, 1, 1], [4, 4, 4], [2, 2, 2]], "strides .*4, 4, 4.*"),
        ([[1, 1, 1], [2, 2, 2], [1, 3, 3]], "strides .*1, 3, 3.*"),
        ([[1, 1], [2, 2], [2, 2]], "strides .*2, 2.*"),
        ([1, 2, 2], "strides .*1, 2, 2.*"),
    ],
)
def test_plans_without_fitting_pools_are_refused_at_once(workspace: Workspace, strides: list | None, said: str) -> None:
    architecture = toy_architecture()
    architecture["arch_kwargs"].pop("strides")
    if strides:
        architecture["arch_kwargs"]["strides"] = strides
    sentence = (
        f"expected plans whose network has strides of 1 and 2 .* got .*PlainConvUNet with {said}: use nnUNetPlans"
    )
    with pytest.raises(MisfmError, match=sentence) as refusal:
        workspace.trainer(nnUNetTrainerPCTNet, architecture=architecture)
    assert "\n" not in str(refusal.value) and not workspace.results.exists()


def test_deeper_pools_of_the_plans_may_be_any(workspace: Workspace) -> None:
    architecture = toy_architecture(strides=[[1, 1, 1], [2, 2, 2], [1, 2, 2], [4, 4, 4]])
    trainer = workspace.trainer(nnUNetTrainerPCTNet, architecture=architecture)
    kwargs = trainer.network_description(trainer.plans_manager, trainer.configuration_manager)["kwargs"]
    assert kwargs["strides"] == [[1, 1, 1], [2, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2]]
