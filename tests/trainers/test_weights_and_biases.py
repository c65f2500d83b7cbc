from pathlib import Path
from typing import Any

import pytest
from conftest import Workspace
from nnunetv2.training.logging import nnunet_logger

from nnunetv2_misfm.trainers.masked_image_modelling import nnUNetTrainerPCTNetMIMPretrain


class Run:
    """Stands in for a run of Weights & Biases."""

    def __init__(self) -> None:
        self.config: dict[str, Any] = {}
        self.summary: dict[str, Any] = {}
        self.step = 0
        self.logged: list[tuple[int, str, float]] = []

    def log(self, values: dict[str, Any], step: int) -> None:
        self.logged += [(step, name, float(value)) for name, value in values.items()]


class Service:
    """Stands in for the module `wandb`, which is not installed with nnU-Net."""

    def __init__(self) -> None:
        self.runs: list[Run] = []
        self.asked: list[dict[str, Any]] = []

    def init(self, **asked: Any) -> Run:
        (Path(asked["dir"]) / "wandb" / "latest-run").mkdir(parents=True, exist_ok=True)
        (Path(asked["dir"]) / "wandb" / "latest-run" / "run-abc123.wandb").touch()
        self.asked.append(asked)
        self.runs.append(Run())
        return self.runs[-1]


def test_pretraining_reports_through_nnunets_hook_and_a_resumed_run_to_the_same_run(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = Service()
    monkeypatch.setattr(nnunet_logger, "wandb", service)
    monkeypatch.setenv("nnUNet_wandb_enabled", "1")
    trainer = workspace.trainer(nnUNetTrainerPCTNetMIMPretrain, {"num_epochs": 2})
    trainer.run_training()
    (run,) = service.runs
    losses = [value for _, name, value in run.logged if name == "train_losses"]
    assert losses == [float(value) for value in trainer.logger.get_value("train_losses", None)]
    assert [step for step, name, _ in run.logged if name == "mean_fg_dice"] == [0, 1]
    assert run.config["hparas"]["num_epochs"] == 2
    trainer = workspace.trainer(nnUNetTrainerPCTNetMIMPretrain, {"num_epochs": 3}, continue_training=True)
    trainer.load_checkpoint(str(Path(trainer.output_folder) / "checkpoint_final.pth"))
    trainer.run_training()
    assert (service.asked[1]["id"], service.asked[1]["resume"]) == ("abc123", "allow")
    assert [step for step, name, _ in service.runs[1].logged if name == "train_losses"] == [2]
