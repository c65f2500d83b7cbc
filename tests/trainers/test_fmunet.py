import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.run.load_pretrained_weights import load_pretrained_weights
from toy import toy_architecture, toy_dataset_json

from nnunetv2_misfm.architectures import FMUNet
from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.trainers.fmunet import nnUNetTrainerFMUNet
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerFMUNetVF, nnUNetTrainerFMUNetVFPretrain

# Two voxels at the deepest level, as few as InstanceNorm can do with
PATCH = [32, 16, 16]
ALL = pytest.mark.parametrize("kind", [nnUNetTrainerFMUNet, nnUNetTrainerFMUNetVF, nnUNetTrainerFMUNetVFPretrain])


@pytest.mark.parametrize(
    ("strides", "patch", "grids", "stem"),
    [
        (
            [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
            [40, 28, 20],
            [(40, 28, 20), (20, 14, 10), (10, 7, 5), (5, 4, 3)],
            (3, 3, 3),
        ),
        (
            [[1, 1, 1], [1, 2, 2], [1, 2, 2], [2, 2, 2], [2, 2, 2], [1, 2, 2]],
            [8, 32, 32],
            [(8, 32, 32), (8, 16, 16), (8, 8, 8), (4, 4, 4)],
            (1, 3, 3),
        ),
        ([[1, 1, 1], [2, 2, 1]], [20, 24, 10], [(20, 24, 10), (10, 12, 10), (5, 6, 5), (3, 3, 3)], (3, 3, 1)),
    ],
)
def test_heads_targets_and_weights_agree_under_plans_of_any_shape(
    workspace: Workspace, strides: list, patch: list, grids: list, stem: tuple
) -> None:
    architecture = toy_architecture(len(strides), strides=strides)
    trainer = workspace.trainer(nnUNetTrainerFMUNet, patch_size=patch, architecture=architecture)
    trainer.initialize()
    assert isinstance(trainer.network, FMUNet) and trainer.network.encoder.project.kernel_size == stem
    outputs = trainer.network(torch.randn(1, 1, *patch))
    assert [tuple(o.shape[2:]) for o in outputs] == grids
    scales = trainer._get_deep_supervision_scales()
    transform = trainer.get_validation_transforms(scales)
    targets = transform(segmentation=torch.zeros(1, *patch, dtype=torch.int16))["segmentation"]
    assert [tuple(t.shape[1:]) for t in targets] == grids
    assert np.allclose(trainer.loss.weight_factors, np.array([8, 4, 2, 1]) / 15)


@pytest.mark.parametrize("case", ["residual plans", "two channels", "batch of one"])
def test_one_epoch_of(case: str, make_workspace: Any) -> None:
    channels = 2 if case == "two channels" else 1
    dataset_json = toy_dataset_json(num_channels=channels)
    arguments = {
        "architecture": toy_architecture(residual=case == "residual plans"),
        "batch_size": 1 if case == "batch of one" else 2,
    }
    workspace = make_workspace(dataset_json=dataset_json)
    trainer = workspace.trainer(nnUNetTrainerFMUNet, patch_size=PATCH, dataset_json=dataset_json, **arguments)
    trainer.initialize()
    # not the biases: but for those of the heads, an InstanceNorm behind them takes out what they add
    weights = {name: p for name, p in trainer.network.named_parameters() if name.endswith("weight")}
    before = {name: p.detach().clone() for name, p in weights.items()}
    assert before["encoder.project.weight"].shape[1] == channels
    trainer.run_training()
    assert np.isfinite(trainer.logger.get_value("train_losses", 0))
    assert not [name for name, p in weights.items() if torch.equal(p, before[name])]


def test_defaults_are_the_released_widths_and_the_numbers_of_pct_net(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerFMUNet, {"features_per_stage": None})
    description = trainer.network_description(trainer.plans_manager, trainer.configuration_manager)
    assert description["class"] == "nnunetv2_misfm.architectures.FMUNet"
    assert description["kwargs"] == {
        "features_per_stage": [32, 64, 128, 256, 512],
        "strides": [[1, 1, 1], *[[2, 2, 2]] * 4],
    }
    assert nnUNetTrainerFMUNet.recipe_defaults == nnUNetTrainerPCTNet.recipe_defaults


@ALL
def test_the_follow_up_is_cited(kind: type) -> None:
    assert [("2306.16925" in line, "10.1109/TIP.2025.3610249" in line) for line in kind.citations] == [
        (False, False),
        (True, False),
        (False, True),
    ]


@pytest.mark.parametrize("num_levels", [4, 8])
def test_pretraining_has_one_head_per_level_and_zero_and_rebuilds(workspace: Workspace, num_levels: int) -> None:
    block = {"volume_fusion": {"num_levels": num_levels}}
    trainer = workspace.trainer(nnUNetTrainerFMUNetVFPretrain, block, patch_size=PATCH)
    assert trainer.recipe.lr_schedule == "halving" and trainer.recipe.augmentation == "flips"
    trainer.run_training()
    file = Path(trainer.output_folder) / "checkpoint_final.pth"
    checkpoint = torch.load(file, weights_only=True)
    assert np.isfinite(checkpoint["logging"]["train_losses"]).all()
    network = nnUNetTrainerFMUNetVFPretrain.build_network_architecture(  # as nnUNetPredictor does
        trainer.plans_manager, trainer.configuration_manager, 1, 3, enable_deep_supervision=False
    )
    network.load_state_dict(checkpoint["network_weights"])
    assert network.eval()(torch.zeros(1, 1, *PATCH)).shape == (1, num_levels + 1, *PATCH)


def test_fine_tuning_starts_from_the_pretraining(workspace: Workspace) -> None:
    pretraining = workspace.trainer(nnUNetTrainerFMUNetVFPretrain, fold="all", patch_size=PATCH)
    pretraining.run_training()
    file = Path(pretraining.output_folder) / "checkpoint_final.pth"
    given = torch.load(file, weights_only=True)["network_weights"]
    fresh = {}
    for transfer in ("all", "encoder"):
        trainer = workspace.trainer(nnUNetTrainerFMUNetVF, {"transfer": transfer}, patch_size=PATCH)
        trainer.on_train_start()
        account = json.loads((Path(trainer.output_folder) / "pretrained_weights.json").read_text())
        assert (account["file"], account["share"], account["adapted"]) == (str(file), 1.0, {})
        state = trainer.network.state_dict()
        assert all(torch.equal(state[name], given[name]) for name in account["moved"])
        fresh[transfer] = set(account["fresh"])
    heads = {name for name in given if ".seg_layers." in name}
    assert len(heads) == 8 and fresh == {"all": heads, "encoder": {n for n in given if n.startswith("decoder.")}}


def test_nnunets_own_flag_takes_the_pretraining(workspace: Workspace) -> None:
    pretraining = workspace.trainer(nnUNetTrainerFMUNetVFPretrain, fold="all", patch_size=PATCH)
    pretraining.run_training()
    file = Path(pretraining.output_folder) / "checkpoint_final.pth"
    trainer = workspace.trainer(nnUNetTrainerFMUNet, patch_size=PATCH)
    trainer.initialize()
    load_pretrained_weights(trainer.network, str(file))
    given, state = torch.load(file, weights_only=True)["network_weights"], trainer.network.state_dict()
    assert all(torch.equal(given[name], state[name]) for name in state if ".seg_layers." not in name)


def test_without_pretraining_fine_tuning_stops_and_names_its_trainer(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerFMUNetVF, patch_size=PATCH)
    with pytest.raises(MisfmError, match="quick all -tr nnUNetTrainerFMUNetVFPretrain -p nnUNetPlans"):
        trainer.run_training()


@ALL
def test_a_single_voxel_at_the_deepest_level_is_refused(workspace: Workspace, kind: type) -> None:
    trainer = workspace.trainer(kind, batch_size=4)
    sentence = rf"{kind.__name__} expected more than one voxel per sample .* got patch \[16, 16, 16\]; raise the patch"
    with pytest.raises(MisfmError, match=sentence):
        trainer.initialize()


def test_wrong_number_of_widths_is_refused(workspace: Workspace) -> None:
    trainer = workspace.trainer(nnUNetTrainerFMUNet, {"features_per_stage": [8, 16]}, patch_size=PATCH)
    with pytest.raises(MisfmError, match=r"features_per_stage must hold 5 numbers for FMUNet, got \[8, 16\]"):
        trainer.initialize()


@ALL
def test_2d_is_refused_at_once(workspace: Workspace, kind: type) -> None:
    with pytest.raises(NotImplementedError, match=f"{kind.__name__} expected a 3D configuration"):
        workspace.trainer(kind, patch_size=[16, 16])
    assert not workspace.results.exists()
