import random
from typing import Any

import numpy as np
import torch
from conftest import Workspace
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_misfm.trainers.baseline import nnUNetTrainerBaseline

LENGTHS = {"num_epochs": 2, "num_iterations_per_epoch": 3, "num_val_iterations_per_epoch": 2}


def losses(trainer: Any) -> tuple[list, list]:
    trainer.run_training()
    return trainer.logger.get_value("train_losses", None), trainer.logger.get_value("val_losses", None)


def test_losses_are_stock_nnunets_at_the_same_seed(workspace: Workspace) -> None:
    baseline = losses(workspace.trainer(nnUNetTrainerBaseline, {**LENGTHS, "seed": 3}))
    stock = workspace.trainer(nnUNetTrainer)
    for key, value in LENGTHS.items():
        setattr(stock, key, value)
    np.random.seed(3)
    torch.manual_seed(3)

    random.seed(3)
    assert losses(stock) == baseline


def test_all_other_keys_of_the_block_are_left_alone(workspace: Workspace) -> None:
    block = {
        "initial_lr": 5.0,
        "weight_decay": 5.0,
        "optimizer": "adam",
        "augmentation": "flips",
        "transfer": "encoder",
    }
    trainer = workspace.trainer(nnUNetTrainerBaseline, {**block, "volume_fusion": {"num_epochs": 99}})
    assert (trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.recipe.seed) == (1, 2, 7)
    trainer.on_train_start()
    (group,) = trainer.optimizer.param_groups
    assert (type(trainer.optimizer), group["lr"], group["weight_decay"]) == (torch.optim.SGD, 1e-2, 3e-5)
    assert "SpatialTransform" in str(trainer.dataloader_train.data_loader.transforms)
