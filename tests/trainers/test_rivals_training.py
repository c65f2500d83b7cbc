"""Trainings of the methods that restore volumes: interrupted and continued, compiled, and in lower precision."""

import functools
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Workspace
from nnunetv2.run.run_training import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from toy import DATASET

from nnunetv2_misfm.installation import discovery_folder
from nnunetv2_misfm.trainers.masked_image_modelling import nnUNetTrainerPCTNetMIMPretrain
from nnunetv2_misfm.trainers.models_genesis import nnUNetTrainerModelsGenesisPretrain
from nnunetv2_misfm.trainers.patch_swapping import nnUNetTrainerPatchSwappingPretrain
from nnunetv2_misfm.trainers.reconstruction import ReconstructionLoss, ReconstructionTrainer

# Validation losses of four epochs, the last two after the interruption. nnU-Net's moving average is 0.9 of the former
# value and 0.1 of the new one: the first epoch is the best until the last one.
LOSSES = (3.0, 4.0, 3.5, 0.0)
MOVING_AVERAGE = [-3.0, -3.1, -3.14, -2.826]
INTERRUPTED = 2  # no epoch of this number or above starts in the first run


@pytest.fixture
def best_of_epochs(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, float]]:
    """After every epoch whose `LOSSES` is what validation gives: epochs and average that the best checkpoint holds."""
    workspace.plans({"num_epochs": len(LOSSES), "num_iterations_per_epoch": 1})
    monkeypatch.setenv("nnUNet_extTrainer", str(discovery_folder()))
    end_validation, end_epoch = ReconstructionTrainer.on_validation_epoch_end, nnUNetTrainer.on_epoch_end
    best: list[tuple[int, float]] = []

    def on_validation_epoch_end(trainer: Any, outputs: list[dict[str, Any]]) -> None:
        assert np.isfinite([output["loss"] for output in outputs]).all()
        end_validation(trainer, [{"loss": np.array(LOSSES[trainer.current_epoch])}])

    def on_epoch_end(trainer: Any) -> None:
        trainer.save_every = 1
        end_epoch(trainer)
        checkpoint = torch.load(Path(trainer.output_folder) / "checkpoint_best.pth", weights_only=True)
        best.append((checkpoint["current_epoch"], checkpoint["_best_ema"]))

    monkeypatch.setattr(ReconstructionTrainer, "on_validation_epoch_end", on_validation_epoch_end)
    monkeypatch.setattr(nnUNetTrainer, "on_epoch_end", on_epoch_end)
    return best


def train(trainer: type, **options: Any) -> None:
    """Trains as nnU-Net's command does, in this process."""
    run_training(DATASET, "quick", 0, trainer.__name__, device=torch.device("cpu"), **options)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [nnUNetTrainerModelsGenesisPretrain, nnUNetTrainerPCTNetMIMPretrain])
def test_continued_run_goes_on_at_its_epoch_and_only_a_lower_loss_replaces_the_best_checkpoint(
    workspace: Workspace, best_of_epochs: list[tuple[int, float]], monkeypatch: pytest.MonkeyPatch, kind: type
) -> None:
    start_epoch = nnUNetTrainer.on_train_epoch_start

    def interrupt(trainer: Any) -> None:
        if trainer.current_epoch == INTERRUPTED:
            raise KeyboardInterrupt
        start_epoch(trainer)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(nnUNetTrainer, "on_train_epoch_start", interrupt)
        train(kind)
    folder = workspace.results / f"{kind.__name__}__nnUNetPlans__quick" / "fold_0"
    names = {"checkpoint_latest.pth", "checkpoint_earlier_1.pth", "checkpoint_best.pth"}
    assert names == {path.name for path in folder.glob("*.pth")}
    for log in folder.glob("training_log*"):
        log.unlink()
    train(kind, continue_training=True)
    (log,) = folder.glob("training_log*")
    assert re.findall(r"Epoch (\d+)", log.read_text()) == ["2", "3"] and "WARNING" not in log.read_text()
    assert [epochs for epochs, _ in best_of_epochs] == [1, 1, 1, 4]
    assert [average for _, average in best_of_epochs] == pytest.approx([-3.0, -3.0, -3.0, -2.826])
    checkpoint = torch.load(folder / "checkpoint_final.pth", weights_only=True)
    logged = checkpoint["logging"]
    assert checkpoint["current_epoch"] == len(logged["train_losses"]) == len(LOSSES)
    assert logged["val_losses"] == list(LOSSES) and logged["mean_fg_dice"] == [-loss for loss in LOSSES]
    assert logged["ema_fg_dice"] == pytest.approx(MOVING_AVERAGE)
    assert (folder / "progress.png").stat().st_size > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param(
            nnUNetTrainerPatchSwappingPretrain,
            "inductor",
            marks=pytest.mark.skipif(not shutil.which("g++"), reason="PyTorch's compiler on the CPU needs g++"),
        ),
        (nnUNetTrainerPCTNetMIMPretrain, "aot_eager"),  # its kernels alone take minutes to compile
    ],
)
def test_compiled_training_steps_give_the_losses_of_eager_ones(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, kind: Any, backend: str
) -> None:
    monkeypatch.setenv("nnUNet_compile", "t")
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    losses = {}
    for compiled in (False, True):
        monkeypatch.setattr(nnUNetTrainer, "_do_i_compile", lambda trainer, answer=compiled: answer)  # never on the CPU
        trainer = workspace.trainer(kind, {"optimizer": "sgd", "attention_dropout": 0.0})
        trainer.initialize()
        trainer.network.train()
        for module in trainer.bare_network.modules():
            if hasattr(module, "probability"):
                module.probability = 0.0  # PCT-Net draws what it drops in another way when compiled
        assert (trainer.network is not trainer.bare_network) == compiled
        trainer.task_generator.manual_seed(0)
        batch = {"data": torch.randn(2, 1, 16, 16, 16, generator=torch.Generator().manual_seed(0)), "keys": ["a", "b"]}
        losses[compiled] = [float(trainer.train_step(batch)["loss"]) for _ in range(2)]  # the second: gradients too
    assert losses[True] == pytest.approx(losses[False], abs=1e-4) and losses[True][0] != losses[True][1]


@pytest.mark.parametrize("kind", ["mse", "l1"])
def test_loss_under_autocast_is_float32_with_finite_gradients(kind: Any) -> None:
    network = torch.nn.Linear(8, 8)  # along W
    volumes = torch.randn(2, 1, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    target = 100 * volumes
    target[:, :, :4] = torch.nan
    with torch.autocast("cpu", torch.bfloat16):
        restored = network(volumes)
        loss = ReconstructionLoss(kind)(restored, target)
    loss.backward()
    assert restored.dtype == torch.bfloat16 and loss.dtype == torch.float32
    error = restored.detach().double()[:, :, 4:] - target.double()[:, :, 4:]
    assert float(loss.detach()) == pytest.approx(float((error**2 if kind == "mse" else error.abs()).mean()), rel=1e-5)
    for parameter in network.parameters():
        assert parameter.grad is not None and parameter.grad.dtype == torch.float32
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0
