"""Trainings that are disturbed at a step of the test's choosing, and whether two trainings ended alike."""

import os
import signal
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from batchgeneratorsv2.transforms.noise.gaussian_blur import GaussianBlurTransform, blur_dimension
from conftest import Workspace
from nnunetv2.training.logging.nnunet_logger import MetaLogger

from nnunetv2_misfm.trainers.interruption import EXIT_CODE

LENGTH = {"num_epochs": 3, "num_iterations_per_epoch": 3, "num_val_iterations_per_epoch": 2}
Phase = Literal["training", "validation"]
TIMES = ("epoch_start_timestamps", "epoch_end_timestamps")


def disturb(trainer: Any, deed: Callable[[], Any], epoch: int, step: int, phase: Phase = "training") -> None:
    """Has a trainer do a deed just before a step of an epoch (both from 0)."""
    name = "train_step" if phase == "training" else "validation_step"
    take = getattr(trainer, name)
    validated = []

    def disturbed(batch: dict) -> dict:
        here = trainer.steps_done if phase == "training" else validated.count(trainer.current_epoch)
        validated.append(trainer.current_epoch)
        if (trainer.current_epoch, here) == (epoch, step):
            deed()
        return take(batch)

    setattr(trainer, name, disturbed)


def send(number: int) -> None:
    os.kill(os.getpid(), number)


def end_soon() -> None:
    send(signal.SIGTERM)


def checkpoint_of(folder: Path, name: str) -> dict[str, Any]:
    return torch.load(folder / f"checkpoint_{name}.pth", weights_only=True)


def assert_same_end(folder: Path, expected: Path) -> None:
    """Fails unless two trainings left the same checkpoints, to the bit; times and the plans' options aside."""
    for name in ("final", "best"):
        left, right = (checkpoint_of(f, name) for f in (folder, expected))
        for checkpoint in (left, right):
            for key in TIMES:
                checkpoint["logging"].pop(key)
            for key in ("init_args", "misfm_meta"):
                checkpoint.pop(key)
        found = list(differences(left, right, name))
        assert not found, found[:5]
    files = sorted(path.name for path in folder.glob("checkpoint*"))
    assert files == ["checkpoint_best.pth", "checkpoint_final.pth"], files


def differences(left: Any, right: Any, where: str) -> Iterator[str]:
    """Yields where two checkpoints differ."""
    if isinstance(left, Mapping) and isinstance(right, Mapping):
        for key in {**left, **right}:
            yield from differences(left.get(key, "missing"), right.get(key, "missing"), f"{where}/{key}")
    elif isinstance(left, list | tuple) and isinstance(right, list | tuple) and len(left) == len(right):
        for i, pair in enumerate(zip(left, right, strict=True)):
            yield from differences(*pair, f"{where}/{i}")
    elif torch.is_tensor(left) and torch.is_tensor(right):
        if not torch.equal(left, right):
            yield f"{where}: other values"
    elif left != right and not (left != left and right != right):  # NaN
        yield f"{where}: {left!r:.60} or {right!r:.60}"


def make_repeatable(replace: Callable[[Any, str, Any], Any] = setattr) -> None:
    """Leaves out what is not ours: pictures of the progress, and nnU-Net's blur, which chooses an algorithm by time."""
    replace(MetaLogger, "plot_progress_png", lambda *_: None)
    replace(
        GaussianBlurTransform,
        "_benchmark_wrapper",
        lambda blur, image, sigma, axis: blur_dimension(image, sigma, axis, force_use_fft=False),
    )


class Training:
    """A training of one kind in this process, that may be interrupted and resumed, each time by a new trainer."""

    def __init__(self, workspace: Workspace, kind: type, block: dict[str, Any] | None = None, **planned: Any) -> None:
        self.workspace, self.kind, self.planned = workspace, kind, planned
        self.block = {**LENGTH, **(block or {})}
        self.started: list[Any] = []

    def trainer(self, resume: bool = False) -> Any:
        trainer = self.workspace.trainer(self.kind, self.block, continue_training=resume, **self.planned)
        self.started.append(trainer)
        self.folder = Path(trainer.output_folder)
        if resume:
            trainer.load_checkpoint(str(self.folder / "checkpoint_latest.pth"))
        return trainer

    def end_at(self, *place: Any, resume: bool = False) -> Any:
        """Trains until a SIGTERM that comes just before a step."""
        trainer = self.trainer(resume)
        disturb(trainer, end_soon, *place)
        with pytest.raises(SystemExit) as ended:
            trainer.run_training()
        assert ended.value.code == EXIT_CODE
        return trainer

    def finish(self, resume: bool = False) -> Any:
        trainer = self.trainer(resume)
        trainer.run_training()
        return trainer

    def uninterrupted(self) -> Path:
        """The folder of the same training, of which nothing was asked in between."""
        self.finish()
        return self.folder.rename(self.workspace.root / "uninterrupted")

    def release(self) -> None:
        """Gives the signals back."""
        for trainer in reversed(self.started):
            trainer.interruption.release()
