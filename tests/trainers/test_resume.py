import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace
from interrupting import Training, assert_same_end, checkpoint_of, disturb, make_repeatable
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunetv2_misfm.trainers import resumable
from nnunetv2_misfm.trainers.base import MisfmTrainer
from nnunetv2_misfm.trainers.baseline import nnUNetTrainerBaseline
from nnunetv2_misfm.trainers.masked_image_modelling import nnUNetTrainerMIMPretrain
from nnunetv2_misfm.trainers.pct_net import nnUNetTrainerPCTNet
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerPCTNetVFPretrain, nnUNetTrainerVFPretrain

# (epoch, step, phase): in the middle of an epoch, in its validation, at the first step of the last one
PLACES = [(1, 1, "training"), (1, 1, "validation"), (2, 0, "training")]
EVERY_STEP = {"checkpoint_every_minutes": 1e-9}
NEW_NUMBERS = "The checkpoint holds no state of its random numbers for as many processes: they start anew."


class Killed(Exception):
    """Stands for a kill that no handler sees, in this process."""


def kill() -> None:
    raise Killed


@pytest.fixture
def training(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Training]]:
    make_repeatable(monkeypatch.setattr)
    made: list[Training] = []

    def make(*arguments: Any, **planned: Any) -> Training:
        made.append(Training(workspace, *arguments, **planned))
        return made[-1]

    yield make
    for one in reversed(made):
        one.release()


def log_of(trainer: Any) -> str:
    return Path(trainer.log_file).read_text()


def edit(file: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    checkpoint = torch.load(file, weights_only=True)
    change(checkpoint)
    torch.save(checkpoint, file)


@pytest.mark.parametrize(
    ("kind", "block", "planned"),
    [
        pytest.param(nnUNetTrainerVFPretrain, {}, {}, id="Volume Fusion"),
        pytest.param(
            nnUNetTrainerVFPretrain,
            {},
            {"batch_size": 1, "patch_size": [16, 16, 32]},
            id="foreground memory",
        ),
        pytest.param(nnUNetTrainerMIMPretrain, {"optimizer": "adamw"}, {}, id="reconstruction"),
        pytest.param(nnUNetTrainerVFPretrain, {"augmentation": "nnunet"}, {}, id="augmentation on the device"),
        pytest.param(
            nnUNetTrainerVFPretrain, {"augmentation": "nnunet", "augmentation_on": "workers"}, {}, id="nnU-Net's own"
        ),
        pytest.param(
            nnUNetTrainerVFPretrain, {"accumulate_steps": 2, "ema_decay": 0.9}, {"batch_size": 1}, id="accumulation"
        ),
        pytest.param(nnUNetTrainerPCTNetVFPretrain, {"ema_decay": 0.9, "warmup_epochs": 2}, {}, id="average, warm-up"),
        pytest.param(nnUNetTrainerBaseline, {}, {}, id="baseline"),
        pytest.param(MisfmTrainer, {"ema_decay": 0.9, "accumulate_steps": 2}, {}, id="average with labels"),
        pytest.param(nnUNetTrainerPCTNet, {"attention_dropout": 0.2}, {}, id="dropout with labels"),
    ],
)
def test_resumed_training_ends_as_one_that_was_not_interrupted(
    training: Callable[..., Training], kind: type, block: dict[str, Any], planned: dict[str, Any]
) -> None:
    run = training(kind, block, **planned)
    expected = run.uninterrupted()
    for i, place in enumerate(PLACES):
        trainer = run.end_at(*place, resume=i > 0)
        epoch, step, phase = place
        steps = 3 if phase == "validation" else step + 1
        sentence = f"Ended by SIGTERM in epoch {epoch} after {steps} of 3 steps; go on with --c. Exit code 75."
        assert sentence in log_of(trainer)
    run.finish(resume=True)
    assert_same_end(run.folder, expected)


def test_checkpoint_within_an_epoch_is_one_that_any_nnunet_begins_the_epoch_anew_from(
    training: Callable[..., Training], workspace: Workspace
) -> None:
    run = training(MisfmTrainer)
    network = run.end_at(1, 1).network.state_dict()
    checkpoint = checkpoint_of(run.folder, "latest")
    assert {len(values) for values in checkpoint["logging"].values()} == {1}
    stock = workspace.trainer(nnUNetTrainer)
    stock.num_epochs, stock.num_iterations_per_epoch, stock.num_val_iterations_per_epoch = 2, 1, 1
    stock.load_checkpoint(str(run.folder / "checkpoint_latest.pth"))
    assert stock.current_epoch == 1
    assert all(torch.equal(stock.network.state_dict()[name], tensor) for name, tensor in network.items())
    stock.run_training()
    assert len(stock.logger.get_value("train_losses", None)) == 2


@pytest.mark.parametrize("damaged", [["latest"], ["latest", "earlier_1"]])
def test_damaged_newest_checkpoint_gives_way_to_the_furthest_in_epoch_and_steps(
    training: Callable[..., Training], damaged: list[str]
) -> None:
    run = training(nnUNetTrainerVFPretrain, {**EVERY_STEP, "keep_checkpoints": 3})
    expected = run.uninterrupted()
    run.end_at(1, 2)
    for name in damaged:
        file = run.folder / f"checkpoint_{name}.pth"
        file.write_bytes(file.read_bytes()[:1000])
    resumed = run.trainer(resume=True)
    used = f"checkpoint_earlier_{len(damaged)}.pth (epoch 1) instead."
    log = log_of(resumed)
    assert "WARNING" in log and "is truncated or no PyTorch checkpoint" in log and used in log
    resumed.on_train_start()
    assert resumed.steps_done == 3 - len(damaged)
    resumed.end_workers()
    run.finish(resume=True)
    assert_same_end(run.folder, expected)


def test_checkpoint_without_random_state_goes_on_with_other_random_numbers(training: Callable[..., Training]) -> None:
    run = training(nnUNetTrainerVFPretrain)
    run.end_at(1, 1)
    edit(run.folder / "checkpoint_latest.pth", lambda checkpoint: checkpoint.pop("misfm_state"))
    trainer = run.finish(resume=True)
    assert NEW_NUMBERS in log_of(trainer)
    assert len(checkpoint_of(run.folder, "final")["logging"]["train_losses"]) == 3


def test_one_process_goes_on_from_the_checkpoint_of_two(training: Callable[..., Training]) -> None:
    run = training(nnUNetTrainerVFPretrain, {"ema_decay": 0.5})
    run.end_at(1, 1)
    edit(run.folder / "checkpoint_latest.pth", lambda checkpoint: checkpoint["misfm_state"].update(
        ranks=checkpoint["misfm_state"]["ranks"] * 2))  # fmt: skip
    trainer = run.trainer(resume=True)
    steps: list[tuple[int, int]] = []
    take = trainer.train_step
    trainer.train_step = lambda batch: (steps.append((trainer.current_epoch, trainer.steps_done)), take(batch))[1]
    trainer.run_training()
    assert NEW_NUMBERS in log_of(trainer)
    assert steps == [(1, 0), (1, 1), (1, 2), (2, 0), (2, 1), (2, 2)]  # the epoch is begun anew


def test_moving_average_is_what_a_checkpoint_holds_and_validation_uses(training: Callable[..., Training]) -> None:
    run = training(MisfmTrainer, {"ema_decay": 0.75})
    trainer, raw, validated = run.trainer(), [], []

    def weights() -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in trainer.network.state_dict().items()}

    take, validate = trainer.train_step, trainer.validation_step
    trainer.train_step = lambda batch: (take(batch), raw.append(weights()))[0]
    trainer.validation_step = lambda batch: (validate(batch), validated.append(weights()))[0]
    trainer.run_training()
    average = raw[0]
    for later in raw[1:]:
        average = {name: 0.75 * average[name] + 0.25 * later[name] for name in average}
    checkpoint = checkpoint_of(run.folder, "final")
    again = run.workspace.trainer(MisfmTrainer, run.block)  # as --val does
    again.load_checkpoint(str(run.folder / "checkpoint_final.pth"))
    for name, tensor in average.items():
        for held in (checkpoint["network_weights"], validated[-1], trainer.network.state_dict()):
            torch.testing.assert_close(held[name], tensor)
        assert torch.equal(again.network.state_dict()[name], checkpoint["network_weights"][name])
        assert torch.equal(checkpoint["misfm_state"]["raw_weights"][name], raw[-1][name])
    assert not torch.equal(raw[-1]["encoder.stages.0.0.convs.0.conv.weight"], tensor_of(checkpoint))


def tensor_of(checkpoint: dict[str, Any]) -> torch.Tensor:
    return checkpoint["network_weights"]["encoder.stages.0.0.convs.0.conv.weight"]


def with_scores(trainer: Any, scores: list[float]) -> Any:
    """Has a trainer log these foreground Dice scores, epoch by epoch."""
    log = trainer.logger.log
    trainer.logger.log = lambda key, value, epoch: log(key, scores[epoch] if key == "mean_fg_dice" else value, epoch)
    return trainer


def test_best_checkpoint_is_not_replaced_by_a_worse_one_after_a_resume(training: Callable[..., Training]) -> None:
    run = training(nnUNetTrainerVFPretrain, {"checkpoint_every_epochs": 1})
    scores = [0.1, 0.9, 0.0]  # averaged: 0.1, 0.18, 0.162
    trainer = with_scores(run.trainer(), scores)
    disturb(trainer, kill, 2, 0)
    with pytest.raises(Killed):
        trainer.run_training()
    assert checkpoint_of(run.folder, "latest")["_best_ema"] == 0.1  # written before the best is looked for
    assert checkpoint_of(run.folder, "best")["current_epoch"] == 2
    with_scores(run.trainer(resume=True), scores).run_training()
    assert checkpoint_of(run.folder, "best")["current_epoch"] == 2
    assert checkpoint_of(run.folder, "final")["_best_ema"] == pytest.approx(0.18)


@pytest.mark.parametrize("epoch", [0, 1])
def test_best_checkpoint_that_a_kill_prevented_is_written_by_the_resumed_run(
    training: Callable[..., Training], monkeypatch: pytest.MonkeyPatch, epoch: int
) -> None:
    run = training(nnUNetTrainerVFPretrain, {"checkpoint_every_epochs": 1, "ema_decay": 0.9})
    scores = [[0.9, 0.0, 0.0], [0.1, 0.9, 0.0]][epoch]
    with_scores(run.trainer(), scores).run_training()
    expected = run.folder.rename(run.workspace.root / "uninterrupted")
    write = resumable.write_checkpoint

    def killed_at_best(checkpoint: dict, path: Path, former: Any) -> None:
        if re.search("best", path.name) and checkpoint["current_epoch"] == epoch + 1:
            kill()
        write(checkpoint, path, former)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(resumable, "write_checkpoint", killed_at_best)
        with_scores(run.trainer(), scores).run_training()
    with_scores(run.trainer(resume=True), scores).run_training()
    assert checkpoint_of(run.folder, "best")["current_epoch"] == epoch + 1
    assert_same_end(run.folder, expected)
