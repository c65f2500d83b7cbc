from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Workspace
from interrupting import LENGTH, make_repeatable

from nnunetv2_misfm.trainers import resumable
from nnunetv2_misfm.trainers.baseline import nnUNetTrainerBaseline
from nnunetv2_misfm.trainers.volume_fusion import nnUNetTrainerVFPretrain
from nnunetv2_misfm.weights.checkpoint import read_checkpoint, write_checkpoint

NEVER = 1000


class Watched:
    """A training in which every step takes a minute by its clock, and that notes its checkpoints of the newest state.

    Attributes:
        written: (epoch, steps done) of each.
        kept: What else of them lay in the folder after each.
    """

    def __init__(self, workspace: Workspace, monkeypatch: pytest.MonkeyPatch, kind: type, block: dict) -> None:
        make_repeatable(monkeypatch.setattr)
        self.minutes = 0
        self.written: list[tuple[int, int]] = []
        self.kept: list[dict[str, tuple[int, int]]] = []
        monkeypatch.setattr(resumable, "monotonic", lambda: 60 * self.minutes)
        write = resumable.write_checkpoint

        def noted(checkpoint: dict[str, Any], path: Path, former: Any) -> None:
            write(checkpoint, path, former)
            if path.name == "checkpoint_latest.pth":
                self.written.append(place_of(path))
                self.kept.append({p.name: place_of(p) for p in path.parent.glob("checkpoint_earlier*")})

        monkeypatch.setattr(resumable, "write_checkpoint", noted)
        trainer = workspace.trainer(kind, {**LENGTH, "checkpoint_every_epochs": NEVER, **block})
        take = trainer.optimisation_step

        def optimisation_step(batch: dict) -> dict:
            self.minutes += 1
            return take(batch)

        trainer.optimisation_step = optimisation_step
        trainer.run_training()
        self.left = {path.name for path in Path(trainer.output_folder).glob("checkpoint*")}


def place_of(path: Path) -> tuple[int, int]:
    checkpoint = read_checkpoint(path)
    return checkpoint["current_epoch"], len(checkpoint["misfm_state"]["ranks"][0]["losses"])


# three epochs of three steps; a checkpoint after the last step of an epoch says that its validation is to do
@pytest.mark.parametrize(
    ("block", "written"),
    [
        ({"checkpoint_every_minutes": 0}, []),
        ({"checkpoint_every_minutes": 1}, [(e, s) for e in range(3) for s in (1, 2, 3)]),
        ({"checkpoint_every_minutes": 2}, [(0, 2), (1, 1), (1, 3), (2, 2)]),
        ({"checkpoint_every_minutes": 4.5}, [(1, 2)]),
        ({"checkpoint_every_minutes": 0, "checkpoint_every_epochs": 1}, [(1, 0), (2, 0)]),
        ({"checkpoint_every_minutes": 0, "checkpoint_every_epochs": 2}, [(2, 0)]),
        ({"checkpoint_every_minutes": 4, "checkpoint_every_epochs": 2}, [(1, 1), (2, 0)]),  # 3 minutes after the second
    ],
)
def test_checkpoints_come_every_few_minutes_and_epochs(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, block: dict, written: list
) -> None:
    assert Watched(workspace, monkeypatch, nnUNetTrainerVFPretrain, block).written == written


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_the_last_few_are_kept_until_the_training_ends(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, keep: int
) -> None:
    block = {"checkpoint_every_minutes": 2, "keep_checkpoints": keep}
    watched = Watched(workspace, monkeypatch, nnUNetTrainerVFPretrain, block)
    for i, kept in enumerate(watched.kept):
        former = list(reversed(watched.written[:i]))[: keep - 1]
        assert kept == {f"checkpoint_earlier_{n}.pth": place for n, place in enumerate(former, start=1)}
    assert len(watched.kept) == 4
    assert watched.left == {"checkpoint_final.pth", "checkpoint_best.pth"}


def test_baseline_has_checkpoints_of_our_usual_cadence(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    block = {"num_iterations_per_epoch": 31, "num_epochs": 1, "checkpoint_every_minutes": 1}  # the last is not read
    assert Watched(workspace, monkeypatch, nnUNetTrainerBaseline, block).written == [(0, 30)]


def test_a_new_training_sets_the_checkpoints_of_an_earlier_one_aside(workspace: Workspace) -> None:
    first = workspace.trainer(nnUNetTrainerVFPretrain)
    first.run_training()
    folder = Path(first.output_folder)
    (folder / "checkpoint_latest.pth").write_bytes(b"old")
    (folder / "checkpoint_earlier_1.pth").write_bytes(b"older")
    finished = (folder / "checkpoint_final.pth").read_bytes()
    second = workspace.trainer(nnUNetTrainerVFPretrain)
    second.on_train_start()
    second.end_workers()
    assert (folder / "checkpoint_final.pth").read_bytes() == finished  # until there is something to take its place
    second.save_checkpoint(str(folder / "checkpoint_latest.pth"))
    names = {path.name for path in folder.glob("*.pth")}
    former = {f"former_checkpoint_{name}.pth" for name in ("final", "latest", "earlier_1", "best")}
    assert names == {*former, "checkpoint_latest.pth"}
    assert (folder / "former_checkpoint_final.pth").read_bytes() == finished
    assert "A new training: checkpoints of an earlier one" in Path(second.log_file).read_text()


def test_a_dead_worker_is_not_taken_for_a_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def save(*given: object) -> None:
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    monkeypatch.setattr(torch, "save", save)
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        write_checkpoint({}, tmp_path / "checkpoint_latest.pth")
    assert not list(tmp_path.iterdir())


def test_a_disabled_checkpoint_is_spoken_of_when_due_and_a_signal_then_ends_with_another_code(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    minutes = iter(range(0, 1000, 7))
    monkeypatch.setattr(resumable, "monotonic", lambda: 60 * next(minutes))
    block = {"num_iterations_per_epoch": 10, "checkpoint_every_minutes": 28}
    trainer = workspace.trainer(nnUNetTrainerVFPretrain, block)
    trainer.disable_checkpointing = True
    trainer.run_training()
    spoken = Path(trainer.log_file).read_text().count("No checkpoint written")
    assert 3 <= spoken <= 5  # two or three by the clock, best and final
    trainer = workspace.trainer(nnUNetTrainerVFPretrain, block)
    trainer.disable_checkpointing = True
    trainer.on_train_start()
    trainer.network.train()
    trainer.interruption.requested = "SIGTERM"
    with pytest.raises(SystemExit) as caught:
        trainer.train_step(next(trainer.dataloader_train))
    assert caught.value.code == 1
    assert "nothing was kept, since checkpointing is disabled" in Path(trainer.log_file).read_text()
