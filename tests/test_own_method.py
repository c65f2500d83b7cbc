"""The example of docs/own_method.md, as it stands there."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from nnunetv2_misfm.errors import MisfmError
from nnunetv2_misfm.installation import discovery_folder

PAGE = Path(__file__).resolve().parents[1] / "docs" / "own_method.md"
QUICK = {"num_epochs": 2, "num_iterations_per_epoch": 2, "num_val_iterations_per_epoch": 1, "seed": 0}


@pytest.fixture
def find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Finds a trainer as nnU-Net does, the page's folder before ours."""
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    folder = tmp_path / "my_trainers"
    folder.mkdir()
    (folder / "denoising.py").write_text(code)
    monkeypatch.setenv("nnUNet_extTrainer", f"{folder}{os.pathsep}{discovery_folder()}")
    return recursive_find_trainer_class_by_name


@pytest.mark.parametrize("network", ["", "PCTNet"])
def test_it_pretrains_and_fine_tunes(workspace: Workspace, find: Callable[[str], Any], network: str) -> None:
    block = {**QUICK, "features_per_stage": [4, 4, 8, 16, 32], "num_heads": [1, 1, 2], "denoising": {"sigma": 0.25}}
    plans = workspace.plans(block)
    pretraining = workspace.trainer(find(f"nnUNetTrainer{network}DenoisingPretrain"), plans=plans, fold="all")
    pretraining.run_training()
    checkpoint = torch.load(Path(pretraining.output_folder) / "checkpoint_final.pth", weights_only=True)
    assert checkpoint["misfm_meta"]["method"] == "denoising"
    assert checkpoint["misfm_meta"]["recipe"]["denoising"]["sigma"] == 0.25
    losses = checkpoint["logging"]["val_losses"]
    assert checkpoint["logging"]["mean_fg_dice"] == [-loss for loss in losses]
    pretrained = checkpoint["network_weights"]
    del plans["configurations"]["quick"]["misfm"]["denoising"]
    trainer = workspace.trainer(find(f"nnUNetTrainer{network}Denoising"), plans=plans)
    trainer.on_train_start()
    loaded = trainer.network.state_dict()
    assert all(torch.equal(loaded[n], pretrained[n]) for n in pretrained if ".seg_layers." not in n)


def test_its_noise_has_the_recipes_strength(find: Callable[[str], Any]) -> None:
    trainer = find("nnUNetTrainerDenoisingPretrain")
    volumes = torch.zeros(2, 1, 16, 16, 16)
    noisy, target = trainer.make_task(volumes, trainer.method(sigma=0.5), torch.Generator().manual_seed(0))
    assert noisy.std().item() == pytest.approx(0.5, abs=0.02) and torch.equal(target, volumes)


def test_its_recipe_refuses_what_makes_no_sense(workspace: Workspace, find: Callable[[str], Any]) -> None:
    with pytest.raises(MisfmError, match="denoising.sigma must be above 0, got -1.0; correct it in the plans file"):
        workspace.trainer(find("nnUNetTrainerDenoisingPretrain"), {**QUICK, "denoising": {"sigma": -1}})
